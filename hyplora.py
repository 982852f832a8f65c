"""HypLoRA: low-rank adaptation in hyperbolic space, in one file that needs nothing but PyTorch.

Yang et al., "Hyperbolic Fine-Tuning for Large Language Models", NeurIPS 2025, arXiv 2410.04010.
Formulas are cited by the paper's names (Lorentz maps, LLR, Proposition 1).

A frozen linear layer W gets a trainable update that acts on the hyperboloid instead of the plane:

    z = W x + scaling * logmap0(llr(expmap0(x); B, A)),    scaling = alpha / rank

Vocabulary. The Lorentz model of hyperbolic space is one sheet of a hyperboloid: the points p of R^(d+1)
with -p0^2 + p1^2 + ... + pd^2 = -K and p0 > 0. p0 is the *time* coordinate and p1..pd are *space*. The
number K > 0 sets how curved it is: the curvature is -1/K, and K = infinity is flat. The lowest point,
o = (sqrt K, 0, ..., 0), is the *origin*; the plane that touches it there is where Euclidean vectors live.
*expmap0* lifts a vector from that plane onto the hyperboloid and *logmap0* brings a point back down, both
keeping lengths measured along the surface. *LLR* (direct Lorentz low-rank transformation) multiplies the
space part by the low-rank BA and recomputes time, so that the result is on the hyperboloid again.

Read in this order: the geometry, the closed form, the layer, injection, saving, analysis.

    names = inject_hyplora(model, "all-linear", rank=8)           # freezes the model, adds the adapters
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=3e-4)
    ...
    save_hyplora(model, "adapter.pt")                             # load_hyplora(bare_model, "adapter.pt")
"""

import contextlib
import difflib
import itertools
import math
import os
import re
import warnings

import torch
import torch.nn as nn

# ---------------------------------------------------------------------------------------------------
# Geometry: the Lorentz model with its origin (the paper's preliminaries)


def _sinhc(s):
    """sinh(t)/t as a function of s = t^2 >= 0: analytic, 1 at s = 0, so no epsilon is needed anywhere."""
    small = s < 1e-2  # where sinh(t)/t is 0/0 (and its derivative cancels), six terms are exact to 1e-16
    t = torch.where(small, torch.ones_like(s), s).sqrt()
    series = 1 + s / 6 * (1 + s / 20 * (1 + s / 42 * (1 + s / 72 * (1 + s / 110))))
    return torch.where(small, series, torch.sinh(t) / t)


def _asinhc(s):
    """asinh(t)/t as a function of s = t^2 >= 0: analytic, 1 at s = 0."""
    small = s < 1e-2
    t = torch.where(small, torch.ones_like(s), s).sqrt()
    series = 1 - s * (1 / 6 - s * (3 / 40 - s * (5 / 112 - s * (35 / 1152 - s * (63 / 2816 - s * 231 / 13312)))))
    return torch.where(small, series, torch.asinh(t) / t)


def _sqnorm(v):
    """|v|^2 over the last dimension, kept: (..., d) -> (..., 1)."""
    return v.square().sum(dim=-1, keepdim=True)


def lorentz_inner(p, q):
    """Lorentz inner product <p, q> = -p0 q0 + p1 q1 + ... + pd qd (time first).

    p, q: (..., d+1) of one dtype -> (...). A point is on the hyperboloid when <p, p> = -K and p0 > 0.
    """
    return (p[..., 1:] * q[..., 1:]).sum(dim=-1) - p[..., 0] * q[..., 0]


def expmap0(v, K):
    """Exponential map at the origin: lifts a tangent vector onto the hyperboloid.

        expmap0(v) = ( sqrt K cosh(|v|/sqrt K),  sqrt K sinh(|v|/sqrt K) v/|v| )

    v: (..., d), in the unit of sqrt K. K: positive number or 0-d/1-element tensor -> (..., d+1), time first.
    """
    K = torch.as_tensor(K, dtype=v.dtype, device=v.device)
    rho2 = _sqnorm(v) / K
    # cosh through sinh: cosh t = sqrt(1 + t^2 sinhc(t)^2), differentiable at v = 0 where |v| is not
    space = _sinhc(rho2) * v
    return torch.cat([(K + _sqnorm(space)).sqrt(), space], dim=-1)


