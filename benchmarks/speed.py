"""What one adapter costs by itself, beside LoRA's two products written by hand.

Its base gives its input back, so that the frozen product does not drown it; around a real frozen
linear layer, the last rows, the difference shrinks. Contenders take turns within a round, and a
ratio is the median of the rounds' ratios, since machines drift. The tables go into RESULTS.md.

    python -m benchmarks.speed                # on the CPU with one thread and with two, or on a GPU
    python -m benchmarks.speed --dry-run      # leaves RESULTS.md as it is
"""

import argparse
import math
import statistics
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.report import machine, ratio, reason, stamp, write_section
from hyplora import HypLoRALinear, hyplora_reference

HEAD = """| width, rank, tokens, dtype | | | microseconds | ratio | MB kept |
| --- | --- | --- | ---: | ---: | ---: |"""


class Given(nn.Module):
    """A base that costs nothing."""

    def __init__(self, width):
        super().__init__()
        self.in_features = width
        self.out_features = width

    def forward(self, x):
        return x


class ByHand(nn.Module):
    """base(x) + scaling * update(x), with the update written out."""

    def __init__(self, base, rank, update):
        super().__init__()
        self.base = base
        self.update = update
        self.scaling = 2.0
        self.lora_A = nn.Parameter(
            torch.randn(rank, base.in_features) / math.sqrt(base.in_features)
        )
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)
        self.K = nn.Parameter(torch.tensor([0.5 * base.in_features]))

    def forward(self, x):
        A = self.lora_A.to(x.dtype)
        B = self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * self.update(x, A, B, self.K)


def two_products(x, A, B, K):
    return F.linear(F.linear(x, A), B)


def law_read_off_BAx(x, A, B, K):
    """The law of sinh with |BAx| read off BAx: fewer operations, but BAx is kept for backward."""

    def length(v):
        squared = v.square().sum(dim=-1, keepdim=True, dtype=torch.float32)
        return squared.clamp(min=1e-36).sqrt() / K.sqrt()

    y = two_products(x, A, B, K)
    r = length(x)
    m = length(y)
    new_r = torch.asinh(torch.sinh(r.clamp(max=12.0)) * (m / r))
    return (new_r / m).to(y.dtype) * y


def three_maps(x, A, B, K):
    return hyplora_reference(x.float(), A.float(), B.float(), K).to(x.dtype)


def peft_lora(width, rank, base):
    """PEFT's own layer, with a float32 adapter as PEFT makes it."""
    import peft

    model = nn.ModuleDict({"layer": nn.Linear(width, width, bias=False)})
    model.config = {"model_type": "custom"}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    layer = peft.LoraModel(model, config, "default").model["layer"]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    layer.base_layer = base
    return layer


def contenders(width, rank, dtype, real):
    base = Given(width)
    if real:
        base = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
    layers = {
        "LoRA by hand": ByHand(base, rank, two_products),
        "our LoRA": HypLoRALinear(base, rank, alpha=2 * rank, curvature=math.inf),
        "HypLoRA": HypLoRALinear(base, rank, alpha=2 * rank),
        "HypLoRA, length off BAx": ByHand(base, rank, law_read_off_BAx),
        "HypLoRA, three maps": ByHand(base, rank, three_maps),
    }
    nn.init.normal_(layers["HypLoRA"].lora_B, std=0.1)
    nn.init.normal_(layers["our LoRA"].lora_B, std=0.1)
    try:
        layers["PEFT's LoRA"] = peft_lora(width, rank, base)
    except ImportError:
        print("PEFT is left out: pip install peft")
    return layers


def kept_bytes(step):
    """Bytes that autograd keeps for backward, parameters not counted."""
    kept = {}

    def pack(t):
        is_parameter = isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter)
        if not is_parameter:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


def as_graph(call):
    """The call as a CUDA graph: its time without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.results = call()  # These are kept, as the graph writes there.
    return graph.replay


def caller(layer, x, gradient, backward):
    """A function that runs the layer forward, or forward and backward."""
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both():
        return torch.autograd.grad(layer(x), inputs, gradient, allow_unused=True)

    def forward():
        with torch.no_grad():
            return layer(x)

    return both if backward else forward


def measure(layers, tokens, dtype, backward, mode, device, rounds):
    """{name: (seconds of each round, bytes kept for backward)}"""
    width = layers["HypLoRA"].in_features
    x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    calls = {}
    kept = {}
    for name, layer in layers.items():
        layer.to(device)
        kept[name] = kept_bytes(lambda: layer(x)) if mode == "eager" else 0
        run = torch.compile(layer, dynamic=False) if "compiled" in mode else layer
        calls[name] = caller(run, x, gradient, backward)
        for _ in range(3):
            calls[name]()
        if "graph" in mode:
            calls[name] = as_graph(calls[name])
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for call in calls.values():
        call()
    wait()
    once = (time.perf_counter() - start) / len(calls)
    repeats = max(1, min(300, round(0.02 / once)))
    seconds = {name: [] for name in layers}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wait()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: (seconds[name], kept[name]) for name in layers}


def settings(device):
    """(width, rank, tokens, dtype, backward, mode, whether the base is a real linear layer)"""
    if device == "cpu":
        yield 64, 8, 1, torch.float32, False, "eager", False
        yield 576, 32, 1, torch.float32, False, "eager", False
        for mode in ("eager", "compiled"):
            yield 3584, 32, 512, torch.float32, True, mode, False
        yield 3584, 32, 512, torch.float32, True, "eager", True
        return
    yield 3584, 32, 1, torch.bfloat16, False, "eager", False
    for mode in ("eager", "compiled", "eager graph", "compiled graph"):
        yield 3584, 32, 8192, torch.bfloat16, True, mode, False
    yield 3584, 32, 8192, torch.bfloat16, True, "eager", True


def rows(device, rounds):
    """The rows of the table, as they come."""
    for width, rank, tokens, dtype, backward, mode, real in settings(device):
        torch.manual_seed(0)
        torch._dynamo.reset()
        layers = contenders(width, rank, dtype, real)
        case = f"{width}, {rank}, {tokens}, {str(dtype)[6:]}"
        what = f"{mode}, {'forward and backward' if backward else 'forward'}"
        if real:
            what += ", around a frozen linear"
        try:
            results = measure(layers, tokens, dtype, backward, mode, device, rounds)
        except RuntimeError as error:  # The capture of a graph fails on some machines.
            yield f"| {case} | {what} | {reason(error)} | | | |"
            continue
        for name, (seconds, kept) in results.items():
            micro = 1e6 * statistics.median(seconds)
            times = ratio(seconds, results["LoRA by hand"][0])
            yield f"| {case} | {what} | {name} | {micro:.1f} | {times} | {kept / 2**20:.1f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for threads in (1,) if device == "cuda" else (1, 2):
        torch.set_num_threads(threads)
        title = f"One adapter by itself: {machine(device, threads)}"
        lines = [stamp("python -m benchmarks.speed"), "", HEAD]
        for row in rows(device, args.rounds):
            print(row, flush=True)
            lines.append(row)
            if not args.dry_run:
                write_section(title, "\n".join(lines))


if __name__ == "__main__":
    main()
