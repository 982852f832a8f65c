"""LoRA, DoRA, HypLoRA and the authors' two layers, trained on real language models and compared.

README.md in this folder has the design. Each method is tuned on validation records with seeds of
its own, then trained anew with the seeds that are reported. What is finished is appended to a file
of JSON lines, run by run, so that the same command goes on where it was stopped.

    python -m studies.comparison --models SmolLM2 Gemma --data FOLDER --out comparison.jsonl
    python -m studies.comparison --table comparison.jsonl --results RESULTS.md --assets assets

Several processes share a GPU, where a step of training is one CUDA graph.
"""

import argparse
import copy
import datetime
import functools
import gc
import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import threading
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import hyplora
from scaling.scoring import is_right
from scaling.training import IGNORE
from studies.authors import authors_update, simplified_update
from studies.tables import machine, markdown, mean_and_spread, report, two_way_interval

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA_RANK = 32
BATCH = 16  # records of a step
CUTOFF = {"arithmetic": 192, "commonsense": 64}  # tokens; longer records are left out
HELD_OUT = 800
VALIDATION = 400
TEST = 400  # of each test file
ALPHA = 64
TUNING_SEEDS = (1000, 1001, 1002, 1003)

# --- The data -----------------------------------------------------------------------------------

TASKS = {  # what is trained on, and the test files
    "arithmetic": (["gsm8k_train", "mawps_train"], ["gsm8k", "svamp"]),
    "commonsense": (["commonsense_train"], ["arc_challenge", "openbookqa"]),
}
CHOICES = re.compile(r".*? question: (.*?)\n+(Answer1: .*?)\n+Answer format: .*", re.DOTALL)
Record = namedtuple("Record", ["question", "choices", "right"])  # text, or token ids


def read_questions(path):
    """The records of a file. Those without a worked answer, or with a wrong one, are left out."""
    records = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        found = CHOICES.fullmatch(record["instruction"])
        if found:
            choices = re.split(r"\s*Answer\d: *", found[2])[1:]
            number = int(record["answer"].removeprefix("answer"))
            records.append(Record(found[1], choices, number - 1))
        elif is_right(record["output"], record["answer"]):
            records.append(Record(record["instruction"], [record["output"].strip()], 0))
    return records


def encode(records, tokenizer, cutoff):
    """Records of text -> of token ids, without those that are too long. An end token ends each."""
    prompts = tokenizer([f"Question: {record.question}\nAnswer:" for record in records])
    texts = [f" {choice}" for record in records for choice in record.choices]
    answers = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    encoded = []
    for record, prompt in zip(records, prompts["input_ids"]):
        choices = [[*next(answers), tokenizer.eos_token_id] for _ in record.choices]
        if len(prompt) + max(map(len, choices)) <= cutoff:
            encoded.append(Record(prompt, choices, record.right))
    return encoded


