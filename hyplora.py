"""HypLoRA: low-rank adaptation in hyperbolic space, in one file that needs nothing but PyTorch.

Yang et al., "Hyperbolic Fine-Tuning for Large Language Models", NeurIPS 2025, arXiv 2410.04010.

LoRA adapts a frozen linear layer W with two thin matrices: z = W x + scaling * B A x. HypLoRA takes
the product with BA in hyperbolic space instead, which curves away from its origin:

    z = W x + scaling * logmap0(llr(expmap0(x); B, A)),       scaling = alpha / rank

expmap0 lifts x into that space, llr multiplies it by BA there, and logmap0 brings it back. The
curvature of the space is -1/K, and lengths are in units of sqrt K. Let r = |x| be the radius of a
token and g = |BAx| / |x| the gain. Both updates point along BAx, and their lengths r' are

    LoRA:  r' = g r                    HypLoRA:  sinh r' = g sinh r    (the law of sinh)

Usage:

    inject_hyplora(model, "all-linear", rank=8)        # freezes the model and adds the adapters
    calibrate_curvature(model, sample_inputs)          # fits K to the lengths in this model
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=3e-4)
    ...                                                # train as usual
    save_hyplora(model, "adapter.pt")                  # load_hyplora(bare_model, "adapter.pt")

The method ends with inject_hyplora, and you can stop there. The rest is for use.
"""

import contextlib
import math
import os
import re
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Geometry -----------------------------------------------------------------------------------
#
# The Lorentz model of hyperbolic space is one sheet of a hyperboloid: the points
# p = (p0, p1, ..., pd) with -p0^2 + p1^2 + ... + pd^2 = -K and p0 > 0. The coordinate p0 is called
# time, the others are called space. The lowest point, (sqrt K, 0, ..., 0), is the origin, and the
# vectors of a network live in the tangent space there: the flat space that touches the sheet.


def lorentz_inner(p, q):
    """The Lorentz inner product <p, q> = -p0 q0 + p1 q1 + ... + pd qd: two (..., d+1) -> (...)."""
    return (p[..., 1:] * q[..., 1:]).sum(dim=-1) - p[..., 0] * q[..., 0]


