"""train_minimal.py when it is stopped, spread over processes, and fed with data that is not clean."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_minimal
from benchmarks.kill_and_resume import command, kill_and_resume

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments):
    """What a Python process with these arguments prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def adapters(folder, pattern="*-hyplora-*.pt"):
    return torch.load(next(Path(folder).glob(pattern)), weights_only=True)["tensors"]


def test_killed_and_resumed_it_ends_bit_for_bit_where_an_uninterrupted_run_does():
    assert kill_and_resume(steps=500, kills=3, seed=0) == (3, True)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    process = subprocess.Popen(command(tmp_path, 3000), stdout=subprocess.PIPE, text=True, env=ENV)
    for line in process.stdout:
        if line.startswith("HypLoRA") and "300/3000" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    assert process.returncode == 130 and "the same command with --resume goes on" in rest
    state = torch.load(next(tmp_path.glob("state-*.pt")), weights_only=True)
    assert 300 <= state["step"] < 3000 and f"stopped at step {state['step']}" in rest


def test_a_full_disk_and_a_nan_loss_leave_a_usable_state(tmp_path, monkeypatch, capsys):
    small = "--width 16 --layers 1 --heads 2 --base-steps 4 --adapter lora --save-every 2 --batch-size 8".split()
    argv = [*small, "--out", str(tmp_path), "--steps", "4"]
    train_minimal.main(argv)
    (state,) = tmp_path.glob("state-*.pt")
    kept = state.read_bytes()

    def disk_full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(SystemExit, match="could not write .*No space left.*--resume"):
            train_minimal.main(argv)
    assert state.read_bytes() == kept and not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit, match="lower --lr"):
        train_minimal.main([*argv, "--lr", "1e30", "--warmup", "1"])


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_processes_give_the_adapters_and_losses_of_one(shard, tmp_path):
    """Sums are taken in another order: 1e-4 of a tensor's norm after ten steps, and 1e-3 of each loss printed."""
    small = "--width 32 --layers 2 --base-steps 20 --steps 10 --batch-size 15 --adapter hyplora --device cpu".split()
    base = [str(ROOT / "train_minimal.py"), *small, "--out"]
    one = run(*base, str(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    for cached in (tmp_path / "one").glob("base-*"):
        (tmp_path / "two" / cached.name).write_bytes(cached.read_bytes())
    two = run(*TWO, *base, str(tmp_path / "two"), *shard)

    def losses(text):
        return [
            float(line.split("loss ")[1].split()[0]) for line in text.splitlines() if line.startswith("HypLoRA 0.5,")
        ]

    assert len(losses(one)) == 10 and losses(two) == pytest.approx(losses(one), rel=1e-3)
    for name, p in adapters(tmp_path / "one").items():
        assert (adapters(tmp_path / "two")[name] - p).norm() < 1e-4 * p.norm(), name


def test_the_studys_stack_of_adapters_gives_what_runs_of_their_own_give():
    """Other sums of the same numbers: 1e-3 of a tensor's norm after 30 steps."""
    study = pytest.importorskip("benchmarks.study", reason="pip install scipy")
    torch.manual_seed(0)
    base = train_minimal.GPT(train_minimal.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1))
    nn.init.normal_(base.lm_head.weight)
    rows = train_minimal.render("subtract", train_minimal.operand_pairs(held_out=True), torch.Generator())
    task = SimpleNamespace(
        name="subtract",
        base=base.requires_grad_(False),
        batch=lambda seed, step: train_minimal.sum_batches("subtract", 16, seed)(step),
        data={"validation": train_minimal.shifted(rows[:100]), "test": train_minimal.shifted(rows[100:200])},
    )
    runs = [
        study.Run("subtract", "LoRA", 2, 4e-3, 0, 30),
        study.Run("subtract", "HypLoRA 0.5", 3, 1e-2, 1, 30),
        study.Run("subtract", "HypLoRA 1.0, fixed", 2, 1e-2, 0, 30),
        study.Run("subtract", "HypLoRA 0.5, calibrated", 2, 1e-2, 0, 30),
    ]
    together = study.train_stack(base, runs, task)
    for run, result in zip(runs, together):
        layers = study.start(base, run, task)
        for name, layer in layers.items():
            base.set_submodule(name, layer)
        parameters = train_minimal.hyplora_parameters(base)
        train_minimal.train(base, parameters, lambda step: task.batch(run.seed, step), 30, run.lr, run.seed, "")
        ids, labels = task.data["test"]
        with torch.no_grad():
            start = train_minimal.answer_loss(train_minimal.remove_hyplora(copy.deepcopy(base)), ids, labels) / 300
            loss = train_minimal.answer_loss(base, ids, labels) / 300
        train_minimal.remove_hyplora(base)
        assert start - loss > 0.1 and result["test loss"] == pytest.approx(loss.item(), rel=1e-3), run


def test_two_processes_read_only_their_shards_of_a_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_level(tmp_path / "model" / "tokenizer.json")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record(i) for i in range(12)]))
    common = f"--checkpoint {tmp_path}/model --data {data} --eval {data} --adapter hyplora --steps 4 --batch-size 4"
    base = [str(ROOT / "train_minimal.py"), *common.split(), "--max-new-tokens", "4", "--device", "cpu", "--out"]
    run(*base, str(tmp_path / "one"))
    run(*TWO, *base, str(tmp_path / "two"), "--shard")
    for name, p in adapters(tmp_path / "one").items():
        assert (adapters(tmp_path / "two")[name] - p).norm() < 1e-4 * p.norm(), name