def logmap0(p, K):
    """Logarithmic map at the origin, the inverse of expmap0.

        logmap0(p) = sqrt K asinh(|p_s|/sqrt K) p_s/|p_s|,    p_s the space part of p

    This is the textbook arccosh(p0/sqrt K) without its cancellation near the origin.
    p: (..., d+1), time first, on the hyperboloid of K -> (..., d).
    """
    space = p[..., 1:]
    return _asinhc(_sqnorm(space) / K) * space


def llr(p, A, B, K):
    """Direct Lorentz low-rank transformation: LLR(BA, p) = ( sqrt(|BA p_s|^2 + K), BA p_s ).

    p: (..., d_in+1), A: (rank, d_in), B: (d_out, rank), one dtype -> (..., d_out+1), on the same hyperboloid.
    """
    space = p[..., 1:] @ A.T @ B.T
    return torch.cat([(_sqnorm(space) + K).sqrt(), space], dim=-1)


def hyplora_reference(x, A, B, K):
    """The update as the paper writes it: logmap0(llr(expmap0(x))). The oracle for the closed form.

    x: (..., d_in), A: (rank, d_in), B: (d_out, rank), K: number or tensor, one dtype -> (..., d_out).
    Literal, so it costs several tensors of the layer's width, and sinh overflows for |x|/sqrt K above 88.
    """
    return logmap0(llr(expmap0(x, K), A, B, K), K)


# ---------------------------------------------------------------------------------------------------
# The closed form: HypLoRA is LoRA times one number per token


def _phi(n2, g2, K, max_radius):
    """The number by which HypLoRA multiplies LoRA's B A x. n2 = |x|^2, g2 = |BAx|^2, all (..., 1) -> (..., 1)."""
    rho2 = n2 / K  # squared radius of the token on the hyperboloid, 0 for K = infinity
    limit = max_radius**2
    clip = (limit / rho2.clamp(min=limit)).sqrt()  # 1 inside max_radius; outside, x moves onto that sphere
    stretch = clip * _sinhc(rho2.clamp(max=limit))
    return stretch * _asinhc(stretch**2 * g2 / K)


def hyplora_update(x, A, B, K, max_radius=12.0, scaling=1.0):
    """The update in closed form: the three maps composed, with the norms factored out of the vectors.

        rho = |x|/sqrt K,  z = sinhc(rho) |BAx|/sqrt K,  update = sinhc(rho) asinhc(z) B A x

    where sinhc(t) = sinh(t)/t and asinhc(t) = asinh(t)/t. K = infinity gives B A x: LoRA.
    Equal to hyplora_reference up to rho = max_radius; a token farther out is treated as if it lay there.

    x: (..., d_in) of any float dtype, A: (rank, d_in), B: (d_out, rank), K: positive number or 1-element
    tensor, infinity included; scaling multiplies the result -> (..., d_out) in x's dtype. Differentiable in
    x, A, B and K, everywhere: at x = 0 and B = 0 too.
    """
    dtype, wide = _dtypes(x)
    A, B, K = A.to(dtype), B.to(dtype), torch.as_tensor(K, dtype=wide, device=x.device)
    h = (x.to(dtype) @ A.T).to(wide)  # (..., rank)
    G = B.to(wide).T @ B.to(wide)  # (rank, rank): |Bh|^2 = h^T G h without a tensor of the layer's width
    n2 = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
    g2 = ((h @ G) * h).sum(dim=-1, keepdim=True).clamp(min=0)  # rounding can take a zero below zero
    update = (scaling * _phi(n2, g2, K, max_radius) * h).to(dtype) @ B.T
    return _fit(update, x.dtype)


def _dtypes(x):
    """(dtype of the matrix products, dtype of the numbers per token)."""
    # float16 ends at 65504, which phi * h can pass where the update does not: it computes in float32.
    # One number per token is cheap enough for float64, where no square of a float32 overflows (MPS has none).
    return (
        torch.float32 if x.dtype == torch.float16 else x.dtype,
        torch.float32 if x.device.type == "mps" else torch.float64,
    )


def _fit(value, dtype):
    """To dtype, with what float16 cannot hold at its largest number instead of infinity."""
    if dtype == torch.float16:
        value = value.clamp(-65504, 65504)
    return value.to(dtype)


def _gram(B, dtype):
    """B^T B in dtype, (rank, rank): |Bh|^2 = h^T (B^T B) h needs no tensor of the layer's width.

    The long sum runs in float32, on B divided by its largest entry, so that no square overflows.
    """
    B = B.to(torch.promote_types(B.dtype, torch.float32))
    largest = B.abs().amax().clamp(min=torch.finfo(B.dtype).tiny)
    B = B / largest
    return (B.T @ B).to(dtype) * largest.to(dtype).square()


