"""What a user waits for: training steps and generation of whole models, beside PEFT's LoRA.

The models have the shapes of published ones, random weights and one frozen base for all contenders.
The adapters are the paper's: q, k, v, up and down, rank 32, in float32, which is PEFT's default.
Contenders take turns, and the order moves on by one each round. A ratio is the median over rounds
of the ratio within a round, with the quartiles. What fails is a row that says why.

    python -m studies.cost step --shape 7b --batch 2 4 --out step_7b.json
    python -m studies.cost decode --shape 7b --batch 1 32 --out decode_7b.json
    python -m studies.cost profile --shape 135m --batch 8 --only "HypLoRA, kernels"
    python -m studies.cost step decode --shape toy --length 16          # on a CPU: seconds
    torchrun --nproc-per-node 4 -m studies.cost processes --shape 7b --batch 2 --out processes.json
    python -m studies.cost --table *.json --results studies/RESULTS.md

step measures a training step: its time, its kernels (whatever runs on the GPU) and its peak of
memory. decode measures a token of greedy generation, launched by the host and as a CUDA graph.
profile prints where the host's and the GPU's time goes in one step. processes trains on as many
processes as torchrun started, with the whole base on each (DDP) and spread over them (FSDP2).
--table prints the tables of raw results. Needs transformers and peft.
"""

import argparse
import copy
import functools
import gc
import itertools
import json
import math
import pathlib
import resource
import statistics
import sys
import time
import warnings

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from hyplora import inject_hyplora
from scaling.training import PROCESSES, RANK, gather, spread, start_processes
from studies.tables import markdown, median_and_quartiles, stamp, write_section

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BASELINE = "PEFT's LoRA"
OURS = "our LoRA"
LORA_RANK = 32
PROMPT = 128  # The tokens before those that generation is measured on.
NEW_TOKENS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
say = functools.partial(print, flush=True)

NAMES = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"]
NAMES += ["num_key_value_heads", "intermediate_size", "vocab_size", "tie_word_embeddings"]
SHAPES = {
    "toy": dict(zip(NAMES, ("llama", 64, 2, 4, 2, 128, 256, True))),
    "135m": dict(zip(NAMES, ("llama", 576, 30, 9, 3, 1536, 49152, True))),  # SmolLM2-135M
    "1.5b": dict(zip(NAMES, ("qwen2", 1536, 28, 12, 2, 8960, 151936, True))),  # Qwen2.5-1.5B
    "7b": dict(zip(NAMES, ("qwen2", 3584, 28, 28, 4, 18944, 152064, False))),  # Qwen2.5-7B
    "70b": dict(zip(NAMES, ("llama", 8192, 80, 64, 8, 28672, 128256, False))),  # Llama 3.1 70B
}


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build(shape, device=DEVICE):
    """A frozen model with random weights, made on the device."""
    rest = dict(max_position_embeddings=32768, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    config = transformers.AutoConfig.for_model(**SHAPES[shape], **rest)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    make = transformers.AutoModelForCausalLM.from_config
    with torch.device(device):
        model = make(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).requires_grad_(False).train()


def random_ids(shape, batch, length):
    return torch.randint(0, SHAPES[shape]["vocab_size"], (batch, length), device=DEVICE)


# --- Contenders ---------------------------------------------------------------------------------


def with_peft(model, use_dora=False):
    options = dict(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, use_dora=use_dora)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, **options))


def with_ours(model, curvature=0.5):
    inject_hyplora(model, TARGETS, rank=LORA_RANK, alpha=2 * LORA_RANK, curvature=curvature)
    return model


def with_kernels(model):
    from scaling.kernels import use_kernels  # Without triton this is one row that fails.

    use_kernels(with_ours(model))
    return model


CONTENDERS = {
    BASELINE: with_peft,
    "PEFT's DoRA": lambda model: with_peft(model, use_dora=True),
    OURS: lambda model: with_ours(model, curvature=math.inf),
    "HypLoRA": with_ours,
    "HypLoRA, kernels": with_kernels,
}


