"""Is an embedding space hyperbolic? Three measurements of the HypLoRA paper (arXiv 2410.04010).

How far distances are from those of a tree, how fast the frequencies of tokens fall, and how long
the embeddings of rare and of frequent tokens are.
"""

import math
from collections import namedtuple

import numpy as np
import torch
from scipy.optimize import elementwise
from scipy.special import zeta


def euclidean_distances(points):
    """The distances (n, n) between points (n, d)."""
    # The fast way of cdist cancels for points that are near each other, in float32 visibly.
    return torch.cdist(points.double(), points.double()).fill_diagonal_(0)


@torch.no_grad()
def delta_hyperbolicity(distances):
    """Gromov's delta over the first point w, relative to the diameter: 2 delta / max d, a float.

    It is 0 for a tree and near 1 for a sphere. With the Gromov product

        (i|j) = (d(i, w) + d(j, w) - d(i, j)) / 2

    delta is the largest value of min((i|k), (k|j)) - (i|j) over all i, j and k. It is computed
    exactly, in n^3 time and n^2 memory. Over another point it is at most twice as large.

    distances: (n, n), on any device. Source: Gromov, "Hyperbolic groups" (1987).
    """
    distances = distances.float()
    diameter = distances.max().item()
    mirrored = distances.T.clone().fill_diagonal_(0)
    is_finite = distances.isfinite().all()
    if not is_finite or not torch.allclose(distances, mirrored, atol=1e-4 * diameter):
        raise ValueError("distances should be finite, symmetric, and 0 on the diagonal")
    product = (distances[:, 0, None] + distances[0] - distances) / 2
    delta = 0.0
    for i, row in enumerate(product):  # The product is symmetric: j = i and above suffices.
        largest = torch.minimum(row, product[i:]).amax(dim=1)
        delta = max(delta, (largest - row[i:]).max())
    return float(2 * delta / max(diameter, 1e-30))  # 0 if all points are one


# error: the standard error of alpha. xmin: where the law begins. distance: Kolmogorov's and
# Smirnov's, of the counts from xmin on to the law.
PowerLaw = namedtuple("PowerLaw", ["alpha", "error", "xmin", "distance"])


def power_law_exponent(counts):
    """The PowerLaw p(x) ~ x^-alpha, for whole numbers x >= xmin, of largest likelihood.

    counts: how often each token occurs, of any shape; zeros are left out. Every count that at least
    ten counts reach is tried as xmin, and the one whose fit has the smallest distance is taken.

    Source: Clauset, Shalizi, Newman, "Power-law distributions in empirical data" (2009), equations
    3.5 to 3.9.
    """
    counts = np.asarray(counts, dtype=float).ravel()
    if (counts != np.abs(counts).round()).any():
        raise ValueError("counts contains something else than whole numbers of at least 0")
    values, times = np.unique(counts[counts > 0], return_counts=True)
    times = times * (values >= values[:, None])  # (starts, values): one row for each xmin
    n = times.sum(axis=1)
    mean_log = (times * np.log(values)).sum(axis=1) / n
    low, high = 1.001, 20.0  # where an exponent is looked for
    args = (mean_log, values)
    bracket = elementwise.bracket_minimum(cost, 2 + 0 * values, xmin=low, xmax=high, args=args)
    found = elementwise.find_minimum(cost, bracket.bracket, args=args)
    usable = (n >= 10) & (found.x > low + 1e-6) & (found.x < high - 1e-6)
    if not usable.any():
        raise ValueError(f"no ten counts follow a power law of an exponent of {low} to {high}")
    observed = times.cumsum(axis=1) / n[:, None]
    expected = 1 - zeta(found.x[:, None], values + 1) / zeta(found.x, values)[:, None]
    distance = (np.abs(observed - expected) * (times > 0)).max(axis=1)
    best = np.where(usable, distance, math.inf).argmin()
    alpha = found.x[best]
    step = 1e-3
    below, at, above = cost(alpha + np.array([-step, 0, step]), mean_log[best], values[best])
    error = (n[best] * (below - 2 * at + above) / step**2) ** -0.5
    return PowerLaw(float(alpha), float(error), float(values[best]), float(distance[best]))


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
        sample = np.append(from_law, random.choice(below, n_below))
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
    """{(low, high): lengths of the embeddings of tokens that occur low times at least, below high}.

    embedding: (vocabulary, d). token_ids: a text as rows of embedding. The bins are equally wide in
    the logarithm; before them, (0, 1) has the tokens that never occur. Empty ones are left out.
    """
    counts = torch.bincount(token_ids, minlength=len(embedding)).numpy()
    edges = [0, *np.geomspace(1, counts.max() + 1, bins + 1).tolist()]
    place = np.digitize(counts, edges)
    norms = embedding.norm(dim=1)
    return {(edges[at - 1], edges[at]): norms[place == at] for at in np.unique(place)}