@functools.cache
def read_task(task, model, folder):
    """{"train", "validation", "held out" and each test file: records} of a task."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train, tests = TASKS[task]
    sets = {name: read_questions(Path(folder, f"{name}.json")) for name in (*train, *tests)}
    seen = {record.question for name in tests for record in sets[name]}
    unique = {r.question: r for name in train for r in sets[name] if r.question not in seen}
    records = encode([*unique.values()], tokenizer, CUTOFF[task])
    random.Random(0).shuffle(records)
    rest = {"held out": records[:HELD_OUT], "train": records[HELD_OUT + VALIDATION :]}
    validation = records[HELD_OUT:][:VALIDATION]
    rest["validation"] = [Record(r.question, [r.choices[r.right]], 0) for r in validation]
    return {name: encode(sets[name], tokenizer, CUTOFF[task])[:TEST] for name in tests} | rest


# --- The methods --------------------------------------------------------------------------------
#
# Each of these is HypLoRA or a layer of the authors'. "control of M" is LoRA whose alpha is
# multiplied, layer by layer, by the median phi of M.

HYPERBOLIC = {
    "HypLoRA": dict(curvature=0.5),  # as README says: the median unit, and K learns
    "HypLoRA, own alpha": dict(curvature=0.5),
    "HypLoRA, 1.0": dict(curvature=1.0),
    "HypLoRA, raw K = 0.5": dict(curvature=0.5, unit=1.0),
    "HypLoRA, radius 1": dict(curvature=1.0, learns=False),
    "HypLoRA, radius 2": dict(curvature=1 / 4, learns=False),
    "HypLoRA, radius 4": dict(curvature=1 / 16, learns=False),
    "HypLoRA, down alone, radius 1": dict(curvature=1.0, learns=False),
    "HypLoRA, down alone, radius 2": dict(curvature=1 / 4, learns=False),
    "authors' hyplora": dict(curvature=1.0),
    "authors' simplified": dict(curvature=0.5),
}
AUTHORS = {"authors' hyplora": 128, "authors' simplified": 256}  # the alpha of their scripts
TIERS = {
    1: ["HypLoRA", "DoRA"],
    2: ["HypLoRA, 1.0", "HypLoRA, raw K = 0.5", *AUTHORS, "HypLoRA, own alpha"],
    3: [name for name in HYPERBOLIC if "radius" in name],
}


class AuthorsLinear(hyplora.HypLoRALinear):
    """A layer of the authors' release: its parameter k is curvature + lora_K."""

    def forward(self, input):
        out = self.base(input)
        x = input.float()
        k = self.options["curvature"] + self.lora_K
        if self.lora_scale is None:
            update = simplified_update(x, self.lora_A, self.lora_B, k)
        else:
            update = authors_update(x, self.lora_A, self.lora_B, k, self.lora_scale)
        return out + (self.scaling * update).to(out.dtype)


def adapt(model, setting, inputs):
    """Add the adapters of a setting to a frozen model, in place."""
    method = setting["method"]
    alpha = setting["alpha"]
    targets = ["down_proj"] if "down alone" in method else TARGETS
    if method not in HYPERBOLIC:
        alphas = {name: alpha * factor for name, factor in setting["factors"].items()}
        options = dict(r=LORA_RANK, lora_alpha=alpha, alpha_pattern=alphas, lora_dropout=0.0)
        options["use_dora"] = method == "DoRA"
        peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options))
        return
    options = HYPERBOLIC[method]
    curvature = options["curvature"]
    hyplora.inject_hyplora(model, targets, rank=LORA_RANK, alpha=alpha, curvature=curvature)
    hyplora.calibrate_curvature(model, **inputs)
    for layer in hyplora.hyplora_layers(model).values():
        layer.lora_K.requires_grad_(options.get("learns", True))
        if "unit" in options:
            layer.lora_unit.fill_(options["unit"])
        if method in AUTHORS:
            unit = torch.full_like(layer.lora_unit, math.sqrt(layer.in_features))
            layer.lora_scale = nn.Parameter(unit) if method == "authors' hyplora" else None
            layer.__class__ = AuthorsLinear
    if DEVICE == "cuda" and method not in AUTHORS:
        from scaling.kernels import use_kernels

        use_kernels(model)


def median_phis(model, inputs):
    """{layer: the median over tokens of |update| / |BAx|} of a HypLoRA model."""
    rows = hyplora.measure_tokens(model, (), inputs)
    return {name: round(tokens[:, 2].median().item(), 4) for name, tokens in rows.items()}


# --- A run --------------------------------------------------------------------------------------


@functools.cache
def load(model):
    base = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    base = base.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):  # torch's own does it in one kernel.
            is_gemma = hasattr(module, "eps")
            weight = module.weight.detach() + 1 if is_gemma else module.weight
            eps = module.eps if is_gemma else module.variance_epsilon
            options = dict(normalized_shape=weight.shape, weight=weight, eps=eps)
            module.forward = functools.partial(F.rms_norm, **options)
    torch.set_float32_matmul_precision("high")  # PEFT's products are in float32: use TF32.
    return base.eval().requires_grad_(False)


