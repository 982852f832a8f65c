"""Training in scaling/: stopped, resumed, spread over processes, validated.

pip install safetensors tokenizers
"""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

from benchmarks.small_checkpoint import write_small_checkpoint, write_sums
from hyplora import inject_hyplora, remove_hyplora
from scaling import finetune, training
from scaling.checkpoint import from_checkpoint
from scaling.records import IGNORE, Batches, Record, Tokens, read_records

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
torch.set_num_threads(1)


@pytest.fixture
def work(tmp_path):
    """A folder with a checkpoint (model) and training records (sums.json)."""
    write_small_checkpoint(tmp_path / "model")
    write_sums(tmp_path / "sums.json")
    return tmp_path


def options(work, out, *more):
    return [
        *("--checkpoint", str(work / "model"), "--data", str(work / "sums.json")),
        *("--out", str(work / out), "--device", "cpu", "--batch-size", "6", *more),
    ]


def run(*arguments):
    """What a Python process with these arguments prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def adapters(out):
    return torch.load(next(out.glob("sums-*.pt")), weights_only=True)["tensors"]


def interrupted(signal_number, place, *arguments):
    """Send a Python process a signal at a line of HypLoRA's: (what it prints then, its status)."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    for line in process.stdout:
        if line.startswith("HypLoRA") and place in line:
            break
    process.send_signal(signal_number)
    return process.communicate()[0], process.returncode


def test_killed_and_resumed_it_ends_bit_for_bit_where_an_uninterrupted_run_does(work):
    more = ["--adapter", "hyplora", "--steps", "100", "--dropout", "0.1", "--save-every", "4"]
    finetune.main(options(work, "straight", *more))
    killed = options(work, "killed", *more)
    _, status = interrupted(signal.SIGKILL, "30/100", "-m", "scaling.finetune", *killed)
    assert status == -signal.SIGKILL
    (state,) = (work / "killed").glob("state-*.pt")
    assert torch.load(state, weights_only=True)["step"] in range(28, 100)
    finetune.main([*killed, "--resume"])
    straight = adapters(work / "straight")
    assert all(torch.equal(tensor, straight[n]) for n, tensor in adapters(work / "killed").items())


def test_ctrl_c_saves_and_says_how_to_resume(work):
    arguments = options(work, "out", "--adapter", "hyplora", "--steps", "900")
    rest, status = interrupted(signal.SIGINT, "90/900", "-m", "scaling.finetune", *arguments)
    assert status == 130
    assert "the same command with --resume goes on" in rest
    state = torch.load(next((work / "out").glob("state-*.pt")), weights_only=True)
    assert 90 <= state["step"] < 900
    assert f"stopped at step {state['step']}" in rest


def test_sigterm_stops_two_processes_and_one_goes_on(work):
    more = ["--adapter", "hyplora", "--steps", "60"]
    finetune.main(options(work, "straight", *more))
    stopped = options(work, "stopped", *more)
    two = [*TWO, "-m", "scaling.finetune", *stopped]
    assert "the same command with --resume" in interrupted(signal.SIGTERM, "6/60", *two)[0]
    (state,) = (work / "stopped").glob("state-*.pt")
    assert 6 <= torch.load(state, weights_only=True)["step"] < 60
    finetune.main([*stopped, "--resume"])
    resumed = adapters(work / "stopped")
    for name, tensor in adapters(work / "straight").items():
        assert (resumed[name] - tensor).norm() < 1e-4 * tensor.norm(), name


def test_a_full_disk_and_a_nan_loss_leave_a_usable_state(work, monkeypatch):
    argv = options(work, "out", "--adapter", "lora", "--steps", "4", "--save-every", "2")
    finetune.main(argv)
    (state,) = (work / "out").glob("state-*.pt")
    kept = state.read_bytes()

    def disk_full(content, file):
        file = file if hasattr(file, "write") else open(file, "wb")
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(SystemExit, match="could not write .*No space left.*--resume"):
            finetune.main(argv)
    assert state.read_bytes() == kept
    assert {path.suffix for path in (work / "out").iterdir()} == {".pt"}
    with pytest.raises(SystemExit, match="lower --lr"):
        finetune.main([*argv, "--lr", "1e30", "--warmup", "1"])


def test_resume_says_so_when_there_is_nothing_to_resume(work):
    argv = options(work, "out", "--adapter", "lora", "--steps", "4")
    with pytest.raises(SystemExit, match="nothing to resume: .*state-sums-lora"):
        finetune.main([*argv, "--resume"])
    finetune.main(argv)
    with pytest.raises(SystemExit, match="nothing to resume"):
        finetune.main([*argv, "--resume", "--lr", "1e-3"])
    (state,) = (work / "out").glob("state-*.pt")
    kept = state.read_bytes()
    state.write_bytes(kept[:1000])
    with pytest.raises(SystemExit, match="is damaged"):
        finetune.main([*argv, "--resume"])
    state.write_bytes(kept)
    write_sums(work / "sums.json", first=3)
    with pytest.raises(SystemExit, match="records of .*sums.json are not those"):
        finetune.main([*argv, "--resume"])


