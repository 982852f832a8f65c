"""LoRA, DoRA, HypLoRA and the authors' two layers on a language model, each at its own best rate.

Training: GSM8K and MAWPS, without the questions of the test files. Each method has a learning rate
of its own, chosen by validation loss on seeds that are not reported; then seeds are compared in
pairs: one seed is one start of A and one order of batches, whatever the method. HypLoRA runs along
a dial: rho is the radius that calibration gives to a typical token. Its control at each rho is LoRA
with alpha times the mean phi = |update| / |BAx| of that HypLoRA. Runs train side by side as a stack
on one frozen model; tests/test_smollm2.py checks the stack against runs of their own.

    python -m benchmarks.smollm2 --model FOLDER --data FOLDER --results smollm2.json --seconds 540
    python -m benchmarks.smollm2 --results smollm2.json --tables     # RESULTS.md and the picture
    python -m benchmarks.smollm2 --small --results small.json        # a toy, on any CPU

Results are kept after each stack, so that a later call goes on: benchmarks/smollm2.json has those
of RESULTS.md. Needs transformers; PEFT for the check that its LoRA and DoRA are these.
"""

import argparse
import copy
import json
import random
import re
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks import smollm2_tables as tables
from benchmarks.report import machine, stamp, write_beside, write_section
from benchmarks.smollm2_plan import METHODS, SWEEP_SEEDS, Run, is_late, layer_of, plan
from benchmarks.smollm2_stack import Adam, Stacked, fuse_norms, put_in_place, take_out
from benchmarks.smollm2_tables import STATISTICS, TESTS

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
WARMUP = 10
SMALL = dict(steps=4, batch=2, rank=2, longest=64, test=6, seeds=2)  # for --small


# --- data: records of prompt ids, target ids and answer -------------------------------------------


def records_of(raw, tokenizer, longest):
    """Records that the model can be trained or scored on; those that are too long are left out."""
    questions = []
    answers = []
    for record in raw:
        questions.append(f"Question: {record['instruction'].strip()}\nAnswer:")
        answer = record["output"].strip().removeprefix("A:").strip()
        answers.append(f" {answer or 'The answer is {:g}'.format(float(record['answer']))}")
    prompts = tokenizer(questions, add_special_tokens=False)["input_ids"]
    targets = tokenizer(answers, add_special_tokens=False)["input_ids"]
    result = []
    for record, prompt, target in zip(raw, prompts, targets):
        target = [*target, tokenizer.eos_token_id]
        good = not record["output"] or is_right(record["output"], record["answer"])
        made = dict(prompt=prompt, target=target, answer=record["answer"], good=good)
        if length(made) <= longest:
            result.append(made)
    return result


def without_questions_of(train, tests):
    """The records of train whose question, but for white space, is in none of the tests."""
    seen = {" ".join(r["instruction"].split()) for test in tests for r in test}
    return [r for r in train if " ".join(r["instruction"].split()) not in seen]


def split(raw_train, raw_tests, tokenizer, args):
    """{"train", "validation", "held out", "GSM8K", "SVAMP", "MAWPS": records}, and what to say."""
    clean = without_questions_of(raw_train, raw_tests.values())
    train = records_of(clean, tokenizer, args.longest)
    note = (
        f"{len(raw_train) - len(clean)} of {len(raw_train)} training questions are in a test file "
        f"and were taken out; {len(clean) - len(train)} records of more than {args.longest} tokens "
        f"were left out. {len(train) - 2 * args.test} records to train on."
    )
    random.Random(0).shuffle(train)
    data = {"validation": train[: args.test], "held out": train[args.test : 2 * args.test]}
    data["train"] = train[2 * args.test :]
    for name, raw in raw_tests.items():
        questions = records_of(raw, tokenizer, args.longest)
        random.Random(0).shuffle(questions)
        data[f"{name} questions"] = questions
        data[name] = [record for record in questions if record["good"]][: args.test]
    note += " Scored: " + ", ".join(f"{len(data[k])} {k}" for k in ("validation", *TESTS))
    note += " (without the worked answers in the test files that end in a wrong number)."
    return data, note


