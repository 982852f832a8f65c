"""Fine-tune a checkpoint on real data with LoRA and HypLoRA, and score both by the paper's rules.

    python -m scaling.finetune --checkpoint Qwen2.5-7B --dtype bfloat16 --data train.json \\
        --eval gsm8k.json mawps.json --recipe paper
    torchrun --nproc-per-node 8 -m scaling.finetune --checkpoint ...

`python train_minimal.py --checkpoint ...` comes here too. README.md has the data format, the
recipes and what they leave out.
"""

import argparse
import hashlib
import json
import math
import os
import sys

import torch

from hyplora import (
    calibrate_curvature,
    hyplora_layers,
    hyplora_parameters,
    inject_hyplora,
    load_hyplora,
    remove_hyplora,
    save_hyplora,
)
from scaling.checkpoint import FAMILIES, from_checkpoint, read_config, read_json
from scaling.decoder import Decoder
from scaling.processes import (
    end_processes,
    is_main,
    leave,
    same_start,
    say,
    start_processes,
)
from scaling.records import (
    IGNORE,
    TEMPLATES,
    Batches,
    Tokens,
    read_chat_template,
    read_records,
    seeded,
)
from scaling.scoring import (
    LETTER_RULES,
    answer_kind,
    averages,
    extract,
    score_records,
)
from scaling.training import (
    Plan,
    adapter_effect,
    mean_loss,
    read_state,
    train,
)

# -------------------------------------------------------------------------------------------------
# The command line

