"""A stack of adapters: many runs side by side on one frozen model, each with its own rate.

The batch of the model is (runs x rows, tokens), and each run's adapter sees its own rows alone. The
updates are that of hyplora.py, mapped over the runs by vmap, and those of benchmarks/authors.py.
LoRA is two batched products, and DoRA is LoRA with the rows of W + scaling BA brought to a learned
length.
"""

import math

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from benchmarks.authors import authors_update, simplified_update
from benchmarks.smollm2_plan import layer_of
from hyplora import hyplora_update


def released_update(kind, x, A, B, *curve):
    """The update of one of the authors' layers, which compute in float32."""
    function = authors_update if kind == "authors" else simplified_update
    return function(x.float(), A, B, *curve)


# Their many passes over float32 numbers are the time of a stack on a GPU: there they are fused.
fused_released_update = torch.compile(released_update, dynamic=True)


class Part(nn.Module):
    """The adapters of those runs of a stack whose update is of one kind, on one linear layer.

    rates: (n,), the learning rate of each run. K_rates: (n,), that of what determines K, as a
    multiple; where it is 0, K is fixed.
    """

    def __init__(self, kind, base, lora_A, alphas, curvatures, rates, K_rates):
        super().__init__()
        count, rank, width = lora_A.shape
        self.kind = kind
        self.weight = base.weight
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(count, base.out_features, rank))
        self.scaling = (alphas / rank).view(-1, 1, 1)
        self.rates = rates
        self.K_rates = K_rates
        self.curve = nn.ParameterDict()
        if kind == "hyplora":
            self.start = curvatures  # K / exp(lora_K), shape (n,)
            self.curve["lora_K"] = nn.Parameter(torch.zeros_like(curvatures))
        if kind in ("authors", "simplified"):
            self.start = curvatures
            self.curve["k"] = nn.Parameter(curvatures.clone())
        if kind == "authors":
            self.curve["scale"] = nn.Parameter(torch.full_like(curvatures, math.sqrt(width)))
        if kind == "dora":
            lengths = self.weight.float().norm(dim=1)
            self.lengths = nn.Parameter(lengths.repeat(count, 1))

    def groups(self):
        """(parameter, the rate of each run) for all that trains."""
        pairs = [(self.lora_A, self.rates), (self.lora_B, self.rates)]
        if self.kind == "dora":
            pairs.append((self.lengths, self.rates))
        return pairs + [(p, self.rates * self.K_rates) for p in self.curve.values()]

    def K(self):
        """K of each run; for the authors' layers their parameter k."""
        learned = self.K_rates > 0
        if self.kind == "hyplora":
            lora_K = self.curve["lora_K"]
            return self.start * torch.where(learned, lora_K, lora_K.detach()).exp()
        return self.curve["k"]

    def update(self, x):
        """The update before alpha / rank. x: (n, tokens, d_in) -> (n, tokens, d_out)."""
        A = self.lora_A
        B = self.lora_B
        if self.kind in ("lora", "dora"):
            return x @ A.mT.to(x.dtype) @ B.mT.to(x.dtype)
        if self.kind == "hyplora":
            return torch.vmap(hyplora_update)(x, A, B, self.K())
        # The authors' layers save much for the backward pass: compute it anew.
        curve = [value.view(-1, 1, 1) for value in self.curve.values()]
        update = fused_released_update if x.is_cuda else released_update
        options = dict(use_reentrant=False, preserve_rng_state=False)
        return checkpoint(update, self.kind, x, A, B, *curve, **options)

    def forward(self, x, out):
        """out + alpha / rank * update(x), for DoRA with the rows at their learned lengths."""
        scaling = self.scaling.to(out.dtype)
        if self.kind == "lora":
            B = (self.scaling * self.lora_B).to(x.dtype)
            return torch.baddbmm(out, x @ self.lora_A.mT.to(x.dtype), B.mT)
        out = torch.addcmul(out, self.update(x).to(out.dtype), scaling)
        if self.kind == "dora":
            out = out * (self.lengths / self.row_lengths()).unsqueeze(1).to(out.dtype)
        return out

    @torch.no_grad()
    def row_lengths(self):
        """The lengths of the rows of W + scaling BA, (n, d_out). DoRA takes them as constants."""
        W = self.weight.float()
        A = self.lora_A
        B = self.scaling * self.lora_B
        squares = W.square().sum(1) + 2 * ((W @ A.mT) * B).sum(2) + ((B @ (A @ A.mT)) * B).sum(2)
        return squares.sqrt()

    @torch.no_grad()
    def measure(self, x):
        """{radius, gain, phi, phi_spread, K_moved: (n,)}, as hyplora_statistics has them."""
        x = x.float()
        flat = (x @ self.lora_A.mT @ self.lora_B.mT).norm(dim=2).clamp(min=1e-18)
        length = x.norm(dim=2).clamp(min=1e-18)
        phi = self.update(x).norm(dim=2) / flat
        nothing = torch.full_like(self.rates, math.nan)
        seen = dict(radius=nothing, gain=(flat / length).mean(1), phi=phi.mean(1))
        seen["phi_spread"] = phi.std(1, correction=0)
        seen["K_moved"] = nothing
        if self.kind == "hyplora":
            seen["radius"] = (length / self.K().sqrt().unsqueeze(1)).mean(1)
        if self.kind not in ("lora", "dora"):
            seen["K_moved"] = self.K() / self.start
        return seen


