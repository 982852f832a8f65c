"""Fine-tune a model on real data with LoRA and HypLoRA, and score both by the paper's rules.

    python -m scaling.finetune --checkpoint Qwen2.5-7B --dtype bfloat16 --data train.json \\
        --eval gsm8k.json mawps.json --recipe paper
    torchrun --nproc-per-node 8 -m scaling.finetune --shard --checkpoint ...

`python train_minimal.py --checkpoint ...` comes here too. README.md has the data format, the
recipes and what they leave out.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from statistics import mean

import torch
import torch.distributed as dist

import hyplora
from scaling.data import TEMPLATES, cut_records, read_prompts, read_records, transformers
from scaling.scoring import LETTER_RULES, answer_kind, averages, extract, generate_answers, is_right
from scaling.training import (
    can_leave_out_logits,
    is_main,
    make_batch,
    mean_loss,
    records_of_step,
    say,
    seeded,
    spread,
    start_processes,
    train,
    whole_adapters,
    write_or_exit,
)

# --- The command line ---------------------------------------------------------------------------

# The settings of the authors' scripts, as options; README.md lists them item by item.
PAPER = (
    "--rank 32 --curvature inf 1 --dropout 0.05 --targets q_proj k_proj v_proj up_proj down_proj "
    "--lr 3e-4 --warmup-steps 100 --batch-size 16 --epochs 3 --seed 42 --loss-on all --cutoff 256 "
    "--validation 120 --eval-steps 200 --beams 4 --max-new-tokens 512 "
)
RECIPES = {"paper": PAPER, "paper-commonsense": PAPER + "--eval-steps 80 --max-new-tokens 32"}
LORA_ALPHA = 64.0
ALPHAS = {
    "paper": {"llama": 128.0, "qwen2": 128.0, "gemma": 128.0, "gemma3": 32.0},
    "paper-commonsense": {"llama": 128.0, "qwen2": 256.0, "gemma": 128.0, "gemma3": 32.0},
}
WORD_TOKENS = 32  # the longest answer of a commonsense set in their scripts
# What shapes an adapter: a run that is resumed has to have the same.
SHAPING = (
    "recipe rank alpha dropout targets lr warmup_steps steps batch_size seed validation eval_steps "
    "cutoff loss_on dtype"
).split()


def at_least(kind, lowest):
    """A type for argparse: a number that is not below lowest."""

    def read(text):
        value = kind(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {lowest:g}")
        return value

    return read


def build_parser():
    parser = argparse.ArgumentParser(
        prog="scaling.finetune",
        description="Fine-tune a model with LoRA and HypLoRA, and score both.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = at_least(int, 1)
    count_or_0 = at_least(int, 0)
    positive = at_least(float, 1e-12)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a model's folder, as from a hub")
    add("--data", metavar="FILE", help="train on this JSON list, or JSON lines")
    add("--eval", nargs="+", default=[], metavar="FILE", help="score the answers to these")
    add("--recipe", choices=list(RECIPES), help="the settings of the authors' scripts")
    add("--template", choices=TEMPLATES, help="the prompt; None is chat, if the model has one")
    add("--out", default="runs", help="the run's folder: options, states and adapters")
    add("--resume", action="store_true", help="go on with the run in --out")
    # the adapters
    ours = [math.inf, 0.5]
    add("--curvature", type=positive, nargs="+", default=ours, help="an adapter each; inf is LoRA")
    add("--rank", type=count, default=8, help="rank of BA")
    add("--alpha", type=positive, help="scales by alpha / rank; None is 16, or the recipe's")
    add("--dropout", type=float, default=0.0, help="on the adapter's input")
    add("--targets", nargs="+", default=["all-linear"], help="name endings of the adapted layers")
    # training
    add("--lr", type=positive, default=3e-4, help="peak learning rate")
    add("--warmup-steps", type=count, default=20, help="steps of linear warm-up")
    add("--steps", type=count, help="optimizer steps; None is --epochs of --data")
    add("--epochs", type=count, default=3, help="passes over --data")
    add("--batch-size", type=count, default=16, help="records a step, over all processes")
    add("--seed", type=int, default=0, help="of the adapter's start and of the batches")
    add("--loss-on", choices=["answer", "all"], default="answer", help="tokens that are learned")
    add("--cutoff", type=count, default=1024, help="tokens of a record that are read")
    add("--validation", type=count_or_0, default=0, help="records of --data that choose a step")
    add("--eval-steps", type=count, default=200, help="steps between two such looks")
    add("--save-steps", type=count, default=200, help="steps between two saved states")
    # scoring
    add("--score-only", metavar="ADAPTER", help="score this saved adapter, train nothing")
    add("--predictions", metavar="FILE", help="write every answer there, as JSON lines")
    add("--max-new-tokens", type=count, default=256, help="longest answer")
    add("--beams", type=count, default=1, help="beam search; 1 is greedy")
    add("--eval-batch-size", type=count, default=32, help="sequences (beams) at a time")
    add("--letters", choices=LETTER_RULES, default="first", help="rule for answers A to E")
    # where and how it runs
    add("--device", type=torch.device, default=gpu, help="cpu, cuda or mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    add("--shard", action="store_true", help="under torchrun: FSDP2 spreads the base")
    add("--accumulate", type=count, default=1, help="parts of a batch, to save memory")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--no-kernels", action="store_true", help="on CUDA, leave out scaling/kernels.py")
    return parser


def parse_arguments(argv=None):
    """The options, with the recipe's settings where none are given. Ends the run if they clash."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.recipe is not None:
        args = parser.parse_args(RECIPES[args.recipe].split() + argv)
    if (args.data is None) == (args.score_only is None):
        parser.error("either train with --data FILE, or score with --score-only ADAPTER")
    if args.score_only is not None and (args.resume or not args.eval):
        parser.error("--score-only trains nothing, and needs --eval FILE ...")
    if args.predictions is not None and not args.eval:
        parser.error("--predictions are the answers to --eval: add --eval FILE ...")
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        parser.error("--shard spreads the base over processes: start torchrun --nproc-per-node N")
    return args


