"""HypLoRA: low-rank adaptation in hyperbolic space, in one file that needs nothing but PyTorch.
Yang et al., "Hyperbolic Fine-Tuning for Large Language Models", NeurIPS 2025, arXiv 2410.04010.

LoRA adapts a frozen linear layer W with two thin matrices: z = W x + scaling * B A x. HypLoRA takes
the product with BA in hyperbolic space instead, which widens exponentially around any point:

    z = W x + scaling * logmap0(llr(expmap0(x))),       scaling = alpha / rank

expmap0 lifts x into that space, llr multiplies it by BA there, and logmap0 brings it back. The
paper calls K > 0 the curvature; that of the space is -1/K, so that a larger K is flatter. Let
r = |x| / sqrt K be the radius of a token, and g = |BAx| / |x| the gain. Both updates point along
BAx, and their radii r' are

    LoRA:  r' = g r                    HypLoRA:  sinh r' = g sinh r    (the law of sinh)

Usage:

    inject_hyplora(model, "all-linear", rank=8)        # freezes the model and adds the adapters
    calibrate_curvature(model, sample_inputs)          # fits K to the lengths in this model
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=3e-4)    # train as usual, then
    save_hyplora(model, "adapter.pt")                  # load_hyplora(bare_model, "adapter.pt")
"""

import contextlib
import math
import os
import tempfile
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
# K is a number or a tensor of one element. The maps compute and return float32 or wider.


def lorentz_inner(p, q):
    """<p, q> = -p0 q0 + p1 q1 + ... + pd qd: two (..., d+1) -> (...). The tests alone call it."""
    return (p[..., 1:] * q[..., 1:]).sum(dim=-1) - p[..., 0] * q[..., 0]


def widen(v):
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def length(v):
    """|v|: (..., d) -> (..., 1), at least 1e-36, by squares that neither overflow nor vanish."""
    v = widen(v)
    largest = v.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-36)
    squares = (v / largest).square().sum(dim=-1, keepdim=True)
    return largest * squares.clamp(min=1).sqrt()  # The sum is at least 1, but for v = 0.


def expmap0(v, K):
    """( sqrt K cosh(|v|/sqrt K),  sqrt K sinh(|v|/sqrt K) v/|v| ): (..., d) -> (..., d+1).
    The exponential map lifts a vector to a point as far from the origin as the vector is long."""
    r = (length(v) / K**0.5).clamp(min=1e-18)  # So sinh(r) / r is 1 for v = 0, and not 0 / 0.
    stretch = torch.sinh(r) / r
    is_zero = (v == 0) & stretch.isinf()  # Such a coordinate stays 0: inf * 0 would be NaN.
    return torch.cat([K**0.5 * torch.cosh(r), (stretch * v).masked_fill(is_zero, 0)], dim=-1)


def logmap0(p, K):
    """sqrt K asinh(|p_s|/sqrt K) p_s/|p_s|, where p_s is the space part: (..., d+1) -> (..., d).
    The logarithmic map brings a point back down: it is the inverse of expmap0."""
    space = p[..., 1:]
    s = (length(space) / K**0.5).clamp(min=1e-18)
    return torch.asinh(s) / s * space


def llr(p, A, B, K):
    """( sqrt(|BA p_s|^2 + K),  BA p_s ): (..., d_in+1) -> (..., d_out+1).
    The Lorentz low-rank transformation (LLR) multiplies space by BA and computes time anew."""
    space = widen(p[..., 1:])
    space = space @ A.to(space).T @ B.to(space).T
    time = torch.hypot(length(space), K**0.5 * torch.ones_like(space[..., :1]))
    return torch.cat([time, space], dim=-1)


# --- The update, as the paper writes it and as the law of sinh ----------------------------------

MAX_RADIUS = 12.0  # A token farther out counts as if it lay there, as in the authors' code.


def hyplora_reference(x, A, B, K):
    """The update as the paper writes it, unbounded. Arguments: as in hyplora_update."""
    return logmap0(llr(expmap0(x, K), A, B, K), K)


