"""The benchmark of many processes: what it measures.

pip install safetensors tokenizers
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

from benchmarks.processes import RANK, SHAPES, STEP, TARGETS, Table
from hyplora import hyplora_parameters, inject_hyplora
from scaling.checkpoint import DEFAULTS, build_config
from scaling.decoder import Decoder

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def on_two(*arguments):
    """What two processes of torchrun print."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *TWO, *arguments],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_table_has_a_row_of_each_adapter_and_layout():
    text = on_two("-m", "benchmarks.processes", "--shape", "toy", "--steps", "2", "--dry-run")
    rows = [line.split("|")[1:] for line in text.splitlines() if line.startswith("| ")]
    heads = [[cell.strip() for cell in row[:3]] for row in rows]
    layouts = [["whole", "1"], ["replicated", "2"]]
    assert heads == [[name, *rest] for rest in layouts for name in ("our LoRA", "HypLoRA")]
    for row in rows:
        speed, over_one, of_linear = (float(cell.replace(",", "")) for cell in row[3:6])
        assert speed > 0
        assert over_one == pytest.approx(int(row[2]) * of_linear, abs=0.02)


def test_a_row_has_all_cells_also_without_one_process_and_after_an_error():
    table = Table("title", "command", "notes", dry_run=True)
    table.add("HypLoRA", "replicated", 8, (1000.0, 20.0, 3.0))
    table.add("our LoRA", "one", 1, "out of memory")
    table.add("HypLoRA", "one", 1, (200.0, 0, 3.0))
    assert {line.count("|") for line in table.lines} == {9}


def test_the_shape_has_the_size_of_the_published_model():
    family, fields = SHAPES["7b"]
    with torch.device("meta"):
        model = Decoder(build_config(family, DEFAULTS[family] | fields))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.616e9, rel=1e-4)
        inject_hyplora(model, TARGETS, rank=RANK)
    assert sum(len(group["params"]) for group in hyplora_parameters(model)) == 3 * 5 * len(
        model.model.layers
    )
    assert STEP.keys() == SHAPES.keys()
