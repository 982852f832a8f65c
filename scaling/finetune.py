"""Fine-tune a model on real data with LoRA and HypLoRA, and score both by the paper's rules.

    python -m scaling.finetune --checkpoint DIR --data train.json --eval test.json --recipe paper

README.md has more commands, the data format, the recipes and what they leave out.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist

import hyplora
from scaling import training
from scaling.data import read_prompts, read_records, transformers
from scaling.scoring import averages, extract, generate_answers, is_right
from scaling.training import RANK, say

# The settings of the authors' scripts, as options; README.md lists them item by item.
PAPER = (
    "--rank 32 --curvature inf 1 --dropout 0.05 --targets q_proj k_proj v_proj up_proj down_proj "
    "--lr 3e-4 --warmup-steps 100 --batch-size 16 --epochs 3 --seed 42 --loss-on all --cutoff 256 "
    "--beams 4 --max-new-tokens 512 "
)
RECIPES = {"paper": PAPER, "paper-commonsense": PAPER + "--max-new-tokens 32"}
ALPHAS = {"llama": 128.0, "qwen2": 128.0, "gemma": 128.0, "gemma3": 32.0, "gemma3_text": 32.0}
# What shapes an adapter: a run that is resumed has to have the same.
SHAPING = "alpha batch_size cutoff dropout dtype loss_on lr rank seed steps targets warmup_steps"


def parse_arguments(argv=None):
    """The options, with the recipe's settings where none are given. Ends the run if they clash."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a model's folder, as from a hub")
    add("--data", metavar="FILE", help="train on this JSON list, or JSON lines")
    add("--eval", nargs="+", action="extend", default=[], metavar="FILE", help="sets to score")
    add("--recipe", choices=list(RECIPES), help="the settings of the authors' scripts")
    add("--template", choices=["alpaca", "chat", "chat-alpaca"], help="the prompt")
    add("--out", default="runs", help="the run's folder: options, states and adapters")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--curvature", type=float, nargs="+", default=[math.inf, 0.5], help="inf is LoRA")
    add("--rank", type=int, default=8, help="rank of BA")
    add("--alpha", type=float, help="scales by alpha / rank; None is 16, or the recipe's")
    add("--dropout", type=float, default=0.0, help="on the adapter's input")
    add("--targets", nargs="+", default=["all-linear"], help="name endings of the adapted layers")
    add("--lr", type=float, default=3e-4, help="peak learning rate")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up")
    add("--steps", type=int, help="optimizer steps; None is --epochs of --data")
    add("--epochs", type=int, default=3, help="passes over --data")
    add("--batch-size", type=int, default=16, help="records a step, over all processes")
    add("--seed", type=int, default=0, help="of the adapter's start and of the batches")
    add("--loss-on", choices=["answer", "all"], default="answer", help="tokens that are learned")
    add("--cutoff", type=int, default=1024, help="tokens of a record that are read")
    add("--score-only", metavar="ADAPTER", help="score this saved adapter, train nothing")
    add("--predictions", metavar="FILE", help="write every answer there, as JSON lines")
    add("--max-new-tokens", type=int, default=256, help="longest answer")
    add("--beams", type=int, default=1, help="beam search; 1 is greedy")
    add("--letters", choices=["first", "released"], default="first", help="rule for answers A to E")
    add("--device", type=torch.device, default=gpu, help="cpu, cuda or mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    add("--shard", action="store_true", help="under torchrun: FSDP2 spreads the base")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    args = parser.parse_args(argv)
    if args.recipe is not None:
        args = parser.parse_args(RECIPES[args.recipe].split() + (argv or sys.argv[1:]))
    if (args.data is None) == (args.score_only is None):
        parser.error("either train with --data FILE, or score with --score-only ADAPTER")
    if not args.eval and (args.score_only is not None or args.predictions is not None):
        parser.error("--score-only and --predictions need --eval FILE ...")
    read = {os.path.realpath(path) for path in {args.data, *args.eval} - {None}}
    if args.predictions is not None and os.path.realpath(args.predictions) in read:
        parser.error(f"--predictions would overwrite {args.predictions}: name another file")
    counts = {args.steps, args.epochs, args.batch_size, args.beams, args.max_new_tokens} - {None}
    if min(counts) < 1 or args.cutoff < 2 or args.warmup_steps < 0 or not 0 < args.lr < math.inf:
        parser.error("--warmup-steps must be >= 0, --cutoff >= 2, other counts >= 1, and --lr > 0")
    if args.shard and training.PROCESSES == 1:
        parser.error("--shard spreads the base over processes: start torchrun --nproc-per-node N")
    return args


def choose_alpha(args, family, curvature):
    """--alpha if it is given, else the recipe's for this adapter and family, else 16."""
    if args.alpha is not None or args.recipe is None:
        return 16.0 if args.alpha is None else args.alpha
    if curvature == math.inf:
        return 64.0
    if family not in ALPHAS:
        sys.exit(f"--recipe has no alpha for {family}: give --alpha")
    is_exception = family == "qwen2" and args.recipe == "paper-commonsense"
    return 256.0 if is_exception else ALPHAS[family]


def load_base(args):
    """The folder's model on the CPU, frozen; None where --shard lets the first process send it."""
    if args.shard and RANK > 0:
        return None
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=getattr(torch, args.dtype), output_loading_info=True
    )
    if loaded["missing_keys"]:
        sys.exit(f"{args.checkpoint} lacks the tensors {sorted(loaded['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def place(model, args):
    """What load_base gave, with adapters or without, where it will run."""
    model = training.spread(model, args.device) if args.shard else model.to(args.device)
    # A folder's own settings (sampling, penalties, lengths) are no part of greedy or beam search.
    model.generation_config = transformers.GenerationConfig()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.device.type == "cuda":
        try:
            from scaling.kernels import use_kernels

            use_kernels(model)
        except Exception as error:  # Triton or a compiler is missing.
            say(f"the adapters run without kernels: {error!s:.200}")
    return model


def adapter_targets(model, targets):
    """The full names of the layers to adapt: those of the text decoder, not of a vision tower."""
    inside = set(model.get_decoder().modules())
    targets = "all-linear" if targets == ["all-linear"] else targets
    names = hyplora.find_linear_layers(model, targets)
    names = [name for name in names if model.get_submodule(name) in inside]
    return names or sys.exit(f"--targets {targets} names no linear layer of the text decoder")


def share_of(model):
    """What trains, and its percentage of the text decoder and the output head, as in the paper."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    return {"trainable": trainable, "share %": 100 * trainable / sum(p.numel() for p in text)}


def fingerprint(model):
    """A text of some 64 numbers, in many columns, of each tensor of the base, in any dtype."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().flatten()[:: p.numel() // 64 | 1].bfloat16().tolist()
        digest.update(json.dumps([name, list(p.shape), some]).encode())
    return digest.hexdigest()[:16]


def open_run(args, prompts, base):
    """Write down what shapes this run; --resume checks that it is what shaped the run in --out."""
    data = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:16]
    options = {name: getattr(args, name) for name in SHAPING.split()}
    options.update(template=prompts.template, chat_template=prompts.tokenizer.chat_template)
    options.update(stop=prompts.stop, recipe=args.recipe, bound=hyplora.MAX_RADIUS)
    options.update(data=data, base=fingerprint(base))
    path = Path(args.out, "options.json")
    if (path.exists() or any(path.parent.glob("state-*.pt"))) != args.resume:
        sys.exit(f"--resume goes on with the run of {path}; a new run takes another --out")
    if not args.resume:
        path.write_text(json.dumps(options, indent=1))
    saved = json.loads(path.read_text())
    changed = [name for name in options if saved.get(name) != options[name]]
    if changed:
        sys.exit(f"{args.out} can't be resumed, as {changed} changed: look at its options.json")