def _phi_and_slopes(n, g2, root_k, max_radius):
    """phi as above and its slopes, (tokens, 4): phi, 2 phi_n2, 2 phi_g2, -2 K phi_K. n is |x|, root_k is 1/sqrt K."""
    rho = n * root_k
    inside, radius = rho < max_radius, rho.clamp(max=max_radius)
    stretch = torch.sinh(radius) / rho  # clip * sinhc(clip * rho), as clip = max_radius / rho outside
    z = stretch * g2.sqrt() * root_k
    length = torch.asinh(z)  # |update| / sqrt K
    phi = stretch * (length / z)
    slope = 1 / torch.cosh(length)  # of phi over stretch
    n2_slope, g2_slope = slope * (inside * torch.cosh(radius) - stretch), slope * stretch - phi
    # phi knows n2/K and g2/K alone, so that its third derivative is made of the other two. In one tensor, as a compiler
    # saves a concatenation, where it would compute sinh and asinh again in backward for each number they multiply.
    return torch.cat([phi, n2_slope / n / n, g2_slope / g2, n2_slope + g2_slope], dim=-1)


class _AddUpdate(torch.autograd.Function):
    """out + hyplora_update(x, A, B, exp(log_K), max_radius, scaling) for the layer, in LoRA's time and memory.

    The same closed form with its derivatives by hand. Autograd would form G = B^T B and differentiate it with thin
    matrix products that each cost as much as LoRA's own; here backward shares h, G h and B^T d_out. With
    q = d_phi = h . B^T d_out, e_n = 2 q phi_n2 and e_g = 2 q phi_g2 (n2 = |x|^2, g2 = |BAx|^2 = h . G h):

        d_h = phi B^T d_out + e_g G h        d_x = A^T d_h + e_n x        d_A = d_h x^T
        d_B = phi d_out h^T + B (e_g h h^T)  d_log_K = -(n2 e_n + g2 e_g)/2
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out, x, A, B, log_K, max_radius, scaling):
        dtype, wide = _dtypes(x)
        tiny = torch.finfo(wide).tiny  # stands for 0 where 0/0 has a limit, and gives that limit to the last bit
        x2 = x.reshape(-1, x.shape[-1]).to(dtype)  # (tokens, d_in)
        n = torch.linalg.vector_norm(x2, dim=-1, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
        h = (x2 @ A.to(dtype).T).to(wide)  # (tokens, rank)
        Gh = h @ _gram(B, wide)
        g2 = (h * Gh).sum(dim=-1, keepdim=True)
        root_k = torch.exp(-0.5 * log_K.to(wide)).clamp(min=tiny**0.25)  # 0 for LoRA
        slopes = _phi_and_slopes(n.to(wide).clamp(min=tiny**0.5), g2.clamp(min=tiny), root_k, max_radius)
        h_phi = (h * (scaling * slopes[:, :1])).to(dtype)
        result = torch.addmm(out.reshape(-1, out.shape[-1]).to(dtype), h_phi, B.to(dtype).T)
        return _fit(result, out.dtype).view(out.shape), h, h_phi, Gh, slopes

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, A, B, log_K, _, ctx.scaling = inputs
        ctx.K_dtype = log_K.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, A, B, *output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        x, A, B, h, h_phi, Gh, slopes = ctx.saved_tensors
        dtype, wide = _dtypes(x)
        d_x = d_A = d_B = d_log_K = None
        x2, d_out2 = x.reshape(-1, x.shape[-1]).to(dtype), d_out.reshape(-1, d_out.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # as in the layer's forward, wherever backward is called
            BT_d_out = ctx.scaling * (d_out2 @ B.to(dtype)).to(wide)
            q = (h * BT_d_out).sum(dim=-1, keepdim=True)
            e_n, e_g, e_K = (q * slopes[:, 1:]).split(1, dim=-1)
            d_h = (slopes[:, :1] * BT_d_out + e_g * Gh).to(dtype)
            if ctx.needs_input_grad[1]:
                d_x = _fit((x2 * e_n.to(dtype)).addmm_(d_h, A.to(dtype)), x.dtype).view(x.shape)
            if ctx.needs_input_grad[2]:
                d_A = (d_h.T @ x2).to(A.dtype)
            if ctx.needs_input_grad[3]:
                M = (h.T @ (e_g * h)).to(dtype)
                d_B = torch.addmm(h_phi.T @ d_out2, M, B.to(dtype).T).to(B.dtype).T
            if ctx.needs_input_grad[4]:
                d_log_K = (-0.5 * e_K.sum()).view(1).to(ctx.K_dtype)
        return d_out, d_x, d_A, d_B, d_log_K, None, None


# ---------------------------------------------------------------------------------------------------
# The layer


def _features(module):
    """(in_features, out_features) of anything that acts as a linear layer, or None."""
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in shape):
        return shape
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]:
        return tuple(weight.shape)  # transformers' Conv1D, as in GPT-2: y = x W + b with W (in, out)
    return None


class HypLoRALinear(nn.Module):
    """A frozen linear layer with a HypLoRA adapter: base(x) + scaling * hyplora_update(x, A, B, K).

    base: nn.Linear, transformers' Conv1D, or any module with in_features, out_features and forward.
    rank: of BA. alpha: scaling = alpha / rank. dropout: on the adapter's input, while training.
    curvature: K in units of curvature_unit; math.inf is plain LoRA. curvature_unit: "rms" measures lengths
    in units of sqrt(in_features), K = curvature * in_features, so a token that left an RMSNorm has
    radius 1/sqrt(curvature) in a layer of any width; "absolute" is K = curvature.
    learn_curvature: train K. max_radius: see hyplora_update. dtype: of the adapter.

    Parameters: lora_A (rank, in_features), Kaiming uniform; lora_B (out_features, rank), zero, so that a fresh
    adapter changes nothing; log_K (1,), as K must stay positive. The output has the base's dtype.
    The adapter cannot be merged into the weight: phi depends on the input.

    Raises TypeError if base is not linear, ValueError for an option outside its range.
    """

    def __init__(
        self,
        base,
        rank=8,
        alpha=16.0,
        dropout=0.0,
        curvature=0.5,
        curvature_unit="rms",
        learn_curvature=True,
        max_radius=12.0,
        dtype=torch.float32,
    ):
        super().__init__()
        if _features(base) is None:
            raise TypeError(
                f"HypLoRALinear wraps a linear layer with in_features and out_features, got {type(base).__name__}"
            )
        if isinstance(base, HypLoRALinear):
            raise TypeError("this layer has a HypLoRA adapter already; remove_hyplora(model) takes it away")
        for name, given, fits, allowed in (
            ("rank", rank, type(rank) is int and rank >= 1, "an integer of at least 1"),
            ("alpha", alpha, 0 < alpha < math.inf, "a positive number"),
            ("dropout", dropout, 0 <= dropout < 1, "in [0, 1)"),
            ("curvature", curvature, curvature > 0, "positive (math.inf is plain LoRA)"),
            ("curvature_unit", curvature_unit, curvature_unit in ("rms", "absolute"), '"rms" or "absolute"'),
            ("max_radius", max_radius, 0 < max_radius <= 80, "in (0, 80], as sinh overflows float32 above 88"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {allowed}, got {given!r}")
        self.base = base
        self.in_features, self.out_features = _features(base)
        if rank > min(self.in_features, self.out_features):
            warnings.warn(
                f"rank {rank} is above the layer's own {min(self.in_features, self.out_features)}", stacklevel=2
            )
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.curvature, self.curvature_unit, self.max_radius = curvature, curvature_unit, max_radius
        self.learn_curvature = learn_curvature
        self.enabled = True
        self.dropout = nn.Dropout(dropout)
        device = next((t.device for t in [*base.parameters(), *base.buffers()]), None)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        # Shape (1,), as sharding engines refuse 0-d parameters. There is no K to train in the flat case.
        learns = learn_curvature and curvature < math.inf
        self.log_K = nn.Parameter(torch.empty(1, device=device), requires_grad=learns)
        self.reset_parameters()
        self.train(base.training)

    def reset_parameters(self):
        """Back to the fresh adapter, also after the module was materialized from the meta device."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        unit = self.in_features if self.curvature_unit == "rms" else 1
        nn.init.constant_(self.log_K, math.log(self.curvature * unit))

    @property
    def K(self):
        """K > 0, where -1/K is the curvature of the space: a tensor of shape (1,)."""
        return self.log_K.exp()

    # Models peek at these (T5 asks for wo.weight.dtype).
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        """x: (..., in_features) -> (..., out_features)."""
        out = self.base(x)
        if not self.enabled:
            return out
        # The dtypes are ours: products in the base's, norms wider. Autocast would undo that.
        with torch.autocast(x.device.type, enabled=False):
            x = self.dropout(x.to(out.dtype))
            return _AddUpdate.apply(out, x, self.lora_A, self.lora_B, self.log_K, self.max_radius, self.scaling)[0]

    def extra_repr(self):
        K = "not materialized" if self.log_K.is_meta else f"{self.K.item():.4g}"
        return f"rank={self.rank}, alpha={self.alpha}, K={K}, enabled={self.enabled}"


