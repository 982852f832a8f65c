"""The methods that benchmarks/smollm2.json compares, and the rate at which each was trained.

A method's rate is chosen by validation loss on seeds that are not reported: first in factors of 4
with one seed, on and on until the best is not at an edge, then in factors of 2 around it with two.
"""

import math
import statistics
from dataclasses import dataclass

RHOS = (0.4, 1, 2, 4, 8)
LAYERS = ("q", "k", "v", "up", "down")
SWEEP_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Method:
    kind: str  # the update: lora, dora, hyplora, authors or simplified
    rate: float = 1e-3  # the sweep begins around it
    alpha: float = 64
    curvature: float = math.inf
    calibrated: bool = False
    K_rate: float = 0  # the rate of what determines K, in units of the rate of A and B
    control_of: str = ""
    layers: tuple = LAYERS  # those that are trained


@dataclass(frozen=True)
class Run:
    method: str
    lr: float
    seed: int
    alpha: float

    def key(self):
        return f"{self.method} | {self.lr:.4g} | {self.seed}"


def methods():
    table = {
        "LoRA": Method("lora"),
        "DoRA": Method("dora"),
        "HypLoRA, guessed unit": Method("hyplora", curvature=0.5, K_rate=1),
        "authors' hyplora": Method("authors", 4e-3, alpha=128, curvature=1.0, K_rate=1),
        "authors' simplified": Method("simplified", 4e-3, alpha=256, curvature=0.5, K_rate=1),
    }
    for rho in RHOS:
        phi = math.sinh(rho) / rho
        rate = 1e-3 * 2 ** -round(0.75 * math.log2(phi))
        name = f"HypLoRA, rho {rho:g}"
        table[name] = Method("hyplora", rate, curvature=rho**-2, calibrated=True)
        if rho == 2:
            learned = Method("hyplora", rate, curvature=rho**-2, calibrated=True, K_rate=20)
            table[f"{name}, K learned"] = learned
        table[f"control, rho {rho:g}"] = Method("lora", control_of=name)
    # Before down_proj tokens differ most in length, so that HypLoRA differs most from LoRA.
    down = dict(rate=4e-3, layers=("down",))
    name = "HypLoRA, rho 1, down alone"
    table["LoRA, down alone"] = Method("lora", **down)
    table[name] = Method("hyplora", curvature=1, calibrated=True, **down)
    table["control, rho 1, down alone"] = Method("lora", control_of=name, **down)
    return table


METHODS = methods()


def alpha_of(name, done):
    """The method's alpha; a control's is that times the mean phi of its HypLoRA."""
    method = METHODS[name]
    if not method.control_of:
        return method.alpha
    rate = sweep(method.control_of, done)
    pair = [Run(method.control_of, rate, seed, method.alpha) for seed in SWEEP_SEEDS]
    phi = statistics.mean(done[run.key()]["phi"] for run in pair)
    return float(f"{method.alpha * phi:.4g}")


def sweep(name, done):
    """The rate that was chosen."""
    alpha = alpha_of(name, done)
    center = METHODS[name].rate
    if METHODS[name].control_of:
        center = sweep(METHODS[name].control_of, done)

    def loss(lr, seeds):
        losses = [done[Run(name, lr, seed, alpha).key()]["validation"] for seed in seeds]
        mean = statistics.mean(losses)
        return mean if math.isfinite(mean) else math.inf

    # First in factors of 4 with one seed, on and on until the best is not at an edge.
    rates = [center / 4, center, center * 4]
    while True:
        best = min(rates, key=lambda lr: loss(lr, SWEEP_SEEDS[:1]))
        if best not in (rates[0], rates[-1]) or len(rates) > 8:
            break
        rates = [rates[0] / 4, *rates] if best == rates[0] else [*rates, rates[-1] * 4]
    # Then in factors of 2 around it with all sweep seeds.
    return min([best / 2, best, best * 2], key=lambda lr: loss(lr, SWEEP_SEEDS))