def score(model, name, args, prompts, tests):
    """{column: percent right} on each file, and the averages. Writes --predictions."""
    columns = {}
    results = []
    for path, records in tests.items():
        outputs = generate_answers(model, records, prompts, args, f"{name}: {path}")
        lines = []
        for record, output in zip(records, outputs):
            line = dict(adapter=name, file=path, record=record.position, answer=record.answer)
            line.update(output=output, extracted=extract(output, record.answer, args.letters))
            lines.append(line | {"right": is_right(output, record.answer, args.letters)})
        if args.predictions is not None and RANK == 0:
            is_first = name in ("base", "saved") and not results
            with open(args.predictions, "w" if is_first else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        rights = [line["right"] for line in lines]
        columns[f"% {path.removesuffix('.json')}"] = 100 * mean(rights)
        results.append(([record.answer for record in records], rights))
        say(f"  {name}: {sum(rights)} of {len(rights)} right on {path}, e.g. {outputs[0][:200]!r}")
    return columns | averages(results)


def table(rows):
    """Rows, {column: text or number} each, as Markdown."""
    lines = [list(rows[0]), ["---"] + ["---:"] * (len(rows[0]) - 1)]
    for row in rows:
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def train_adapter(model, name, args, records):
    """Calibrate and train the adapters, save them, and say what they do."""
    ids, mask, _ = training.make_batch(training.records_of_step(records, 0, args), args)
    none = ids[:0, 0]  # No logits. For a number of them, Gemma 4 cuts what its last layers see.
    inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=none)
    if name != "LoRA":
        hyplora.calibrate_curvature(model, **inputs)
    training.train(model, args, name, records)
    tensors = training.whole_adapters(model)
    path = os.path.join(args.out, f"{name}.pt")
    if RANK == 0:
        hyplora.save_hyplora(model, path, tensors)
    say(f"{name} is saved: {path}. To the tokens of the first batch it does, in the mean:")
    kinds = {}
    for layer, numbers in hyplora.hyplora_statistics(model, **inputs).items():
        kinds.setdefault(layer.rpartition(".")[2], []).append(numbers)
    for kind, layers in kinds.items():
        means = [f"{key} {mean(numbers[key] for numbers in layers):.3g}" for key in layers[0]]
        say(f"  {kind}: {', '.join(means)}")


