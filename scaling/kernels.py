"""HypLoRA's layer near LoRA's cost: hyplora.py's update in two Triton kernels. Copy it beside that.

    inject_hyplora(model, "all-linear")
    use_kernels(model)                  # One call; saving, loading and removing stay as they were.

One kernel follows LoRA's two products: with one program a token, it reads x, BAx and the base's
output, and writes the sum. For the backward pass it keeps four numbers a token, the update's factor
and derivatives. There BAx is multiplied again, and a second kernel turns the gradient of the output
into that of BAx; the rest is LoRA's backward pass. |BAx| is read off BAx itself: h (B^T B) h with
h = Ax loses its digits where B is ill-conditioned.

They run for bfloat16, float16 and float32 on a GPU, also in CUDA graphs. The plain form runs for
float64, on the CPU, under dispatch modes, and in what torch.compile or torch.export traces.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language import constexpr

import hyplora

# --- One token ----------------------------------------------------------------------------------
#
# Let r = |x| / sqrt K, l = |BAx| / sqrt K, m = sinh(r) / r and z = m l. By the law of sinh the
# update is phi BAx, with phi = asinh(z) / l = m asinh(z) / z. Power series stand in near 0, where
# these formulas are 0 / 0 or lose digits. A token beyond the bound is treated as if it lay there,
# and a square that overflowed makes NaN, as phi would be finite and wrong.


@triton.jit
def factor_of_token(x_square, lora_square, K, bound):
    """phi and its derivatives: twice those by |BAx|^2 and |x|^2, and that by log K."""
    root_K = tl.sqrt(K)
    r = tl.where(x_square < float("inf"), tl.sqrt(x_square) / root_K, float("nan"))
    is_near = (r < 0.5) & (r <= bound)
    w = tl.where(is_near, r * r, 0.0)
    far_r = tl.where(is_near, 1.0, r)
    bounded = tl.where(r > bound, bound, far_r)
    exp = tl.exp(bounded)
    sinh = 0.5 * (exp - 1.0 / exp)
    near_m = 1.0 + w * (1 / 6 + w * (1 / 120 + w * (1 / 5040)))
    m = tl.where(is_near, near_m, sinh / far_r)
    # The slope is d log m / d log r = r coth r - 1, and -1 where r is clipped.
    slope_by_w = 1 / 3 - w * (1 / 45 - w * (2 / 945 - w * (1 / 4725 - w * (2 / 93555))))
    far_slope = tl.where(r > bound, -1.0, bounded * 0.5 * (exp + 1.0 / exp) / sinh - 1.0)
    slope = tl.where(is_near, w * slope_by_w, far_slope)
    slope_by_square = tl.where(is_near, slope_by_w / K, slope / tl.where(is_near, 1.0, x_square))
    z = m * tl.where(lora_square < float("inf"), tl.sqrt(lora_square) / root_K, float("nan"))
    is_small = z < 0.3
    w = tl.where(is_small, z * z, 0.0)
    inverse = 1.0 / tl.where(is_small, 0.3, z)
    root = tl.sqrt(1.0 + inverse * inverse)  # This is sqrt(1 + z^2) / z, which can't overflow.
    small = 1.0 - w * (1 / 6 - w * (3 / 40 - w * (5 / 112 - w * (35 / 1152 - w * (63 / 2816)))))
    asinh_by_z = tl.where(is_small, small, tl.log((1.0 + root) / inverse) * inverse)
    # The derivative of asinh is 1 / sqrt(1 + z^2). What z adds to phi is less by this fall.
    derivative = tl.where(is_small, 1.0 / tl.sqrt(1.0 + w), inverse / root)
    fall_by_w = 15 / 56 - w * (35 / 144 - w * (315 / 1408 - w * (693 / 3328)))
    fall_by_w = 1 / 3 - w * (3 / 10 - w * fall_by_w)
    fall = tl.where(is_small, w * fall_by_w, asinh_by_z - derivative)
    far_fall = fall / tl.where(is_small, 1.0, lora_square)
    by_lora = -m * tl.where(is_small, fall_by_w * (m * m / K), far_fall)
    by_x = m * derivative * slope_by_square
    return m * asinh_by_z, by_lora, by_x, 0.5 * m * (fall - slope * derivative)


@triton.jit
def dot_of_rows(a, b, width: constexpr):
    """The inner product of two rows, in float32. a, b: pointers to them."""
    BLOCK: constexpr = 2048 if width <= 2048 else 4096
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a_part = tl.load(a + i, mask=i < width, other=0.0).to(tl.float32)
        b_part = tl.load(b + i, mask=i < width, other=0.0).to(tl.float32)
        total += a_part * b_part
    return tl.sum(total, axis=0)


@triton.jit
def forward_kernel(
    x, lora, base, out, kept, k, unit, curvature, bound, scaling, d_in: constexpr, d_out: constexpr
):
    """out = base + scaling * phi * lora, where lora is BAx. kept gets four numbers a token."""
    token = tl.program_id(0).to(tl.int64)
    lora += token * d_out
    base += token * d_out
    out += token * d_out
    u = tl.load(unit).to(tl.float32)
    K = curvature * u * u * tl.exp(tl.load(k).to(tl.float32))  # k is lora_K.
    x_square = dot_of_rows(x + token * d_in, x + token * d_in, d_in)
    lora_square = dot_of_rows(lora, lora, d_out)
    phi, by_lora, by_x, by_K = factor_of_token(x_square, lora_square, K, bound)
    if kept is not None:
        tl.store(kept + token * 4, scaling * phi)
        tl.store(kept + token * 4 + 1, scaling * by_lora)
        tl.store(kept + token * 4 + 2, scaling * by_x)
        tl.store(kept + token * 4 + 3, scaling * by_K)
    BLOCK: constexpr = 2048 if d_out <= 2048 else 4096
    for start in range(0, d_out, BLOCK):
        i = start + tl.arange(0, BLOCK)
        base_part = tl.load(base + i, mask=i < d_out).to(tl.float32)
        lora_part = tl.load(lora + i, mask=i < d_out).to(tl.float32)
        total = base_part + scaling * phi * lora_part
        tl.store(out + i, total.to(out.dtype.element_ty), mask=i < d_out)


@triton.jit
def backward_kernel(x, lora, grad, x_grad, K_grad, kept, d_in: constexpr, d_out: constexpr):
    """Overwrite lora, which is BAx, with its gradient; x_grad is x's part through |x| alone."""
    token = tl.program_id(0).to(tl.int64)
    lora += token * d_out
    grad += token * d_out
    factor = tl.load(kept + token * 4)
    factor_grad = dot_of_rows(grad, lora, d_out)
    along_lora = factor_grad * tl.load(kept + token * 4 + 1)
    along_x = factor_grad * tl.load(kept + token * 4 + 2)
    tl.store(K_grad + token, factor_grad * tl.load(kept + token * 4 + 3))
    BLOCK: constexpr = 2048 if d_out <= 2048 else 4096
    for start in range(0, d_out, BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad_part = tl.load(grad + i, mask=i < d_out).to(tl.float32)
        lora_part = tl.load(lora + i, mask=i < d_out).to(tl.float32)
        total = factor * grad_part + along_lora * lora_part
        tl.store(lora + i, total.to(lora.dtype.element_ty), mask=i < d_out)
    if x_grad is not None:
        for start in range(0, d_in, BLOCK):
            i = start + tl.arange(0, BLOCK)
            part = along_x * tl.load(x + token * d_in + i, mask=i < d_in).to(tl.float32)
            tl.store(x_grad + token * d_in + i, part.to(x_grad.dtype.element_ty), mask=i < d_in)


# --- The layer ----------------------------------------------------------------------------------

IS_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 does it.
HAS_WIDE_PRODUCT = bool(torch.version.cuda) and "dtype" in torch.ops.aten.mm.overloads()


def launch(kernel, tokens, *arguments):
    """Run a kernel, a program a token. Its arguments begin with x and end with d_in, d_out."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, tokens, *arguments)
    kernel[(tokens,)](*arguments, num_warps=4 if max(arguments[-2:]) <= 2048 else 8)


def without_autocast(function, first, last):
    """function(first, last), as all tensors have their dtypes already."""
    if torch.is_autocast_enabled(last.device.type):
        with torch.autocast(last.device.type, enabled=False):
            return function(first, last)
    return function(first, last)


def run_forward(layer, base, x, keep):
    """(base + scaling * update, what the backward pass needs where keep is True)"""
    x = x.contiguous()
    tokens = x.numel() // x.shape[-1]
    is_narrow = x.dtype != torch.float16 and (keep or tokens > 64)  # Few tokens are cheap to cast.
    dtype = x.dtype if is_narrow else torch.promote_types(layer.lora_A.dtype, torch.float32)
    A, B = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    h = F.linear(x.to(dtype), A)
    lora = F.linear(h, B)
    out = lora if dtype == base.dtype else torch.empty_like(lora, dtype=base.dtype)
    kept = torch.empty(tokens, 4, device=x.device, dtype=torch.float32) if keep else None
    of_K = (layer.lora_K, layer.lora_unit, layer.options["curvature"], hyplora.MAX_RADIUS)
    tensors = (x, lora, base.contiguous(), out, kept)
    launch(forward_kernel, tokens, *tensors, *of_K, layer.scaling, x.shape[-1], len(B))
    return out, (x, h, A, B, kept)


class AddUpdate(torch.autograd.Function):
    """base + scaling * update, with a backward pass. A, B and lora_K are the layer's: autograd has
    to see them."""

    @staticmethod
    def forward(ctx, layer, A, B, lora_K, base, x):
        out, saved = run_forward(layer, base, x, keep=True)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # This is so for create_graph=True alone.
            raise RuntimeError("no second derivative in kernels: hyplora.py's own form has them")
        return without_autocast(AddUpdate.gradients, ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        x, h, A, B, kept = ctx.saved_tensors
        x, h = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
        rows = grad.reshape(len(x), -1).contiguous()
        lora_grad = h @ B.T  # This is BAx until the kernel has run.
        x_grad = torch.empty_like(x, dtype=h.dtype) if ctx.needs_input_grad[-1] else None
        K_grad = torch.empty(len(x), 1, device=x.device, dtype=torch.float32)
        tensors = (x, lora_grad, rows, x_grad, K_grad, kept)
        launch(backward_kernel, len(x), *tensors, x.shape[1], rows.shape[1])
        h_grad = lora_grad @ B
        if x_grad is not None:
            x_grad = x_grad.addmm_(h_grad, A).to(x.dtype).view(*grad.shape[:-1], -1)
        is_cast = HAS_WIDE_PRODUCT and x.is_cuda and h.dtype != torch.float32
        wide = {"out_dtype": torch.float32} if is_cast else {}
        A_grad = torch.mm(h_grad.T, x.to(h.dtype), **wide)
        B_grad = torch.mm(lora_grad.T, h, **wide)
        return None, A_grad, B_grad, K_grad.sum(dim=0), grad, x_grad


class KernelHypLoRALinear(hyplora.HypLoRALinear):
    """HypLoRALinear, with the update in kernels wherever they run."""

    def add_update(self, out, x):
        if self.runs_in_kernels(out, x):
            return without_autocast(self.add_in_kernels, out, x)
        return super().add_update(out, x)

    def runs_in_kernels(self, out, x):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        is_plain = type(x) is type(out) is torch.Tensor and type(self.lora_A) is torch.nn.Parameter
        fits = x.dtype != torch.float64 and out.shape == (*x.shape[:-1], len(self.lora_B))
        is_seen = torch._C._len_torch_dispatch_stack() > 0  # A mode does not see a kernel.
        return is_plain and fits and x.numel() > 0 and not is_seen and (x.is_cuda or IS_INTERPRETED)

    def add_in_kernels(self, out, x):
        if not torch.is_grad_enabled():
            return run_forward(self, out, x, keep=False)[0]
        return AddUpdate.apply(self, self.lora_A, self.lora_B, self.lora_K, out, x)


def use_kernels(model):
    """Let the model's HypLoRA layers run in kernels, in place, and return the names of those.

    Only classes change. Those of curvature=math.inf stay. Shard afterwards. Raises Triton's errors.
    """
    if torch.cuda.is_available():
        x = torch.ones(1, 16, device="cuda")
        # Where Triton can't compile, it shall fail here.
        backward_kernel[(1,)](x, x.clone(), x, None, x[0], x, 16, 16)
    layers = hyplora.hyplora_layers(model)
    for layer in layers.values():
        if type(layer) is hyplora.HypLoRALinear and layer.options["curvature"] < float("inf"):
            layer.__class__ = KernelHypLoRALinear
    return [name for name, layer in layers.items() if isinstance(layer, KernelHypLoRALinear)]
