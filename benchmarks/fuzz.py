"""Draw hostile inputs for the layer, count what is not finite, and measure the error to float64.

A case is one forward and backward pass through HypLoRALinear, on an input for which LoRA's product
in the same dtype is finite, forward and backward (others are drawn again): tokens of norm 0, 1e-30
and up to 1e12 (float16: up to its largest number), outliers, B = 0, B tiny and large, A of a lower
rank, BAx = 0 with B not 0, inputs that are empty, strided or expanded, K from 1e-6 to 1e12 and
infinity.

    python -m benchmarks.fuzz                           # 100,000 cases and the table of errors
    python -m benchmarks.fuzz --cases 1000 --seed 7
"""

import argparse
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import HypLoRALinear, hyplora_update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (5,), (3, 4), (2, 1, 3), (0,), (2, 0))


class Zero(nn.Module):
    """A base whose output is 0, so that the layer's output is the scaled update."""

    def __init__(self, in_features, out_features, dtype):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features, dtype=self.dtype)


def draw_input(rng, g, shape, width, dtype):
    """Tokens of all lengths, laid out in memory in all ways."""
    largest = 65504.0 if dtype == torch.float16 else 1e12
    smallest = 6e-8 if dtype == torch.float16 else 1e-30
    x = F.normalize(torch.randn(*shape, width, generator=g, dtype=torch.float64), dim=-1)
    spread = torch.rand(*shape, 1, generator=g, dtype=torch.float64)
    center = rng.choice((0.0, 0.5, 1.0, 1.5)) * math.log(width)
    low, high = center - 2, center + 2
    if rng.random() < 0.4:
        low, high = math.log(smallest), math.log(largest)
    x = x * torch.exp(low + (high - low) * spread)
    kind = rng.random()
    if kind < 0.1:
        x = torch.zeros_like(x)
    elif kind < 0.3 and x.numel():  # There are tokens of norm 0, and one huge number.
        x = x * (torch.rand(*shape, 1, generator=g) < 0.7)
        x.view(-1)[rng.randrange(x.numel())] = largest
    x = x.clamp(-largest, largest).to(dtype)
    layout = rng.random()
    if layout < 0.2:
        x = torch.stack([x, x], dim=-1)[..., 0]  # strided
    elif layout < 0.3 and shape:
        x = x[:1].expand(shape[0], *x.shape[1:])
    return x


def draw_weights(rng, g, width, out, rank):
    A = torch.randn(rank, width, generator=g) / math.sqrt(width) * 10 ** rng.uniform(-3, 1)
    size = 10 ** rng.choice((0.0, rng.uniform(-20, 4), rng.uniform(-3, 3)))
    B = torch.randn(out, rank, generator=g) * size
    kind = rng.random()
    if kind < 0.1:
        B = torch.zeros_like(B)
    elif kind < 0.2:  # A has the rank 1.
        A = A[:1].expand(rank, width).clone()
    elif kind < 0.3:  # BA is 0 and B is not: it sees only the difference of equal rows.
        A = A[:1].expand(rank, width).clone()
        B = B - B.mean(dim=1, keepdim=True)
    return A, B


def lora(x, A, B):
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def lora_is_finite(x, A, B):
    inputs = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    y = lora(*inputs)
    results = [y, *torch.autograd.grad(y.sum(), inputs)]
    return all(t.isfinite().all() for t in results)


def draw(rng, g):
    """One case: (layer, x)."""
    while True:
        dtype = rng.choice(DTYPES)
        width = rng.choice((1, 3, 16, 64))
        out = rng.choice((1, 5, 48))
        rank = rng.choice((1, 2, 8))
        x = draw_input(rng, g, rng.choice(SHAPES), width, dtype)
        A, B = draw_weights(rng, g, width, out, rank)
        if lora_is_finite(x, A, B):
            break
    K = math.inf if rng.random() < 0.1 else 10 ** rng.uniform(-6, 12)
    layer = HypLoRALinear(Zero(width, out, dtype), rank, alpha=rank, curvature=K / width)
    layer.lora_A.data, layer.lora_B.data = A, B
    return layer, x


def not_finite(layer, x):
    """Names of what is not finite after one forward and backward pass."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.sum().backward()
    results = {"output": y, "x.grad": x.grad}
    for name, p in layer.named_parameters():
        if p.requires_grad:
            results[name] = p.grad
    return [name for name, value in results.items() if not value.isfinite().all()]


def worst_error(update, exact, x, gradient):
    """The largest relative errors of a token: (of the update, of the gradient of x)."""
    x = x.detach().requires_grad_()
    got = update(x)
    got = [got, torch.autograd.grad(got, x, gradient)[0]]
    x = x.detach().double().requires_grad_()
    want = exact(x)
    want = [want, torch.autograd.grad(want, x, gradient.double())[0]]
    errors = [((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item() for a, b in zip(got, want)]
    return torch.tensor(errors)


def accuracy(dtype, g, tokens=1000, width=64, out=48, rank=8):
    """[update, LoRA's, gradient of x, LoRA's]: worst errors over radii and lengths of BAx.

    Radii go from 1e-8 to max_radius and |BAx| over 14 orders of magnitude (less in float16).
    """
    half = dtype == torch.float16
    ours, loras = torch.zeros(2), torch.zeros(2)
    for K in (0.5 * width,) if half else (1e-2, 0.5 * width, 1e4):
        for order in (-1, 0, 1) if half else range(-10, 5, 2):
            radius = torch.logspace(-1 if half else -8, math.log10(11.9), tokens).double()[:, None]
            x = F.normalize(torch.randn(tokens, width, generator=g, dtype=torch.float64), dim=-1)
            x = (x * radius * K**0.5).to(dtype)
            A = torch.randn(rank, width, generator=g) / math.sqrt(width)
            B = torch.randn(out, rank, generator=g) * 10.0**order
            gradient = torch.randn(tokens, out, generator=g).to(dtype)
            layer = HypLoRALinear(Zero(width, out, dtype), rank, alpha=rank, curvature=K / width)
            layer.lora_A.data, layer.lora_B.data = A, B
            A2, B2, K2 = A.double(), B.double(), layer.K.detach().double()
            error = worst_error(layer, lambda x: hyplora_update(x, A2, B2, K2), x, gradient)
            ours = torch.maximum(ours, error)
            error = worst_error(lambda x: lora(x, A, B), lambda x: lora(x, A2, B2), x, gradient)
            loras = torch.maximum(loras, error)
    return [ours[0], loras[0], ours[1], loras[1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    tried = dict.fromkeys(DTYPES, 0)
    broken = dict.fromkeys(DTYPES, 0)
    for case in range(args.cases):
        layer, x = draw(rng, g)
        names = not_finite(layer, x)
        tried[x.dtype] += 1
        broken[x.dtype] += bool(names)
        if names:
            print(f"case {case}: not finite: {names}, {x.dtype}, {tuple(x.shape)}, {layer}")
        if (case + 1) % max(1, args.cases // 10) == 0:
            print(f"{case + 1}/{args.cases}", flush=True)
    print(f"\nseed {args.seed}, torch {torch.__version__}, CPU; errors are of the worst token\n")
    print("| dtype | cases | not finite | error | LoRA's | error of the gradient of x | LoRA's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for dtype in DTYPES:
        errors = " | ".join(f"{error:.1e}" for error in accuracy(dtype, g))
        print(f"| {str(dtype)[6:]} | {tried[dtype]} | {broken[dtype]} | {errors} |")


if __name__ == "__main__":
    main()
