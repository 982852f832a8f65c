"""Kill a training run at random moments, resume it each time, and compare its adapters with an uninterrupted run's.

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

ROOT = Path(__file__).parent.parent
SMALL = "--width 32 --layers 2 --base-steps 30 --batch-size 32 --adapter hyplora --dropout 0.1 --save-every 5".split()


def command(out, steps, *more):
    arguments = [*SMALL, "--steps", str(steps), "--out", str(out), *more]
    return [sys.executable, "-W", "ignore", str(ROOT / "train_minimal.py"), *arguments]


def adapters(out):
    return torch.load(next(Path(out).glob("subtract-*.pt")), weights_only=True)["tensors"]


def kill_and_resume(steps, kills, seed, say=print):
    """(kills that hit a running process, whether the adapters are equal bit for bit)."""
    rng, hits = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        subprocess.run(command(straight, steps), check=True, stdout=subprocess.DEVNULL)
        seconds = torch.load(next(straight.glob("state-*.pt")), weights_only=True)["seconds"]
        killed.mkdir()
        for base in straight.glob("base-*.pt"):  # the kills are for the adapter's training
            (killed / base.name).write_bytes(base.read_bytes())
        while hits < kills:
            process = subprocess.Popen(command(killed, steps, "--resume"), stdout=subprocess.PIPE, text=True)
            for line in process.stdout:  # until its training has begun
                if line.startswith("base: "):
                    break
            try:
                process.communicate(timeout=rng.uniform(0, 1.6 * seconds / kills))
                say("a run ended before its kill")
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                hits += 1
                states = [torch.load(s, weights_only=True)["step"] for s in killed.glob("state-*.pt")]
                say(f"kill {hits}: the state on disk is of step {states[0] if states else 'none'}", flush=True)
        subprocess.run(command(killed, steps, "--resume"), check=True, stdout=subprocess.DEVNULL)
        one, two = adapters(straight), adapters(killed)
        return hits, all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hits, equal = kill_and_resume(args.steps, args.kills, args.seed)
    print(f"\n{hits} kills in {args.steps} steps; adapters equal to the uninterrupted run's, bit for bit: {equal}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
