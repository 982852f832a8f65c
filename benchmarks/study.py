"""LoRA against HypLoRA, each at its own best learning rate: paired over seeds, on operand pairs never trained on.

For each task, rank and method a learning rate is chosen on validation data (two seeds of their own, lowest loss); then
ten seeds run at that rate and are scored on test data. A seed fixes the start of A and the batches, so methods are
compared in pairs. Runs that differ in method, rank, rate and seed train side by side on one frozen base, as a stack of
adapters; `test_training.py` checks the stack against runs of their own.

Tasks: subtract (one step) and two-step (a+b-c), on the base of train_minimal.py, which can only add.

    python -m benchmarks.study --tasks subtract --threads 1              # the better part of an hour on one core
    python -m benchmarks.study --tasks two-step --ranks 8 --threads 1    # the same, at the same time on another

What is finished is kept in runs/study.json, so that a run that was stopped goes on. Needs scipy (for the intervals).
"""

import argparse
import datetime
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import t as student

import train_minimal as toy
from benchmarks.authors import authors_update
from benchmarks.speed import machine, write_beside, write_section
from hyplora import calibrate_curvature, hyplora_update, inject_hyplora, remove_hyplora

RATES = {"subtract": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "two-step": [1e-3, 2e-3, 4e-3, 8e-3]}
AUTHORS_RATES = 4  # times these: their update is shorter by sqrt(d_in), which is 8 and more here
STEPS = {"subtract": 300, "two-step": 1500}  # so that the methods are still apart
SWEEP_SEEDS = (1000, 1001)
METHODS = {  # name: (curvature, learned, calibrated)
    "LoRA": (math.inf, False, False),
    "HypLoRA 0.1": (0.1, True, False),
    "HypLoRA 0.5": (0.5, True, False),
    "HypLoRA 1.0": (1.0, True, False),
    "HypLoRA 0.1, fixed": (0.1, False, False),
    "HypLoRA 0.5, fixed": (0.5, False, False),
    "HypLoRA 1.0, fixed": (1.0, False, False),
    "HypLoRA 0.5, calibrated": (0.5, True, True),
    "authors' arithmetic 0.5": (0.5, True, False),
}
MAIN = ["LoRA", "HypLoRA 0.5", "authors' arithmetic 0.5"]


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    rank: int
    lr: float
    seed: int
    steps: int


# --- a stack of adapters ----------------------------------------------------------------------------


class Stacked(nn.Module):
    """Adapters of many runs on one frozen linear, each for its own equal part of the batch.

    Made of the HypLoRALinear that each run starts with; ranks are filled up with zeros, whose gradients are zero too.
    """

    def __init__(self, layers, authors):
        super().__init__()
        self.base, self.authors = layers[0].base, authors
        rank = max(len(layer.lora_A) for layer in layers)
        pad = [rank - len(layer.lora_A) for layer in layers]
        self.lora_A = nn.Parameter(torch.stack([F.pad(m.lora_A.detach(), (0, 0, 0, p)) for m, p in zip(layers, pad)]))
        self.lora_B = nn.Parameter(torch.stack([F.pad(m.lora_B.detach(), (0, p)) for m, p in zip(layers, pad)]))
        # What K is made of: lora_K, or for the authors' layer its k and the scale of the norms.
        flat = [[m.curvature, m.in_features**0.5] if authors else [m.lora_K.item()] for m in layers]
        self.curve = nn.Parameter(torch.tensor(flat))
        self.register_buffer("learned", torch.tensor([[m.lora_K.requires_grad] for m in layers]))
        self.register_buffer("start", torch.tensor([[m.curvature * m.in_features] for m in layers]))
        self.register_buffer("scaling", torch.tensor([[[m.scaling]] for m in layers]))

    def forward(self, x):
        out = self.base(x)
        curve = torch.where(self.learned, self.curve, self.curve.detach())
        update = authors_update if self.authors else hyplora_update
        arguments = (curve if self.authors else self.start * curve.exp()).unsqueeze(-1).unbind(1)
        x = x.reshape(len(curve), -1, x.shape[-1])  # (runs, tokens, d_in)
        return out + (self.scaling * torch.func.vmap(update)(x, self.lora_A, self.lora_B, *arguments)).view(out.shape)


def start(base, run, task):
    """{name: HypLoRALinear} that the run starts with."""
    curvature, learned, calibrated = METHODS[run.method]
    torch.manual_seed(run.seed)
    options = dict(rank=run.rank, alpha=2 * run.rank, curvature=curvature, learn_curvature=learned)
    names = inject_hyplora(base, "all-linear", **options)
    if calibrated:
        calibrate_curvature(base, task.batch(run.seed, 0)[0].to(next(base.parameters()).device))
    layers = {name: base.get_submodule(name) for name in names}
    remove_hyplora(base)
    return layers


