"""analysis/geometry.py against definitions written out, spaces whose answer is known, and samples
from the law."""

import math

import pytest
import torch
import torch.nn.functional as F

from analysis import geometry
from analysis.geometry import (
    delta_hyperbolicity,
    norm_by_frequency,
    power_law_exponent,
    power_law_p_value,
)

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- delta ----------------------------------------------------------------------------------------


def delta_written_out(D):
    """Gromov's definition, on lists."""
    n = len(D)

    def product(i, j):
        return (D[i][0] + D[j][0] - D[i][j]) / 2

    delta = 0
    for i in range(n):
        for j in range(n):
            for k in range(n):
                delta = max(delta, min(product(i, k), product(k, j)) - product(i, j))
    return 2 * delta / max(max(row) for row in D)


def four_point_delta(D):
    """Half the difference of the two largest of the three sums of opposite distances, at most."""
    n = len(D)
    delta = 0
    for w in range(n):
        for i in range(w):
            for j in range(i):
                for k in range(j):
                    sums = sorted([D[w][i] + D[j][k], D[w][j] + D[i][k], D[w][k] + D[i][j]])
                    delta = max(delta, (sums[2] - sums[1]) / 2)
    return 2 * delta / max(max(row) for row in D)


def shortest_paths(weights):
    D = weights.clone().fill_diagonal_(0)
    for k in range(len(D)):
        D = torch.minimum(D, D[:, k, None] + D[k])
    return D


def random_tree(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.full((n, n), math.inf)
    for child in range(1, n):
        parent = int(torch.randint(child, (), generator=generator))
        length = 0.5 + torch.rand((), generator=generator)
        weights[child, parent] = length
        weights[parent, child] = length
    return shortest_paths(weights)


@pytest.mark.parametrize("block", [4, 128])
def test_delta_is_its_definition_written_out(block, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", block)
    points = randn(30, 4)
    D = torch.cdist(points, points)
    expected = pytest.approx(delta_written_out(D.tolist()), rel=1e-6)
    assert delta_hyperbolicity(distances=D) == expected
    assert delta_hyperbolicity(points) == pytest.approx(delta_hyperbolicity(distances=D), rel=1e-5)


def test_the_largest_delta_of_all_base_points_is_the_four_point_condition():
    points = randn(14, 3)
    D = torch.cdist(points, points)
    over_bases = [delta_hyperbolicity(distances=D.roll((i, i), (0, 1))) for i in range(14)]
    assert max(over_bases) == pytest.approx(four_point_delta(D.tolist()), rel=1e-6)
    assert max(over_bases) <= 2 * min(over_bases) + 1e-6


def test_a_tree_has_delta_0_and_a_cycle_of_four_has_1():
    assert delta_hyperbolicity(distances=random_tree(60)) == pytest.approx(0, abs=1e-6)
    cycle = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    assert delta_hyperbolicity(distances=cycle) == 1  # delta is 1, and so is half the diameter


def test_the_papers_value_of_a_sphere():
    """The paper gives 0.99. The distance is the angle, and the supremum is 1."""
    points = F.normalize(randn(1000, 3), dim=-1)
    angles = (points @ points.T).clamp(-1, 1).acos().fill_diagonal_(0)
    assert 0.95 < delta_hyperbolicity(distances=angles) < 1


def test_points_far_out_in_hyperbolic_space_are_nearly_a_tree():
    """In the plane of curvature -1 delta is at most log 2, whatever the diameter."""
    direction = F.normalize(randn(200, 2), dim=-1)
    radius = 12 * randn(200, 1, seed=3).abs()
    time = torch.cosh(radius)
    space = torch.sinh(radius) * direction
    inner = space @ space.T - time @ time.T
    D = torch.acosh((-inner).clamp(min=1)).fill_diagonal_(0)
    assert D.max() > 30
    assert delta_hyperbolicity(distances=D) < 2 * math.log(2) / D.max().item() + 1e-3


def test_delta_does_not_depend_on_the_unit_of_length_and_is_0_for_one_point():
    points = randn(40, 5)
    assert delta_hyperbolicity(points) == pytest.approx(delta_hyperbolicity(1e6 * points), rel=1e-5)
    assert delta_hyperbolicity(points[:1]) == 0
    assert delta_hyperbolicity(points[:1].expand(5, 5)) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either points or distances"),
        ({"points": randn(4, 3), "distances": torch.ones(4, 4)}, "either points or distances"),
        ({"points": randn(4)}, r"shape \(4,\)"),
        ({"points": randn(0, 3)}, r"shape \(0, 3\)"),
        ({"points": randn(4, 3) / 0}, "points contains numbers that are not finite"),
        ({"distances": randn(4, 3)}, r"shape \(4, 3\)"),
        ({"distances": torch.empty(0, 0)}, r"shape \(0, 0\)"),
        ({"distances": torch.full((3, 3), math.inf)}, "connected"),
        ({"distances": torch.ones(3, 3)}, "diagonal of zeros"),
        ({"distances": torch.ones(3, 3).triu(1)}, "symmetric"),
        ({"distances": -torch.ones(3, 3)}, "negative"),
    ],
)
def test_delta_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_hyperbolicity(**arguments)


