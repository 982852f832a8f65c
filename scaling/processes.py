"""What the processes of one run agree on: who speaks, where they start, and what they sum.

With one process, everything here is what it would be without this file.
"""

import importlib
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist


def rank_and_count():
    """(this process's number, how many there are)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main():
    return rank_and_count()[0] == 0


def say(text):
    """Print from the main process alone."""
    if is_main():
        print(text, flush=True)


def start_processes(device_type):
    """Join the processes that torchrun started, if it did. device_type: "cpu", "cuda" or "mps"."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" means this GPU from here on.
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if not is_main():
        warnings.simplefilter("ignore")  # The main process warns for all, as it speaks for all.


def end_processes():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave():
    """End a process of torchrun; gloo's threads at times abort one that ends by itself."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def sum_over_processes(tensor):
    """Replace the tensor by its sum over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def same_start(parameters):
    """Give every process the main one's values, whatever random numbers each machine draws."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)


def need(module, purpose):
    """Import an optional package, or end with the line that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        sys.exit(f"{purpose} needs the package {package}: pip install {package}")


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every tenth of the way."""

    def __init__(self, label, total, seconds=0.0):
        """seconds: what an earlier run has spent on this already."""
        self.label = label
        self.total = total
        self.start = time.perf_counter() - seconds

    def seconds(self):
        return time.perf_counter() - self.start

    def __call__(self, done, what=""):
        """done: how many of the total. what: text, or the loss as a tensor (read when printed)."""
        last = done == self.total
        live = sys.stdout.isatty()
        interval = 10 if live else max(1, self.total // 10)
        if not is_main() or (not last and done % interval != 0):
            return
        if torch.is_tensor(what):
            what = f"loss {what.item():.4f}"
        left = self.seconds() * (self.total - done) / done
        line = f"{self.label:<22} {done}/{self.total}  {what}  {left:3.0f} s left"
        if live:
            print(f"\r{line:<78}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)