# The authors' scripts for arithmetic (their table 3). README.md lists it item by item.
PAPER = dict(
    rank=32,
    curvature=[1.0],
    dropout=0.05,
    targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    lr=3e-4,
    warmup=100,
    batch_size=16,
    epochs=3,
    weight_decay=0.0,
    clip_norm=1.0,
    seed=42,
    loss_on="all",
    cutoff=256,
    over_cutoff="truncate",
    by_length=False,
    validation=120,
    validate_every=200,
    beams=4,
    max_new_tokens=512,
)
RECIPES = {
    "paper": PAPER,
    # for commonsense (their table 4)
    "paper-commonsense": PAPER | dict(validate_every=80, max_new_tokens=32),
}
LORA_ALPHA = 64.0
HYPLORA_ALPHA = {"llama": 128.0, "qwen2": 128.0, "gemma": 128.0, "gemma3": 32.0}
COMMONSENSE_ALPHA = HYPLORA_ALPHA | {"qwen2": 256.0}
WORD_TOKENS = 32  # the longest answer of a commonsense set in their scripts


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def not_negative(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def curvature(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 (inf is plain LoRA)")
    return value


def share(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def add(group, name, help, **settings):
    """Add an option to a group of the parser; its help names the default, if there is one."""
    default = settings.get("default")
    if default is not None and default is not True and default != []:
        help = f"{help} (default: %(default)s)"
    group.add_argument(name, help=help, **settings)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="scaling.finetune",
        description="Fine-tune a checkpoint with LoRA and HypLoRA, and score both.",
    )
    choice = argparse.BooleanOptionalAction

    group = parser.add_argument_group("what to learn")
    add(
        group,
        "--checkpoint",
        metavar="DIR",
        help=f"a hub's folder of a model of {', '.join(FAMILIES)}",
    )
    add(group, "--data", metavar="FILE", help="train on this JSON list or JSON lines")
    add(group, "--eval", nargs="+", default=[], metavar="FILE", help="score the answers to these")
    add(group, "--recipe", choices=list(RECIPES), help="the settings of the authors' scripts")
    add(
        group,
        "--template",
        choices=TEMPLATES,
        help="the prompt (default: chat if the model has one)",
    )

    group = parser.add_argument_group("the adapter")
    add(
        group,
        "--adapter",
        choices=["lora", "hyplora", "both"],
        default="both",
        help="which to train",
    )
    add(group, "--rank", type=positive_int, default=8, help="rank of BA")
    add(group, "--alpha", type=positive, help="the update is scaled by alpha / rank (default: 16)")
    add(
        group,
        "--curvature",
        type=curvature,
        nargs="+",
        default=[0.5],
        help="HypLoRA's K in units of a typical token's squared length; several give a row each",
    )
    add(
        group,
        "--calibrate",
        action=choice,
        default=True,
        help="measure that length in the first batch (default)",
    )
    add(group, "--dropout", type=share, default=0.0, help="on the adapter's input")
    add(
        group,
        "--targets",
        nargs="+",
        default=["all-linear"],
        help="name endings of the adapted layers",
    )

    group = parser.add_argument_group("training")
    add(group, "--lr", type=positive, default=3e-4, help="peak learning rate")
    add(group, "--warmup", type=positive_int, default=20, help="steps of linear warm-up")
    add(group, "--steps", type=positive_int, help="optimizer steps (default: --epochs of --data)")
    add(group, "--epochs", type=positive_int, default=3, help="passes over --data")
    add(group, "--batch-size", type=positive_int, default=16, help="records a step")
    add(
        group, "--accumulate", type=positive_int, default=1, help="parts of a batch, to save memory"
    )
    add(group, "--weight-decay", type=not_negative, default=0.01, help="of A and B")
    add(group, "--clip-norm", type=positive, help="longest gradient")
    add(group, "--seed", type=int, default=0, help="of the adapter's start and of the batches")
    add(
        group,
        "--validation",
        type=int,
        default=0,
        help="records of --data that choose the best step",
    )
    add(
        group,
        "--validate-every",
        type=positive_int,
        default=200,
        help="steps between two such looks",
    )
    add(
        group, "--save-every", type=positive_int, default=200, help="steps between two saved states"
    )
    add(group, "--resume", action="store_true", help="go on from what the same command saved")

    group = parser.add_argument_group("records")
    add(
        group,
        "--cutoff",
        type=positive_int,
        default=1024,
        help="longest record to train on, in tokens",
    )
    add(
        group,
        "--over-cutoff",
        choices=["leave-out", "truncate"],
        default="leave-out",
        help="what happens to a longer one",
    )
    add(
        group,
        "--loss-on",
        choices=["answer", "all"],
        default="answer",
        help="tokens that are learned",
    )
    add(
        group,
        "--by-length",
        action=choice,
        default=True,
        help="batch records of similar length (default)",
    )

    group = parser.add_argument_group("scoring")
    add(group, "--score-only", metavar="ADAPTER", help="score this saved adapter, train nothing")
    add(group, "--predictions", metavar="FILE", help="write every answer there, as JSON lines")
    add(group, "--max-new-tokens", type=positive_int, default=256, help="longest answer")
    add(group, "--beams", type=positive_int, default=1, help="beam search; 1 is greedy")
    add(
        group,
        "--eval-batch-size",
        type=positive_int,
        default=32,
        help="answers generated at a time",
    )
    add(group, "--letters", choices=LETTER_RULES, default="first", help="rule for answers A to E")

    group = parser.add_argument_group("where and how it runs")
    add(
        group,
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: a GPU, if any",
    )
    add(group, "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    add(
        group,
        "--recompute",
        action="store_true",
        help="activation checkpointing: less memory, more time",
    )
    add(group, "--shard", action="store_true", help="not available at present")
    add(group, "--out", default="runs", help="folder for the states and the adapters")
    return parser


def parse_arguments(argv=None):
    """The options, with the recipe's settings where none are given. Ends the run if they clash."""
    parser = build_parser()
    known, _ = parser.parse_known_args(argv)
    if known.recipe is not None:
        parser.set_defaults(**RECIPES[known.recipe])
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        parser.error(
            "--data and --eval need a model: add --checkpoint DIR, a folder with config.json, "
            "*.safetensors and tokenizer.json as a model hub distributes it"
        )
    if args.score_only is None and args.data is None:
        parser.error("there is nothing to train on: add --data FILE, or --score-only ADAPTER")
    if args.score_only is not None and not args.eval:
        parser.error("--score-only needs what to score on: add --eval FILE ...")
    if args.score_only is not None and (args.data is not None or args.resume):
        parser.error("--score-only trains nothing: leave out --data and --resume")
    if args.predictions is not None and not args.eval:
        parser.error("--predictions are the answers to --eval: add --eval FILE ...")
    if args.validation < 0:
        parser.error(f"--validation must be at least 0, got {args.validation}")
    if args.shard:
        sys.exit(
            "--shard is not available until the loading is rebuilt: a model has to be adapted "
            "before it is sharded"
        )
    if args.targets == ["all-linear"]:
        args.targets = "all-linear"
    if args.device == "auto":
        args.device = "cpu"
        if torch.backends.mps.is_available():
            args.device = "mps"
        if torch.cuda.is_available():
            args.device = "cuda"
    return args


def choose_alpha(args, family, hyperbolic):
    """--alpha if it is given, else the recipe's for this adapter and family, else 16."""
    if args.alpha is not None:
        return args.alpha
    if args.recipe is None:
        return 16.0
    if not hyperbolic:
        return LORA_ALPHA
    alphas = COMMONSENSE_ALPHA if args.recipe == "paper-commonsense" else HYPLORA_ALPHA
    family = {"gemma3_text": "gemma3"}.get(family, family)
    if family not in alphas:
        sys.exit(
            f"--recipe {args.recipe} has no alpha for the family {family}, which the authors did "
            f"not train; known are {', '.join(alphas)}. Choose one with --alpha"
        )
    return alphas[family]


# -------------------------------------------------------------------------------------------------
# The data


def read_all(args, tokens):
    """(training records, {path: test records}) of the files that the options name."""
    records = []
    if args.data is not None:
        records = read_records(args.data, tokens, args.cutoff, args.over_cutoff)
        if args.loss_on == "answer":
            records = with_answers(args.data, records)
    tests = {}
    for path in args.eval:
        tests[path] = read_records(path, tokens, for_scoring=True)
    return records, tests


def with_answers(path, records):
    """The records of which --cutoff has left some output, as the others have nothing to learn."""
    kept = [record for record in records if record.target_ids]
    if len(kept) < len(records):
        say(f"{path}: {len(records) - len(kept)} left out, as --cutoff leaves none of their output")
    if not kept:
        sys.exit(f"{path}: --cutoff leaves nothing to learn; raise it, or take --loss-on all")
    return kept


def split_validation(records, count, seed):
    """(training records, `count` validation records), chosen at random."""
    if count == 0:
        return records, []
    if count >= len(records):
        sys.exit(f"--validation {count} leaves no record to train on: there are {len(records)}")
    order = torch.randperm(len(records), generator=seeded(seed, "validation")).tolist()
    held_out = set(order[:count])
    training = [record for i, record in enumerate(records) if i not in held_out]
    return training, [records[i] for i in order[:count]]


def hash_records(records):
    """A short text that changes if any training record does."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.prompt_ids, record.target_ids]).encode())
    return digest.hexdigest()[:16]


def column_names(paths):
    """{path: the shortest ending of it, without .json, that no other path has}."""
    stems = {path: os.path.splitext(os.path.abspath(path))[0] for path in paths}
    if len(set(stems.values())) < len(stems):  # test.json and test.jsonl, for example
        stems = {path: os.path.abspath(path) for path in paths}
    parts = {path: stem.split(os.sep) for path, stem in stems.items()}
    names = {}
    for path in paths:
        for length in range(1, len(parts[path]) + 1):
            ending = parts[path][-length:]
            if sum(other[-length:] == ending for other in parts.values()) == 1:
                break
        names[path] = "/".join(ending)
    return names


def set_kind(records):
    """How a set counts in the averages: "word" if all its answers are words, else "number"."""
    kinds = {answer_kind(record.answer) for record in records}
    return "word" if kinds == {"word"} else "number"


# -------------------------------------------------------------------------------------------------
# Scoring


class Scorer:
    """Scores the model, as it is, on the test files, and keeps the answers in --predictions."""

    def __init__(self, args, tokens, tests, device):
        self.args = args
        self.tokens = tokens
        self.tests = tests
        self.device = device
        self.names = column_names(tests)
        if args.predictions is not None and is_main():
            with open(args.predictions, "w", encoding="utf-8"):
                pass  # A file that cannot be written is found out now, and not after the training.

    def __call__(self, model, adapter):
        """{column: value} of the table: percent right on each file, then the averages."""
        args = self.args
        columns = {}
        results = {}
        for path, records in self.tests.items():
            name = self.names[path]
            kind = set_kind(records)
            count = args.max_new_tokens
            if args.recipe is not None and kind == "word":
                count = min(count, WORD_TOKENS)
            rights, answers = score_records(
                model,
                records,
                self.tokens,
                args.eval_batch_size,
                count,
                self.device,
                f"{adapter}: {name}",
                args.beams,
                args.letters,
            )
            columns[f"% {name}"] = 100 * sum(rights) / len(rights)
            results[path] = (kind, rights)
            say(f"  {adapter}: {sum(rights)} of {len(rights)} right on {name}")
            say(f"  for example: {answers[0][:200]!r}, where {records[0].answer} is right")
            self.keep(adapter, path, records, rights, answers)
        columns.update(averages(results))
        return columns

    def keep(self, adapter, path, records, rights, answers):
        if self.args.predictions is None or not is_main():
            return
        with open(self.args.predictions, "a", encoding="utf-8") as file:
            for record, right, answer in zip(records, rights, answers):
                extracted = extract(answer, record.answer, self.args.letters)
                line = {
                    "adapter": adapter,
                    "file": path,
                    "record": record.position,
                    "instruction": record.instruction,
                    "answer": record.answer,
                    "output": answer,
                    "extracted": None if extracted is None else str(extracted),
                    "right": right,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------------
# One adapter

# The options that shape an adapter. Two commands that differ in one of them train two adapters;
# those that differ in others (how answers are scored, how memory is saved) share theirs.
SHAPING = (
    "template rank dropout targets calibrate lr warmup steps epochs batch_size weight_decay "
    "clip_norm seed validation validate_every cutoff over_cutoff loss_on by_length dtype"
).split()


class Adapter:
    """What one command trains for one curvature: its name, its settings, and its files."""

    def __init__(self, args, curvature):
        self.curvature = curvature
        self.name = "LoRA" if curvature == math.inf else f"HypLoRA {curvature:g}"
        self.alpha = choose_alpha(args, args.family, curvature < math.inf)
        settings = {name: getattr(args, name) for name in SHAPING}
        settings.update(
            checkpoint=os.path.realpath(args.checkpoint),
            data=os.path.realpath(args.data),
            alpha=self.alpha,
            curvature=curvature,
        )
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        data = os.path.splitext(os.path.basename(args.data))[0]
        stem = f"{data}-{self.name.replace(' ', '-').lower()}-seed{args.seed}-{key}"
        self.path = os.path.join(args.out, f"{stem}.pt")
        self.state_path = os.path.join(args.out, f"state-{stem}.pt")


def curvatures(args):
    """The curvature of each adapter to train; infinity is LoRA."""
    if args.adapter == "lora":
        return [math.inf]
    first = [math.inf] if args.adapter == "both" else []
    return list(dict.fromkeys([*first, *args.curvature]))


def states_to_resume(args, adapters, data_hash):
    """{path: the state to go on from, or None} of each adapter's path.

    With --resume, ends the run if there is no state at all or if the data is not what it was.
    """
    states = {adapter.path: None for adapter in adapters}
    if not args.resume:
        return states
    for adapter in adapters:
        state = read_state(adapter.state_path)
        if state is not None and state["data"] != data_hash:
            sys.exit(
                f"{adapter.state_path} cannot be resumed: the records of {args.data} are not those "
                "that it was trained on. Restore them, or start anew without --resume"
            )
        states[adapter.path] = state
    if all(state is None for state in states.values()):
        sys.exit(
            f"there is nothing to resume: {adapters[0].state_path} does not exist. Every option "
            "that shapes the training must be as it was; to start anew, leave out --resume"
        )
    return states


def adapter_size(model):
    """How many numbers the adapters train."""
    size = 0
    for group in hyplora_parameters(model):
        size += sum(parameter.numel() for parameter in group["params"])
    return size


def sample_tokens(batches):
    """The longer half of the first batch, cut to one length so that it has no padding: (n, T)."""
    ids, labels = batches(0)
    lengths = (labels != IGNORE).long().cumsum(dim=1).argmax(dim=1) + 1
    middle = lengths.median()
    return ids[lengths >= middle, :middle]


def train_adapter(args, base, adapter, batches, steps, state, data_hash, validation, device):
    """Inject, calibrate, train and save one adapter. Returns the seconds of the training."""
    torch.manual_seed(args.seed)
    inject_hyplora(
        base,
        args.targets,
        curvature=adapter.curvature,
        rank=args.rank,
        alpha=adapter.alpha,
        dropout=args.dropout,
    )
    if args.calibrate and adapter.curvature < math.inf and state is None:
        calibrate_curvature(base, sample_tokens(batches).to(device))
    groups = hyplora_parameters(base)
    for group in groups:
        same_start(group["params"])
    same_start([layer.lora_unit for layer in hyplora_layers(base).values()])
    plan = Plan(
        steps=steps,
        lr=args.lr,
        warmup=args.warmup,
        seed=args.seed,
        weight_decay=args.weight_decay,
        clip_norm=args.clip_norm,
        accumulate=args.accumulate,
        save_every=args.save_every,
        validate_every=args.validate_every,
    )
    label = f"{adapter.name}, seed {args.seed}"
    seconds = train(
        base, groups, batches, plan, label, adapter.state_path, state, data_hash, validation
    )
    if is_main():
        save_hyplora(base, adapter.path)
    say(f"{adapter.name} is saved: {adapter.path}")
    effect = adapter_effect(base, sample_tokens(batches).to(device))
    if effect:
        say(f"What it does to the tokens of the first batch:\n\n{effect}\n")
    return seconds


def ended_curvatures(model):
    """K / in_features of each adapted layer whose K is finite."""
    found = []
    for layer in hyplora_layers(model).values():
        if layer.options["curvature"] < math.inf:
            found.append(float(layer.K.detach()) / layer.in_features)
    return found


# -------------------------------------------------------------------------------------------------
# The table


def table(rows, base_size):
    """The rows as lines of Markdown. share: adapter / (base + adapter), as the paper counts it."""
    columns = list(rows[0]["metrics"])
    lines = [
        f"| | trainable | share | {' | '.join([*columns, 'seconds'])} | K / width |",
        "| --- | ---: | ---: |" + " ---: |" * len(columns) + " ---: | ---: |",
    ]
    for row in rows:
        share_of_all = 100 * row["trainable"] / (base_size + row["trainable"])
        cells = [row["name"], str(row["trainable"]), f"{share_of_all:.2f} %"]
        for column in columns:
            digits = 4 if column == "loss" else 1
            cells.append(f"{row['metrics'][column]:.{digits}f}")
        cells.append(f"{row['seconds']:.1f}")
        ended = row["K"]
        if ended:
            mean = sum(ended) / len(ended)
            cells.append(f"{mean:.3g} ({min(ended):.2g} to {max(ended):.2g})")
        else:
            cells.append("-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# The program


def read_inputs(args):
    """(tokens, training records, {path: test records}) of what the options name.

    What is wrong with a file is found here, before any weight is read. Raises ValueError.
    """
    config = read_config(args.checkpoint)
    template = args.template
    if template is None and args.recipe is not None and args.family == "llama":
        if read_chat_template(args.checkpoint) is not None:
            template = "chat-alpaca"  # So the authors prompt Llama 3.
    tokens = Tokens(args.checkpoint, template)
    args.template = tokens.template
    say(f"prompts: {tokens.template}; an answer ends with token {tokens.end}")
    records, tests = read_all(args, tokens)
    for path, read in {args.data: records, **tests}.items():
        check_vocabulary(path, read, config.vocab_size)
    if args.score_only is None:
        with torch.device("meta"):  # Do the targets name layers? A model without memory can tell.
            inject_hyplora(Decoder(config), args.targets, rank=args.rank)
    return tokens, records, tests


def check_vocabulary(path, records, size):
    """Raise ValueError if a record has a token that the model does not have."""
    for record in records:
        largest = max(record.prompt_ids + record.target_ids)
        if largest >= size:
            raise ValueError(
                f"{path}, record {record.position} has the token {largest}, and the model's "
                f"vocab_size is {size}: tokenizer.json belongs to another model"
            )


def load_base(args, device):
    """The frozen base on the device. Ends the run if its files do not fit its config."""
    dtype = getattr(torch, args.dtype)
    try:
        base = from_checkpoint(args.checkpoint, dtype, device)
    except ValueError as error:
        sys.exit(str(error))
    base.recompute = args.recompute
    return base


def main(argv=None):
    """Run it all; returns the rows of the table as dictionaries."""
    args = parse_arguments(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # Answers may have any character.
    device = torch.device(args.device)
    start_processes(args.device)
    try:
        args.family = read_json(args.checkpoint, "config.json").get("model_type")
        tokens, records, tests = read_inputs(args)
    except ValueError as error:
        sys.exit(str(error))
    if is_main():
        os.makedirs(args.out, exist_ok=True)
    scorer = Scorer(args, tokens, tests, device)
    if args.score_only is not None:
        rows = score_saved(args, scorer, device)
    else:
        rows = train_and_score(args, records, scorer, device)
    end_processes()
    return rows


def score_saved(args, scorer, device):
    """The table's one row for --score-only."""
    base = load_base(args, device)
    base_size = sum(parameter.numel() for parameter in base.parameters())
    try:
        load_hyplora(base, args.score_only)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    row = {
        "name": os.path.splitext(os.path.basename(args.score_only))[0],
        "trainable": adapter_size(base),
        "metrics": scorer(base, "adapter"),
        "seconds": 0.0,
        "K": ended_curvatures(base),
    }
    say("\n" + table([row], base_size))
    return [row]


def train_and_score(args, records, scorer, device):
    """Train each adapter, save it, score it. Returns the rows of the table, the base's first."""
    records, held_out = split_validation(records, args.validation, args.seed)
    data_hash = hash_records(records)
    adapters = [Adapter(args, curvature) for curvature in curvatures(args)]
    states = states_to_resume(args, adapters, data_hash)
    batches = Batches(records, args.batch_size, args.seed, args.loss_on, args.by_length)
    steps = args.steps or args.epochs * batches.steps_per_epoch
    watched = Batches(held_out or records[:64], args.batch_size, 0, args.loss_on)
    validation = watched if held_out else None

    base = load_base(args, device)
    base_size = sum(parameter.numel() for parameter in base.parameters())
    say(f"training: {steps} steps of {args.batch_size} records for each adapter")
    metrics = {"loss": mean_loss(base, watched, device), **scorer(base, "base")}
    rows = [{"name": "base", "trainable": 0, "metrics": metrics, "seconds": 0.0, "K": []}]
    for adapter in adapters:
        if len(rows) > 1:
            remove_hyplora(base)
        state = states[adapter.path]
        seconds = train_adapter(
            args, base, adapter, batches, steps, state, data_hash, validation, device
        )
        metrics = {"loss": mean_loss(base, watched, device), **scorer(base, adapter.name)}
        rows.append(
            {
                "name": adapter.name,
                "trainable": adapter_size(base),
                "metrics": metrics,
                "seconds": seconds,
                "K": ended_curvatures(base),
                "path": adapter.path,
            }
        )
    say("\n" + table(rows, base_size))
    return rows


if __name__ == "__main__":
    main()
    leave()