def hyplora_update(x, A, B, K, max_radius=None):
    """The same update up to max_radius, by the law of sinh: sinh r' = g sinh r.

    No step of hyplora_reference reads time, so follow space alone. In units of sqrt K, expmap0
    makes it sinh r long, llr multiplies that by g, and logmap0 takes the asinh. What remains is BAx
    with another length. At K = infinity it is BAx itself: LoRA. max_radius is MAX_RADIUS if None.

    x: (..., d_in), any float dtype. A: (rank, d_in). B: (d_out, rank). K: a positive number or a
    tensor of one element, or infinite. Returns (..., d_out) in x's dtype (float16: in float32)."""
    x = x.float() if x.dtype == torch.float16 else x  # Squares of float16 overflow soon.
    lora = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(x.dtype)
    return phi_of(x, lora, K, max_radius).to(x.dtype) * lora


def phi_of(x, lora, K, max_radius=None):
    """phi = |update| / |BAx|, or its limit at B = 0: (..., 1). lora: BAx. (length() copies x.)"""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = [v.square().sum(dim=-1, keepdim=True, dtype=wide) for v in (x, lora)]
    squares = torch.cat(squares, dim=-1).clamp(min=torch.finfo(wide).tiny)
    roots = squares / squares.sqrt() / K**0.5  # This is sqrt, but inf gives NaN.
    r, lora_r = roots.clamp(min=1e-18).chunk(2, dim=-1)  # These are |x| and |BAx| over sqrt K.
    bounded = r.clamp(max=MAX_RADIUS if max_radius is None else max_radius)
    return torch.asinh(lora_r / r * torch.sinh(bounded)) / lora_r  # sinh r' = g sinh r


# --- The layer ----------------------------------------------------------------------------------


