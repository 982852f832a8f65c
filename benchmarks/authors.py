"""The two layers of the authors' release, and what they do where they leave the paper's formula.

Written anew from what their code computes (github.com/marlin-codes/HypLoRA, commit 66df99a,
peft/tuners/lora/layer.py, the types "hyplora" and "hyplora_simplified").

    python -m benchmarks.authors > benchmarks/AUTHORS.md        # the comparison page, numbers and
    all
"""

import math

import torch
import torch.nn.functional as F

from hyplora import hyplora_update

WIDTH = 3584  # Qwen2.5-7B's
RANK = 32
TOKENS = 64
LAYERS = ("hyplora", "hyplora_simplified")
# Their scripts: (curvature, alpha) on arithmetic and on commonsense; the rank is 32 everywhere.
SCRIPTS = {
    ("LoRA", "Llama 3 8B, Gemma 3 4B, Qwen2.5 7B"): (("-", 64), ("-", 64)),
    ("hyplora", "Llama 3 8B"): ((1.0, 128), (1.0, 128)),
    ("hyplora", "Gemma 3 4B"): ((1.0, 32), (1.0, 32)),
    ("hyplora", "Qwen2.5 7B"): ((1.0, 128), (1.0, 256)),
    ("hyplora_simplified", "Llama 3 8B, Gemma 3 4B, Qwen2.5 7B"): ((0.5, 256), (1.0, 256)),
}


def effective_curvature(k, dtype=torch.float32, device=None):
    """The K that the "hyplora" layer makes of its parameter k: a 0-d tensor."""
    return F.softplus(torch.as_tensor(k, dtype=dtype, device=device)) + 1e-6


def authors_update(x, A, B, k, scale=None):
    """The update of their "hyplora" layer, before alpha / rank.

    x: (..., d_in), A: (rank, d_in), B: (d_out, rank), of one dtype -> (..., d_out). k: the
    curvature parameter, a number or a tensor. scale: their learned unit of length, sqrt(d_in) at
    the start.

    It maps x to the hyperboloid and multiplies its space part by BA. It restores time as sqrt(|y|^2
    + 1/K), where the manifold asks for sqrt(|y|^2 + K), and reads the length of the update off that
    time: sqrt(K) arccosh(time / sqrt(K)), with a floor where arccosh is not defined.
    """
    K = effective_curvature(k, x.dtype, x.device)
    scale = math.sqrt(x.shape[-1]) if scale is None else scale
    norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    radius = (norm / scale / K.sqrt()).clamp(max=12.0)
    space = (K.sqrt() * torch.sinh(radius) * (x / norm)) @ A.mT @ B.mT
    time = (space.square().sum(dim=-1, keepdim=True) + 1 / K).sqrt()
    theta = time / K.sqrt()
    near = (2 * (theta - 1).clamp(min=1e-6)).sqrt()
    far = torch.acosh(theta.clamp(min=1 + 1e-7))
    distance = torch.where(theta < 1.01, near, far)
    return K.sqrt() * distance * space / space.norm(dim=-1, keepdim=True).clamp(min=1e-7)


def simplified_update(x, A, B, k):
    """The update of their "hyplora_simplified" layer, before alpha / rank.

    Shapes as in authors_update. x goes through the inverse stereographic map of the sphere of
    curvature k, 2x / (1 + k|x|^2), then through BA; the way back is a stereographic map of the
    hyperboloid, y / (1 + sqrt(|k|) time) with time = sqrt(|y|^2 + k).
    """
    k = torch.as_tensor(k, dtype=x.dtype, device=x.device)
    y = (2 * x / (1 + k * x.square().sum(dim=-1, keepdim=True))) @ A.mT @ B.mT
    time = (y.square().sum(dim=-1, keepdim=True) + k).sqrt()
    return y / (1 + k.abs().sqrt() * time)


