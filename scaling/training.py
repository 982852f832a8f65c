"""Training over one process or many: accumulation, validation, saving, resuming, signals.

All that a step does depends on the step's number and on what the state file keeps, so that a run
that was stopped and resumed ends, bit for bit, where an uninterrupted one does.
"""

import os
import pickle
import signal
import sys
import tempfile
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hyplora import hyplora_state_dict, hyplora_statistics, set_hyplora_state_dict
from scaling.processes import (
    Progress,
    is_main,
    rank_and_count,
    say,
    sum_over_processes,
)
from scaling.records import IGNORE, seeded


@dataclass
class Plan:
    """How one adapter is trained."""

    steps: int
    lr: float  # the peak, after the warm-up
    warmup: int  # steps
    seed: int
    weight_decay: float = 0.01
    clip_norm: float | None = None  # longest gradient of all adapters together
    accumulate: int = 1  # parts in which a batch is computed, to save memory
    save_every: int = 0  # steps; 0 saves at the end alone
    validate_every: int = 0  # steps; 0 keeps the last adapters instead of the best


def learning_rate(plan, step):
    """A linear warm-up, then a linear decay to zero."""
    rising = (step + 1) / plan.warmup
    falling = (plan.steps - step) / max(1, plan.steps - plan.warmup)
    return plan.lr * min(rising, falling, 1)


def summed_loss(model, ids, labels):
    """Sum of the cross entropies over the labels: ids and labels (batch, T) -> a 0-d tensor."""
    logits = model(ids).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def split_rows(ids, labels, parts):
    """A batch in `parts` parts of the same number of rows; rows without a label fill it up."""
    missing = -len(ids) % parts
    ids = F.pad(ids, (0, 0, 0, missing))
    labels = F.pad(labels, (0, 0, 0, missing), value=IGNORE)
    return [(ids[part::parts], labels[part::parts]) for part in range(parts)]


@torch.no_grad()
def mean_loss(model, batches, device):
    """The loss per label of one epoch of batches, which the processes share; a float."""
    was_training = model.training
    model.eval()
    rank, processes = rank_and_count()
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(batches.steps_per_epoch):
        ids, labels = split_rows(*batches(step), processes)[rank]
        loss = summed_loss(model, ids.to(device), labels.to(device))
        total += torch.tensor([loss.item(), (labels != IGNORE).sum().item()])
    model.train(was_training)
    total = sum_over_processes(total.float().to(device))
    return (total[0] / total[1]).item()


def gradients(model, parameters, batch, accumulate, stop):
    """Set each p.grad to that of the mean loss over the batch's labels.

    Each process takes its share of the rows, in `accumulate` parts, and all get the sum.
    stop: whether this process has heard a signal. Returns (the loss, whether any has).
    """
    ids, labels = batch
    device = parameters[0].device
    rank, processes = rank_and_count()
    count = (labels != IGNORE).sum().item()
    total = torch.zeros((), device=device)
    for part_ids, part_labels in split_rows(ids, labels, processes * accumulate)[rank::processes]:
        loss = summed_loss(model, part_ids.to(device), part_labels.to(device)) / count
        loss.backward()
        total = total + loss.detach()
    if processes > 1:
        # One message for the loss, the gradients and whether to stop: all stop after the same step.
        stopped = torch.tensor(float(stop), device=device)
        shared = [total, stopped, *(parameter.grad for parameter in parameters)]
        vector = sum_over_processes(parameters_to_vector(shared))
        vector_to_parameters(vector, shared)
        stop = stopped.item() > 0
    return total, stop


def seed_dropout(plan, step):
    """Seed what is random in a step: each process drops other elements of its own rows."""
    rank = rank_and_count()[0]
    torch.manual_seed(seeded(plan.seed, step, "dropout", rank).initial_seed())


class Interrupts:
    """While this context lasts, Ctrl-C and SIGTERM only set `heard`, to be read after a step.

    A second Ctrl-C acts at once, as it would without this. A second SIGTERM does not: a scheduler
    sends one to every process, and torchrun sends another to each of its own.
    """

    def __init__(self):
        self.heard = False
        self.handlers = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.hear)
        return self

    def hear(self, number, frame):
        self.heard = True
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def check_finite(loss, parameters, where, state_path):
    """End the run before anything broken is saved."""
    if not loss.isfinite():
        problem = f"the loss is {loss.item()}"
    elif not all(parameter.isfinite().all() for parameter in parameters):
        problem = "the weights are not finite"
    else:
        return
    kept = f" {state_path} has the last good state." if os.path.exists(state_path) else ""
    sys.exit(f"\n{where}: {problem}: lower --lr, or look at the data.{kept}")


def write_state(path, state):
    """Save the state whole. A full disk ends the run and leaves the last state as it was."""
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            whole = os.path.join(folder, "state.pt")
            torch.save(state, whole)
            os.replace(whole, path)
    except OSError as error:
        sys.exit(
            f"\ncould not write {path}: {error}. What was saved there last is whole; "
            "--resume goes on from it"
        )


