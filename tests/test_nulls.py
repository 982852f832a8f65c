"""analysis/nulls.py: each null keeps what it should keep and loses the rest, and each space has the
distances of its name."""

import itertools
import math

import pytest
import torch

from analysis import nulls
from analysis.geometry import delta_hyperbolicity

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8], [9, 7, 9, 3]]


# --- other tokens ---------------------------------------------------------------------------------


def test_shuffled_prompts_have_the_same_tokens_in_other_prompts():
    shuffled = nulls.shuffled_prompts(PROMPTS, generator())
    assert [len(prompt) for prompt in shuffled] == [5, 7, 4]
    assert sorted(itertools.chain(*shuffled)) == sorted(itertools.chain(*PROMPTS))
    assert [sorted(prompt) for prompt in shuffled] != [sorted(prompt) for prompt in PROMPTS]


def test_reordered_prompts_have_their_own_tokens_and_other_base_points():
    reordered = nulls.reordered_prompts(PROMPTS, generator())
    assert [sorted(prompt) for prompt in reordered] == [sorted(prompt) for prompt in PROMPTS]
    assert [prompt[0] for prompt in reordered] != [prompt[0] for prompt in PROMPTS]


def test_random_tokens_repeat_where_the_prompts_tokens_do():
    drawn = nulls.random_tokens(PROMPTS, vocabulary=1000, generator=generator())
    assert max(itertools.chain(*drawn)) > 100
    for old, new in zip(PROMPTS, drawn):
        for i, j in itertools.combinations(range(len(old)), 2):
            assert (old[i] == old[j]) == (new[i] == new[j])


# --- other vectors --------------------------------------------------------------------------------


def test_permuted_entries_keep_each_column_and_lose_the_rows():
    points = randn(50, 4)
    permuted = nulls.entries_permuted(points, generator(1))
    assert torch.equal(permuted.sort(dim=0).values, points.sort(dim=0).values)
    assert (permuted == points).float().mean() < 0.1
    correlated = points[:, :1].expand(50, 4)
    found = torch.corrcoef(nulls.entries_permuted(correlated, generator(1)).T)
    assert (found - torch.eye(4)).abs().max() < 0.5


def test_gaussian_like_has_the_mean_and_the_covariance():
    points = randn(400, 3) @ randn(3, 3, seed=1) + 5
    mean, factor = nulls.moments(points)
    expected = torch.cov(points.double().T)
    assert torch.allclose(factor @ factor.T, expected, rtol=1e-6)
    drawn = nulls.gaussian_like(torch.empty(200_000, 3), generator(2), mean, factor)
    assert torch.allclose(drawn.mean(dim=0).double(), points.double().mean(dim=0), atol=0.05)
    assert torch.allclose(torch.cov(drawn.double().T), expected, atol=0.05 * expected.max())


def test_gaussian_of_same_norms_keeps_each_length():
    points = randn(50, 4) * torch.arange(1, 51)[:, None]
    drawn = nulls.gaussian_of_same_norms(points, generator(1))
    assert torch.allclose(drawn.norm(dim=1), points.norm(dim=1))
    assert torch.cosine_similarity(drawn, points).abs().max() < 0.999


def test_distances_in_a_hierarchy_grow_with_the_path_between_its_vectors():
    """In many dimensions steps are orthogonal: squared distances count the steps."""
    vectors = nulls.hierarchy(torch.empty(15, 20_000), generator())
    steps = torch.cdist(vectors.double(), vectors.double()).square() / 20_000
    rounded = steps.round()
    assert (steps - rounded).abs().max() < 0.1
    assert rounded.max() == 6  # from leaf to leaf over the root of a binary tree of 15
    assert delta_hyperbolicity(distances=rounded) == 0


def test_delta_of_gaussian_vectors_falls_with_the_dimension_alone():
    means = []
    for d in (8, 64, 512, 4096):
        drawn = [delta_hyperbolicity(randn(40, d, seed=seed)) for seed in range(10)]
        means.append(sum(drawn) / 10)
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.06 < 0.3 < means[0]


# --- other spaces ---------------------------------------------------------------------------------


def test_the_sphere_has_angles():
    angles = nulls.sphere(200, generator())
    assert 3.0 < angles.max() <= math.pi
    right = angles[angles > 0].mean().item()
    assert right == pytest.approx(math.pi / 2, abs=0.05)


def breadth_first(edges, start):
    found = {start: 0}
    layer = [start]
    while layer:
        following = []
        for node in layer:
            for neighbour in edges[node]:
                if neighbour not in found:
                    found[neighbour] = found[node] + 1
                    following.append(neighbour)
        layer = following
    return found


@pytest.mark.parametrize("mean_degree", [1.5, 4])
def test_a_random_graph_has_the_distances_of_a_walk_through_it(mean_degree):
    distances = nulls.random_graph(60, mean_degree, generator())
    edges = [(row == 1).nonzero().flatten().tolist() for row in distances]
    for start, row in enumerate(distances.tolist()):
        walked = breadth_first(edges, start)
        assert [walked[node] for node in range(len(row))] == row


def test_the_papers_value_of_a_random_graph():
    """The paper gives 0.62. A graph of 60 nodes with four edges at a node has it."""
    drawn = []
    for seed in range(20):
        distances = nulls.random_graph(60, 4, generator(seed))
        drawn.append(delta_hyperbolicity(distances=distances))
    assert sum(drawn) / 20 == pytest.approx(0.62, abs=0.06)


def test_a_random_tree_has_delta_0():
    distances = nulls.random_tree(50, generator())
    assert distances.isfinite().all()
    assert delta_hyperbolicity(distances=distances) == pytest.approx(0, abs=1e-6)
