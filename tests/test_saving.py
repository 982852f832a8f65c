"""Adapter files: what trains is in them, and damaged, foreign and hostile ones change nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import hyplora
from hyplora import hyplora_state_dict, load_hyplora, save_hyplora
from test_hyplora import IDS, Toy, adapted, assert_unchanged, snapshot, train

torch.set_num_threads(1)


def trained(targets=("q_proj",), **options):
    """Adapters on the two q_proj, and a new head."""
    model = Toy()
    hyplora.inject_hyplora(model, targets, **{"rank": 2, **options})
    model.classifier.requires_grad_(True)
    train(model)
    return model


@pytest.fixture
def path(tmp_path):
    save_hyplora(trained(), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def refused(path, message, error=ValueError, models=None):
    """Loading raises an error that matches, and leaves a model as it was, bare or adapted."""
    for model in models or (Toy(), trained()):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            load_hyplora(model, path)
        assert_unchanged(model, before)


def test_an_adapter_for_a_base_of_another_dtype(path):
    half = Toy().bfloat16()
    load_hyplora(half, path)
    tensors = torch.load(path)["tensors"]
    for name, t in hyplora_state_dict(half).items():
        assert torch.equal(t, tensors[name].to(t.dtype)) and t.any() and not t.requires_grad


def test_adapters_that_nothing_calls_are_named_when_saving(tmp_path):
    class Owner(nn.Sequential):
        def forward(self, x):
            return nn.functional.linear(self[1](x), self[0].weight)

    model = nn.Sequential(Owner(nn.Linear(8, 8), nn.Linear(8, 8)))
    hyplora.inject_hyplora(model, "all-linear")
    model(torch.randn(4, 8)).square().sum().backward()
    torch.optim.SGD(hyplora.hyplora_parameters(model)[:1], lr=0.1).step()
    with pytest.warns(UserWarning, match=r"never called by their owner: \['0.0.lora_B'\]"):
        save_hyplora(model, tmp_path / "adapter.pt")


def test_a_frozen_module_that_came_after_the_adapters_is_named_when_saving(tmp_path, recwarn):
    model = trained()
    model.embed = nn.Embedding(11, 8).to("meta").requires_grad_(False)  # As offloading leaves it.
    save_hyplora(model, tmp_path / "adapter.pt")
    assert not recwarn
    model.embed = nn.Embedding(12, 8).requires_grad_(False)  # As resizing a vocabulary does.
    nn.init.ones_(model.shared.bias)
    with pytest.warns(UserWarning, match=r"not saved: \['embed.weight', '\S*q_proj.bias'\]"):
        save_hyplora(model, tmp_path / "adapter.pt")


def test_a_trained_head_is_named_when_frozen_also_after_ddp_or_under_new_adapters(tmp_path):
    model = trained()
    model.classifier.requires_grad_(False)
    with torch.no_grad():
        torch._foreach_add_([*model.parameters()], 0)  # DDP writes to all of them, too.
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"not saved: \['classifier.weight', \S*bias'\]"):
            save_hyplora(model, tmp_path / "adapter.pt")
        hyplora.remove_hyplora(model)
        hyplora.inject_hyplora(model, ["0.q_proj"])
        nn.init.ones_(model.shared.lora_B)


def test_a_changed_alpha_acts_and_is_saved_and_scaling_follows_it(path):
    load_hyplora(model := Toy(), path)
    model.shared.options["alpha"] /= 4
    save_hyplora(model, path)
    load_hyplora(loaded := Toy(), path)
    assert torch.equal(loaded(IDS), model(IDS)) and loaded.shared.scaling == 2
    with pytest.raises(AttributeError):
        model.shared.scaling = 1.0  # It would act, and be lost.


def test_tensors_without_numbers_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    hyplora.inject_hyplora(model, "all-linear")
    with pytest.raises(ValueError, match="adapter of 0 is sharded or on the meta device"):
        save_hyplora(model, tmp_path / "adapter.pt")
    flat = adapted(Toy())
    flat.shared.lora_B.data = flat.shared.lora_B.data.flatten()[:0]  # As ZeRO-3 leaves it.
    with pytest.raises(ValueError, match="adapter of blocks.0.q_proj is sharded"):
        save_hyplora(flat, tmp_path / "adapter.pt")
    diverged = trained()
    nn.init.constant_(diverged.classifier.bias, math.nan)  # Loading would refuse it.
    wrapped = {f"module.{name}": t for name, t in hyplora_state_dict(trained()).items()}
    sharded = hyplora_state_dict(trained())
    sharded["classifier.bias"].device_mesh = "as FSDP2 leaves a head"
    whole = trained()
    half = {name: t[: len(t) // 2 or 1] for name, t in hyplora_state_dict(whole).items()}
    cases = [(Toy(), None), (diverged, None)]
    cases += [(whole, some) for some in ({}, wrapped, sharded, half)]
    for model, some in cases:
        with pytest.raises(ValueError, match="no adapters to save, or they are not"):
            save_hyplora(model, tmp_path / "adapter.pt", some)
    assert not list(tmp_path.iterdir())


def test_numbers_that_the_models_dtype_does_not_hold_are_refused(path):
    edit(path, lambda content: content["tensors"]["classifier.bias"].fill_(1e5))
    refused(path, "classifier.bias must be finite", models=[Toy().half()])


def test_files_that_are_damaged_or_not_ours(path):
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-200], whole[:1000]):
        path.write_bytes(content)
        refused(path, "adapter.pt is damaged or does not fit")
    for content in ({"weight": 1}, [1], 7, {"hyplora": (3, 12.0), "layers": 7, "tensors": {}}):
        torch.save(content, path)
        refused(path, "adapter.pt is damaged or does not fit")
    torch.save({"hyplora": 2, "layers": {}, "also": [], "tensors": {}}, path)
    refused(path, r"its version and MAX_RADIUS are 2, here \(3, 12.0\)")


def test_code_in_a_file_does_not_run(path):
    class Payload:  # To read it without care would create the other file.
        def __reduce__(self):
            return (open, (str(path.parent / "owned"), "w"))

    torch.save(Payload(), path)
    refused(path, "damaged")
    refused(path.parent / "owned", "No such file", FileNotFoundError)


WRONG = {
    "blocks.0.q_proj.lora_A": [torch.ones(2, 9), "hello", None, torch.full((2, 8), math.nan)],
    "blocks.0.q_proj.lora_B": [torch.full((8, 2), math.inf), [1.0]],
    "blocks.1.q_proj.lora_K": [torch.tensor([-math.inf]), torch.tensor(0.0)],
    "blocks.1.q_proj.lora_unit": [torch.tensor([math.nan])],
    "classifier.weight": [torch.ones(1)],
    "spy": [torch.ones(2)],
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit(path, name):
    whole = path.read_bytes()
    for value in WRONG[name]:
        path.write_bytes(whole)
        edit(path, lambda content: content["tensors"].update({name: value}))
        refused(path, name)
    path.write_bytes(whole)
    if name not in ("classifier.weight", "spy"):
        edit(path, lambda content: content["tensors"].pop(name))
        refused(path, f"{name} is only in the model")


def test_options_that_are_unknown_or_out_of_range(path):
    whole = path.read_bytes()
    changes = {"'x'": dict(x=1), "options must be within.*'alpha': -1": dict(alpha=-1)}
    changes["could not convert string to float: 'flat'"] = dict(curvature="flat")
    for message, change in changes.items():
        path.write_bytes(whole)
        edit(path, lambda content: content["layers"]["blocks.1.q_proj"].update(change))
        refused(path, message, models=[Toy()])


def test_an_adapter_of_another_rank_alpha_curvature_or_place(path):
    for options in (dict(rank=4), dict(alpha=3.0), dict(curvature=2.0), dict(targets=["0.q_proj"])):
        refused(path, "has .* here, .* in the file", models=[trained(**options)])


def test_an_adapter_of_a_layer_that_is_not_here_or_not_linear_or_lone(path):
    source = adapted(nn.Sequential(nn.Linear(8, 8)))
    cases = [(source, nn.Sequential(nn.Conv2d(8, 8, 1)), "bare linear layer")]
    cases += [(source, nn.ModuleDict({"a": nn.Linear(8, 8)}), "has no attribute `0`")]
    cases += [(source[0], nn.Linear(8, 8), "lora_unit is only in the tensors")]
    source = adapted(nn.Sequential(nn.Linear(8, 8), nn.Embedding(3, 8)))
    source[1].requires_grad_(True)
    codes = nn.Embedding(3, 8).requires_grad_(False)._apply(lambda t: t.to(torch.int8))
    cases += [(source, nn.Sequential(nn.Linear(8, 8), codes), "1.weight is only in the tensors")]
    for saved, other, message in cases:
        save_hyplora(saved, path)
        refused(path, message, models=[other])


def test_a_save_that_breaks_off_keeps_the_old_file_and_leaves_nothing_beside(path, monkeypatch):
    old = path.read_bytes()

    def disk_full(content, file):
        assert Path(file).is_relative_to(path.parent)  # Only so can it be put in place at once.
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_hyplora(trained(), path)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == old
