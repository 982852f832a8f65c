"""studies/cost.py on a CPU, with a model of two blocks."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")

from studies import cost

torch.set_num_threads(1)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cost", *arguments, "--shape", "toy", "--rounds", "2"])
    cost.main()


@pytest.mark.parametrize(("part", "key"), [("step", "step"), ("decode", "token")])
def test_every_contender_has_a_row_and_its_raw_results(monkeypatch, tmp_path, capsys, part, key):
    out = tmp_path / "cost.json"
    names = ["PEFT's LoRA", "our LoRA", "HypLoRA"]
    run(monkeypatch, part, "--length", "8", "--out", str(out), "--only", *names)
    (record,) = json.loads(out.read_text())
    assert list(record["results"]) == names
    assert len(record["results"]["HypLoRA"][key]) == 2
    printed = capsys.readouterr().out
    assert printed.count("| PEFT's LoRA | ") == 1 and "1.00 (1.00 to 1.00)" in printed


def test_a_ratio_is_taken_within_rounds():
    results = {"our LoRA": {"token": [1.0, 10.0, 1.0]}, "HypLoRA": {"token": [2.0, 40.0, 3.0]}}
    row = cost.make_row(results["HypLoRA"], {"results": results, "tokens": 1})
    assert row == {"ms a token": "3000.0", "token over our LoRA": "3.00 (2.50 to 3.50)"}
