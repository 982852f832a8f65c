"""LoRA, DoRA, HypLoRA and the authors' two layers, trained on real language models and compared.

README.md in this folder has the design. The same command goes on where it was stopped.

    python -m studies.comparison --models SmolLM2 Gemma --data FOLDER --out comparison.jsonl
"""

import argparse
import asyncio
import functools
import gc
import json
import math
import multiprocessing
import random
import re
import statistics
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from matplotlib import pyplot as plt
from torch.nn.utils.rnn import pad_sequence

import hyplora
from scaling.scoring import is_right
from scaling.training import IGNORE
from studies.authors import authors_update, simplified_update
from studies.cost import DEVICE, LORA_RANK, TARGETS, sharing_copy, wait
from studies.tables import machine, markdown, mean_and_spread, report, two_way_interval

BATCH = 16  # records of a step
HELD_OUT = 800
VALIDATION = 400
TEST = 400  # of each test file
ALPHA = 64
TUNING_SEEDS = (1000, 1001, 1002, 1003)

# --- The data -----------------------------------------------------------------------------------

TASKS = {  # what is trained on, the test files, and the tokens of the longest record that is used
    "arithmetic": (["gsm8k_train", "mawps_train"], ["gsm8k", "svamp"], 192),
    "commonsense": (["commonsense_train"], ["arc_challenge", "openbookqa"], 64),
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
    encoded = []
    for record in records:
        prompt = tokenizer(f"Question: {record.question}\nAnswer:")["input_ids"]
        texts = [f" {choice}" for choice in record.choices]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        choices = [[*answer, tokenizer.eos_token_id] for answer in answers]
        if len(prompt) + max(map(len, choices)) <= cutoff:
            encoded.append(Record(prompt, choices, record.right))
    return encoded


@functools.cache
def read_task(task, model, folder):
    """{"train", "validation", "held out" and each test file: records} of a task."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train, tests, cutoff = TASKS[task]
    sets = {name: read_questions(Path(folder, f"{name}.json")) for name in (*train, *tests)}
    seen = {record.question for name in tests for record in sets[name]}
    unique = {r.question: r for name in train for r in sets[name] if r.question not in seen}
    records = encode([*unique.values()], tokenizer, cutoff)
    random.Random(0).shuffle(records)
    rest = {"held out": records[:HELD_OUT], "train": records[HELD_OUT + VALIDATION :]}
    validation = records[HELD_OUT:][:VALIDATION]
    rest["validation"] = [Record(r.question, [r.choices[r.right]], 0) for r in validation]
    return {name: encode(sets[name], tokenizer, cutoff)[:TEST] for name in tests} | rest


# --- The methods --------------------------------------------------------------------------------
#
# Each of these is HypLoRA or a layer of the authors'. "control of M" is LoRA whose alpha is
# multiplied, layer by layer, by the median phi of M.

CURVATURES = {
    "HypLoRA": 0.5,  # as README says: the median unit, and K learns
    "HypLoRA, own alpha": 0.5,
    "HypLoRA, 1.0": 1.0,
    "HypLoRA, raw K = 0.5": 0.5,  # The unit is 1.
    "HypLoRA, bound 4": 0.5,  # A token beyond radius 4, instead of 12, counts as if it lay there.
    "HypLoRA, radius 1": 1.0,  # K is fixed here and in what follows.
    "HypLoRA, radius 2": 1 / 4,
    "HypLoRA, radius 4": 1 / 16,
    "HypLoRA, down alone, radius 1": 1.0,
    "HypLoRA, down alone, radius 2": 1 / 4,
    "HypLoRA, down alone, radius 1, bound 4": 1.0,
    "HypLoRA, down alone, radius 2, bound 4": 1 / 4,
    "authors' hyplora": 1.0,
    "authors' simplified": 0.5,
}
AUTHORS = {"authors' hyplora": 128, "authors' simplified": 256}  # the alpha of their scripts
# Near LoRA's best rate these fail or hardly learn: so many points from it their search begins.
START = {"HypLoRA, raw K = 0.5": -24, "HypLoRA, radius 4": -11, "authors' hyplora": 8}
TIERS = {
    1: ["HypLoRA", "DoRA"],
    2: ["HypLoRA, own alpha", "HypLoRA, 1.0", "HypLoRA, raw K = 0.5", "HypLoRA, bound 4", *AUTHORS],
    3: [name for name in CURVATURES if "radius" in name],
}
TIER_OF = {"LoRA": 1}
for tier, methods in TIERS.items():
    TIER_OF |= {name: tier for method in methods for name in (method, f"control of {method}")}
COMPARISONS = {1: 28, 2: 56, 3: 21}  # with LoRA and with controls, as many as a tier has when done


class OtherLinear(hyplora.HypLoRALinear):
    """A layer with another update. The parameter k of the authors' layers is curvature + lora_K."""

    def add_update(self, out, x):
        k = self.options["curvature"] + self.lora_K if self.is_authors else self.K
        update = self.update(x.float(), self.lora_A, self.lora_B, k)
        return out + (self.scaling * update).to(out.dtype)


def adapt(model, setting, inputs):
    """Add the adapters of a setting to a frozen model, in place."""
    method, alpha = setting["method"], setting["alpha"]
    targets = ["down_proj"] if "down alone" in method else TARGETS
    if method not in CURVATURES:
        alphas = {name: alpha * factor for name, factor in setting["factors"].items()}
        options = dict(r=LORA_RANK, lora_alpha=alpha, alpha_pattern=alphas)
        config = peft.LoraConfig(target_modules=targets, use_dora=method == "DoRA", **options)
        peft.get_peft_model(model, config)
        return
    options = dict(rank=LORA_RANK, alpha=alpha, curvature=CURVATURES[method])
    hyplora.inject_hyplora(model, targets, **options)
    hyplora.calibrate_curvature(model, **inputs)
    for layer in hyplora.hyplora_layers(model).values():
        layer.lora_K.requires_grad_("radius" not in method)
        if "raw" in method:
            layer.lora_unit.fill_(1.0)
        if method in AUTHORS or "bound" in method:
            layer.__class__ = OtherLinear
            layer.is_authors = method in AUTHORS
            layer.update = functools.partial(hyplora.hyplora_update, max_radius=4.0)
        if method == "authors' simplified":
            layer.update = simplified_update
        if method == "authors' hyplora":
            unit = torch.full_like(layer.lora_unit, math.sqrt(layer.in_features))
            layer.lora_scale = nn.Parameter(unit)
            layer.update = functools.partial(authors_update, scale=layer.lora_scale)
    if DEVICE == "cuda":
        from scaling.kernels import use_kernels

        use_kernels(model)  # It leaves other layers as they are.


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


def collate(rows):
    """[(prompt ids, answer ids)] -> ids and labels, both (N, T). A label is the next token if that
    is one of the answer, else IGNORE. Rows end in padding, which no token looks at."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, answer) in zip(labels, rows):
        row[len(prompt) - 1 :][: len(answer)] = torch.tensor(answer)
    return ids.to(DEVICE), labels.to(DEVICE)


def places_of(labels):
    """Where the flat labels have a token."""
    return (labels.flatten() != IGNORE).nonzero().flatten()


def draw_batches(rows, steps, seed):
    """The batches of a run, all of one size. An epoch has each row once. Places end in padding: 0,
    where a prompt begins and no label is."""
    draw = random.Random(seed)
    epochs = math.ceil(BATCH * steps / len(rows))
    order = [row for _ in range(epochs) for row in draw.sample(rows, len(rows))]
    ids, labels = collate(order[: BATCH * steps])
    labels = labels.split(BATCH)
    places = pad_sequence([places_of(part) for part in labels], batch_first=True)
    return list(zip(ids.split(BATCH), labels, places))


def losses_of(model, ids, labels, places, reduction):
    """The cross entropy of the labels; logits are computed at their places alone."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden.flatten(0, 1)[places]).float()
    labels = labels.flatten()[places]
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction=reduction)