class Contender:
    """A model with its adapters and optimizer. engine: what runs it, such as DDP."""

    def __init__(self, model, engine=None):
        self.model = model
        self.engine = engine or model
        for key, p in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.01)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda")

    def step(self, ids):
        """One training step."""
        logits = self.engine(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def contend(name, base):
    """A contender on a copy of the base that shares its tensors."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return Contender(CONTENDERS[name](copy.deepcopy(base, shared)))


def attempt(action, subject, failed, name):
    """action(subject), or None after noting in failed why there is no result."""
    try:
        return action(subject)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error):.120}".replace("\n", " ")
        say(f"    {name}: {failed[name]}")
    if isinstance(subject, Contender):
        subject.optimizer.zero_grad(set_to_none=True)


# --- Measuring ----------------------------------------------------------------------------------


def in_turns(action, subjects, failed, rounds):
    """{name: seconds of each round}, of action(subject), which returns its seconds."""
    seconds = {name: [] for name in subjects}
    for number in range(-2, rounds):  # The first two rounds warm up and do not count.
        gc.collect()
        names = list(seconds)
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            took = attempt(action, subjects[name], failed, name)
            if took is None:
                del seconds[name]
            elif number >= 0:
                seconds[name].append(took)
            if number < 0 and DEVICE == "cuda":
                torch.cuda.empty_cache()
    return seconds


def seconds_of(call, *arguments):
    wait()
    start = time.perf_counter()
    call(*arguments)
    wait()
    return time.perf_counter() - start


def peak_bytes(contender, ids):
    """Bytes at the peak of a training step if no other contender were there."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.step(ids)
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    for state in contender.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return torch.cuda.max_memory_allocated() - before + own


def kernels_of(contender, ids):
    """(launches of a training step, seconds that the GPU is busy with them)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(contender.step, ids)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(kernel.device_time for kernel in kernels) / 1e6


def measure_step(contenders, ids, failed, rounds):
    """{name: {"step": seconds of each round, and "kernels", "busy" and "peak" of one step}}"""
    times = in_turns(lambda one: seconds_of(one.step, ids), contenders, failed, rounds)
    results = {name: {"step": seconds} for name, seconds in times.items()}
    if DEVICE == "cuda":
        for name, result in results.items():
            result["peak"] = peak_bytes(contenders[name], ids)
            result["kernels"], result["busy"] = kernels_of(contenders[name], ids)
    return results


@torch.no_grad()
def generate(model, ids):
    """Greedy decoding with a growing cache. Returns the seconds of the steps after the prompt."""
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def decode(token):
        for _ in range(NEW_TOKENS):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(dim=-1)

    return seconds_of(decode, ids[:, -1:])


@torch.no_grad()
def graph_of_a_token(model, ids):
    """(A CUDA graph of the step that reads one token after the prompt, the cache that it reads)"""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    def step():  # It puts longer tensors into a copy of the cache, which so stays as it is.
        copied = copy.deepcopy(cache, {id(tensor): tensor for tensor in kept})
        model(input_ids=ids[:, -1:], past_key_values=copied, use_cache=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, cache


def measure_decode(contenders, ids, failed, rounds):
    """{name: {"token": seconds of a token in each round, "graph": the same as a CUDA graph}}"""

    def replay(graph, cache):
        for _ in range(NEW_TOKENS):
            graph.replay()

    times = in_turns(lambda one: generate(one.model, ids), contenders, failed, rounds)
    results = {name: {"token": seconds} for name, seconds in times.items()}
    if DEVICE == "cuda":
        capture = functools.partial(graph_of_a_token, ids=ids)
        graphs = {name: attempt(capture, contenders[name].model, failed, name) for name in results}
        graphs = {name: made for name, made in graphs.items() if made is not None}
        times = in_turns(lambda made: seconds_of(replay, *made), graphs, failed, rounds)
        for name in times:
            results[name]["graph"] = times[name]
    for result in results.values():
        for key in result:
            result[key] = [seconds / NEW_TOKENS for seconds in result[key]]
    return results


def print_profile(contenders, ids):
    """Where the host's and the GPU's time goes in one training step."""
    for name, contender in contenders.items():
        contender.step(ids)
        with torch.profiler.profile() as profile:
            seconds_of(contender.step, ids)
        for key in ("self_cpu_time_total", "self_device_time_total"):
            say(f"\n{name}, by {key}\n")
            say(profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


# --- Several processes --------------------------------------------------------------------------


def in_processes(name, shape, is_spread):
    """A contender on each process, with the whole base or, where is_spread, with a part of it."""
    if not is_spread:
        model = CONTENDERS[name](build(shape))
        engine = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model
        return Contender(model, engine)
    whole = None
    if RANK == 0:  # It alone has the whole model, on its host. Numbers do not matter, only sizes.
        whole = CONTENDERS[name](build(shape, "meta").to_empty(device="cpu"))
        for tensor in whole.state_dict().values():
            tensor.fill_(0.01)
    return Contender(spread(whole, torch.device(DEVICE)))


def measure_processes(args):
    """One row for each contender and layout: {"seconds": of each round, peaks in bytes}."""
    start_processes(torch.device(DEVICE))
    results = {}
    layouts = [False, True] if PROCESSES > 1 else [False]
    layouts = [True] if args.shape == "70b" else layouts  # No GPU holds that whole.
    for name, is_spread in itertools.product(args.only, layouts):
        contender = in_processes(name, args.shape, is_spread)
        ids = random_ids(args.shape, args.batch[0], args.length)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [seconds_of(contender.step, ids) for _ in range(args.rounds + 2)][2:]
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {"seconds": seconds, "peak": peak, "hosts": gather(host)}
        layout = "spread" if is_spread else "whole"
        results[f"{name}, {layout}"] = row | {"count": PROCESSES, "tokens": PROCESSES * ids.numel()}
        del contender
        gc.collect()
    return results


# --- Tables -------------------------------------------------------------------------------------


def ratio(results, name, baseline, key):
    """The median over rounds of time over the baseline's, with the quartiles."""
    if key not in results.get(baseline, {}):
        return ""
    return median_and_quartiles([a / b for a, b in zip(results[name][key], results[baseline][key])])


def make_row(results, name, tokens):
    """The row of a contender. tokens: those of a step."""
    own = results[name]
    row = {"": name}
    for key in ("step", "token", "graph"):
        if key in own:
            label = "token as a CUDA graph" if key == "graph" else key
            row[f"ms a {label}"] = f"{1e3 * statistics.median(own[key]):.1f}"
            row[f"{key} over PEFT's LoRA"] = ratio(results, name, BASELINE, key)
            row[f"{key} over our LoRA"] = ratio(results, name, OURS, key)
    if "step" in own:
        row["tokens/s"] = f"{tokens / statistics.median(own['step']):,.0f}"
    if "peak" in own:
        theirs = results.get(BASELINE, own)["peak"]
        row["kernels"] = f"{own['kernels']:,}"
        row["GPU busy, ms"] = f"{1e3 * own['busy']:.1f}"
        row["peak GiB"] = f"{own['peak'] / 2**30:.1f}"
        row["peak over PEFT's LoRA"] = f"{own['peak'] / theirs:.2f}"
    return row


def row_of_processes(results, name):
    own = results[name]
    row = {"": name, "processes": own["count"]}
    row["tokens/s"] = f"{own['tokens'] / statistics.median(own['seconds']):,.0f}"
    row["ms a step"] = f"{1e3 * statistics.median(own['seconds']):.0f}"
    row["peak GiB of a GPU"] = f"{own['peak'] / 2**30:.1f}"
    main, *others = [host / 2**30 for host in own["hosts"]]
    row["peak GiB of the first host process"] = f"{main:.1f}"
    row["of another"] = f"{max(others):.1f}" if others else ""
    return row


def print_table(record, path=None):
    """Print the table of a record of raw results, and write it into the Markdown file at path."""
    results = record["results"]
    if record["tokens"] is None:
        rows = [row_of_processes(results, name) for name in results]
    else:
        rows = [make_row(results, name, record["tokens"]) for name in results]
    rows += [{"": f"{name}: {why}"} for name, why in record["failed"].items()]
    body = f"{record['stamp']}\n\n{markdown(rows)}"
    say(f"\n## {record['title']}\n\n{body}")
    if path:
        write_section(path, record["title"], body)


def measure(args, part, batch, contenders):
    """(tokens of a step, results of each contender, why others failed)"""
    length = PROMPT if part == "decode" else args.length
    ids = random_ids(args.shape, batch, length)
    for contender in contenders.values():
        contender.model.train(part != "decode")
    failed = {}
    measure_part = measure_step if part == "step" else measure_decode
    return ids.numel(), measure_part(contenders, ids, failed, args.rounds), failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ["step", "decode", "profile", "processes"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--shape", choices=list(SHAPES), default="toy")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence of a step")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--out", help="a JSON file for the raw results")
    parser.add_argument("--table", nargs="+", default=[], help="raw results to print tables of")
    parser.add_argument("--results", help="a Markdown file that gets the tables, too")
    args = parser.parse_args()
    if not set(args.parts) <= set(parts) or not (args.parts or args.table):
        parser.error(f"give --table FILE ..., or one or more of {parts}, got {args.parts}")
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    for path in args.table:
        for record in json.loads(pathlib.Path(path).read_text()):
            print_table(record, args.results)
    command = f"python -m studies.cost {' '.join(sys.argv[1:])}"
    head = stamp(command, DEVICE, (transformers, peft))
    records = []

    def keep(title, tokens, results, failed):
        record = dict(title=title, stamp=head, tokens=tokens, results=results, failed=failed)
        records.append(record)
        print_table(record, args.results)
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps(records, indent=1))

    if args.parts == ["processes"]:
        results = measure_processes(args)
        each = f"{args.batch[0]} x {args.length} tokens each"
        title = f"Cost on {PROCESSES} processes: {args.shape}, {each}"
        if RANK == 0:
            keep(title, None, results, {})
    elif args.parts:
        base = build(args.shape)
        broken = {}
        make = functools.partial(contend, base=base)
        contenders = {name: attempt(make, name, broken, name) for name in args.only}
        contenders = {name: made for name, made in contenders.items() if made is not None}
        for part, batch in itertools.product(args.parts, args.batch):
            if part == "profile":
                ids = random_ids(args.shape, batch, args.length)
                print_profile(contenders, ids)
                continue
            tokens, results, failed = measure(args, part, batch, contenders)
            what = {"step": "a training step", "decode": "a generated token"}[part]
            title = f"Cost of {what}: {args.shape}, {batch} x {tokens // batch} tokens"
            keep(title, tokens, results, broken | failed)


if __name__ == "__main__":
    main()
