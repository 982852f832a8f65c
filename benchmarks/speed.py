"""What an adapter costs: time and memory of LoRA, HypLoRA and their relatives, side by side.

Two questions, each as forward + backward and as forward alone, eager and compiled:
- the adapter by itself: its base gives its input back (or, between widths, a ready tensor), so that the frozen product
  does not drown it; ratios are to LoRA written by hand, x + s * linear(linear(x, A), B);
- the layer as it is used, around a real frozen linear; ratios are to that linear alone.

Contenders take turns within a round, and a ratio is the median of the rounds' ratios, as machines drift. PEFT is
measured if it is installed. The tables go into benchmarks/RESULTS.md, one section per machine; a run replaces its own.

    python -m benchmarks.speed                       # what fits this machine: CPU, or CUDA if there is one
    python -m benchmarks.speed --tokens 512 --shapes 3584x3584 --threads 2 --dry-run
"""

import argparse
import copy
import datetime
import gc
import itertools
import math
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.authors import authors_update
from hyplora import HypLoRALinear, hyplora_reference, hyplora_update

QWEN = "3584x3584 3584x512 3584x18944 18944x3584".split()
LLAMA = "4096x4096 4096x14336".split()
TOY = "64x64"
RANK = {"64x64": 8}


class Given(nn.Module):
    """A base that costs nothing: its input where the widths agree, else a tensor made beforehand."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features, self.ready = in_features, out_features, {}

    def forward(self, x):
        if self.in_features == self.out_features:
            return x
        if x.shape[0] not in self.ready:
            self.ready[x.shape[0]] = torch.zeros(x.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        return self.ready[x.shape[0]]


class Adapter(nn.Module):
    """base(x) + s * update(x), for the updates that are written out here."""

    def __init__(self, base, in_features, out_features, rank, update):
        super().__init__()
        self.base, self.update, self.scaling = base, update, 2.0
        self.lora_A = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, rank) * 0.1)
        self.k = nn.Parameter(torch.tensor([0.5]))
        self.width_scale = nn.Parameter(torch.tensor([math.sqrt(in_features)]))

    def forward(self, x):
        return self.base(x) + self.scaling * self.update(self, x)


def lora_by_hand(m, x):
    return F.linear(F.linear(x, m.lora_A.to(x.dtype)), m.lora_B.to(x.dtype))


def literal(m, x):
    in_features = m.lora_A.shape[1]
    return hyplora_reference(x, m.lora_A.to(x.dtype), m.lora_B.to(x.dtype), m.k.to(x.dtype) * in_features)


def closed_form(m, x):
    return hyplora_update(x, m.lora_A, m.lora_B, m.k * m.lora_A.shape[1])


def authors(m, x):
    return authors_update(x.float(), m.lora_A, m.lora_B, m.k, m.width_scale).to(x.dtype)


def peft_layer(linear, given, rank, dora):
    """PEFT's own layer, with its float32 adapter as PEFT makes it; given replaces the frozen linear underneath."""
    import peft

    holder = nn.ModuleDict({"layer": linear})
    holder.config = {"model_type": "custom"}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], use_dora=dora)
    layer = peft.LoraModel(holder, config, "default").model["layer"]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    if given is not None:
        layer.base_layer = given
    return layer


def contenders(shape, dtype, device, alone, skip=()):
    """{name: layer} on one frozen linear; with alone, on a base that costs nothing."""
    d_in, d_out = map(int, shape.split("x"))
    rank = RANK.get(shape, 32)
    linear = nn.Linear(d_in, d_out, bias=False, dtype=dtype).requires_grad_(False)
    base = Given(d_in, d_out) if alone else linear

    def ours(curvature):
        layer = HypLoRALinear(base, rank, alpha=2 * rank, curvature=curvature)
        nn.init.normal_(layer.lora_B, std=0.1)
        return layer

    layers = {
        "LoRA by hand" if alone else "frozen linear": Adapter(base, d_in, d_out, rank, lora_by_hand)
        if alone
        else linear,
        "our LoRA": ours(math.inf),
        "HypLoRA": ours(0.5),
    }
    try:
        layers["PEFT LoRA"] = peft_layer(copy.deepcopy(linear), base if alone else None, rank, dora=False)
        if not alone:
            layers["PEFT DoRA"] = peft_layer(copy.deepcopy(linear), None, rank, dora=True)
    except ImportError:
        print("PEFT is left out: pip install peft")
    layers["closed form, autograd"] = Adapter(base, d_in, d_out, rank, closed_form)
    layers["literal maps"] = Adapter(base, d_in, d_out, rank, literal)
    layers["authors' layer"] = Adapter(base, d_in, d_out, rank, authors)
    return {name: layer.to(device) for name, layer in layers.items() if name not in skip}


def kept_bytes(step):
    """Bytes that autograd keeps for backward, parameters not counted."""
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and not (t._base is not None and isinstance(t._base, nn.Parameter)):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


def peak_bytes(step, device):
    """Largest growth of allocated memory during the step."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def captured(call):
    """The call as a CUDA graph: its replay costs the host one launch, so what is timed is the GPU's work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.results = call()  # kept, as the graph writes there
    return graph.replay