@torch.no_grad()
def score(model, records):
    """(losses of the right answers, summed over their tokens; 1 where it had the lowest mean)"""
    rows = {}
    for i, record in enumerate(records):
        rows |= {(i, j): (record.question, choice) for j, choice in enumerate(record.choices)}
    order = sorted(rows, key=lambda name: sum(map(len, rows[name])))
    sums = {}
    for start in reversed(range(0, len(rows), 2 * BATCH)):  # The longest first need most memory.
        chosen = order[start : start + 2 * BATCH]
        ids, labels = collate([rows[name] for name in chosen])
        losses = losses_of(model, ids, labels, places_of(labels), "none").cpu()
        pieces = losses.split([len(rows[name][1]) for name in chosen])
        sums |= {name: piece.sum().item() for name, piece in zip(chosen, pieces)}
    right = []
    hits = ""
    for i, record in enumerate(records):
        means = [sums[i, j] / len(choice) for j, choice in enumerate(record.choices)]
        right.append(round(sums[i, record.right], 2))
        hits += str(int(min(means) == means[record.right]))
    return right, hits


def graph_of(step, optimizer):
    """A step as the replay of a CUDA graph, which reads what its tensors hold when it runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()  # The rate is 0 so far, so that this moves nothing but the moments.
    torch.cuda.synchronize()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    torch.cuda.empty_cache()  # The graph can't use what the first steps took in their stream.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def train(base, setting, seed, records):
    """(the base with the adapters of a setting, trained; the inputs that fitted them to it)"""
    model = sharing_copy(base)
    rows = [(r.question, r.choices[r.right]) for r in records["train"]]
    ids, _ = collate(rows[: 2 * BATCH])
    inputs = dict(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
    adapt(model, setting, inputs)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_A" in name:  # All methods start from the same A, drawn as LoRA's is.
            nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = torch.zeros((), device=DEVICE)
    on_gpu = dict(fused=True, capturable=True) if DEVICE == "cuda" else {}
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0, **on_gpu)
    batches = draw_batches(rows, setting["steps"], seed)
    batch = [part.clone() for part in batches[0]]

    def step():
        losses_of(model, *batch, "mean").backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    take_step = graph_of(step, optimizer) if DEVICE == "cuda" else step
    steps = len(batches)
    warmup = steps // 10 + 1  # After these, the rate falls linearly to 0.
    for number, new_batch in enumerate(batches):
        rising = (number + 1) / warmup
        falling = (steps - number) / (steps - warmup + 1)
        lr.fill_(setting["rate"] * min(rising, falling, 1))
        for part, new in zip(batch, new_batch):
            part.copy_(new)
        take_step()
    wait()  # A graph has to outlive its last replay.
    return model, inputs


def work(setting, seed, folder):
    """Train a setting with a seed: a row of results. Without steps it is the untrained model's, and
    has the number of tokens of each answer, too."""
    torch.set_num_threads(1)
    records = read_task(setting["task"], setting["model"], folder)
    row = name_of(setting) | dict(seed=seed, date=str(date.today()), machine=machine(DEVICE))
    gc.collect()  # The run before is in cycles.
    model = load(setting["model"])
    if setting["steps"]:
        model, inputs = train(model, setting, seed, records)
        if setting["sets"] == ["validation"] and hyplora.hyplora_layers(model):
            layers = hyplora.measure_tokens(model, (), inputs).items()
            row["phi"] = {name: round(x[:, 2].median().item(), 4) for name, x in layers}
    torch.cuda.empty_cache()  # The other processes need the memory.
    for name in setting["sets"]:
        losses, hits = score(model, records[name])
        tokens = [len(r.choices[r.right]) for r in records[name]]
        row[name] = sum(losses) / sum(tokens) if name == "validation" else {"losses": losses}
        if len(records[name][0].choices) > 1:
            row[name]["hits"] = hits
        if not setting["steps"]:
            row[name]["tokens"] = tokens
    return row


# --- The plan -----------------------------------------------------------------------------------

STEPS = 100
NAME = ("model", "task", "method", "alpha", "rate", "steps")
UNTRAINED = dict(method="untrained", alpha=0, rate=0, steps=0)


def name_of(setting):
    """What tells a setting from others, with the model's name instead of its folder."""
    return {key: setting[key] for key in NAME} | {"model": Path(setting["model"]).name}