def test_resume_takes_other_scoring_options_and_does_not_train_again(work, capsys):
    argv = options(work, "out", "--adapter", "both", "--steps", "4")
    first = finetune.main(argv)
    test = str(write_sums(work / "test.json", count=3))
    capsys.readouterr()
    scoring = ["--eval", test, "--max-new-tokens", "3", "--eval-batch-size", "2", "--beams", "2"]
    second = finetune.main([*argv, "--resume", *scoring])
    assert "LoRA, seed 0: going on from step 4" in capsys.readouterr().out
    assert [row["path"] for row in first[1:]] == [row["path"] for row in second[1:]]
    assert [row["metrics"]["loss"] for row in first] == [row["metrics"]["loss"] for row in second]
    assert "% test" in second[1]["metrics"]


def test_two_trainings_have_two_adapters(work):
    (work / "other").mkdir()
    write_sums(work / "other" / "sums.json", first=50)
    argv = options(work, "out", "--adapter", "lora", "--steps", "2")
    paths = {finetune.main(argv)[1]["path"]}
    paths.add(finetune.main([*argv, "--lr", "1e-3"])[1]["path"])
    paths.add(finetune.main([*argv, "--data", str(work / "other" / "sums.json")])[1]["path"])
    assert len(paths) == 3
    assert finetune.main([*argv, "--accumulate", "2"])[1]["path"] in paths  # the same training


def test_two_processes_give_the_adapters_and_losses_of_one(work):
    """Sums are taken in another order: 1e-4 of a tensor's norm after ten steps."""
    test = str(write_sums(work / "test.json", count=5))
    more = ["--adapter", "hyplora", "--steps", "10", "--eval", test, "--max-new-tokens", "3"]
    one = run("-m", "scaling.finetune", *options(work, "one", *more))
    two = run(*TWO, "-m", "scaling.finetune", *options(work, "two", *more))

    def losses(text):
        lines = [line for line in text.splitlines() if line.startswith("HypLoRA 0.5, seed")]
        return [float(line.split("loss ")[1].split()[0]) for line in lines if "loss " in line]

    assert len(losses(one)) == 10
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    together = adapters(work / "two")
    for name, tensor in adapters(work / "one").items():
        assert (together[name] - tensor).norm() < 1e-4 * tensor.norm(), name
    assert two.splitlines()[-1].split("|")[4:6] == one.splitlines()[-1].split("|")[4:6]
    # And it goes on with two, or with one, from what two have saved.
    more += ["--resume", "--beams", "2"]
    assert "going on from step 10" in run(
        *TWO, "-m", "scaling.finetune", *options(work, "two", *more)
    )
    assert "going on from step 10" in run("-m", "scaling.finetune", *options(work, "two", *more))


def test_a_second_ctrl_c_acts_at_once_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with training.Interrupts() as interrupts:
        assert not interrupts.heard
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.heard
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_each_process_and_step_drops_other_elements(monkeypatch):
    plan = training.Plan(steps=2, lr=1.0, warmup=1, seed=0)

    def drawn(rank, step):
        monkeypatch.setattr(training, "rank_and_count", lambda: (rank, 2))
        training.seed_dropout(plan, step)
        return torch.rand(3).tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0) != drawn(1, 1)


def test_two_processes_score_a_saved_adapter_as_one_does(work):
    test = str(write_sums(work / "test.json", count=3))
    scoring = ["--eval", test, "--max-new-tokens", "3", "--device", "cpu"]
    path = finetune.main(options(work, "out", "--adapter", "lora", "--steps", "3"))[1]["path"]
    only = ["--checkpoint", str(work / "model"), "--score-only", path, *scoring]
    finetune.main([*only, "--predictions", str(work / "one.jsonl")])
    printed = run(*TWO, "-m", "scaling.finetune", *only, "--predictions", str(work / "two.jsonl"))
    assert "| 7424 | 18.79 % |" in printed
    said = (work / "two.jsonl").read_text()
    assert len(said.splitlines()) == 3 and said == (work / "one.jsonl").read_text()
    with pytest.raises(SystemExit, match="No such file.*none.pt"):
        finetune.main([*only, "--score-only", "none.pt"])


def test_an_error_ends_all_processes(work):
    arguments = options(work, "out", "--steps", "2", "--resume")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *TWO, "-m", "scaling.finetune", *arguments],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=ROOT,
        timeout=100,
    )
    assert done.returncode != 0
    assert "there is nothing to resume" in done.stderr


def test_recomputed_activations_and_accumulated_parts_change_nothing(work):
    small = ("--adapter", "hyplora", "--steps", "3")
    finetune.main(options(work, "plain", *small))
    finetune.main(options(work, "saving", *small, "--recompute", "--accumulate", "4"))
    saving = adapters(work / "saving")
    for name, tensor in adapters(work / "plain").items():
        assert (saving[name] - tensor).norm() < 1e-4 * tensor.norm(), name