def choose_alpha(args, family, curvature):
    """--alpha if it is given, else the recipe's for this adapter and family, else 16."""
    if args.alpha is not None or args.recipe is None:
        return args.alpha or 16.0
    if curvature == math.inf:
        return LORA_ALPHA
    known = ALPHAS[args.recipe]
    family = family.removesuffix("_text")
    if family not in known:
        sys.exit(f"--recipe has an alpha for {', '.join(known)}, not for {family}: give --alpha")
    return known[family]


# --- The model ----------------------------------------------------------------------------------


def adapter_targets(model, targets):
    """The full names of the layers to adapt: those of the text decoder, not of a vision tower."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    targets = "all-linear" if targets == ["all-linear"] else targets
    found = hyplora.find_linear_layers(decoder, targets)
    return [f"{prefix}.{name}".removeprefix(".") for name in found]


def share_of(model):
    """(trainable parameters, their percentage of the text decoder's and the output head's)."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    return trainable, 100 * trainable / sum(p.numel() for p in text)


def fingerprint(model):
    """A short text that changes if any tensor of the base does, whatever dtype it is read in."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].bfloat16().tolist()
        digest.update(json.dumps([name, list(parameter.shape), some]).encode())
    return digest.hexdigest()[:16]


def load_base(args):
    """The folder's model on the CPU, frozen. Ends the run if a tensor is missing."""
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=getattr(torch, args.dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{args.checkpoint} can't be loaded: {error}")
    if loaded["missing_keys"]:
        sys.exit(f"{args.checkpoint} lacks the tensors {sorted(loaded['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def load_shard(args, whole):
    """The main process's whole model, adapters included, spread over all processes."""
    told = [None]
    if is_main():
        layers = hyplora.hyplora_layers(whole)
        options = {name: layer.options for name, layer in layers.items()}
        head = whole.get_output_embeddings().weight
        told = [(options, head is whole.get_input_embeddings().weight)]
    dist.broadcast_object_list(told)
    options, is_tied = told[0]
    config = transformers.AutoConfig.from_pretrained(args.checkpoint)
    config.tie_word_embeddings = is_tied  # A config may say something else than the weights.
    config.get_text_config().tie_word_embeddings = is_tied
    with torch.device("meta"):
        dtype = getattr(torch, args.dtype)
        empty = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    empty.requires_grad_(False)
    if options:
        hyplora.wrap_layers(empty, options)
    return spread(whole, empty, args.device)


def load_model(args, adapt):
    """The base, where it will run, with what adapt(base) has done to it.

    Adapters come before sharding, so every adapter starts from the folder.
    """
    model = None
    if is_main() or not args.shard:
        model = load_base(args)
        try:
            adapt(model)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
    model = load_shard(args, model) if args.shard else model.to(args.device)
    # A folder's own settings (sampling, penalties, lengths) are no part of greedy or beam search.
    model.generation_config = transformers.GenerationConfig()
    if args.gradient_checkpointing:
        name = "activation_checkpointing_enable"
        if not hasattr(model, name):
            name = "gradient_checkpointing_enable"  # its name in the first releases of version 5
        getattr(model, name)({"use_reentrant": False})
    if args.device.type == "cuda" and not args.no_kernels:
        try:
            from scaling.kernels import use_kernels

            use_kernels(model)
        except ImportError as error:
            say(f"the adapters run without kernels: {error}")
    return model


# --- The run's folder ---------------------------------------------------------------------------


def write_text(text, path):
    """Write a text file whole, or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.part", path)


def append_text(text, path):
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_options(folder):
    path = os.path.join(folder, "options.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def open_run(args, prompts, base):
    """Write down what shapes this run; --resume checks that it is what shaped the run in --out."""
    if not is_main():
        return
    with open(args.data, "rb") as file:
        data = hashlib.sha256(file.read()).hexdigest()[:16]
    options = {name: getattr(args, name) for name in SHAPING} | prompts.settings()
    options.update(data=data, base=fingerprint(base))
    saved = read_options(args.out)
    if args.resume and saved is None:
        sys.exit(f"there is nothing to resume: {args.out} has no options.json. Leave out --resume")
    if saved is not None and not args.resume:
        sys.exit(f"{args.out} has a run: go on with it by --resume, or take another --out")
    for name, value in options.items():
        if saved is not None and saved.get(name) != value:
            was = f"{name} was {saved.get(name)!r:.60} and is {value!r:.60}"
            sys.exit(f"{args.out} can't be resumed: {was}. Restore it, or take another --out")
    write_or_exit(write_text, json.dumps(options, indent=1), os.path.join(args.out, "options.json"))


def open_adapter(args, saved, base):
    """Load the adapter of --score-only, after a look at the base that it was trained on."""
    if saved is not None and saved["base"] != fingerprint(base):
        sys.exit(f"{args.score_only} was trained on another base than {args.checkpoint}")
    hyplora.load_hyplora(base, args.score_only)


# --- Scoring ------------------------------------------------------------------------------------


def score(model, name, args, prompts, tests):
    """{column: percent right} on each file, and the averages. Appends to --predictions."""
    columns = {}
    results = {}
    folders = [os.path.dirname(os.path.abspath(path)) for path in tests]
    for path, records in tests.items():
        column = os.path.relpath(path, os.path.commonpath(folders)).removesuffix(".json")
        is_words = {answer_kind(record.answer) for record in records} == {"word"}
        options = argparse.Namespace(**vars(args))
        if args.recipe is not None and is_words:
            options.max_new_tokens = min(args.max_new_tokens, WORD_TOKENS)
        answers = generate_answers(model, records, prompts, options, f"{name}: {column}")
        rights = []
        lines = []
        for record, answer in zip(records, answers):
            rights.append(is_right(answer, record.answer, args.letters))
            line = {"adapter": name, "file": path, "record": record.position, "output": answer}
            line.update(instruction=record.instruction, answer=record.answer, right=rights[-1])
            line.update(extracted=extract(answer, record.answer, args.letters))
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if args.predictions is not None:
            write_or_exit(append_text, "".join(lines), args.predictions)
        columns[f"% {column}"] = 100 * mean(rights)
        results[path] = ("word" if is_words else "number", rights)
        say(f"  {name}: {sum(rights)} of {len(rights)} right on {column}")
        say(f"  for example: {answers[0][:200]!r}, where {records[0].answer} is right")
    return columns | averages(results)


def adapter_effect(model, **inputs):
    """What the HypLoRA adapters do to these tokens: rows of a table, one for each kind of layer.

    The radius is a token's length in units of sqrt K; the gain is |BAx| / |x|; phi is
    |update| / |BAx|, which is 1 for LoRA. The spread is phi's standard deviation over the tokens of
    a layer, over its mean: near 0, the adapter is a LoRA with another alpha.
    """
    kinds = {}
    for name, numbers in hyplora.hyplora_statistics(model, **inputs).items():
        numbers["spread %"] = 100 * numbers.pop("phi_spread") / numbers["phi"]
        kinds.setdefault(name.split(".")[-1], []).append(numbers)
    rows = []
    for kind, layers in kinds.items():
        means = {key: mean(layer[key] for layer in layers) for key in layers[0]}
        rows.append({"input of": kind, **means})
    return rows


DIGITS = {"trainable": 0, "share %": 2, "loss": 4, "radius": 2, "gain": 3, "phi": 3}


def table(rows):
    """Rows, {column: text or number} each, as Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "| --- |" + " ---: |" * (len(rows[0]) - 1)]
    for row in rows:
        cells = []
        for column, value in row.items():
            form = "" if isinstance(value, str) else f".{DIGITS.get(column, 1)}f"
            cells.append(format(value, form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- The program --------------------------------------------------------------------------------


def read_inputs(args):
    """(prompts, training records, validation records, {path: test records}), as the options say."""
    prompts = read_prompts(args)
    records = cut_records(read_records(args.data, prompts), args.cutoff, args.loss_on)
    tests = {path: read_records(path, prompts, for_scoring=True) for path in args.eval}
    if args.validation >= len(records):
        sys.exit(f"--validation {args.validation} leaves nothing to train on of {len(records)}")
    order = torch.randperm(len(records), generator=seeded(args.seed, "validation")).tolist()
    validation = [records[i] for i in order[: args.validation]]
    if validation:
        records = [records[i] for i in sorted(order[args.validation :])]
    for curvature in args.curvature:
        choose_alpha(args, prompts.family, curvature)  # This may end the run.
    args.steps = args.steps or args.epochs * math.ceil(len(records) / args.batch_size)
    say(f"training: {args.steps} steps of {args.batch_size} records for each adapter")
    if args.warmup_steps > args.steps:
        say(f"--warmup-steps {args.warmup_steps} is longer, so the rate never reaches --lr")
    return prompts, records, validation, tests


def train_adapter(args, prompts, curvature, records, validation):
    """Load the base, adapt, calibrate, train and save. Returns (its name, the model, seconds)."""
    name = "LoRA" if curvature == math.inf else f"HypLoRA {curvature:g}"
    stem = name.replace(" ", "-").lower()
    options = dict(rank=args.rank, dropout=args.dropout, curvature=curvature)
    options["alpha"] = choose_alpha(args, prompts.family, curvature)

    def adapt(base):
        torch.manual_seed(args.seed)
        hyplora.inject_hyplora(base, adapter_targets(base, args.targets), **options)

    model = load_model(args, adapt)
    ids, mask, _ = make_batch(records_of_step(records, 0, args), args.loss_on, args.device)
    inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    if can_leave_out_logits(model):
        inputs["logits_to_keep"] = 1  # Nobody reads them where lengths are measured.
    if curvature < math.inf:
        hyplora.calibrate_curvature(model, **inputs)
    state_path = os.path.join(args.out, f"state-{stem}.pt")
    seconds = train(model, args, name, records, validation, state_path)
    path = os.path.join(args.out, f"{stem}.pt")
    save = functools.partial(hyplora.save_hyplora, tensors=whole_adapters(model))
    write_or_exit(save, model, path)
    say(f"{name} is saved: {path}")
    if curvature < math.inf:
        effect = adapter_effect(model, **inputs)
        say(f"What it does to the tokens of the first batch:\n\n{table(effect)}\n")
    return name, model, seconds


def train_and_score(args):
    """Score the base, then train, save and score each adapter. Returns the rows of the table."""
    prompts, records, validation, tests = read_inputs(args)
    write_or_exit(lambda _, folder: os.makedirs(folder, exist_ok=True), None, args.out)
    rows = []

    def add_row(name, model, seconds):
        trainable, share = share_of(model)
        loss = mean_loss(model, validation or records[:64], args)
        row = {"adapter": name, "trainable": trainable, "share %": share, "loss": loss}
        rows.append(row | score(model, name, args, prompts, tests) | {"seconds": seconds})

    add_row("base", load_model(args, functools.partial(open_run, args, prompts)), 0.0)
    for curvature in dict.fromkeys(args.curvature):
        add_row(*train_adapter(args, prompts, curvature, records, validation))
    return rows


def score_saved(args):
    """The table's one row for --score-only. The adapter's run tells the template."""
    saved = read_options(os.path.dirname(args.score_only))
    if saved is None and args.template is None:
        sys.exit(f"no options.json lies beside {args.score_only}: give the --template it had")
    prompts = read_prompts(args, saved)
    tests = {path: read_records(path, prompts, for_scoring=True) for path in args.eval}
    model = load_model(args, functools.partial(open_adapter, args, saved))
    trainable, share = share_of(model)
    row = {"adapter": args.score_only, "trainable": trainable, "share %": share}
    return [row | score(model, "adapter", args, prompts, tests)]


def main(argv=None):
    """Run it all; returns the rows of the table as dictionaries."""
    args = parse_arguments(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # Answers may have any character.
    start_processes(args.device)
    if not is_main():
        transformers.logging.disable_progress_bar()
    if args.predictions is not None:  # What can't be written is found out now, not afterwards.
        write_or_exit(write_text, "", args.predictions)
    rows = score_saved(args) if args.data is None else train_and_score(args)
    say("\n" + table(rows))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
