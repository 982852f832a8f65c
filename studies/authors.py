"""The two layers of the authors' release, and what they do where they leave the paper's formula.

Written anew from what their code computes (github.com/marlin-codes/HypLoRA, commit 66df99a,
peft/tuners/lora/layer.py, the types "hyplora" and "hyplora_simplified").

    python -m studies.authors        # the tables and numbers of AUTHORS.md, in a few seconds
"""

import math

import torch
import torch.nn.functional as F

from hyplora import hyplora_update
from studies.tables import grid, markdown, report, stamp

WIDTH = 3584  # Qwen2.5-7B's
RANK = 32
TOKENS = 64


def effective_curvature(k):
    """The K that the "hyplora" layer makes of its parameter k, a tensor or a number."""
    return F.softplus(torch.as_tensor(k)) + 1e-6


def authors_update(x, A, B, k, scale=None):
    """The update of their "hyplora" layer, before alpha / rank.

    x: (..., d_in), A: (rank, d_in), B: (d_out, rank), of one dtype -> (..., d_out). k: the
    curvature parameter, a number or a tensor. scale: their learned unit of length, sqrt(d_in) at
    the start.

    It maps x to the hyperboloid and multiplies its space part by BA. It restores time as sqrt(|y|^2
    + 1/K), where the manifold asks for sqrt(|y|^2 + K), and reads the length of the update off that
    time: sqrt(K) arccosh(time / sqrt(K)), with a floor where arccosh is not defined.
    """
    K = effective_curvature(torch.as_tensor(k).to(x))
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
    k = torch.as_tensor(k).to(x)
    y = (2 * x / (1 + k * x.square().sum(dim=-1, keepdim=True))) @ A.mT @ B.mT
    time = (y.square().sum(dim=-1, keepdim=True) + k).sqrt()
    return y / (1 + k.abs().sqrt() * time)


def formula_update(x, A, B, curvature):
    """The paper's formula in their unit of length: |x| / sqrt(d_in), and the result too."""
    width = x.shape[-1]
    return hyplora_update(x, A, B, curvature * width) / math.sqrt(width)


def draw():
    """Random tokens x of length sqrt(WIDTH), A, and B with |BAx| about |x| / sqrt(3)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(WIDTH)
    A = (2 * torch.rand(RANK, WIDTH, generator=generator) - 1) / math.sqrt(WIDTH)
    B = torch.randn(WIDTH, RANK, generator=generator) / math.sqrt(RANK)
    return x, A, B


LAYERS = {
    "LoRA": lambda x, A, B, curvature: x @ A.T @ B.T,
    "formula": formula_update,
    "hyplora": authors_update,
    "simplified": simplified_update,
}


def length(layer, curvature, size=1, factor=1):
    """The median length of the updates of factor * x, when B is size times what draw gives."""
    x, A, B = draw()
    return LAYERS[layer](factor * x, A, size * B, curvature).norm(dim=-1).median().item()


def length_rows():
    """Length of the update as B grows."""
    columns = {"LoRA": ("LoRA", None)}
    for curvature in (0.5, 1.0):
        for name in ("formula", "hyplora", "simplified"):
            columns[f"{name}, {curvature}"] = (name, curvature)
    sizes = (1e-8, 1e-6, 1e-4, 0.01, 0.1, 1, 10)
    return grid(sizes, columns, lambda size, column: f"{length(*columns[column], size):.2e}")


def gradient_rows():
    """The gradient of B at B = 0 and a little away from it, for a random linear loss."""
    x, A, B = draw()
    target = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    columns = {f"{k}, B = {size}": (k, size) for k in (0.5, 1.0) for size in (0, 0.01)}

    def gradient(name, column):
        curvature, size = columns[column]
        leaf = (size * B).requires_grad_()
        (LAYERS[name](x, A, leaf, curvature) * target).sum().backward()
        return f"{leaf.grad.norm():.2e}"

    return grid(LAYERS, columns, gradient)


def norm_rows():
    """Length of the update as a token grows, BA fixed, over its length for a typical token."""
    columns = {
        "formula, 1.0": ("formula", 1.0),
        "hyplora, 1.0": ("hyplora", 1.0),
        "hyplora, 1.0, size 10": ("hyplora", 1.0, 10),
        "simplified, 0.5": ("simplified", 0.5),
        "simplified, 1.0": ("simplified", 1.0),
    }

    def growth(factor, column):
        return f"{length(*columns[column], factor=factor) / length(*columns[column]):.4g}"

    return grid((0.01, 0.1, 0.5, 1, 2, 4), columns, growth)


def dead_zone(k):
    """The length |y| of the space part up to which "hyplora" does not depend on |y|, or 0."""
    K = effective_curvature(k).item()
    return math.sqrt(max(0.0, K * (1 + 1e-6) ** 2 - 1 / K))


def number_rows():
    """The other numbers in the text of AUTHORS.md."""
    K = effective_curvature(1.0).item()
    lora = length("LoRA", None)
    own = length("hyplora", 1.0)
    simplified = length("simplified", 0.5)
    numbers = {
        "sqrt(d_in)": f"{math.sqrt(WIDTH):.1f}",
        "|BAx| / |x|": f"{lora / math.sqrt(WIDTH):.2f}",
        "K of hyplora at 0.5": f"{effective_curvature(0.5).item():.3f}",
        "K of hyplora at 1.0": f"{K:.3f}",
        "|y| where the dead zone ends, at 1.0": f"{dead_zone(1.0):.3f}",
        "hyplora at 1.0, size 10": f"{length('hyplora', 1.0, 10):.3f}",
        "formula at that K, size 10": f"{length('formula', K, 10):.3f}",
        "hyplora, alpha 128, over LoRA, alpha 64": f"{128 / 64 * own / lora:.2e}",
        "simplified, alpha 256, over LoRA, alpha 64": f"{256 / 64 * simplified / lora:.2e}",
        "hyplora, merged over trained": f"{lora / own:.0f}",
        "simplified, merged over trained": f"{lora / simplified:.0f}",
    }
    return [{"": name, "at size 1 if not said": number} for name, number in numbers.items()]


def main():
    print(stamp("python -m studies.authors"))
    report("The length of the update, by the size of B", markdown(length_rows()))
    report("The gradient of B", markdown(gradient_rows()))
    title = "The length of the update, by the length of the token, over that of a typical one"
    report(title, markdown(norm_rows()))
    report("Other numbers", markdown(number_rows()))


if __name__ == "__main__":
    main()