def test_the_adapters_with_the_lowest_validation_loss_are_kept(work, monkeypatch, capsys):
    losses = iter([5.0, 3.0, 4.0, 6.0])
    real = training.mean_loss
    monkeypatch.setattr(training, "mean_loss", lambda *arguments: next(losses))
    more = ["--adapter", "lora", "--validation", "5", "--validate-every", "2", "--clip-norm", "1"]
    finetune.main(options(work, "out", *more, "--steps", "8"))
    assert "the adapters of step 4 have the lowest validation loss" in capsys.readouterr().out
    monkeypatch.setattr(training, "mean_loss", real)
    # A decay to zero over 8 steps is not one over 4, so the best step's adapters are not the
    # last's.
    state = torch.load(next((work / "out").glob("state-*.pt")), weights_only=True)
    best = adapters(work / "out")
    assert all(torch.equal(best[name], state["best"]["adapters"][name]) for name in best)
    assert not all(torch.equal(best[name], state["adapters"][name]) for name in best)


def test_validation_records_are_not_trained_on(work):
    tokens = Tokens(str(work / "model"))
    records = read_records(str(work / "sums.json"), tokens)
    rest, held_out = finetune.split_validation(records, 7, seed=42)
    assert len(held_out) == 7
    positions = sorted(record.position for record in rest + held_out)
    assert positions == list(range(1, 41))


def test_calibration_sets_the_curvature_from_the_first_batch(work):
    argv = options(work, "out", "--adapter", "hyplora", "--steps", "1")
    calibrated = finetune.main(argv)[1]["K"]
    guessed = finetune.main([*argv, "--no-calibrate"])[1]["K"]
    assert guessed == pytest.approx([0.5] * len(guessed), rel=1e-2)
    assert max(calibrated) / min(calibrated) > 2  # down_proj's input is not as long as q_proj's


def test_the_tokens_for_calibration_have_no_padding():
    records = [Record(i, "", [3] * n, [4]) for i, n in enumerate((2, 9, 5, 7))]
    ids = finetune.sample_tokens(Batches(records, 4, seed=0))
    assert ids.shape == (3, 5)
    assert bool((ids == 3).all())


def test_what_the_adapters_did_is_the_law_of_sinh(work):
    """Lengths, by the law of sinh in float64, of what a layer sees: the table has their means."""
    model = from_checkpoint(str(work / "model"), torch.float32, torch.device("cpu"))
    names = inject_hyplora(model, ["down_proj"], rank=2, curvature=0.3)
    layers = [model.get_submodule(name) for name in names]
    seen = []
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.5)
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].double()))
    ids = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    text = training.adapter_effect(model, ids)
    phis = []
    spreads = []
    for layer, x in zip(layers, seen):
        root = layer.K.double().sqrt()
        n = x.norm(dim=-1)
        m = (x @ layer.lora_A.double().T @ layer.lora_B.double().T).norm(dim=-1)
        phi = root * torch.asinh(torch.sinh(n / root) * m / n) / m
        phis.append(phi.mean().item())
        spreads.append(100 * (phi.std(correction=0) / phi.mean()).item())
    (row,) = text.splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1] == "down_proj"
    assert float(cells[4]) == pytest.approx(sum(phis) / 2, abs=2e-3)
    assert float(cells[5].split()[0]) == pytest.approx(sum(spreads) / 2, abs=0.1)
    remove_hyplora(model)
    inject_hyplora(model, ["down_proj"], rank=2, curvature=math.inf)
    assert training.adapter_effect(model, ids) == ""


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("by_length", [True, False])
def test_batches_have_each_record_once_an_epoch_with_the_loss_on_its_answer(loss_on, by_length):
    records = [Record(i, "", [1] * (i + 1), [2 + i, 256]) for i in range(10)]
    batches = Batches(records, 4, seed=0, loss_on=loss_on, by_length=by_length)
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            ids, labels = batches(step)
            for row, label in zip(ids.tolist(), labels.tolist()):
                learned = [token for token in label if token != IGNORE]
                assert learned[-1] == 256
                prompt = len([token for token in row if token == 1])
                assert len(learned) == (2 if loss_on == "answer" else prompt + 1)
                seen.append(learned[-2])
        assert sorted(seen) == list(range(2, 12))
    assert torch.equal(batches(4)[0], batches(4)[0])  # It depends on the step alone.


def test_gradients_are_those_of_the_mean_over_all_labels():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    parameters = list(model.parameters())
    ids = torch.randint(9, (5, 6))
    labels = torch.randint(9, (5, 6)).masked_fill(torch.rand(5, 6) < 0.5, IGNORE)
    want = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(want, parameters)
    loss, _ = training.gradients(model, parameters, (ids, labels), 3, False)
    assert loss.item() == pytest.approx(want.item())
    for parameter, gradient in zip(parameters, expected):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_the_learning_rate_rises_and_falls_linearly():
    plan = training.Plan(steps=110, lr=1.0, warmup=10, seed=0)
    rates = [training.learning_rate(plan, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] == pytest.approx(0.01)


def test_a_seed_gives_the_same_adapters_and_another_seed_others(tmp_path):
    write_small_checkpoint(tmp_path / "model")
    write_sums(tmp_path / "sums.json")
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        finetune.main(options(tmp_path, out, "--adapter", "lora", "--steps", "2", "--seed", seed))
    a, b, c = (adapters(tmp_path / out) for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