def read_rows(path):
    """The rows of a file of JSON lines, by their settings and seeds."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {(*name_of(row).values(), row["seed"]): row for row in rows}


def rate_of(point):
    """The grid of rates has steps of the square root of 2."""
    return 1e-3 * 2 ** (point / 2)


class Plan:
    """The rows of a file, and the runs that make those that are missing."""

    def __init__(self, args):
        self.args = args
        self.path = Path(args.out)
        self.path.touch()
        self.rows = read_rows(self.path)
        spawn = multiprocessing.get_context("spawn")  # A fork can't use a GPU.
        self.pool = ProcessPoolExecutor(args.workers, mp_context=spawn)

    async def row_of(self, setting, seed):
        key = (*name_of(setting).values(), seed)
        if key not in self.rows:
            submit = asyncio.get_running_loop().run_in_executor
            self.rows[key] = await submit(self.pool, work, setting, seed, self.args.data)
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[key], separators=(",", ":")) + "\n")
        return self.rows[key]

    async def rows_of(self, setting, seeds):
        return await asyncio.gather(*(self.row_of(setting, seed) for seed in seeds))

    async def tuning_loss(self, setting, point):
        """The mean validation loss at a point of the grid. What diverged counts as 10."""
        rows = await self.rows_of(setting | {"rate": rate_of(point)}, TUNING_SEEDS)
        loss = statistics.mean(row["validation"] for row in rows)
        return loss if loss < 10 else 10.0

    async def tune(self, setting, point):
        """(the setting with its rate, the best point of the grid). The rate is where a parabola
        through the losses of that point and its two neighbours is lowest. point: a first guess."""
        losses = [self.tuning_loss(setting, point + shift) for shift in (-1, 0, 1)]
        low, middle, high = await asyncio.gather(*losses)
        if min(low, high) < middle:
            return await self.tune(setting, point + 1 if high < low else point - 1)
        bend = low - 2 * middle + high
        shift = (low - high) / (2 * bend) if bend else 0.0
        return setting | {"rate": rate_of(point + shift)}, point

    async def tune_alpha(self, setting, point=2):
        """What tune returns, at the best alpha. Twice the alpha is tried at a rate that is smaller
        by the square root of 2, up to 8 times."""
        settings = [setting | {"alpha": ALPHA * 2**doublings} for doublings in range(4)]
        _, point = await self.tune(settings[0], point)
        tried = [self.tuning_loss(other, point - i) for i, other in enumerate(settings)]
        losses = await asyncio.gather(*tried)
        best = losses.index(min(losses))
        return await self.tune(settings[best], point - best)

    async def tune_method(self, lora, point, method):
        """The settings of a method and of its control, if it has one, from LoRA's and its point."""
        setting = lora | dict(method=method, alpha=AUTHORS.get(method, lora["alpha"]))
        tune = self.tune_alpha if "own alpha" in method else self.tune
        setting, point = await tune(setting, point + START.get(method, 0))
        if method not in CURVATURES or method in AUTHORS:
            return [setting]
        rows = await self.rows_of(setting | {"rate": rate_of(point)}, TUNING_SEEDS)
        layers = rows[0]["phi"]
        factors = {name: statistics.mean(row["phi"][name] for row in rows) for name in layers}
        control = setting | dict(method=f"control of {method}", factors=factors)
        control, _ = await self.tune(control, point)
        return [setting, control]

    async def run_tier(self, model, task):
        """All runs of a tier for a model and a task."""
        tier = self.args.tier
        sets = ["held out", *TASKS[task][1]]
        cell = dict(model=model, task=task)
        await self.row_of(cell | UNTRAINED | {"sets": sets}, 0)
        lora = cell | dict(method="LoRA", steps=STEPS, factors={}, sets=["validation"])
        lora, point = await self.tune_alpha(lora)
        methods = [self.tune_method(lora, point, method) for method in TIERS[tier]]
        settings = sum(await asyncio.gather(*methods), [lora])
        if self.args.steps != STEPS:
            settings = [setting for setting in settings if setting["method"] != "DoRA"]
        final = dict(steps=self.args.steps, sets=sets if tier == 1 else ["held out"])
        seeds = range(5 if tier == 3 else 10)
        await asyncio.gather(*(self.rows_of(setting | final, seeds) for setting in settings))

    async def run(self):
        """The tier for all models and tasks."""
        cells = [(model, task) for model in self.args.models for task in self.args.tasks]
        await asyncio.gather(*(self.run_tier(*cell) for cell in cells))


