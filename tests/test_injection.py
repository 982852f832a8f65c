"""What inject_hyplora finds, what it refuses, and what it warns of."""

import copy

import pytest
import torch
import torch.nn as nn

from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    disable_hyplora,
    hyplora_parameters,
    hyplora_reference,
    hyplora_state_dict,
    hyplora_statistics,
    inject_hyplora,
    load_hyplora,
    remove_hyplora,
    save_hyplora,
    set_hyplora_state_dict,
)
from test_hyplora import IDS, QV, Toy, train

torch.set_num_threads(1)


def is_unchanged(model):
    bare = not any(isinstance(m, HypLoRALinear) for m in model.modules())
    return bare and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_porj"], "'q_porj' names nothing; linear layers here: classifier, q_proj, v_proj"),
        (["q_proj", "nothing_like_it"], "nothing_like_it"),
        ([], "no linear layer"),
        ([""], "'' names Toy"),
        ("q_proj", "expected .*list.*got 'q_proj'"),
        (None, "expected .*got None"),
        ([7], "7 names nothing"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_change_nothing(targets, message):
    model = Toy()
    with pytest.raises(ValueError, match=message):
        inject_hyplora(model, targets)
    assert is_unchanged(model)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 3, 1), nn.Embedding(5, 8), nn.LayerNorm(8)], ids=str
)
def test_what_is_no_linear_layer_is_named(layer):
    model = nn.ModuleDict({"part": layer, "fc": nn.Linear(8, 8)})
    with pytest.raises(
        ValueError, match=f"'part' names {type(layer).__name__}; linear layers here: fc"
    ):
        inject_hyplora(model, ["fc", "part"])
    assert is_unchanged(model)
    model["other"] = nn.ModuleDict({"part": nn.Linear(8, 8)})
    assert inject_hyplora(model, ["part"]) == ["other.part"]


def test_a_lazy_linear_gets_an_error_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="lazy.*run the model once"):
        inject_hyplora(model, "all-linear")
    model(torch.ones(2, 5))
    assert inject_hyplora(model, "all-linear") == ["0"]


def test_a_model_with_adapters_is_refused():
    model = Toy()
    inject_hyplora(model, ["q_proj"])
    with pytest.raises(ValueError, match="adapted already.*remove_hyplora"):
        inject_hyplora(model, ["v_proj"])
    with pytest.raises(TypeError, match="bare linear layer"):
        HypLoRALinear(model.shared)


def test_a_model_that_is_the_layer_itself_or_has_none(tmp_path):
    with pytest.raises(ValueError, match="wrap it with HypLoRALinear"):
        inject_hyplora(nn.Linear(7, 6), "all-linear")
    layer = HypLoRALinear(nn.Linear(7, 6))
    with pytest.warns(UserWarning, match="lora_B are as they started"):
        save_hyplora(layer, tmp_path / "layer.pt")
    nn.init.normal_(layer.lora_B)
    save_hyplora(layer, tmp_path / "layer.pt")
    assert load_hyplora(layer, tmp_path / "layer.pt") == [""]
    calibrate_curvature(layer, torch.ones(3, 7))
    assert layer.K.item() == pytest.approx(0.5 * 7)
    assert remove_hyplora(layer) is layer.base
    with pytest.raises(ValueError, match="wrap it with HypLoRALinear"):
        load_hyplora(nn.Linear(7, 6), tmp_path / "layer.pt")
    with pytest.raises(ValueError, match="no linear layer"):
        inject_hyplora(nn.Sequential(nn.ReLU()), "all-linear")
    with pytest.raises(ValueError, match="inject_hyplora"):
        hyplora_parameters(nn.Sequential(nn.ReLU()))


def test_all_linear_leaves_out_the_head_that_a_model_declares():
    model = Toy()
    model.decoder = model.classifier
    del model.classifier
    model.get_output_embeddings = lambda: model.decoder
    assert inject_hyplora(model, "all-linear") == QV


