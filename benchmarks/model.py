"""What a user waits for: training steps and generation of whole models, beside PEFT's LoRA.

The models have the shapes of published ones and random weights in bfloat16; all contenders share
one frozen base. The adapters are those of the paper: q, k, v, up and down, rank 32, float32
parameters (PEFT's default, too; a second PEFT row has bfloat16 ones). Contenders take turns within
a round, and a ratio is the median of the rounds' ratios, with quartiles. Each table goes into
RESULTS.md as soon as it is finished, and a contender that fails is a row that says why.

    python -m benchmarks.model --shape toy 135m                   # on the CPU: minutes
    python -m benchmarks.model --shape 135m 1.5b 7b               # on a GPU

Needs transformers and peft: pip install -r tests/requirements.txt
"""

import argparse
import copy
import gc
import math
import shlex
import statistics
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.authors import authors_update, simplified_update
from benchmarks.report import machine, ratio, reason, stamp, write_section
from hyplora import inject_hyplora

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BASELINE = "PEFT LoRA"
RANK = 32

# width, blocks, heads, key and value heads, width of the MLP, vocabulary, tied embeddings
SHAPES = {
    "toy": ("Llama", 64, 2, 4, 2, 128, 256, True),
    "135m": ("Llama", 576, 30, 9, 3, 1536, 49152, True),
    "1.5b": ("Qwen2", 1536, 28, 12, 2, 8960, 151936, True),
    "7b": ("Qwen2", 3584, 28, 28, 4, 18944, 152064, False),
}
# (batch, sequence length) of a training step
STEP = {
    ("toy", "cuda"): (8, 64),
    ("135m", "cuda"): (8, 1024),
    ("1.5b", "cuda"): (4, 1024),
    ("7b", "cuda"): (2, 1024),
    ("toy", "cpu"): (8, 16),
    ("135m", "cpu"): (1, 64),
}


def say(text):
    print(text, flush=True)


def build(shape, device, dtype):
    """A model with random weights, made on the device."""
    import transformers

    family, width, blocks, heads, kv_heads, mlp, vocabulary, tied = shape
    config = getattr(transformers, f"{family}Config")(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).requires_grad_(False).train()


def sharing(model):
    """A copy of the model's modules around the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# --- Contenders ---------------------------------------------------------------------------------


class AuthorsLinear(nn.Module):
    """base(x) + scaling * the update of one of the authors' layers, in float32 as in theirs."""

    def __init__(self, base, rank, kind):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.kind = kind
        self.scaling = 2.0
        A = torch.randn(rank, base.in_features, device=device)
        self.lora_A = nn.Parameter(A / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.k = nn.Parameter(torch.tensor(0.5, device=device))
        if kind == "hyplora":
            self.unit = nn.Parameter(torch.tensor(math.sqrt(base.in_features), device=device))

    def forward(self, x):
        out = self.base(x)
        if self.kind == "hyplora":
            update = authors_update(x.float(), self.lora_A, self.lora_B, self.k, self.unit)
        else:
            update = simplified_update(x.float(), self.lora_A, self.lora_B, self.k)
        return out + (self.scaling * update).to(out.dtype)


def as_base(model, rank):
    """The frozen model. Gradients reach its embeddings, so that backward has its usual length."""

    def require(module, inputs, output):
        return output.detach().requires_grad_(torch.is_grad_enabled())

    model.get_input_embeddings().register_forward_hook(require)
    return model


def with_peft(dora=False, wide=True):
    def adapt(model, rank):
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=dora, lora_dropout=0.0
        )
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
        if not wide:
            for p in adapted.parameters():
                if p.requires_grad:
                    p.data = p.data.to(model.dtype)
        return adapted

    return adapt


def with_ours(curvature):
    def adapt(model, rank):
        inject_hyplora(model, TARGETS, rank=rank, alpha=2 * rank, curvature=curvature)
        return model

    return adapt


def with_authors(kind):
    def adapt(model, rank):
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if name in TARGETS:
                    setattr(owner, name, AuthorsLinear(child, rank, kind))
        return model

    return adapt


CONTENDERS = {
    BASELINE: with_peft(),
    "base, frozen": as_base,
    "PEFT LoRA, bfloat16 adapters": with_peft(wide=False),
    "our LoRA": with_ours(math.inf),
    "HypLoRA": with_ours(0.5),
    "PEFT DoRA": with_peft(dora=True),
    "authors' hyplora": with_authors("hyplora"),
    "authors' hyplora_simplified": with_authors("hyplora_simplified"),
}