def formula_update(x, A, B, curvature):
    """The paper's formula in their unit of length: |x| / sqrt(d_in), and the result too."""
    width = x.shape[-1]
    return hyplora_update(x, A, B, curvature * width) / math.sqrt(width)


def draw(seed=0):
    """(tokens of length sqrt(WIDTH), A, B with |BAx| about |x| / sqrt(3)): random, of that seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(WIDTH)
    A = (2 * torch.rand(RANK, WIDTH, generator=generator) - 1) / math.sqrt(WIDTH)
    B = torch.randn(WIDTH, RANK, generator=generator) / math.sqrt(RANK)
    return x, A, B


def median_length(update):
    return update.norm(dim=-1).median().item()


def lorentz_floor(k):
    """What "hyplora" gives for the smallest |BAx| above its guard: a nearly constant length."""
    x, A, B = draw()
    return median_length(authors_update(x, A, 1e-6 * B, k))


def dead_zone(k):
    """The length |y| of the space part up to which "hyplora" does not depend on |y|, or 0."""
    K = effective_curvature(k).item()
    return math.sqrt(max(0.0, K * (1 + 1e-6) ** 2 - 1 / K))


def rows(header, lines):
    """A Markdown table; all columns but the first are right-aligned."""
    head = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(line) for line in lines)])


def length_table():
    """Length of the update as B grows."""
    x, A, B = draw()
    lines = []
    for size in (1e-8, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0):
        lora = median_length(x @ A.T @ (size * B).T)
        cells = [f"{size:g}", f"{lora:.2e}"]
        for curvature in (0.5, 1.0):
            cells.append(f"{median_length(formula_update(x, A, size * B, curvature)):.2e}")
            cells.append(f"{median_length(authors_update(x, A, size * B, curvature)):.2e}")
            cells.append(f"{median_length(simplified_update(x, A, size * B, curvature)):.2e}")
        lines.append(cells)
    names = ["formula", "hyplora", "simplified"]
    header = ["size of B", "LoRA"]
    header += [f"{name}, {curvature}" for curvature in (0.5, 1.0) for name in names]
    return rows(header, lines)


def gradient_table():
    """The gradient of B at B = 0 and a little away from it, for a random linear loss."""
    x, A, B = draw()
    target = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    updates = {
        "LoRA": lambda x, A, B, k: x @ A.T @ B.T,
        "formula": formula_update,
        "hyplora": authors_update,
        "hyplora_simplified": simplified_update,
    }
    lines = []
    for name, update in updates.items():
        cells = [name]
        for k in (0.5, 1.0):
            for size in (0.0, 1e-2):
                leaf = (size * B).requires_grad_()
                (update(x, A, leaf, k) * target).sum().backward()
                cells.append(f"{leaf.grad.norm():.2e}")
        lines.append(cells)
    header = ["", "0.5, B = 0", "0.5, B = 0.01", "1.0, B = 0", "1.0, B = 0.01"]
    return rows(header, lines)


def norm_table():
    """Length of the update as a token grows, BA fixed, over its length for a typical token."""
    x, A, B = draw()
    columns = {
        "formula, 1.0": (formula_update, 1.0, 1),
        "hyplora, 1.0": (authors_update, 1.0, 1),
        "hyplora, 1.0, size 10": (authors_update, 1.0, 10),
        "simplified, 0.5": (simplified_update, 0.5, 1),
        "simplified, 1.0": (simplified_update, 1.0, 1),
    }
    lines = []
    for factor in (0.01, 0.1, 0.5, 1.0, 2.0, 4.0):
        cells = [f"{factor:g}"]
        for update, k, size in columns.values():
            typical = median_length(update(x, A, size * B, k))
            longer = median_length(update(factor * x, A, size * B, k))
            cells.append(f"{longer / typical:.4g}")
        lines.append(cells)
    return rows(["length / typical", *columns], lines)


def alpha_table():
    """alpha / rank times the update of a typical token, over that of LoRA at its alpha."""
    x, A, B = draw()
    lines = []
    settings = (
        ("hyplora", authors_update, 1.0, 32),
        ("hyplora", authors_update, 1.0, 128),
        ("hyplora", authors_update, 1.0, 256),
        ("hyplora_simplified", simplified_update, 0.5, 256),
        ("hyplora_simplified", simplified_update, 1.0, 256),
    )
    for name, update, k, alpha in settings:
        cells = [name, f"{k}", f"{alpha}"]
        for size in (1e-2, 0.1, 1.0, 10.0):
            lora = 64 * median_length(x @ A.T @ (size * B).T)
            cells.append(f"{alpha * median_length(update(x, A, size * B, k)) / lora:.2e}")
        lines.append(cells)
    header = ["layer", "curvature", "alpha", "B = 0.01", "B = 0.1", "B = 1", "B = 10"]
    return rows(header, lines)


def merge_table():
    """What BA x, which merging and mixed-batch inference compute, has to do with the update."""
    x, A, B = draw()
    lines = []
    for name, update, k in (
        ("hyplora", authors_update, 1.0),
        ("hyplora_simplified", simplified_update, 0.5),
        ("hyplora_simplified", simplified_update, 1.0),
    ):
        for size in (0.1, 1.0):
            merged = x @ A.T @ (size * B).T
            true = update(x, A, size * B, k)
            ratio = median_length(merged) / median_length(true)
            cosine = F.cosine_similarity(merged, true, dim=-1).median().item()
            lines.append([name, f"{k}", f"{size:g}", f"{ratio:.1f}", f"{cosine:.3f}"])
    header = ["layer", "curvature", "size of B", "length merged / length trained", "cosine"]
    return rows(header, lines)


def script_table():
    lines = []
    for (layer, models), settings in SCRIPTS.items():
        cells = [layer, models]
        for curvature, alpha in settings:
            cells.append(f"{curvature}, {alpha}")
        lines.append(cells)
    return rows(["layer", "model", "arithmetic: curvature, alpha", "commonsense"], lines)


def page():
    """The comparison page as Markdown; every number in it is computed here."""
    K_half = effective_curvature(0.5).item()
    K_one = effective_curvature(1.0).item()
    ratio = math.sqrt(WIDTH)
    x, A, B = draw()
    large = median_length(authors_update(x, A, 10 * B, 1.0))
    large_formula = median_length(formula_update(x, A, 10 * B, K_one))
    k = 0.5
    s = 2 * x / (1 + k * x.square().sum(dim=-1, keepdim=True))
    xi = (1 - k * x.square().sum(dim=-1)) / (1 + k * x.square().sum(dim=-1)) / math.sqrt(k)
    on_sphere = ((xi.square() + s.square().sum(dim=-1)) * k).mean().item()
    size_one = median_length(x @ A.T @ B.T) / math.sqrt(WIDTH)
    version = torch.__version__.split("+")[0]
    return f"""# The authors' two layers beside the paper's formula

