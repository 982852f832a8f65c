"""A small random checkpoint in the hubs' layout, for tests and benchmarks: nothing to download.

Its tokenizer has a token for each byte, and special tokens after those. The model is a Llama of 2
layers with random weights, so it knows nothing, but every part of scaling/ runs on it.

pip install safetensors tokenizers
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from scaling.checkpoint import read_config
from scaling.decoder import Decoder

BEGIN = 256
END = 257
TURN_END = 258
SPECIAL = {"<s>": BEGIN, "</s>": END, "<|turn|>": TURN_END}
CONFIG = dict(
    model_type="llama",
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    eos_token_id=END,
)


def byte_tokenizer(puts_begin=False, puts_end=False):
    """A tokenizers.Tokenizer with a token for each byte; puts_*: adds <s> or </s> by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    if puts_begin or puts_end:
        pattern = f"{'<s> ' if puts_begin else ''}$A{' </s>' if puts_end else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=list(SPECIAL.items())
        )
    return tokenizer


def write_small_checkpoint(folder, tokenizer=None, seed=0, **config):
    """Write config.json, model.safetensors and tokenizer.json; config overrides CONFIG's fields."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (tokenizer or byte_tokenizer()).save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = Decoder(read_config(folder))
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # large enough for what it says to depend on what it reads
            torch.nn.init.normal_(parameter, std=0.3)
        if not model.config.post_norms:
            name = name.replace("pre_feedforward_layernorm", "post_attention_layernorm")
        tensors[name] = parameter.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sums(path, count=40, first=0):
    """Records in the paper's format: What is n + n?"""
    records = []
    for n in range(first, first + count):
        records.append(
            {
                "instruction": f"What is {n} + {n}?",
                "input": "",
                "output": f"The answer is {2 * n}.",
                "answer": f"{2.0 * n}",
            }
        )
    Path(path).write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path
