"""The toy: its sums, its model, and the whole script at its smallest."""

import math
import re

import pytest
import torch

import train_minimal

torch.set_num_threads(1)


@pytest.mark.parametrize("sign", "+-")
def test_sums_are_right_and_held_out_pairs_are_apart(sign):
    pairs = {}
    for held_out in (True, False):
        sums = train_minimal.make_sums(sign, held_out)
        pairs[held_out] = set()
        for row in sums:
            question = train_minimal.characters(row[:6])
            a, b = re.fullmatch(r"(\d\d)[+-](\d\d)=", question).groups()
            answer = train_minimal.characters(row[6:].flip(0))
            expected = {"+": int(a) + int(b), "-": int(a) - int(b)}[question[2]]
            assert question[2] == sign and len(answer) == 3 and int(answer) == expected
            pairs[held_out].add(frozenset((a, b)))
    assert not pairs[True] & pairs[False] and len(pairs[True] | pairs[False]) == 5050
    assert 0.08 < len(pairs[True]) / 5050 < 0.12


def test_the_worked_example_of_the_encoding():
    expected = [1, 2, 10, 3, 4, 12, 6, 4, 0]
    rows = [train_minimal.make_sums("+", held_out).tolist() for held_out in (True, False)]
    assert expected in rows[0] + rows[1]
    assert train_minimal.characters(torch.tensor(expected)) == "12+34=640"


def test_answers_are_the_most_likely_digits_and_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = train_minimal.GPT()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    questions = torch.randint(13, (3, 6))
    answers = model.answer(questions)
    longer = torch.cat([questions, answers], dim=1)
    for digit in range(3):
        expected = model(longer[:, : 6 + digit])[:, -1].argmax(dim=-1)
        assert torch.equal(answers[:, digit], expected)
    torch.testing.assert_close(model(longer)[:, :6], model(questions))


def test_answers_are_scored_by_all_three_digits():
    sums = train_minimal.make_sums("+", held_out=True)[:4]

    class Half(train_minimal.GPT):
        def answer(self, questions):
            wrong = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
            return (sums[:, 6:] + wrong) % 10

    assert train_minimal.percent_right(Half(), sums) == 50


def test_the_script_at_its_smallest(tmp_path, capsys):
    argv = "--base-steps 8 --steps 6 --seeds 2 --curvature 0.5 inf 1e9".split()
    rows = train_minimal.main([*argv, "--out", str(tmp_path / "out")])
    names = [row["adapter"] for row in rows]
    assert names[1:] == 2 * ["LoRA"] + 2 * ["HypLoRA 0.5"] + 2 * ["HypLoRA 1e+09"]
    assert len({row["% a+b, adapter off"] for row in rows}) == 1
    assert rows[3]["parameters"] == rows[1]["parameters"] + 7  # one K for each layer
    printed, errors = capsys.readouterr()
    mean = (rows[1]["% a-b"] + rows[2]["% a-b"]) / 2
    spread = abs(rows[1]["% a-b"] - rows[2]["% a-b"]) / math.sqrt(2)
    assert f" | {mean:.1f} ± {spread:.1f} | " in printed
    assert errors == "" and "\r" not in printed and printed.count("step   6 of 6") == 6
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", printed)]
    assert losses[10:] == pytest.approx(losses[2:6], abs=2e-4)  # So flat a HypLoRA is LoRA.
    assert all(before - after > 0.05 for before, after in zip(losses[::2], losses[1::2]))
    saved = torch.load(tmp_path / "out/HypLoRA-0.5-1.pt")
    assert saved["layers"]["mlp.up_proj"] == dict(rank=16, alpha=64, dropout=0, curvature=0.5)
    assert saved["tensors"]["mlp.down_proj.lora_unit"].item() != pytest.approx(170**0.5)
    assert len(re.findall(r"updates are 1\.\d\d times as long", printed)) == 2
    asked = re.findall(r"^\| (\d\d-\d\d=)(?: \| \d{3}){4} \|$", printed, re.MULTILINE)
    held_out = train_minimal.make_sums("-", held_out=True)[100:400:100]
    assert asked == [train_minimal.characters(row[:6]) for row in held_out]
    score = re.search(r"Read back from .*HypLoRA-1e.09-1.pt: (.*) % a-b", printed)[1]
    assert score == f"{rows[-1]['% a-b']:.1f}" and len(list(tmp_path.glob("out/*.pt"))) == 6


def test_a_real_model_is_handed_over(monkeypatch):
    from scaling import finetune

    heard = []
    monkeypatch.setattr(finetune, "main", heard.append)
    train_minimal.main(["--checkpoint", "somewhere", "--data=records.json"])
    assert heard == [["--checkpoint", "somewhere", "--data=records.json"]]


def test_the_effect_is_the_mean_over_layers_and_seeds():
    first = {"a": {"phi": 1.1, "phi_spread": 0.3}, "b": {"phi": 1.2, "phi_spread": 0.1}}
    second = {"a": {"phi": 1.3, "phi_spread": 0.0}, "b": {"phi": 1.6, "phi_spread": 0.0}}
    said = train_minimal.what_it_did("HypLoRA 1", [first, second])
    assert said.startswith("HypLoRA 1: updates are 1.30 times as long")
    assert "varies by ± 0.10." in said
