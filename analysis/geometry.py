"""Is an embedding space hyperbolic? Three measurements of the HypLoRA paper (arXiv 2410.04010).

    delta_hyperbolicity    how far the distances are from those of a tree
    power_law_exponent     how fast the frequencies of tokens fall, and power_law_p_value
    norm_by_frequency      how long the embeddings of rare and of frequent tokens are

This file needs torch alone.
"""

import math

import torch

BLOCK = 128  # delta_hyperbolicity takes so many rows at a time, which then stay in the cache
SMALLEST_EXPONENT = 1.001  # power_law_exponent searches from here
LARGEST_EXPONENT = 20.0  # to here


# --------------------------------------------------------------------------------------------------
# Gromov's delta


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
        distances = _euclidean_distances(points)
    else:
        _check_distances(distances)
    return _relative_delta(distances)


def _euclidean_distances(points):
    """(n, d) -> (n, n), in float32."""
    if points.ndim != 2 or points.numel() == 0:
        shape = tuple(points.shape)
        raise ValueError(f"points has the shape {shape}, but it should be (n, d), both at least 1")
    if not points.isfinite().all():
        raise ValueError("points contains numbers that are not finite: take those points out")
    points = points.double()  # the fast way of cdist cancels for points that are near each other
    return torch.cdist(points, points).float().fill_diagonal_(0)


def _check_distances(distances):
    shape = tuple(distances.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"distances has the shape {shape}, but it should be (n, n), n at least 1")
    if not distances.isfinite().all():
        raise ValueError("distances contains numbers that are not finite: is the graph connected?")
    if distances.min() < 0:
        raise ValueError("distances contains negative numbers: are they similarities?")
    slack = 1e-4 * distances.max()
    if distances.diagonal().max() > slack or (distances - distances.T).max() > slack:
        raise ValueError("distances should be symmetric with a diagonal of zeros")


def _relative_delta(distances):
    """(n, n) -> 2 delta / max d as a float, 0 where all points coincide."""
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


# --------------------------------------------------------------------------------------------------
# The law of token frequencies


def power_law_exponent(counts, xmin=None):
    """Fit p(x) ~ x^-alpha, for whole numbers x >= xmin, to counts by maximum likelihood.

    counts: how often each token occurs, of any shape; zeros are left out.
    xmin: where the law begins. Without it every count that at least ten counts reach is tried, and
    the one whose fit has the smallest Kolmogorov-Smirnov distance is taken.
    Returns (alpha, standard error of alpha, xmin).

    Source: Clauset, Shalizi, Newman, "Power-law distributions in empirical data" (2009), equations
    3.5 to 3.9.
    """
    alpha, error, xmin, _ = _fit_power_law(counts, xmin)
    return alpha, error, xmin