def train_and_score(args):
    """Score the base, then train and score each adapter. Returns the rows of the table."""
    prompts = read_prompts(args)
    records = read_records(args.data, prompts, args)
    tests = {path: read_records(path, prompts) for path in args.eval}
    adapters = {"base": None}
    family = transformers.AutoConfig.from_pretrained(args.checkpoint).model_type
    for curvature in args.curvature:
        options = dict(rank=args.rank, dropout=args.dropout, curvature=curvature)
        options["alpha"] = choose_alpha(args, family, curvature)
        hyplora.HypLoRALinear(torch.nn.Linear(1, 1), **options)  # It says what is out of range.
        adapters["LoRA" if curvature == math.inf else f"HypLoRA-{curvature:g}"] = options
    args.steps = args.steps or args.epochs * math.ceil(len(records) / args.batch_size)
    say(f"training: {args.steps} steps of {args.batch_size} records for each adapter")
    if args.warmup_steps > args.steps:
        say(f"--warmup-steps {args.warmup_steps} is longer, so the rate never reaches --lr")
    os.makedirs(args.out, exist_ok=True)
    rows = []
    for name, options in adapters.items():
        model = load_base(args)
        if options is None and RANK == 0:
            adapter_targets(model, args.targets)  # A wrong name is found before anything is scored.
            open_run(args, prompts, model)
        elif options is not None and model is not None:
            torch.manual_seed(args.seed)
            hyplora.inject_hyplora(model, adapter_targets(model, args.targets), **options)
        model = place(model, args)
        if options is not None:
            train_adapter(model, name, args, records)
        row = {"adapter": name} | share_of(model)
        row["loss"] = training.mean_loss(model, records[:64], args)
        rows.append(row | score(model, name, args, prompts, tests))
    return rows


def score_saved(args):
    """The table's one row for --score-only. options.json beside the adapter tells the template."""
    saved = json.loads(Path(args.score_only).with_name("options.json").read_text())
    prompts = read_prompts(args, saved)
    tests = {path: read_records(path, prompts) for path in args.eval}
    model = load_base(args)
    if model is not None:
        if saved["base"] != fingerprint(model):
            sys.exit(f"{args.score_only} was trained on another base than {args.checkpoint}")
        hyplora.load_hyplora(model, args.score_only)
    model = place(model, args)
    return [{"adapter": "saved"} | share_of(model) | score(model, "saved", args, prompts, tests)]


def main(argv=None):
    """Run it all; returns the rows of the table as dictionaries."""
    args = parse_arguments(argv)
    training.start_processes(args.device)
    try:
        if args.predictions is not None:  # What can't be written is found out now, not afterwards.
            open(args.predictions, "a").close()
        rows = score_saved(args) if args.data is None else train_and_score(args)
    except (OSError, ValueError) as error:
        sys.exit(f"\n{error}. What was saved before is whole")
    say("\n" + table(rows))
    if dist.is_initialized():
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
