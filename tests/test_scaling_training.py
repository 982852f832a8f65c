"""Training in scaling/: families, resuming, several processes, and what a run's folder keeps.

pip install transformers
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="pip install transformers")

import transformers
from conftest import FAMILIES, write_folder, write_sums

from hyplora import hyplora_state_dict, inject_hyplora, load_hyplora
from scaling import finetune, training
from scaling.data import Record

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
torch.set_num_threads(1)


def options(model, work, out, *more):
    data = work / "sums.json"
    if not data.exists():
        write_sums(data)
    return [
        *("--checkpoint", model, "--data", str(data), "--out", str(work / out), "--device", "cpu"),
        *("--batch-size", "6", "--curvature", "0.5", "--lr", "3e-3", "--warmup-steps", "1", *more),
    ]


def run(*arguments, **environment):
    """A Python process with these arguments that has ended."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=ENV | environment,
        cwd=ROOT,
    )


def tensors(folder, stem="hyplora-0.5"):
    return torch.load(folder / f"{stem}.pt", weights_only=True)["tensors"]


def assert_near(some, others, tolerance=1e-4):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert (others[name] - tensor).norm() <= tolerance * tensor.norm(), name


# --- One process --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_its_loss_is_that_of_the_model_itself(family, tmp_path):
    """The loss is compared with transformers' own labels=, one record at a time, no padding."""
    folder = write_folder(tmp_path / "model", family)
    argv = options(folder, tmp_path, "out", "--steps", "6", "--loss-on", "all")
    base, trained = finetune.main(argv)
    assert trained["loss"] < base["loss"] - 0.01
    text = json.loads((tmp_path / "sums.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total = 0.0
    count = 0
    alpaca = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}</s>"
    )
    for record in text:
        ids = torch.tensor([tokenizer(alpaca.format(**record))["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert base["loss"] == pytest.approx(total / count, rel=1e-4)
    names = load_hyplora(model, str(tmp_path / "out" / "hyplora-0.5.pt"))
    assert not any("vision" in name for name in names) and "lm_head" not in names


def test_the_loss_of_an_answer_alone_and_the_gradient_in_parts(llama):
    """Rows of other lengths: the sum of losses is that of each row by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    inject_hyplora(model, ["q_proj"], rank=2)
    draw = torch.Generator().manual_seed(0)
    records = []
    for n, m in ((5, 3), (9, 2), (4, 7)):
        ids = torch.randint(0, 250, (n + m,), generator=draw).tolist()
        records.append(Record(1, "", ids[:n], ids[n:]))
    alone = 0.0
    for record in records:
        ids = torch.tensor([record.prompt_ids + record.target_ids])
        logits = model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1]
        alone += F.cross_entropy(logits, torch.tensor(record.target_ids), reduction="sum").item()
    batch = training.make_batch(records, "answer")
    assert training.summed_loss(model, batch).item() == pytest.approx(alone, rel=1e-5)
    assert (batch[2] != training.IGNORE).sum() == 3 + 2 + 7
    args = finetune.build_parser().parse_args(["--checkpoint", "m", "--accumulate", "4"])
    args.device = torch.device("cpu")
    parts = [training.summed_loss(model, part) for part in training.make_parts(records, args)]
    assert len(parts) == 4 and parts[3].item() == 0  # The fourth has no record of its own.
    assert sum(parts).item() == pytest.approx(alone, rel=1e-5)


def test_logits_are_computed_for_the_answers_alone(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    shapes = []
    model.lm_head.register_forward_hook(lambda head, x, out: shapes.append(tuple(out.shape)))
    records = [Record(1, "", [5] * 100, [6] * 4), Record(2, "", [5] * 102, [6] * 3)]
    training.summed_loss(model, training.make_batch(records, "answer"))
    assert shapes == [(2, 5, 260)]  # of 103 columns


def test_an_epoch_has_each_record_once_in_an_order_of_its_own():
    args = finetune.build_parser().parse_args(["--checkpoint", "m", "--batch-size", "4"])
    records = list(range(10))
    epochs = []
    for epoch in range(2):
        steps = [training.records_of_step(records, 3 * epoch + i, args) for i in range(3)]
        assert [len(step) for step in steps] == [4, 4, 2]
        epochs.append(sum(steps, []))
        assert sorted(epochs[-1]) == records
    assert epochs[0] != epochs[1] != records


def test_the_rate_warms_up_and_decays():
    args = finetune.build_parser().parse_args(["--checkpoint", "m", "--lr", "1", "--steps", "8"])
    args.warmup_steps = 4
    rates = [training.learning_rate(args, step) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])


def test_recomputed_activations_and_accumulated_parts_change_nothing(llama, tmp_path):
    finetune.main(options(llama, tmp_path, "plain", "--steps", "3"))
    saving = ["--gradient-checkpointing", "--accumulate", "4", "--steps", "3"]
    finetune.main(options(llama, tmp_path, "saving", *saving))
    assert_near(tensors(tmp_path / "plain"), tensors(tmp_path / "saving"))


def test_the_adapters_with_the_lowest_validation_loss_are_kept(llama, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0, 9.0])  # the base's, four in training, the last row's
    monkeypatch.setattr(finetune, "mean_loss", lambda *arguments: next(losses))
    monkeypatch.setattr(training, "mean_loss", lambda *arguments: next(losses))
    more = ["--validation", "5", "--eval-steps", "2", "--save-steps", "4", "--steps", "8"]
    seen = []
    save = training.save_atomically

    def keep(state, path):
        seen.append(state)
        save(state, path)

    monkeypatch.setattr(training, "save_atomically", keep)
    finetune.main(options(llama, tmp_path, "out", *more))
    monkeypatch.undo()
    states = [state for state in seen if "step" in state]
    assert [state["step"] for state in states] == [4, 8]
    best = tensors(tmp_path / "out")
    assert all(torch.equal(best[name], states[0]["adapters"][name]) for name in best)
    assert not all(torch.equal(best[name], states[1]["adapters"][name]) for name in best)


def test_validation_records_are_not_trained_on(llama, tmp_path):
    args = finetune.parse_arguments(options(llama, tmp_path, "out", "--validation", "7"))
    _, records, validation, _ = finetune.read_inputs(args)
    assert len(validation) == 7
    assert sorted(record.position for record in records + validation) == list(range(1, 41))


def test_calibration_leaves_padding_out_and_what_the_adapters_did_is_the_law_of_sinh(llama):
    """Units and phi are computed again from what down_proj sees, in float64, without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (name,) = inject_hyplora(model, ["layers.1.mlp.down_proj"], rank=2, curvature=0.3)
    layer = model.get_submodule(name)
    torch.nn.init.normal_(layer.lora_B, std=0.5)
    seen = []
    layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().double()))
    records = [
        Record(1, "", [3, 4, 5, 6, 7], [8]),
        Record(2, "", [9, 11], [12, 13, 14, 15, 16, 17]),
    ]
    ids, mask, _ = training.make_batch(records, "answer")
    finetune.hyplora.calibrate_curvature(model, input_ids=ids, attention_mask=mask)
    x = seen[0][mask.bool()]
    assert len(x) == 5 + 7 and layer.lora_unit.item() == pytest.approx(
        x.norm(dim=-1).median().item()
    )
    (row,) = finetune.adapter_effect(model, input_ids=ids, attention_mask=mask)
    root = layer.K.double().sqrt()
    n = x.norm(dim=-1)
    m = (x @ layer.lora_A.double().T @ layer.lora_B.double().T).norm(dim=-1)
    phi = root * torch.asinh(torch.sinh(n / root) * m / n) / m
    assert row["phi"] == pytest.approx(phi.mean().item(), rel=1e-4)
    spread = 100 * phi.std(correction=0) / phi.mean()
    assert row["spread %"] == pytest.approx(spread.item(), rel=1e-3)


# --- Stopping and going on ----------------------------------------------------------------------


def stopped(signal_number, place, *arguments):
    """Send a Python process a signal once its folder has the state of step 4: (output, status)."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    while process.poll() is None and not place.exists():
        time.sleep(0.01)
    process.send_signal(signal_number)
    return process.communicate()[0], process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_it_ends_bit_for_bit_where_a_straight_run_does(number, llama, tmp_path):
    more = ["--steps", "80", "--dropout", "0.1", "--save-steps", "4"]
    straight = tmp_path / "straight"
    finetune.main(options(llama, tmp_path, "straight", *more))
    state = tmp_path / "out" / "state-hyplora-0.5.pt"
    argv = options(llama, tmp_path, "out", *more)
    said, status = stopped(number, state, "-m", "scaling.finetune", *argv)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130 and "the same command with --resume goes on" in said
    assert 4 <= torch.load(state, weights_only=True)["step"] < 80
    finetune.main([*argv, "--resume"])
    resumed = tensors(tmp_path / "out")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors(straight).items())


def test_a_second_ctrl_c_acts_at_once_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with training.hear_signals() as heard:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_full_disk_and_a_nan_loss_leave_the_last_state_whole(llama, tmp_path, monkeypatch):
    argv = options(llama, tmp_path, "out", "--steps", "4", "--save-steps", "2")
    save = torch.save
    calls = []

    def disk_full(content, path):
        calls.append(path)
        if len(calls) == 1:
            return save(content, path)
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(SystemExit, match="can't be written: .*file write failed"):
        finetune.main(argv)
    monkeypatch.undo()
    state = tmp_path / "out" / "state-hyplora-0.5.pt"
    assert torch.load(state, weights_only=True)["step"] == 2
    assert sorted(path.name for path in state.parent.iterdir()) == ["options.json", state.name]
    with pytest.raises(SystemExit, match="lower --lr"):
        finetune.main([*options(llama, tmp_path, "nan", "--steps", "4"), "--lr", "1e30"])
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="is damaged"):
        finetune.main([*argv, "--resume"])


def test_a_folder_belongs_to_one_run_and_resuming_needs_the_same(llama, tmp_path, capsys):
    argv = options(llama, tmp_path, "out", "--steps", "2")
    with pytest.raises(SystemExit, match="nothing to resume"):
        finetune.main([*argv, "--resume"])
    finetune.main(argv)
    kept = tensors(tmp_path / "out")
    with pytest.raises(SystemExit, match="has a run: go on with it by --resume"):
        finetune.main(argv)
    with pytest.raises(SystemExit, match="can't be resumed: lr was 0.003 and is 0.001"):
        finetune.main([*argv, "--resume", "--lr", "1e-3"])
    other = write_folder(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="can't be resumed: base was"):
        finetune.main([*argv, "--resume", "--checkpoint", other])
    capsys.readouterr()
    scoring = [
        "--eval",
        write_sums(tmp_path / "t.json", 3),
        "--max-new-tokens",
        "3",
        "--beams",
        "2",
    ]
    rows = finetune.main([*argv, "--resume", "--accumulate", "2", *scoring])
    assert "going on from step 2" in capsys.readouterr().out and "M.AVG" in rows[1]
    assert all(
        torch.equal(kept[name], tensor) for name, tensor in tensors(tmp_path / "out").items()
    )
    write_sums(tmp_path / "sums.json", first=3)
    with pytest.raises(SystemExit, match="can't be resumed: data was"):
        finetune.main([*argv, "--resume"])


def test_what_cannot_be_written_is_found_before_the_training(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "train", lambda *arguments: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file.*can't be written"):
        finetune.main(options(llama, tmp_path, "file", "--steps", "2"))
    more = ["--eval", write_sums(tmp_path / "t.json", 3), "--predictions", "/nowhere/said.jsonl"]
    with pytest.raises(SystemExit, match="/nowhere/said.jsonl can't be written"):
        finetune.main(options(llama, tmp_path, "out", "--steps", "2", *more))


def test_a_warm_up_that_is_longer_than_the_run_is_named(llama, tmp_path, capsys):
    argv = options(llama, tmp_path, "out", "--steps", "2", "--warmup-steps", "3")
    finetune.read_inputs(finetune.parse_arguments(argv))
    assert "--warmup-steps 3 is longer" in capsys.readouterr().out


# --- Several processes --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_processes_replicated_and_sharded_agree_with_one(family, tmp_path):
    """Sums are taken in another order: 1e-4 of a tensor's norm after six steps."""
    folder = write_folder(tmp_path / "model", family)
    tests = ["--eval", write_sums(tmp_path / "t.json", 3), "--max-new-tokens", "3"]
    more = ["--steps", "6", "--save-steps", "3", "--validation", "5", "--eval-steps", "3", *tests]
    one = finetune.main(options(folder, tmp_path, "one", *more))
    for layout in ([], ["--shard"]):
        out = tmp_path / f"two{len(layout)}"
        argv = options(folder, tmp_path, out.name, *more, *layout)
        said = out.with_suffix(".jsonl")
        done = run(*TWO, "-m", "scaling.finetune", *argv, "--predictions", str(said))
        assert done.returncode == 0, done.stderr[-3000:]
        assert_near(tensors(tmp_path / "one"), tensors(out))
        assert done.stdout.count(f"| {one[1]['trainable']} |") == 1
        assert f"| {one[1]['loss']:.4f} |"[:-3] in done.stdout
        assert len(said.read_text().splitlines()) == 6
    # One process goes on from what two, sharded, have saved, and has nothing left to do.
    argv = options(folder, tmp_path, "two1", *more)
    assert finetune.main([*argv, "--resume"])[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)


def test_sigterm_stops_two_sharded_processes_and_they_go_on(llama, tmp_path):
    more = ["--steps", "40", "--save-steps", "4"]
    finetune.main(options(llama, tmp_path, "straight", *more))
    argv = [*TWO, "-m", "scaling.finetune", *options(llama, tmp_path, "out", *more), "--shard"]
    state = tmp_path / "out" / "state-hyplora-0.5.pt"
    said, _ = stopped(signal.SIGTERM, state, *argv)
    assert "the same command with --resume" in said
    assert 4 <= torch.load(state, weights_only=True)["step"] < 40
    done = run(*argv, "--resume")
    assert "going on from step" in done.stdout, done.stderr[-3000:]
    assert_near(tensors(tmp_path / "straight"), tensors(tmp_path / "out"), 1e-3)


SHARE = """
import sys
import torch
import torch.distributed as dist
from scaling import finetune, training

args = finetune.parse_arguments(sys.argv[1:])
training.start_processes(args.device)
model = finetune.load_model(args, lambda base: finetune.hyplora.inject_hyplora(base, ["q_proj"]))
here = sum(p.to_local().numel() for p in model.parameters())
whole = sum(p.numel() for p in model.parameters())
print(here, whole, flush=True)
ids = torch.arange(8)[None]
logits = model(input_ids=ids).logits
if training.is_main():
    own = finetune.load_base(args)
    print("difference", (own(input_ids=ids).logits - logits).abs().max().item(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_sharded_base_with_its_own_head_is_the_base_in_parts(tmp_path):
    """The config says that the head is tied, the weights say that it is not."""
    folder = write_folder(tmp_path / "model", "gemma3_text", tie_word_embeddings=False)
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    program = tmp_path / "share.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SHARE}")
    argv = ["--checkpoint", folder, "--data", "none", "--device", "cpu", "--shard"]
    done = run(*TWO, str(program), *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")
    shares = [[int(n) for n in line.split()] for line in lines if line[:1].isdigit()]
    assert len(shares) == 2 and shares[0][1] == shares[0][0] + shares[1][0]
    assert max(share[0] for share in shares) < 0.52 * shares[0][1]
    (difference,) = [line for line in lines if line.startswith("difference")]
    assert float(difference.split()[1]) < 1e-4


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_of_a_scheduler_alone_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match=f"{name} is 2, but WORLD_SIZE is not set: .*torchrun"):
        training.start_processes(torch.device("cpu"))


def test_each_process_drops_other_elements(llama, tmp_path, monkeypatch):
    """One process that takes itself for another draws other random numbers in the same step."""
    drawn = []
    monkeypatch.setattr(training, "summed_loss", lambda *a: drawn.append(torch.rand(3)) or 1 / 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    inject_hyplora(model, ["q_proj"])
    args = finetune.parse_arguments(options(llama, tmp_path, "out", "--steps", "1"))
    for rank in (0, 0, 1):
        monkeypatch.setattr(training, "rank_and_count", lambda rank=rank: (rank, 1))
        monkeypatch.setattr(training, "make_parts", lambda records, args: records[:1])
        with pytest.raises(ZeroDivisionError):
            training.train(model, args, "", [Record(1, "", [1, 2], [3])], [], "none")
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert hyplora_state_dict(model) and math.isfinite(drawn[0].sum())
