"""Is an embedding space hyperbolic? Three measurements of the HypLoRA paper (arXiv 2410.04010).

    delta_hyperbolicity    how far the distances are from those of a tree
    power_law_exponent     how fast the frequencies of tokens fall, and power_law_p_value
    norm_by_frequency      how long the embeddings of rare and of frequent tokens are

Each raises ValueError that says what it can't measure.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import elementwise
from scipy.special import zeta

BLOCK = 128  # delta_hyperbolicity takes so many rows at a time, which then stay in the cache
EXPONENTS = (1.001, 20.0)  # power_law_exponent searches between them


@torch.no_grad()
def delta_hyperbolicity(points=None, distances=None):
    """Gromov's delta over the first point w, relative to the diameter: 2 delta / max d, a float.

    It is 0 for a tree and near 1 for a sphere. With the Gromov product

        (i|j) = (d(i, w) + d(j, w) - d(i, j)) / 2

    delta is the largest value of min((i|k), (k|j)) - (i|j) over all i, j and k. It is computed
    exactly, in n^3 time and n^2 memory. Over another point it is at most twice as large.

    points: (n, d), with Euclidean distances, or distances: (n, n), symmetric; on any device.

    Source: Gromov, "Hyperbolic groups" (1987).
    """
    if (points is None) == (distances is None):
        raise ValueError("delta_hyperbolicity takes either points or distances: give one of them")
    if points is not None:
        # The fast way of cdist cancels for points that are near each other.
        distances = torch.cdist(points.double(), points.double()).float().fill_diagonal_(0)
    check_distances(distances)
    distances = distances.to(torch.promote_types(distances.dtype, torch.float32))
    diameter = distances.max()
    if diameter == 0:
        return 0.0
    product = (distances[:, 0, None] + distances[0] - distances) / 2
    delta = product.new_zeros(())
    for start in range(0, len(product), BLOCK):
        # The product is symmetric, so these rows need only the columns from start on.
        rows = product[start : start + BLOCK]
        columns = rows.T.contiguous()
        largest = rows.new_full((len(rows), len(product) - start), -math.inf)
        smaller = torch.empty_like(largest)
        for k in range(len(product)):
            torch.minimum(columns[k, :, None], product[k, start:], out=smaller)
            torch.maximum(largest, smaller, out=largest)
        delta = torch.maximum(delta, (largest - rows[:, start:]).max())
    return (2 * delta / diameter).item()


def check_distances(distances):
    shape = tuple(distances.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"distances has the shape {shape}, but it should be (n, n), n at least 1")
    if not distances.isfinite().all():
        raise ValueError("some distances are not finite: is a number missing, or a path?")
    slack = 1e-4 * distances.max()
    asymmetry = (distances - distances.T).max()
    if distances.min() < 0 or distances.diagonal().max() > slack or asymmetry > slack:
        raise ValueError("distances should be symmetric, at least 0, with a diagonal of zeros")


class PowerLaw(NamedTuple):
    alpha: float
    error: float  # the standard error of alpha
    xmin: float  # where the law begins
    distance: float  # Kolmogorov's and Smirnov's, of the counts from xmin on to the law


def power_law_exponent(counts):
    """The PowerLaw p(x) ~ x^-alpha, for whole numbers x >= xmin, of largest likelihood.

    counts: how often each token occurs, of any shape; zeros are left out. Every count that at least
    ten counts reach is tried as xmin, and the one whose fit has the smallest distance is taken.

    Source: Clauset, Shalizi, Newman, "Power-law distributions in empirical data" (2009), equations
    3.5 to 3.9.
    """
    counts = np.asarray(counts, dtype=float).ravel()
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts != counts.round()).any():
        raise ValueError("counts contains something else than whole numbers of at least 0")
    values, times = np.unique(counts[counts > 0], return_counts=True)
    in_tail = values >= values[:, None]  # (starts, values): one row for each xmin
    enough = ((in_tail * times).sum(axis=1) >= 10) & (in_tail.sum(axis=1) >= 2)
    if not enough.any():
        given = f"{times.sum()} counts above 0 were given"
        raise ValueError(
            f"a power law needs at least ten counts that are not all the same; {given}"
        )
    starts = values[enough]
    in_tail = in_tail[enough]
    times = in_tail * times
    n = times.sum(axis=1)
    mean_log = (times * np.log(values)).sum(axis=1) / n
    low, high = EXPONENTS
    args = (mean_log, starts)
    bracket = elementwise.bracket_minimum(cost, 2 + 0 * starts, xmin=low, xmax=high, args=args)
    found = elementwise.find_minimum(cost, bracket.bracket, args=args)
    inside = (found.x > low + 1e-6) & (found.x < high - 1e-6)
    if not inside.any():
        raise ValueError(f"these counts follow no power law with an exponent of {low} to {high}")
    observed = times.cumsum(axis=1) / n[:, None]
    expected = 1 - zeta(found.x[:, None], values + 1) / zeta(found.x, starts)[:, None]
    distance = (np.abs(observed - expected) * in_tail).max(axis=1)
    best = np.where(inside, distance, math.inf).argmin()
    alpha = found.x[best]
    step = 1e-3
    below, at, above = cost(alpha + np.array([-step, 0, step]), mean_log[best], starts[best])
    error = (n[best] * (below - 2 * at + above) / step**2) ** -0.5
    return PowerLaw(float(alpha), float(error), float(starts[best]), float(distance[best]))


def cost(alpha, mean_log, xmin):
    """Minus the mean log likelihood of a count under p(x) = x^-alpha / zeta(alpha, xmin)."""
    return np.log(zeta(alpha, xmin)) + alpha * mean_log


def power_law_p_value(counts, draws=100, seed=0):
    """How often samples of the fitted law are as far from a power law as the counts are.

    Below 0.1 the source rules a power law out. Each sample takes the law's values from xmin on and
    the counts' own below, in the same proportion, and is fitted anew, xmin included.

    Source: Clauset, Shalizi, Newman (2009), section 4.1.
    """
    law = power_law_exponent(counts)
    counts = np.asarray(counts).ravel()
    counts = counts[counts > 0]
    below = counts[counts < law.xmin]
    random = np.random.default_rng(seed)
    farther = 0
    for _ in range(draws):
        n_below = random.binomial(len(counts), len(below) / len(counts))
        from_law = sample_power_law(law, len(counts) - n_below, random)
        sample = np.concatenate([from_law, random.choice(below, n_below) if n_below else []])
        farther += power_law_exponent(sample).distance >= law.distance
    return farther / draws


def sample_power_law(law, n, random):
    """n draws: whole parts of a continuous law, each kept with the chance that is due to it."""

    def due(x):
        """x^-alpha over x^(1 - alpha) - (x + 1)^(1 - alpha), which falls as x grows."""
        return -1 / (x * np.expm1((1 - law.alpha) * np.log1p(1 / x)))

    kept = np.empty(0)
    while len(kept) < n:
        x = np.floor(law.xmin * (1 - random.random(2 * n)) ** (1 / (1 - law.alpha)))
        kept = np.append(kept, x[random.random(2 * n) * due(law.xmin) <= due(x)])
    return kept[:n]


def norm_by_frequency(embedding, token_ids, bins=10):
    """The length of embeddings by how often their tokens occur, in bins of log frequency.

    embedding: (vocabulary, d). token_ids: a text as rows of embedding, of any shape.
    bins: how many; they are equally wide in the logarithm, and those without a token are left out.
    Returns a list, rarest tokens first, of dictionaries: low and high are the frequencies of the
    bin (low lies inside, high does not), norms are the lengths of its different tokens.
    """
    counts = count_tokens(token_ids, vocabulary=len(embedding))
    seen = counts > 0
    norms = embedding.detach().cpu().float().norm(dim=-1)[seen]
    if not norms.isfinite().all():
        raise ValueError("embedding contains numbers that are not finite for tokens that occur")
    counts = counts[seen].numpy()
    edges = np.geomspace(1, counts.max() + 1, bins + 1)
    place = np.digitize(counts, edges)
    result = []
    for at in np.unique(place):
        low, high = edges[at - 1 : at + 1].tolist()
        result.append({"low": low, "high": high, "norms": norms[place == at]})
    return result


def count_tokens(token_ids, vocabulary):
    """How often each token of the vocabulary occurs in token_ids, of any shape: (vocabulary,)."""
    ids = torch.as_tensor(token_ids).flatten().cpu()
    for extreme in (ids.min().item(), ids.max().item()):
        if not 0 <= extreme < vocabulary:
            rows = f"the embedding has the rows 0 to {vocabulary - 1}"
            raise ValueError(f"there is a token {extreme}, but {rows}: is the tokenizer its own?")
    return torch.bincount(ids, minlength=vocabulary)
