"""How to train two adapters on one base, switch between them by name, and compare them.

    python -m examples.two_adapters                  # needs torch alone

It prints:

    adapter                  sum      difference         product
    none                   100 %             8 %             7 %
    difference               8 %           100 %             7 %
    product                  7 %             7 %           100 %
    a file of 18 kB brings the first adapter back: True

The base stays in memory; a switch copies the numbers of an adapter alone.
"""

import copy
import os
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import (
    calibrate_curvature,
    disable_hyplora,
    hyplora_parameters,
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    save_hyplora,
    set_hyplora_state_dict,
)

NUMBERS = 13
TASKS = {
    "sum": lambda a, b: (a + b) % NUMBERS,
    "difference": lambda a, b: (a - b) % NUMBERS,
    "product": lambda a, b: (a * b) % NUMBERS,
}


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


PAIRS = torch.cartesian_prod(torch.arange(NUMBERS), torch.arange(NUMBERS))


def answers(task):
    return TASKS[task](PAIRS[:, 0], PAIRS[:, 1])


def train(model, parameters, task, steps, lr):
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        loss = F.cross_entropy(model(PAIRS), answers(task))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, task):
    return (model(PAIRS).argmax(dim=-1) == answers(task)).float().mean().item()


def report(label, model):
    shares = "".join(f"{100 * accuracy(model, task):14.0f} %" for task in TASKS)
    print(f"{label:12s}{shares}")


def main():
    torch.manual_seed(0)
    model = Calculator()
    train(model, model.parameters(), "sum", steps=150, lr=1e-2)

    inject_hyplora(model, ["hidden", "out"], rank=8)
    calibrate_curvature(model, PAIRS)
    fresh = copy.deepcopy(hyplora_state_dict(model))
    adapters = {}
    for task in ("difference", "product"):
        set_hyplora_state_dict(model, fresh)
        train(model, hyplora_parameters(model), task, steps=200, lr=1e-2)
        # The state dict refers to the model's own tensors, so that a copy has to be kept.
        adapters[task] = copy.deepcopy(hyplora_state_dict(model))

    print("adapter     " + "".join(f"{task:>16s}" for task in TASKS))
    with disable_hyplora(model):
        report("none", model)
    for name, tensors in adapters.items():
        set_hyplora_state_dict(model, tensors)
        report(name, model)

    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in adapters.items():
            set_hyplora_state_dict(model, tensors)
            save_hyplora(model, f"{folder}/{name}.pt")
        load_hyplora(model, f"{folder}/difference.pt")
        size = os.path.getsize(f"{folder}/difference.pt")
        same = all(
            torch.equal(tensor, adapters["difference"][name])
            for name, tensor in hyplora_state_dict(model).items()
        )
        print(f"a file of {size / 1000:.0f} kB brings the first adapter back: {same}")


if __name__ == "__main__":
    main()
