"""Adapter files, whole state dicts, and files that are damaged, foreign or hostile."""

import copy
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from hyplora import (
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    save_hyplora,
    set_hyplora_state_dict,
)
from test_hyplora import IDS, QV, Toy, train

torch.set_num_threads(1)


def trained(targets="all-linear", **options):
    model = Toy()
    inject_hyplora(model, targets, **{"rank": 2, **options})
    train(model)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    """The file of an adapter on the two q_proj, with a new head."""
    save_hyplora(trained(["q_proj"], train_also=["classifier"]), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


# --- whole state dicts --------------------------------------------------------------------------


def test_a_state_dict_has_the_bases_names_and_the_adapters(tmp_path):
    model, base = trained(), Toy()
    names = {*QV, "shared"}
    own = {f"{name}.{key}" for name in names for key in ("lora_A", "lora_B", "lora_K")}
    assert model.state_dict().keys() == base.state_dict().keys() | own
    again = Toy()
    inject_hyplora(again, "all-linear", rank=2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))
    layer = model.blocks[0]["q_proj"]
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "lora_K"}
    layer.load_state_dict(layer.state_dict())


def test_a_checkpoint_of_the_base_loads_into_an_adapted_model():
    model, other = trained(), Toy()
    for p in other.parameters():
        nn.init.normal_(p)
    adapter = hyplora_state_dict(model)
    model.load_state_dict(other.state_dict())
    for name in QV:
        assert torch.equal(
            model.state_dict()[f"{name}.weight"], other.state_dict()[f"{name}.weight"]
        )
    assert all(torch.equal(hyplora_state_dict(model)[name], p) for name, p in adapter.items())


def test_a_checkpoint_that_lacks_a_part_of_an_adapter_is_refused():
    state = trained().state_dict()
    del state["blocks.0.v_proj.lora_B"]
    with pytest.raises(RuntimeError, match="blocks.0.v_proj.lora_B"):
        trained().load_state_dict(state)


@pytest.mark.parametrize(
    "wrap, times",
    [(torch.compile, 1), (nn.DataParallel, 2), (torch.optim.swa_utils.AveragedModel, 2)],
)
def test_wrappers_leave_no_prefix_in_the_names(wrap, times, tmp_path):
    model = trained()
    wrapped = model
    for _ in range(times):
        wrapped = wrap(wrapped)
    assert hyplora_state_dict(wrapped).keys() == hyplora_state_dict(model).keys()
    save_hyplora(wrapped, tmp_path / "adapter.pt")
    loaded = Toy()
    load_hyplora(loaded, tmp_path / "adapter.pt")
    assert torch.equal(loaded(IDS), model(IDS))
    load_hyplora(wrap(Toy()), tmp_path / "adapter.pt")


# --- adapter files ------------------------------------------------------------------------------


def test_a_bare_model_and_an_injected_one_load_the_same(tmp_path):
    model = trained(rank=4, alpha=5.0, curvature=1.0, dropout=0.1)
    save_hyplora(model, tmp_path / "adapter.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.pt"]
    injected = Toy()
    inject_hyplora(injected, "all-linear", rank=4, alpha=5.0, curvature=1.0)
    for other in (Toy(), injected):
        assert load_hyplora(other, tmp_path / "adapter.pt") == QV
        assert torch.equal(other.eval()(IDS), model(IDS))
        trainable = {name for name, p in other.named_parameters() if p.requires_grad}
        assert trainable == set(hyplora_state_dict(model))


def test_an_adapter_for_a_base_of_another_dtype(tmp_path):
    model = trained()
    save_hyplora(model, tmp_path / "adapter.pt")
    half = Toy().bfloat16()
    load_hyplora(half, tmp_path / "adapter.pt")
    adapter = hyplora_state_dict(half)
    assert all(torch.equal(adapter[name], p) for name, p in hyplora_state_dict(model).items())


def test_set_hyplora_state_dict_copies_all_or_nothing():
    model, other = trained(), trained()
    tensors = {name: p.clone() for name, p in hyplora_state_dict(trained(alpha=3.0)).items()}
    set_hyplora_state_dict(model, tensors)
    assert all(torch.equal(p, tensors[name]) for name, p in hyplora_state_dict(model).items())
    tensors[f"{QV[-1]}.lora_B"] = torch.ones(3)
    before = {name: p.clone() for name, p in hyplora_state_dict(other).items()}
    with pytest.raises(ValueError, match=f"{QV[-1]}.lora_B should be"):
        set_hyplora_state_dict(other, tensors)
    assert all(torch.equal(p, before[name]) for name, p in hyplora_state_dict(other).items())


def test_tensors_without_numbers_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject_hyplora(model, "all-linear")
    with pytest.raises(ValueError, match="0.lora_A is on the meta device"):
        save_hyplora(model, tmp_path / "adapter.pt")
    assert not list(tmp_path.iterdir())


# --- hostile files ------------------------------------------------------------------------------


def refused(path, message, error=ValueError, bare=True):
    """Loading raises an error that matches, and leaves the model bit for bit as it was."""
    model = Toy() if bare else trained(["q_proj"], train_also=["classifier"])
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        load_hyplora(model, path)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (p, requires_grad) in before.items():
        assert torch.equal(after[name], p) and after[name].requires_grad == requires_grad


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_no_file_and_a_folder(path):
    refused(path.parent / "elsewhere.pt", "No such file", FileNotFoundError)
    refused(path.parent, "directory", IsADirectoryError)