`python -m benchmarks.authors` prints this page (torch {version}, CPU, float32). The release is
github.com/marlin-codes/HypLoRA at commit 66df99a. The layers are written anew here; nothing was
trained for this page. All tables are for a layer of {WIDTH} x {WIDTH}, rank {RANK}: {TOKENS} random
tokens of length sqrt({WIDTH}), A as at the start of training, and B random of the size that is
given; at size 1, |BAx| is about {size_one:.2f} |x|. Lengths are medians over the tokens, before
alpha / rank.

- **formula** is the paper's, as `hyplora.py` computes it, with |x| and the result divided by
  sqrt(d_in) = {ratio:.1f}, which is the authors' unit of length.
- **hyplora** takes K = softplus(k) + 1e-6, so that its curvature parameter 0.5 is K = {K_half:.3f}
  and 1.0 is K = {K_one:.3f}. It restores time as sqrt(|y|^2 + 1/K) where the manifold asks for
  sqrt(|y|^2 + K).
- **simplified** (`hyplora_simplified`) is y / (1 + sqrt(k) sqrt(|y|^2 + k)) with
  y = BA x 2 / (1 + k |x|^2).

## The length of the update: a floor and a dead zone

{length_table()}

With curvature 0.5 the update of `hyplora` has the length {lorentz_floor(0.5):.3f} however small BAx
is: at |y| = 0 its time is sqrt(1/K), which lies above the manifold's sqrt(K) as K is below 1. With
1.0, time begins below sqrt(K), where arccosh is not defined: up to |y| = {dead_zone(1.0):.3f} the
length is the guard's {lorentz_floor(1.0):.2e}, whatever B does, and only the direction of B learns.
(Below |y| = 1e-7 another guard lets the length go to 0, so that a fresh adapter changes nothing; in
the first row of the table it acts.) The formula's length goes to 0 with B, and so does that of the
simplified layer.

