"""What delta is without a model: vectors and spaces to put beside an embedding's measurement.

A low delta says that a prompt's embeddings are like a tree only if it is lower than that of
vectors which cannot be. Four kinds of those are here:

    other tokens      shuffled_prompts, reordered_prompts, random_tokens: the same embedding, with
                      the prompt's meaning taken out
    other vectors     entries_permuted, gaussian_like, gaussian_of_same_norms, gaussian: as many
                      vectors of the same dimension, with less and less of the embedding left
    a hierarchy       hierarchy: vectors that do descend from each other, in that dimension
    other spaces      sphere, random_graph, random_tree: distances whose delta is known

Every function draws from the generator that it is given. This file needs torch alone.
"""

import math

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Other tokens: prompts (lists of token ids) -> as many prompts of the same lengths


def shuffled_prompts(prompts, generator):
    """All prompts' tokens in random order, cut at the same lengths."""
    text = torch.tensor([token for prompt in prompts for token in prompt])
    text = text[torch.randperm(len(text), generator=generator)]
    return [part.tolist() for part in text.split([len(prompt) for prompt in prompts])]


def reordered_prompts(prompts, generator):
    """Each prompt's own tokens in random order, which gives it another base point."""
    result = []
    for prompt in prompts:
        order = torch.randperm(len(prompt), generator=generator)
        result.append([prompt[i] for i in order])
    return result


def random_tokens(prompts, vocabulary, generator):
    """Each token becomes a random one of the vocabulary; repeats in a prompt stay repeats."""
    result = []
    for prompt in prompts:
        kinds = sorted(set(prompt))
        drawn = torch.randperm(vocabulary, generator=generator)[: len(kinds)].tolist()
        other = dict(zip(kinds, drawn))
        result.append([other[token] for token in prompt])
    return result


# --------------------------------------------------------------------------------------------------
# Other vectors: (m, d) -> (m, d)


def entries_permuted(points, generator):
    """Each column's entries in a random order of its own."""
    order = torch.rand(points.shape, generator=generator).argsort(dim=0)
    return points.gather(0, order)


def moments(points):
    """(m, d) -> the mean (d,), and a factor (d, d) with factor @ factor.T = the covariance."""
    points = points.double()
    variances, directions = torch.linalg.eigh(torch.cov(points.T))
    return points.mean(dim=0), directions * variances.clamp(min=0).sqrt()


def gaussian_like(points, generator, mean, factor):
    """Gaussian vectors of a mean and a covariance, which moments() measured."""
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    return (mean + noise @ factor.T).float()


def gaussian_of_same_norms(points, generator):
    """Random directions, each with the length of one of the points."""
    directions = F.normalize(gaussian(points, generator), dim=1)
    return directions * points.norm(dim=1, keepdim=True)


def gaussian(points, generator):
    return torch.randn(points.shape, generator=generator)


def hierarchy(points, generator):
    """A binary tree in as many dimensions: each vector is its parent's plus a Gaussian step."""
    steps = torch.randn(points.shape, generator=generator)
    result = torch.empty_like(steps)
    result[0] = steps[0]
    for child in range(1, len(steps)):
        result[child] = result[(child - 1) // 2] + steps[child]
    return result[torch.randperm(len(steps), generator=generator)]


# --------------------------------------------------------------------------------------------------
# Other spaces: n -> distances (n, n)


def sphere(n, generator):
    """The angles between random points on the sphere in three dimensions."""
    points = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    points = F.normalize(points, dim=1)
    return (points @ points.T).clamp(-1, 1).acos().fill_diagonal_(0)


def random_graph(n, mean_degree, generator):
    """The largest connected part of a graph whose edges each exist with the same probability."""
    drawn = torch.rand(n, n, generator=generator) < mean_degree / (n - 1)
    upper = drawn.triu(diagonal=1)
    weights = torch.full((n, n), math.inf)
    weights[upper | upper.T] = 1.0
    distances = shortest_paths(weights)
    reached = distances.isfinite()
    part = reached[reached.sum(dim=1).argmax()]
    return distances[part][:, part]


def random_tree(n, generator):
    """A tree in which each node hangs on a random earlier one, by an edge of length 0.5 to 1.5."""
    weights = torch.full((n, n), math.inf)
    for child in range(1, n):
        parent = torch.randint(child, (), generator=generator)
        length = 0.5 + torch.rand((), generator=generator)
        weights[child, parent] = length
        weights[parent, child] = length
    return shortest_paths(weights)


def shortest_paths(weights):
    """Lengths of edges (n, n), infinity where there is none -> lengths of paths (n, n)."""
    distances = weights.clone().fill_diagonal_(0)
    for k in range(len(distances)):
        torch.minimum(distances, distances[:, k, None] + distances[k], out=distances)
    return distances
