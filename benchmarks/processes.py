"""Tokens per second and memory of training with many processes, the base replicated.

What is measured is scaling/: its decoder and its training loop, on random weights and random
tokens. A table has our LoRA and HypLoRA (rank 32, on q, k, v, up and down) with one process, then
with all that torchrun has started. Each of them takes as many tokens as the one did. The table is
written into RESULTS.md anew after each row.

    torchrun --nproc-per-node 2 -m benchmarks.processes --shape 7b
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.processes --shape toy --dry-run
"""

import argparse
import gc
import math
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist

from benchmarks.report import machine, reason, stamp, write_section
from hyplora import calibrate_curvature, hyplora_parameters, inject_hyplora, remove_hyplora
from scaling.checkpoint import DEFAULTS, build_config, empty_decoder
from scaling.decoder import Decoder
from scaling.processes import (
    end_processes,
    is_main,
    leave,
    rank_and_count,
    same_start,
    say,
    start_processes,
)
from scaling.training import Plan, train

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK = 32
ADAPTERS = {"our LoRA": math.inf, "HypLoRA": 0.5}
WARM_UP = 3  # steps that do not count
LAYOUTS = ("one", "replicated")

# The family and the fields of config.json: a small one, and Qwen2.5 7B.
SHAPES = {
    "toy": (
        "llama",
        dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=256,
        ),
    ),
    "7b": (
        "qwen2",
        dict(
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocab_size=152064,
            rope_theta=1e6,
        ),
    ),
}
STEP = {"toy": (4, 32), "7b": (2, 1024)}  # (rows, tokens) a process


class RandomBatches:
    """Random tokens: batches(step) -> ids and labels (rows, length), the same on every process.

    scaling's loop asks for a batch when a step begins, and `began` has these times.
    """

    def __init__(self, vocabulary, rows, length, device):
        self.vocabulary = vocabulary
        self.size = (rows, length + 1)
        self.device = device
        self.began = []

    def __call__(self, step):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.began.append(time.perf_counter())
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.vocabulary, self.size, generator=generator)
        return ids[:, :-1], ids[:, 1:]

    def seconds_a_step(self):
        durations = [end - start for start, end in zip(self.began, self.began[1:])]
        return statistics.median(durations[WARM_UP:])


@torch.no_grad()
def random_base(config, dtype, device):
    """A frozen Decoder with random weights."""
    model = empty_decoder(config, dtype, device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.02)
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            parameter.fill_(1 - config.norm_offset)  # The weight of an RMSNorm.
    return model


def free(device):
    """Give back what is not used any more, and count the peak of memory from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def largest(values, device):
    """The largest that any process has of each value."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def measure(base, curvature, size, steps, device):
    """(tokens/s of all processes together, peak GiB of a GPU, peak GiB of a process in the host).

    Peaks are those of the process that has the highest. The GPU's counts from the last free(), and
    the host's from the start of the process.
    """
    rows, length = size
    rows *= rank_and_count()[1]
    batches = RandomBatches(base.config.vocab_size, rows, length, device)
    torch.manual_seed(0)
    inject_hyplora(base, TARGETS, rank=RANK, alpha=2 * RANK, curvature=curvature)
    if curvature < math.inf:
        calibrate_curvature(base, batches(0)[0][:1].to(device))
        batches.began.clear()
    groups = hyplora_parameters(base)
    for group in groups:
        same_start(group["params"])
    plan = Plan(steps=WARM_UP + steps + 1, lr=1e-5, warmup=1, seed=0)
    gpu = peak(device)
    with tempfile.TemporaryDirectory() as folder:
        train(base, groups, batches, plan, "random tokens", os.path.join(folder, "state.pt"))
    gpu = max(gpu, peak(device))  # train() has counted anew.
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB.
    gpu, host = largest([gpu, host], device)
    remove_hyplora(base)
    return rows * length / batches.seconds_a_step(), gpu / 2**30, host / 2**30


class Table:
    """The rows so far; the main process prints them, and writes them into RESULTS.md."""

    def __init__(self, title, command, notes, dry_run):
        self.title = title
        self.command = command
        self.notes = notes
        self.dry_run = dry_run
        self.alone = {}
        self.lines = [
            "| | base | processes | tokens/s | over one process | of linear "
            "| GiB of each GPU | GiB of a process in the host |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]

    def add(self, name, layout, processes, result):
        """result: what measure returned, or the text that says why there is nothing."""
        head = f"| {name} | {'whole' if layout == 'one' else layout} | {processes}"
        if isinstance(result, str):
            self.lines.append(f"{head} | {result} | | | | |")
        else:
            speed, gpu, host = result
            if layout == "one":
                self.alone[name] = speed
            times = "| | |"
            if name in self.alone:
                ratio = speed / self.alone[name]
                times = f"| {ratio:.2f} | {ratio / processes:.2f} |"
            memory = f"{gpu:.2f}" if gpu else ""
            self.lines.append(f"{head} | {speed:,.0f} {times} {memory} | {host:.2f} |")
        say(self.lines[-1])
        if not self.dry_run:
            lines = "\n".join(self.lines)
            write_section(self.title, f"{stamp(self.command)}\n\n{self.notes}\n\n{lines}")


def fill(table, layout, config, dtype, device, args):
    """The rows of one layout. An error is a row; it ends the run if other processes wait for us."""
    processes = rank_and_count()[1]
    name = "all"
    free(device)
    try:
        base = random_base(config, dtype, device)
        for name, curvature in ADAPTERS.items():
            result = measure(base, curvature, STEP[args.shape], args.steps, device)
            free(device)
            if is_main():
                table.add(name, layout, processes, result)
    except Exception as error:
        say(reason(error))
        if is_main():
            table.add(name, layout, processes, reason(error))
        if processes > 1:
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="these rows alone")
    parser.add_argument("--blocks", type=int, help="fewer than the shape has, for fewer GPUs")
    parser.add_argument("--steps", type=int, default=10, help="that count")
    parser.add_argument("--dry-run", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        sys.exit("start this with: torchrun --nproc-per-node 2 -m benchmarks.processes ...")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layouts = args.layouts or LAYOUTS

    family, fields = SHAPES[args.shape]
    fields = DEFAULTS[family] | fields
    if args.blocks is not None:
        fields["num_hidden_layers"] = args.blocks
    config = build_config(family, fields)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in Decoder(config).parameters())
    processes = int(os.environ["WORLD_SIZE"])
    rows, length = STEP[args.shape]
    table = Table(
        f"{args.shape}, {fields['num_hidden_layers']} blocks, {rows} x {length} tokens a process, "
        f"up to {processes} processes: {machine(device.type)}",
        f"torchrun --nproc-per-node {processes} -m benchmarks.processes {shlex.join(sys.argv[1:])}",
        f"The base has {numbers / 1e9:.2f} billion numbers, {numbers * dtype.itemsize / 2**30:.1f} "
        f"GiB in {str(dtype).removeprefix('torch.')}.",
        args.dry_run,
    )
    if "one" in layouts and os.environ["RANK"] == "0":
        fill(table, "one", config, dtype, device, args)  # The others wait for it to join them.
    start_processes(device.type)
    if "replicated" in layouts:
        fill(table, "replicated", config, dtype, device, args)
    end_processes()


if __name__ == "__main__":
    main()
    leave()
