"""See HypLoRA learn, in about a minute, on a CPU, with nothing to download. Then point it at a real model.

By default a tiny GPT learns two-digit addition from scratch and is frozen. Adapters then teach it arithmetic that
it cannot do, once as LoRA and once as HypLoRA, from the same start, on the same batches. The last thing printed is a
table of both, scored on operand pairs that neither phase has seen.

    python train_minimal.py                                    # the sanity check
    python train_minimal.py --task two-step --seeds 3          # a+b-c, mean and spread over three seeds
    python train_minimal.py --curvature 0.1 0.5 1.0            # the paper's curvature ablation
    python train_minimal.py --checkpoint Qwen2.5-7B --dtype bfloat16 --data train.json --eval gsm8k.json --recipe paper
    torchrun --nproc-per-node 8 train_minimal.py --shard --checkpoint ...    # the base sharded over eight GPUs

Read in this order: the model, checkpoints, the data, training, scoring, the command line.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch mentions it; nothing here needs it
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from hyplora import (
    disable_hyplora,
    hyplora_parameters,
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    remove_hyplora,
    save_atomically,
    save_hyplora,
    set_hyplora_state_dict,
)

# ---------------------------------------------------------------------------------------------------
# The model: a decoder with the parameter names, and the switches, of Llama, Mistral, Qwen and Gemma 3


@dataclass
class Config:
    """What config.json calls by these names, and the switches that tell the families apart."""

    vocab_size: int = 13
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 0  # 0: one for each query head
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on each head's query and key
    gemma: bool = False  # norms scale by 1 + weight and stand behind each part too; embeddings are scaled
    activation: str = "silu"  # or another of ACTIVATIONS
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    layer_types: list = field(default_factory=list)  # empty: all "full_attention"
    sliding_window: int = 0  # how far back a "sliding_attention" layer sees
    rope: dict = field(default_factory=lambda: {"full_attention": {"rope_theta": 10000.0}})  # per layer type

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.attention_scale = self.attention_scale or self.head_dim**-0.5
        self.layer_types = self.layer_types or self.num_hidden_layers * ["full_attention"]
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")


class RMSNorm(nn.Module):
    def __init__(self, size, c):
        super().__init__()
        self.eps, self.offset = c.rms_norm_eps, float(c.gemma)
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def forward(self, x):
        if not self.offset:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + self.offset, self.eps).to(x.dtype)


def rotary(rope, positions, head_dim):
    """cos and sin of the rotary embedding: (T,) -> two of (T, head_dim), halves layout as in Llama."""
    frequency = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / rope["factor"]
    if kind == "llama3":  # long waves are stretched, short ones are not, those between in proportion
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    angle = (positions[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def visible(queries, keys, window, pad, device):
    """Which keys the last `queries` of `keys` positions may see: (..., queries, keys), or None for all up to each.

    window: how many positions back, 0 for no limit. pad: (batch,) number of left-padding tokens, or None.
    """
    if pad is None and queries in (1, keys) and not 0 < window < keys:
        return None
    k = torch.arange(keys, device=device)
    q = k[-queries:, None]
    mask = (k <= q) & (k > q - (window or keys))
    if pad is not None:
        mask = mask & (k >= pad[:, None, None, None]) | (k == q)  # padding sees itself: no row may be empty
    return mask


class Past:
    """Keys and values of the tokens before, for one block: no list, as FSDP2 hands copies of lists to a model."""

    length = 0

    def extend(self, k, v):
        if self.length:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v, self.length = k, v, k.shape[2]
        return k, v


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.scale = c.head_dim, c.attention_scale
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c) if c.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, cos, sin, mask, past):
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)  # (batch, heads, T, head_dim)
        if past is not None:
            k, v = past.extend(k, v)
        causal = mask is None and q.shape[2] > 1
        # enable_gqa: where there are fewer key/value heads than query heads, each serves a group of them.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Norms have Gemma's names: what Llama calls post_attention_layernorm stands before its MLP."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.pre_feedforward_layernorm = (RMSNorm(c.hidden_size, c) for _ in range(2))
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.post_attention_layernorm, self.post_feedforward_layernorm = (
            RMSNorm(c.hidden_size, c) if c.gemma else nn.Identity() for _ in range(2)
        )

    def forward(self, x, cos, sin, mask, past):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, mask, past))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False  # recompute: activations in backward, to save memory
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(c.hidden_size, c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # each block starts as the identity
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if weight.shape[0] == c.vocab_size else weight.shape[1] ** -0.5)

    def forward(self, ids, cache=None, pad=None):
        """Token ids (batch, T) -> logits (batch, T, vocab_size).

        cache: a Past for each block, extended in place; ids continue what it holds.
        pad: (batch,) how many tokens of left padding a row begins with.
        """
        c, x = self.config, self.model.embed_tokens(ids)
        if c.gemma:
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype, device=x.device)
        new, length = ids.shape[1], ids.shape[1] + (cache[0].length if cache else 0)
        positions = torch.arange(length - new, length, device=ids.device)
        shared = {}  # what all blocks of one type share
        for kind in set(c.layer_types):
            cos, sin = rotary(c.rope[kind], positions, c.head_dim)
            window = c.sliding_window if kind == "sliding_attention" else 0
            shared[kind] = cos.to(x.dtype), sin.to(x.dtype), visible(new, length, window, pad, ids.device)
        for i, (block, kind) in enumerate(zip(self.model.layers, c.layer_types)):
            arguments = (x, *shared[kind], cache[i] if cache else None)
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        return self.lm_head(self.model.norm(x))

    @torch.no_grad()
    def generate(self, ids, count, pad=None, stop=()):
        """Greedy continuation, at most until each row has a token of stop: (batch, T) -> (batch, at most T + count)."""
        cache, done, new = [Past() for _ in self.model.layers], torch.zeros_like(ids[:, :1], dtype=torch.bool), ids
        stop = torch.tensor(stop, dtype=ids.dtype, device=ids.device)
        for _ in range(count):
            new = self(new, cache, pad)[:, -1:].argmax(dim=-1)
            ids, done = torch.cat([ids, new], dim=1), done | torch.isin(new, stop)
            if done.all():
                break
        return ids


# ---------------------------------------------------------------------------------------------------
# Checkpoints: a folder as the model hubs distribute it, with config.json, *.safetensors and tokenizer.json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3")
LAYER_TYPES = ("sliding_attention", "full_attention")


def read_json(folder, name):
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


def need(module, purpose):
    """Import an optional package, or end with the line that says what to install."""
    try:
        return __import__(module)
    except ImportError:
        sys.exit(f"{purpose} needs {module}: pip install {module}")


def read_config(folder):
    """config.json of a supported family -> Config. Raises ValueError for what this model cannot do."""
    c = read_json(folder, "config.json")
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder} is of the family {family!r}; supported are {', '.join(FAMILIES)}")
    c = {**c, **c.get("text_config", {})}  # Gemma 3 with a vision tower, which is left out
    c = {key: value for key, value in c.items() if value is not None}
    gemma, biased = family.startswith("gemma3"), c.get("attention_bias", False)
    window = c.get("sliding_window", 0) if family == "mistral" or gemma or c.get("use_sliding_window") else 0
    pattern = c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    full = [not window or (gemma and (i + 1) % pattern == 0) for i in range(c["num_hidden_layers"])]
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 1e4), **c.get("rope_scaling", {})}
    if "rope_theta" in rope:  # one for all layers; older Gemma 3 files give the sliding ones their own base
        local = {"rope_theta": c.get("rope_local_base_freq", 1e4)} if gemma else rope
        rope = {"full_attention": rope, "sliding_attention": local}
    switches = dict(
        tie_word_embeddings=c.get("tie_word_embeddings", gemma),
        qkv_bias=biased or family == "qwen2",
        o_bias=biased and family != "qwen2",
        qk_norm=family == "qwen3" or gemma,
        gemma=gemma,
        activation=c.get("hidden_activation", "gelu_pytorch_tanh") if gemma else c.get("hidden_act", "silu"),
        attention_scale=c.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else 0,
        layer_types=c.get("layer_types") or [LAYER_TYPES[i] for i in full],
        sliding_window=window,
        rope={kind: {"rope_type": r.get("type", "default"), **r} for kind, r in rope.items() if kind in LAYER_TYPES},
    )
    result = Config(**{key: c[key] for key in Config.__dataclass_fields__ if key in c} | switches)
    odd = {
        "hidden_act": {result.activation} - set(ACTIVATIONS),
        "layer_types": set(result.layer_types) - set(LAYER_TYPES),
        "rope_type": {r["rope_type"] for r in result.rope.values()} - {"default", "linear", "llama3"},
        **{
            key: {c.get(key, False)} - {False}
            for key in ("mlp_bias", "final_logit_softcapping", "attn_logit_softcapping")
        },
    }
    for key, values in odd.items():
        if values:
            raise ValueError(f"{folder}/config.json: {key} {values.pop()!r} is not supported")
    return result


def load_checkpoint(model, folder):
    """Fill the model's base from the folder's safetensors, whole or the shard of it that FSDP2 keeps here.

    Raises ValueError, before anything is read, that names the tensors which are missing, surplus or of another shape.
    """
    need("safetensors", "--checkpoint")
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(folder)
    stored = {name: tuple(x.size) for name, x in reader.read_metadata().state_dict_metadata.items()}
    if not stored:
        raise ValueError(f"{folder} holds no *.safetensors")
    # Models with a vision tower keep the decoder under a longer name.
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in stored), "model.")
    mlp_norm = "pre_feedforward_layernorm" if model.config.gemma else "post_attention_layernorm"
    wanted = {
        re.sub(r"^model\.", prefix, name).replace("pre_feedforward_layernorm", mlp_norm): p
        for name, p in model.named_parameters()
    }
    beside = ("rotary_emb.inv_freq", *(["lm_head.weight"] if model.config.tie_word_embeddings else []))
    tower = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    wrong = {
        "misses": wanted.keys() - stored.keys(),
        "holds unknown": {
            n for n in stored.keys() - wanted.keys() if not n.endswith(beside) and not n.startswith(tower)
        },
        "holds in another shape": {n for n in stored.keys() & wanted.keys() if stored[n] != wanted[n].shape},
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder} {what}: {', '.join(sorted(names)[:5])}{more}")
    load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())


# ---------------------------------------------------------------------------------------------------
# The data. A source of batches is a function of the step alone, so that a run can stop and go on anywhere:
# batch(step) -> ids (batch, T) and labels (batch, T), labels being the next tokens, IGNORE where there is no loss.

IGNORE = -100
VOCABULARY = "0123456789+-="
ANSWER = 3  # digits
TASKS = {"add": "a+b", "subtract": "a-b", "two-step": "a+b-c"}  # no result is negative


def operand_pairs(held_out):
    """All (a, b) below 100 that are for testing (a tenth) or for training: (N, 2).

    (a, b) and (b, a) are on the same side, whatever the seed: no phase of any run trains on a pair that another tests.
    """
    draw = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)).triu()
    return ((draw + draw.triu(1).T < 0.1) == held_out).nonzero()


def render(task, pairs, generator):
    """Sums as rows of token ids, the last ANSWER tokens being the answer, its lowest digit first, as one adds on paper.

    (N, 2) operand pairs -> (N, T).
    """
    a, b = pairs.T
    if task == "subtract":
        a, b = torch.maximum(a, b), torch.minimum(a, b)
    most = (a + b).clamp(max=99) + 1
    c = (torch.rand(len(a), generator=generator) * most).long()
    value = {"add": a + b, "subtract": a - b, "two-step": a + b - c}[task]

    def digits(number, count):  # lowest first
        return number[:, None] // 10 ** torch.arange(count) % 10

    terms = {"a": digits(a, 2).flip(1), "b": digits(b, 2).flip(1), "c": digits(c, 2).flip(1)}
    signs = {sign: torch.full((len(a), 1), VOCABULARY.index(sign)) for sign in "+-="}
    columns = [(terms | signs)[character] for character in TASKS[task] + "="]
    return torch.cat([*columns, digits(value, ANSWER)], dim=1)


def show(row):
    """Token ids as one reads them: 12+34=046."""
    text = "".join(VOCABULARY[i] for i in row)
    return text[:-ANSWER] + text[-ANSWER:][::-1]


def shifted(rows):
    """Rows of a sum -> ids and labels, with a loss on the answer's tokens."""
    labels = rows[:, 1:].clone()
    labels[:, :-ANSWER] = IGNORE
    return rows[:, :-1], labels


