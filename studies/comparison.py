"""LoRA, DoRA, HypLoRA and the authors' two layers, trained on real language models and compared.

README.md in this folder has the design. Each method is tuned on validation records with seeds of
its own, then trained anew with the seeds that are reported. What is finished is appended to a file
of JSON lines, run by run, so that the same command goes on where it was stopped.

    python -m studies.comparison --models SmolLM2 Gemma --data FOLDER --out comparison.jsonl
    python -m studies.comparison --table comparison.jsonl --results RESULTS.md --assets assets

Several processes share a GPU; each trains the seeds of a setting in turns, a CUDA graph for each.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import threading
import warnings
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import hyplora
from scaling.scoring import is_right
from scaling.training import IGNORE
from studies.authors import authors_update, simplified_update

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
# "control of M" is LoRA whose alpha is multiplied, layer by layer, by the median phi of M.

HYPERBOLIC = {
    "HypLoRA": dict(curvature=0.5),  # as README says: the median unit, and K learns
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


def adapt(model, job, inputs):
    """Add the adapters of a job to a frozen model, in place."""
    method, alpha = job["method"], job["alpha"]
    targets = ["down_proj"] if "down alone" in method else TARGETS
    if method not in HYPERBOLIC:
        alphas = {name: alpha * factor for name, factor in job["factors"].items()}
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
    """An adapter in training. On a GPU a step is a CUDA graph, on a stream of its own."""

    def __init__(self, job, seed, records):
        base = load(job["model"])
        shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        self.model = copy.deepcopy(base, shared)
        rows = [(r.question, r.choices[r.right]) for r in records["train"]]
        ids = collate(rows[: 2 * BATCH])[0]
        self.inputs = dict(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
        adapt(self.model, job, self.inputs)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for name, p in self.model.named_parameters():
            if "lora_A" in name:  # All methods start from the same A, drawn as LoRA's is.
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=DEVICE)
        on_gpu = dict(fused=True, capturable=True) if DEVICE == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.trained, self.lr, weight_decay=0.0, **on_gpu)
        self.batches = draw_batches(rows, job["steps"], seed)
        self.batch = [part.clone() for part in self.batches[0]]
        self.stream = None
        self.run_step = self.step
        if DEVICE == "cuda":
            self.capture()

    def step(self):
        losses_of(self.model, self.batch, "mean").backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def capture(self):
        """Make run_step the replay of a CUDA graph of step."""
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()  # The rate is 0 so far, so that this moves nothing but the moments.
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        self.run_step = graph.replay

    def advance(self, number, lr):
        """Do the step of this number."""
        with torch.cuda.stream(self.stream):
            self.lr.fill_(lr)
            for part, new in zip(self.batch, self.batches[number]):
                part.copy_(new)
            self.run_step()


def measure(model, records, names):
    """{name: losses, hits and numbers of tokens of these records}"""
    row = {}
    for name in names:
        losses, hits = score(model, records[name])
        tokens = [len(r.choices[r.right]) for r in records[name]]
        row[name] = dict(losses=losses, hits="".join(map(str, hits)), tokens=tokens)
    return row


def work(setting, seeds, folder):
    """Train a setting with these seeds in turns: a row of results for each."""
    torch.set_num_threads(1)
    records = read_task(setting["task"], setting["model"], folder)
    runs = [Run(setting, seed, records) for seed in seeds]
    steps = setting["steps"]
    warmup = steps // 10 + 1
    for number in range(steps):
        factor = min((number + 1) / warmup, (steps - number) / (steps - warmup + 1))
        for run in runs:
            run.advance(number, setting["rate"] * factor)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    rows = []
    for run, seed in zip(runs, seeds):
        row = name_of(setting) | {"seed": seed}
        if hyplora.hyplora_layers(run.model):
            row["phi"] = median_phis(run.model, run.inputs)
        found = measure(run.model, records, setting["sets"])
        for name, own in found.items():
            row[name] = {"losses": own["losses"], "hits": own["hits"]}
        if "validation" in found:
            row["validation"] = sum(own["losses"]) / sum(own["tokens"])
        rows.append(row)
    return rows


def measure_base(setting, folder):
    """The row of the untrained model, which also has the number of tokens of each answer."""
    records = read_task(setting["task"], setting["model"], folder)
    sets = measure(load(setting["model"]), records, ["held out", *TASKS[setting["task"]][1]])
    return [name_of(setting) | {"seed": 0} | sets]


# --- The plan -----------------------------------------------------------------------------------

STEPS = 100
METHODS = {
    1: ["HypLoRA", "DoRA"],
    2: ["HypLoRA, 1.0", "HypLoRA, raw K = 0.5", *AUTHORS],
    3: [name for name in HYPERBOLIC if "radius" in name],
}
NAME = ("model", "task", "method", "alpha", "rate", "steps")


def name_of(setting):
    """What tells a setting from others, with the model's name instead of its folder."""
    return {key: setting[key] for key in NAME} | {"model": Path(setting["model"]).name}


