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
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch mentions it; nothing here needs it
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.checkpoint import checkpoint

from hyplora import (
    HypLoRALinear,
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
    vocab_size: int = 13
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on each head's query and key
    gemma: bool = False  # norms scale by 1 + weight and stand behind each part too; embeddings are scaled
    activation: str = "silu"
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    layer_types: list = field(default_factory=list)  # empty: all "full_attention"
    sliding_window: int = 0  # how far back a "sliding_attention" layer sees
    rope: dict = field(default_factory=lambda: {"full_attention": {"rope_theta": 10000.0}})  # per layer type

    def __post_init__(self):
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
    """Which keys the last `queries` of `keys` positions may see: (batch or 1, 1, queries, keys), or None for all.

    window: how many positions back, 0 for no limit. pad: (batch,) number of left-padding tokens, or None.
    """
    if pad is None and queries == 1 and not 0 < window < keys:
        return None
    q, k = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    mask = (k <= q)[None, None]
    if window:
        mask = mask & (k > q - window)
    if pad is not None:
        mask = mask & (k >= pad[:, None, None, None]) | (k == q)  # padding sees itself: no row may be empty
    return mask


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.scale = c.head_dim, c.attention_scale
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)
        self.qk_norm = c.qk_norm

    def forward(self, x, cos, sin, mask, past):
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (batch, heads, T, head_dim)
        if past is not None:  # the layer's key/value cache: [keys, values] of what came before, or empty
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v))) if past else (k, v)
            past[:] = k, v
        # Fewer key/value heads than query heads: each serves a group of them.
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.tanh_gelu = c.activation == "gelu_pytorch_tanh"

    def forward(self, x):
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.tanh_gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gemma = c.gemma
        self.input_layernorm = RMSNorm(c.hidden_size, c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c)
        self.mlp = MLP(c)
        if c.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c)
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c)

    def forward(self, x, cos, sin, mask, past):
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        if self.gemma:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False  # recompute: activations in backward, to save memory
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
                "norm": RMSNorm(c.hidden_size, c),
            }
        )
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

        cache: one list per block, filled and extended in place; ids then continue what it holds.
        pad: (batch,) how many tokens of left padding a row begins with.
        """
        c, x = self.config, self.model.embed_tokens(ids)
        if c.gemma:
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype, device=x.device)
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        shared = {}  # what all blocks of one type share
        for kind in set(c.layer_types):
            cos, sin = rotary(c.rope[kind], positions, c.head_dim)
            window = c.sliding_window if kind == "sliding_attention" else 0
            plain = past == 0 and pad is None and not 0 < window < ids.shape[1]  # plain causal attention, no mask
            mask = None if plain else visible(ids.shape[1], past + ids.shape[1], window, pad, ids.device)
            shared[kind] = cos.to(x.dtype), sin.to(x.dtype), mask
        for i, (block, kind) in enumerate(zip(self.model.layers, c.layer_types)):
            arguments = (x, *shared[kind], cache[i] if cache else None)
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        return self.lm_head(self.model.norm(x))

    @torch.no_grad()
    def generate(self, ids, count, pad=None, stop=()):
        """Greedy continuation with a key/value cache: (batch, T) -> (batch, at most T + count).

        Ends early when every row has made a token of stop.
        """
        cache, done, new = [[] for _ in self.model.layers], torch.zeros_like(ids[:, :1], dtype=torch.bool), ids
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


def need(module, purpose):
    """Import an optional package, or end with the line that says what to install."""
    try:
        return __import__(module)
    except ImportError:
        sys.exit(f"{purpose} needs {module}: pip install {module}")


def read_config(folder):
    """config.json of a supported family -> Config. Raises ValueError for what this model cannot do."""
    with open(os.path.join(folder, "config.json")) as file:
        c = json.load(file)
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder} is of the family {family!r}; supported are {', '.join(FAMILIES)}")
    c = {**c, **c["text_config"]} if "text_config" in c else c  # Gemma 3 with a vision tower, which is left out
    gemma, layers = family.startswith("gemma3"), c["num_hidden_layers"]
    window = c.get("sliding_window") if family == "mistral" or gemma or c.get("use_sliding_window") else None
    pattern = c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    kinds = ("sliding_attention", "full_attention")
    types = [kinds[not window or (gemma and (i + 1) % pattern == 0)] for i in range(layers)]
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    if "rope_theta" in rope:  # one for all layers; older Gemma 3 files give the sliding ones their own base
        local = {"rope_theta": c.get("rope_local_base_freq", 1e4)} if gemma else rope
        rope = {"full_attention": rope, "sliding_attention": local}
    rope = {kind: {"rope_type": r.get("type", "default"), **r} for kind, r in rope.items() if kind in kinds}
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    result = Config(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=head_dim,
        rms_norm_eps=c.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=c.get("tie_word_embeddings", gemma),
        qkv_bias=c.get("attention_bias", family == "qwen2") or family == "qwen2",
        o_bias=bool(c.get("attention_bias")) and family != "qwen2",
        qk_norm=family == "qwen3" or gemma,
        gemma=gemma,
        activation=c.get("hidden_activation" if gemma else "hidden_act", "gelu_pytorch_tanh" if gemma else "silu"),
        attention_scale=(c.get("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
        layer_types=c.get("layer_types") or types,
        sliding_window=window or 0,
        rope=rope,
    )
    refused = {
        "rope_type": [r["rope_type"] for r in rope.values() if r["rope_type"] not in ("default", "linear", "llama3")],
        "hidden_act": [a for a in [result.activation] if a not in ("silu", "gelu_pytorch_tanh")],
        "layer_types": [kind for kind in result.layer_types if kind not in kinds],
        **{key: [c[key]] for key in ("mlp_bias", "final_logit_softcapping", "attn_logit_softcapping") if c.get(key)},
    }
    for key, values in refused.items():
        if values:
            raise ValueError(f"{folder}/config.json: {key} {values[0]!r} is not supported")
    return result


def load_checkpoint(model, folder):
    """Fill the model's base from the folder's safetensors, whole or the shard of it that FSDP2 keeps here.

    Raises ValueError, before anything is read, that names the tensors which are missing, surplus or of another shape.
    """
    need("safetensors", "--checkpoint")
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    stored = {
        name: meta.size for name, meta in HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata.items()
    }
    if not stored:
        raise ValueError(f"{folder} holds no *.safetensors")
    # Models with a vision tower keep the decoder under a longer name.
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in stored), "model.")
    wanted = {}
    for name, p in model.named_parameters():
        if not name.endswith(("lora_A", "lora_B", "log_K")):
            name = name.replace(".base.", ".")
            wanted[prefix + name[6:] if name.startswith("model.") else name] = p
    beside = ("rotary_emb.inv_freq", *(["lm_head.weight"] if model.config.tie_word_embeddings else []))
    other = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    missing = sorted(set(wanted) - set(stored))
    surplus = sorted(n for n in set(stored) - set(wanted) if not n.endswith(beside) and not n.startswith(other))
    shapes = [n for n in wanted if n in stored and tuple(stored[n]) != tuple(wanted[n].shape)]
    for what, names in (("misses", missing), ("holds unknown", surplus), ("holds in another shape", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder} {what}: {', '.join(names[:5])}{more}")
    load(wanted, storage_reader=HuggingFaceStorageReader(folder), no_dist=not dist.is_initialized())


# ---------------------------------------------------------------------------------------------------
# The data. A source of batches is a function of the step alone, so that a run can stop and go on anywhere:
# batch(step) -> ids (batch, T) and labels (batch, T), labels being the next tokens, IGNORE where there is no loss.

IGNORE = -100
VOCABULARY = "0123456789+-="
ANSWER = 3  # digits
TASKS = {"add": "a+b", "subtract": "a-b with a >= b", "two-step": "a+b-c with c <= a+b"}


def operand_pairs(held_out):
    """All (a, b) below 100 that are for testing (a tenth, held_out=True) or for training: (N, 2).

    (a, b) and (b, a) are on the same side, and the split does not depend on any seed: no phase of any run
    trains on a pair that another one tests.
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

    def digits(number, count):  # lowest first
        return [number // 10**i % 10 for i in range(count)]

    def sign(character):
        return [torch.full_like(a, VOCABULARY.index(character))]

    terms, value = {
        "add": ([a, "+", b], a + b),
        "subtract": ([a, "-", b], a - b),
        "two-step": ([a, "+", b, "-", c], a + b - c),
    }[task]
    columns = [sign(term) if isinstance(term, str) else digits(term, 2)[::-1] for term in terms]
    columns += [sign("="), digits(value, ANSWER)]
    return torch.stack(sum(columns, []), dim=1)


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
    """A checkpoint's tokenizer.json; ends where its config.json says."""

    def __init__(self, folder):
        path = os.path.join(folder, "tokenizer.json")
        self.tokenizer = need("tokenizers", "--checkpoint with text").Tokenizer.from_file(path)
        stop = None
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(folder, name)
            if stop is None and os.path.exists(path):
                with open(path) as file:
                    stop = json.load(file).get("eos_token_id")
        self.stop = tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


TEMPLATE = (  # of the paper's code and of Alpaca before it
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def read_records(path, vocabulary, cutoff, on_bad="skip", say=print):
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
    good, bad = [], 0
    for position, record in enumerate(raw, 1):
        try:
            record = json.loads(record) if isinstance(record, str) else record
            missing = [k for k in ("instruction", "output", "answer") if not str(record.get(k) or "").strip()]
            if missing:
                raise ValueError(f"{missing[0]} is missing or empty")
            more = f"### Input:\n{record['input'].strip()}\n\n" if record.get("input") else ""
            prompt = vocabulary.encode(TEMPLATE.format(instruction=record["instruction"].strip(), input=more))
            target = [*vocabulary.encode(record["output"].strip()), *vocabulary.stop[:1]]
            if len(prompt) + len(target) > cutoff:
                raise ValueError(f"{len(prompt) + len(target)} tokens, and --cutoff is {cutoff}")
            good.append({**record, "prompt_ids": prompt, "target_ids": target})
        except (ValueError, AttributeError) as error:
            bad += 1
            if on_bad == "stop":
                sys.exit(f"{path}, record {position}: {error} (--on-bad skip goes on)")
            if bad <= 3:
                say(f"{path}, record {position}: {error}: left out")
    say(f"{path}: {len(good)} records" + (f", {bad} left out" if bad else ""))
    if not good:
        sys.exit(
            f"{path} holds no usable record: it takes a JSON list or JSON lines of instruction, input, output, answer"
        )
    return good


def record_batches(records, batch_size, seed, loss_on="answer"):
    """Batches of records of similar length, in another order each epoch."""

    length = [len(r["prompt_ids"]) + len(r["target_ids"]) for r in records]

    @functools.lru_cache(maxsize=1)
    def plan(epoch):
        generator = seeded(seed, epoch)
        order = torch.randperm(len(records), generator=generator).tolist()
        chunk = 50 * batch_size  # sorted within chunks: alike in length, and still shuffled
        order = sum((sorted(order[i : i + chunk], key=length.__getitem__) for i in range(0, len(order), chunk)), [])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def batch(step):
        epoch, place = divmod(step, -(-len(records) // batch_size))
        numbers = plan(epoch)[place]
        chosen = [records[i] for i in numbers]
        ids = torch.zeros(len(chosen), max(length[i] for i in numbers) - 1, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        for row, record in enumerate(chosen):
            prompt, whole = record["prompt_ids"], torch.tensor(record["prompt_ids"] + record["target_ids"])
            ids[row, : len(whole) - 1] = whole[:-1]
            first = 0 if loss_on == "all" else len(prompt) - 1
            labels[row, first : len(whole) - 1] = whole[first + 1 :]
        return ids, labels

    return batch


# ---------------------------------------------------------------------------------------------------
# Training


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every tenth of the way."""

    def __init__(self, label, total, first=0):
        self.label, self.total, self.first, self.start = label, total, first, time.perf_counter()

    def __call__(self, done, what=""):
        last, live = done == self.total, sys.stdout.isatty()
        if not is_main() or not (last or done % (10 if live else max(1, self.total // 10)) == 0):
            return
        left = (time.perf_counter() - self.start) * (self.total - done) / (done - self.first)
        what = f"loss {what.item():.4f}" if torch.is_tensor(what) else what
        line = f"{self.label:<22} {done}/{self.total}  {what}  {left:3.0f} s left"
        print(f"\r{line:<78}" if live else line, end="\n" if last or not live else "", flush=True)


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    if is_main():
        print(text, flush=True)


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


class Interrupt:
    """Ctrl-C and SIGTERM are heard at the end of a step, when the state is whole; a second one acts at once."""

    def __enter__(self):
        self.heard, self.before = False, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in self.before:
            signal.signal(s, self.hear)
        return self

    def hear(self, *_):
        self.heard = True
        self.__exit__()

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def write_state(path, model, optimizer, step, seconds):
    """All that a run needs to go on: adapters, optimizer, step. All processes must call it, as parts may be sharded."""
    whole = StateDictOptions(full_state_dict=True)
    adapters, moments = hyplora_state_dict(model), get_optimizer_state_dict(model, optimizer, options=whole)
    if any(not t.isfinite().all() for name, t in adapters.items() if not name.endswith("log_K")):
        sys.exit(f"\nthe adapters are not finite at step {step}; {path} holds the last ones that were")
    if is_main():
        save_state(path, {"adapters": adapters, "optimizer": moments, "step": step, "seconds": seconds})


def read_state(path, model, optimizer):
    """(step, seconds) of what write_state wrote, which goes into the adapters and the optimizer."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    set_hyplora_state_dict(model, saved["adapters"])
    whole = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=whole)
    return saved["step"], saved["seconds"]


def processes():
    """(how many, the number of this one)"""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def add_gradients(model, loss_of, ids, labels, accumulate):
    """Gradients of the loss, the mean over the labels of the whole batch; returns what this process computed of it.

    Every process of a torchrun gets its share of the rows, cut again into `accumulate` parts: neither changes the
    result, up to rounding. Where there are fewer rows than parts, a part is empty: sharded models compute together.
    """
    device, (ranks, rank) = next(model.parameters()).device, processes()
    count, total = (labels != IGNORE).sum(), 0.0
    for part in range(rank, ranks * accumulate, ranks):
        rows = slice(part, None, ranks * accumulate)
        loss = loss_of(model, ids[rows].to(device), labels[rows].to(device)) / count
        (loss * ranks).backward()  # as what is averaged over the processes is their sum, then
        total = total + loss.detach()
    return total


def average(parameters, total, heard):
    """(loss of all processes, whether one of them was interrupted); gradients become the mean, unless FSDP2 did it."""
    ranks = processes()[0]
    if ranks == 1:
        return total, heard
    shared = torch.stack([total, torch.tensor(float(heard), device=total.device)])
    dist.all_reduce(shared)  # all stop at the same step, whichever heard it
    for p in parameters:
        if not hasattr(p, "device_mesh"):
            dist.all_reduce(p.grad)
            p.grad /= ranks
    return shared[0], bool(shared[1])


def train(model, parameters, batch, steps, lr, seed, label, *, warmup=20, accumulate=1, compile=False, state=None,
          save_every=0, resume=False):  # fmt: skip
    """AdamW with a linear warm-up and a linear decay to zero. Returns the seconds that all of it took.

    With a state file, the adapters and the optimizer are written there every save_every steps, and with resume read
    from there; all else depends on the step alone, so that a resumed run ends where an uninterrupted one does.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first, seconds, tokens = 0, 0.0, 0
    if resume and state and os.path.exists(state):
        first, seconds = read_state(state, model, optimizer)
        say(f"{label}: going on from step {first} of {state}")
    loss_of = torch.compile(answer_loss) if compile else answer_loss
    progress = Progress(label, steps, first)
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Interrupt() as interrupt:
        for step in range(first, steps):
            torch.manual_seed(seeded(seed, step, "dropout").initial_seed())
            ids, labels = batch(step)
            tokens += ids.numel()
            total = add_gradients(model, loss_of, ids, labels, accumulate)
            total, heard = average(parameters, total, interrupt.heard)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, total)
            saves = heard or step + 1 == steps or save_every and (step + 1) % save_every == 0
            if (saves or step % 50 == 0) and not total.isfinite():
                kept = f" {state} holds the last good state, if one was saved" if state else ""
                what = f"the loss is {total.item()} at step {step + 1}: lower --lr, or look at the data."
                sys.exit(f"\n{label}: {what}{kept}")
            if state and saves:
                write_state(state, model, optimizer, step + 1, seconds + time.perf_counter() - progress.start)
            if heard:
                go_on = f"saved to {state}; the same command with --resume goes on" if state else "nothing to save"
                say(f"\n{label}: stopped at step {step + 1}, {go_on}")
                sys.exit(130)
    if device.type == "cuda":
        speed = tokens / (time.perf_counter() - progress.start)
        say(f"{label}: {speed:.0f} tokens/s, at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GB on this GPU")
    return seconds + time.perf_counter() - progress.start


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
        width = max(len(records[i]["prompt_ids"]) for i in chosen)
        pad = torch.tensor([width - len(records[i]["prompt_ids"]) for i in chosen], device=device)
        ids = torch.tensor(
            [[0] * (width - len(p)) + p for p in (records[i]["prompt_ids"] for i in chosen)], device=device
        )
        for i, row in zip(chosen, model.generate(ids, count, pad, vocabulary.stop)[:, width:].tolist()):
            end = next((n for n, token in enumerate(row) if token in vocabulary.stop), len(row))
            answers[i] = vocabulary.decode(row[:end])
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
# The base model, and one adapter on it


def keyed(*shaped_by):
    """A short name for everything that shaped a file."""
    return hashlib.sha256(repr((shaped_by, torch.__version__)).encode()).hexdigest()[:12]


def pretrained_base(args, config, batch, what, device):
    """A GPT trained from scratch on the batches, from the cache if everything that shapes it is as it was."""
    recipe = dict(steps=args.base_steps, lr=5e-3, seed=0)
    model_parts = (GPT, Block, Attention, MLP, RMSNorm, rotary, rotate, visible)
    parts = (*model_parts, operand_pairs, render, shifted, seeded, sum_batches, record_batches, answer_loss, train)
    key = keyed(asdict(config), recipe, what, device.type, [inspect.getsource(part) for part in parts])
    path = os.path.join(args.out, f"base-{key}.pt")
    torch.manual_seed(0)
    model = GPT(config).to(device)
    if os.path.exists(path):
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        say(f"base: {path} (cached)")
    else:
        train(model, model.parameters(), batch, label=f"base: learning {what[0]}", **recipe)
        if is_main():
            save_state(path, model.state_dict())
    return model.requires_grad_(False)


def shard(model):
    """FSDP2: each process keeps a part of every block, and gathers a block when it computes it."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def from_checkpoint(args, device, prepare=lambda model: model):
    """The checkpoint's model on the device; prepare may inject and shard it before any weight takes memory."""
    with torch.device("meta"):
        model = GPT(read_config(args.checkpoint)).to(getattr(torch, args.dtype))
    model = prepare(model.requires_grad_(False)).to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty parts them
    load_checkpoint(model, args.checkpoint)
    return model


def inject(model, args, curvature, seed):
    """Adapters that the seed alone determines, on a device or (their base still weightless) on the CPU."""
    options = dict(rank=args.rank, alpha=args.alpha, dropout=args.dropout, curvature=curvature)
    inject_hyplora(model, args.targets, **options)
    torch.manual_seed(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, HypLoRALinear)]
    for layer in layers:
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad))
        layer.reset_parameters()
    return hyplora_state_dict(model), layers


def adapt(base, fresh, args, batch, steps, curvature, seed, evaluate, device):
    """Train one adapter: (the adapted model, one row of the table)."""
    name = "LoRA" if curvature == math.inf else f"HypLoRA {curvature:g}"
    start = {}

    def prepare(model):
        start.update(inject(model, args, curvature, seed)[0])
        return shard(model)

    if args.shard:
        model = fresh(prepare)
        set_hyplora_state_dict(model, start)
    else:
        model = base
        for layer in inject(model, args, curvature, seed)[1]:
            layer.to(device)
    model.recompute = args.recompute
    groups = hyplora_parameters(model)
    skip = ("resume", "save_every", "out", "seed", "seeds", "curvature", "adapter", "eval")
    key = keyed({k: v for k, v in vars(args).items() if k not in skip}, curvature, seed)
    seconds = train(
        model, groups, batch(seed), steps, args.lr, seed, f"{name}, seed {seed}", warmup=args.warmup,
        accumulate=args.accumulate, compile=args.compile, save_every=args.save_every, resume=args.resume,
        state=os.path.join(args.out, f"state-{key}.pt"),
    )  # fmt: skip
    K = {
        name.removesuffix(".log_K"): v.exp().item() for name, v in hyplora_state_dict(model).items() if "log_K" in name
    }
    return model, {
        "name": name,
        "trainable": sum(p.numel() for group in groups for p in group["params"]),
        "metrics": evaluate(model, name),
        "seconds": seconds,
        "K": [value / model.get_submodule(name).in_features for name, value in K.items()],
    }


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
    new_tasks = {name: formula for name, formula in TASKS.items() if name != "add"}
    add = parser.add_argument_group("what to learn").add_argument
    add("--task", choices=new_tasks, default="subtract", help="; ".join(f"{k}: {v}" for k, v in new_tasks.items()))
    add("--data", metavar="FILE", help="learn this instead: JSON list or lines of instruction, input, output, answer")
    add("--eval", nargs="+", default=[], metavar="FILE", help="score the answers to these, by the paper's rules")
    add("--adapter", choices=["lora", "hyplora", "both"], default="both", help="which adapters to train")
    add("--recipe", choices=["paper"], help="the published rank, targets, learning rate, batches, epochs and cutoff")
    add = parser.add_argument_group("the adapter").add_argument
    add("--rank", type=positive(int), default=8, help="rank of BA")
    add("--alpha", type=positive(float), default=16.0, help="the update is scaled by alpha / rank")
    help_K = "K in units of the layer's width, where HypLoRA starts; several values give one row each"
    add("--curvature", type=positive(float), nargs="+", default=[0.5], metavar="K", help=help_K)
    add("--dropout", type=float, default=0.0, help="on the adapter's input")
    add("--targets", nargs="+", default=["all-linear"], help="name endings of the layers to adapt, or all-linear")
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=positive(float), default=5e-3, help="peak learning rate")
    add("--warmup", type=positive(int), default=20, help="steps of linear warm-up")
    add("--steps", type=positive(int), help="optimizer steps of each adapter (default: 500, or --epochs of --data)")
    add("--epochs", type=positive(int), default=3, help="passes over --data")
    add("--batch-size", type=positive(int), default=64, help="sums or records per step")
    add("--accumulate", type=positive(int), default=1, help="parts in which a batch is computed, to save memory")
    add("--seed", type=int, default=0, help="of the adapter's start and of its batches")
    add(
        "--seeds",
        type=positive(int),
        default=1,
        help="number of seeds, from --seed on; the table shows mean ± deviation",
    )
    add("--save-every", type=positive(int), default=200, help="steps between two saves of the state")
    add("--resume", action="store_true", help="go on from the state that the same command saved")
    add = parser.add_argument_group("text, with --data").add_argument
    add("--cutoff", type=positive(int), default=1024, help="longest record, in tokens")
    add("--loss-on", choices=["answer", "all"], default="answer", help="tokens that are learned")
    add("--on-bad", choices=["skip", "stop"], default="skip", help="what a record that cannot be used does")
    add("--max-new-tokens", type=positive(int), default=256, help="longest answer when scoring")
    add("--eval-batch-size", type=positive(int), default=32, help="answers generated at a time")
    add = parser.add_argument_group("the base model").add_argument
    add("--checkpoint", metavar="DIR", help=f"config.json, *.safetensors, tokenizer.json of {', '.join(FAMILIES)}")
    add("--width", type=positive(int), default=64, help="hidden size of the GPT made here")
    add("--layers", type=positive(int), default=3, help="its transformer blocks")
    add("--heads", type=positive(int), default=4, help="its query heads, half as many key/value heads")
    add("--base-steps", type=positive(int), default=500, help="its optimizer steps from scratch")
    add = parser.add_argument_group("where and how it runs").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base; adapters are float32")
    add("--compile", action="store_true", help="torch.compile the training step (needs a C++ compiler)")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, a third more time")
    add("--shard", action="store_true", help="under torchrun: FSDP2 spreads the base over the processes")
    add("--out", default="runs", help="folder for the cached base, the states and the adapters")
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