class HypLoRALinear(nn.Module):
    """A linear layer with a HypLoRA adapter: base(x) + scaling * hyplora_update(x, A, B, K).

    base: nn.Linear, Conv1D of transformers, or what has in_features and out_features. It stays as
        it is; inject_hyplora freezes it.
    rank, alpha: the rank of BA; the update is multiplied by scaling = alpha / rank, after logmap0.
    dropout: the share of the adapter's input that is dropped while training.
    curvature: K starts at curvature * u^2, where u is the length of a typical token at this layer,
        which has the radius 1/sqrt(curvature) then. Larger is flatter; math.inf is plain LoRA.

    Parameters, in torch's default dtype: lora_A (rank, in_features), drawn as in LoRA; lora_B
    (out_features, rank), zero, so that a fresh adapter changes nothing; lora_K (1,), zero, the log
    of K's change. The buffer lora_unit (1,) is u, sqrt(in_features) until calibrated. Outputs have
    the base's dtype. Raises TypeError if the base is not linear, ValueError for a bad option."""

    def __init__(self, base, rank=8, alpha=16, dropout=0, curvature=0.5):
        super().__init__()
        if features_of(base) is None or hasattr(base, "lora_A"):
            raise TypeError(f"only a bare linear layer can be adapted, got {type(base).__name__}")
        self.options = dict(rank=int(rank), alpha=float(alpha), dropout=float(dropout))
        self.options["curvature"] = math.inf if float(curvature) > 1e24 else float(curvature)
        if not (rank >= 1 and 0 < alpha < math.inf and 0 <= dropout < 1 and curvature >= 1e-12):
            ranges = "rank >= 1, 0 < alpha < inf, 0 <= dropout < 1, curvature >= 1e-12"
            raise ValueError(f"options must be within {ranges}, got {self.options}")
        self.in_features, self.out_features = features_of(base)
        self.disabled = []  # Each open disable_hyplora has an entry: append and pop are atomic.
        device = next((t.device for t in [*base.parameters(), *base.buffers()]), None)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device))
        self.lora_K = nn.Parameter(torch.empty(1, device=device))
        self.lora_K.requires_grad_(self.options["curvature"] < math.inf)
        self.register_buffer("lora_unit", torch.empty(1, device=device))
        self.reset_parameters()
        # Layer and base share their tables of parameters, buffers and children, so that the weight
        # keeps its name. By __setattr__ the base would be a child, and each tensor have two names.
        self.__dict__["base"] = base
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            getattr(base, table).update(getattr(self, table))
            self.__dict__[table] = getattr(base, table)
        self.training = base.training

    def reset_parameters(self):
        """Make the adapter a fresh one, also after the layer was moved off the meta device."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        nn.init.zeros_(self.lora_K)
        nn.init.constant_(self.lora_unit, math.sqrt(self.in_features))

    @property
    def K(self):
        """curvature * u^2 * exp(lora_K), a tensor of shape (1,)."""
        k = self.lora_K.full_tensor() if hasattr(self.lora_K, "full_tensor") else self.lora_K
        return self.options["curvature"] * widen(self.lora_unit) ** 2 * widen(k).exp()

    scaling = property(lambda self: self.options["alpha"] / self.options["rank"])
    enabled = property(lambda self: not self.disabled, doc="False within disable_hyplora.")

    def forward(self, input, *args, **kwargs):
        """input: (..., in_features) -> (..., out_features). Further arguments reach the base."""
        out = self.base(input, *args, **kwargs)
        if not self.enabled:
            return out
        x = F.dropout(input.to(out.dtype), self.options["dropout"], self.training)
        return self.add_update(out, x)

    def add_update(self, out, x):
        """out + scaling * update, in the dtype that out and x share. A variant overrides this."""
        if self.options["curvature"] == math.inf:
            update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        else:
            update = hyplora_update(x, self.lora_A, self.lora_B, self.K)
        return torch.add(out, update, alpha=self.scaling).to(out.dtype)

    def train(self, mode=True):
        self.base.train(mode)
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # A quantized base adds more.
        self.base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, *args):
        self.base._load_from_state_dict(*args)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


# --- Injection ----------------------------------------------------------------------------------


def inject_hyplora(model, targets, **layer_options):
    """Freeze the model and wrap the linear layers that targets names, in place.

    targets: "all-linear" (every linear layer but the output head, and no block around such), or a
    list of name endings such as ["q_proj", "v_proj"]. layer_options: those of HypLoRALinear. Adapt
    the model before compiling, sharding or DDP. Afterwards, switch on what else shall train, such
    as a new head: model.classifier.requires_grad_(True). It is saved, too. Returns adapted names.
    Raises ValueError or TypeError, with the model unchanged, if an ending matches no linear layer,
    if the model is adapted, sharded or in DDP already, or if an option is out of range."""
    names = find_linear_layers(model, targets)
    wrap_layers(model, {name: layer_options for name in names})
    return names


# That was the method. The rest of this section finds and wraps layers for inject_hyplora.
def features_of(module):
    """(in_features, out_features) of anything that acts as a linear layer, or None."""
    d_in = getattr(module, "in_features", getattr(module, "nx", None))
    d_out = getattr(module, "out_features", getattr(module, "nf", None))  # Conv1D has nx and nf.
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def find_linear_layers(model, targets):
    """The names of the linear layers that targets asks for. Raises what inject_hyplora raises."""
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if name and features_of(module)]
    if targets == "all-linear":
        heads = {*"lm_head head classification_head embed_out score classifier qa_outputs".split()}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [n for n in linears if heads.isdisjoint(n.split(".")) and modules[n] is not head]
        has_inner = {n: any(map(features_of, [*modules[n].modules()][1:])) for n in names}
        names = [n for n in names if isinstance(modules[n], nn.Linear) or not has_inner[n]]
    else:
        endings = tuple(f".{ending}" for ending in targets)
        names = [name for name in linears if f".{name}".endswith(endings)]
        missing = [e[1:] for e in endings if not any(f".{name}".endswith(e) for name in names)]
        if missing or isinstance(targets, str):
            here = sorted({name.rpartition(".")[2] for name in linears})
            got = targets if isinstance(targets, str) else missing
            raise ValueError(f"targets must be 'all-linear' or a list out of {here}, got {got!r}")
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # These never call their layers.
    unused = [name for name in names if isinstance(modules[name.rpartition(".")[0]], readers)]
    if unused and targets != "all-linear":
        raise ValueError(f"these can't be adapted, as their owner reads the weight alone: {unused}")
    if unused:
        warnings.warn(f"left out, as their owner reads the weight alone: {unused}", stacklevel=3)
    if names == unused:
        raise ValueError("no layer within the model is left; HypLoRALinear(layer) wraps a lone one")
    return [name for name in names if name not in unused]


def wrap_layers(model, options, tensors=None):
    """Freeze the model, wrap {name: options}, and set the tensors; or change nothing and raise."""
    classes = {c for module in model.modules() for c in type(module).__mro__}
    if HypLoRALinear in classes or any(c.__module__.startswith("peft.") for c in classes):
        raise ValueError("the model has adapters: call remove_hyplora, or unload() of PEFT, first")
    parallel = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    shards = [p for p, _ in flags if hasattr(p, "device_mesh") or hasattr(p, "ds_id")]
    if shards or parallel & {c.__name__ for c in classes}:
        raise ValueError("adapt the model before it is sharded or put into DDP")
    layers = {}
    try:
        for p in model.parameters():
            p.requires_grad_(False)
            p.hyplora_version = getattr(p, "hyplora_version", p._version)  # torch counts changes
        for name, layer_options in options.items():
            base = model.get_submodule(name)
            layers[base] = HypLoRALinear(base, **layer_options)
        replace_modules(model, layers)
        if tensors is not None:
            set_hyplora_state_dict(model, tensors)
    except BaseException:
        replace_modules(model, {layer: base for base, layer in layers.items()})
        for layer in layers.values():
            remove_hyplora(layer)
        for p, flag in flags:
            p.requires_grad_(flag)
        raise


def replace_modules(model, replacements):
    """Put replacements[module] wherever such a module stands in the model."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            owner._modules[name] = replacements.get(child, child)