def train_stack(base, runs, task, say=print):
    """Train the runs side by side as train_minimal.train does one; returns a dictionary of scores for each."""
    device, steps = next(base.parameters()).device, runs[0].steps
    every = max(25, steps // 40)
    starts = [start(base, run, task) for run in runs]
    stacks, parents = [], []
    for name in starts[0]:
        stack = Stacked([layers[name] for layers in starts], runs[0].method.startswith("authors")).to(device)
        parent, _, key = name.rpartition(".")
        parents.append((base.get_submodule(parent), key, stack.base))
        setattr(*parents[-1][:2], stack)
        stacks.append(stack)
    weights, curves = [p for s in stacks for p in (s.lora_A, s.lora_B)], [s.curve for s in stacks]
    # One optimizer at rate 1; each run then takes of its step what its own rate says, as AdamW is linear in the rate.
    optimizer = torch.optim.AdamW([dict(params=weights), dict(params=curves, weight_decay=0.0)], 1.0, weight_decay=0.01)
    rates = torch.tensor([run.lr for run in runs], device=device)
    seeds = sorted({run.seed for run in runs})
    which = torch.tensor([seeds.index(run.seed) for run in runs], device=device)
    reached, begun = [None] * len(runs), time.perf_counter()

    def per_run(ids, labels):
        """(loss per token of the answer, all of the answer right) of each run on (runs, rows, T)."""
        logits = base(ids.flatten(0, 1)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=toy.IGNORE, reduction="none")
        right = ((logits.argmax(-1) == labels.flatten(0, 1)) | (labels.flatten(0, 1) == toy.IGNORE)).all(-1)
        return losses.view(len(ids), -1).sum(1) / (labels != toy.IGNORE).sum((1, 2)), right.view(len(ids), -1)

    @torch.no_grad()
    def score(data, chunk=64):
        parts = zip(*(t.to(device).split(chunk) for t in data))
        scores = [per_run(*(t.expand(len(runs), *t.shape) for t in part)) for part in parts]
        sizes = torch.tensor([right.shape[1] for _, right in scores], device=device) / len(data[0])
        loss = (torch.stack([loss for loss, _ in scores], 1) * sizes).sum(1)
        return loss.tolist(), (100 * torch.cat([right for _, right in scores], 1).float().mean(1)).tolist()

    for step in range(steps):
        ids, labels = (torch.stack(t).to(device)[which] for t in zip(*(task.batch(seed, step) for seed in seeds)))
        per_run(ids, labels)[0].sum().backward()
        rate = rates * toy.pace(step, steps, warmup=20)
        before = [p.detach().clone() for p in (*weights, *curves)]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, old in zip((*weights, *curves), before):
                part = torch.lerp(old, p, rate.view(-1, *[1] * (p.ndim - 1)))
                p.copy_(torch.where(p == old, old, part))  # (an infinite log K would become NaN)
        if (step + 1) % every == 0:
            for i, right in enumerate(score([t[:128] for t in task.data["validation"]])[1]):
                reached[i] = step + 1 if reached[i] is None and right >= 90 else reached[i]
            left = (time.perf_counter() - begun) / (step + 1) * (steps - step - 1)
            say(f"{task.name}: {len(runs)} runs, step {step + 1}/{steps}, {left:.0f} s left")
    results = [dict(asdict(run), reached=r) for run, r in zip(runs, reached)]
    for key in task.data:
        for result, loss, right in zip(results, *score(task.data[key])):
            result[f"{key} loss"], result[f"{key} %"] = loss, right
    for parent, key, linear in parents:
        setattr(parent, key, linear)
    return results


# --- a task: a frozen base, batches by seed and step, and data to score: (ids, labels) --------------


class Sums:
    """subtract or two-step, on train_minimal.py's base. The pairs that it holds out are halved for choice and test."""

    def __init__(self, name, device, out):
        self.name = name
        args = toy.parse_arguments(["--out", str(out)])
        self.base = toy.sums(args, device)[0]
        pairs = toy.operand_pairs(held_out=True)
        a, b = pairs.T.sort(dim=0).values  # (a, b) and (b, a) go to the same half
        half = torch.rand(100, 100, generator=torch.Generator().manual_seed(1))[a, b] < 0.5
        generator = torch.Generator().manual_seed(2)
        self.data = {
            "validation": toy.shifted(toy.render(name, pairs[half], generator)),
            "test": toy.shifted(toy.render(name, pairs[~half], generator)),
            "old": toy.shifted(toy.render("add", pairs[~half], generator)),
        }

    def batch(self, seed, step):
        return toy.sum_batches(self.name, 64, seed)(step)


# --- the protocol -----------------------------------------------------------------------------------


def finish(runs, done, path, task, stack):
    """Train those of the runs that are not done, in stacks; keep their results in done and in the file."""
    todo = [run for run in runs if str(run) not in done]
    for authors in (False, True):
        group = [run for run in todo if run.method.startswith("authors") == authors]
        for first in range(0, len(group), stack):
            part = group[first : first + stack]
            for run, result in zip(part, train_stack(task.base, part, task)):
                done[str(run)] = result
            write_beside(path, json.dumps(done))
    return [done[str(run)] for run in runs]


def interval(values):
    """Mean and half of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    width = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(width)


def rows_of(task, rank, best, results):
    """Markdown rows of one task and rank; results: {method: [one for each seed]}, LoRA first."""
    for method, runs in results.items():
        right, loss, old = (interval([r[k] for r in runs]) for k in ("test %", "test loss", "old %"))
        differences = [a["test %"] - b["test %"] for a, b in zip(runs, results["LoRA"])]
        paired = "-" if method == "LoRA" else "{:+.1f} ± {:.1f}".format(*interval(differences))
        steps = [r["reached"] for r in runs if r["reached"]]
        reached = f"{statistics.median(steps):.0f} ({len(steps)})" if steps else "never"
        yield (
            f"| {task}, {rank} | {method} | {best[rank, method]:.4g} | {loss[0]:.4f} ± {loss[1]:.4f} "
            f"| {right[0]:.1f} ± {right[1]:.1f} | {paired} | {reached} | {old[0]:.1f} ± {old[1]:.1f} |"
        )


HEAD = """| task, rank | method | rate | test loss | test % | % over LoRA, paired | steps to 90 % | old task % |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def study(name, args, device):
    """({(rank, method): learning rate}, {(rank, method): results over the seeds}) of one task."""
    path, steps, task = args.out / "study.json", args.steps or STEPS[name], Sums(name, device, args.out)
    done = json.loads(path.read_text()) if path.exists() else {}
    cases = [(rank, method) for rank in args.ranks for method in (METHODS if rank == args.all_at else MAIN)]
    sweep, best = {}, {}
    for rank, method in cases:
        rates = [lr * (AUTHORS_RATES if method.startswith("authors") else 1) for lr in args.rates or RATES[name]]
        sweep[rank, method] = {lr: [Run(name, method, rank, lr, seed, steps) for seed in SWEEP_SEEDS] for lr in rates}
    finish([run for rates in sweep.values() for runs in rates.values() for run in runs], done, path, task, args.stack)
    for case, rates in sweep.items():
        best[case] = min(rates, key=lambda lr: sum(done[str(run)]["validation loss"] for run in rates[lr]))
    tests = {(r, m): [Run(name, m, r, best[r, m], seed, steps) for seed in range(args.seeds)] for r, m in cases}
    finish([run for runs in tests.values() for run in runs], done, path, task, args.stack)
    return best, {case: [done[str(run)] for run in runs] for case, runs in tests.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    add("--ranks", nargs="+", type=int, default=[2, 4, 8])
    add("--all-at", type=int, default=4, help=f"rank at which all methods run; at others {', '.join(MAIN)}")
    add("--rates", nargs="+", type=float, help=f"instead of {RATES}")
    add("--seeds", type=int, default=10)
    add("--stack", type=int, default=256 if torch.cuda.is_available() else 4, help="runs trained side by side")
    add("--steps", type=int, help=f"instead of {STEPS}")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("runs"))
    add("--dry-run", action="store_true", help="print the tables and leave RESULTS.md as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(exist_ok=True)
    for name in args.tasks:
        best, results = study(name, args, device)
        lines = [HEAD]
        for rank in args.ranks:
            lines += rows_of(name, rank, best, {m: runs for (r, m), runs in results.items() if r == rank})
        head = (
            f"{datetime.date.today()}, torch {torch.__version__}, {args.steps or STEPS[name]} steps. Learning rates: "
            f"{', '.join(f'{lr:g}' for lr in args.rates or RATES[name])} (authors' arithmetic: {AUTHORS_RATES} times "
            f"these), by the validation loss of two seeds; then {args.seeds} seeds, mean ± 95 % interval. Steps to "
            "90 %: median of the seeds that got there (how many). `python -m benchmarks.study`"
        )
        print(f"\n{head}\n\n" + "\n".join(lines), flush=True)
        if not args.dry_run:
            title = f"Study, {name}: {machine(device.type, torch.get_num_threads())}"
            write_section(Path(__file__).parent / "RESULTS.md", title, f"{head}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
