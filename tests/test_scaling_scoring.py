"""The scoring rules of scaling/ against the authors' rules, written down here a second time.

pip install transformers
"""

import argparse
import json
import random
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers
from conftest import CHATML, END, byte_tokenizer, write_folder, write_sums

from scaling import finetune, scoring
from scaling.data import Prompts, Record, read_records
from scaling.scoring import averages, is_right, pattern_of

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "output, answer, right",
    [
        ("5 and 7 make 12. The answer is 1,200.", "1200.0", True),
        ("The answer is -3.5", "-3.5", True),
        ("12, or rather 13", "12", False),
        ("no number", "12", False),
        ("0.3334", "0.333", True),
        ("0.335", "0.333", False),
        ("The answer is 0", "0", True),
        ("the answer is (D).", "D", True),
        ("(A) or (C)", "A", True),
        ("so it is B", "B", True),
        ("A guess. The answer is (D).", "D", False),  # The rule takes the A of the first word.
        ("the correct answer is True", "true", True),
        ("the correct answer is true, not false", "true", True),
        ("not false but true", "true", False),
        ("It is Solution2.", "solution2", True),
        ("answer3 rather than answer1", "answer3", True),
        ("answer3 rather than answer1", "answer1", False),
        ("ending4", "ending4", True),
        ("option1", "option2", False),
        ("nothing", "option2", False),
    ],
)
def test_the_rules(output, answer, right):
    assert is_right(output, answer) is right


@pytest.mark.parametrize(
    "output, answer, right",
    [
        ("(A) or (C)", "C", True),
        ("A guess. The answer is (D).", "D", True),
        (r"\boxed{B} (C)", "B", True),
        (r"\boxed{\text{(E)}}", "E", True),
        ("The answer is: C", "C", True),
        ("Option D", "D", True),
        ("A", "A", False),
    ],
)
def test_the_released_rule_for_letters(output, answer, right):
    assert is_right(output, answer, letters="released") is right


SETS = {
    "number": ["12", "-3.5", "1200.0"],
    "letter": ["A", "B", "E"],
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "arc": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
}


def by_their_rule(kind, output, answer):
    if kind == "number":
        found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
        return abs(float(answer) - (float(found[-1]) if found else float("inf"))) <= 0.001
    if kind == "letter":
        found = re.findall(r"A|B|C|D|E", output.strip())
        return (found[0] if found else "") == answer
    found = re.findall("|".join(SETS[kind]), output.strip().lower())
    return (found[0] if found else "") == answer


@pytest.mark.parametrize("kind", SETS)
def test_verdicts_agree_with_the_authors_rule_on_random_outputs(kind):
    rng = random.Random(0)
    pieces = ["The answer is ", "(", ")", ". ", "1,200", "-3.5", " 12 ", "Because ", "True", "\n"]
    pieces += [*SETS[kind], *(word.upper() for word in SETS[kind])]
    rights = 0
    for _ in range(500):
        output = "".join(rng.choices(pieces, k=rng.randrange(6)))
        answer = rng.choice(SETS[kind])
        right = is_right(output, answer)
        assert right == by_their_rule(kind, output, answer), (output, answer)
        rights += right
    assert 20 < rights < 480


@pytest.mark.parametrize(
    "answer", ["", "maybe", "F", "a", "nan", "inf", "1/2", "12 apples", "answer6"]
)
def test_an_answer_that_nobody_could_score_is_refused(answer):
    with pytest.raises(ValueError, match="cannot be scored"):
        pattern_of(answer)


def test_the_averages_are_micro_for_arithmetic_and_macro_for_commonsense():
    results = [
        (["1"] * 8, [True] * 3 + [False] * 5),
        (["A", "B"], [True, True]),
        (["true", "false"], [True, False]),
        (["solution1"] * 8, [True] * 8),
    ]
    assert averages(results) == {"M.AVG": pytest.approx(50.0), "AVG": pytest.approx(75.0)}
    assert averages([]) == {}


# --- Generation ---------------------------------------------------------------------------------


def greedy_alone(model, ids, count):
    """The likeliest token at each step, of one prompt without padding or cache."""
    ids = list(ids)
    new = []
    while len(new) < count and END not in new:
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return byte_tokenizer().decode([token for token in new if token != END])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_means_greedy_and_answers_come_back_in_order(family, tmp_path):
    """The folder asks for sampling, a penalty and a length; a batch has padding on the left."""
    folder = Path(write_folder(tmp_path / "model", family))
    asked = dict(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, min_length=300)
    (folder / "generation_config.json").write_text(json.dumps(asked | {"eos_token_id": END}))
    argv = ["--checkpoint", str(folder), "--data", "x", "--device", "cpu", "--max-new-tokens", "8"]
    args = finetune.parse_arguments(argv)
    model = finetune.place(finetune.load_base(args), args)
    prompts = Prompts(byte_tokenizer(), [END], "alpaca")
    lines = [{"instruction": "word " * i, "answer": "0"} for i in (5, 1, 9, 3)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(lines))
    records = read_records(str(data), prompts)
    answers = scoring.generate_answers(model, records, prompts, args, "")
    assert answers == [greedy_alone(model, record.prompt_ids, 8) for record in records]
    assert len(set(answers)) > 1
    args.beams = 3
    together = scoring.generate_answers(model, records, prompts, args, "")
    for record, answer in zip(records, together):
        assert scoring.generate_answers(model, [record], prompts, args, "") == [answer]