# --- Training, switching and measuring ----------------------------------------------------------


def hyplora_layers(model):
    """{name: layer} of the adapted layers of the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HypLoRALinear)}


def hyplora_parameters(model):
    """What trains, as optimizer groups, lora_K undecayed. To clip, give model.parameters()."""
    if not hyplora_layers(model):
        raise ValueError("the model has no adapters: call inject_hyplora first")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.hyplora_version = -1  # It may change without torch's count, by fused optimizers.
    curvatures = [trained.pop(name) for name in list(trained) if name.endswith("lora_K")]
    groups = [{"params": [*trained.values()]}, {"params": curvatures, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def disable_hyplora(model):
    """Within this context, for all threads, the model is its frozen base, bit for bit. Contexts may
    overlap; a copy made within stays off. With checkpointing, call backward() within it, too."""
    layers = hyplora_layers(model).values()
    for layer in layers:
        layer.disabled.append(True)
    try:
        yield model
    finally:
        for layer in layers:
            layer.disabled.pop()


def remove_hyplora(model):
    """Take the adapters out, in place, and return the base; what was frozen stays frozen."""
    bases = {}
    for layer in hyplora_layers(model).values():
        for name in [n for n in (*layer._parameters, *layer._buffers) if n.startswith("lora_")]:
            delattr(layer, name)  # The base has the same tables.
        bases[layer] = layer.base
    replace_modules(model, bases)
    return bases.get(model, model)


@torch.no_grad()
def measure_tokens(model, args, kwargs):
    """{name: (N, 3)} of |x|, |BAx| / |x| and |update| / |BAx|, for the N tokens a layer sees."""
    names = {layer: name for name, layer in hyplora_layers(model).items()}
    seen = {}
    mask = kwargs.get("attention_mask")

    def look(layer, inputs, named):
        x = widen([*inputs, *named.values()][0])
        counts = (x != 0).any(dim=-1)
        if torch.is_tensor(mask) and counts.shape in (mask.shape, mask.flatten().shape):
            counts = counts & (mask.to(x.device).reshape(counts.shape) > 0)
        x = x[counts]
        with torch.autocast(x.device.type, enabled=False):
            lora = x @ layer.lora_A.to(x.dtype).T @ layer.lora_B.to(x.dtype).T
            ratios = [length(x), length(lora) / length(x), phi_of(x, lora, layer.K)]
        if len(x):
            seen.setdefault(names[layer], []).append(torch.cat(ratios, dim=-1))

    modes = {m: m.training for m in [*model.modules(), *[layer.base for layer in names]]}
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in names]
    try:
        model.eval()  # DeepSpeed's engine returns nothing here.
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError("no adapted layer saw a token: adapt, give inputs, and compile afterwards")
    return {name: torch.cat(rows) for name, rows in seen.items()}


def calibrate_curvature(model, *args, **kwargs):
    """Set each layer's lora_unit to the length of a typical token, before training: the median of
    |x|. (A mean would be ruled by attention sinks, hundreds of times as long.) model(*args,
    **kwargs) runs once, as the base and in eval mode. Zero vectors do not count, nor does padding,
    where a keyword attention_mask of the tokens' shape is 0. In torch.distributed, all processes
    call this and get the units of the first. Returns {name: K} of layers that saw a token, and
    warns of others. Raises ValueError, and changes no unit, if none did or a length is infinite."""
    with disable_hyplora(model):
        rows = measure_tokens(model, args, kwargs)
    infinite = [name for name, tokens in rows.items() if not tokens[:, 0].isfinite().all()]
    if infinite:
        raise ValueError(f"the length of a token is not finite before {infinite}")
    layers = hyplora_layers(model)
    if len(rows) < len(layers):
        warnings.warn(f"no token was seen by {list(layers.keys() - rows)}", stacklevel=2)
    units = [{name: tokens[:, 0].median().item() for name, tokens in rows.items()}]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(units)
    for name, unit in units[0].items():
        layers[name].lora_unit.fill_(unit)
    return {name: layers[name].K.item() for name in units[0]}


def hyplora_statistics(model, *args, **kwargs):
    """{name: {"radius": |x| / sqrt K, "gain": |BAx| / |x|, "phi": |update| / |BAx|, "phi_spread"}}.
    These are means, and phi's standard deviation, over the tokens that calibrate_curvature counts.
    Where the spread is near 0, HypLoRA is LoRA with alpha times phi. Where it exceeds phi before
    training, a few far tokens rule the gradient, and training may fail: MAX_RADIUS = 4.0 helped."""
    result = {}
    for name, tokens in measure_tokens(model, args, kwargs).items():
        n, gain, phi = tokens.mean(dim=0).tolist()
        row = dict(radius=n / hyplora_layers(model)[name].K.item() ** 0.5, gain=gain, phi=phi)
        result[name] = row | {"phi_spread": tokens[:, 2].std(correction=0).item()}
    return result


# --- Saving what trains, a few MB ---------------------------------------------------------------


def hyplora_state_dict(model):
    """{name: tensor} of the adapters, which must be whole, and all else that trains, detached."""
    tensors = {}
    for name, layer in hyplora_layers(model).items():
        A, B = layer.lora_A, layer.lora_B  # What FSDP1 and ZeRO-3 shard is no matrix.
        if A.is_meta or hasattr(A, "device_mesh") or A.ndim + B.ndim < 4:
            raise ValueError(f"the adapter of {name} is sharded or on the meta device: gather it")
        for key in ("lora_A", "lora_B", "lora_K", "lora_unit"):
            tensors[f"{name}.{key}".removeprefix(".")] = getattr(layer, key).detach()
    return tensors | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def set_hyplora_state_dict(model, tensors):
    """Copy what hyplora_state_dict returned into the model, and let what is no adapter train, too.
    Raises ValueError, with the model unchanged, if names, shapes or numbers do not fit."""
    own = hyplora_state_dict(model)  # This is detached, so that flags of adapters stay.
    targets = {n: p for n, p in model.named_parameters() if p.is_floating_point()} | own
    for name in {**own, **tensors}:
        if name not in tensors or name not in targets:
            raise ValueError(f"{name} is only in the {'tensors' if name in tensors else 'model'}")
        new, old = tensors[name], targets[name]
        if not torch.is_tensor(new) or new.shape != old.shape or not new.to(old).isfinite().all():
            got = f"{getattr(new, 'shape', '')} {new!s:.40}"
            raise ValueError(f"{name} must be finite, of shape {tuple(old.shape)}, got {got}")
    with torch.no_grad():
        for name, new in tensors.items():
            targets[name].copy_(new).requires_grad_(True)


def save_hyplora(model, path, tensors=None):
    """Write hyplora_state_dict(model), or the same gathered from shards, to path, atomically. Give
    the inner model of DDP or torch.compile. Warns of adapters that are as they started, and of
    frozen weights that are new or changed. Raises ValueError unless all is there and finite."""
    tensors = hyplora_state_dict(model) if tensors is None else tensors
    finite = [n for n, t in tensors.items() if not hasattr(t, "device_mesh") and t.isfinite().all()]
    options, shapes = {}, {}
    for name, layer in hyplora_layers(model).items():
        options[name] = layer.options
        rank, d_in, d_out = layer.options["rank"], layer.in_features, layer.out_features
        for key, shape in ("A", (rank, d_in)), ("B", (d_out, rank)), ("K", (1,)), ("unit", (1,)):
            shapes[f"{name}.lora_{key}".removeprefix(".")] = shape
    is_whole = shapes.items() <= {name: t.shape for name, t in tensors.items()}.items()
    if not options or finite != [*tensors] or not is_whole:
        raise ValueError("there are no adapters to save, or they are not whole and finite")
    fresh = [name for name in tensors if name.endswith("lora_B") and not tensors[name].any()]
    if fresh:
        warnings.warn(f"not trained, or never called by their owner: {fresh}", stacklevel=2)
    frozen = {n: p for n, p in model.named_parameters() if n not in tensors and not p.is_meta}
    lost = [n for n, p in frozen.items() if getattr(p, "hyplora_version", -1) < p._version]
    trained = [n for n, p in frozen.items() if getattr(p, "hyplora_version", 0) < 0]
    if trained or 0 < len(lost) < len(frozen):  # DDP's first broadcast writes to all of them.
        warnings.warn(f"changed or new, but frozen and not saved: {trained or lost}", stacklevel=2)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
        whole = os.path.join(folder, "adapter.pt")
        torch.save({"hyplora": (3, MAX_RADIUS), "layers": options, "tensors": tensors}, whole)
        os.replace(whole, path)


def load_hyplora(model, path):
    """Read what save_hyplora wrote, and return the names of the adapted layers.
    A bare model is injected as the file says; an adapted one must have the file's layers. Raises
    OSError if path can't be read, ValueError if it doesn't fit; the model is unchanged then."""
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            got, there = content["hyplora"], content["layers"]
            if got != (3, MAX_RADIUS):
                raise ValueError(f"its version and MAX_RADIUS are {got}, here {(3, MAX_RADIUS)}")
            here = {name: layer.options for name, layer in hyplora_layers(model).items()}
            if not here:
                wrap_layers(model, there, content["tensors"])
            elif here != there:
                name = next(n for n in [*here, *there] if here.get(n) != there.get(n))
                raise ValueError(f"{name} has {here.get(name)} here, {there.get(name)} in the file")
            else:
                set_hyplora_state_dict(model, content["tensors"])
        except Exception as error:
            raise ValueError(f"{path} is damaged or does not fit: {error!r:.500}") from error
    return list(content["layers"])
