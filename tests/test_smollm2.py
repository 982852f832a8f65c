"""The tables of benchmarks/smollm2.py."""

import json

import pytest

from benchmarks import report, smollm2, smollm2_tables


def test_the_tables_are_those_of_the_kept_results(capsys):
    smollm2.main(["--dry-run"])
    page = capsys.readouterr().out.strip()
    title = "## A language model: SmolLM2-135M-Instruct"
    assert f"{title}\n\n{page}\n" in report.RESULTS.read_text()


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    smollm2_tables.picture(json.loads(smollm2.RESULTS.read_text()), tmp_path / "phi.png")
    assert (tmp_path / "phi.png").stat().st_size > 10_000


def test_runs_that_were_made_twice_say_how_far_they_are_apart():
    def made(*losses):
        return {"LoRA": {seed: {"held out": loss} for seed, loss in enumerate(losses)}}

    sentence = smollm2_tables.repetition(made(1.0, 1.0), made(1.001, 1.005), [])
    assert sentence.startswith("2 runs") and "deviation of 2.0, by 5.0 at most" in sentence