class Stacked(nn.Module):
    """One frozen linear layer with the parts of a stack. With a mask it notes what it measures."""

    def __init__(self, base, parts):
        super().__init__()
        self.base = base
        self.parts = nn.ModuleList(parts)
        self.sizes = [len(part.lora_A) for part in parts]
        self.mask = None

    def forward(self, x):
        out = self.base(x)
        runs = sum(self.sizes)
        pieces = x.reshape(runs, -1, x.shape[-1]).split(self.sizes)
        outs = out.reshape(runs, -1, out.shape[-1]).split(self.sizes)
        if self.mask is not None:
            seen = [part.measure(piece[:, self.mask]) for part, piece in zip(self.parts, pieces)]
            self.seen = {key: torch.cat([s[key] for s in seen]) for key in seen[0]}
        result = [part(piece, o) for part, piece, o in zip(self.parts, pieces, outs)]
        return torch.cat(result).view(out.shape)

    @staticmethod
    def parameter_groups(stacks):
        """For each kind, the parameters of all layers with their rates: the arguments of Adam."""
        layers = list(stacks.values())
        for column in zip(*(layer.parts for layer in layers)):
            pairs = [pair for part in column for pair in part.groups()]
            yield [p for p, _ in pairs], [rates for _, rates in pairs]


def put_in_place(model, squares, runs, methods, rank):
    """{name: Stacked} of fresh adapters, put where the linear layers were. squares: {name: |x|^2}.

    The runs must be in the order of their kinds. A is drawn as in LoRA, by the seed of the run.
    """
    device = next(model.parameters()).device
    kinds = [methods[run.method].kind for run in runs]
    if kinds != sorted(kinds):
        raise ValueError("the runs of one kind must stand together")
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]

    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=device)

    stacks = {}
    for name, square in squares.items():
        base = model.get_submodule(name)
        width = base.in_features
        starts = [2 * torch.rand(rank, width, generator=g) - 1 for g in generators]
        parts = []
        for kind in sorted(set(kinds)):
            chosen = [i for i, k in enumerate(kinds) if k == kind]
            table = [methods[runs[i].method] for i in chosen]
            unit = [square if method.calibrated else width for method in table]
            curvatures = [method.curvature for method in table]
            if kind == "hyplora":
                curvatures = [c * u for c, u in zip(curvatures, unit)]
            A = torch.stack([starts[i] for i in chosen]).to(device) / math.sqrt(width)
            alphas = column([runs[i].alpha for i in chosen])
            trained = [layer_of(name) in method.layers for method in table]
            rates = column([runs[i].lr * trains for i, trains in zip(chosen, trained)])
            K_rates = column([method.K_rate for method in table])
            parts.append(Part(kind, base, A, alphas, column(curvatures), rates, K_rates))
        stacks[name] = Stacked(base, parts)
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, stacks[name])
    return stacks


def take_out(model, stacks):
    """Put the linear layers back."""
    for name, stack in stacks.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, stack.base)


class Adam:
    """Adam with a rate for each run, behind a clip of each run's whole gradient at the length 1.

    params: tensors (n, ...). rates: for each of them a tensor (n,). What has the rate 0 does not
    count in the clip.
    """

    def __init__(self, params, rates, betas=(0.9, 0.999), eps=1e-8):
        self.params = params
        self.rates = [rate.view(-1, *[1] * (p.ndim - 1)) for p, rate in zip(params, rates)]
        self.trains = [(rate != 0).float() for rate in self.rates]
        self.first = [torch.zeros_like(p) for p in params]
        self.second = [torch.zeros_like(p) for p in params]
        self.betas = betas
        self.eps = eps
        self.count = 0

    @torch.no_grad()
    def step(self, pace):
        self.count += 1
        grads = [p.grad.mul_(trains) for p, trains in zip(self.params, self.trains)]
        lengths = torch.stack([g.view(len(g), -1).norm(dim=1) for g in grads]).norm(dim=0)
        clip = (1 / (lengths + 1e-6)).clamp(max=1)
        for g in grads:
            g.mul_(clip.view(-1, *[1] * (g.ndim - 1)))
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, grads, grads, value=1 - beta2)
        steps = torch._foreach_div(self.second, 1 - beta2**self.count)
        torch._foreach_sqrt_(steps)
        torch._foreach_add_(steps, self.eps)
        steps = torch._foreach_div(self.first, steps)
        for p, step, rate in zip(self.params, steps, self.rates):
            p.addcmul_(step, rate, value=-pace / (1 - beta1**self.count))
            p.grad = None


def fuse_norms(model):
    """Let each RMSNorm be PyTorch's own: one kernel instead of six."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                fused = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                fused.weight = child.weight
                setattr(owner, name, fused)