class Contender:
    """A model with its adapters and optimizer."""

    def __init__(self, name, base, rank):
        self.model = CONTENDERS[name](sharing(base), rank)
        for key, p in self.model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.01)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = None
        if trained:
            fused = trained[0].is_cuda
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused)

    def step(self, ids):
        """One training step."""
        loss = next_token_loss(self.model, ids)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def own_bytes(self):
        """Bytes of the model, its adapters and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def next_token_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


# --- Measuring ----------------------------------------------------------------------------------


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def clean(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def attempt(action, failed, name, device):
    """Run the action and return what it returns; note an error as the contender's row."""
    try:
        return action()
    except Exception as error:
        failed[name] = reason(error)
        say(f"{name}: {failed[name]}")
    clean(device)
    return None


def in_turns(calls, device, rounds, budget):
    """({name: seconds of each round}, {name: why it failed}); rounds end when the budget is spent.

    Each call is made twice before, for warming up.
    """
    failed = {}
    for name, call in calls.items():
        start = time.perf_counter()

        def warm():
            call()
            call()
            wait(device)

        attempt(warm, failed, name, device)
        clean(device)
        say(f"    {name}: warm after {time.perf_counter() - start:.1f} s")
    seconds = {name: [] for name in calls if name not in failed}
    end = time.perf_counter() + budget
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        for name in list(seconds):

            def turn():
                wait(device)
                start = time.perf_counter()
                calls[name]()
                wait(device)
                return time.perf_counter() - start

            took = attempt(turn, failed, name, device)
            if took is None:
                del seconds[name]
            else:
                seconds[name].append(took)
    return seconds, failed


