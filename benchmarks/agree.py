"""Do several processes train the adapters that one trains? And go on after SIGTERM?

Runs scaling/finetune on a small random checkpoint in float32. First, ten steps with one process and
with several, the base replicated and sharded: how far apart are the adapters and the losses? Then,
a longer run of several processes is stopped with SIGTERM and goes on, with as many processes and
with fewer: how far are its adapters from those of a run that was never stopped? Each row is written
into RESULTS.md as soon as it is there.

    OMP_NUM_THREADS=1 python -m benchmarks.agree --processes 1 2 4 8 --device cpu      # with gloo
    python -m benchmarks.agree --processes 1 2                          # with NCCL on two GPUs

pip install safetensors tokenizers
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.kill_and_resume import ROOT, adapters, command, prepare
from benchmarks.report import machine, stamp, write_section

STEPS = 10
LONG = 200
TOLERANCE = 1e-4  # of a tensor's norm, and of a loss, after ten steps
# Twelve records are no multiple of eight: some processes have less to do than others.
OPTIONS = "--dropout 0 --batch-size 12 --adapter hyplora --save-every 1000 --dtype float32".split()


class Runs:
    """Runs of scaling.finetune in one folder, which has a checkpoint and records."""

    def __init__(self, folder, device):
        self.folder = Path(folder)
        self.device = device

    def start(self, out, count, shard, steps, *more):
        options = [*OPTIONS, "--device", self.device, *more]
        if shard and count > 1:
            options.append("--shard")
        arguments = command(self.folder, self.folder / out, steps, *options, processes=count)
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(self, out, count, shard, steps, *more):
        """Run to the end: ({name: tensor} of the adapters, the losses that it printed)."""
        process = self.start(out, count, shard, steps, *more)
        text, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{out} failed:\n{text[-500:]}\n{errors[-2000:]}")
        losses = []
        for line in text.splitlines():
            if line.startswith("HypLoRA 0.5, seed") and "loss " in line:
                losses.append(float(line.split("loss ")[1].split()[0]))
        return adapters(self.folder / out), losses

    def stop(self, out, count, shard, steps):
        """Send SIGTERM at a tenth of the steps or soon after. Returns the step of the state."""
        process = self.start(out, count, shard, steps)
        for line in process.stdout:
            if line.startswith("HypLoRA") and f"/{steps}" in line:
                process.send_signal(signal.SIGTERM)
                break
        text, errors = process.communicate()
        if "the same command with --resume goes on" not in text:
            raise RuntimeError(f"{out} did not stop as it should:\n{text[-500:]}\n{errors[-2000:]}")
        (state,) = (self.folder / out).glob("state-*.pt")
        return torch.load(state, weights_only=True)["step"]


def difference(found, wanted):
    """The largest over tensors of |found - wanted| / |wanted|; infinite if names differ."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, tensor in wanted.items():
        gap = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        worst = max(worst, gap.item())
    return worst


def loss_difference(found, wanted):
    if len(found) != len(wanted):
        return float("inf")
    return max(abs(a - b) / b for a, b in zip(found, wanted))


def cases(counts):
    """(number of processes, whether the base is sharded), without one process alone."""
    return [(count, shard) for count in counts if count > 1 for shard in (False, True)]


def name_of(shard):
    return "sharded" if shard else "replicated"


def agreement(runs, counts, pool, table):
    """Rows of what several processes do beside one. Returns whether all are within TOLERANCE."""
    one = pool.submit(runs.run, "one", 1, False, STEPS)
    others = {}
    for count, shard in cases(counts):
        out = f"{count}-{name_of(shard)}"
        others[count, shard] = pool.submit(runs.run, out, count, shard, STEPS)
    tensors, losses = one.result()
    good = len(losses) == STEPS
    for (count, shard), future in others.items():
        found, found_losses = future.result()
        apart = difference(found, tensors)
        losses_apart = loss_difference(found_losses, losses)
        good = good and max(apart, losses_apart) < TOLERANCE
        table.add(f"| {count} | {name_of(shard)} | {apart:.1e} | {losses_apart:.1e} |")
    return good


def stop_and_resume(runs, count, shard, fewer):
    """Rows of one run that is stopped. Returns (rows, whether all went well)."""
    out = f"straight-{count}-{name_of(shard)}"
    straight, _ = runs.run(out, count, shard, LONG)
    stopped = runs.folder / out.replace("straight", "stopped")
    step = runs.stop(stopped.name, count, shard, LONG)
    rows = []
    good = 0 < step < LONG
    for number in (count, fewer):
        copy = runs.folder / f"{stopped.name}-on-{number}"
        shutil.copytree(stopped, copy)
        resumed, _ = runs.run(copy.name, number, shard, LONG, "--resume")
        apart = difference(resumed, straight)
        same = all(torch.equal(resumed[name], straight[name]) for name in straight)
        good = good and apart < TOLERANCE
        if runs.device == "cpu" and number == count:  # A GPU may add in another order each time.
            good = good and same
        words = "equal, bit for bit" if same else f"{apart:.1e}"
        rows.append(f"| {count} | {name_of(shard)} | {step} of {LONG} | {number} | {words} |")
    return rows, good


def resumption(runs, counts, pool, table):
    """Rows of runs that are stopped with SIGTERM. Returns whether all went well."""
    futures = []
    for count, shard in cases(counts):
        fewer = max([number for number in counts if number < count], default=1)
        futures.append(pool.submit(stop_and_resume, runs, count, shard, fewer))
    good = True
    for future in futures:
        rows, went_well = future.result()
        good = good and went_well
        for row in rows:
            table.add(row)
    return good


class Table:
    """The rows so far, printed and written into RESULTS.md."""

    def __init__(self, title, args, *head):
        self.title = title
        self.args = args
        self.lines = list(head)

    def add(self, row):
        print(row, flush=True)
        self.lines.append(row)
        if not self.args.dry_run:
            command = f"python -m benchmarks.agree {shlex.join(sys.argv[1:])}"
            write_section(self.title, f"{stamp(command)}\n\n" + "\n".join(self.lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dry-run", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = sorted(args.processes)
    where = machine(device)
    agreed = Table(
        f"Adapters of several processes beside those of one: {where}",
        args,
        f"The largest difference after {STEPS} steps, relative to a tensor's norm and to the loss "
        f"(printed with four decimals); the tests allow {TOLERANCE:.0e} for the adapters.\n",
        "| processes | base | adapters | losses |",
        "| ---: | --- | ---: | ---: |",
    )
    resumed = Table(
        f"Stopped with SIGTERM, and gone on: {where}",
        args,
        "The largest difference to the adapters of a run that was never stopped, relative to a "
        "tensor's norm.\n",
        "| processes | base | stopped at step | goes on with | adapters |",
        "| ---: | --- | ---: | ---: | ---: |",
    )
    # Small runs wait more than they compute, so that several share a machine, if it has the cores.
    at_once = max(1, os.cpu_count() // (2 * counts[-1]))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        prepare(folder)
        runs = Runs(folder, device)
        good = agreement(runs, counts, pool, agreed)
        good = resumption(runs, counts, pool, resumed) and good
    print("all is as it should be" if good else "something differs by more than it should")
    sys.exit(not good)


if __name__ == "__main__":
    main()