def collate(rows, width=0, count=0):
    """[(prompt ids, answer ids)] -> ids (N, T), and for each token of an answer its place in the
    flat rows before it, and itself as the label. Rows end in padding, which no token looks at.
    width, count: how many tokens a row has at least, and how many labels there are.
    """
    width = max([width, *(len(prompt) + len(answer) for prompt, answer in rows)])
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    places = []
    labels = []
    for number, (prompt, answer) in enumerate(rows):
        ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        first = number * width + len(prompt) - 1
        places.extend(range(first, first + len(answer)))
        labels.extend(answer)
    more = count - len(labels)
    places = torch.tensor(places + [0] * more)
    return ids.to(DEVICE), places.to(DEVICE), torch.tensor(labels + [IGNORE] * more).to(DEVICE)


def draw_batches(rows, steps, seed):
    """The batches of a run, collated to one size. An epoch has each row once."""
    draw = random.Random(seed)
    order = []
    while len(order) < BATCH * steps:
        order += draw.sample(rows, len(rows))
    batches = [order[i * BATCH :][:BATCH] for i in range(steps)]
    width = max(len(prompt) + len(answer) for batch in batches for prompt, answer in batch)
    count = max(sum(len(answer) for _, answer in batch) for batch in batches)
    return [collate(batch, width, count) for batch in batches]


def losses_of(model, batch, reduction):
    """The cross entropy of the labels; logits are computed at their places alone."""
    ids, places, labels = batch
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden.flatten(0, 1)[places])
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction=reduction)


@torch.no_grad()
def score(model, records):
    """(losses of the right answers, summed over their tokens; whether each had the lowest mean)"""
    rows = [(r.question, choice) for r in records for choice in r.choices]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    sums = {}
    for start in range(0, len(rows), 2 * BATCH):
        chosen = order[start : start + 2 * BATCH]
        losses = losses_of(model, collate([rows[i] for i in chosen]), "none").cpu()
        pieces = losses.split([len(rows[i][1]) for i in chosen])
        sums.update({i: piece.sum().item() for i, piece in zip(chosen, pieces)})
    right = []
    hits = []
    left = (sums[i] for i in range(len(rows)))
    for record in records:
        own = list(itertools.islice(left, len(record.choices)))
        means = [loss / len(choice) for loss, choice in zip(own, record.choices)]
        right.append(round(own[record.right], 2))
        hits.append(int(min(means) == means[record.right]))
    return right, hits


class Run:
    """An adapter in training. On a GPU a step is the replay of a CUDA graph."""

    def __init__(self, setting, seed, records):
        base = load(setting["model"])
        shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        self.model = copy.deepcopy(base, shared)
        rows = [(r.question, r.choices[r.right]) for r in records["train"]]
        ids = collate(rows[: 2 * BATCH])[0]
        self.inputs = dict(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
        adapt(self.model, setting, self.inputs)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for name, p in self.model.named_parameters():
            if "lora_A" in name:  # All methods start from the same A, drawn as LoRA's is.
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=DEVICE)
        on_gpu = dict(fused=True, capturable=True) if DEVICE == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.trained, self.lr, weight_decay=0.0, **on_gpu)
        self.batches = draw_batches(rows, setting["steps"], seed)
        self.batch = [part.clone() for part in self.batches[0]]

    def step(self):
        losses_of(self.model, self.batch, "mean").backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def graph_of_a_step(self):
        """A CUDA graph of step, which reads what self.batch and self.lr hold when it runs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()  # The rate is 0 so far, so that this moves nothing but the moments.
        torch.cuda.synchronize()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def train(self, rate):
        """All steps: a tenth of warm-up, then linearly to 0."""
        step = self.graph_of_a_step().replay if DEVICE == "cuda" else self.step
        steps = len(self.batches)
        warmup = steps // 10 + 1
        for number, batch in enumerate(self.batches):
            rising = (number + 1) / warmup
            falling = (steps - number) / (steps - warmup + 1)
            self.lr.fill_(rate * min(rising, falling, 1))
            for part, new in zip(self.batch, batch):
                part.copy_(new)
            step()


def work(setting, seed, folder):
    """Train a setting with a seed: a row of results. The untrained model has no setting to train;
    its row also has the number of tokens of each answer.
    """
    torch.set_num_threads(1)
    records = read_task(setting["task"], setting["model"], folder)
    row = name_of(setting) | {"seed": seed, "date": str(datetime.date.today())}
    row["machine"] = machine(DEVICE)
    model = load(setting["model"])
    run = Run(setting, seed, records) if setting["steps"] else None
    if run:
        run.train(setting["rate"])
        model = run.model
        if setting["sets"] == ["validation"] and hyplora.hyplora_layers(model):
            row["phi"] = median_phis(model, run.inputs)
    for name in setting["sets"]:
        losses, hits = score(model, records[name])
        tokens = [len(r.choices[r.right]) for r in records[name]]
        row[name] = sum(losses) / sum(tokens) if name == "validation" else {"losses": losses}
        if len(records[name][0].choices) > 1:
            row[name]["hits"] = "".join(map(str, hits))
        if not setting["steps"]:
            row[name]["tokens"] = tokens
    del model, run
    gc.collect()
    torch.cuda.empty_cache()  # The other processes need the memory.
    return row


# --- The plan -----------------------------------------------------------------------------------

STEPS = 100
NAME = ("model", "task", "method", "alpha", "rate", "steps")
UNTRAINED = dict(method="untrained", alpha=0, rate=0, steps=0)


def name_of(setting):
    """What tells a setting from others, with the model's name instead of its folder."""
    return {key: setting[key] for key in NAME} | {"model": Path(setting["model"]).name}