def test_files_that_are_damaged_or_not_ours(path):
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-200], whole[:1000]):
        path.write_bytes(content)
        refused(path, "adapter.pt is damaged or doesn't fit")
    for content in ({"weight": torch.ones(2)}, [1], 7, {"layers": 7, "tensors": {}}):
        torch.save(content, path)
        refused(path, "adapter.pt is damaged or doesn't fit")


class Payload:
    """A pickle with code in it: to read it without care would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_does_not_run(path):
    torch.save(Payload(path.parent / "owned"), path)
    refused(path, "damaged")
    assert not (path.parent / "owned").exists()


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "adapted"])
def test_tensors_that_do_not_fit(path, bare):
    whole = path.read_bytes()
    wrong = {
        "blocks.0.q_proj.lora_A": [torch.ones(2, 9), "hello", None, torch.full((2, 8), math.nan)],
        "blocks.0.q_proj.lora_B": [torch.full((8, 2), math.inf), [1.0]],
        "blocks.0.q_proj.lora_K": [torch.tensor([-math.inf]), torch.tensor(0.0)],
        "classifier.weight": [torch.ones(1)],
    }
    for name, values in wrong.items():
        for value in values:
            path.write_bytes(whole)
            edit(path, lambda content: content["tensors"].update({name: value}))
            refused(path, f"{name} should be", bare=bare)
    path.write_bytes(whole)
    edit(path, lambda content: content["tensors"].pop("blocks.0.q_proj.lora_B"))
    refused(path, "blocks.0.q_proj.lora_B is missing", bare=bare)
    path.write_bytes(whole)
    edit(path, lambda content: content["tensors"].update(spy=torch.ones(2)))
    refused(path, "spy is not of this model", bare=bare)


def test_options_that_are_missing_unknown_or_out_of_range(path):
    whole = path.read_bytes()
    changes = {
        "rank": lambda options: options.pop("rank"),
        "'x'": lambda options: options.update(x=1),
        "alpha must be": lambda options: options.update(alpha=-1),
        "curvature must be": lambda options: options.update(curvature="flat"),
    }
    for message, change in changes.items():
        path.write_bytes(whole)
        edit(path, lambda content: change(content["layers"]["blocks.0.q_proj"]))
        refused(path, message)


def test_layers_that_the_model_does_not_have(path):
    edit(path, lambda content: content["layers"].update({"elsewhere": {}}))
    refused(path, "elsewhere is not here to be adapted")
    refused(path, "elsewhere is not here to be adapted", bare=False)


def test_an_adapter_of_another_rank_alpha_curvature_or_place(path, tmp_path):
    for options in (dict(rank=4), dict(alpha=3.0), dict(curvature=2.0), dict(max_radius=5.0)):
        model = Toy()
        inject_hyplora(model, ["q_proj"], train_also=["classifier"], **{"rank": 2, **options})
        with pytest.raises(ValueError, match=f"{next(iter(options))} of blocks.0.q_proj is"):
            load_hyplora(model, path)
    for targets, message in (
        (["v_proj"], "q_proj is not here"),
        ("all-linear", "is missing"),
    ):
        model = Toy()
        inject_hyplora(model, targets, train_also=["classifier"], rank=2)
        with pytest.raises(ValueError, match=message):
            load_hyplora(model, path)


def test_a_head_in_the_file_and_none_in_the_model(path):
    model = Toy()
    inject_hyplora(model, ["q_proj"], rank=2)
    with pytest.raises(ValueError, match="classifier.* is not of this model"):
        load_hyplora(model, path)


def test_an_adapter_of_a_layer_that_is_not_linear_here(tmp_path):
    source = nn.Sequential(nn.Linear(8, 8))
    inject_hyplora(source, "all-linear", rank=2)
    nn.init.normal_(source[0].lora_B)
    save_hyplora(source, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="Conv2d"):
        load_hyplora(nn.Sequential(nn.Conv2d(8, 8, 1)), tmp_path / "adapter.pt")


# --- saving that is cut short -------------------------------------------------------------------

SAVES_FOREVER = """
import sys, torch, torch.nn as nn
from hyplora import inject_hyplora, save_hyplora
model = nn.Sequential(nn.Linear(512, 512))
inject_hyplora(model, "all-linear", rank=64)
for value in range(1, 10**9):
    nn.init.constant_(model[0].lora_B, value)
    save_hyplora(model, sys.argv[1])
    print(value, flush=True)
"""


def test_a_killed_save_leaves_a_whole_file(tmp_path):
    path = tmp_path / "adapter.pt"
    command = [sys.executable, "-W", "ignore", "-c", SAVES_FOREVER, path]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    for _ in range(5):
        saved = int(process.stdout.readline())
    time.sleep(0.02 * random.Random(0).random())
    process.kill()
    saved = int((process.stdout.read().split() or [saved])[-1])
    model = nn.Sequential(nn.Linear(512, 512))
    load_hyplora(model, path)
    values = model[0].lora_B.unique()
    assert len(values) == 1 and values.item() in (saved, saved + 1)


def test_a_save_that_fails_keeps_the_old_file(path, monkeypatch):
    old = path.read_bytes()

    def disk_full(content, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_hyplora(trained(), path)
    assert [file.name for file in path.parent.iterdir()] == ["adapter.pt"]
    assert path.read_bytes() == old


def test_deepcopies_and_pickles_keep_the_names():
    model = copy.deepcopy(trained())
    assert "blocks.0.q_proj.weight" in model.state_dict()
    model.load_state_dict(trained().state_dict())