# ---------------------------------------------------------------------------------------------------
# Injection

OUTPUT_HEADS = ("lm_head", "embed_out", "head", "score", "classifier")


def _adapters(model):
    """{name: HypLoRALinear} of the model, each once; raises if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, HypLoRALinear)}
    if not found:
        raise ValueError("this model has no HypLoRA adapter; inject_hyplora(model, targets) adds them")
    return found


def _output_heads(model):
    """ids of the linears that turn hidden states into the model's answer: "all-linear" leaves them alone."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    declared = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        id(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if module is declared or name.split(".")[-1] in OUTPUT_HEADS or id(getattr(module, "weight", None)) in tied
    }


def _find_targets(model, targets):
    """{name: linear module} that targets asks for, in the model's order; a module in two places has both names."""
    linears = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
        if _features(module) and not any(owner in linears for owner in owners):  # not what a linear is made of
            linears[name] = module
    if isinstance(targets, str) and targets == "all-linear":
        heads = _output_heads(model)
        matches = {targets: {name for name, m in linears.items() if id(m) not in heads}}
    elif isinstance(targets, str):
        try:
            matches = {targets: set(filter(re.compile(targets).fullmatch, linears))}
        except re.error as error:
            raise ValueError(f'targets={targets!r} is not "all-linear" and no regular expression: {error}') from None
    elif isinstance(targets, (list, tuple, set)) and targets and all(isinstance(e, str) and e for e in targets):
        matches = {e: {name for name in linears if f".{name}".endswith(f".{e}")} for e in targets}
    else:
        allowed = '"all-linear", a regular expression, or a list of name endings such as ["q_proj", "v_proj"]'
        raise ValueError(f"targets must be {allowed}, got {targets!r}")
    for asked, names in matches.items():
        if not names:
            endings = dict.fromkeys([n.split(".")[-1] for n in linears] + list(linears))
            close = difflib.get_close_matches(asked, endings, n=5, cutoff=0.3) or list(endings)[:5]
            hint = f" (name endings go into a list: [{asked!r}])" if isinstance(targets, str) else ""
            raise ValueError(f"no linear layer matches {asked!r}{hint}. Close to it: {', '.join(close) or 'none'}")
    found = {name: m for name, m in linears.items() if name in set.union(*matches.values())}
    ignored = [name for name in found if _reads_weight(model, name)]
    if ignored and targets == "all-linear":
        warnings.warn(f"left out: {', '.join(ignored)}: {_IGNORED}", stacklevel=3)
        found = {name: m for name, m in found.items() if name not in ignored}
    return found


