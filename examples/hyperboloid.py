"""One picture of what a HypLoRA layer does: the three maps on a few points, and phi over |x| for several K.

python -m examples.hyperboloid               # writes assets/hyperboloid.png; needs matplotlib
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from hyplora import expmap0, hyplora_update, llr, logmap0


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

    figure = plt.figure(figsize=(13, 5), layout="constrained")
    space = figure.add_subplot(1, 2, 1, projection="3d")
    K = 1.0
    radius, angle = torch.meshgrid(torch.linspace(0, 1.9, 30), torch.linspace(0, 2 * math.pi, 60), indexing="ij")
    sheet = expmap0(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), K)
    space.plot_surface(*(sheet[..., i].numpy() for i in (1, 2, 0)), alpha=0.18, color="tab:blue", linewidth=0)
    A, B = torch.tensor([[1.0, 0.4]]), torch.tensor([[0.3], [0.9]])  # rank 1: every update lies on one line
    for i, x in enumerate(torch.tensor([[1.6, 0.2], [0.5, -1.2], [-1.1, 0.9]])):
        p = expmap0(x, K)
        q = llr(p, A, B, K)
        y = logmap0(q, K)
        path = torch.stack([torch.cat([torch.tensor([K**0.5]), x]), p, q, torch.cat([torch.tensor([K**0.5]), y])])
        color = f"C{i + 1}"
        space.plot(*(path[:, j].numpy() for j in (1, 2, 0)), ":", color=color)
        for point, mark in zip(path, ("o", "^", "s", "D")):
            space.scatter(*(point[j].item() for j in (1, 2, 0)), color=color, marker=mark, s=45)
    names = ("x, on the tangent plane", "expmap0(x)", "llr(expmap0(x))", "the update: logmap0 of it")
    handles = [plt.Line2D([], [], color="gray", marker=m, linestyle="") for m in ("o", "^", "s", "D")]
    space.legend(handles, names, loc="upper left", fontsize=9)
    space.set(xlabel="space 1", ylabel="space 2", zlabel="time", title="up, times BA, down (K = 1)")
    space.view_init(elev=14, azim=-62)

    curves = figure.add_subplot(1, 2, 2)
    length = torch.linspace(0.01, 4, 200)
    for K, style in ((math.inf, "k--"), (8.0, "-"), (2.0, "-"), (1.0, "-"), (0.5, "-")):
        x = torch.stack([length, torch.zeros_like(length)], dim=1)
        flat = K == math.inf
        label, color = ("K = ∞: LoRA", "black") if flat else (f"K = {K:g}", None)
        for gain, weight in ((0.5, 2.0), (2.0, 0.8)):
            phi = hyplora_update(x, torch.eye(2), gain * torch.eye(2), K)[:, 0] / (gain * length)
            (line,) = curves.plot(length, phi, style, linewidth=weight, color=color, label=label)
            label, color = None, line.get_color()
    curves.set(xlabel="|x|", ylabel="phi: HypLoRA's update over LoRA's", ylim=(0, 2.6))
    curves.set_title("phi, for |BAx| = |x|/2 (thick) and 2|x| (thin)")
    curves.legend()
    args.out.mkdir(exist_ok=True)
    figure.savefig(args.out / "hyperboloid.png", dpi=110)
    print(args.out / "hyperboloid.png")


if __name__ == "__main__":
    main()
