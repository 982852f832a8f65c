"""Tokens per second and peak memory of a whole training step, LoRA beside HypLoRA, on a frozen GPT with random weights.

python -m benchmarks.train_step                # Qwen2.5-7B's shape on a GPU, a small one on a CPU
"""

import argparse
import datetime
import gc
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed import machine, write_section
from hyplora import hyplora_parameters, inject_hyplora, remove_hyplora
from train_minimal import GPT, Config

SHAPES = {
    "7b": Config(152064, 3584, 18944, 28, 28, 4),  # Qwen2.5-7B
    "small": Config(4096, 512, 1408, 8, 8, 2),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="7b" if device == "cuda" else "small")
    add("--batch", type=int, default=16 if device == "cuda" else 2, help="sequences per step")
    add("--length", type=int, default=256, help="tokens per sequence (the paper's cutoff)")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=3, help="steps per round")
    add("--compile", action="store_true")
    add("--dry-run", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = GPT(SHAPES[args.shape])
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(SHAPES[args.shape].vocab_size, (args.batch, args.length + 1), device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def loss_of(model, ids):
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    times, peaks, counts = {}, {}, {}
    for _ in range(args.rounds):
        for name, curvature in (("LoRA", math.inf), ("HypLoRA", 0.5)):
            inject_hyplora(model, TARGETS, rank=32, alpha=64, curvature=curvature)
            parameters = hyplora_parameters(model)
            counts[name] = sum(p.numel() for g in parameters for p in g["params"])
            optimizer = torch.optim.AdamW(parameters, lr=3e-4)
            run = torch.compile(loss_of, dynamic=False) if args.compile else loss_of

            def step(run=run, optimizer=optimizer):
                optimizer.zero_grad()
                run(model, ids).backward()
                optimizer.step()

            step(), step()
            wait()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            wait()
            times.setdefault(name, []).append((time.perf_counter() - start) / args.steps)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            remove_hyplora(model)
            del optimizer, parameters, run, step
            torch._dynamo.reset()
            gc.collect()
    tokens = args.batch * args.length
    lines = ["| | trainable | tokens/s | time to LoRA's | peak GB |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["LoRA"]))
        peak = f"{peaks[name]:.1f}" if peaks else "-"
        speed = tokens / statistics.median(seconds)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
        lines.append(f"| {name} | {counts[name]:,} | {speed:.0f} | {spread} | {peak} |")
    mode = "compiled" if args.compile else "eager"
    what = f"{args.shape}, {args.batch} x {args.length} tokens, {str(dtype)[6:]}, {mode}"
    head = (
        f"{datetime.date.today()}, torch {torch.__version__}, random weights, rank 32 on {' '.join(TARGETS)}, AdamW, "
    )
    head += f"{args.rounds} rounds of {args.steps} steps, median (range). `python -m benchmarks.train_step`"
    print(what + "\n\n" + "\n".join(lines))
    if not args.dry_run:
        title = f"Training step, {what}: {machine(device, torch.get_num_threads())}"
        write_section(Path(__file__).parent / "RESULTS.md", title, head + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
