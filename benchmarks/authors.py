"""The arithmetic of the authors' released layer, written anew from its description, and where it leaves the formula.

Their layer (github.com/marlin-codes/HypLoRA, peft/tuners/lora/layer.py, the "hyplora" type) works in float32, divides
|x| by a learned scale that starts at sqrt(d_in), clips the radius at 12, takes K = softplus(k) + 1e-6, and restores the
time coordinate as sqrt(|y|^2 + 1/K) where the manifold asks for sqrt(|y|^2 + K).

    python -m benchmarks.authors        # prints the table in the README
"""

import functools
import math

import torch
import torch.nn.functional as F

from hyplora import hyplora_update


def authors_update(x, A, B, k, scale=None):
    """x: (..., d_in), A: (rank, d_in), B: (d_out, rank), k: their curvature parameter -> (..., d_out)."""
    K = F.softplus(torch.as_tensor(k, dtype=x.dtype, device=x.device)) + 1e-6
    scale = math.sqrt(x.shape[-1]) if scale is None else scale
    norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    radius = (norm / scale / K.sqrt()).clamp(max=12.0)
    space = (K.sqrt() * torch.sinh(radius) * (x / norm)) @ A.T @ B.T
    time = (space.square().sum(dim=-1, keepdim=True) + 1 / K).sqrt()
    theta = time / K.sqrt()
    excess = (theta - 1).clamp(min=1e-6)
    distance = torch.where(theta < 1.01, (2 * excess).sqrt(), torch.acosh(theta.clamp(min=1 + 1e-7)))
    return K.sqrt() * distance * space / space.norm(dim=-1, keepdim=True).clamp(min=1e-7)


def main():
    width, rank, tokens = 3584, 32, 64
    torch.manual_seed(0)
    x, A = torch.randn(tokens, width), torch.empty(rank, width).uniform_(-1, 1) / math.sqrt(width)
    target = torch.randn(tokens, width)
    print(f"{width} x {width} layer, rank {rank}, {tokens} random tokens, seed 0, float32, torch {torch.__version__}\n")
    print("| curvature | | K in use | update length, B near 2e-8 | gradient norm of B at B = 0 |")
    print("| --- | --- | ---: | ---: | ---: |")
    for curvature in (0.5, 1.0):
        # The formula in their unit: |x| over sqrt(d_in), so K = curvature * d_in and the result over sqrt(d_in).
        def formula(x, A, B, K=curvature * width):
            return hyplora_update(x, A, B, K) / math.sqrt(width)


        theirs = functools.partial(authors_update, k=curvature)
        K_theirs = F.softplus(torch.tensor(curvature)).item()
        for name, update, K in (("paper's formula", formula, curvature), ("authors' code", theirs, K_theirs)):
            small = 2e-8 * torch.randn(width, rank, generator=torch.Generator().manual_seed(1))
            length = update(x, A, small).norm(dim=-1).median().item()
            B = torch.zeros(width, rank, requires_grad=True)
            (update(x, A, B) * target).sum().backward()
            print(f"| {curvature} | {name} | {K:.2f} | {length:.2e} | {B.grad.norm():.2e} |")


if __name__ == "__main__":
    main()