_IGNORED = (
    "its owner reads the weight and does not call the layer, so an adapter would be silently ignored. Choose other "
    "targets, or for nn.TransformerEncoderLayer call torch.backends.mha.set_fastpath_enabled(False)"
)


def _reads_weight(model, name):
    owner = model.get_submodule(name.rpartition(".")[0])
    fast = torch.backends.mha.get_fastpath_enabled()
    return isinstance(owner, nn.MultiheadAttention) or fast and isinstance(owner, nn.TransformerEncoderLayer)


def _wrap(model, found, options):
    """Wrap found, {name: linear}, with options, {name: layer options}; the model changes only if all of it works."""
    if "" in found:
        raise ValueError("the model itself is the linear layer: wrap it with HypLoRALinear(model)")
    ignored = [name for name in found if _reads_weight(model, name)]
    if ignored:
        raise ValueError(f"{', '.join(ignored)}: {_IGNORED}")
    modules = {id(m): (m, options[name]) for name, m in found.items()}  # one linear in two places is wrapped once
    swap = {key: HypLoRALinear(m, **layer_options) for key, (m, layer_options) in modules.items()}
    model.requires_grad_(False)
    _replace(model, swap)


def _replace(model, swap):
    """Put swap[id(module)] in place of that module, wherever the model holds it."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if id(child) in swap and not isinstance(owner, HypLoRALinear):
                setattr(owner, name, swap[id(child)])


def inject_hyplora(model, targets, **layer_options):
    """Freeze the model and wrap the linear layers that targets names, in place.

    targets: "all-linear" (every linear but the output head), a list of name endings (["q_proj", "v_proj"]),
    or a regular expression that must match the whole name. layer_options: those of HypLoRALinear.
    One linear used in two places gets one adapter. Returns the names of the adapted layers.

    Raises ValueError, with the model unchanged, if an entry of targets matches no linear layer, if the model has
    adapters already, or if the layer's owner would ignore the adapter (nn.MultiheadAttention.out_proj).
    """
    present = [name for name, module in model.named_modules() if isinstance(module, HypLoRALinear)]
    if present:
        raise ValueError(f"this model has HypLoRA adapters already ({present[0]}, ...); remove_hyplora(model) first")
    found = _find_targets(model, targets)
    _wrap(model, found, dict.fromkeys(found, layer_options))
    return list(_adapters(model))


def hyplora_parameters(model):
    """The trainable adapter parameters as optimizer groups; K is in a group without weight decay."""
    layers = _adapters(model).values()
    weights = [p for layer in layers for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
    curvatures = [layer.log_K for layer in layers if layer.log_K.requires_grad]
    groups = [{"params": weights}, {"params": curvatures, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def disable_hyplora(model):
    """Within this context the model is its base, bit for bit."""
    layers = list(_adapters(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def remove_hyplora(model):
    """Take the adapters out, in place, and return the base model. Its parameters stay frozen."""
    _replace(model, {id(layer): layer.base for layer in _adapters(model).values()})
    return model


@torch.no_grad()
def calibrate_curvature(model, *args, **kwargs):
    """Set each layer's K from the norms it sees: K = curvature * mean |x|^2 over the tokens of one forward pass.

    args, kwargs: sample inputs of the model, which runs once, as its base and in eval mode.
    Where activations do not leave an RMSNorm their length is not sqrt(in_features); this measures it, so that
    a typical token has radius 1/sqrt(curvature) in every layer. K = infinity stays; so does the K of a layer
    that saw no token. Returns {name: K}. Raises ValueError, with every K unchanged, if a norm is not finite.
    """
    layers, seen = _adapters(model), {}

    def record(name):
        def hook(layer, inputs):
            norms = torch.linalg.vector_norm(inputs[0], dim=-1, dtype=torch.float32).square()
            total, count = seen.get(name, (0.0, 0))
            seen[name] = total + norms.sum().item(), count + norms.numel()

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        with disable_hyplora(model):
            model.eval()(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    broken = [name for name, (total, _) in seen.items() if not math.isfinite(total)]
    if broken:
        raise ValueError(f"the input of {broken[0]} is not finite on these samples: K is unchanged")
    for name, (total, count) in seen.items():
        if total > 0:
            layers[name].log_K.fill_(math.log(layers[name].curvature * total / count))
    return {name: layer.K.item() for name, layer in layers.items()}


# ---------------------------------------------------------------------------------------------------
# Saving: the adapters alone, a few MB

_FORMAT = "hyplora-1"
_OPTIONS = ("rank", "alpha", "curvature", "curvature_unit", "learn_curvature", "max_radius")
_TENSORS = ("lora_A", "lora_B", "log_K")


def hyplora_state_dict(model):
    """{"<module>.lora_A": tensor, "<module>.lora_B": tensor, "<module>.log_K": tensor, ...}, detached.

    Of a model that FSDP2 sharded, whole tensors: all processes must call it.
    """

    def whole(p):
        return p.full_tensor() if hasattr(p, "full_tensor") else p

    layers = _adapters(model).items()
    return {f"{name}.{key}": whole(getattr(layer, key).detach()) for name, layer in layers for key in _TENSORS}


def save_atomically(content, path):
    """torch.save into a file beside path, which is then renamed: path holds the old content or the new, whole."""
    beside = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def save_hyplora(model, path):
    """Write the adapters to path, atomically: {"format", "layers": {name: options}, "tensors": state dict}."""
    layers = {
        name: {"dropout": layer.dropout.p, **{key: getattr(layer, key) for key in _OPTIONS}}
        for name, layer in _adapters(model).items()
    }
    save_atomically({"format": _FORMAT, "layers": layers, "tensors": hyplora_state_dict(model)}, path)


def load_hyplora(model, path):
    """Read adapters that save_hyplora wrote, and return their names. A bare model is injected as the file says.

    Tensors move to the device and dtype of the model's layers. Raises OSError if there is no such file, ValueError if
    it is none of ours or does not fit the model (names, shapes, rank, alpha, max_radius, numbers that are not
    finite); the model is then unchanged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        form, layers, tensors = content["format"], dict(content["layers"]), dict(content["tensors"])
    except OSError:
        raise
    except Exception as error:  # whatever a file that is damaged or not ours makes the reader say
        raise ValueError(f"{path} is damaged or not a file that save_hyplora wrote ({type(error).__name__})") from None
    if form != _FORMAT:
        raise ValueError(f"{path} has format {form!r}, this hyplora.py reads {_FORMAT!r}")
    modules = dict(model.named_modules())
    present = {name: m for name, m in modules.items() if isinstance(m, HypLoRALinear)}
    odd = sorted(set(present or layers) ^ set(layers)) + sorted(set(layers) - set(modules), key=str)
    if odd:
        close = difflib.get_close_matches(str(odd[0]), modules, n=3)
        hint = f". Close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"{path} adapts other layers than this model has: {odd[0]} is in one of them only{hint}")
    try:
        _check_layers(modules, layers, tensors)
        if not present:
            _wrap(model, {name: modules[name] for name in layers}, layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model: {error}") from None
    set_hyplora_state_dict(model, tensors)
    return list(layers)


@torch.no_grad()
def set_hyplora_state_dict(model, tensors):
    """Copy what hyplora_state_dict(model) returned into the adapters of the model, sharded by FSDP2 or not."""
    for name, layer in _adapters(model).items():
        for key in _TENSORS:
            parameter, value = getattr(layer, key), tensors[f"{name}.{key}"].to(layer.log_K.device)
            if hasattr(parameter, "device_mesh"):
                place = torch.distributed.tensor.distribute_tensor
                value = place(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _check_layers(modules, layers, tensors):
    """Raise ValueError or TypeError for the first thing in the file that does not fit the modules."""
    if surplus := set(tensors) - {f"{name}.{key}" for name in layers for key in _TENSORS}:
        raise ValueError(f"{min(surplus, key=str)} belongs to no layer of the file")
    for name, options in layers.items():
        module = modules[name]
        if _features(module) is None:
            raise ValueError(f"{name} is a {type(module).__name__}, not a linear layer")
        if missing := [key for key in _OPTIONS if key not in options]:
            raise ValueError(f"{name} lacks the option {missing[0]!r}")
        for key in ("rank", "alpha", "max_radius"):
            if isinstance(module, HypLoRALinear) and getattr(module, key) != options[key]:
                raise ValueError(f"{name} has {key} {options[key]}, the model's {getattr(module, key)}")
        (d_in, d_out), rank = _features(module), options["rank"]
        for key, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank)), ("log_K", (1,))):
            value = tensors.get(f"{name}.{key}")
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape != shape:
                is_tensor = isinstance(value, torch.Tensor)
                found = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
                raise ValueError(f"{name}.{key} should be a float tensor {shape}, found {found}")
            finite = value.isfinite() | (value == math.inf if key == "log_K" else False)  # K = infinity is LoRA
            if not finite.all():
                raise ValueError(f"{name}.{key} holds numbers that are not finite")