def _squared_length(v):
    """|v|^2, summed in float32 or wider: (..., d) -> (..., 1)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    return v.square().sum(dim=-1, keepdim=True, dtype=wide)


def _radius(squared_length, K):
    """A length in units of sqrt K, from its square.

    For length 0 it is 1e-18, so that sinh(r) / r is 1 there and not 0 / 0. Float32 ends at 3e38;
    the gradient of a division by K would reach that sooner than this product with 1/K. hardtanh is
    a clamp with a cheaper backward.
    """
    return F.hardtanh(squared_length * K**-1, 1e-36, 3e38).sqrt()


def expmap0(v, K):
    """The exponential map lifts a vector to a point as far from the origin as the vector is long.

        expmap0(v) = ( sqrt K cosh(|v|/sqrt K),  sqrt K sinh(|v|/sqrt K) v/|v| )

    v: (..., d). K: a positive number or a tensor of one element. Returns (..., d+1), time first.
    """
    r = _radius(_squared_length(v), K)
    time = K**0.5 * torch.cosh(r)
    space = torch.sinh(r) / r * v
    return torch.cat([time, space], dim=-1)


def logmap0(p, K):
    """The logarithmic map at the origin brings a point back down: the inverse of expmap0.

        logmap0(p) = sqrt K asinh(|p_s|/sqrt K) p_s/|p_s|,      where p_s is the space part of p

    p: (..., d+1), time first. Returns (..., d).
    """
    space = p[..., 1:]
    s = _radius(_squared_length(space), K)
    return torch.asinh(s) / s * space


def llr(p, A, B, K):
    """The Lorentz low-rank transformation (LLR) multiplies space by BA and computes time anew.

        llr(p; B, A) = ( sqrt(|BA p_s|^2 + K),  BA p_s )

    p: (..., d_in+1). A: (rank, d_in). B: (d_out, rank). Returns (..., d_out+1).
    """
    space = p[..., 1:] @ A.T @ B.T
    time = (space.square().sum(dim=-1, keepdim=True) + K).sqrt()
    return torch.cat([time, space], dim=-1)


# --- The update, as the paper writes it and as the law of sinh ----------------------------------


def hyplora_reference(x, A, B, K):
    """The update as the paper writes it, in float32 or float64. Arguments: as in hyplora_update."""
    return logmap0(llr(expmap0(x, K), A, B, K), K)


def hyplora_update(x, A, B, K, max_radius=12.0):
    """The same update by the law of sinh: sinh r' = g sinh r, with lengths in units of sqrt K.

    No step above reads time, so follow space alone. expmap0 stretches x to the length sinh r, llr
    multiplies that by the gain g, and logmap0 takes the asinh of the product. What remains is BAx
    with another length. At K = infinity it is BAx itself: LoRA. A token with a radius above
    max_radius is treated as if it lay there (the authors do so too), as sinh would overflow.

    x: (..., d_in), any float dtype. A: (rank, d_in). B: (d_out, rank). K: a positive number or a
    tensor of one element, infinity included. Returns (..., d_out). The products and the result have
    the dtype of x, or float32 if that is float16. Lengths are in float32 or wider.
    """
    if x.dtype == torch.float16:
        x = x.float()  # Numbers on the way can be larger than 65504, where float16 ends.
    h = F.linear(x, A.to(x.dtype))
    if not (torch.is_grad_enabled() or torch.jit.is_tracing()):  # A trace may be trained later.
        lora = F.linear(h, B.to(x.dtype))
        phi = _phi(_squared_length(x), _squared_length(lora), K, max_radius)
        return phi.to(x.dtype) * lora

    # The backward pass would need BAx for its length. But BAx = Bh is as long as the square root
    # of h^T (B^T B) h, which needs only the short vector h.
    wide_h = h.to(torch.promote_types(x.dtype, torch.float32))
    wide_B = B.to(wide_h.dtype)
    G = wide_B.T @ wide_B
    lora_squared = (wide_h @ G * wide_h).sum(dim=-1, keepdim=True)
    phi = _phi(_squared_length(x), lora_squared, K, max_radius)
    return F.linear((phi * wide_h).to(x.dtype), B.to(x.dtype))


def _phi(x_squared, lora_squared, K, max_radius):
    """The law of sinh: phi = |update| / |BAx|, from |x|^2 and |BAx|^2."""
    both = torch.cat([x_squared, lora_squared], dim=-1)
    r, lora_r = _radius(both, K).chunk(2, dim=-1)
    gain = lora_r / r
    new_r = torch.asinh(gain * torch.sinh(F.hardtanh(r, 0, max_radius)))  # sinh r' = g sinh r
    return new_r / lora_r


# --- The layer ----------------------------------------------------------------------------------


class HypLoRALinear(nn.Module):
    """A linear layer with a HypLoRA adapter: base(x) + scaling * hyplora_update(x, A, B, K).

    base: nn.Linear, the Conv1D of transformers, or a module with in_features and out_features.
    rank, alpha: the rank of BA; the update is scaled by alpha / rank.
    dropout: the share of the adapter's input that is dropped while training.
    curvature: K / u^2, so that larger is flatter (the paper's name), where u is the length of a
        typical token, whose radius is 1/sqrt(curvature). u^2 starts as in_features, and
        calibrate_curvature measures it. math.inf is plain LoRA.
    learn_curvature, max_radius: whether K is trained, and the bound of hyplora_update.

    The parameters are float32: lora_A (rank, in_features), drawn as in LoRA; lora_B (out_features,
    rank), zero, so that a fresh adapter changes nothing; lora_K (1,), zero, where K = curvature *
    in_features * exp(lora_K). The output has the base's dtype (in float16 it ends at 65504).

    Raises TypeError if base is not a linear layer, ValueError if an option is outside its range.
    """

    def __init__(
        self, base, rank=8, alpha=16, dropout=0, curvature=0.5, learn_curvature=True, max_radius=12
    ):
        super().__init__()
        self.options = dict(rank=rank, alpha=alpha, dropout=dropout, curvature=curvature)
        self.options.update(learn_curvature=learn_curvature, max_radius=max_radius)
        _check(base, **self.options)
        self.base = base
        self.in_features, self.out_features = _features(base)
        self.scaling = alpha / rank
        self.curvature = curvature
        self.max_radius = max_radius
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.enabled = True
        device = next((t.device for t in [*base.parameters(), *base.buffers()]), None)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device))
        self.lora_K = nn.Parameter(torch.empty(1, device=device))  # Sharding refuses the shape ().
        self.lora_K.requires_grad_(learn_curvature and curvature < math.inf)
        self.reset_parameters()
        self.train(base.training)
        self.register_state_dict_post_hook(HypLoRALinear._save_without_base)

    def reset_parameters(self):
        """Make the adapter a fresh one, also after the layer was moved off the meta device."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        nn.init.zeros_(self.lora_K)

    @property
    def K(self):
        """K > 0, where -1/K is the curvature of the space: a tensor of shape (1,)."""
        wide = torch.promote_types(self.lora_K.dtype, torch.float32)
        return self.curvature * self.in_features * self.lora_K.to(wide).exp()

    def forward(self, x, *args, **kwargs):
        """x: (..., in_features) -> (..., out_features). Further arguments reach the base."""
        out = self.base(x, *args, **kwargs)
        if not self.enabled:
            return out
        x = self.dropout(x.to(out.dtype))
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
            if self.curvature == math.inf:
                update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            else:
                update = hyplora_update(x, self.lora_A, self.lora_B, self.K, self.max_radius)
            result = torch.add(out, update, alpha=self.scaling)  # out + scaling * update
        if out.dtype == torch.float16:
            result = result.clamp(-65504, 65504).to(torch.float16)
        return result

    # Some models read these: T5 asks for wo.weight.dtype.
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    # In a state dict, the base's tensors have the names that they have without an adapter.

    def _save_without_base(self, state_dict, prefix, local_metadata):
        for key in self.base.state_dict(prefix=f"{prefix}base."):
            state_dict[prefix + key.removeprefix(f"{prefix}base.")] = state_dict.pop(key)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = {f"{prefix}{name}": p for name, p in self.named_parameters(recurse=False)}
        for key in [key for key in state_dict if key.startswith(prefix) and key not in own]:
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        if own.keys().isdisjoint(state_dict):
            state_dict.update(own)  # A checkpoint of the base leaves the adapter as it is.
        super()._load_from_state_dict(state_dict, prefix, *args)


# --- Injection ----------------------------------------------------------------------------------


def inject_hyplora(model, targets, train_also=(), **layer_options):
    """Freeze the model and wrap the linear layers that targets names, in place.

    targets: "all-linear" (every linear layer but the output head), or a list of name endings such
    as ["q_proj", "v_proj"]. train_also: a list of name endings of modules that stay trainable and
    are saved with the adapters, such as ["classifier"]. layer_options: those of HypLoRALinear. A
    layer in two places gets one adapter, under its first name. Returns the adapted names. Do this
    before DDP or sharding, which would not average the gradients of adapters that come later.

    Raises ValueError or TypeError, with the model unchanged, if an ending matches nothing that can
    be adapted, if the model is adapted or in DDP already, or if an option is wrong.
    """
    also = _find(model, train_also, callable)
    linears = _find_linears(model, targets, also)
    layers = {name: HypLoRALinear(linear, **layer_options) for name, linear in linears.items()}
    _put_in_place(model, layers, also)
    return list(layers)


# That was the method. The rest of this section is what it calls.


def _require(fits, message):
    if not fits:
        raise ValueError(message)


def _check(base, rank, dropout, learn_curvature, **positive):
    if _features(base) is None or isinstance(base, HypLoRALinear):
        raise TypeError(f"only a bare linear layer can be adapted, got a {type(base).__name__}")
    _require(_features(base)[0], "a lazy linear layer has no shape yet: run the model once first")
    offloaded = hasattr(base, "_hf_hook") and any(p.is_meta for p in base.parameters())
    _require(not offloaded, "the layer's weights are offloaded: load the model on one device")
    _require(type(rank) is int and rank > 0, f"rank must be a positive whole number, got {rank!r}")
    share = type(dropout) in (int, float) and 0 <= dropout < 1
    _require(share, f"dropout must be from 0 to below 1, got {dropout!r}")
    for name, value in positive.items():
        fits = type(value) in (int, float) and value >= 1e-12
        _require(fits, f"{name} must be a Python number of at least 1e-12, got {value!r}")
    _require(positive["alpha"] < math.inf, "alpha must be finite")
    _require(positive["max_radius"] <= 80, "max_radius must be at most 80, as sinh overflows there")


def _features(module):
    """(in_features, out_features) of anything that acts as a linear layer, or None."""
    if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf") and hasattr(module, "weight"):
        return tuple(module.weight.shape)  # transformers' Conv1D: x W + b, with W of (in, out)
    return None


def _named_modules(model, kind=nn.Module):
    """{name: module}, with names as they are without compilation, DDP or averaging around them."""
    while list(model._modules) in (["module"], ["_orig_mod"]):
        model = next(model.children())
    marks = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    return {re.sub(marks, "", n): m for n, m in model.named_modules() if isinstance(m, kind)}


def _find(model, endings, fits):
    """{name: module} of those that fit and have one of the endings; each ending must occur."""
    is_list = isinstance(endings, (list, tuple, set))
    _require(is_list, f'expected "all-linear" or a list of name endings, got {endings!r}')
    modules = _named_modules(model)
    linears = sorted({name.rpartition(".")[2] for name, m in modules.items() if _features(m)})
    for ending in endings:
        named = [m for name, m in modules.items() if f".{name}".endswith(f".{ending}")]
        kinds = ", ".join({type(m).__name__ for m in named}) or "nothing"
        message = f"{ending!r} names {kinds}; linear layers here: {', '.join(linears)}"
        _require(any(fits(m) for m in named), message)
    suffixes = tuple(f".{ending}" for ending in endings)
    return {name: m for name, m in modules.items() if fits(m) and f".{name}".endswith(suffixes)}


def _find_linears(model, targets, also):
    """{name: linear layer} that targets asks for, but for those inside the modules of also."""
    modules = _named_modules(model)
    left_out = {inner for module in also.values() for inner in module.modules()}
    if targets == "all-linear":
        heads = {"lm_head", "embed_out", "head", "score", "classifier"}
        bodies = {name: m for name, m in modules.items() if heads.isdisjoint(name.split("."))}
        found = {name: m for name, m in bodies.items() if _features(m)}
        if hasattr(model, "get_output_embeddings"):
            left_out.add(model.get_output_embeddings())
    else:
        found = _find(model, targets, _features)
    found = _fit(modules, found, refuse=targets != "all-linear")
    found = {name: m for name, m in found.items() if m not in left_out}
    _require(found, "no linear layer is left to adapt, without heads, train_also, and the like")
    return found


def _fit(modules, linears, refuse):
    """The linear layers that can be adapted; the others are refused, or else left out."""
    marks = ("lora_A", "base_layer", "peft_config")  # Adapters, ours or PEFT's, have one of these.
    adapted = [m for m in modules.values() if any(hasattr(m, mark) for mark in marks)]
    _require(not adapted, "adapted already: first call remove_hyplora, or unload() PEFT adapters")
    readers = [nn.MultiheadAttention]
    if torch.backends.mha.get_fastpath_enabled():
        readers.append(nn.TransformerEncoderLayer)
    embeddings = {m.weight for m in modules.values() if isinstance(m, nn.Embedding)}
    fit = {}
    for name, layer in linears.items():
        read = isinstance(modules[name.rpartition(".")[0]], tuple(readers))
        tied = getattr(layer, "weight", None) in embeddings
        why = f"{name} can't be adapted: its owner reads the weight and never calls it"
        _require(not (refuse and read), why)
        _require(not (refuse and tied), f"{name} is tied to an embedding: untie it first")
        if read:
            warnings.warn(why, stacklevel=4)
        elif not tied:
            fit[name] = layer
    return fit


def _put_in_place(model, layers, also):
    """Freeze the model, then put the layers around their bases wherever these stand."""
    _require("" not in layers, "the model is the layer itself: wrap it with HypLoRALinear(model)")
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    _require(not wrapped, "adapt the model first: DDP averages only what trained when it was made")
    model.requires_grad_(False)
    _replace(model, {layer.base: layer for layer in layers.values()})
    for module in also.values():
        module.requires_grad_(True)
        module.hyplora_train_also = True
    trained = {buffer for module in also.values() for buffer in module.buffers()}
    buffers = {name: b for name, b in model.named_buffers() if b not in trained}
    moving = [name for name in buffers if name.endswith(("running_mean", "_u"))]
    if moving:
        how = "training mode changes them, and the base with them: keep them in eval mode"
        warnings.warn(f"{', '.join(moving)}: {how}", stacklevel=3)


def _replace(model, swap):
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            owner._modules[name] = swap.get(child, child)


# --- Training and switching ---------------------------------------------------------------------


def hyplora_parameters(model):
    """The trainable parameters as optimizer groups; lora_K is in one without weight decay."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require(trainable, "nothing trains in this model; inject_hyplora(model, targets) adapts it")
    curvatures = [trainable.pop(name) for name in list(trainable) if name.endswith("lora_K")]
    groups = [{"params": [*trainable.values()]}, {"params": curvatures, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def disable_hyplora(model):
    """Within this context the model is its base, bit for bit, but for modules of train_also.

    It is one switch for all threads that run the model.
    """
    layers = [m for m in model.modules() if isinstance(m, HypLoRALinear) and m.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def remove_hyplora(model):
    """Take the adapters out, in place, and return the base; what was frozen stays frozen."""
    _replace(model, {m: m.base for m in model.modules() if isinstance(m, HypLoRALinear)})
    for module in model.modules():
        module.__dict__.pop("hyplora_train_also", None)
    return model.base if isinstance(model, HypLoRALinear) else model


@torch.no_grad()
def hyplora_statistics(model, *args, **kwargs):
    """What the adapters do to the tokens x of model(*args, **kwargs), which runs once in eval mode.

    Returns {name: {"square": |x|^2, "radius": |x| / sqrt K, "gain": |BAx| / |x|, "phi": |update| /
    |BAx|, "phi_spread": phi's standard deviation}}, means over tokens, of the layers that saw any.
    Where the spread is near 0, HypLoRA is LoRA with alpha times phi. (While B is 0, phi is 1.)
    Measure before compiling: compiled code does not call the hooks that look at the tokens.
    """
    layers = _named_modules(model, HypLoRALinear)
    _require(layers, "this model has no adapters; inject_hyplora(model, targets) adds them")
    seen = {layer: [] for layer in layers.values()}

    def look(layer, inputs):
        if inputs[0].any():
            x = inputs[0].float().reshape(-1, layer.in_features)
            lora = F.linear(F.linear(x, layer.lora_A.float()), layer.lora_B.float())
            update = hyplora_update(x, layer.lora_A, layer.lora_B, layer.K, layer.max_radius)
            n, m, new_n = [_radius(_squared_length(v), 1) for v in (x, lora, update)]
            numbers = [_squared_length(x), n / layer.K.sqrt(), m / n, new_n / m]
            seen[layer].append(torch.cat(numbers, dim=-1))

    with contextlib.ExitStack() as stack:  # When it ends, it undoes what is entered into it.
        for layer in seen:
            stack.enter_context(layer.register_forward_pre_hook(look))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()(*args, **kwargs)

    result = {}
    for name in [name for name, layer in layers.items() if seen[layer]]:
        tokens = torch.cat(seen[layers[name]])
        means = zip(("square", "radius", "gain", "phi"), tokens.mean(dim=0).tolist())
        result[name] = dict(means, phi_spread=tokens[:, 3].std(correction=0).item())
    return result


def calibrate_curvature(model, *args, **kwargs):
    """Set each K from the lengths that its layer sees: K = curvature * mean of |x|^2 over tokens.

    The model runs once on these sample inputs (best without padding, which counts), as its base and
    in eval mode. Then a typical token has the radius 1/sqrt(curvature). Returns {name: K} of layers
    that saw a token. Raises ValueError, with every K as it was, if a length is not finite.
    """
    with disable_hyplora(model):
        seen = hyplora_statistics(model, *args, **kwargs)
    layers = _named_modules(model, HypLoRALinear)
    own = {f"{name}.lora_K": layers[name].lora_K for name in seen}
    ratios = [seen[name]["square"] / layers[name].in_features for name in seen]
    _fill(own, {key: torch.tensor([ratio]).log() for key, ratio in zip(own, ratios)})
    return {name: layers[name].curvature * seen[name]["square"] for name in seen}


# --- Saving the adapters alone, a few MB --------------------------------------------------------


def _trained(model):
    """Two dictionaries by name: the adapters, and the modules of train_also."""
    modules = _named_modules(model)
    also = {name: m for name, m in modules.items() if hasattr(m, "hyplora_train_also")}
    return _named_modules(model, HypLoRALinear), also


def _tensors(layers, also):
    """{name: parameter or buffer} of adapters, without their bases, and of modules in also."""
    tensors = {}
    for name, layer in layers.items():
        tensors.update(layer.named_parameters(name, recurse=False))
    for name, module in also.items():
        tensors.update(module.state_dict(prefix=f"{name}.", keep_vars=True))
    for name, tensor in tensors.items():
        _require(not tensor.is_meta, f"{name} is on the meta device: it has no numbers")
    return tensors


@torch.no_grad()
def _fill(own, tensors):
    """Copy tensors into those of the same names, sharded or not; first make sure that all fit."""
    for name in own.keys() ^ tensors.keys():
        raise ValueError(f"{name} is {'missing' if name in own else 'not of this model'}")
    for name, target in own.items():
        new = tensors[name]
        _require(torch.is_tensor(new), f"{name} should be a tensor, found {new!s:.60}")
        _require(new.shape == target.shape, f"{name} should be {target.shape}, found {new.shape}")
        if isinstance(target, nn.Parameter):  # A buffer may be infinite, as a mask is.
            _require(new.isfinite().all(), f"{name} should be finite numbers, found {new!s:.60}")
    for name, target in own.items():
        new = tensors[name].to(target.device)
        if hasattr(target, "device_mesh"):
            shard = torch.distributed.tensor.distribute_tensor
            new = shard(new, target.device_mesh, target.placements)
        target.copy_(new)


def hyplora_state_dict(model):
    """{"<layer>.lora_A": tensor, ...} of the adapters and of train_also's modules, detached.

    What FSDP2 has sharded comes whole, so that all processes must call this.
    """
    result = {}
    for name, tensor in _tensors(*_trained(model)).items():
        sharded = hasattr(tensor, "full_tensor")
        result[name] = tensor.detach().full_tensor() if sharded else tensor.detach()
    return result


def set_hyplora_state_dict(model, tensors):
    """Copy what hyplora_state_dict returned into the model, or raise ValueError and copy none."""
    _fill(_tensors(*_trained(model)), tensors)


def save_atomically(content, path):
    """torch.save, such that path has the old content or the new, whole, whatever happens."""
    beside = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def save_hyplora(model, path):
    """Write the adapters and the modules of train_also to path, atomically."""
    tensors = hyplora_state_dict(model)
    _require(tensors, "this model has no adapters to save")
    fresh = [n for n in tensors if n.endswith("lora_B") and not tensors[n].any()]
    if fresh:
        why = "they were not trained, or their owner reads the weight and never calls them"
        warnings.warn(f"{', '.join(fresh)} are as they started: {why}", stacklevel=2)
    layers, also = _trained(model)
    options = {name: layer.options for name, layer in layers.items()}
    content = {"hyplora": 2, "layers": options, "also": list(also), "tensors": tensors}
    save_atomically(content, path)


def load_hyplora(model, path):
    """Read adapters that save_hyplora wrote, and return their names.

    A bare model is injected as the file says; an adapted one must have the file's layers. Raises
    OSError if path can't be read, ValueError if it doesn't fit; the model is unchanged then.
    """
    modules = _named_modules(model)
    layers, also = _trained(model)
    bare = not layers
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            _require(content["hyplora"] == 2, "another version wrote it")
            for name, options in content["layers"].items():
                _require(name in (modules if bare else layers), f"{name} is not here to be adapted")
                if bare:
                    layers[name] = HypLoRALinear(modules[name], **options)
                for key in ("rank", "alpha", "curvature", "max_radius"):
                    own, other = layers[name].options[key], options.get(key)
                    _require(own == other, f"{key} of {name} is {own} here, {other} in the file")
            if bare:
                also = {name: modules[name] for name in content["also"]}
                _fit(modules, {name: modules[name] for name in layers}, refuse=True)
            _fill(_tensors(layers, also), content["tensors"])
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged or doesn't fit this model. {why}") from error
    if bare:
        _put_in_place(model, layers, also)
    return list(layers)
