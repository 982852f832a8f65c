"""Training in scaling/: families, resuming, several processes, and what a run's folder keeps."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers
from conftest import CHATML, FAMILIES, write_folder, write_sums

from hyplora import inject_hyplora, load_hyplora
from scaling import finetune, training
from scaling.data import ALPACA, Record

ROOT = Path(__file__).parent.parent
WRONG = "steps 0, epochs -1, beams 0, cutoff 1, warmup-steps -1, lr nan, dropout 1, shard"
WRONG += ", targets query, targets lm_head, predictions p, score-only a --eval b"
torch.set_num_threads(1)


def options(model, work, out, *more):
    data = work / "sums.json"
    if not data.exists():
        write_sums(data)
    line = f"--checkpoint {model} --data {data} --out {work / out} --device cpu --curvature 0.5"
    return [*f"{line} --batch-size 6 --lr 3e-3 --warmup-steps 1".split(), *more]


def tensors(folder, stem="HypLoRA-0.5"):
    return torch.load(folder / f"{stem}.pt", weights_only=True)["tensors"]


def assert_near(some, others, tolerance=1e-4):
    """Each tensor differs by less than this part of its length; 0 is bit for bit."""
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert (others[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_its_loss_is_that_of_the_model_itself(family, tmp_path):
    """The loss is compared with transformers' own labels=, one record at a time, no padding."""
    folder = write_folder(tmp_path / "model", family)
    argv = options(folder, tmp_path, "out", "--steps", "6")
    base, trained = finetune.main(argv)
    assert trained["loss"] < base["loss"] - 0.01 and base["trainable"] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for record in json.loads((tmp_path / "sums.json").read_text()):
        prompt = ALPACA.format(instruction=record["instruction"], input="")
        ids = torch.tensor([tokenizer(f"{prompt}{record['output']}</s>")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
        targets = (labels != -100).sum().item()
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * targets
        count += targets
    assert base["loss"] == pytest.approx(total / count, rel=1e-4)
    names = load_hyplora(model, str(tmp_path / "out" / "HypLoRA-0.5.pt"))
    assert not any("vision" in name for name in names) and "lm_head" not in names


def test_steps_have_their_own_records_rates_and_dropout(llama, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    inject_hyplora(model, ["q_proj"])
    seen = []
    loss = training.summed_loss
    monkeypatch.setattr(training, "summed_loss", lambda *a: seen.append(torch.rand(1)) or loss(*a))
    rates = []

    def step(optimizer, closure=None):
        group = optimizer.param_groups[0]
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"]])
        rates.append(group["lr"] * norm.item() + group["weight_decay"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    argv = options(llama, tmp_path, ".", "--steps", "8", "--lr", "1", "--warmup-steps", "4")
    args = finetune.parse_arguments(argv)
    records = [Record(i, [1, 2], [i], "") for i in range(10)]
    for rank, args.seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(training, "RANK", rank)
        training.train(model, args, "x", records)
    assert rates[:8] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert len(set(map(float, seen))) == 24 and seen[:8] == seen[8:16]
    epochs = []
    for first, args.seed in ((0, 0), (2, 0), (0, 1)):
        steps = [training.records_of_step(records, first + i, args) for i in range(2)]
        epochs.append([record.position for record in steps[0] + steps[1]])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] != list(range(10)) and epochs[0] != epochs[2]


def test_padding_does_not_calibrate_nor_prompts_count(llama, tmp_path, monkeypatch, capsys):
    """The unit of down_proj is the median over what it sees of the records one by one."""
    monkeypatch.setattr(training, "train", lambda *arguments: None)
    argv = options(llama, tmp_path, ".", "--steps", "1", "--targets", "layers.1.mlp.down_proj")
    args = finetune.parse_arguments(argv)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (name,) = inject_hyplora(model, args.targets)
    layer = model.get_submodule(name)
    torch.nn.init.normal_(layer.lora_B)
    records = [Record(1, [3, 4, 5], [8, 9], ""), Record(2, [9, 11], list(range(99)), "")]
    finetune.train_adapter(model, "HypLoRA-0.5", args, records)
    assert "down_proj: radius 1.4" in capsys.readouterr().out
    lengths = []
    layer.register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].norm(dim=-1)[0]))
    for record in records:
        model(input_ids=torch.tensor([record.prompt_ids + record.target_ids])[:, :-1])
    assert layer.lora_unit.item() == pytest.approx(torch.cat(lengths).median().item())
    shapes = []
    model.lm_head.register_forward_hook(lambda head, x, out: shapes.append(tuple(out.shape)))
    records = [Record(1, n * [5], m * [6], "") for n, m in ((50, 3), (52, 2), (51, 4))]
    for args.loss_on in ("answer", "all"):
        training.mean_loss(model.train(), records, args)
    assert shapes == [(3, 5, 260), (3, 54, 260)] and not model.training


def test_stopped_and_resumed_it_ends_bit_for_bit_alike(llama, tmp_path, monkeypatch, capsys):
    more = ["--steps", "9", "--dropout", "0.1"]
    finetune.main(options(llama, tmp_path, "straight", *more, "--gradient-checkpointing"))
    argv = options(llama, tmp_path, "out", *more)
    records_of_step = training.records_of_step

    def stop(records, step, args):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return records_of_step(records, step, args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(training, "records_of_step", stop)
        finetune.main(argv)
    assert "with --resume goes on" in capsys.readouterr().out
    finetune.main([*argv, "--resume"])
    assert "going on from step 6" in capsys.readouterr().out
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL]
    assert_near(tensors(tmp_path / "straight"), tensors(tmp_path / "out"), tolerance=0)


def test_a_full_disk_and_a_nan_loss_leave_the_last_state_whole(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_STEPS", 2)
    argv = options(llama, tmp_path, "out", "--steps", "4")
    rename = os.replace

    def fill_the_disk(old, new):
        rename(old, new)
        Path(old).symlink_to("/dev/full")

    monkeypatch.setattr(training.os, "replace", fill_the_disk)
    with pytest.raises(SystemExit, match="No space left on device. What was saved before is whole"):
        finetune.main(argv)
    assert torch.load(tmp_path / "out/state-HypLoRA-0.5.pt", weights_only=True)["step"] == 2
    with pytest.raises(SystemExit, match="lower --lr"):
        finetune.main([*options(llama, tmp_path, "nan", "--steps", "4"), "--lr", "1e30"])


def test_a_folder_belongs_to_one_run_and_resuming_needs_the_same(tmp_path, monkeypatch, capsys):
    """A chat template that renders the time does not keep a run from resuming."""
    dated = CHATML.replace("{% for", "{{ strftime_now('%f')[:2] }}{% for", 1)
    folder = write_folder(tmp_path / "model", chat_template=dated)
    argv = options(folder, tmp_path, "out", "--steps", "2", "--warmup-steps", "3")
    with pytest.raises(SystemExit, match="--resume goes on with the run of"):
        finetune.main([*argv, "--resume"])
    finetune.main(argv)
    assert "--warmup-steps 3 is longer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a new run takes another --out"):
        finetune.main(argv)
    other = write_folder(tmp_path / "other", seed=1, chat_template=dated)
    changes = {"lr": "--lr 1e-3", "base": f"--checkpoint {other}", "bound": ""}
    names = "alpha', 'cutoff', 'dropout', 'loss_on', 'rank', 'seed', 'targets', 'template', 'recipe"
    changes[names] = "--recipe paper --alpha 3"
    for name, more in changes.items():
        message = rf"can't be resumed, as \['{name}'\] changed"
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
            patch.setattr("hyplora.MAX_RADIUS", 4.0 if name == "bound" else 12.0)
            finetune.main([*argv, "--resume", *more.split()])
    finetune.main([*argv, "--resume"])
    assert "going on from step 2" in capsys.readouterr().out
    write_sums(tmp_path / "sums.json", first=3)
    with pytest.raises(SystemExit, match=r"can't be resumed, as \['data'\] changed"):
        finetune.main([*argv, "--resume"])
    (tmp_path / "out" / "options.json").unlink()  # The states of the run are still there.
    pytest.raises(SystemExit, finetune.main, argv).match("a new run takes another --out")


def test_what_cannot_be_written_is_found_before_the_training(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *arguments: pytest.fail("too late"))
    said = ["--eval", write_sums(tmp_path / "t.json", 3), "--predictions", "/nowhere/said.jsonl"]
    for out, more in (("t.json", []), ("out", said)):
        with pytest.raises(SystemExit, match=r"/t.json'|/nowhere/said.jsonl"):
            finetune.main(options(llama, tmp_path, out, *more))


@pytest.mark.parametrize("wrong", WRONG.split(", "))
def test_a_wrong_option_is_found_before_anything_is_scored(wrong, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "score", lambda *arguments: pytest.fail("too late"))
    message = r"^2$|got \['query'\]|lm_head.*names no|<= dropout"
    with pytest.raises(SystemExit, match=message):
        finetune.main(options(llama, tmp_path, "out", *f"--{wrong}".split()))
    assert not (tmp_path / "out/options.json").exists()


def test_processes_of_a_scheduler_alone_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(SystemExit, match="SLURM_STEP_NUM_TASKS is 2, but"):
        training.start_processes(torch.device("cpu"))


PAIR = """
import json
import signal
import sys
import torch.distributed as dist
from scaling import finetune, training

dist.destroy_process_group = lambda: None  # All runs share these two processes.
runs, stopped = json.loads(sys.argv[1])
for argv in runs:
    finetune.main(argv)

records_of_step = training.records_of_step
def stop(records, step, args):
    if step == 3 and training.RANK == 1:
        signal.raise_signal(signal.SIGTERM)
    return records_of_step(records, step, args)

training.records_of_step = stop
try:
    finetune.main(stopped)
except SystemExit as ended:
    assert ended.code == 130
training.records_of_step = records_of_step
finetune.main([*stopped, "--resume"])

args = finetune.parse_arguments(stopped)
model = finetune.place(finetune.load_base(args), args)
sizes = zip(*[(p.to_local().numel(), p.numel()) for p in model.parameters()])
sys.stdout.write("share {} {}\\n".format(*map(sum, sizes)))  # Two processes write.
"""


def test_two_processes_replicated_and_sharded_agree_with_one(tmp_path):
    """Sums are taken in another order: 1e-4 of a tensor's norm after six steps."""
    tests = ["--eval", write_sums(tmp_path / "t.json", 3), "--max-new-tokens", "3"]
    runs = []
    rows = {}
    for family in ("llama", "gemma3"):
        folder = write_folder(tmp_path / family, family)
        # The fourth step of 13 has one record, of which a second process has none.
        more = ["--steps", "6", "--batch-size", "13", *tests]
        rows[family] = finetune.main(options(folder, tmp_path, f"{family}-one", *more))[1]
        for layout in ([], ["--shard"]):
            runs.append(options(folder, tmp_path, f"{family}{len(layout)}", *more, *layout))
    stopped = options(str(tmp_path / "llama"), tmp_path, "stopped", *more, "--shard")
    program = tmp_path / "pair.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PAIR}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "ignore", *torchrun, str(program), json.dumps([runs, stopped])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for family, row in rows.items():
        for out in (f"{family}0", f"{family}1"):
            assert_near(tensors(tmp_path / f"{family}-one"), tensors(tmp_path / out))
        cells = [f"{row[name]:.4g}" for name in ("share %", "loss")]
        assert done.stdout.count(f"| HypLoRA-0.5 | {row['trainable']} | {' | '.join(cells)} |") >= 2
    assert "HypLoRA-0.5: going on from step 4" in done.stdout
    assert_near(tensors(tmp_path / "llama-one"), tensors(tmp_path / "stopped"), 1e-3)
    shares = [line.split() for line in done.stdout.splitlines() if line.startswith("share ")]
    assert int(shares[0][1]) + int(shares[1][1]) == int(shares[0][2])
    assert all(int(share[1]) < 0.52 * int(share[2]) for share in shares)