def tiny(args, vocab_size):
    """The configuration of the GPT made here."""
    hidden = -(-args.width * 8 // 3 // 16) * 16
    return Config(vocab_size, args.width, hidden, args.layers, args.heads, max(1, args.heads // 2))


def sums(args, device):
    """The sanity check: (base, what batches are, steps, evaluate)."""
    base = pretrained_base(args, tiny(args, len(VOCABULARY)), sum_batches("add", 256, 0), ("a+b",), device)
    base = base.to(getattr(torch, args.dtype))
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

    return base, lambda seed: sum_batches(args.task, args.batch_size, seed), args.steps or 500, evaluate


def text(args, device):
    """Real data, on a checkpoint or on a byte-level GPT that has read the questions: as sums() returns."""
    vocabulary = Tokens(args.checkpoint) if args.checkpoint else Bytes()
    records = read_records(args.data, vocabulary, args.cutoff, args.on_bad, say)
    tests = {path: read_records(path, vocabulary, args.cutoff, args.on_bad, say) for path in args.eval}
    if args.checkpoint:
        base = None if args.shard else from_checkpoint(args, device)
    else:
        questions = [{**r, "target_ids": []} for r in records]
        batch = record_batches(questions, args.batch_size, 0, loss_on="all")
        with open(args.data, "rb") as file:
            what = ("the questions", hashlib.sha256(file.read()).hexdigest(), args.batch_size, args.cutoff)
        base = pretrained_base(args, tiny(args, Bytes.size), batch, what, device).to(getattr(torch, args.dtype))

    def evaluate(model, name="base"):
        model.eval()
        batch = record_batches((list(tests.values()) or [records])[0][:64], 16, 0)
        with torch.no_grad():
            parts = [batch(i) for i in range(4)]
            total = sum(answer_loss(model, ids.to(device), labels.to(device)).item() for ids, labels in parts)
        metrics = {"loss": total / sum((labels != IGNORE).sum().item() for _, labels in parts)}
        rights = []
        for path, test in tests.items():
            label = f"{name}: {os.path.basename(path)}"
            right, answers = score_records(
                model, test, vocabulary, args.eval_batch_size, args.max_new_tokens, device, label
            )
            metrics[f"% {os.path.splitext(os.path.basename(path))[0]}"] = 100 * right / len(test)
            rights.append(right)
            say(f"  for example: {answers[0][:200]!r}, where {test[0]['answer']} is right")
        if tests:
            metrics["M.AVG"] = 100 * sum(rights) / sum(map(len, tests.values()))
        return metrics

    steps = args.steps or args.epochs * -(-len(records) // args.batch_size)
    return base, lambda seed: record_batches(records, args.batch_size, seed, args.loss_on), steps, evaluate


def main(argv=None):
    """Run the whole of it; returns the rows of the table."""
    args = parse_arguments(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(args.device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    os.makedirs(args.out, exist_ok=True)
    base, batch, steps, evaluate = (text if args.data else sums)(args, device)

    def fresh(prepare):  # a sharded model is made anew for each adapter
        return from_checkpoint(args, device, prepare) if args.checkpoint else prepare(copy.deepcopy(base))

    rows, trained = [], None
    if base is not None:
        rows.append({"name": "base", "trainable": 0, "metrics": evaluate(base), "seconds": 0, "K": []})
    starts = {"lora": [math.inf], "hyplora": args.curvature, "both": [math.inf, *args.curvature]}[args.adapter]
    for curvature in starts:
        for seed in range(args.seed, args.seed + args.seeds):
            if trained is not None and not args.shard:
                remove_hyplora(base)
            trained, row = adapt(base, fresh, args, batch, steps, curvature, seed, evaluate, device)
            rows.append(row)
            name = os.path.splitext(os.path.basename(args.data or args.task))[0]
            path = os.path.join(args.out, f"{name}-{row['name'].replace(' ', '-').lower()}-seed{seed}.pt")
            save_hyplora(trained, path) if is_main() else hyplora_state_dict(trained)  # which all must gather
    if dist.is_initialized():
        dist.barrier()  # the file is there for all
    total = sum(p.numel() for name, p in trained.named_parameters() if not name.endswith(("lora_A", "lora_B", "log_K")))
    say("\n" + table(rows, total))
    if is_main():
        print(f"\n{row['name']} is saved: {path} ({os.path.getsize(path) / 1024:.0f} KB)")
    if not args.data and not args.shard:
        asked = render(args.task, operand_pairs(held_out=True), torch.Generator().manual_seed(1))[::200].to(device)
        before = trained.generate(asked[:, :-ANSWER], ANSWER)
        load_hyplora(remove_hyplora(base), path)
        answers = base.generate(asked[:, :-ANSWER], ANSWER)
        if not torch.equal(answers, before):
            raise RuntimeError(f"the adapter that was loaded from {path} answers otherwise than the one that was saved")
        marks = ["" if torch.equal(answer, right) else " (wrong)" for answer, right in zip(answers, asked)]
        say("Loaded into the bare base, it answers: " + ", ".join(show(a) + m for a, m in zip(answers, marks)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
    if dist.is_torchelastic_launched():  # gloo's threads at times abort a process that ends in the ordinary way
        sys.stdout.flush()
        os._exit(0)
