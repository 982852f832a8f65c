"""The benchmarks of many processes: what they measure, and what they call the same.

pip install safetensors tokenizers
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

from benchmarks.agree import Runs, difference, loss_difference
from benchmarks.kill_and_resume import TORCHRUN, prepare
from benchmarks.large_checkpoint import RECORDS, write_large_checkpoint, write_records
from benchmarks.processes import RANK, SHAPES, STEP, TARGETS, Table
from hyplora import hyplora_parameters, inject_hyplora
from scaling.checkpoint import DEFAULTS, build_config, from_checkpoint
from scaling.decoder import Decoder
from scaling.records import Tokens, read_records

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def on_two(*arguments):
    """What two processes of torchrun print."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *TORCHRUN, "2", *arguments],
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
    layouts = [["whole", "1"], ["replicated", "2"], ["sharded", "2"]]
    assert heads == [[name, *rest] for rest in layouts for name in ("our LoRA", "HypLoRA")]
    for row in rows:
        speed, over_one, of_linear = (float(cell.replace(",", "")) for cell in row[3:6])
        assert speed > 0
        assert over_one == pytest.approx(int(row[2]) * of_linear, abs=0.02)


def test_a_row_has_all_cells_also_without_one_process_and_after_an_error():
    table = Table("title", "command", "notes", dry_run=True)
    table.add("HypLoRA", "sharded", 8, (1000.0, 20.0, 3.0))
    table.add("our LoRA", "one", 1, "out of memory")
    table.add("HypLoRA", "one", 1, (200.0, 0, 3.0))
    assert {line.count("|") for line in table.lines} == {9}


SHARDED = """
import os
import sys
from pathlib import Path

import torch
from benchmarks.processes import SHAPES, random_base
from scaling.checkpoint import DEFAULTS, build_config
from scaling.processes import end_processes, leave, start_processes

start_processes("cpu")
family, fields = SHAPES["toy"]
config = build_config(family, DEFAULTS[family] | fields)
model = random_base(config, torch.float32, torch.device("cpu"), sharded=True)
here = sum(parameter.to_local().numel() for parameter in model.parameters())
whole = sum(parameter.numel() for parameter in model.parameters())
finite = bool(model(torch.arange(8)[None]).isfinite().all())
Path(sys.argv[1], os.environ["RANK"]).write_text(f"{here} {whole} {finite}")
end_processes()
leave()
"""


def test_each_process_keeps_its_share_of_a_sharded_base(tmp_path):
    program = tmp_path / "sharded.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SHARDED}")
    on_two(str(program), str(tmp_path))
    for rank in range(2):
        here, whole, finite = (tmp_path / str(rank)).read_text().split()
        assert int(here) == int(whole) / 2
        assert finite == "True"


@pytest.mark.parametrize("shape, billions", [("7b", 7.616), ("70b", 70.554)])
def test_the_shapes_have_the_sizes_of_the_published_models(shape, billions):
    family, fields = SHAPES[shape]
    with torch.device("meta"):
        model = Decoder(build_config(family, DEFAULTS[family] | fields))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=1e-4)
        inject_hyplora(model, TARGETS, rank=RANK)
    assert sum(len(group["params"]) for group in hyplora_parameters(model)) == 3 * 5 * len(
        model.model.layers
    )
    assert STEP.keys() == SHAPES.keys()


def test_a_large_checkpoint_has_a_file_for_each_block_and_records_for_the_context(tmp_path):
    write_large_checkpoint(tmp_path, "toy", "cpu")
    write_records(tmp_path / "records.json")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    model = from_checkpoint(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert bool(model(torch.arange(8)[None]).isfinite().all())
    records = read_records(str(tmp_path / "records.json"), Tokens(str(tmp_path)))
    lengths = {len(record.prompt_ids + record.target_ids) for record in records}
    assert len(records) == RECORDS
    assert 900 < min(lengths) <= max(lengths) <= 1024


def test_differences_are_relative_and_the_largest():
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(4)}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(4)}
    assert difference(found, wanted) == pytest.approx(0.1)
    assert difference({"a": wanted["a"]}, wanted) == math.inf
    assert loss_difference([2.0, 1.1], [2.0, 1.0]) == pytest.approx(0.1)
    assert loss_difference([2.0], [2.0, 1.0]) == math.inf


def test_sigterm_stops_two_processes_and_one_goes_on(tmp_path):
    """Also on the way from a sharded base to a whole one: the state is the adapters' alone."""
    prepare(tmp_path)
    runs = Runs(tmp_path, "cpu")
    straight, _ = runs.run("straight", 1, False, 60)
    assert 6 <= runs.stop("stopped", 2, True, 60) < 60
    resumed, _ = runs.run("stopped", 1, False, 60, "--resume")
    assert difference(resumed, straight) < 1e-4
