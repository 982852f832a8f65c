"""What a user waits for: training steps and generation of whole models, beside PEFT's LoRA.

The models have the shapes of published ones, random weights and one frozen base for all contenders.
The adapters are the paper's: q, k, v, up and down, rank 32, in float32, which is PEFT's default.
Contenders take turns, and the order moves on by one each round. A ratio is the median over rounds
of the ratio within a round, with the quartiles.

    python -m studies.cost step --shape 7b --batch 2 --out step_7b.json
    torchrun --nproc-per-node 4 -m studies.cost processes --shape 7b --batch 2 --out processes.json

step measures a training step: its time, its kernels (whatever runs on the GPU) and its peak of
memory. decode measures a token of greedy generation, launched by the host and as a CUDA graph.
processes trains on as many processes as torchrun started, with the whole base on each (DDP) and
spread over them (FSDP2).
"""

import argparse
import copy
import gc
import itertools
import json
import math
import pathlib
import resource
import statistics
import sys
import time

import peft
import torch
import transformers

from hyplora import inject_hyplora
from scaling.training import PROCESSES, RANK, gather, spread, start_processes
from studies.tables import markdown, median_and_quartiles, report, stamp

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA_RANK = 32
PROMPT = 128  # The tokens before those that generation is measured on.
NEW_TOKENS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = ["PEFT's LoRA", "PEFT's DoRA", "our LoRA", "HypLoRA"]
if DEVICE == "cuda":
    CONTENDERS.append("HypLoRA, kernels")
wait = torch.get_device_module(DEVICE).synchronize  # On a CPU this does nothing.

NAMES = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"]
NAMES += ["num_key_value_heads", "intermediate_size", "vocab_size", "tie_word_embeddings"]
SHAPES = {
    "toy": dict(zip(NAMES, ("llama", 64, 2, 4, 2, 128, 256, True))),
    "135m": dict(zip(NAMES, ("llama", 576, 30, 9, 3, 1536, 49152, True))),  # SmolLM2-135M
    "1.5b": dict(zip(NAMES, ("qwen2", 1536, 28, 12, 2, 8960, 151936, True))),  # Qwen2.5-1.5B
    "7b": dict(zip(NAMES, ("qwen2", 3584, 28, 28, 4, 18944, 152064, False))),  # Qwen2.5-7B
    "70b": dict(zip(NAMES, ("llama", 8192, 80, 64, 8, 28672, 128256, False))),  # Llama 3.1 70B
}


def build(shape, device=DEVICE):
    """A frozen model with random weights, made on the device."""
    config = transformers.AutoConfig.for_model(**SHAPES[shape])
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def adapt(model, name):
    """The model with the adapters of a contender."""
    if name in ("PEFT's LoRA", "PEFT's DoRA"):
        options = dict(r=LORA_RANK, lora_alpha=2 * LORA_RANK, use_dora=name == "PEFT's DoRA")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, **options))
    curvature = math.inf if name == "our LoRA" else 0.5
    inject_hyplora(model, TARGETS, rank=LORA_RANK, alpha=2 * LORA_RANK, curvature=curvature)
    if name == "HypLoRA, kernels":
        from scaling.kernels import use_kernels

        use_kernels(model)
    return model


class Contender:
    """A model with its adapters, and their optimizer."""

    def __init__(self, model):
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda")

    def step(self, ids):
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def sharing_copy(base):
    """A copy of a model that shares its tensors."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, shared)


def contend(names, shape):
    """{name: Contender} on copies of one base."""
    base = build(shape)
    return {name: Contender(adapt(sharing_copy(base), name)) for name in names}


def seconds_of(call, *arguments, times=1):
    """The seconds of a call, of which so many follow each other."""
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call(*arguments)
    wait()
    return (time.perf_counter() - start) / times


def in_turns(key, action, contenders, rounds):
    """{name: {key: seconds of each round}}, of action(contender), which returns its seconds."""
    names = list(contenders)
    seconds = {name: [] for name in names}
    for _ in range(rounds + 2):
        gc.collect()
        for name in names:
            seconds[name].append(action(contenders[name]))
        names.append(names.pop(0))
    return {name: {key: taken[2:]} for name, taken in seconds.items()}  # Two rounds warm up.


def look_into_a_step(contender, ids):
    """Of one training step: the bytes at its peak if no other contender were there, its kernels,
    and the seconds that the GPU is busy with them.
    """
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        contender.step(ids)
        wait()
    peak = torch.cuda.max_memory_allocated() - before
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    for state in contender.optimizer.state.values():
        tensors += state.values()
    peak += sum(tensor.nbytes for tensor in tensors)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(kernel.device_time for kernel in kernels) / 1e6
    return {"peak": peak, "kernels": len(kernels), "busy": busy}


def measure_step(names, shape, ids, rounds):
    """{name: {"step": seconds of each round, and on a GPU what look_into_a_step finds}}"""
    contenders = contend(names, shape)
    results = in_turns("step", lambda one: seconds_of(one.step, ids), contenders, rounds)
    if DEVICE == "cuda":
        for name, contender in contenders.items():
            results[name] |= look_into_a_step(contender, ids)
    return results


@torch.no_grad()
def generate(model, ids):
    """Greedy decoding with a growing cache. Returns the seconds of a token after the prompt."""
    model.eval()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, -1:]

    def decode():
        nonlocal token
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(dim=-1)

    return seconds_of(decode, times=NEW_TOKENS)


@torch.no_grad()
def replay(model, ids):
    """The seconds of a token after the prompt, when the step that reads it is a CUDA graph."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    longer = copy.copy(cache)  # The step puts longer tensors here, and cache keeps what it reads.
    longer.layers = [copy.copy(layer) for layer in cache.layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input_ids=ids[:, -1:], past_key_values=longer, use_cache=True)
    graph.replay()
    return seconds_of(graph.replay, times=NEW_TOKENS)


