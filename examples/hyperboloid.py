"""One picture of what a HypLoRA layer does: its three maps on one token, and the law of sinh.

python -m examples.hyperboloid         # writes assets/hyperboloid.png; needs matplotlib
"""

import argparse
import sys
from pathlib import Path

import torch

from hyplora import expmap0, hyplora_update, llr, logmap0

TOKEN = "tab:blue"
UPDATE = "tab:red"
LORA = "black"


def draw_maps(axes, x=1.4, gain=0.5):
    """The hyperboloid over one space coordinate, where BA is the number gain, and a token's way."""
    K = torch.tensor(1.0)
    root = K.sqrt().item()
    sheet = expmap0(torch.linspace(-0.9, 1.56, 200)[:, None], K)
    axes.plot(sheet[:, 1], sheet[:, 0], color="gray", linewidth=2)
    axes.text(-1.05, 1.5, "hyperboloid", color="gray")
    axes.axhline(root, color="gray", linewidth=1)
    axes.text(2.35, root + 0.03, "vectors live here", color="gray", ha="right")
    axes.plot(0, root, "|", color="gray", markersize=12)
    axes.text(0, root - 0.06, "0", color="gray", ha="center", va="top")

    A = torch.tensor([[1.0]])
    B = torch.tensor([[gain]])
    lifted = expmap0(torch.tensor([x]), K)
    moved = llr(lifted, A, B, K)
    update = logmap0(moved, K).item()
    stops = [
        (x, root),
        (lifted[1].item(), lifted[0].item()),
        (moved[1].item(), moved[0].item()),
        (update, root),
    ]
    bends = (0.0, 0.3, 0.0)
    for start, end, bend in zip(stops[:-1], stops[1:], bends):
        arrow = {
            "arrowstyle": "-|>,head_width=0.35,head_length=0.7",
            "color": UPDATE,
            "linewidth": 2,
            "shrinkA": 6,
            "shrinkB": 6,
            "connectionstyle": f"arc3,rad={bend}",
        }
        axes.annotate("", end, start, arrowprops=arrow)
    axes.text(1.72, 1.5, "1. up\nexpmap0", color=UPDATE)
    axes.text(1.05, 2.02, "2. across\nspace times BA", color=UPDATE, ha="right")
    axes.text(0.93, 1.14, "3. down\nlogmap0", color=UPDATE)
    for stop in stops[1:3]:
        axes.plot(*stop, "o", color=UPDATE, markersize=7)

    marks = (
        (x, "o", TOKEN, f"token x\n{x:.2f}", "left"),
        (update, "D", UPDATE, f"HypLoRA\n{update:.2f}", "left"),
        (gain * x, "X", LORA, f"LoRA\n{gain * x:.2f}", "right"),
    )
    for position, marker, color, label, side in marks:
        axes.plot(position, root, marker, color=color, markersize=10)
        axes.text(position, root - 0.06, label, color=color, ha=side, va="top")
    axes.set(xlim=(-1.15, 2.4), ylim=(0.7, 2.45), xlabel="space", ylabel="time")
    axes.set_title(f"One token through the three maps, BA = {gain:g}, K = 1")


def radius_of_update(radius, gain):
    """Both in units of sqrt K, as hyplora_update computes it for tokens (n,) in the plane."""
    tokens = torch.stack([radius, torch.zeros_like(radius)], dim=1)
    update = hyplora_update(tokens, torch.eye(2), gain * torch.eye(2), torch.tensor(1.0))
    return update.norm(dim=1)


def draw_law(axes, longest=5.0):
    radius = torch.linspace(0.0, longest, 200)
    gains = {"4": 4.0, "2": 2.0, "1": 1.0, "1/2": 0.5, "1/4": 0.25}
    colors = ("tab:purple", "tab:red", "gray", "tab:orange", "tab:green")
    for (name, gain), color in zip(gains.items(), colors):
        curve = radius_of_update(radius, gain)
        axes.plot(radius, curve, color=color, linewidth=2.5)
        axes.plot(radius, gain * radius, "--", color=color, linewidth=1.5)
        axes.text(longest + 0.08, curve[-1], f"gain {name}", color=color, va="center")
    end = 4.3
    for gain, label in ((2.0, "+ ln 2"), (0.5, "− ln 2")):
        other = radius_of_update(torch.tensor([end]), gain).item()
        arrow = {"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (end, other), (end, end), arrowprops=arrow)
        middle = (end + other) / 2
        axes.text(end + 0.26, middle + 0.26, label, ha="center", va="center", fontsize=9)
    axes.plot([], [], color="black", linewidth=2.5, label="HypLoRA")
    axes.plot([], [], "--", color="black", linewidth=1.5, label="LoRA")
    axes.legend(loc="upper left", title="gain = |BAx| / |x|")
    axes.set(xlim=(0, longest), ylim=(0, 6.8))
    axes.set(xlabel="radius of the token, |x| / √K", ylabel="radius of the update, |update| / √K")
    axes.set_title("LoRA multiplies the radius, HypLoRA its sinh")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder for the picture")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("the picture needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    draw_maps(left)
    draw_law(right)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "hyperboloid.png"
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
