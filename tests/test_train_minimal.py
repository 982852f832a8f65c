"""The toy: its sums, its model, and the whole script at its smallest."""

import math

import pytest
import torch

import train_minimal

torch.set_num_threads(1)


@pytest.mark.parametrize("task", train_minimal.TASKS)
def test_sums_are_right_and_held_out_pairs_are_apart(task):
    pairs = {}
    for held_out in (True, False):
        generator = torch.Generator().manual_seed(0)
        numbers = train_minimal.pairs_of_numbers(held_out)
        sums = train_minimal.make_sums(task, numbers, generator)
        for row in sums[::17].tolist():
            question, answer = train_minimal.show(row).split("=")
            terms = question.replace("-", "+-").split("+")
            assert sum(int(term) for term in terms) == int(answer) and len(answer) == 3
        texts = [train_minimal.show(row) for row in sums.tolist()]
        pairs[held_out] = {frozenset((text[:2], text[3:5])) for text in texts}
    assert not pairs[True] & pairs[False] and len(pairs[True] | pairs[False]) == 5050


def test_the_worked_example_of_the_encoding():
    row = train_minimal.make_sums("add", torch.tensor([[12, 34]]), torch.Generator())[0]
    assert row.tolist() == [1, 2, 10, 3, 4, 12, 6, 4, 0]
    assert train_minimal.show(row.tolist()) == "12+34=046"


def test_answers_are_the_most_likely_digits_and_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = train_minimal.GPT(width=16, layers=1, heads=4)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    questions = torch.randint(13, (3, 6))
    longer = model.answer(questions)
    for digit in range(3):
        expected = model(longer[:, : 6 + digit])[:, -1].argmax(dim=-1)
        assert torch.equal(longer[:, 6 + digit], expected)
    torch.testing.assert_close(model(longer)[:, :6], model(questions))


def test_rotary_positions_are_relative():
    q, k = torch.randn(2, 1, 1, 5, 8)
    here = torch.arange(5)
    scores = train_minimal.rotate(q, here) @ train_minimal.rotate(k, here).transpose(-1, -2)
    later = train_minimal.rotate(q, here + 7) @ train_minimal.rotate(k, here + 7).transpose(-1, -2)
    torch.testing.assert_close(scores, later)
    assert not torch.allclose(scores, q @ k.transpose(-1, -2), atol=1e-3)


SMALL = "--width 16 --layers 1 --base-steps 8 --steps 6 --batch-size 16".split()


def test_the_script_at_its_smallest(tmp_path, capsys):
    argv = [*SMALL, "--seeds", "2", "--curvature", "0.5", "1", "--out", str(tmp_path)]
    rows = train_minimal.main(argv)
    names = [row["adapter"] for row in rows]
    assert names[1:] == 2 * ["LoRA"] + 2 * ["HypLoRA 0.5"] + 2 * ["HypLoRA 1"]
    assert len({row["% add, adapter off"] for row in rows}) == 1
    assert rows[3]["parameters"] == rows[1]["parameters"] + 7  # one K for each layer
    printed = capsys.readouterr().out
    assert "± " in printed and "mean and spread:\n  q_proj     1." in printed
    assert "loaded into the frozen base, answers " in printed
    assert len(list(tmp_path.glob("subtract-*.pt"))) == 6
    again = train_minimal.main(argv)
    for first, second in zip(rows, again):  # The same seeds give the same table.
        first.pop("seconds")
        second.pop("seconds")
        assert first == second


def test_calibration_can_be_left_out(tmp_path):
    train_minimal.main([*SMALL, "--out", str(tmp_path / "measured")])
    train_minimal.main([*SMALL, "--no-calibrate", "--out", str(tmp_path / "guessed")])
    files = [tmp_path / kind / "subtract-HypLoRA-0.5-0.pt" for kind in ("measured", "guessed")]
    measured, guessed = (torch.load(file, weights_only=True)["tensors"] for file in files)
    name = "blocks.0.mlp.down_proj.lora_unit"
    assert guessed[name].item() == pytest.approx(42**0.5) != measured[name].item()


def test_a_real_model_is_handed_over(monkeypatch):
    from scaling import finetune

    heard = []
    monkeypatch.setattr(finetune, "main", heard.append)
    train_minimal.main(["--checkpoint", "somewhere", "--data=records.json"])
    assert heard == [["--checkpoint", "somewhere", "--data=records.json"]]


def test_the_table_has_a_mean_and_a_spread_over_seeds():
    rows = [
        {"adapter": "none", "%": 0.0},
        {"adapter": "A", "%": 90.0},
        {"adapter": "A", "%": 100.0},
    ]
    lines = train_minimal.table(rows).splitlines()
    assert lines[2:] == ["| none | 0.0 |", f"| A | 95.0 ± {math.sqrt(50):.1f} |"]