def power_law_p_value(counts, draws=100, seed=0):
    """How often samples of the fitted law are as far from a power law as the counts are.

    Below 0.1 the source rules a power law out. Each sample takes the law's values from xmin on and
    the counts' own below, in the same proportion, and is fitted anew, xmin included.

    Source: Clauset, Shalizi, Newman (2009), section 4.1.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}, but it should be at least 1")
    alpha, _, xmin, distance = _fit_power_law(counts)
    counts = torch.as_tensor(counts).flatten().to("cpu", torch.float64)
    counts = counts[counts > 0]
    below = counts[counts < xmin]
    generator = torch.Generator().manual_seed(seed)
    farther = 0
    for _ in range(draws):
        from_below = torch.rand(len(counts), generator=generator) < len(below) / len(counts)
        n_below = int(from_below.sum())
        sample = _sample_power_law(alpha, xmin, len(counts) - n_below, generator)
        if n_below > 0:
            chosen = torch.randint(len(below), (n_below,), generator=generator)
            sample = torch.cat([below[chosen], sample])
        farther += _fit_power_law(sample)[3] >= distance
    return farther / draws


def _fit_power_law(counts, xmin=None):
    """(alpha, standard error, xmin, Kolmogorov-Smirnov distance) of the best fit."""
    counts = torch.as_tensor(counts).flatten().to("cpu", torch.float64)
    if not counts.isfinite().all() or (counts < 0).any() or (counts != counts.round()).any():
        raise ValueError("counts contains something else than whole numbers of at least 0")
    if xmin is not None and not 1 <= xmin < math.inf:
        raise ValueError(f"xmin is {xmin}, but it should be a finite number of at least 1")
    values, times = counts[counts > 0].unique(return_counts=True)
    starts = values if xmin is None else torch.tensor([xmin], dtype=torch.float64)
    in_tail = values >= starts[:, None]
    enough = ((in_tail * times).sum(dim=1) >= 10) & (in_tail.sum(dim=1) >= 2)
    if not enough.any():
        raise ValueError(
            "a power law needs at least ten counts from xmin on that are not all the same; "
            f"{int(times.sum())} counts above 0 were given"
        )
    starts = starts[enough]
    in_tail = in_tail[enough]
    times = in_tail * times.double()  # from here on (starts, values): one row for each start
    n = times.sum(dim=1)
    mean_log = (times * values.log()).sum(dim=1) / n
    alpha = _best_exponent(mean_log, starts)
    margin = 1e-6
    inside = (alpha > SMALLEST_EXPONENT + margin) & (alpha < LARGEST_EXPONENT - margin)
    if not inside.any():
        raise ValueError(
            "these counts follow no power law: the best exponent lies at the edge of those that "
            f"are searched, {SMALLEST_EXPONENT} to {LARGEST_EXPONENT}"
        )
    observed = times.cumsum(dim=1) / n[:, None]
    beyond = torch.special.zeta(alpha[:, None], values + 1)
    expected = 1 - beyond / torch.special.zeta(alpha, starts)[:, None]
    distance = ((observed - expected).abs() * in_tail).amax(dim=1)
    best = torch.where(inside, distance, math.inf).argmin()
    step = 1e-3
    costs = [_cost(alpha + shift, mean_log, starts)[best] for shift in (-step, 0, step)]
    information = n[best] * (costs[0] - 2 * costs[1] + costs[2]) / step**2
    error = information.rsqrt().item()
    return alpha[best].item(), error, starts[best].item(), distance[best].item()


def _best_exponent(mean_log, starts):
    """The exponents (m,) of largest likelihood, by a search in thirds: the cost is convex."""
    low = torch.full_like(mean_log, SMALLEST_EXPONENT)
    high = torch.full_like(mean_log, LARGEST_EXPONENT)
    for _ in range(60):
        left = low + (high - low) / 3
        right = high - (high - low) / 3
        falls = _cost(left, mean_log, starts) > _cost(right, mean_log, starts)
        low = torch.where(falls, left, low)
        high = torch.where(falls, high, right)
    return (low + high) / 2


def _cost(alpha, mean_log, xmin):
    """Minus the mean log likelihood of a count under p(x) = x^-alpha / zeta(alpha, xmin)."""
    return torch.special.zeta(alpha, xmin).log() + alpha * mean_log


def _sample_power_law(alpha, xmin, n, generator):
    """n draws: for each the largest x with P(X >= x) > u, u uniform, by doubling and halving."""
    alpha = torch.tensor(alpha, dtype=torch.float64)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    limit = u * torch.special.zeta(alpha, xmin)
    low = torch.full_like(u, xmin)
    high = 2 * low
    while (too_low := torch.special.zeta(alpha, high) > limit).any():
        high = torch.where(too_low, 2 * high, high)
    while (high - low > 1).any():
        middle = ((low + high) / 2).floor()
        reached = torch.special.zeta(alpha, middle) > limit
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle)
    return low


# --------------------------------------------------------------------------------------------------
# Norms


@torch.no_grad()
def norm_by_frequency(embedding, token_ids, bins=10):
    """The length of embeddings by how often their tokens occur, in bins of log frequency.

    embedding: (vocabulary, d). token_ids: a text as rows of embedding, of any shape.
    bins: how many; they are equally wide in the logarithm, and those without a token are left out.
    Returns a list, rarest tokens first, of dictionaries: low and high are the frequencies of the
    bin (low lies inside, high does not), tokens is the number of different tokens in it, mean and
    std are those of their norms.
    """
    if embedding.ndim != 2 or embedding.numel() == 0:
        shape = tuple(embedding.shape)
        raise ValueError(f"embedding has the shape {shape}, but it should be (vocabulary, d)")
    if bins < 1:
        raise ValueError(f"bins is {bins}, but it should be at least 1")
    counts = count_tokens(token_ids, vocabulary=len(embedding))
    seen = counts > 0
    norms = embedding.detach().cpu().float().norm(dim=-1)[seen]
    if not norms.isfinite().all():
        raise ValueError("embedding contains numbers that are not finite for tokens that occur")
    counts = counts[seen].double()
    last_edge = math.log10(counts.max().item() + 1)
    edges = torch.logspace(0, last_edge, bins + 1, dtype=torch.float64).tolist()
    result = []
    for low, high in zip(edges[:-1], edges[1:]):
        inside = norms[(counts >= low) & (counts < high)]
        if len(inside) > 0:
            result.append(
                {
                    "low": low,
                    "high": high,
                    "tokens": len(inside),
                    "mean": inside.mean().item(),
                    "std": inside.std(correction=0).item(),
                }
            )
    return result


def count_tokens(token_ids, vocabulary):
    """How often each token of the vocabulary occurs in token_ids, of any shape: (vocabulary,)."""
    ids = torch.as_tensor(token_ids).flatten().cpu()
    if len(ids) == 0:
        raise ValueError("token_ids is empty: give the tokens of a text")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token_ids contains {ids.dtype}, but it should be whole numbers")
    for extreme in (ids.min().item(), ids.max().item()):
        if not 0 <= extreme < vocabulary:
            raise ValueError(
                f"token_ids contains {extreme}, but the embedding has the rows 0 to "
                f"{vocabulary - 1}: take the tokenizer of the same model"
            )
    return torch.bincount(ids, minlength=vocabulary)