# --- Tables and pictures ------------------------------------------------------------------------


def measures_of(results):
    """{measure: its sum over the tokens, or choices, of each record} of a run on a set."""
    measures = {"loss": np.array(results["losses"])}
    if "hits" in results:
        measures["% right"] = 100 * np.array([*results["hits"]], dtype=int)
    return measures


def compare(some, others, measure, counts, level, digits):
    """In words, by how much a measure of a method's runs is above another's."""
    seeds = sorted(some.keys() & others.keys())
    differences = np.array([some[seed][measure] - others[seed][measure] for seed in seeds])
    mean, low, high = two_way_interval(differences, counts, level)
    means = differences.sum(axis=1) / sum(counts)
    mean, low, high, median = (f"{x:+.{digits}f}" for x in (mean, low, high, np.median(means)))
    return f"{mean} ({low} to {high}), median {median}, {sum(means > 0)} of {len(seeds)} above"


def compare_all(method, runs, tokens):
    """The row of a method. runs: {method: {seed: measures}}. tokens: of each record."""
    own = runs[method]
    row = {"seeds": len(own)}
    level = 1 - 0.05 / COMPARISONS[TIER_OF[method]]
    for measure in next(iter(own.values())):
        counts, digits = (tokens, 4) if measure == "loss" else ([1] * len(tokens), 2)
        means = [run[measure].sum() / sum(counts) for run in own.values()]
        row[measure] = mean_and_spread(means, digits)
        for label, rival in (("LoRA", "LoRA"), ("its control", f"control of {method}")):
            if rival in runs and rival != method:
                compared = compare(own, runs[rival], measure, counts, level, digits)
                row[f"{measure} minus {label}"] = compared
    return row