# --- the power law --------------------------------------------------------------------------------


def samples_of_the_law(alpha, xmin, n=20_000, seed=0):
    x = torch.arange(xmin, 200_000, dtype=torch.float64)
    cumulated = (x**-alpha).cumsum(0)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[torch.searchsorted(cumulated, uniform * cumulated[-1])]


@pytest.mark.parametrize("alpha, xmin", [(1.9, 1), (2.5, 1), (2.2, 5)])
def test_the_exponent_of_samples_from_the_law(alpha, xmin):
    counts = samples_of_the_law(alpha, xmin)
    found, error, _ = power_law_exponent(counts, xmin=xmin)
    assert abs(found - alpha) < 4 * error
    assert 0.003 < error < 0.03
    found, error, start = power_law_exponent(torch.cat([counts, torch.zeros(50)]))
    assert abs(found - alpha) < 5 * error + 0.02
    assert start >= xmin


def test_xmin_is_found_where_the_law_begins():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(1, 20, (20_000,), generator=generator)
    counts = torch.cat([samples_of_the_law(2.5, xmin=20), noise])
    found, error, start = power_law_exponent(counts)
    assert 18 <= start <= 40
    assert abs(found - 2.5) < 5 * error + 0.02


@pytest.mark.parametrize(
    "counts, xmin, message",
    [
        ([], None, "0 counts above 0"),
        ([0] * 50, None, "0 counts above 0"),
        ([3] * 50, None, "at least ten counts"),
        ([1, 2, 3], None, "3 counts above 0"),
        (range(1, 50), 45, "at least ten counts"),
        (range(1, 50), 0, "xmin is 0"),
        (range(1, 50), math.nan, "xmin is nan"),
        ([1.5] * 50, None, "whole numbers"),
        ([-1] * 50, None, "whole numbers"),
        ([math.inf] * 50, None, "whole numbers"),
        ([1000] * 50 + [1001], None, "edge"),  # falls faster than any exponent that is searched
    ],
)
def test_the_exponent_refuses(counts, xmin, message):
    with pytest.raises(ValueError, match=message):
        power_law_exponent(list(counts), xmin=xmin)


def test_the_p_value_is_uniform_under_the_law_and_rejects_another():
    p_values = []
    for seed in range(10):
        law = samples_of_the_law(2.2, xmin=3, n=1000, seed=seed)
        p_values.append(power_law_p_value(law, draws=20))
    assert 0.25 < sum(p_values) / 10 < 0.75
    assert max(p_values) - min(p_values) > 0.4
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exponential = (1 - 8 * uniform.log()).floor()
    assert power_law_p_value(exponential[exponential < 40], draws=20) <= 0.1
    with pytest.raises(ValueError, match="draws is 0"):
        power_law_p_value(exponential, draws=0)


def test_samples_of_the_p_value_follow_the_law():
    draw = geometry._sample_power_law(2.5, 4.0, 50_000, torch.Generator().manual_seed(0))
    x = torch.arange(4, 10**6, dtype=torch.float64)
    chances = x**-2.5 / (x**-2.5).sum()
    for value in (4, 5, 9):
        share = (draw == value).double().mean()
        assert share == pytest.approx(chances[value - 4].item(), abs=0.008)
    assert draw.min() == 4 and draw.max() > 400


# --- norms ----------------------------------------------------------------------------------------


def test_norm_by_frequency_by_hand():
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    token_ids = [[0] + 99 * [1], 99 * [2] + [0]]
    rare, frequent = norm_by_frequency(embedding, token_ids, bins=2)
    assert (rare["tokens"], rare["mean"], rare["std"]) == (1, 5.0, 0.0)
    assert (frequent["tokens"], frequent["mean"], frequent["std"]) == (2, 2.0, 1.0)
    assert rare["low"] == 1
    assert rare["high"] == frequent["low"] == pytest.approx(10)
    assert frequent["high"] == pytest.approx(100)


def test_every_token_that_occurs_lies_in_one_bin():
    generator = torch.Generator().manual_seed(0)
    token_ids = (500 * torch.rand(3000, generator=generator) ** 4).long()
    bins = norm_by_frequency(randn(500, 3), token_ids, bins=7)
    assert sum(b["tokens"] for b in bins) == len(token_ids.unique())


@pytest.mark.parametrize(
    "embedding, token_ids, bins, message",
    [
        (randn(4), [0, 1], 2, r"shape \(4,\)"),
        (randn(4, 0), [0, 1], 2, r"shape \(4, 0\)"),
        (randn(4, 3), [], 2, "empty"),
        (randn(4, 3), [0.0, 1.0], 2, "whole numbers"),
        (randn(4, 3), [True, False], 2, "whole numbers"),
        (randn(4, 3), [0, 4], 2, "contains 4, .* rows 0 to 3"),
        (randn(4, 3), [0, -1], 2, "contains -1"),
        (randn(4, 3), [0, 1], 0, "bins is 0"),
        (randn(4, 3) / 0, [0, 1], 2, "not finite"),
    ],
)
def test_norm_by_frequency_refuses(embedding, token_ids, bins, message):
    with pytest.raises(ValueError, match=message):
        norm_by_frequency(embedding, token_ids, bins)
