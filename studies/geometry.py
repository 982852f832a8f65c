"""Is an embedding space hyperbolic? Three measurements of the HypLoRA paper (arXiv 2410.04010).

How far distances are from those of a tree, how fast the frequencies of tokens fall, and how long
the embeddings of rare and of frequent tokens are.
"""

from collections import namedtuple

import numpy as np
import torch
from scipy import optimize
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


# alpha has the standard error `error`, the law begins at xmin, and the counts are so far from it.
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
    low, high, step = 1.001, 20.0, 1e-3  # where an exponent is looked for
    laws = []
    for xmin in np.unique(counts[counts > 0]):
        tail = counts[counts >= xmin]
        args = (np.log(tail).mean(), xmin)
        alpha = optimize.minimize_scalar(cost, bounds=(low, high), args=args).x
        if len(tail) >= 10 and low + step < alpha < high - step:
            below, at, above = cost(alpha + np.array([-step, 0, step]), *args)
            error = (len(tail) * (below - 2 * at + above) / step**2) ** -0.5
            values, times = np.unique(tail, return_counts=True)
            expected = 1 - zeta(alpha, values + 1) / zeta(alpha, xmin)
            distance = np.abs(times.cumsum() / len(tail) - expected).max()
            laws.append(PowerLaw(float(alpha), float(error), float(xmin), float(distance)))
    if not laws:
        raise ValueError(f"no ten counts follow a power law of an exponent of {low} to {high}")
    return min(laws, key=lambda law: law.distance)


def cost(alpha, mean_log, xmin):
    """Minus the mean log likelihood of a count under p(x) = x^-alpha / zeta(alpha, xmin)."""
    return np.log(zeta(alpha, xmin)) + alpha * mean_log


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