def dtype_for(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def real(args):
    """(model, tokenizer, training records, {name: test records}) from the folders on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def read(name):
        return json.loads((args.data / f"{name}.json").read_text())

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype_for(args.device))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tests = {name: read(name.lower()) for name in TESTS[1:]}
    return model.to(args.device), tokenizer, read("gsm8k_train") + read("mawps_train"), tests


class Bytes:
    """A tokenizer for --small: the bytes of the text."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if 0 < i < 128).decode()


def small(args):
    """The same for a tiny random Llama and sums."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def sums(generator, count):
        pairs = [(generator.randrange(30), generator.randrange(30)) for _ in range(count)]
        made = [(f"{a} + {b}?", f"The answer is {a + b}", f"{a + b}.0") for a, b in pairs]
        return [dict(instruction=q, output=o, answer=a) for q, o, a in made]

    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    ends = dict(eos_token_id=0, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends))
    generator = random.Random(0)
    tests = {name: sums(generator, 6) for name in TESTS[1:]}
    model.to(args.device, dtype_for(args.device))
    return model, Bytes(), sums(generator, 300) + tests["MAWPS"][:1], tests


def pad(records, width, end):
    """(ids, positions that predict a token of a target, those tokens), positions counted flat."""
    ids = torch.full((len(records), width), end)
    positions = []
    targets = []
    for row, record in enumerate(records):
        whole = record["prompt"] + record["target"]
        ids[row, : len(whole)] = torch.tensor(whole)
        first = row * width + len(record["prompt"]) - 1
        positions += range(first, first + len(record["target"]))
        targets += record["target"]
    return ids, torch.tensor(positions), torch.tensor(targets)


def length(record):
    return len(record["prompt"]) + len(record["target"])


def batches(records, seed, steps, size, buckets=8):
    """One list of records a step. Step s draws from the same range of lengths for every seed."""
    ordered = sorted(records, key=length)
    count = len(ordered) // buckets
    parts = [ordered[i * count : (i + 1) * count] for i in range(buckets)]
    for part in parts:
        random.Random(seed).shuffle(part)
    turns = []
    for turn in range(1 + steps // buckets):
        turns += random.Random(turn).sample(range(buckets), buckets)
    used = [0] * buckets
    for bucket in turns[:steps]:
        first = used[bucket]
        used[bucket] += size
        yield [parts[bucket][(first + i) % count] for i in range(size)]


# --- training a stack -----------------------------------------------------------------------------


class Lab:
    """A frozen model with the data and the calibrated lengths: all that a run needs."""

    def __init__(self, model, tokenizer, data, args):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.data = data
        self.args = args
        self.end = tokenizer.eos_token_id
        # 16 (or fewer) training texts, cut to one length: no padding, and the same for all runs.
        width = statistics.median_high(length(r) for r in data["train"])
        texts = [r["prompt"] + r["target"] for r in data["train"] if length(r) >= width][:16]
        ids = torch.tensor([text[:width] for text in texts], device=args.device)
        self.squares = calibrated_squares(model, ids)

    def losses(self, ids, parts, train=False):
        """The sum of the answers' losses of each run. ids: (runs, rows, width)."""
        runs = len(ids)
        hidden = self.model.model(ids.flatten(0, 1), use_cache=False).last_hidden_state
        hidden = hidden.view(runs, -1, hidden.shape[-1])
        results = []
        for states, (positions, targets) in zip(hidden, parts):
            if train:  # The logits are large, so that they are computed anew in the backward pass.
                options = dict(use_reentrant=False, preserve_rng_state=False)
                loss = checkpoint(self.answer_loss, states, positions, targets, **options)
            else:
                loss = self.answer_loss(states, positions, targets)
            results.append(loss)
        return torch.stack(results)

    def answer_loss(self, states, positions, targets):
        logits = self.model.lm_head(states[positions]).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def prepare(self, seeds):
        """The batches of all steps on the device: [{seed: (ids, positions, targets)}, ...]."""
        size = (self.args.steps, self.args.batch)
        result = []
        for chosen in zip(*(batches(self.data["train"], seed, *size) for seed in seeds)):
            width = max(length(r) for records in chosen for r in records)
            made = {}
            for seed, records in zip(seeds, chosen):
                made[seed] = [t.to(self.args.device) for t in pad(records, width, self.end)]
            result.append(made)
        return result

    def start(self, runs):
        """{name: Stacked}, put in place of the model's linear layers."""
        return put_in_place(self.model, self.squares, runs, METHODS, self.args.rank)

    def train(self, runs):
        """Train the runs side by side. Returns a dictionary of what was measured for each run."""
        stacks = self.start(runs)
        try:
            steps = self.prepare(sorted({run.seed for run in runs}))
            optimizers = [Adam(*group) for group in Stacked.parameter_groups(stacks)]
            begun = time.perf_counter()
            history = []
            for step, batch in enumerate(steps):
                ids = torch.stack([batch[run.seed][0] for run in runs])
                parts = [batch[run.seed][1:] for run in runs]
                counts = torch.tensor([len(part[1]) for part in parts], device=ids.device)
                losses = self.losses(ids, parts, train=True) / counts
                losses.sum().backward()
                for optimizer in optimizers:
                    optimizer.step(pace(step, len(steps)))
                history.append(losses.detach())
            history = torch.stack(history, 1).tolist()
            tokens = sum(len(runs) * batch[runs[0].seed][0].numel() for batch in steps)
            seconds = time.perf_counter() - begun
            print(f"  {tokens / seconds:,.0f} tokens/s in training", flush=True)
            results = [dict(asdict(run), history=h) for run, h in zip(runs, history)]
            self.measure(runs, stacks, results)
            return results
        finally:
            take_out(self.model, stacks)

    @torch.no_grad()
    def measure(self, runs, stacks, results):
        """Add losses, statistics of the adapters, and on request accuracies to the results."""
        report = any(run.seed not in SWEEP_SEEDS for run in runs)
        for name in ("validation", *(TESTS if report else ())):
            for result, loss in zip(results, self.score(self.data[name], len(runs))):
                result[name] = loss
        for result, adapters in zip(results, self.statistics(stacks, len(runs))):
            trained = METHODS[result["method"]].layers
            result["adapters"] = {layer: adapters[layer] for layer in trained}
            phis = [phi for layer in result["adapters"].values() for phi in layer["phi"]]
            result["phi"] = statistics.mean(phis)
        for name, count in self.args.accuracy.items() if report else ():
            rights = self.accuracy(self.data[f"{name} questions"][:count], len(runs))
            for result, right in zip(results, rights):
                result[f"{name} right"] = right

    def score(self, records, runs):
        """The loss per token of the answers, for each run."""
        ordered = sorted(records, key=length)
        total = 0
        while ordered:  # from the longest down, so that a chunk has about as many tokens as it may
            size = max(1, self.args.tokens // (runs * length(ordered[-1])))
            part = ordered[-size:]
            del ordered[-size:]
            made = [t.to(self.args.device) for t in pad(part, length(part[-1]), self.end)]
            ids = made[0].expand(runs, *made[0].shape)
            total = total + self.losses(ids, [made[1:]] * runs)
        return (total / sum(len(r["target"]) for r in records)).tolist()

    def statistics(self, stacks, runs):
        """For each run {"q": {"radius": [one a layer], ...}, ...} on validation texts."""
        texts = self.data["validation"][:16]
        width = max(length(r) for r in texts)
        ids = pad(texts, width, self.end)[0].to(self.args.device)
        real = torch.tensor([[i < length(r) for i in range(width)] for r in texts])
        for stack in stacks.values():
            stack.mask = real.flatten().to(ids.device)
        self.model.model(ids.expand(runs, *ids.shape).flatten(0, 1), use_cache=False)
        results = [{} for _ in range(runs)]
        for name, stack in stacks.items():
            stack.mask = None
            measured = {key: values.tolist() for key, values in stack.seen.items()}
            for run, result in enumerate(results):
                entry = result.setdefault(layer_of(name), {key: [] for key in STATISTICS})
                for key in STATISTICS:
                    entry[key].append(float(f"{measured[key][run]:.4g}"))
        return results

    def accuracy(self, records, runs):
        """The share of right answers in per cent, for each run, by greedy generation."""
        rights = torch.zeros(runs)
        ordered = sorted(records, key=lambda r: len(r["prompt"]))
        size = max(1, self.args.sequences // runs)
        for first in range(0, len(ordered), size):
            part = ordered[first : first + size]
            width = len(part[-1]["prompt"])
            pads = [width - len(r["prompt"]) for r in part]  # on the left
            ids = [[self.end] * n + r["prompt"] for n, r in zip(pads, part)]
            shown = [[0] * n + [1] * (width - n) for n in pads]
            many = [torch.tensor(t, device=self.args.device).repeat(runs, 1) for t in (ids, shown)]
            options = dict(max_new_tokens=self.args.new_tokens, do_sample=False)
            written = self.model.generate(
                many[0], attention_mask=many[1], pad_token_id=self.end, **options
            )
            written = written[:, width:].view(runs, len(part), -1).tolist()
            for run in range(runs):
                for record, new in zip(part, written[run]):
                    text = self.tokenizer.decode(new, skip_special_tokens=True)
                    rights[run] += is_right(text, record["answer"])
        return (100 * rights / len(records)).tolist()


def calibrated_squares(model, ids):
    """{name: mean |x|^2 at the input of the layer}, by hyplora.py's own calibration."""
    from hyplora import calibrate_curvature, inject_hyplora, remove_hyplora

    inject_hyplora(model, TARGETS, rank=1, curvature=1.0)
    squares = calibrate_curvature(model, ids)
    remove_hyplora(model)
    return squares


def is_right(text, answer):
    """Whether the last number of the text is the answer, to 0.001."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return bool(numbers) and abs(float(numbers[-1]) - float(answer)) <= 1e-3


def pace(step, steps):
    """The share of the rate: up in a few steps, then down to 0 in a line."""
    return min((step + 1) / min(WARMUP, steps), (steps - step) / steps)


# --- peers: the stack against PEFT's own layers ---------------------------------------------------


def train_alone(model, parameters, lab, run, steps):
    """The losses of one run of its own, on a model that has its adapters already."""
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0)
    history = []
    alone = copy.copy(lab)
    alone.model = model
    for step, batch in enumerate(lab.prepare([run.seed])[:steps]):
        ids, positions, targets = batch[run.seed]
        loss = alone.losses(ids[None], [(positions, targets)])[0] / len(targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * pace(step, lab.args.steps)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def peft_check(lab, steps=8):
    """{method: the largest relative difference of a step's loss from PEFT's}, in float32."""
    from peft import LoraConfig, get_peft_model

    exact = copy.copy(lab)
    exact.args = copy.copy(lab.args)
    exact.args.steps = steps
    exact.model = copy.deepcopy(lab.model).float()
    differences = {}
    for method in ("LoRA", "DoRA"):
        run = Run(method, 1e-3, SWEEP_SEEDS[0], 64)
        ours = exact.train([run])[0]["history"]
        stacks = exact.start([run])
        starts = {name: stack.parts[0].lora_A[0].detach() for name, stack in stacks.items()}
        take_out(exact.model, stacks)
        config = LoraConfig(
            r=lab.args.rank, lora_alpha=64, target_modules=TARGETS, use_dora=method == "DoRA"
        )
        peft = get_peft_model(exact.model, config)
        for name, module in peft.get_base_model().named_modules():
            if name in starts:
                module.lora_A["default"].weight.data.copy_(starts[name])
        trained = [p for p in peft.parameters() if p.requires_grad]
        theirs = train_alone(peft.get_base_model(), trained, exact, run, steps)
        peft.unload()
        differences[method] = max(abs(a - b) / b for a, b in zip(ours, theirs))
        print(f"{method}: {ours[-1]:.6f} here, {theirs[-1]:.6f} with PEFT", flush=True)
    return differences


# --- the protocol ---------------------------------------------------------------------------------


def work(lab, results, args, begun):
    """Make the planned runs, stack by stack, until they are done or the time is up."""
    done = results["runs"]
    size = args.stack
    longest = 0
    while plan(done, args.seeds, args.methods):
        left = args.seconds - (time.perf_counter() - begun)
        if left < 1.15 * longest + 5:
            print(f"Stopped with {left:.0f} s left; the next call goes on.", flush=True)
            return
        ready = plan(done, args.seeds, args.methods)
        runs = [run for run in ready if is_late(run) == is_late(ready[0])][:size]
        runs.sort(key=lambda run: METHODS[run.method].kind)
        start = time.perf_counter()
        try:
            made = lab.train(runs)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            made = []
            size = (size + 1) // 2
            print(f"Out of memory: on with stacks of {size}.", flush=True)
        if args.device == "cuda":
            print(f"  {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most", flush=True)
            torch.cuda.empty_cache()
        done.update({run.key(): result for run, result in zip(runs, made)})
        write_beside(args.results, json.dumps(results))
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        names = sorted({run.method for run in runs})
        waiting = len(plan(done, args.seeds, args.methods))
        print(f"{len(made)} runs in {seconds:.0f} s, {waiting} ready: {names}", flush=True)


def parse_accuracy(text):
    name, _, count = text.partition("=")
    return name, int(count)


def main(arguments=None):
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="the folder of a Llama checkpoint")
    add("--data", type=Path, help="the folder with gsm8k_train.json, mawps.json, ...")
    add("--results", type=Path, required=True, help="where results are kept, and read from")
    add("--seconds", type=float, default=540, help="stop before so much time has passed")
    add("--seeds", type=int, default=5, help="the seeds that are reported")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="these alone")
    add("--steps", type=int, default=100)
    add("--batch", type=int, default=16)
    add("--rank", type=int, default=32)
    add("--longest", type=int, default=256, help="records of more tokens are left out")
    add("--test", type=int, default=400, help="records of each set that are scored")
    add("--stack", type=int, default=16, help="runs side by side")
    add("--tokens", type=int, default=131072, help="tokens that are scored at once")
    add("--accuracy", type=parse_accuracy, nargs="*", default=[], help="MAWPS=238 SVAMP=200 ...")
    add("--sequences", type=int, default=2048, help="texts that are generated at once")
    add("--new-tokens", type=int, default=64)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--small", action="store_true", help="a tiny random model and sums")
    add("--no-peft", action="store_true", help="leave out the check against PEFT")
    add("--tables", action="store_true", help="write the tables of what is kept, and no more")
    add("--dry-run", action="store_true", help="print the tables and leave RESULTS.md as it is")
    args = parser.parse_args(arguments)
    if args.small:
        parser.set_defaults(**SMALL)
        args = parser.parse_args(arguments)
    args.accuracy = dict(args.accuracy)
    results = {"about": {}, "runs": {}}
    if args.results.exists():
        results = json.loads(args.results.read_text())
    if not args.tables:
        model, tokenizer, train, tests = small(args) if args.small else real(args)
        fuse_norms(model)
        data, note = split(train, tests, tokenizer, args)
        print(note, flush=True)
        lab = Lab(model, tokenizer, data, args)
        settings = dict(steps=args.steps, batch=args.batch, rank=args.rank, longest=args.longest)
        about = results["about"]
        if about.get("settings", settings) != settings:
            raise SystemExit(f"{args.results} was made with {about['settings']}, not {settings}")
        about.update(settings=settings, note=note, machine=machine(args.device))
        about["base"] = {name: lab.score(data[name], 1)[0] for name in ("validation", *TESTS)}
        if "peft" not in about and not args.no_peft:
            try:
                about["peft"] = peft_check(lab)
            except ImportError as error:
                print(f"No check against PEFT: {error}", flush=True)
        about["stamp"] = stamp("python -m benchmarks.smollm2")
        if args.accuracy:
            about["accuracy"] = dict(questions=args.accuracy, new_tokens=args.new_tokens)
        work(lab, results, args, begun)
        write_beside(args.results, json.dumps(results))
    page = tables.page(results)
    print(f"\n{page}")
    if not args.dry_run:
        name = "a toy" if args.small else "SmolLM2-135M-Instruct"
        write_section(f"A language model: {name}", page)
        tables.picture(results, tables.PICTURE)


if __name__ == "__main__":
    main()
