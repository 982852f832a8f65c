"""Draw hostile inputs for the layer and count what is not finite; measure the error against float64.

A case is one forward and backward pass through HypLoRALinear on an input for which the plain LoRA product of the same
dtype, forward and backward, is finite (others are drawn again): tokens of norm 0, 1e-30 and up to 1e12 (float16: up
to its largest number), outliers, B = 0, B tiny and large, rank-deficient A, B A x = 0 with B not 0, 1-d to 4-d, empty,
strided and expanded inputs, K from 1e-6 to 1e12 and infinity.

    python -m benchmarks.fuzz                   # 100,000 cases and the accuracy table, some minutes
    python -m benchmarks.fuzz --cases 1000 --seed 7
"""

import argparse
import math
import random
import time

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
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features, dtype=self.dtype)


def draw_input(rng, g, shape, width, dtype):
    """Tokens of all lengths, laid out in memory in all ways."""
    largest = 65504.0 if dtype == torch.float16 else 1e12
    smallest = 6e-8 if dtype == torch.float16 else 1e-30
    x = torch.randn(*shape, width, generator=g, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    spread = torch.rand(*shape, 1, generator=g, dtype=torch.float64)
    center = rng.choice((0.0, 0.5, 1.0, 1.5)) * math.log(width)
    low, high = (math.log(smallest), math.log(largest)) if rng.random() < 0.4 else (center - 2, center + 2)
    x = x * torch.exp(low + (high - low) * spread)
    kind = rng.random()
    if kind < 0.1:
        x = torch.zeros_like(x)
    elif kind < 0.3 and x.numel():  # zero tokens, and one huge number in a row
        x = x * (torch.rand(*shape, 1, generator=g) < 0.7)
        x.view(-1)[rng.randrange(x.numel())] = largest
    x = x.clamp(-largest, largest).to(dtype)
    layout = rng.random()
    if layout < 0.2:  # strided
        x = torch.stack([x, x], dim=-1)[..., 0]
    elif layout < 0.3 and shape:  # expanded
        x = x[:1].expand(shape[0], *x.shape[1:])
    return x


def draw_weights(rng, g, width, out, rank):
    A = torch.randn(rank, width, generator=g) / math.sqrt(width) * 10 ** rng.uniform(-3, 1)
    B = torch.randn(out, rank, generator=g) * 10 ** rng.choice((0.0, rng.uniform(-20, 4), rng.uniform(-3, 3)))
    kind = rng.random()
    if kind < 0.1:
        B = torch.zeros_like(B)
    elif kind < 0.2:  # A of rank 1
        A = A[:1].expand(rank, width).clone()
    elif kind < 0.3:  # B A = 0 with B not 0: B sees only the difference of equal rows
        A = A[:1].expand(rank, width).clone()
        B = B - B.mean(dim=1, keepdim=True)
    return A, B


def lora_is_finite(x, A, B):
    x, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
    y = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
    y.sum().backward()
    return all(t.isfinite().all() for t in (y, x.grad, A.grad, B.grad))


def draw(rng, g):
    """One case: (layer, x)."""
    while True:
        dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
        width, out, rank = rng.choice((1, 3, 16, 64)), rng.choice((1, 5, 48)), rng.choice((1, 2, 8))
        x = draw_input(rng, g, shape, width, dtype)
        A, B = draw_weights(rng, g, width, out, rank)
        if lora_is_finite(x, A, B):
            break
    K = rng.choice((math.inf, *(10 ** rng.uniform(-6, 12) for _ in range(9))))
    layer = HypLoRALinear(Zero(width, out, dtype), rank, alpha=rank, curvature=K / width)
    layer.lora_A.data, layer.lora_B.data = A, B
    return layer, x


def not_finite(layer, x):
    """Names of what is not finite after one forward and backward pass."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.sum().backward()
    results = {"output": y, "x.grad": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}
    return [name for name, value in results.items() if value is None or not value.isfinite().all()]


def accuracy(dtype, g, tokens=1000, width=64, out=48, rank=8):
    """Worst relative errors per token, of the update and of the gradient of x, as (ours, LoRA's) each.

    Radii from 1e-8 to max_radius and |BAx| over 14 orders of magnitude (float16: what it can hold of both),
    against float64 on the same numbers.
    """
    half = dtype == torch.float16
    worst = torch.zeros(2, 2, dtype=torch.float64)
    for K in (0.5 * width,) if half else (1e-2, 0.5 * width, 1e4):
        for order in (-1, 0, 1) if half else range(-10, 5, 2):
            radius = torch.logspace(-1 if half else -8, math.log10(11.99), tokens, dtype=torch.float64)[:, None]
            x = F.normalize(torch.randn(tokens, width, generator=g, dtype=torch.float64), dim=-1) * radius * K**0.5
            A = torch.randn(rank, width, generator=g) / math.sqrt(width)
            B = torch.randn(out, rank, generator=g) * 10.0**order
            d_out = torch.randn(tokens, out, generator=g).to(dtype)
            layer = HypLoRALinear(Zero(width, out, dtype), rank, alpha=rank, curvature=K / width)
            layer.lora_A.data, layer.lora_B.data, x = A, B, x.to(dtype)

            def both(update, x, d_out):
                x = x.detach().requires_grad_()
                y = update(x)
                y.backward(d_out)
                return torch.stack([F.pad(t.detach().double(), (0, width - t.shape[-1])) for t in (y, x.grad)])

            A2, B2, K2 = A.double(), B.double(), layer.K.detach().double()
            pairs = (
                (layer, lambda x: hyplora_update(x, A2, B2, K2)),
                (lambda x: F.linear(F.linear(x, A.to(dtype)), B.to(dtype)), lambda x: x @ A2.T @ B2.T),
            )
            errors = []
            for update, exact in pairs:
                got, want = both(update, x, d_out), both(exact, x.double(), d_out.double())
                errors.append(((got - want).norm(dim=-1) / want.norm(dim=-1)).amax(dim=-1))
            worst = torch.maximum(worst, torch.stack(errors))
    return worst.T.flatten().tolist()  # update: ours, LoRA's; gradient: ours, LoRA's


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, g = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    tried, broken = dict.fromkeys(DTYPES, 0), dict.fromkeys(DTYPES, 0)
    start = time.perf_counter()
    for case in range(args.cases):
        layer, x = draw(rng, g)
        tried[x.dtype] += 1
        names = not_finite(layer, x)
        broken[x.dtype] += bool(names)
        if names:
            print(f"case {case}: {names} not finite: {x.dtype} {tuple(x.shape)}, {layer.extra_repr()}")
        if (case + 1) % max(1, args.cases // 10) == 0:
            print(f"{case + 1}/{args.cases}, {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"\nseed {args.seed}, torch {torch.__version__}, CPU; error: the largest relative one of a token, to float64\n"
    )
    print("| dtype | cases | not finite | error | LoRA's | error of the gradient of x | LoRA's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for dtype in DTYPES:
        errors = " | ".join(f"{e:.1e}" for e in accuracy(dtype, g))
        print(f"| {str(dtype).split('.')[1]} | {tried[dtype]} | {broken[dtype]} | {errors} |")


if __name__ == "__main__":
    main()