class Ledger:
    """The rows of a file of JSON lines, and the processes that make what is missing."""

    def __init__(self, args):
        self.path = Path(args.out)
        self.folder = args.data
        self.lock = threading.Lock()
        self.rows = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                self.add(json.loads(line))
        spawn = multiprocessing.get_context("spawn")  # A fork can't use a GPU.
        self.pool = ProcessPoolExecutor(args.workers, mp_context=spawn)
        self.group = args.group

    def add(self, row):
        self.rows[*[row[key] for key in NAME], row["seed"]] = row

    def make(self, function, *arguments):
        """Run a function in one of the processes, and keep its rows."""
        rows = self.pool.submit(function, *arguments, self.folder).result()
        with self.lock, self.path.open("a") as file:
            for row in rows:
                self.add(row)
                file.write(json.dumps(row) + "\n")

    def base(self, cell):
        """The row of the untrained model."""
        setting = cell | dict(method="untrained", alpha=0, rate=0, steps=0)
        key = (*name_of(setting).values(), 0)
        if key not in self.rows:
            self.make(measure_base, setting)
        return self.rows[key]

    def rows_of(self, setting, seeds):
        """The rows of a setting, one for each seed."""
        keys = {seed: (*name_of(setting).values(), seed) for seed in seeds}
        missing = [seed for seed in seeds if keys[seed] not in self.rows]
        count = math.ceil(len(missing) / self.group)
        groups = [missing[i::count] for i in range(count)]
        in_parallel(lambda group: self.make(work, setting, group), groups)
        return [self.rows[key] for key in keys.values()]


def in_parallel(function, things):
    with ThreadPoolExecutor(max(1, len(things))) as threads:
        return list(threads.map(function, things))


def rate_of(exponent):
    """The grid of rates has steps of the square root of 2."""
    return 1e-3 * 2 ** (exponent / 2)


def mean_loss(rows):
    """The mean validation loss. What diverged counts as 10."""
    loss = statistics.mean(row["validation"] for row in rows)
    return loss if loss < 10 else 10.0


def tune(ledger, setting, start):
    """(loss, rate, grid point below or above it) where a parabola through the mean losses of the
    best point of the grid and its two neighbours is lowest.
    """
    losses = {}

    def try_rate(exponent):
        found = setting | {"rate": rate_of(exponent), "sets": ["validation"]}
        losses[exponent] = mean_loss(ledger.rows_of(found, TUNING_SEEDS))

    best = start
    while not {best - 1, best, best + 1} <= set(losses):
        in_parallel(try_rate, [e for e in (best - 1, best, best + 1) if e not in losses])
        best = min(losses, key=losses.get)
    low, middle, high = (losses[best + shift] for shift in (-1, 0, 1))
    bend = low - 2 * middle + high
    shift = (low - high) / (2 * bend)
    return middle - bend * shift**2 / 2, rate_of(best + shift), best


def tune_lora(ledger, cell):
    """(the setting of the best alpha at its best rate, the grid point). Twice the alpha is tried at
    a rate that is smaller by the square root of 2, up to 8 times.
    """
    setting = cell | dict(method="LoRA", alpha=ALPHA, factors={}, sets=["validation"])
    loss, rate, first = tune(ledger, setting, 2)
    options = [(loss, 0)]

    def try_alpha(doublings):
        found = setting | dict(alpha=ALPHA * 2**doublings, rate=rate_of(first - doublings))
        options.append((mean_loss(ledger.rows_of(found, TUNING_SEEDS)), doublings))

    in_parallel(try_alpha, [1, 2, 3])
    best = min(options)[1]
    setting["alpha"] *= 2**best
    _, rate, point = tune(ledger, setting, first - best)
    return setting | {"rate": rate}, point


def tune_method(ledger, cell, method, alpha, start):
    """The settings of a method and of its control, if it has one."""
    setting = cell | dict(method=method, alpha=AUTHORS.get(method, alpha), factors={})
    _, rate, best = tune(ledger, setting, start)
    settings = [setting | {"rate": rate}]
    if method in HYPERBOLIC and method not in AUTHORS:
        rows = ledger.rows_of(setting | {"rate": rate_of(best)}, TUNING_SEEDS)
        layers = rows[0]["phi"]
        factors = {name: statistics.mean(row["phi"][name] for row in rows) for name in layers}
        control = setting | dict(method=f"control of {method}", factors=factors)
        _, rate, _ = tune(ledger, control, best)
        settings.append(control | {"rate": rate})
    return settings


def run_tier(ledger, cell, args):
    """All runs of a tier for a model and a task."""
    cell = cell | {"steps": STEPS}
    ledger.base(cell)
    lora, start = tune_lora(ledger, cell)
    found = in_parallel(
        lambda method: tune_method(ledger, cell, method, lora["alpha"], start), METHODS[args.tier]
    )
    settings = [lora, *itertools.chain(*found)]
    sets = ["held out"] + (TASKS[cell["task"]][1] if args.tier == 1 else [])
    seeds = range(5 if args.tier == 3 else 10)
    if args.steps != STEPS:
        settings = [setting for setting in settings if setting["method"] != "DoRA"]
    final = dict(steps=args.steps, sets=sets)
    in_parallel(lambda setting: ledger.rows_of(setting | final, seeds), settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tier", type=int, choices=METHODS, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the reported runs")
    parser.add_argument("--models", nargs="+", default=[], help="folders that transformers loads")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", help="the folder of the paper's JSON files")
    parser.add_argument("--out", help="the file of JSON lines")
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.add_argument("--group", type=int, default=5, help="seeds that a process trains in turns")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    ledger = Ledger(args)
    cells = [dict(model=m, task=t) for m, t in itertools.product(args.models, args.tasks)]
    in_parallel(lambda cell: run_tier(ledger, cell, args), cells)


if __name__ == "__main__":
    main()