def seeded(*numbers):
    """A generator that depends on all of the numbers."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big"))


def sum_batches(task, batch_size, seed):
    pairs = operand_pairs(held_out=False)

    def batch(step):
        generator = seeded(seed, step)
        chosen = torch.randint(len(pairs), (batch_size,), generator=generator)
        return shifted(render(task, pairs[chosen], generator))

    return batch


class Bytes:
    """The vocabulary of a run without a checkpoint: 256 bytes and an end."""

    size, stop = 257, (256,)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Tokens:
    """A checkpoint's tokenizer.json; ends where its generation_config.json or else its config.json says."""

    def __init__(self, folder):
        tokenizers = need("tokenizers", "--checkpoint with text")
        self.tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        files = [
            name for name in ("generation_config.json", "config.json") if os.path.exists(os.path.join(folder, name))
        ]
        stops = [read_json(folder, name).get("eos_token_id") for name in files]
        stop = next((stop for stop in stops if stop is not None), ())
        self.stop = (stop,) if isinstance(stop, int) else tuple(stop)

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


TEMPLATE = (  # of the paper's code and of Alpaca before it
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def read_record(raw, vocabulary, cutoff):
    """A record, or the line that holds it, with prompt and target token ids. Raises ValueError if it cannot be used."""
    record = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(record, dict):
        raise ValueError(f"a record has fields, and this is {json.dumps(record)[:20]}")
    for key in ("instruction", "output", "answer"):
        if not str(record.get(key) or "").strip():
            raise ValueError(f"{key} is missing or empty")
    more = f"### Input:\n{record['input'].strip()}\n\n" if record.get("input") else ""
    prompt = vocabulary.encode(TEMPLATE.format(instruction=record["instruction"].strip(), input=more))
    target = [*vocabulary.encode(record["output"].strip()), *vocabulary.stop[:1]]
    if len(prompt) + len(target) > cutoff:
        raise ValueError(f"{len(prompt) + len(target)} tokens, and --cutoff is {cutoff}")
    return {**record, "prompt_ids": prompt, "target_ids": target}


def read_records(path, vocabulary, cutoff, on_bad="skip"):
    """A JSON list or JSON lines of {instruction, input, output, answer} -> those with prompt and target token ids.

    Whatever is wrong with a record is said with its position; on_bad "stop" ends the run there, "skip" goes on.
    """
    with open(path) as file:
        text = file.read()
    try:
        raw = json.loads(text)
        raw = raw if isinstance(raw, list) else [raw]
    except json.JSONDecodeError:
        raw = [line for line in text.splitlines() if line.strip()]
    good = []
    for position, record in enumerate(raw, 1):
        try:
            good.append(read_record(record, vocabulary, cutoff))
        except (ValueError, AttributeError) as error:
            if on_bad == "stop":
                sys.exit(f"{path}, record {position}: {error} (--on-bad skip goes on)")
            if position - len(good) <= 3:
                say(f"{path}, record {position}: {error}: left out")
    bad = len(raw) - len(good)
    say(f"{path}: {len(good)} records" + (f", {bad} left out" if bad else ""))
    if not good:
        takes = "it takes a JSON list or JSON lines of instruction, input, output, answer"
        sys.exit(f"{path} holds no usable record: {takes}")
    return good


def record_batches(records, batch_size, seed, loss_on="answer"):
    """Batches of records of similar length, in another order each epoch."""
    ids = [torch.tensor(r["prompt_ids"] + r["target_ids"]) for r in records]
    labels = [tokens.clone() for tokens in ids]
    if loss_on == "answer":
        for record, tokens in zip(records, labels):
            tokens[: len(record["prompt_ids"])] = IGNORE

    @functools.lru_cache(maxsize=1)
    def plan(epoch):
        generator = seeded(seed, epoch)
        order = torch.randperm(len(records), generator=generator).tolist()
        chunk = 50 * batch_size  # sorted within chunks: alike in length, and still shuffled
        for i in range(0, len(order), chunk):
            order[i : i + chunk] = sorted(order[i : i + chunk], key=lambda record: len(ids[record]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def batch(step):
        epoch, place = divmod(step, -(-len(records) // batch_size))
        chosen = plan(epoch)[place]
        return (
            pad_sequence([ids[i][:-1] for i in chosen], batch_first=True),
            pad_sequence([labels[i][1:] for i in chosen], batch_first=True, padding_value=IGNORE),
        )

    return batch


# ---------------------------------------------------------------------------------------------------
# Training


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    if is_main():
        print(text, flush=True)


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every tenth of the way."""

    def __init__(self, label, total, seconds=0.0):
        self.label, self.total, self.start = label, total, time.perf_counter() - seconds

    def seconds(self):
        return time.perf_counter() - self.start

    def __call__(self, done, what=""):
        last, live = done == self.total, sys.stdout.isatty()
        if not is_main() or not (last or done % (10 if live else max(1, self.total // 10)) == 0):
            return
        left = self.seconds() * (self.total - done) / done
        what = f"loss {what.item():.4f}" if torch.is_tensor(what) else what
        line = f"{self.label:<22} {done}/{self.total}  {what}  {left:3.0f} s left"
        print(f"\r{line:<78}" if live else line, end="\n" if last or not live else "", flush=True)


def answer_loss(model, ids, labels):
    """Sum of the cross entropies over the labels."""
    logits = model(ids).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def save_state(path, state):
    """A disk that is full ends the run, and leaves the last state whole."""
    try:
        save_atomically(state, path)
    except OSError as error:
        sys.exit(f"\ncould not write {path}: {error}. What was saved there last is whole; --resume goes on from it")


@contextlib.contextmanager
def interrupts():
    """A list that Ctrl-C and SIGTERM fill, to be read after a step, when the state is whole; a second one acts now."""
    heard = []
    with contextlib.ExitStack() as restore:

        def hear(number, frame):
            heard.append(number)
            restore.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            restore.callback(signal.signal, number, signal.signal(number, hear))
        yield heard


def gradients(loss_of, model, parameters, ids, labels, accumulate, heard):
    """Sets each p.grad to that of the mean loss over the labels. Returns (this loss, whether a signal was heard).

    Each process of a torchrun takes its share of the rows, in `accumulate` parts, and all get the sum over all.
    """
    device = parameters[0].device
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts, count, total = ranks * accumulate, (labels != IGNORE).sum(), 0.0
    more = (0, 0, 0, -len(ids) % parts)  # rows without a label: the parts are alike, and no process is without one
    ids, labels = F.pad(ids, more).to(device), F.pad(labels, more, value=IGNORE).to(device)
    for part in range(rank, parts, ranks):
        loss = loss_of(model, ids[part::parts], labels[part::parts]) / count
        loss.backward()
        total = total + loss.detach()
    if ranks > 1:  # in one message, also whether to stop: all do so after the same step, whichever heard it
        stop = torch.tensor(float(bool(heard)), device=device)
        shared = [total, stop, *(p.grad for p in parameters)]
        vector = parameters_to_vector(shared)
        dist.all_reduce(vector)
        vector_to_parameters(vector, shared)
        heard = stop.item()
    return total, bool(heard)


def pace(step, steps, warmup):
    """The share of the learning rate that a step takes: a linear warm-up, then a linear decay to zero."""
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1)


def check_finite(loss, parameters, where, state):
    """Ends the run before anything broken is saved."""
    what = f"the loss is {loss.item()}" if not loss.isfinite() else "the weights are not finite"
    if not all(x.isfinite().all() for x in (loss, *parameters)):
        kept = f" {state} holds the last good state, if one was saved" if state else ""
        sys.exit(f"\n{where}: {what}: lower --lr, or look at the data.{kept}")


def load_state(path, model, optimizer):
    """(steps done, seconds they took) of the state in path, which the adapters and the optimizer get."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    set_hyplora_state_dict(model, saved["adapters"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["seconds"]


def train(model, parameters, batch, steps, lr, seed, label, *, warmup=20, accumulate=1, compile=False, state=None,
          save_every=0, resume=False):  # fmt: skip
    """AdamW with a linear warm-up and a linear decay to zero. Returns the seconds that all of it took.

    With a state file, the adapters and the optimizer are written there every save_every steps, and with resume read
    from there; all else depends on the step alone, so that a resumed run ends where an uninterrupted one does.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first, seconds, tokens = 0, 0.0, 0
    if resume and state and os.path.exists(state):
        first, seconds = load_state(state, model, optimizer)
        say(f"{label}: going on from step {first} of {state}")
    loss_of = torch.compile(answer_loss) if compile else answer_loss
    progress = Progress(label, steps, seconds)
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    with interrupts() as heard:
        for step in range(first, steps):
            torch.manual_seed(seeded(seed, step, "dropout").initial_seed())
            ids, labels = batch(step)
            loss, stop = gradients(loss_of, model, parameters, ids, labels, accumulate, heard)
            tokens += ids.numel()
            for group in optimizer.param_groups:
                group["lr"] = lr * pace(step, steps, warmup)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            progress(done, loss)
            saves = stop or done == steps or save_every and done % save_every == 0
            if saves or step % 50 == 0:
                check_finite(loss, parameters, f"{label}, step {done}", state)
            if saves and state and is_main():
                content = {"adapters": hyplora_state_dict(model), "optimizer": optimizer.state_dict()}
                save_state(state, {**content, "step": done, "seconds": progress.seconds()})
            if stop:
                go_on = f"saved to {state}; the same command with --resume goes on" if state else "nothing to save"
                say(f"\n{label}: stopped at step {done}, {go_on}")
                sys.exit(130)
    if parameters[0].is_cuda:
        speed, peak = tokens / (progress.seconds() - seconds), torch.cuda.max_memory_allocated() / 2**30
        say(f"{label}: {speed:.0f} tokens/s, at most {peak:.1f} GB on this GPU")
    return progress.seconds()


# ---------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def score_sums(model, task, device):
    """(exact match of greedy answers in percent, loss per token of the answer) on the held-out pairs."""
    model.eval()
    rows = render(task, operand_pairs(held_out=True), torch.Generator().manual_seed(1)).to(device)
    right = (model.generate(rows[:, :-ANSWER], ANSWER) == rows).all(dim=1)
    loss = answer_loss(model, *shifted(rows)) / (len(rows) * ANSWER)
    return 100 * right.float().mean().item(), loss.item()


@torch.no_grad()
def loss_on_records(model, records, device):
    """Loss per token of the answers."""
    model.eval()
    total = count = 0
    batch = record_batches(records, 16, 0)
    for step in range(-(-len(records) // 16)):
        ids, labels = batch(step)
        total += answer_loss(model, ids.to(device), labels.to(device)).item()
        count += (labels != IGNORE).sum().item()
    return total / count


def is_right(output, answer):
    """The paper's scoring: the last number within 0.001 of the answer, or for choices the last letter, (A) to (E)."""
    answer = str(answer).strip()
    if re.fullmatch("[A-E]", answer):
        found = re.findall(r"\(([A-E])\)", output) or re.findall(r"\b([A-E])\b", output)
        return bool(found) and found[-1] == answer
    found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
    return bool(found) and abs(float(found[-1]) - float(answer.replace(",", ""))) <= 0.001


def score_records(model, records, vocabulary, batch_size, count, device, label):
    """Greedy answers in batches of similar length -> (number right, the answers in the order of the records)."""
    model.eval()
    order = sorted(range(len(records)), key=lambda i: -len(records[i]["prompt_ids"]))
    answers, right, progress = [""] * len(records), 0, Progress(label, len(records))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [torch.tensor(records[i]["prompt_ids"], device=device) for i in chosen]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        width = ids.shape[1]
        pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        for i, row in zip(chosen, model.generate(ids, count, pad, vocabulary.stop)[:, width:].tolist()):
            answers[i] = vocabulary.decode(list(itertools.takewhile(lambda token: token not in vocabulary.stop, row)))
            right += is_right(answers[i], records[i]["answer"])
        progress(start + len(chosen), f"{right} right")
    return right, answers


def table(rows, total):
    """The table as lines of Markdown; rows of one name are seeds, shown as their mean ± standard deviation."""

    def cell(values, form):
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    metrics = list(rows[0]["metrics"])
    lines = [
        f"| | trainable | share | {' | '.join(metrics)} | seconds | K / width |",
        f"| --- | ---: | ---: |{' ---: |' * len(metrics)} ---: | ---: |",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        K = sum((run["K"] for run in runs), [])
        ended = f"{statistics.mean(K):.3g} ({min(K):.2g} to {max(K):.2g})" if K and max(K) < math.inf else "-"
        cells = [cell([run["metrics"][m] for run in runs], ".4f" if "loss" in m else ".1f") for m in metrics]
        cells.append(cell([run["seconds"] for run in runs], ".1f"))
        share = 100 * runs[0]["trainable"] / total
        lines.append(f"| {name} | {runs[0]['trainable']} | {share:.1f} % | {' | '.join(cells)} | {ended} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# The base model, what it learns, and one adapter on it


def keyed(*shaped_by):
    """A short name for everything that shaped a file."""
    return hashlib.sha256(repr((shaped_by, torch.__version__)).encode()).hexdigest()[:12]


def shard(model, device):
    """FSDP2: each process keeps a part of every block, and gathers a block when it computes it.

    This is for the frozen base: adapters that are injected later stay whole on every process.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def from_checkpoint(args, device):
    """The checkpoint's model on the device, frozen; sharded before any weight takes memory."""
    with torch.device("meta"):
        model = GPT(read_config(args.checkpoint)).to(getattr(torch, args.dtype)).requires_grad_(False)
    model = (shard(model, device) if args.shard else model).to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty parts them
    load_checkpoint(model, args.checkpoint)
    return model


def tiny(args, vocab_size):
    """The configuration of the GPT made here."""
    hidden = -(-args.width * 8 // 3 // 16) * 16
    return Config(vocab_size, args.width, hidden, args.layers, args.heads, max(1, args.heads // 2))


def pretrained_base(args, config, batch, what, device):
    """A GPT trained from scratch on the batches, from the cache if all that shapes it, this file too, is as it was."""
    recipe = dict(steps=args.base_steps, lr=5e-3, seed=0)
    with open(__file__, "rb") as file:
        path = os.path.join(args.out, f"base-{keyed(config, recipe, what, device.type, file.read())}.pt")
    torch.manual_seed(0)
    model = GPT(config).to(device)
    if os.path.exists(path):
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        say(f"base: {path} (cached)")
    else:
        train(model, model.parameters(), batch, label=f"base: learning {what[0]}", **recipe)
        if is_main():
            save_state(path, model.state_dict())
    model.requires_grad_(False).to(getattr(torch, args.dtype))
    return shard(model, device) if args.shard else model


def sums(args, device):
    """The sanity check: (base, the batches of a seed, steps, evaluate)."""
    base = pretrained_base(args, tiny(args, len(VOCABULARY)), sum_batches("add", 256, 0), ("a+b",), device)
    before = score_sums(base, "add", device)[0]

    def evaluate(model, name=None):
        new, loss = score_sums(model, args.task, device)
        metrics = {f"loss, {args.task}": loss, f"% {args.task}": new, "% add": score_sums(model, "add", device)[0]}
        if name:
            with disable_hyplora(model):
                off = score_sums(model, "add", device)[0]
            if off != before:
                raise RuntimeError("with its adapter disabled the model is not the base any more")
        return {**metrics, "% add, adapter off": before}

    return base, functools.partial(sum_batches, args.task, args.batch_size), args.steps or 500, evaluate


def text(args, device):
    """Real data, on a checkpoint or on a byte-level GPT that has read the questions: as sums() returns."""
    vocabulary = Tokens(args.checkpoint) if args.checkpoint else Bytes()
    read = functools.partial(read_records, vocabulary=vocabulary, cutoff=args.cutoff, on_bad=args.on_bad)
    records, tests = read(args.data), {path: read(path) for path in args.eval}
    if args.checkpoint:
        base = from_checkpoint(args, device)
    else:
        batch = record_batches([{**r, "target_ids": []} for r in records], args.batch_size, 0, loss_on="all")
        what = ("the questions", args.batch_size, [r["prompt_ids"] for r in records])
        base = pretrained_base(args, tiny(args, Bytes.size), batch, what, device)

    def evaluate(model, name="base"):
        metrics, rights = {"loss": loss_on_records(model, next(iter(tests.values()), records)[:64], device)}, 0
        for path, test in tests.items():
            file = os.path.basename(path)
            batching = args.eval_batch_size, args.max_new_tokens, device, f"{name}: {file}"
            right, answers = score_records(model, test, vocabulary, *batching)
            metrics[f"% {os.path.splitext(file)[0]}"] = 100 * right / len(test)
            rights += right
            say(f"  for example: {answers[0][:200]!r}, where {test[0]['answer']} is right")
        if tests:
            metrics["M.AVG"] = 100 * rights / sum(map(len, tests.values()))
        return metrics

    steps = args.steps or args.epochs * -(-len(records) // args.batch_size)
    return base, lambda seed: record_batches(records, args.batch_size, seed, args.loss_on), steps, evaluate


def adapt(base, args, batch, steps, curvature, seed, evaluate):
    """Inject, train and save one adapter: (its file, its row of the table)."""
    name = "LoRA" if curvature == math.inf else f"HypLoRA {curvature:g}"
    torch.manual_seed(seed)
    options = {k: getattr(args, k) for k in ("rank", "alpha", "dropout")}
    layers = [base.get_submodule(n) for n in inject_hyplora(base, args.targets, curvature=curvature, **options)]
    groups = hyplora_parameters(base)
    if dist.is_initialized():  # one start for all, whatever each machine's random numbers are
        for p in (p for group in groups for p in group["params"]):
            dist.broadcast(p.detach(), 0)
    skip = ("resume", "save_every", "out", "seed", "seeds", "curvature", "adapter", "eval")
    key = keyed({k: v for k, v in vars(args).items() if k not in skip}, curvature, seed)
    how = {k: getattr(args, k) for k in ("warmup", "accumulate", "compile", "save_every", "resume")}
    how["state"] = os.path.join(args.out, f"state-{key}.pt")
    seconds = train(base, groups, batch(seed), steps, args.lr, seed, f"{name}, seed {seed}", **how)
    row = {
        "name": name,
        "trainable": sum(p.numel() for group in groups for p in group["params"]),
        "metrics": evaluate(base, name),
        "seconds": seconds,
        "K": [layer.K.item() / layer.in_features for layer in layers],
    }
    learned = os.path.splitext(os.path.basename(args.data or args.task))[0]
    path = os.path.join(args.out, f"{learned}-{name.replace(' ', '-').lower()}-seed{seed}.pt")
    if is_main():
        save_hyplora(base, path)
    return path, row


def reload(base, path, task, device):
    """Takes the adapter from the base, loads the saved one, and shows that it answers as the trained one did."""
    asked = render(task, operand_pairs(held_out=True), torch.Generator().manual_seed(1))[::200].to(device)
    before = base.generate(asked[:, :-ANSWER], ANSWER)
    load_hyplora(remove_hyplora(base), path)
    answers = base.generate(asked[:, :-ANSWER], ANSWER)
    if not torch.equal(answers, before):
        raise RuntimeError(f"the adapter that was loaded from {path} answers otherwise than the one that was saved")
    marks = ["" if torch.equal(answer, right) else " (wrong)" for answer, right in zip(answers, asked)]
    say("Loaded into the bare base, it answers: " + ", ".join(show(a) + m for a, m in zip(answers, marks)))


# ---------------------------------------------------------------------------------------------------
# The command line


def positive(kind):
    """An argparse type: a number above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, SIZE = positive(int), positive(float)
OPTIONS = {
    "what to learn": {
        "--task": dict(choices=["subtract", "two-step"], default="subtract", help="a-b, or a+b-c; never below 0"),
        "--data": dict(metavar="FILE", help="JSON list or lines to learn: instruction, input, output, answer"),
        "--eval": dict(nargs="+", default=[], metavar="FILE", help="score the answers to these, by the paper's rules"),
        "--adapter": dict(choices=["lora", "hyplora", "both"], default="both", help="which adapters to train"),
        "--recipe": dict(choices=["paper"], help="the published rank, targets, lr, warm-up, batches, epochs, cutoff"),
    },
    "the adapter": {
        "--rank": dict(type=COUNT, default=8, help="rank of BA"),
        "--alpha": dict(type=SIZE, default=16.0, help="the update is scaled by alpha / rank"),
        "--curvature": dict(
            type=SIZE,
            nargs="+",
            default=[0.5],
            metavar="K",
            help="K in units of the layer's width, where HypLoRA starts; several values give one row each",
        ),
        "--dropout": dict(type=float, default=0.0, help="on the adapter's input"),
        "--targets": dict(nargs="+", default=["all-linear"], help="name endings of the layers to adapt, or all-linear"),
    },
    "training": {
        "--lr": dict(type=SIZE, default=5e-3, help="peak learning rate"),
        "--warmup": dict(type=COUNT, default=20, help="steps of linear warm-up"),
        "--steps": dict(type=COUNT, help="optimizer steps of each adapter (if not given: 500, or --epochs of --data)"),
        "--epochs": dict(type=COUNT, default=3, help="passes over --data"),
        "--batch-size": dict(type=COUNT, default=64, help="sums or records per step"),
        "--accumulate": dict(type=COUNT, default=1, help="parts in which a batch is computed, to save memory"),
        "--seed": dict(type=int, default=0, help="of the adapter's start and of its batches"),
        "--seeds": dict(
            type=COUNT, default=1, help="number of seeds, from --seed on; the table shows mean ± deviation"
        ),
        "--save-every": dict(type=COUNT, default=200, help="steps between two saves of the state"),
        "--resume": dict(action="store_true", help="go on from the state that the same command saved"),
    },
    "text, with --data": {
        "--cutoff": dict(type=COUNT, default=1024, help="longest record, in tokens"),
        "--loss-on": dict(choices=["answer", "all"], default="answer", help="tokens that are learned"),
        "--on-bad": dict(choices=["skip", "stop"], default="skip", help="what a record that cannot be used does"),
        "--max-new-tokens": dict(type=COUNT, default=256, help="longest answer when scoring"),
        "--eval-batch-size": dict(type=COUNT, default=32, help="answers generated at a time"),
    },
    "the base model": {
        "--checkpoint": dict(metavar="DIR", help=f"config.json, *.safetensors, tokenizer.json: {', '.join(FAMILIES)}"),
        "--width": dict(type=COUNT, default=64, help="hidden size of the GPT made here"),
        "--layers": dict(type=COUNT, default=3, help="its transformer blocks"),
        "--heads": dict(type=COUNT, default=4, help="its query heads, half as many key/value heads"),
        "--base-steps": dict(type=COUNT, default=500, help="its optimizer steps from scratch"),
    },
    "where and how it runs": {
        "--device": dict(choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one"),
        "--dtype": dict(choices=["float32", "bfloat16"], default="float32", help="of the base; adapters are float32"),
        "--compile": dict(action="store_true", help="torch.compile the training step (needs a C++ compiler)"),
        "--recompute": dict(action="store_true", help="activation checkpointing: less memory, a third more time"),
        "--shard": dict(action="store_true", help="under torchrun: FSDP2 spreads the base over the processes"),
        "--out": dict(default="runs", help="folder for the cached base, the states and the adapters"),
    },
}
PAPER = dict(  # the published recipe; alpha is twice the rank as in the code that the paper builds on
    rank=32, alpha=64.0, lr=3e-4, warmup=100, batch_size=16, epochs=3, cutoff=256,
    targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
)  # fmt: skip
TEXT = dict(lr=3e-4, batch_size=16, base_steps=300)  # defaults where --data replaces the sums


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a tiny GPT on addition, freeze it, and adapt it with LoRA and HypLoRA to sums it cannot do; "
        "or adapt a real checkpoint to real data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**(TEXT if known.data else {}) | (PAPER if known.recipe else {}))
    args = parser.parse_args(argv)
    if args.width % (2 * args.heads) or args.heads > 1 and args.heads % 2:
        parser.error(f"--width {args.width} must be a multiple of twice --heads {args.heads}, and --heads be 1 or even")
    if (args.eval or args.checkpoint) and not args.data:
        parser.error("--checkpoint and --eval go with --data: the sums are for the GPT made here")
    if args.shard and not dist.is_torchelastic_launched():
        parser.error("--shard spreads the base over processes: start them with torchrun --nproc-per-node N")
    if args.targets == ["all-linear"]:
        args.targets = "all-linear"
    return args


def main(argv=None):
    """Run the whole of it; returns the rows of the table."""
    args = parse_arguments(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(args.device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" now means
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    os.makedirs(args.out, exist_ok=True)
    base, batch, steps, evaluate = (text if args.data else sums)(args, device)
    base.recompute = args.recompute
    total = sum(p.numel() for p in base.parameters())
    rows = [{"name": "base", "trainable": 0, "metrics": evaluate(base), "seconds": 0, "K": []}]
    curvatures = {"lora": [math.inf], "hyplora": args.curvature, "both": [math.inf, *args.curvature]}[args.adapter]
    for curvature, seed in itertools.product(curvatures, range(args.seed, args.seed + args.seeds)):
        if len(rows) > 1:
            remove_hyplora(base)
        path, row = adapt(base, args, batch, steps, curvature, seed, evaluate)
        rows.append(row)
    say("\n" + table(rows, total))
    if dist.is_initialized():
        dist.barrier()  # the file is there for all
    say(f"\n{row['name']} is saved: {path} ({os.path.getsize(path) / 1024:.0f} KB)")
    if not args.data:
        reload(base, path, args.task, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
    if dist.is_torchelastic_launched():  # gloo's threads at times abort a process that ends in the ordinary way
        sys.stdout.flush()
        os._exit(0)
