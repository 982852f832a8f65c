"""The scoring rules of scaling/ against the authors' rules, written down here a second time.

pip install safetensors tokenizers
"""

import json
import random
import re

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

from benchmarks.small_checkpoint import END, write_small_checkpoint, write_sums
from scaling import finetune
from scaling.checkpoint import from_checkpoint
from scaling.records import Tokens, read_records
from scaling.scoring import answer_kind, averages, generate_answers, greedy, is_right

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
        answer_kind(answer)


def test_the_averages_are_micro_for_arithmetic_and_macro_for_commonsense():
    results = {
        "gsm8k": ("number", [True] * 3 + [False] * 5),
        "aqua": ("number", [True, True]),
        "boolq": ("word", [True, False]),
        "piqa": ("word", [True] * 8),
    }
    assert averages(results) == {"M.AVG": pytest.approx(50.0), "AVG": pytest.approx(75.0)}
    assert averages({}) == {}


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_come_back_in_the_order_of_the_records(beams, tmp_path):
    folder = write_small_checkpoint(tmp_path / "model")
    tokens = Tokens(str(folder))
    model = from_checkpoint(str(folder), torch.float32, torch.device("cpu"))
    data = tmp_path / "data.json"
    lines = []
    for i in (5, 1, 9, 3):
        lines.append({"instruction": "word " * i, "answer": "0"})
    data.write_text(json.dumps(lines))
    records = read_records(str(data), tokens, for_scoring=True)
    cpu = torch.device("cpu")
    together = generate_answers(model, records, tokens, 4, 6, cpu, "", beams)
    alone = [generate_answers(model, [r], tokens, 1, 6, cpu, "", beams)[0] for r in records]
    assert together == alone
    assert len(set(alone)) > 1


def test_generation_ends_at_the_end_token_and_the_answer_is_what_stands_before(tmp_path):
    folder = write_small_checkpoint(tmp_path / "model", eos_token_id=[65, END])
    tokens = Tokens(str(folder))
    assert tokens.decode([66, 67, 65, 66]) == tokens.tokenizer.decode([66, 67])
    model = from_checkpoint(str(folder), torch.float32, torch.device("cpu"))
    with torch.no_grad():  # A model that says nothing but token 65 stops after one.
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        ids = torch.tensor([[1, 2, 3]])
        assert greedy(model, ids, 5, stop=(0,)).tolist() == [[1, 2, 3, 0]]


def test_predictions_columns_and_score_only(tmp_path, capsys):
    write_small_checkpoint(tmp_path / "model")
    data = str(write_sums(tmp_path / "sums.json"))
    tests = []
    for name in ("gsm8k", "SVAMP"):
        (tmp_path / name).mkdir()
        tests.append(str(write_sums(tmp_path / name / "test.json", count=4)))
    words = tmp_path / "boolq.json"
    words.write_text(json.dumps([{"instruction": "Is it?", "input": "", "answer": True}] * 2))
    argv = ["--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path)]
    argv += ["--max-new-tokens", "3"]
    scoring = ["--eval", *tests, str(words), "--predictions", str(tmp_path / "said.jsonl")]
    train = ["--data", data, "--steps", "2", "--adapter", "hyplora"]
    base, adapted = finetune.main([*argv, *train, *scoring])
    assert list(base["metrics"]) == [
        "loss",
        "% gsm8k/test",
        "% SVAMP/test",
        "% boolq",
        "M.AVG",
        "AVG",
    ]
    lines = [json.loads(line) for line in open(tmp_path / "said.jsonl", encoding="utf-8")]
    assert len(lines) == 2 * (4 + 4 + 2)
    assert [line["record"] for line in lines[:5]] == [1, 2, 3, 4, 1]
    assert lines[-1]["answer"] == "true" and lines[-1]["adapter"] == "HypLoRA 0.5"
    trained = lines[10:]
    (only,) = finetune.main([*argv, "--score-only", adapted["path"], *scoring])
    lines = [json.loads(line) for line in open(tmp_path / "said.jsonl", encoding="utf-8")]
    assert [line["output"] for line in lines] == [line["output"] for line in trained]
    for column, value in only["metrics"].items():
        assert value == adapted["metrics"][column]


def test_the_adapter_is_saved_before_it_is_scored(tmp_path, monkeypatch):
    write_small_checkpoint(tmp_path / "model")
    data = str(write_sums(tmp_path / "sums.json"))

    def fails(self, model, adapter):
        if adapter != "base":
            raise RuntimeError("out of memory")
        return {}

    monkeypatch.setattr(finetune.Scorer, "__call__", fails)
    argv = ["--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune.main([*argv, "--data", data, "--steps", "1", "--adapter", "lora"])
    assert len(list(tmp_path.glob("sums-lora-*.pt"))) == 1