def measure(layers, tokens, shape, dtype, device, rounds, mode):
    """{name: {"both": [seconds], "forward": [seconds], "kept": bytes, "peak": bytes}}"""
    d_in, d_out = map(int, shape.split("x"))
    x = torch.randn(tokens, d_in, device=device).to(dtype).requires_grad_()
    d_out = torch.randn(tokens, d_out, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    result = {name: {"both": [], "forward": []} for name in layers}
    calls = {}
    for name, layer in layers.items():
        run = torch.compile(layer, dynamic=False) if "compiled" in mode else layer
        parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def both(run=run, parameters=parameters):
            return torch.autograd.grad(run(x), parameters, d_out, allow_unused=True)

        def forward(run=run):
            with torch.no_grad():
                return run(x)

        for _ in range(3):
            both(), forward()
        if mode == "eager":
            result[name]["kept"] = kept_bytes(lambda layer=layer: layer(x))
        result[name]["peak"] = peak_bytes(both, device)
        calls[name] = (both, forward) if "graph" not in mode else (captured(both), captured(forward))
    wait()
    start = time.perf_counter()
    for both, forward in calls.values():
        both(), forward()
    wait()
    once = (time.perf_counter() - start) / len(calls)
    inner = max(1, min(50, round(0.01 / once)))  # enough calls that the clock and the launch of the first do not count
    for _ in range(rounds):
        for name, pair in calls.items():
            for key, call in zip(("both", "forward"), pair):
                wait()
                start = time.perf_counter()
                for _ in range(inner):
                    call()
                wait()
                result[name][key].append((time.perf_counter() - start) / inner)
    return result


def ratio(result, name, base, key):
    pairs = sorted(a / b for a, b in zip(result[name][key], result[base][key]))
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    return f"{statistics.median(pairs):.2f} ({low:.2f}-{high:.2f})"


def mega(number):
    return "-" if number is None else f"{number / 2**20:.1f}"


def rows_of(result, setting):
    base = next(iter(result))
    for name, r in result.items():
        yield (
            f"| {setting} | {name} | {1e3 * statistics.median(r['both']):.3f} | {ratio(result, name, base, 'both')} "
            f"| {1e3 * statistics.median(r['forward']):.3f} | {ratio(result, name, base, 'forward')} "
            f"| {mega(r.get('kept'))} | {mega(r['peak'])} |"
        )


HEAD = """| shape, tokens, dtype, mode | | fwd+bwd ms | ratio | forward ms | ratio | MB kept | MB peak |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def write_beside(path, text):
    """Write the text beside path and rename it, so that path holds the old text or the new, whole."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def write_section(path, title, text):
    """Replace the section "## title" of the file, or append it."""
    path = Path(path)
    old = path.read_text() if path.exists() else "# Results\n\nWritten by the scripts beside this file.\n"
    parts = ("\n" + old).split("\n## ")
    kept = [part for part in parts[1:] if part.split("\n", 1)[0] != title]
    new = parts[0].lstrip("\n") + "".join(f"\n## {part.rstrip()}\n" for part in [*kept, f"{title}\n\n{text}"])
    write_beside(path, new)


def machine(device, threads):
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line] or [
        platform.processor()
    ]
    return f"{names[0]} CPU, {threads} threads"


def settings(args, device):
    """The (base, shape, tokens, dtype, mode) to measure; by default without those that would take hours."""
    shapes = args.shapes or [*([] if device == "cuda" else [TOY]), *QWEN, *LLAMA]
    for base, shape, tokens, dtype, mode in itertools.product(args.bases, shapes, args.tokens, args.dtypes, args.modes):
        small, typical = shape in (TOY, "3584x3584"), tokens in (512, 8192)
        compiles = "compiled" not in mode or small and (typical or device == "cuda")  # compiling takes most of the time
        if args.shapes or compiles and (base == "alone" or small and typical):
            yield base, shape, tokens, dtype, mode


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = ["eager", "compiled"] + ["eager graph", "compiled graph"] * (device == "cuda")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", help="in_features x out_features; with it, nothing is thinned out")
    add("--tokens", nargs="+", type=int, default=[1, 8192, 65536] if device == "cuda" else [1, 16, 512])
    dtypes = ["float32", "bfloat16"]
    add("--dtypes", nargs="+", default=dtypes[device == "cuda" :], choices=dtypes)
    add("--modes", nargs="+", default=modes, choices=modes, help="graph: replayed as a CUDA graph, without the host")
    add("--bases", nargs="+", default=["alone", "linear"], choices=["alone", "linear"])
    add("--skip", nargs="+", default=[], help="contenders to leave out")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--dry-run", action="store_true", help="print the tables and leave RESULTS.md as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.cache_size_limit = 1000
    warnings.filterwarnings("ignore")
    titles = {
        "alone": "The adapter by itself; ratios to LoRA by hand",
        "linear": "Around a real frozen linear; ratios to that linear alone",
    }
    tables = {}
    for base, shape, tokens, dtype, mode in settings(args, device):
        torch.manual_seed(0)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        layers = contenders(shape, getattr(torch, dtype), device, base == "alone", args.skip)
        result = measure(layers, tokens, shape, getattr(torch, dtype), device, args.rounds, mode)
        lines = list(rows_of(result, f"{shape}, {tokens}, {dtype}, {mode}"))
        if base not in tables:
            print(f"\n{titles[base]}\n\n{HEAD}")
        print("\n".join(lines), flush=True)
        tables.setdefault(base, []).extend(lines)
        if not args.dry_run:  # after each setting, so that a run that is stopped leaves what it measured
            head = f"{datetime.date.today()}, torch {torch.__version__}, rank 32 (toy 8), {args.rounds} rounds, "
            head += "median (quartiles). `python -m benchmarks.speed`"
            parts = [head, *(f"**{titles[k]}**\n\n{HEAD}\n" + "\n".join(rows) for k, rows in tables.items())]
            title = f"Speed: {machine(device, args.threads)}"
            write_section(Path(__file__).parent / "RESULTS.md", title, "\n\n".join(parts))


if __name__ == "__main__":
    main()