def read_state(path):
    """The state that write_state saved, or None."""
    if not os.path.exists(path):
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        sys.exit(f"{path} is damaged, so that nothing can go on from it: {error}")


class Best:
    """The adapters with the lowest validation loss so far."""

    def __init__(self, validation):
        self.validation = validation  # Batches, or None to keep the last adapters
        self.loss = None
        self.step = 0
        self.adapters = None

    def consider(self, model, step, device):
        loss = mean_loss(model, self.validation, device)
        say(f"step {step}: validation loss {loss:.4f}")
        if self.loss is None or loss < self.loss:
            self.loss = loss
            self.step = step
            copies = {
                name: t.detach().cpu().clone() for name, t in hyplora_state_dict(model).items()
            }
            self.adapters = copies

    def state(self):
        return {"loss": self.loss, "step": self.step, "adapters": self.adapters}

    def restore(self, saved):
        self.loss = saved["loss"]
        self.step = saved["step"]
        self.adapters = saved["adapters"]


def train(
    model, groups, batches, plan, label, state_path, state=None, data_hash="", validation=None
):
    """Train the adapters with AdamW. Returns the seconds that it took, earlier runs included.

    groups: hyplora_parameters(model). batches: Batches. The adapters, the optimizer and the step
    are written to state_path every plan.save_every steps, at the end, and after a signal; `state`
    is what read_state returned, to go on from there. data_hash is kept with it. With validation, a
    Batches, the adapters with the lowest loss on it are the ones that the model has at the end.
    """
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, weight_decay=plan.weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    best = Best(validation)
    first = 0
    seconds = 0.0
    if state is not None:
        set_hyplora_state_dict(model, state["adapters"])
        optimizer.load_state_dict(state["optimizer"])
        best.restore(state["best"])
        first = state["step"]
        seconds = state["seconds"]
        say(f"{label}: going on from step {first} of {state_path}")
    progress = Progress(label, plan.steps, seconds)
    tokens = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.train()
    with Interrupts() as interrupts:
        for step in range(first, plan.steps):
            seed_dropout(plan, step)
            batch = batches(step)
            loss, stop = gradients(model, parameters, batch, plan.accumulate, interrupts.heard)
            tokens += batch[0].numel()
            if plan.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            progress(done, loss)
            last = done == plan.steps
            saves = stop or last or (plan.save_every > 0 and done % plan.save_every == 0)
            if saves or step % 50 == 0:
                check_finite(loss, parameters, f"{label}, step {done}", state_path)
            if validation is not None and (last or done % plan.validate_every == 0):
                best.consider(model, done, device)
            if saves and is_main():
                state = {
                    "adapters": hyplora_state_dict(model),
                    "optimizer": optimizer.state_dict(),
                    "best": best.state(),
                    "step": done,
                    "seconds": progress.seconds(),
                    "data": data_hash,
                }
                write_state(state_path, state)
            if stop:
                say(
                    f"\n{label}: stopped at step {done}, saved to {state_path}; "
                    "the same command with --resume goes on"
                )
                sys.exit(130)
    if best.adapters is not None:
        set_hyplora_state_dict(model, best.adapters)
        say(f"{label}: the adapters of step {best.step} have the lowest validation loss")
    if device.type == "cuda" and first < plan.steps:
        speed = tokens / (progress.seconds() - seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30
        say(f"{label}: {speed:.0f} tokens/s, at most {peak:.1f} GB on this GPU")
    return progress.seconds()


def adapter_effect(model, ids):
    """What the HypLoRA adapters do to these tokens, as a Markdown table with a row a kind of layer.

    ids: (batch, T), without padding. The radius is a token's length in units of sqrt K; the gain is
    |BAx| / |x|; phi is |update| / |BAx|, which is 1 for LoRA. The spread is phi's standard
    deviation over the tokens of a layer, over its mean: near 0, the adapter is a LoRA with another
    alpha. Returns "" for a model whose adapters are all LoRA.
    """
    kinds = {}
    for name, numbers in hyplora_statistics(model, ids, last_only=True).items():
        if numbers["radius"] > 0:
            kinds.setdefault(name.split(".")[-1], []).append(numbers)
    lines = ["| input of | radius | gain | phi | its spread within a layer |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for kind, layers in kinds.items():
        radius = mean(numbers["radius"] for numbers in layers)
        gain = mean(numbers["gain"] for numbers in layers)
        phi = mean(numbers["phi"] for numbers in layers)
        spread = mean(100 * numbers["phi_spread"] / numbers["phi"] for numbers in layers)
        lines.append(f"| {kind} | {radius:.2f} | {gain:.3f} | {phi:.3f} | {spread:.1f} % |")
    return "\n".join(lines) if kinds else ""