# ---------------------------------------------------------------------------------------------------
# Analysis: is the embedding space hyperbolic? (the paper's investigation of token embeddings)


@torch.no_grad()
def delta_hyperbolicity(points=None, distances=None, base=0, sample=None, repeats=10, seed=0, block=128):
    """Gromov's delta over a base point, relative to the diameter, 2 delta / max d: 0 for a tree, near 1 for a sphere.

    With the Gromov product (i|j) = (d(i,w) + d(j,w) - d(i,j))/2 over the base point w, delta is the largest
    max_k min((i|k), (k|j)) - (i|j). Exact in n^3 time and n^2 memory; twice that bounds any other base point's.

    points: (n, d), Euclidean, or distances: (n, n), symmetric; on any device. base: the index of w. block: rows at a
    time. Returns a float; with sample, the mean and standard deviation over `repeats` draws of that many points.
    Raises ValueError unless one of points and distances is given, of the right shape and finite.
    """
    given = points if distances is None else distances
    square = distances is None or distances.ndim == 2 and distances.shape[0] == distances.shape[1]
    if (points is None) == (distances is None) or given.ndim != 2 or not square or not len(given):
        raise ValueError("delta_hyperbolicity takes points (n, d) or distances (n, n), one of the two, n at least 1")
    if not given.isfinite().all():
        raise ValueError("delta_hyperbolicity: the input holds numbers that are not finite")
    if sample is not None:
        generator, results = torch.Generator().manual_seed(seed), []
        for _ in range(repeats):
            chosen = torch.randperm(len(given), generator=generator)[:sample].to(given.device)
            part = {"points": points[chosen]} if distances is None else {"distances": distances[chosen][:, chosen]}
            results.append(delta_hyperbolicity(**part, block=block))
        results = torch.tensor(results, dtype=torch.float64)
        return results.mean().item(), results.std().item()
    if distances is None:  # cdist's fast way cancels for near points, so it runs in float64
        distances = torch.cdist(points.double(), points.double()).float().fill_diagonal_(0)
    distances = distances.to(torch.promote_types(distances.dtype, torch.float32))
    product = (distances[:, base, None] + distances[base] - distances) / 2
    delta = product.new_zeros(())
    for i in range(0, len(product), block):  # rows i to i + block, right of the diagonal: the rest mirrors it
        columns = product[i : i + block].T.contiguous()
        best = product.new_full((columns.shape[1], len(product) - i), -math.inf)
        smaller = torch.empty_like(best)  # both stay in the cache while k runs
        for k in range(len(product)):
            torch.minimum(columns[k, :, None], product[k, i:], out=smaller)
            torch.maximum(best, smaller, out=best)
        delta = torch.maximum(delta, (best - product[i : i + block, i:]).max())
    return (2 * delta / distances.max().clamp(min=torch.finfo(distances.dtype).tiny)).item()