class Conv1D(nn.Module):
    """As in transformers: x W + b, with W of the shape (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.ones(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_weight_of_shape_in_out():
    model = nn.Sequential(Conv1D(6, 7))
    assert inject_hyplora(model, "all-linear", rank=2) == ["0"]
    assert (model[0].in_features, model[0].out_features) == (7, 6)
    nn.init.normal_(model[0].lora_B)
    assert model(torch.zeros(3, 7)).shape == (3, 6)


# --- owners that never call their layer ---------------------------------------------------------


def test_owners_that_read_the_weight_are_refused(tmp_path):
    attention = nn.MultiheadAttention(8, 2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="out_proj can't be adapted: .*never calls it"):
        inject_hyplora(nn.Sequential(attention), ["out_proj"])
    with pytest.raises(ValueError, match="linear1 can't be adapted"):
        inject_hyplora(nn.Sequential(layer), ["linear1"])
    with pytest.warns(UserWarning, match="a.out_proj"):
        model = nn.ModuleDict({"a": attention, "fc": nn.Linear(8, 8)})
        assert inject_hyplora(model, "all-linear") == ["fc"]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = nn.Sequential(copy.deepcopy(layer))
        assert inject_hyplora(model, ["linear1"]) == ["0.linear1"]
        nn.init.normal_(model[0].linear1.lora_B)
        save_hyplora(model, tmp_path / "adapter.pt")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(ValueError, match="linear1 can't be adapted"):
        load_hyplora(nn.Sequential(layer), tmp_path / "adapter.pt")
    assert type(layer.linear1) is nn.Linear and layer.linear1.weight.requires_grad


def test_a_file_names_its_layers_by_their_whole_names(tmp_path):
    def attention_and_a_layer_of_the_name_of_its_own():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "out_proj": nn.Linear(8, 8)})

    model = attention_and_a_layer_of_the_name_of_its_own()
    with pytest.warns(UserWarning, match="a.out_proj"):
        assert inject_hyplora(model, "all-linear") == ["out_proj"]
    nn.init.normal_(model.out_proj.lora_B)
    save_hyplora(model, tmp_path / "adapter.pt")
    loaded = attention_and_a_layer_of_the_name_of_its_own()
    assert load_hyplora(loaded, tmp_path / "adapter.pt") == ["out_proj"]
    x = torch.randn(3, 8)
    assert torch.equal(loaded.out_proj(x), model.out_proj(x))


def test_saving_names_adapters_that_nothing_calls(tmp_path):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(8, 8)
            self.called = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.called(x), self.read.weight)

    model = nn.Sequential(Owner())
    inject_hyplora(model, "all-linear")
    optimizer = torch.optim.SGD(hyplora_parameters(model), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="^0.read.lora_B are as they started.*never calls"):
        save_hyplora(model, tmp_path / "adapter.pt")


def test_a_base_that_moves_in_training_mode_is_warned_of():
    norms = {
        "batch_norm": nn.BatchNorm1d(8),
        "new spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        "old spectral norm": nn.utils.spectral_norm(nn.Linear(8, 8)),
    }
    for norm in norms.values():
        with pytest.warns(UserWarning, match="training mode changes them"):
            inject_hyplora(nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": norm}), ["fc"])


# --- a new head ---------------------------------------------------------------------------------


def test_a_new_head_is_trained_saved_and_loaded(tmp_path):
    model, bare = Toy(), Toy()
    bare.classifier.reset_parameters()  # A head is random, and another one each time.
    head = copy.deepcopy(model.classifier)
    names = inject_hyplora(model, "all-linear", train_also=["classifier"], rank=2)
    assert names == QV
    trainable = [p for group in hyplora_parameters(model) for p in group["params"]]
    assert any(p is model.classifier.weight for p in trainable)
    losses = train(model)
    assert losses[-1] < losses[0] and not torch.equal(model.classifier.weight, head.weight)
    assert "classifier.bias" in hyplora_state_dict(model)
    save_hyplora(model, tmp_path / "adapter.pt")
    load_hyplora(bare, tmp_path / "adapter.pt")
    assert torch.equal(bare(IDS), model(IDS)) and bare.classifier.weight.requires_grad
    load_hyplora(bare, tmp_path / "adapter.pt")  # Now into the adapted model.
    remove_hyplora(bare)
    inject_hyplora(bare, ["q_proj"])
    assert not any(name.startswith("classifier") for name in hyplora_state_dict(bare))


def test_a_buffer_of_train_also_may_be_infinite_as_a_mask_is(tmp_path):
    model, bare = Toy(), Toy()
    for toy in (model, bare):
        toy.classifier.register_buffer("mask", torch.full((2,), -torch.inf))
    inject_hyplora(model, "all-linear", train_also=["classifier"])
    calibrate_curvature(model, IDS)
    train(model)
    save_hyplora(model, tmp_path / "adapter.pt")
    load_hyplora(bare, tmp_path / "adapter.pt")
    assert torch.equal(bare(IDS), model(IDS))
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="classifier.bias should be finite numbers"):
        set_hyplora_state_dict(bare, hyplora_state_dict(model))


def test_train_also_must_match_and_wins_over_targets():
    with pytest.raises(ValueError, match="'score' names nothing"):
        inject_hyplora(Toy(), "all-linear", train_also=["score"])
    names = inject_hyplora(Toy(), ["v_proj", "classifier"], train_also=["classifier"])
    assert names == [QV[1], QV[3]]


def test_a_head_with_batch_norm_keeps_its_statistics(tmp_path):
    def make():
        torch.manual_seed(0)
        head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        return nn.ModuleDict({"body": nn.Linear(8, 8), "head": head})

    def run(model, x):
        return model["head"](model["body"](x))

    model = make()
    inject_hyplora(model, ["body"], train_also=["head"])
    nn.init.normal_(model["body"].lora_B)
    run(model.train(), torch.randn(16, 8) + 3)
    save_hyplora(model, tmp_path / "adapter.pt")
    loaded = make()
    load_hyplora(loaded, tmp_path / "adapter.pt")
    x = torch.randn(4, 8)
    assert torch.equal(run(loaded.eval(), x), run(model.eval(), x))


# --- switching and calibration ------------------------------------------------------------------


def test_disable_keeps_what_was_disabled_and_survives_an_error():
    model = Toy()
    inject_hyplora(model, "all-linear")
    model.shared.enabled = False
    with pytest.raises(RuntimeError), disable_hyplora(model):
        raise RuntimeError
    layers = [m for m in model.modules() if isinstance(m, HypLoRALinear)]
    assert [layer.enabled for layer in layers] == [False, True, True, True]


def test_calibration_leaves_modes_and_K_as_they_were_if_a_length_is_not_finite():
    model = Toy()
    inject_hyplora(model, "all-linear")
    calibrate_curvature(model, IDS)
    model.train()
    model.blocks[1].eval()
    model.blocks[0]["v_proj"].enabled = False
    before = copy.deepcopy(model.state_dict())
    model.embed.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match="finite numbers, found"):
        calibrate_curvature(model, IDS)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "lora" in k)
    assert model.training and not model.blocks[1].training
    assert not model.blocks[0]["v_proj"].enabled and model.shared.enabled


def test_calibration_runs_the_base_in_eval_mode_and_skips_what_saw_no_token():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.second(self.first(self.dropout(x))[:0])

    model = Experts()
    inject_hyplora(model, "all-linear", curvature=2.0)
    nn.init.normal_(model.first.lora_B)
    x = torch.randn(5, 8)
    found = calibrate_curvature(model, x)
    assert found == {"first": pytest.approx(2 * x.square().sum(-1).mean().item(), rel=1e-5)}
    assert model.third.K.item() == model.second.K.item() == 16.0


def test_statistics_are_those_of_a_direct_computation():
    model = Toy()
    inject_hyplora(model, ["q_proj", "v_proj"], rank=2, curvature=0.5, dropout=0.5)
    calibrate_curvature(model, IDS)
    for layer in (m for m in model.modules() if isinstance(m, HypLoRALinear)):
        nn.init.normal_(layer.lora_B)
    found = hyplora_statistics(model.train(), IDS)
    assert set(found) == set(QV) and model.training
    layer = model.blocks[0]["v_proj"]
    x = model.embed(IDS)[0]
    lora = (x @ layer.lora_A.T @ layer.lora_B.T).norm(dim=-1)
    update = hyplora_reference(x, layer.lora_A, layer.lora_B, layer.K).norm(dim=-1)
    expected = {
        "square": x.square().sum(dim=-1).mean().item(),
        "radius": (x.norm(dim=-1) / layer.K.sqrt()).mean().item(),
        "gain": (lora / x.norm(dim=-1)).mean().item(),
        "phi": (update / lora).mean().item(),
        "phi_spread": (update / lora).std(correction=0).item(),
    }
    assert found["blocks.0.v_proj"] == pytest.approx(expected, rel=1e-4)
    # The linear that stands in two places is called at both.
    assert found["blocks.0.q_proj"]["radius"] != pytest.approx(expected["radius"])


def test_of_plain_lora_phi_is_1_and_the_radius_0():
    model = Toy()
    inject_hyplora(model, "all-linear", curvature=float("inf"))
    nn.init.normal_(model.shared.lora_B)
    numbers = hyplora_statistics(model, IDS)["blocks.0.q_proj"]
    assert numbers["phi"] == pytest.approx(1) and numbers["radius"] == 0 and numbers["gain"] > 0
