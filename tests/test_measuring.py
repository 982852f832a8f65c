"""Calibration and statistics: which tokens they count, and what they leave as it was."""

import copy
import math

import pytest
import torch
import torch.nn as nn

import hyplora
from hyplora import hyplora_reference
from test_hyplora import IDS, Toy, X, adapted, assert_unchanged, norm, snapshot


def test_padding_does_not_count_and_the_model_is_as_it_was():
    model, mask = adapted(Toy()), torch.ones(1, 11, dtype=torch.long)
    mask[:, 7:] = 0
    model.blocks[0].eval()  # One of its layers stands in another place, too, which is in training.
    modes = [module.training for module in model.modules()]
    model.blocks[1]["v_proj"].register_forward_pre_hook(lambda _, x: x[0].flatten(0, 1))  # as OPT
    padded = hyplora.calibrate_curvature(model, IDS, attention_mask=mask)
    additive = torch.where(mask > 0, 0.0, -1e9)
    with pytest.raises(ValueError, match="no adapted layer saw a token"):
        hyplora.calibrate_curvature(model, IDS, attention_mask=additive)
    assert padded == pytest.approx(hyplora.calibrate_curvature(model, IDS[:, :7]), rel=1e-5)
    measured = hyplora.hyplora_statistics(model, IDS, attention_mask=mask)
    for name, numbers in hyplora.hyplora_statistics(model, IDS[:, :7], attention_mask={}).items():
        assert measured[name] == pytest.approx(numbers, rel=1e-5)
    assert modes == [module.training for module in model.modules()]


def test_a_length_that_is_not_finite_leaves_every_unit_as_it_was():
    model = adapted(nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)))
    before = snapshot(model)
    for x in (X.float() * math.inf, torch.zeros(3, 7)[:0]):
        with pytest.raises(ValueError, match="not finite|no adapted layer saw a token"):
            hyplora.calibrate_curvature(model, x)
        assert_unchanged(model, before)


def test_statistics_by_a_literal_formula_and_of_the_tokens_that_calibration_counts():
    model = adapted(nn.Sequential(nn.Linear(7, 6)))
    layer, x = model[0], X.float()
    hyplora.calibrate_curvature(model, x)
    K, lora = layer.K.item(), norm(x @ layer.lora_A.T @ layer.lora_B.T)
    phi = norm(hyplora_reference(x, layer.lora_A, layer.lora_B, K)) / lora
    want = dict(radius=norm(x).mean().item() / K**0.5, gain=(lora / norm(x)).mean().item())
    want.update(phi=phi.mean().item(), phi_spread=phi.std(correction=0).item())
    assert hyplora.hyplora_statistics(model, x)["0"] == pytest.approx(want, rel=1e-5)
    with_zeros = torch.cat([x, torch.zeros(45, 7)])  # Nine vectors in ten are zero.
    assert hyplora.calibrate_curvature(model, with_zeros)["0"] == pytest.approx(K)
    assert hyplora.hyplora_statistics(model, with_zeros)["0"] == pytest.approx(want, rel=1e-5)
    layer.lora_B.data *= 1e-33  # Now |BAx|^2 is below what float32 has.
    narrow = x.half().double()
    radius = norm(narrow) / K**0.5
    gain = norm(narrow @ layer.lora_A.double().T @ layer.lora_B.double().T) / norm(narrow)
    with torch.autocast("cpu", torch.float16):
        small = hyplora.hyplora_statistics(model, x.half())["0"]
    assert small["phi"] == pytest.approx((radius.sinh() / radius).mean().item(), rel=1e-5)
    assert small["gain"] / gain.mean().item() == pytest.approx(1, rel=1e-5)
    nn.init.zeros_(layer.lora_B)
    fresh = hyplora.hyplora_statistics(model, 12 * K**0.5 * x / norm(x))["0"]
    assert fresh["phi"] == pytest.approx(math.sinh(12) / 12, rel=1e-4)


def test_the_bound_is_that_of_the_layer_its_statistics_and_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(hyplora, "MAX_RADIUS", 4.0)
    layer, x = adapted(nn.Sequential(nn.Linear(7, 6)))[0], 100 * X.float()
    update = hyplora.hyplora_update(x, layer.lora_A, layer.lora_B, layer.K, max_radius=4.0)
    assert torch.equal(layer(x), layer.base(x) + layer.scaling * update)
    phi = norm(update) / norm(x @ layer.lora_A.T @ layer.lora_B.T)
    assert hyplora.hyplora_statistics(layer, x)[""]["phi"] == pytest.approx(phi.mean().item())
    hyplora.save_hyplora(layer, tmp_path / "adapter.pt")
    hyplora.load_hyplora(layer, tmp_path / "adapter.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"MAX_RADIUS are \(3, 4.0\), here \(3, 12.0\)"):
        hyplora.load_hyplora(layer, tmp_path / "adapter.pt")


def test_calibration_runs_the_base_and_warns_of_layers_that_saw_no_token():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
            self.dropout = nn.Dropout(0.5)

        def eval(self):  # As DeepSpeed's engine, it returns nothing.
            self.train(False)

        def forward(self, x):
            return self.second(self.first(x[:3])[:0] + self.first(self.dropout(x[3:]))[:0])

    model = adapted(Experts(), curvature=2.0)
    x = torch.randn(5, 8)
    with pytest.warns(UserWarning, match="no token was seen by .*(second|third)"):
        found = hyplora.calibrate_curvature(model, x)
    assert found == {"first": pytest.approx(2 * x.norm(dim=-1).median().item() ** 2, rel=1e-5)}
    assert model.third.K.item() == pytest.approx(16.0) == model.second.K.item()
    assert model.training and model.first.training and model.first.base.training


def test_of_plain_lora_phi_is_1_and_the_radius_0():
    model = adapted(Toy(), curvature=math.inf)
    numbers = hyplora.hyplora_statistics(model, IDS)["blocks.0.q_proj"]
    assert numbers["phi"] == pytest.approx(1) and numbers["radius"] == 0 and numbers["gain"] > 0
    assert hyplora.calibrate_curvature(model, IDS)["blocks.0.q_proj"] == math.inf


def test_calibrating_again_after_training_keeps_what_K_has_learned():
    model = adapted(nn.Sequential(nn.Linear(7, 6)))
    nn.init.constant_(model[0].lora_K, 1.0)
    first = hyplora.calibrate_curvature(model, X.float())["0"]
    typical = X.norm(dim=-1).median().item()
    assert first == pytest.approx(0.5 * typical**2 * math.e, rel=1e-5)
    again = hyplora.calibrate_curvature(copy.deepcopy(model), 2 * X.float())["0"]
    assert again == pytest.approx(4 * first, rel=1e-5)


def test_K_goes_on_learning_after_a_move_to_bfloat16():
    model = adapted(nn.Sequential(nn.Linear(7, 6)))
    hyplora.calibrate_curvature(model, 0.01 * X.float())
    optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model.bfloat16()), lr=3e-4)
    before = 0.5 * model[0].lora_unit.item() ** 2
    for _ in range(10):
        model(0.01 * X.bfloat16()).square().sum().backward()
        optimizer.step()
    assert abs(math.log(model[0].K.item() / before)) == pytest.approx(10 * 3e-4, rel=0.2)