def in_parallel(function, things):
    with ThreadPoolExecutor(max(1, len(things))) as threads:
        return list(threads.map(function, things))


def read_rows(path):
    """The rows of a file of JSON lines, by their settings and seeds."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {(*name_of(row).values(), row["seed"]): row for row in rows}


class Ledger:
    """The rows of a file, and the processes that make those that are missing."""

    def __init__(self, args):
        self.path = Path(args.out)
        self.path.touch()
        self.rows = read_rows(self.path)
        self.folder = args.data
        self.lock = threading.Lock()
        spawn = multiprocessing.get_context("spawn")  # A fork can't use a GPU.
        self.pool = ProcessPoolExecutor(args.workers, mp_context=spawn)

    def row_of(self, setting, seed):
        key = (*name_of(setting).values(), seed)
        if key not in self.rows:
            row = self.pool.submit(work, setting, seed, self.folder).result()
            with self.lock, self.path.open("a") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self.rows[key] = row
        return self.rows[key]

    def rows_of(self, setting, seeds):
        return in_parallel(lambda seed: self.row_of(setting, seed), seeds)


def rate_of(exponent):
    """The grid of rates has steps of the square root of 2."""
    return 1e-3 * 2 ** (exponent / 2)


def mean_loss(rows):
    """The mean validation loss. What diverged counts as 10."""
    loss = statistics.mean(row["validation"] for row in rows)
    return loss if loss < 10 else 10.0


def tune(ledger, setting, start):
    """(loss, rate, the best point of the grid): where a parabola through the mean losses of the
    best point and its two neighbours is lowest. start: the point to begin at.
    """
    losses = {}

    def try_rate(exponent):
        rows = ledger.rows_of(setting | {"rate": rate_of(exponent)}, TUNING_SEEDS)
        losses[exponent] = mean_loss(rows)

    best = start
    while not {best - 1, best, best + 1} <= set(losses):
        in_parallel(try_rate, [e for e in (best - 1, best, best + 1) if e not in losses])
        best = min(losses, key=losses.get)
    low, middle, high = (losses[best + shift] for shift in (-1, 0, 1))
    bend = low - 2 * middle + high
    shift = (low - high) / (2 * bend) if bend else 0.0
    return middle - bend * shift**2 / 2, rate_of(best + shift), best


def tune_alpha(ledger, setting, start=2):
    """(the setting of the best alpha at its best rate, the point of the grid). Twice the alpha is
    tried at a rate that is smaller by the square root of 2, up to 8 times.
    """
    loss, _, first = tune(ledger, setting | {"alpha": ALPHA}, start)
    options = [(loss, 0)]

    def try_alpha(doublings):
        found = setting | dict(alpha=ALPHA * 2**doublings, rate=rate_of(first - doublings))
        options.append((mean_loss(ledger.rows_of(found, TUNING_SEEDS)), doublings))

    in_parallel(try_alpha, [1, 2, 3])
    doublings = min(options)[1]
    best = setting | {"alpha": ALPHA * 2**doublings}
    _, rate, point = tune(ledger, best, first - doublings)
    return best | {"rate": rate}, point


def tune_method(ledger, setting, start):
    """The settings of a method and of its control, if it has one. start: the point of the grid."""
    if "own alpha" in setting["method"]:
        found, point = tune_alpha(ledger, setting, start)
    else:
        _, rate, point = tune(ledger, setting, start)
        found = setting | {"rate": rate}
    if setting["method"] not in HYPERBOLIC or setting["method"] in AUTHORS:
        return [found]
    rows = ledger.rows_of(found | {"rate": rate_of(point)}, TUNING_SEEDS)
    layers = rows[0]["phi"]
    factors = {name: statistics.mean(row["phi"][name] for row in rows) for name in layers}
    control = found | dict(method=f"control of {setting['method']}", factors=factors)
    _, rate, _ = tune(ledger, control, point)
    return [found, control | {"rate": rate}]


def run_tier(ledger, cell, args):
    """All runs of a tier for a model and a task."""
    sets = ["held out", *TASKS[cell["task"]][1]]
    ledger.row_of(cell | UNTRAINED | {"sets": sets}, 0)
    shared = cell | dict(method="LoRA", steps=STEPS, factors={}, sets=["validation"])
    lora, point = tune_alpha(ledger, shared)

    def tune_one(method):
        setting = lora | dict(method=method, alpha=AUTHORS.get(method, lora["alpha"]))
        return tune_method(ledger, setting, point)

    settings = [lora, *itertools.chain(*in_parallel(tune_one, TIERS[args.tier]))]
    if args.steps != STEPS:
        settings = [setting for setting in settings if setting["method"] != "DoRA"]
    final = dict(steps=args.steps, sets=sets if args.tier == 1 else ["held out"])
    seeds = range(5 if args.tier == 3 else 10)
    in_parallel(lambda setting: ledger.rows_of(setting | final, seeds), settings)


# --- Tables and pictures ------------------------------------------------------------------------


def rivals_of(cell, method):
    """{label: method} of what a method is compared with."""
    rivals = {"minus LoRA": "LoRA", "minus its control": f"control of {method}"}
    return {label: name for label, name in rivals.items() if name in cell and name != method}


def tier_of(method):
    own = method.removeprefix("control of ")
    return next((tier for tier, methods in TIERS.items() if own in methods), 1)


def cells_of(method, name, cell, sets, level):
    """The loss of a method on a set of records, and what it is compared with, for a table."""
    tokens = sets[name]["tokens"]
    own = cell[method]
    losses = [sum(row[name]["losses"]) / sum(tokens) for row in own.values()]
    found = {"loss": mean_and_spread(losses, 4), "minus LoRA": "", "minus its control": ""}
    for label, rival in rivals_of(cell, method).items():
        seeds = sorted(own.keys() & cell[rival].keys())
        pairs = [(own[seed][name]["losses"], cell[rival][seed][name]["losses"]) for seed in seeds]
        mean, low, high = two_way_interval([np.subtract(*pair) for pair in pairs], tokens, level)
        found[label] = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    if "hits" in sets[name]:
        shares = [100 * row[name]["hits"].count("1") / len(tokens) for row in own.values()]
        found["% right"] = mean_and_spread(shares, 1)
    return found


def print_tables(rows, path):
    """Print a table for each model, task and number of steps, and write it to a Markdown file."""
    cells = {}
    for row in rows.values():
        if "held out" in row and row["steps"]:
            cell = cells.setdefault((row["model"], row["task"], row["steps"]), {})
            cell.setdefault(row["method"], {})[row["seed"]] = row
    for (model, task, steps), cell in cells.items():
        base = rows[(model, task, *UNTRAINED.values(), 0)]
        sets = {name: found for name, found in base.items() if isinstance(found, dict)}
        comparisons = Counter()
        for other in (other for key, other in cells.items() if key[2] == steps):
            for method in other:
                comparisons[tier_of(method)] += len(rivals_of(other, method))
        tables = {name: [] for name in sets}
        for method in sorted(cell, key=lambda method: (tier_of(method), method)):
            first, *_ = cell[method].values()
            about = {"": method, "alpha": first["alpha"], "rate": f"{first['rate']:.2g}"}
            about["seeds"] = len(cell[method])
            level = 1 - 0.05 / comparisons[tier_of(method)]
            for name in first.keys() & sets.keys():
                tables[name].append(about | cells_of(method, name, cell, sets, level))
        counts = [f"{count} in tier {tier}" for tier, count in sorted(comparisons.items())]
        body = (
            f"{base['date']}, {base['machine']}. The level of an interval is 1 - 0.05 / m; m, the"
        )
        body += f" number of comparisons, is {', '.join(counts)}."
        for name, table in tables.items():
            untrained = sum(sets[name]["losses"]) / sum(sets[name]["tokens"])
            body += f"\n\n**{name}** (untrained: {untrained:.4f})\n\n{markdown(table)}"
        title = f"Comparison: {model}, {task}, {steps} steps"
        report(title, body, path)


def draw(path, panels, **options):
    """A picture of {title: {label: {x: the ys of several runs}}}, with their means."""
    from matplotlib import pyplot as plt

    lines = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(12, 4 * lines), squeeze=False)
    for axis, (title, curves) in zip(axes.flat, sorted(panels.items())):
        for label, curve in sorted(curves.items()):
            xs = sorted(curve)
            axis.plot(xs, [statistics.mean(curve[x]) for x in xs], marker=".", label=label)
        axis.set(title=title, **options)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def draw_pictures(rows, folder):
    """The tuning curves, and phi by block after the tuning runs of HypLoRA."""
    losses = {}
    phis = {}
    for row in rows.values():
        title = f"{row['model']}, {row['task']}"
        if "validation" in row:
            method = f"{row['method']}, alpha {row['alpha']}"
            curve = losses.setdefault(title, {}).setdefault(method, {})
            curve.setdefault(1e3 * row["rate"], []).append(row["validation"])
        if row["method"] == "HypLoRA":
            for layer, phi in row.get("phi", {}).items():
                curve = phis.setdefault(title, {}).setdefault(layer.rpartition(".")[2], {})
                block = int(re.search(r"\.(\d+)\.", layer)[1])
                curve.setdefault(block, []).append(phi)
    labels = dict(xlabel="rate x 1000", ylabel="validation loss, mean of seeds")
    draw(Path(folder, "comparison_rates.png"), losses, **labels)
    labels = dict(xlabel="block", ylabel="phi: median of tokens, mean of runs")
    draw(Path(folder, "comparison_phi.png"), phis, **labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tier", type=int, choices=TIERS, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the reported runs")
    parser.add_argument("--models", nargs="+", default=[], help="folders that transformers loads")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", help="the folder of the paper's JSON files")
    parser.add_argument("--out", help="the file of JSON lines")
    parser.add_argument("--workers", type=int, default=6, help="processes")
    parser.add_argument("--table", help="a file of JSON lines to print tables of")
    parser.add_argument("--results", help="a Markdown file that gets the tables, too")
    parser.add_argument("--assets", help="a folder for the pictures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.table:
        rows = read_rows(args.table)
        print_tables(rows, args.results)
        if args.assets:
            draw_pictures(rows, args.assets)
        return
    ledger = Ledger(args)
    cells = [dict(model=m, task=t) for m, t in itertools.product(args.models, args.tasks)]
    in_parallel(lambda cell: run_tier(ledger, cell, args), cells)


if __name__ == "__main__":
    main()
