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


def test_every_contender_has_a_row_and_its_raw_results(monkeypatch, tmp_path, capsys):
    out = tmp_path / "cost.json"
    names = ["PEFT's LoRA", "our LoRA", "HypLoRA"]
    run(monkeypatch, "step", "decode", "--length", "8", "--out", str(out), "--only", *names)
    step, decode = json.loads(out.read_text())
    assert step["failed"] == decode["failed"] == {}
    assert list(step["results"]) == list(decode["results"]) == names
    assert len(step["results"]["HypLoRA"]["step"]) == 2
    assert len(decode["results"]["HypLoRA"]["token"]) == 2
    printed = capsys.readouterr().out
    assert printed.count("| PEFT's LoRA | ") == 2 and "1.00 (1.00 to 1.00)" in printed


def test_a_contender_that_fails_is_a_row_that_says_why(monkeypatch, capsys):
    def fail(model):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(cost.CONTENDERS, "HypLoRA", fail)
    run(monkeypatch, "step", "--length", "8", "--only", "our LoRA", "HypLoRA")
    assert "| HypLoRA: RuntimeError: out of luck |" in capsys.readouterr().out


def test_a_ratio_is_taken_within_rounds():
    results = {"a": {"step": [2.0, 40.0, 3.0]}, "b": {"step": [1.0, 10.0, 1.0]}}
    assert cost.ratio(results, "a", "b", "step") == "3.00 (2.50 to 3.50)"
    assert cost.ratio(results, "a", "missing", "step") == ""