@pytest.mark.parametrize("beams", [1, 4])
def test_batches_have_few_tokens(beams):
    """A model and a tokenizer that only write down what they are given."""
    seen = []
    model = argparse.Namespace(eval=lambda: None)
    model.generate = lambda input_ids, **_: seen.append(input_ids) or input_ids
    prompts = argparse.Namespace(stop=[END], end=END, decode=lambda row: "")
    args = argparse.Namespace(max_new_tokens=100, beams=beams, device="cpu")
    lengths = [20, 9000, 30, 900, 700] + 80 * [50]
    records = [Record(1, [7] * length, [], "") for length in lengths]
    scoring.generate_answers(model, records, prompts, args, "")
    assert sum(len(ids) for ids in seen) == 85 and seen[0].shape == (1, 9000)
    for ids in seen:
        assert len(ids) == 1 or len(ids) * (ids.shape[1] + 100) * beams <= 16384
    assert max(len(ids) for ids in seen) > 60 / beams


# --- The table, the predictions, and a saved adapter --------------------------------------------


def test_predictions_and_a_saved_adapter_that_knows_how_it_was_trained(tmp_path):
    folder = write_folder(tmp_path / "model", chat_template=CHATML)
    tests = []
    for name in ("gsm8k", "SVAMP"):
        (tmp_path / name).mkdir()
        tests.append(write_sums(tmp_path / name / "test.json", count=4))
    words = tmp_path / "boolq.json"
    words.write_text(json.dumps([{"instruction": "Is it?", "input": "", "answer": True}] * 2))
    said = tmp_path / "said.jsonl"
    scored = ["--eval", *tests, str(words), "--predictions", str(said), "--max-new-tokens", "3"]
    argv = ["--checkpoint", folder, "--device", "cpu", *scored]
    train = ["--data", write_sums(tmp_path / "sums.json"), "--steps", "20", "--lr", "1e-2"]
    out = tmp_path / "out"
    more = ["--template", "alpaca", "--out", str(out), "--curvature", "0.5"]
    base, adapted = finetune.main([*argv, *train, *more])
    sets = [f"% {path.removesuffix('.json')}" for path in (*tests, str(words))]
    columns = [*sets, "M.AVG", "AVG"]
    assert list(base) == ["adapter", "trainable", "share %", "loss", *columns]
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert len(lines) == 2 * (4 + 4 + 2)
    assert [line["record"] for line in lines[:5]] == [1, 2, 3, 4, 1]
    assert lines[-1]["answer"] == "true" and lines[-1]["adapter"] == "HypLoRA-0.5"
    adapter = str(out / "HypLoRA-0.5.pt")
    (only,) = finetune.main([*argv, "--score-only", adapter])
    again = [json.loads(line)["output"] for line in said.read_text().splitlines()]
    outputs = [line["output"] for line in lines]
    assert again == outputs[10:] != outputs[:10]
    assert {column: only[column] for column in columns} == {c: adapted[c] for c in columns}
    with pytest.raises(SystemExit, match="was trained with --template alpaca: leave it out"):
        finetune.main([*argv, "--score-only", adapter, "--template", "chat"])
    other = write_folder(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="was trained on another base"):
        finetune.main([*argv, "--score-only", adapter, "--checkpoint", other])
    with pytest.raises(SystemExit, match="none.pt"):
        finetune.main([*argv, "--score-only", str(out / "none.pt")])
    (out / "options.json").unlink()
    with pytest.raises(SystemExit, match="options.json"):
        finetune.main([*argv, "--score-only", adapter])


def test_the_fingerprint_knows_another_base_and_not_another_dtype(tmp_path):
    folder = write_folder(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    before = finetune.fingerprint(model)
    assert finetune.fingerprint(load(folder, dtype=torch.float32)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.1
    assert finetune.fingerprint(model) != before


def test_a_folder_that_lacks_a_tensor_ends_the_run(tmp_path):
    folder = write_folder(tmp_path / "model", num_hidden_layers=1)
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    args = finetune.parse_arguments(["--checkpoint", folder, "--data", "x", "--device", "cpu"])
    with pytest.raises(SystemExit, match="lacks the tensors .*layers.1"):
        finetune.load_base(args)


def test_the_adapter_is_saved_before_it_is_scored(llama, tmp_path, monkeypatch):
    def fails(model, name, *rest):
        if name != "base":
            raise RuntimeError("out of memory")
        return {}

    monkeypatch.setattr(finetune, "score", fails)
    argv = ["--checkpoint", llama, "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune.main([*argv, "--data", write_sums(tmp_path / "sums.json"), "--steps", "1"])
    assert (tmp_path / "out" / "LoRA.pt").exists()
