"""The tables and the picture of benchmarks/smollm2.py."""

import math
import statistics
from pathlib import Path

from benchmarks.smollm2_plan import LAYERS, METHODS, RHOS, SWEEP_SEEDS, alpha_of, sweep

TESTS = ("held out", "GSM8K", "SVAMP", "MAWPS")
STATISTICS = ("radius", "gain", "phi", "phi_spread", "K_moved")
PICTURE = Path(__file__).parents[1] / "assets" / "phi_by_layer.png"
# Student's t for 95 % intervals of 2, 3, ... values.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def interval(values):
    """(mean, half of its 95 % interval) by Student's t; the half is nan for one value."""
    mean = statistics.mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan
    t = STUDENT[min(len(values), len(STUDENT) + 1) - 2]
    return mean, t * statistics.stdev(values) / len(values) ** 0.5


def with_spread(mean, half, form):
    """The mean with its interval, or, of one value, alone."""
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:{form.strip('+')}}"


def table(header, lines):
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def reported(runs):
    """{method: {seed: result}} of the reporting seeds."""
    found = {name: {} for name in METHODS}
    for result in runs.values():
        if result["seed"] not in SWEEP_SEEDS:
            found[result["method"]][result["seed"]] = result
    return {name: results for name, results in found.items() if results}


def paired(results, others, key):
    """The differences of two methods over the seeds that both have."""
    seeds = [seed for seed in results if seed in others]
    return [results[seed][key] - others[seed][key] for seed in sorted(seeds)]


def difference(results, others, key, scale=1000):
    values = [scale * value for value in paired(results, others, key)]
    if not values:
        return "-"
    mean, half = interval(values)
    mark = " *" if abs(mean) > half else ""
    return f"{with_spread(mean, half, '+.2f')}{mark}"


def sweep_table(runs):
    lines = []
    for name in METHODS:
        losses = {}
        for result in runs.values():
            if result["method"] == name and result["seed"] in SWEEP_SEEDS:
                losses.setdefault(result["lr"], []).append(result["validation"])
        if losses:
            tried = [f"{lr:.2g}: {statistics.mean(losses[lr]):.4f}" for lr in sorted(losses)]
            alpha, chosen = alpha_of(name, runs), sweep(name, runs)
            lines.append([name, f"{alpha:g}", f"{chosen:.2g}", ", ".join(tried)])
    return table(["method", "alpha", "chosen rate", "rate: validation loss"], lines)


def loss_table(found, base):
    lines = []
    if base:
        lines.append(["the model as it comes", "-", *[f"{base[key]:.4f}" for key in TESTS]])
    for name, results in found.items():
        cells = [name, str(len(results))]
        for key in TESTS:
            mean, half = interval([result[key] for result in results.values()])
            cells.append(with_spread(mean, half, ".4f"))
        lines.append(cells)
    return table(["loss per token", "seeds", *TESTS], lines)


def difference_table(found, pairs):
    """Differences in thousandths of the loss; a star where the interval does not contain 0."""
    lines = []
    for name, other in pairs:
        if name in found and other in found:
            cells = [difference(found[name], found[other], key) for key in TESTS]
            lines.append([f"{name} - {other}", *cells])
    return table(["1000 x difference in loss", *TESTS], lines), len(lines) * len(TESTS)


def accuracy_table(found, baseline):
    keys = [f"{test} right" for test in TESTS]
    keys = [k for k in keys if any(k in r for f in found.values() for r in f.values())]
    lines = []
    for name, results in found.items():
        seeds = [seed for seed, result in results.items() if any(key in result for key in keys)]
        if not seeds:
            continue
        cells = [name, str(len(seeds))]
        for key in keys:
            has = {seed: result for seed, result in results.items() if key in result}
            others = {seed: r for seed, r in found.get(baseline, {}).items() if key in r}
            if not has:
                cells += ["-", "-"]
                continue
            mean, half = interval([result[key] for result in has.values()])
            cells.append(with_spread(mean, half, ".1f"))
            cells.append("-" if name == baseline else difference(has, others, key, scale=1))
        lines.append(cells)
    header = ["% right", "seeds"]
    for key in keys:
        header += [key.removesuffix(" right"), f"over {baseline}"]
    return table(header, lines) if keys else ""


def repetition(found, again, pairs):
    """What another card makes of the same runs: a sentence, and the differences that it gives."""
    values = []
    for name, results in again.items():
        values += paired(results, found[name], "held out")
    spread = 1000 * statistics.pstdev(values)
    largest = 1000 * max(map(abs, values))
    sentence = (
        f"{len(values)} runs were made a second time, with the same seeds and batches, on another "
        "card. These are the later ones; the other tables have the earlier ones, as the rest of "
        "the dial and DoRA were run beside them and once. Between the two, 1000 x held-out loss "
        f"differs with a standard deviation of {spread:.1f}, by {largest:.1f} at most: a seed does "
        "not fix the numbers, as bfloat16 rounds in another order. (The authors' layers and 'down "
        "alone' came later, too: that is in their differences to LoRA above.)"
    )
    return f"{sentence}\n\n{difference_table(again, pairs)[0]}"