def print_tables(rows, path):
    """Print a table for each model, task and number of steps, and write it to a Markdown file."""
    cells = {}
    for row in rows.values():
        if "held out" in row and row["steps"]:
            cell = cells.setdefault((row["model"], row["task"], row["steps"]), {})
            cell.setdefault(row["method"], {})[row["seed"]] = row
    for (model, task, steps), cell in cells.items():
        base = rows[(model, task, *UNTRAINED.values(), 0)]
        dates = sorted(row["date"] for seeds in cell.values() for row in seeds.values())
        body = f"{dates[0]} to {dates[-1]}, {base['machine']}. The level of an interval is "
        body += f"1 - 0.05 / m, with the comparisons of a whole tier as m: {COMPARISONS}."
        for name in ("held out", *TASKS[task][1]):
            tokens = base[name]["tokens"]
            runs = {}
            for method, seeds in cell.items():
                if all(name in row for row in seeds.values()):
                    runs[method] = {seed: measures_of(row[name]) for seed, row in seeds.items()}
            table = []
            for method in sorted(runs, key=lambda method: (TIER_OF[method], method)):
                first, *_ = cell[method].values()
                about = {"": method, "alpha": first["alpha"], "rate": f"{first['rate']:.2g}"}
                table.append(about | compare_all(method, runs, tokens))
            untrained = sum(base[name]["losses"]) / sum(tokens)
            body += f"\n\n**{name}** (untrained: {untrained:.4f})\n\n{markdown(table)}"
        report(f"Comparison: {model}, {task}, {steps} steps", body, path)


def draw(path, points, xlabel, ylabel, columns, highest=math.inf):
    """Points (panel, curve, x, y) as curves of mean y. A panel ends at highest times its lowest."""
    panels = {}
    for title, label, x, y in points:
        panels.setdefault(title, {}).setdefault(label, {}).setdefault(x, []).append(y)
    n = math.ceil(len(panels) / columns)
    figure = plt.figure(figsize=(20, 14 * n / columns), layout="constrained")
    for place, (title, curves) in enumerate(sorted(panels.items()), start=1):
        axis = figure.add_subplot(n, columns, place)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for label, curve in sorted(curves.items()):
            means = {x: statistics.mean(curve[x]) for x in sorted(curve)}
            axis.plot(list(means), list(means.values()), marker=".", label=label)
        lowest = np.nanmin(np.concatenate([line.get_ydata() for line in axis.lines]))
        axis.set_ylim(0.999 * lowest, min(axis.get_ylim()[1], highest * lowest))
        axis.legend()
    figure.savefig(path, dpi=80)


def draw_pictures(rows, folder):
    """The tuning curves, and phi by block after the tuning runs of HypLoRA."""
    losses, phis = [], []
    for row in rows.values():
        title = f"{row['model']}, {row['task']}"
        if "validation" in row:
            _, control, method = row["method"].rpartition("control of ")
            label = f"{control[:8]}alpha {row['alpha']}"
            panel = f"{title}\n{method}"
            losses.append((panel, label, math.log2(1000 * row["rate"]), row["validation"]))
        if row["method"] == "HypLoRA":
            for layer, phi in row.get("phi", {}).items():
                block = int(re.search(r"\.(\d+)\.", layer)[1])
                phis.append((title, layer.rpartition(".")[2], block, phi))
    draw(f"{folder}/comparison_rates.png", losses, "log2 of 1000 x rate", "mean loss", 5, 1.1)
    draw(f"{folder}/comparison_phi.png", phis, "block", "phi: median of tokens, mean of runs", 2)


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
    parser.add_argument("--assets", default="assets", help="a folder for the pictures")
    args = parser.parse_args()
    if args.table:
        rows = read_rows(args.table)
        print_tables(rows, args.results)
        draw_pictures(rows, args.assets)
    elif args.models and args.data and args.out:
        asyncio.run(Plan(args).run())
    else:
        parser.error("runs need --models, --data and --out, and tables need --table")


if __name__ == "__main__":
    main()
