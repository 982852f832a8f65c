"""One decoder for Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma 3, in their own parameter names.

All of these families are the same machine: an embedding, blocks of attention and a gated MLP with
an RMSNorm before each, and a head that turns the last hidden state into logits. `Config` lists the
switches in which they differ. `checkpoint.py` reads them from a config.json.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FULL = "full_attention"
SLIDING = "sliding_attention"
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@dataclass
class Config:
    """The shape of a decoder. No field has a default: a value that is not known is an error."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # each key/value head serves a group of query heads
    head_dim: int
    rms_norm_eps: float
    activation: str  # a key of ACTIVATIONS
    attention_scale: float  # multiplies the attention scores
    tie_word_embeddings: bool  # the head's weight is the embedding's
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool  # an RMSNorm on each head's query and key
    norm_offset: float  # an RMSNorm scales by weight + norm_offset
    post_norms: bool  # an RMSNorm behind the attention and behind the MLP too
    scale_embeddings: bool  # embeddings are multiplied by sqrt(hidden_size)
    layer_types: list  # FULL or SLIDING for each layer
    sliding_window: int | None  # how many tokens a SLIDING layer sees, itself included
    rope: dict  # for each layer type: rope_type, rope_theta and what this type needs


class RMSNorm(nn.Module):
    def __init__(self, size, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))

    def forward(self, x):
        if self.offset == 0:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # Gemma adds the offset in float32, where a small weight is not lost beside it.
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


def rotary(rope, positions, head_dim):
    """The rotary embedding's cosine and sine: positions (T,) -> two tensors (T, head_dim).

    The first and the second half of the last dimension are equal, as `rotate` pairs element i with
    element i + head_dim / 2. rope_type "linear" stretches all waves by a factor; "llama3" stretches
    the long ones, keeps the short ones, and blends between (Llama 3.1's model card).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    frequency = rope["rope_theta"] ** -exponents
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    angle = positions[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_mask(queries, keys, window, pad, device):
    """Which of the `keys` positions the last `queries` of them may see.

    window: how many positions a query sees, itself included; None is no limit. pad: (batch,), how
    many tokens of left padding each row begins with, or None. Returns a boolean mask that
    broadcasts to (batch, heads, queries, keys), or None where each query sees all positions up to
    its own, which scaled_dot_product_attention can do without a mask.
    """
    limited = window is not None and window < keys
    if pad is None and not limited and queries in (1, keys):
        return None
    key = torch.arange(keys, device=device)
    query = key[-queries:, None]
    mask = key <= query
    if limited:
        mask = mask & (key > query - window)
    if pad is not None:
        mask = mask & (key >= pad[:, None, None, None])
        mask = mask | (key == query)  # A padding token sees itself, as no row may be empty.
    return mask


class KeyValueCache:
    """The keys and values that one block has computed so far.

    The cache of a model is a list of these, one for each block. They are objects that are changed
    in place because FSDP2 hands copies of lists and dictionaries to a module.
    """

    def __init__(self):
        self.length = 0
        self.keys = None
        self.values = None

    def extend(self, keys, values):
        """Append (batch, heads, new, head_dim); returns all keys and values so far."""
        if self.length > 0:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys = keys
        self.values = values
        self.length = keys.shape[2]
        return keys, values

    def select(self, rows):
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        self.keys = self.keys[rows]
        self.values = self.values[rows]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else nn.Identity()

    def split_heads(self, x):
        """(batch, T, heads * head_dim) -> (batch, heads, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin, mask, cache):
        q = rotate(self.q_norm(self.split_heads(self.q_proj(x))), cos, sin)
        k = rotate(self.k_norm(self.split_heads(self.k_proj(x))), cos, sin)
        v = self.split_heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = mask is None and q.shape[2] > 1
        # enable_gqa lets each key/value head serve a group of query heads.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. Its norms have the names of Gemma 3.

    What the other families call post_attention_layernorm stands before the MLP, so here it is
    pre_feedforward_layernorm; `checkpoint.py` translates.
    """

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = RMSNorm(size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.Identity()
        self.pre_feedforward_layernorm = RMSNorm(size, config)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = nn.Identity()
        if config.post_norms:
            self.post_attention_layernorm = RMSNorm(size, config)
            self.post_feedforward_layernorm = RMSNorm(size, config)

    def forward(self, x, cos, sin, mask, cache):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.post_attention_layernorm(attended)
        transformed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(transformed)


class Decoder(nn.Module):
    """A decoder of the shape that `config` describes, with random weights.

    Set `recompute` to compute activations again in backward instead of keeping them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Let the head use the embedding's weight, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self):
        return [KeyValueCache() for _ in self.model.layers]

    def forward(self, ids, cache=None, pad=None, last_only=False):
        """Token ids (batch, T) -> logits (batch, T, vocab_size).

        cache: what new_cache() returned, extended in place; ids go on where it ends.
        pad: (batch,), how many tokens of left padding each row begins with, or None.
        last_only: compute the logits of the last position alone, (batch, 1, vocab_size).
        """
        config = self.config
        x = self.model.embed_tokens(ids)
        if config.scale_embeddings:
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        new = ids.shape[1]
        total = new if cache is None else new + cache[0].length
        positions = torch.arange(total - new, total, device=ids.device)
        shared = {}  # All layers of one type use the same rotation and the same mask.
        for layer_type in set(config.layer_types):
            cos, sin = rotary(config.rope[layer_type], positions, config.head_dim)
            window = config.sliding_window if layer_type == SLIDING else None
            mask = attention_mask(new, total, window, pad, ids.device)
            shared[layer_type] = (cos.to(x.dtype), sin.to(x.dtype), mask)
        recompute = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            cos, sin, mask = shared[config.layer_types[i]]
            block_cache = None if cache is None else cache[i]
            if recompute:
                x = checkpoint(block, x, cos, sin, mask, block_cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, block_cache)
        if last_only:
            x = x[:, -1:]
        return self.lm_head(self.model.norm(x))