def adapter_table(found):
    """Means over the layers and the reported seeds."""
    lines = []
    for name, results in found.items():
        if name == "DoRA" or METHODS[name].control_of:
            continue
        for layer in METHODS[name].layers:
            cells = [name, layer]
            columns = {key: [] for key in STATISTICS}
            for result in results.values():
                for key, values in result["adapters"][layer].items():
                    columns[key] += values
            pairs = zip(columns["phi_spread"], columns["phi"])
            columns["phi_spread"] = [100 * spread / max(phi, 1e-12) for spread, phi in pairs]
            for key in STATISTICS:
                mean = statistics.mean(columns[key])
                cells.append("-" if math.isnan(mean) else f"{mean:.3g}")
            lines.append(cells)
    names = ["radius", "gain", "phi", "its spread over tokens, %", "K / K at the start"]
    return table(["method", "layers", *names], lines)


def page(results):
    """All that is known so far, as Markdown."""
    runs = results["runs"]
    about = results["about"]
    found = reported(runs)
    settings = about["settings"]
    over_LoRA = [(name, "LoRA") for name in METHODS if name != "LoRA"]
    over_control = [(f"HypLoRA, rho {rho:g}", f"control, rho {rho:g}") for rho in RHOS]
    over_control.append(("HypLoRA, rho 2, K learned", "HypLoRA, rho 2"))
    for other in ("LoRA", "control, rho 1"):
        over_control.append(("HypLoRA, rho 1, down alone", f"{other}, down alone"))
    lora, count_lora = difference_table(found, over_LoRA)
    control, count_control = difference_table(found, over_control)
    lone = [name for name, results in found.items() if len(results) == 1 and name != "LoRA"]
    count = count_lora + count_control - len(lone) * len(TESTS)
    seeds = sorted({seed for results in found.values() for seed in results})
    peft = ", ".join(f"{name} {value:.1e}" for name, value in about.get("peft", {}).items())
    parts = [
        f"{about['stamp']}, {about['machine']}.",
        f"{settings['steps']} steps of {settings['batch']} records, rank {settings['rank']} on q, "
        f"k, v, up and down, AdamW without weight decay, gradients clipped at 1. {about['note']} "
        f"Reported seeds: {seeds}; the rates were chosen on the seeds {list(SWEEP_SEEDS)}. An "
        "interval is Student's, for 95 %, over seeds: it does not say how the result would vary "
        "over other questions or other models.",
        "A control is LoRA with alpha times the mean phi of its HypLoRA in the sweep. K is fixed "
        "unless the name says otherwise, but for the guessed unit and the authors' layers, where "
        "it learns at the rate of A and B; 'K learned' is at 20 times that rate. 'Down alone' has "
        "adapters at down_proj and nowhere else. DoRA has one more parameter for each output of a "
        "layer. The answers of MAWPS's test file are 'The "
        "answer is N' alone, while those that it trains on begin with the equation.",
    ]
    if peft:
        parts.append(
            "The LoRA and DoRA here against PEFT's in float32, largest relative difference of a "
            f"training loss: {peft}."
        )
    parts += ["**The choice of rates**", sweep_table(runs)]
    if found:
        parts += ["**Loss per token of the answers**", loss_table(found, about.get("base"))]
        parts += [
            "**Paired differences**",
            f"Of these {count} intervals, about {count / 20:.0f} would miss 0 (*) if no method "
            "differed from another. Below 0 the first is better.",
            lora,
            control,
        ]
        again = reported(results.get("repeats", {}))
        if again:
            pairs = over_LoRA + over_control
            parts += ["**The same again**", repetition(found, again, pairs)]
        accuracies = accuracy_table(reported(runs | results.get("repeats", {})), "LoRA")
        if accuracies:
            scored = about["accuracy"]
            questions = ", ".join(
                f"{count} of {name}" for name, count in scored["questions"].items()
            )
            counted = (
                f"Questions: {questions}. An answer has at most {scored['new_tokens']} tokens."
            )
            parts += ["**Greedy answers**", counted, accuracies]
        parts += ["**What the adapters did**", adapter_table(found)]
        parts.append(f"![phi by layer](../assets/{PICTURE.name})")
    return "\n\n".join(part for part in parts if part)


def picture(results, path):
    """phi by depth for each kind of layer, for each rho: the means of the reported seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = reported(results["runs"])
    names = [f"HypLoRA, rho {rho:g}" for rho in RHOS]
    names = [name for name in ["HypLoRA, guessed unit", *names] if name in found]
    if not names:
        return
    size = (2 * len(names), 2.8)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names):
        for layer in LAYERS:
            columns = zip(*(r["adapters"][layer]["phi"] for r in found[name].values()))
            axis.plot([statistics.mean(column) for column in columns], label=layer)
        axis.axhline(1, color="gray", linewidth=0.5)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("layer of the model")
    axes[0][0].set_ylabel("phi = |update| / |BAx|")
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