def power_law_exponent(counts, xmin=None):
    """Fit p(x) ~ x^-alpha for whole x >= xmin to counts, by maximum likelihood: (alpha, standard error, xmin).

    counts: how often each token occurs, zeros allowed. Without xmin, the one whose fit has the smallest
    Kolmogorov-Smirnov distance is taken, among those that leave at least ten counts.
    Source: Clauset, Shalizi, Newman, "Power-law distributions in empirical data" (2009), equations 3.5 to 3.9.
    Raises ValueError if fewer than ten counts reach xmin, or if all of these are the same.
    """
    counts = torch.as_tensor(counts).flatten().to("cpu", torch.float64)
    values, times = counts[counts >= 1].unique(return_counts=True)
    starts = values if xmin is None else torch.tensor([float(xmin)], dtype=torch.float64)
    best = None
    for start in starts:
        tail = values >= start
        x, n = values[tail], times[tail].double()
        if n.sum() < 10 or len(x) < 2:
            continue
        mean_log = (n * x.log()).sum() / n.sum()

        def cost(alpha, mean_log=mean_log, start=start):  # minus the log likelihood of one count
            return torch.special.zeta(alpha, start).log() + alpha * mean_log

        low, high = torch.tensor([1.0001, 20.0], dtype=torch.float64)
        for _ in range(60):  # cost is convex: cut off the third of the interval beyond the larger value
            a, b = low + (high - low) / 3, high - (high - low) / 3
            low, high = (a, high) if cost(a) > cost(b) else (low, b)
        alpha = (low + high) / 2
        model = 1 - torch.special.zeta(alpha, x + 1) / torch.special.zeta(alpha, start)
        distance = (n.cumsum(0) / n.sum() - model).abs().max()
        if best is None or distance < best[0]:
            e = 1e-3
            curvature = (cost(alpha + e) - 2 * cost(alpha) + cost(alpha - e)) / e**2
            best = distance, alpha.item(), (curvature * n.sum()).rsqrt().item(), start.item()
    if best is None:
        raise ValueError("power_law_exponent needs ten counts of at least xmin, not all the same")
    return best[1:]


@torch.no_grad()
def norm_by_frequency(embedding, token_ids, bins=10):
    """Length of token embeddings by how often the tokens occur, in bins of equal width in log frequency.

    embedding: (vocabulary, d). token_ids: whole numbers of any shape. Returns a list, rarest first, of dictionaries of
    low and high (the bin's frequencies, low included), tokens (how many kinds), mean and std (of their norms).
    """
    counts = torch.bincount(torch.as_tensor(token_ids).flatten().cpu(), minlength=len(embedding))
    seen = counts > 0
    norms, counts = embedding.detach().cpu().float().norm(dim=-1)[seen], counts[seen].double()
    edges = torch.logspace(0, math.log10(counts.max().item() + 1), bins + 1, dtype=torch.float64)
    result = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist()):
        inside = norms[(counts >= low) & (counts < high)]
        if len(inside):
            std = inside.std(correction=0).item()
            result.append(dict(low=low, high=high, tokens=len(inside), mean=inside.mean().item(), std=std))
    return result
