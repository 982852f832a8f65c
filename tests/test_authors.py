"""benchmarks/authors.py against the authors' layers, read off anew, token by token in float64."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import authors

torch.set_num_threads(1)


def length_of(y):
    return math.sqrt(sum(value * value for value in y.tolist()))


def hyplora_by_hand(x, A, B, k):
    K = math.log1p(math.exp(k)) + 1e-6
    r = min(length_of(x) / math.sqrt(len(x)) / math.sqrt(K), 12.0)
    y = B @ (A @ (x / length_of(x))) * math.sqrt(K) * math.sinh(r)
    theta = math.sqrt(length_of(y) ** 2 + 1 / K) / math.sqrt(K)
    if theta < 1.01:
        distance = math.sqrt(2 * max(theta - 1, 1e-6))
    else:
        distance = math.acosh(theta)
    return math.sqrt(K) * distance * y / max(length_of(y), 1e-7)


def simplified_by_hand(x, A, B, k):
    y = B @ (A @ (2 * x / (1 + k * length_of(x) ** 2)))
    return y / (1 + math.sqrt(abs(k)) * math.sqrt(length_of(y) ** 2 + k))


@pytest.mark.parametrize("k", [0.5, 1.0])
@pytest.mark.parametrize("size", [1e-5, 0.1, 3.0])
@pytest.mark.parametrize(
    "update, by_hand",
    [
        (authors.authors_update, hyplora_by_hand),
        (authors.simplified_update, simplified_by_hand),
    ],
    ids=authors.LAYERS,
)
def test_the_layers_are_what_one_reads_off(update, by_hand, size, k):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([0.1, 0.5, 1, 2, 10, 100])[:, None]
    A = torch.randn(3, 20, generator=generator, dtype=torch.float64) / 4
    B = size * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    got = update(x, A, B, k)
    for i, token in enumerate(x):
        want = by_hand(token, A, B, k)
        assert (got[i] - want).norm() <= 1e-6 * want.norm()


def test_the_dead_zone_ends_where_the_length_begins_to_grow():
    edge = authors.dead_zone(1.0)
    assert edge == pytest.approx(0.743, abs=1e-3)
    assert authors.dead_zone(0.5) == 0
    x = torch.full((1, 16), 1.0)
    A = torch.full((1, 16), 1 / 16)
    direction = torch.zeros(16, 1)
    direction[0] = 1
    K = authors.effective_curvature(1.0)
    unit = K.sqrt() * torch.sinh(1 / K.sqrt()) / 4  # |y| for this token when B has length 1

    def length(y):
        return authors.authors_update(x, A, direction * (y / unit), 1.0).norm().item()

    assert length(0.01) == pytest.approx(length(edge - 1e-3), rel=1e-4)
    assert length(edge + 1e-3) > 10 * length(edge - 1e-3)


def test_the_page_in_the_repository_is_the_one_that_the_program_prints():
    kept = (Path(authors.__file__).parent / "AUTHORS.md").read_text(encoding="utf-8")

    def skeleton(page):  # without the digits, which differ in their last place between machines
        return "".join(character for character in page if not character.isdigit())

    assert (
        skeleton(authors.page()).split("\n## ")[0][:300] == skeleton(kept).split("\n## ")[0][:300]
    )
    for number in (f"{authors.lorentz_floor(0.5):.3f}", f"{authors.dead_zone(1.0):.3f}"):
        assert number in kept