def peak_bytes(contender, ids, device):
    """Bytes at the peak of a training step if no other contender were there."""
    if device != "cuda":
        return None
    clean(device)
    wait(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.step(ids)
    wait(device)
    return torch.cuda.max_memory_allocated() - before + contender.own_bytes()


def kernels_of(contender, ids, device):
    """(kernels of a training step, seconds that the GPU is busy with them), whatever the host."""
    if device != "cuda":
        return None
    gpu = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[gpu]) as profile:
        contender.step(ids)
        wait(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(kernel.device_time for kernel in kernels) / 1e6


def times_baseline(name, seconds):
    if BASELINE not in seconds:
        return "no baseline"
    return ratio(seconds[name], seconds[BASELINE])


def step_table(contenders, ids, device, rounds, budget):
    calls = {}
    for name, contender in contenders.items():
        calls[name] = lambda contender=contender: contender.step(ids)
    seconds, failed = in_turns(calls, device, rounds, budget)
    peaks = {}
    kernels = {}
    for name in seconds:
        contender = contenders[name]
        peaks[name] = attempt(lambda: peak_bytes(contender, ids, device), {}, name, device)
        kernels[name] = attempt(lambda: kernels_of(contender, ids, device), {}, name, device)
    lines = [
        "| | tokens/s | time over PEFT LoRA | kernels | GPU busy over PEFT LoRA | peak GiB "
        "| peak over PEFT LoRA |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in contenders:
        if name in failed:
            lines.append(f"| {name} | {failed[name]} | | | | | |")
            continue
        speed = ids.numel() / statistics.median(seconds[name])
        row = f"| {name} | {speed:,.0f} | {times_baseline(name, seconds)} | "
        if peaks[name] and peaks.get(BASELINE) and kernels[name] and kernels.get(BASELINE):
            count, busy = kernels[name]
            row += f"{count:,} | {busy / kernels[BASELINE][1]:.2f} | "
            row += f"{peaks[name] / 2**30:.2f} | {peaks[name] / peaks[BASELINE]:.3f} |"
        else:
            row += "| | | |"
        lines.append(row)
    return "\n".join(lines)


@torch.no_grad()
def generate(model, ids, tokens, device):
    """Greedy decoding with a growing cache. Returns the seconds of the steps after the prompt."""
    out = model(input_ids=ids, use_cache=True)
    cache = out.past_key_values
    token = out.logits[:, -1:].argmax(dim=-1)
    wait(device)
    start = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(dim=-1)
    wait(device)
    return time.perf_counter() - start


@torch.no_grad()
def graph_of_a_token(model, ids):
    """A CUDA graph of the step that reads one token after the prompt: its kernels, without a host.

    Returns (graph, the cache that it reads), as the cache must live while the graph is replayed.
    Its tensors stay as they are, since a step puts longer ones into its copy.
    """
    cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    def step():
        copied = copy.deepcopy(cache, {id(tensor): tensor for tensor in kept})
        model(input_ids=ids[:, -1:], past_key_values=copied, use_cache=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, cache


def graph_seconds(contenders, ids, device, rounds, tokens):
    """{name: seconds of each round of so many tokens}, each the same step of a CUDA graph."""
    if device != "cuda":
        return {}
    graphs = {}
    for name, contender in contenders.items():
        made = attempt(lambda: graph_of_a_token(contender.model, ids), {}, name, device)
        if made is not None:
            graphs[name] = made

    def replay(graph):
        for _ in range(tokens):
            graph.replay()

    calls = {}
    for name, (graph, _) in graphs.items():
        calls[name] = lambda graph=graph: replay(graph)
    return in_turns(calls, device, rounds, 2)[0]


def decode_table(contenders, vocabulary, device, rounds, budget, tokens=16, prompt=128):
    """Milliseconds a token; the first row of a batch is the baseline's."""
    lines = [
        "| batch | | ms a token | time over PEFT LoRA | ms as a CUDA graph | over PEFT LoRA |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]

    def milliseconds(seconds):
        return f"{1e3 * statistics.median(seconds) / tokens:.2f}"

    for contender in contenders.values():
        contender.model.eval()
    for batch in (1, 32):
        ids = torch.randint(0, vocabulary, (batch, prompt), device=device)
        failed = {}
        seconds = {name: [] for name in contenders}
        end = time.perf_counter() + budget
        for number in range(rounds + 1):  # The first round warms up and does not count.
            if number >= 4 and time.perf_counter() > end:
                break
            for name in list(seconds):
                model = contenders[name].model
                took = attempt(lambda: generate(model, ids, tokens, device), failed, name, device)
                if took is None:
                    del seconds[name]
                elif number > 0:
                    seconds[name].append(took)
            if number == 0:
                say(f"    batch {batch}: warm")
                end = time.perf_counter() + budget
        replays = graph_seconds(contenders, ids, device, rounds, tokens)
        for name in contenders:
            if name in failed:
                lines.append(f"| {batch} | {name} | {failed[name]} | | | |")
                continue
            each = milliseconds(seconds[name])
            row = f"| {batch} | {name} | {each} | {times_baseline(name, seconds)} | "
            if name in replays:
                row += f"{milliseconds(replays[name])} | {times_baseline(name, replays)} |"
            else:
                row += "| |"
            lines.append(row)
    for contender in contenders.values():
        contender.model.train()
    return "\n".join(lines)


def make(names, base, args):
    contenders = {}
    for name in names:
        made = attempt(lambda: Contender(name, base, RANK), {}, name, args.device)
        if made is not None:
            contenders[name] = made
    return contenders


# --- The parts of the benchmark -----------------------------------------------------------------


def publish(title, lines, args):
    """Print the table, and write it into RESULTS.md unless this is a dry run."""
    command = f"python -m benchmarks.model {shlex.join(args.words)}"
    text = f"{stamp(command)}\n\n{lines}"
    say(f"\n## {title}\n\n{text}\n")
    if not args.dry_run:
        write_section(title, text)


def whole_model(shape, args):
    device = args.device
    start = time.perf_counter()
    batch, length = STEP[shape, device]
    batch = args.batch or batch
    length = args.length or length
    base = build(SHAPES[shape], device, torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(0, SHAPES[shape][6], (batch, length), device=device)
    say(f"{shape}: built after {time.perf_counter() - start:.1f} s")
    names = args.only or [name for name in CONTENDERS if name not in args.without]
    where = machine(device)
    parts = {"step", "decode"} if args.parts is None else set(args.parts)
    contenders = make(names, base, args)
    say(f"{shape}: contenders made after {time.perf_counter() - start:.1f} s")

    def step():
        return step_table(contenders, ids, device, args.rounds, args.seconds)

    def decode():
        rounds = args.rounds
        return decode_table(contenders, SHAPES[shape][6], device, rounds, args.seconds / 2)

    tables = {
        "step": (f"A training step of {shape}, {batch} x {length} tokens: {where}", step),
        "decode": (f"Generation with {shape}, 16 tokens after 128: {where}", decode),
    }
    for part, (title, table) in tables.items():
        if part not in parts:
            continue
        lines = attempt(table, {}, title, device)
        if lines is not None:
            publish(title, lines, args)
        say(f"{shape}: {part} done after {time.perf_counter() - start:.1f} s")
    contenders.clear()
    clean(device)


def main():
    import sys

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=[])
    parser.add_argument("--parts", nargs="+", choices=["step", "decode"])
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these contenders")
    parser.add_argument("--without", nargs="+", default=[], help="leave these contenders out")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30, help="the budget of a table's rounds")
    parser.add_argument("--dry-run", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    args.words = sys.argv[1:]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    warnings.filterwarnings("ignore")
    for shape in args.shape:
        attempt(lambda: whole_model(shape, args), {}, shape, args.device)
        clean(args.device)


if __name__ == "__main__":
    main()
