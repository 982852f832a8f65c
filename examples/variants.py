"""Can HypLoRA be combined with DoRA and with AdaLoRA? Two small subclasses of HypLoRALinear.

    python -m examples.variants                      # needs torch alone

It prints:

                         loss   rank of each layer
    HypLoRALinear      0.0014                 8, 8
    DoraHypLoRALinear  0.0013                 8, 8
    AdaHypLoRALinear   0.0218                 3, 5

Yes, they train; this does not show which is better, as it is one toy with one setting for all. With
curvature = math.inf the two classes are DoRA and AdaLoRA themselves: tests/test_examples.py
compares outputs, gradients and budgets with PEFT's. Each has a tensor of its own, so that its file
does not fit another class: a variant without one would be loaded as plain HypLoRA, without a word.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    hyplora_parameters,
    hyplora_update,
    replace_modules,
)


class DoraHypLoRALinear(HypLoRALinear):
    """HypLoRA with DoRA's magnitude (Liu et al., 2024): z = b + m/n * (W x + scaling * update(x)).

    m is trained, one number for each output, and n is the length of the rows of W + scaling * BA.
    m starts at n, and n is taken as a constant by the gradient, both as in DoRA. The ratio phi of
    |update| to |BAx|, which depends on the token, is left out of n: it would make a token's output
    depend on the others, and m can say what one factor for each output can say.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        if not isinstance(base, nn.Linear):
            raise TypeError("DoRA needs the rows of W: the base has to be an nn.Linear")
        self.lora_magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1))

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "lora_magnitude"):  # The first call comes before it is made.
            self.lora_magnitude.data = self.weight.detach().float().norm(dim=1)

    def forward(self, x):
        out = super().forward(x)
        if not self.enabled:
            return out
        bias = 0 if self.bias is None else self.bias
        n = (self.weight + self.scaling * (self.lora_B @ self.lora_A).detach()).norm(dim=1)
        return out + ((self.lora_magnitude / n - 1) * (out - bias)).to(out.dtype)


class AdaHypLoRALinear(HypLoRALinear):
    """HypLoRA in AdaLoRA's form (Zhang et al., 2023): BA is P diag(lambda) Q.

    lora_B is P, lora_A is Q, and lora_E is lambda, which starts at 0. RankBudget sets the lambdas
    to 0 that matter least. A lambda of 0 takes its direction out of BAx before the length of the
    update is computed, so that a pruned layer is a HypLoRA of the lower rank. hyplora_statistics
    does not know lambda, and measures A and B without it.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.lora_E = nn.Parameter(torch.zeros(len(self.lora_A), 1, device=self.lora_A.device))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        if hasattr(self, "lora_E"):  # The first call comes before it is made.
            nn.init.zeros_(self.lora_E)

    def add_update(self, out, x):
        update = hyplora_update(x, self.lora_E * self.lora_A, self.lora_B, self.K)
        return torch.add(out, update, alpha=self.scaling).to(out.dtype)


def ada_layers(model):
    return [module for module in model.modules() if isinstance(module, AdaHypLoRALinear)]


def orthogonality(model):
    """AdaLoRA's penalty: how far the rows of Q and the columns of P are from orthonormal ones."""
    matrices = [M for layer in ada_layers(model) for M in (layer.lora_A, layer.lora_B.T)]
    return sum((M @ M.T - torch.eye(len(M)).to(M)).norm() / len(matrices) for M in matrices)


class RankBudget:
    """AdaLoRA's allocation of the rank: call step after optimizer.step() and before zero_grad().

    The importance of a number w is |w * its gradient|, smoothed over the steps, times its smoothed
    uncertainty. That of a triplet, one lambda with its row of Q and its column of P, is lambda's
    plus the means over the row and the column. From the step warmup to total - final, the number
    of triplets falls to target_rank for each layer, as the third power of the steps left.
    """

    def __init__(self, model, target_rank, total, warmup, final):
        self.layers = ada_layers(model)
        self.start = sum(len(layer.lora_E) for layer in self.layers)
        self.target = target_rank * len(self.layers)
        self.warmup = warmup
        self.end = total - final
        if not warmup < self.end < total:
            raise ValueError(f"warmup {warmup} must end before total - final, {self.end}")
        self.kept = {}

    def importance(self, p):
        """The importance of each number in the parameter p, brought up to date."""
        now = (p * p.grad).abs()
        mean, spread = self.kept.get(p, (torch.zeros_like(now), torch.zeros_like(now)))
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * (now - mean).abs()
        self.kept[p] = (mean, spread)
        return mean * spread

    @torch.no_grad()
    def step(self, step):
        if step < self.end:  # From there on, the scores and so the choice stay as they are.
            self.scores = []
            for layer in self.layers:
                score = self.importance(layer.lora_E).view(-1)
                score = score + self.importance(layer.lora_A).mean(dim=1)
                score = score + self.importance(layer.lora_B).mean(dim=0)
                self.scores.append(score)
        left = min(max((self.end - step) / (self.end - self.warmup), 0), 1)
        dropped = self.start - int((self.start - self.target) * left**3 + self.target)
        if dropped > 0:
            threshold = torch.cat(self.scores).kthvalue(dropped).values
            for layer, score in zip(self.layers, self.scores):
                layer.lora_E[score <= threshold] = 0


def inject_variant(kind, model, names, **options):
    """Freeze the model and put layers of this kind where the names say."""
    model.requires_grad_(False)
    bases = [model.get_submodule(name) for name in names]
    replace_modules(model, {base: kind(base, **options) for base in bases})


# --- the demonstration: a small network learns to be another one ---------------------------------


def train(model, x, y, steps=200):
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    budget = RankBudget(model, target_rank=4, total=steps, warmup=20, final=80)
    for step in range(1, steps + 1):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        (loss + 0.1 * orthogonality(model)).backward()
        optimizer.step()
        budget.step(step)
    return loss.item()


def main():
    torch.set_num_threads(1)  # The tensors are tiny, so that threads would only wait.
    torch.manual_seed(0)
    base, other = (nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in "ab")
    x = torch.randn(256, 16)
    y = other(x).detach()
    print("                     loss   rank of each layer")
    for kind in (HypLoRALinear, DoraHypLoRALinear, AdaHypLoRALinear):
        model = copy.deepcopy(base)
        inject_variant(kind, model, ["0", "2"], rank=8)
        calibrate_curvature(model, x)
        loss = train(model, x, y)
        ranks = ", ".join(str(layer.lora_E.count_nonzero().item()) for layer in ada_layers(model))
        print(f"{kind.__name__:17s} {loss:7.4f} {ranks or '8, 8':>20s}")


if __name__ == "__main__":
    main()