def byte_level(path):
    """A tokenizer.json with a token for each byte, and 256 as the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path))


def record(i, **change):
    return {
        "instruction": f"What is {i} + {i}?",
        "input": "",
        "output": f"The answer is {2 * i}.",
        "answer": f"{2.0 * i}",
    } | change


def test_records_that_cannot_be_used_are_named_counted_and_left_out(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(r) for r in (record(1), record(2, output=" "), record(3, instruction=50 * "long "), record(4))]
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:], '"text"']))
    read = train_minimal.read_records(str(path), train_minimal.Bytes(), cutoff=250)
    assert [r["answer"] for r in read] == ["2.0", "8.0"]
    said = capsys.readouterr().out
    assert "record 2: output is missing or empty" in said and "record 3: Expecting" in said
    assert "record 4: 4" in said and "--cutoff is 250" in said and "2 records, 4 left out" in said
    with pytest.raises(SystemExit, match="record 2: output is missing"):
        train_minimal.read_records(str(path), train_minimal.Bytes(), 250, on_bad="stop")
    (tmp_path / "list.json").write_text(json.dumps([record(1), record(2)], indent=1))
    assert len(train_minimal.read_records(str(tmp_path / "list.json"), train_minimal.Bytes(), 400)) == 2


def test_batches_hold_each_record_once_an_epoch_with_the_loss_on_its_answer():
    vocabulary = train_minimal.Bytes()
    records = [{"prompt_ids": [1] * (i + 1), "target_ids": [2 + i, 256]} for i in range(10)]
    for loss_on in ("answer", "all"):
        batch = train_minimal.record_batches(records, 4, seed=0, loss_on=loss_on)
        for epoch in range(2):
            seen = []
            for step in range(3 * epoch, 3 * epoch + 3):
                ids, labels = batch(step)
                for row, label in zip(ids.tolist(), labels.tolist()):
                    scored = [x for x in label if x != train_minimal.IGNORE]
                    assert scored[-1] == vocabulary.stop[0] and (scored[0] == 1) == (
                        loss_on == "all" and len(scored) > 2
                    )
                    seen.append(scored[-2])
            assert sorted(seen) == list(range(2, 12)), loss_on
    assert torch.equal(batch(4)[0], batch(4)[0])  # of the step alone


@pytest.mark.parametrize(
    "output, answer, right",
    [
        ("5 and 7 make 12. The answer is 1,200.", "1200.0", True),
        ("The answer is -3.5", "-3.5", True),
        ("12, or rather 13", "12", False),
        ("no number", "12", False),
        ("0.3334", "0.333", True),
        ("A guess. The answer is (D).", "D", True),
        ("(A) or (C)", "A", False),
        ("so it is B", "B", True),
    ],
)
def test_scoring_by_the_papers_rules(output, answer, right):
    assert train_minimal.is_right(output, answer) is right


def test_the_papers_recipe_and_what_overrides_it():
    args = train_minimal.parse_arguments("--data x --recipe paper --rank 4".split())
    assert (args.lr, args.warmup, args.batch_size, args.epochs, args.cutoff) == (3e-4, 100, 16, 3, 256)
    assert args.rank == 4 and args.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def test_recomputed_activations_and_accumulated_parts_change_nothing(tmp_path):
    small = "--width 16 --layers 1 --heads 2 --base-steps 4 --adapter hyplora --steps 3 --batch-size 8".split()
    train_minimal.main([*small, "--out", str(tmp_path / "plain")])
    train_minimal.main([*small, "--out", str(tmp_path / "saving"), "--recompute", "--accumulate", "3"])
    for name, p in adapters(tmp_path / "plain").items():
        assert (adapters(tmp_path / "saving")[name] - p).norm() < 1e-4 * p.norm(), name
