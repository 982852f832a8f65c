"""Can HypLoRA be combined with DoRA and with AdaLoRA? Two small subclasses of HypLoRALinear.

    python -m examples.variants                      # needs torch alone

It prints:

                            loss   accuracy   rank of each layer
    LoRA                  0.0175      100 %                 8, 8
    HypLoRA               0.0242      100 %                 8, 8
    DoRA                  0.1192      100 %                 8, 8
    HypLoRA with DoRA     0.1090      100 %                 8, 8
    AdaLoRA               0.0708      100 %                 2, 6
    HypLoRA with AdaLoRA  0.0514      100 %                 3, 5
    DoRA's n with the mean phi, 0.57, would differ by at most 42.6 %

The table shows that the combinations train, and nothing about which one is better: it is one toy
with one setting for all. With curvature = math.inf the two classes are DoRA and AdaLoRA themselves;
tests/test_examples.py compares outputs, gradients and budgets with PEFT's.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    hyplora_parameters,
    hyplora_update,
    inject_hyplora,
    remove_hyplora,
)


class DoraHypLoRALinear(HypLoRALinear):
    """HypLoRA with DoRA's magnitude (Liu et al., 2024): z = b + m/n * (W x + scaling * update(x)).

    m is trained, one number for each output, and n is the length of the rows of W + scaling * BA.
    It starts at n, and n is taken as a constant by the gradient, both as in DoRA.

    The choice: the matrix that HypLoRA applies to a token is W + scaling * phi * BA, where phi, the
    ratio of |update| to |BAx|, depends on the token. Should n contain the mean phi? We leave it
    out. The mean over a batch would make one token's output depend on the others, and a stored mean
    would be one more state, which has to be initialized, saved and explained. The model can say
    the same without it: n is one factor for each output, the same for all tokens, and m is another.
    What is lost is that m is no longer the length of the rows of the mean matrix, by as much as the
    last line of the table says.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        if base.weight.shape != (self.out_features, self.in_features):
            raise TypeError("DoRA needs the rows of W: the base has to be an nn.Linear")
        self.lora_magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1))

    def forward(self, x):
        out = super().forward(x)
        if not self.enabled:
            return out
        bias = 0 if self.bias is None else self.bias
        BA = (self.lora_B @ self.lora_A).detach()
        n = (self.weight + self.scaling * BA).norm(dim=1)
        factor = (self.lora_magnitude / n).to(out.dtype)
        return bias + factor * (out - bias)


class AdaHypLoRALinear(HypLoRALinear):
    """HypLoRA in AdaLoRA's form (Zhang et al., 2023): BA is P diag(lambda) Q.

    lora_B is P, lora_A is Q, and lora_E is lambda, which starts at 0. RankBudget sets the lambdas
    to 0 that matter least. A lambda of 0 takes its direction out of BAx before the length of the
    update is computed, so that a pruned layer is a HypLoRA of the lower rank.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.lora_E = nn.Parameter(torch.zeros(len(self.lora_A), 1, device=self.lora_A.device))

    def forward(self, x):
        out = self.base(x)
        if not self.enabled:
            return out
        x = F.dropout(x, self.options["dropout"], self.training)
        update = hyplora_update(x, self.lora_E * self.lora_A, self.lora_B, self.K)
        return out + self.scaling * update


def orthogonality(model):
    """AdaLoRA's penalty: how far the rows of Q and the columns of P are from orthonormal ones."""
    penalties = []
    for layer in ada_layers(model):
        for M in (layer.lora_A, layer.lora_B.T):
            penalties.append((M @ M.T - torch.eye(len(M))).norm())
    return sum(penalties) / len(penalties)


