"""What delta is without a model: vectors and spaces to put beside an embedding's measurement.

A low delta says that a prompt's embeddings are like a tree only if vectors that cannot be have a
higher one. TOKENS take other tokens of the same embedding, and so the prompt's meaning out. VECTORS
keep less and less of it; the last ones do descend from each other. Of SPACES delta is known.
"""

import functools

import torch
import torch.nn.functional as F
from scipy.sparse import csgraph


def shuffled_prompts(prompts, vocabulary, generator):
    """All prompts' tokens in random order, cut at the same lengths."""
    text = torch.tensor([token for prompt in prompts for token in prompt])
    text = text[torch.randperm(len(text), generator=generator)]
    return [part.tolist() for part in text.split([len(prompt) for prompt in prompts])]


def random_tokens(prompts, vocabulary, generator):
    """Each token becomes a random one of the vocabulary; repeats in a prompt stay repeats."""
    result = []
    for prompt in prompts:
        places = torch.tensor(prompt).unique(return_inverse=True)[1]
        result.append(torch.randperm(vocabulary, generator=generator)[places].tolist())
    return result


def moments(points):
    """(m, d) -> the mean (d,), and a factor (d, d) with factor @ factor.T = the covariance."""
    points = points.double()
    variances, directions = torch.linalg.eigh(torch.cov(points.T))
    return points.mean(dim=0), directions * variances.clamp(min=0).sqrt()


def entries_permuted(points, whole, generator):
    """Each column's entries in a random order of its own."""
    order = torch.rand(points.shape, generator=generator).argsort(dim=0)
    return points.gather(0, order)


def gaussian_like(points, whole, generator):
    """Gaussian vectors of the mean and the covariance in `whole`, which moments() measured."""
    mean, factor = whole
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    return (mean + noise @ factor.T).float()


def gaussian_of_same_norms(points, whole, generator):
    """Random directions, each with the length of one of the points."""
    directions = F.normalize(torch.randn(points.shape, generator=generator), dim=1)
    return directions * points.norm(dim=1, keepdim=True)


def gaussian(points, whole, generator):
    """Gaussian vectors, all of one law."""
    return torch.randn(points.shape, generator=generator)


def hierarchy(points, whole, generator):
    """A binary tree in as many dimensions: each vector is its parent's plus a Gaussian step."""
    steps = torch.randn(points.shape, generator=generator)
    result = torch.empty_like(steps)
    result[0] = steps[0]
    for child in range(1, len(steps)):
        result[child] = result[(child - 1) // 2] + steps[child]
    return result[torch.randperm(len(steps), generator=generator)]


TOKENS = {  # prompts, as lists of token ids -> as many of the same lengths
    "all prompts' tokens, shuffled among them": shuffled_prompts,
    "random tokens of the vocabulary": random_tokens,
}
VECTORS = {  # (m, d) -> (m, d)
    "the tokens' entries, permuted in each column": entries_permuted,
    "Gaussian, with the tokens' mean and covariance": gaussian_like,
    "Gaussian, with the tokens' norms": gaussian_of_same_norms,
    "Gaussian": gaussian,
    "a hierarchy: each vector is its parent's plus noise": hierarchy,
}


def sphere(n, generator):
    """The angles (n, n) between random points on the sphere in three dimensions."""
    points = F.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=1)
    return (points @ points.T).clamp(-1, 1).acos().fill_diagonal_(0)


def random_graph(n, generator, mean_degree):
    """The largest connected part of a graph whose edges each exist with the same probability."""
    edges = (torch.rand(n, n, generator=generator) < mean_degree / (n - 1)).triu(diagonal=1)
    distances = torch.tensor(csgraph.shortest_path(edges.float().numpy(), directed=False))
    reached = distances.isfinite()
    part = reached[reached.sum(dim=1).argmax()]
    return distances[part][:, part]


def random_tree(n, generator):
    """A tree in which each node hangs on a random earlier one, by an edge of length 0.5 to 1.5."""
    lengths = torch.zeros(n, n)
    for child in range(1, n):
        parent = torch.randint(child, (), generator=generator)
        lengths[child, parent] = 0.5 + torch.rand((), generator=generator)
    return torch.tensor(csgraph.shortest_path(lengths.numpy(), directed=False))


GRAPHS = {
    f"random graph, {degree} edges at a node": functools.partial(random_graph, mean_degree=degree)
    for degree in (2, 4, 8, 16, 32)
}
# (n, generator) -> the distances between n points at most, whose delta is known
SPACES = {"sphere, angles": sphere, **GRAPHS, "tree": random_tree}