In the other direction: for large B the 1/K no longer matters, and `hyplora` comes back to the
formula at its own K: {large:.3f} against {large_formula:.3f} at size 10.

## The gradient of B

{gradient_table()}

The gradient of `hyplora` at B = 0 is that of the jump from 0 to the floor over the guard's 1e-7.
Adam divides by it, so the first step of B has its usual size, but then each update has the length
of the floor. The trainer that their scripts use clips the gradients of all parameters together at
1.0, so that one such layer shrinks the gradients of all others.

## Which tokens get a longer update

{norm_table()}

The formula gives a longer token a longer update, here more than in proportion. `hyplora` gives it a
longer one outside its dead zone (at size 1 a typical token is inside, so that the shorter ones get
the same length: 1).
The simplified layer does the opposite beyond |x| = 1/sqrt(k), which is {1 / math.sqrt(0.5):.2f} at
0.5, while a token that leaves an RMSNorm has a length near sqrt(d_in): its way in is the inverse
stereographic map of a sphere (k (xi^2 + |s|^2) = {on_sphere:.3f} for its points (xi, s)), which
sends long vectors to one pole. It also has no unit of length: the same curvature is another thing
at another width.

## The alphas of their scripts

{script_table()}

What they come to, alpha / rank times the update of a typical token, over LoRA's at its alpha of 64:

{alpha_table()}

So, at one B, their HypLoRA has much shorter updates than their LoRA in spite of the larger alphas.
In the unit of `hyplora` lengths are divided by sqrt(d_in) on the way in and not multiplied on the
way out; in the simplified layer 2 / (1 + k |x|^2) does the like. B has to grow further to make up
for it, so that comparisons at one learning rate compare that, too.

## Merging

{merge_table()}

`merge()` adds BA to the weight as if the layer were linear, and so does `_mixed_batch_forward`,
which serves several adapters in one batch: both give BAx instead of the update. The direction is
right and the length is not. Their evaluation scripts do neither, so that their published numbers do
not suffer from it.

## Which published row is which layer's

It cannot be told from the release alone. Their scripts train `hyplora` with curvature 1.0 only, and
the simplified layer with 0.5 on arithmetic and 1.0 on commonsense. So a published arithmetic row at
K = 0.5 (Gemma 3's) fits the simplified layer, one at K = 1.0 fits `hyplora`, and a commonsense row
at 1.0 fits either.

## What speaks for their code

- The unit of length of `hyplora` is a parameter that starts at sqrt(d_in) and learns, so that it
  can find by itself what `calibrate_curvature` has to measure. The formula without calibration is
  close to LoRA where activations are shorter than sqrt(d_in), as they are in SmolLM2-135M.
- `hyplora` clips the radius at 12, a bound that `hyplora.py` has taken over, and computes maps and
  products in float32, whatever autocast says.
- The published gains come from these layers. The formula does better on SmolLM2-135M (RESULTS.md),
  and was compared on no larger model.
"""


def main():
    print(page(), end="")


if __name__ == "__main__":
    main()
