"""One picture of what a HypLoRA layer does: the three maps on two tokens, and phi over |x| for several K.

python -m examples.hyperboloid               # writes assets/hyperboloid.png; needs matplotlib
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from hyplora import expmap0, hyplora_update, llr, logmap0


def draw_maps(axes, K=1.0, gain=0.5):
    """The hyperboloid over one space coordinate, where BA is a number; short and long token, up, across and down."""
    line = expmap0(torch.linspace(-1.2, 2.15, 200)[:, None], K)
    axes.plot(line[:, 1], line[:, 0], color="tab:blue", label="hyperboloid")
    axes.axhline(
        K**0.5, color="gray", linewidth=1, label="tangent plane at its lowest point: where x and the update live"
    )
    A, B = torch.tensor([[1.0]]), torch.tensor([[gain]])
    for x, color in ((0.7, "tab:green"), (2.0, "tab:red")):
        x = torch.tensor([x])
        p = expmap0(x, K)
        q = llr(p, A, B, K)
        y = logmap0(q, K)
        path = [(x.item(), K**0.5), (p[1].item(), p[0].item()), (q[1].item(), q[0].item()), (y.item(), K**0.5)]
        names = (("expmap0", 0.1, "left"), ("llr: space times BA", -0.1, "right"), ("logmap0", -0.1, "right"))
        for start, end, (name, offset, side) in zip(path, path[1:], names):
            arrow = dict(arrowstyle="->", color=color, linewidth=1.5, shrinkA=4, shrinkB=4)
            axes.annotate("", end, start, arrowprops=arrow)
            if x > 1:
                middle = (start[0] + end[0]) / 2 + offset, (start[1] + end[1]) / 2
                axes.text(*middle, name, color=color, ha=side)
        axes.plot(*path[0], "o", color=color, markersize=8)
        axes.plot(*path[3], "D", color=color, markersize=8)
        axes.plot(gain * x.item(), K**0.5, "x", color="black", markersize=9, markeredgewidth=2)
    for marker, color, name in (
        ("o", "gray", "x"),
        ("D", "gray", "HypLoRA's update"),
        ("x", "black", "LoRA's update, BAx"),
    ):
        axes.plot([], [], marker, color=color, label=name)
    axes.set(xlabel="space", ylabel="time", title="up, times BA = 1/2, down (K = 1)", xlim=(-1.5, 4.2), ylim=(0.6, 4.4))
    axes.legend(loc="upper left", fontsize=8)


def draw_phi(axes):
    length = torch.linspace(0.01, 4, 200)
    for K in (math.inf, 8.0, 2.0, 1.0, 0.5):
        x = torch.stack([length, torch.zeros_like(length)], dim=1)
        style = dict(color="black", linestyle="--", label="K = ∞: LoRA") if K == math.inf else dict(label=f"K = {K:g}")
        for gain, width in ((0.5, 2.0), (2.0, 0.8)):
            phi = hyplora_update(x, torch.eye(2), gain * torch.eye(2), K)[:, 0] / (gain * length)
            (line,) = axes.plot(length, phi, linewidth=width, **style)
            style = dict(color=line.get_color(), linestyle=line.get_linestyle())
    axes.set(xlabel="|x|", ylabel="phi: HypLoRA's update over LoRA's", ylim=(0, 2.1))
    axes.set_title("phi, for |BAx| = |x|/2 (thick) and 2|x| (thin)")
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets"))
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("the picture needs: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    draw_maps(left)
    draw_phi(right)
    args.out.mkdir(exist_ok=True)
    figure.savefig(args.out / "hyperboloid.png", dpi=110)
    print(args.out / "hyperboloid.png")


if __name__ == "__main__":
    main()