def measure_decode(names, shape, ids, rounds):
    """{name: {"token": seconds of a token in each round, "graph": the same as a CUDA graph}}"""
    contenders = contend(names, shape)
    results = in_turns("token", lambda one: generate(one.model, ids), contenders, rounds)
    if DEVICE == "cuda":
        graphs = in_turns("graph", lambda one: replay(one.model, ids), contenders, rounds)
        results = {name: results[name] | graphs[name] for name in names}
    return results


def in_processes(name, shape, layout):
    """A contender on each process, with the "whole" base or, "spread", with a part of it."""
    if layout == "whole":
        model = adapt(build(shape), name)
        if PROCESSES > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        return Contender(model)
    whole = None
    if RANK == 0:  # It alone has the whole model, on its host. Numbers do not matter, only sizes.
        whole = adapt(build(shape, "meta").to_empty(device="cpu"), name)
        for tensor in whole.state_dict().values():
            tensor.fill_(0.01)
    return Contender(spread(whole, torch.device(DEVICE)))


def measure_processes(names, shape, ids, rounds):
    """One row for each contender and layout: {"seconds": of each round, peaks in bytes}."""
    results = {}
    layouts = ["whole", "spread"] if PROCESSES > 1 else ["whole"]
    if shape == "70b":
        layouts = ["spread"]  # No GPU holds it whole.
    for name, layout in itertools.product(names, layouts):
        contender = in_processes(name, shape, layout)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [seconds_of(contender.step, ids) for _ in range(rounds + 2)]
        results[f"{name}, {layout}"] = {
            "seconds": seconds[2:],
            "peak": torch.cuda.max_memory_allocated(),  # 0 on a CPU
            "hosts": gather(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
            "count": PROCESSES,
            "tokens": PROCESSES * ids.numel(),
        }
        del contender
        gc.collect()
    return results


def make_row(own, record):
    """The row of a contender with these results, which are among those of the record."""
    results = record["results"]
    row = {}
    for key, label in (("step", "step"), ("token", "token"), ("graph", "token as a CUDA graph")):
        if key in own:
            row[f"ms a {label}"] = f"{1e3 * statistics.median(own[key]):.1f}"
            for baseline in ("PEFT's LoRA", "our LoRA"):
                if baseline in results:  # A ratio is taken within a round.
                    ratios = [a / b for a, b in zip(own[key], results[baseline][key])]
                    row[f"{key} over {baseline}"] = median_and_quartiles(ratios)
    if "step" in own:
        row["tokens/s"] = f"{record['tokens'] / statistics.median(own['step']):,.0f}"
    if "peak" in own:
        row["kernels"] = f"{own['kernels']:,}"
        row["GPU busy, ms"] = f"{1e3 * own['busy']:.1f}"
        row["peak GiB"] = f"{own['peak'] / 2**30:.1f}"
        if "PEFT's LoRA" in results:
            theirs = results["PEFT's LoRA"]["peak"]
            row["peak over PEFT's LoRA"] = f"{own['peak'] / theirs:.2f}"
    return row


def row_of_processes(own, record):
    main, *others = [f"{host / 2**30:.1f}" for host in own["hosts"]]
    return {
        "processes": own["count"],
        "tokens/s": f"{own['tokens'] / statistics.median(own['seconds']):,.0f}",
        "ms a step": f"{1e3 * statistics.median(own['seconds']):.0f}",
        "peak GiB of a GPU": f"{own['peak'] / 2**30:.1f}",
        "peak GiB of the first host process": main,
        "of another": max(others, key=float, default=""),
    }


def print_table(record, path=None):
    """Print the table of a record of raw results, and write it into the Markdown file at path."""
    rows = []
    for name, own in record["results"].items():
        make = row_of_processes if "hosts" in own else make_row
        rows.append({"": name, **make(own, record)})
    report(record["title"], f"{record['stamp']}\n\n{markdown(rows)}", path)


PARTS = {  # what measures it, and its title
    "step": (measure_step, "Cost of a training step: {}"),
    "decode": (measure_decode, "Cost of a generated token: {}"),
    "processes": (measure_processes, f"Cost on {PROCESSES} processes: {{}} each"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=list(PARTS), default="step")
    parser.add_argument("--shape", choices=list(SHAPES), default="toy")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence of a step")
    parser.add_argument("--rounds", type=int, default=9, help="at least 1")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", help="a JSON file for the raw results")
    parser.add_argument("--table", help="a file of raw results to print tables of")
    parser.add_argument("--results", help="a Markdown file that gets the tables, too")
    args = parser.parse_args()
    if args.table:
        for record in json.loads(pathlib.Path(args.table).read_text()):
            print_table(record, args.results)
        return
    start_processes(torch.device(DEVICE))
    command = f"python -m studies.cost {' '.join(sys.argv[1:])}"
    measure, title = PARTS[args.part]
    length = PROMPT if args.part == "decode" else args.length
    ids = torch.randint(SHAPES[args.shape]["vocab_size"], (args.batch, length), device=DEVICE)
    record = {
        "title": title.format(f"{args.shape}, {args.batch} x {length} tokens"),
        "stamp": stamp(command, DEVICE, (transformers, peft)),
        "tokens": ids.numel(),
        "results": measure(args.only, args.shape, ids, args.rounds),
    }
    if RANK == 0:
        print_table(record, args.results)
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps([record], indent=1))


if __name__ == "__main__":
    main()