class RankBudget:
    """AdaLoRA's allocation of the rank: call step after optimizer.step() and before zero_grad().

    The importance of a number w is |w * its gradient|, smoothed over the steps, times its smoothed
    uncertainty. A triplet is one lambda with its row of Q and its column of P; its importance is
    lambda's plus the means over the row and the column. The number of triplets kept in the model
    falls from all of them to target_rank for each layer, as the third power of the steps left.
    """

    def __init__(self, model, target_rank, total, warmup, final, every=1, beta=0.85):
        self.layers = ada_layers(model)
        self.start = sum(len(layer.lora_E) for layer in self.layers)
        self.target = target_rank * len(self.layers)
        self.total = total
        self.warmup = warmup
        self.final = final
        self.every = every
        self.beta = beta
        self.smoothed = {}
        self.uncertainty = {}

    def importance(self, p):
        """The importance of each number in the parameter p, brought up to date."""
        now = (p * p.grad).abs().detach()
        mean = self.smoothed.get(p, torch.zeros_like(now))
        spread = self.uncertainty.get(p, torch.zeros_like(now))
        mean = self.beta * mean + (1 - self.beta) * now
        spread = self.beta * spread + (1 - self.beta) * (now - mean).abs()
        self.smoothed[p] = mean
        self.uncertainty[p] = spread
        return mean * spread

    def budget(self, step):
        """How many triplets may stay after this step."""
        left = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        left = min(max(left, 0.0), 1.0)
        return int((self.start - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self, step):
        is_final = step >= self.total - self.final
        if not is_final:  # From there on, the scores and so the choice stay as they are.
            self.scores = []
            for layer in self.layers:
                score = self.importance(layer.lora_E).view(-1)
                score = score + self.importance(layer.lora_A).mean(dim=1)
                score = score + self.importance(layer.lora_B).mean(dim=0)
                self.scores.append(score)
        if step <= self.warmup or not (is_final or step % self.every == 0):
            return
        dropped = self.start - self.budget(step)
        if dropped == 0:
            return
        threshold = torch.cat(self.scores).kthvalue(dropped).values
        for layer, score in zip(self.layers, self.scores):
            layer.lora_E[score <= threshold] = 0


def ada_layers(model):
    return [module for module in model.modules() if isinstance(module, AdaHypLoRALinear)]


def inject_variant(kind, model, targets, **options):
    """inject_hyplora with layers of another kind."""
    names = inject_hyplora(model, targets, **options)
    remove_hyplora(model)
    for name in names:
        model.set_submodule(name, kind(model.get_submodule(name), **options))
    return names


# --- the demonstration --------------------------------------------------------------------------

NUMBERS = 13
PAIRS = torch.cartesian_prod(torch.arange(NUMBERS), torch.arange(NUMBERS))
SUMS = PAIRS.sum(dim=1) % NUMBERS
DIFFERENCES = (PAIRS[:, 0] - PAIRS[:, 1]) % NUMBERS


class Calculator(nn.Module):
    """Two numbers go in, and a score for each possible answer comes out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(NUMBERS, 32)
        self.hidden = nn.Linear(64, 128)
        self.out = nn.Linear(128, 128)
        self.head = nn.Linear(128, NUMBERS)

    def forward(self, pairs):
        x = self.embed(pairs).flatten(start_dim=1)
        x = F.gelu(self.hidden(x))
        x = F.gelu(self.out(x))
        return self.head(x)


def train_base(model, steps=150):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(PAIRS), SUMS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    return (model(PAIRS).argmax(dim=-1) == DIFFERENCES).float().mean().item()


ROWS = [
    ("LoRA", HypLoRALinear, math.inf),
    ("HypLoRA", HypLoRALinear, 0.5),
    ("DoRA", DoraHypLoRALinear, math.inf),
    ("HypLoRA with DoRA", DoraHypLoRALinear, 0.5),
    ("AdaLoRA", AdaHypLoRALinear, math.inf),
    ("HypLoRA with AdaLoRA", AdaHypLoRALinear, 0.5),
]


def adapt(model, steps=200, penalty=0.1):
    """Train the adapters on another task than the base's; where there are lambdas, prune half."""
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    budget = None
    if ada_layers(model):
        budget = RankBudget(model, target_rank=4, total=steps, warmup=20, final=80, every=5)
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(PAIRS), DIFFERENCES)
        total = loss
        if budget is not None:
            total = loss + penalty * orthogonality(model)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if budget is not None:
            budget.step(step)
    return loss.item()


@torch.no_grad()
def effect_of_phi(layer, x):
    """By how much the largest n would change, as a share of it, if it contained the mean phi."""
    lora = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    update = hyplora_update(x, layer.lora_A, layer.lora_B, layer.K)
    phi = (update.norm(dim=-1) / lora.norm(dim=-1)).mean()
    BA = layer.lora_B @ layer.lora_A
    without = (layer.weight + layer.scaling * BA).norm(dim=1)
    with_phi = (layer.weight + layer.scaling * phi * BA).norm(dim=1)
    return phi.item(), (with_phi / without - 1).abs().max().item()


def main():
    torch.manual_seed(0)
    base = Calculator()
    train_base(base)

    print("                        loss   accuracy   rank of each layer")
    for label, kind, curvature in ROWS:
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        inject_variant(kind, model, ["hidden", "out"], rank=8, curvature=curvature)
        calibrate_curvature(model, PAIRS)
        loss = adapt(model)
        ranks = "8, 8"
        if ada_layers(model):
            ranks = ", ".join(str(int(m.lora_E.count_nonzero())) for m in ada_layers(model))
        share = 100 * accuracy(model)
        print(f"{label:20s} {loss:7.4f} {share:8.0f} % {ranks:>20s}")
        if label == "HypLoRA with DoRA":
            x = model.embed(PAIRS).flatten(start_dim=1)
            phi, change = effect_of_phi(model.hidden, x)
    print(f"DoRA's n with the mean phi, {phi:.2f}, would differ by at most {100 * change:.1f} %")


if __name__ == "__main__":
    main()
