"""Kill a training run at random moments, resume it each time, compare with an uninterrupted run.

The run is scaling/finetune on a small random checkpoint; its adapters have to come out equal, bit
for bit.

python -m benchmarks.kill_and_resume                  # 20 kills (SIGKILL)
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.small_checkpoint import write_small_checkpoint, write_sums

ROOT = Path(__file__).parent.parent
OPTIONS = "--batch-size 8 --adapter hyplora --dropout 0.1 --save-every 5 --device cpu"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
BEGUN = "training: "  # The line that a run prints once all is read and loaded.


def prepare(folder):
    """Write the checkpoint and the data into a folder."""
    write_small_checkpoint(Path(folder, "model"))
    write_sums(Path(folder, "sums.json"))


def command(folder, out, steps, *more, processes=1):
    """The command line of a run on what prepare(folder) wrote."""
    program = [sys.executable, "-W", "ignore"]
    if processes > 1:
        program += [*TORCHRUN, str(processes)]
    arguments = [
        "--checkpoint",
        str(Path(folder, "model")),
        "--data",
        str(Path(folder, "sums.json")),
    ]
    arguments += [*OPTIONS.split(), "--steps", str(steps), "--out", str(out), *more]
    return [*program, "-m", "scaling.finetune", *arguments]


def run(arguments):
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def adapters(out):
    return torch.load(next(Path(out).glob("sums-*.pt")), weights_only=True)["tensors"]


def saved_step(out):
    """The step of the state on disk, and None if there is no state yet."""
    for path in Path(out).glob("state-*.pt"):
        return torch.load(path, weights_only=True)["step"]
    return None


def kill_and_resume(steps, kills, seed, say=print):
    """(kills that hit a running process, whether the adapters are equal bit for bit)."""
    rng = random.Random(seed)
    hits = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        straight = Path(folder, "straight")
        killed = Path(folder, "killed")
        run(command(folder, straight, steps))
        state = torch.load(next(straight.glob("state-*.pt")), weights_only=True)
        while hits < kills:
            # Before the first save there is nothing to resume, and --resume would say so.
            more = [] if saved_step(killed) is None else ["--resume"]
            process = subprocess.Popen(
                command(folder, killed, steps, *more), stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            for line in process.stdout:
                if line.startswith(BEGUN):
                    break
            try:
                process.communicate(timeout=rng.uniform(0, 1.2 * state["seconds"] / kills))
                say("a run ended before its kill")
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                hits += 1
                say(f"kill {hits}: the state on disk is of step {saved_step(killed)}", flush=True)
        more = [] if saved_step(killed) is None else ["--resume"]
        run(command(folder, killed, steps, *more))
        one = adapters(straight)
        two = adapters(killed)
        equal = one.keys() == two.keys()
        for name in one:
            equal = equal and torch.equal(one[name], two[name])
        return hits, equal


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hits, equal = kill_and_resume(args.steps, args.kills, args.seed)
    verdict = f"adapters equal to the uninterrupted run's, bit for bit: {equal}"
    print(f"\n{hits} kills in {args.steps} steps; {verdict}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
