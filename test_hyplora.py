"""The specification of hyplora.py, as tests. Each compares with something independent: a literal formula, float64,
finite differences, a hand-worked case."""

import copy
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import train_minimal
from benchmarks import fuzz
from benchmarks.authors import authors_update
from hyplora import (
    HypLoRALinear,
    _AddUpdate,
    calibrate_curvature,
    delta_hyperbolicity,
    disable_hyplora,
    expmap0,
    hyplora_parameters,
    hyplora_reference,
    hyplora_state_dict,
    hyplora_update,
    inject_hyplora,
    llr,
    load_hyplora,
    logmap0,
    lorentz_inner,
    norm_by_frequency,
    power_law_exponent,
    remove_hyplora,
    save_hyplora,
)

torch.set_num_threads(1)  # tensors are tiny here: threads would only wait for each other


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def xAB():
    """x (5, 7), A (3, 7), B (6, 3) in float64."""
    return randn(5, 7), randn(3, 7, seed=1), randn(6, 3, seed=2)


def textbook_expmap0(v, K):
    """The formula as every paper writes it, with the norm in the denominator."""
    norm = v.norm(dim=-1, keepdim=True)
    return torch.cat([K**0.5 * torch.cosh(norm / K**0.5), K**0.5 * torch.sinh(norm / K**0.5) * v / norm], dim=-1)


def textbook_logmap0(p, K):
    """arccosh on the time coordinate: another route than the code's asinh on space."""
    space = p[..., 1:]
    return K**0.5 * torch.acosh(p[..., :1] / K**0.5) * space / space.norm(dim=-1, keepdim=True)


# --- geometry ---------------------------------------------------------------------------------------


def test_lorentz_inner_by_hand():
    p, q = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[5.0, 4.0, 6.0], [1.0, 0.0, 0.0]])
    assert lorentz_inner(p, q).tolist() == [-15 + 4 + 12, -3]


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_maps_are_the_textbook_ones_stay_on_the_manifold_and_invert_each_other(K, xAB):
    x, A, B = xAB
    p = expmap0(x, K)
    torch.testing.assert_close(p, textbook_expmap0(x, K))
    assert (p[..., 0] > 0).all()
    torch.testing.assert_close(lorentz_inner(p, p) / p[..., 0] ** 2, -K / p[..., 0] ** 2, atol=1e-14, rtol=0)
    torch.testing.assert_close(logmap0(p, K), x)
    torch.testing.assert_close(logmap0(p, K), textbook_logmap0(p, K))
    q = llr(p, A, B, K)
    torch.testing.assert_close(q[..., 1:], p[..., 1:] @ (B @ A).T)
    torch.testing.assert_close(lorentz_inner(q, q) / q[..., 0] ** 2, -K / q[..., 0] ** 2, atol=1e-14, rtol=0)


def test_expmap0_measures_length_along_the_surface():
    """The distance sqrt K arccosh(-<o, p>/K) from the origin to expmap0(v) is |v|."""
    v, K = randn(4, 3), 2.5
    o = torch.tensor([K**0.5, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(K**0.5 * torch.acosh(-lorentz_inner(o, expmap0(v, K)) / K), v.norm(dim=-1))


def test_origin_and_points_near_it_need_no_epsilon():
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert expmap0(v, 4.0).tolist() == [2, 0, 0, 0]
    expmap0(v, 4.0)[1:].sum().backward()
    assert v.grad.tolist() == [1, 1, 1]  # the differential of expmap0 at 0 is the identity
    tiny = torch.tensor([1e-200, -2e-200, 0], dtype=torch.float64)
    torch.testing.assert_close(logmap0(expmap0(tiny, 1.0), 1.0), tiny, atol=0, rtol=1e-12)


# --- closed form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_closed_form_is_the_composition(K, xAB):
    x, A, B = xAB
    literal = textbook_logmap0(llr(textbook_expmap0(x, K), A, B, K), K)
    torch.testing.assert_close(hyplora_reference(x, A, B, K), literal)
    torch.testing.assert_close(hyplora_update(x, A, B, K), literal)
    torch.testing.assert_close(hyplora_update(x, A, B, K, scaling=-3.0), -3 * literal)
    assert hyplora_update(x[0], A, B, K).shape == (6,)  # 1-d to n-d inputs
    torch.testing.assert_close(hyplora_update(x.view(5, 1, 7), A, B, K), literal.view(5, 1, 6))


def test_series_and_formula_meet():
    """Radii on both sides of the point where the series hands over to sinh and asinh."""
    A = B = torch.eye(2, dtype=torch.float64)
    x = torch.stack([torch.linspace(0.0995, 0.1005, 41, dtype=torch.float64), torch.zeros(41)], dim=1)
    # With BA = 1 the maps cancel: the update is x itself.
    torch.testing.assert_close(hyplora_update(x, A, B, 1.0), x, atol=0, rtol=1e-14)


def test_consequence_1_infinite_K_is_lora(xAB):
    x, A, B = xAB
    assert torch.equal(hyplora_update(x, A, B, math.inf), x @ A.T @ B.T)


def test_consequence_2_first_order_in_1_over_K(xAB):
    x, A, B = xAB
    lora = x @ A.T @ B.T
    K = 1e5
    first = (x.norm(dim=-1) ** 2 - lora.norm(dim=-1) ** 2) / (6 * K)
    phi = (hyplora_update(x, A, B, K) / lora)[:, 0]
    assert ((phi - 1 - first).abs() < 30 * first.abs().max() ** 2).all()
    assert first.abs().max() > 1e-5  # the term that is tested is there


def test_consequence_3_scaling_x_and_K_together(xAB):
    x, A, B = xAB
    s, K = 3.7, 0.8
    torch.testing.assert_close(hyplora_update(s * x, A, B, s * s * K), s * hyplora_update(x, A, B, K))


def test_consequence_4_the_tangent_pipeline_cancels_and_llr_does_not(xAB):
    x, A, B = xAB
    K, lora = 0.8, x @ A.T @ B.T
    torch.testing.assert_close(logmap0(expmap0(logmap0(expmap0(x, K), K) @ A.T @ B.T, K), K), lora)
    assert (hyplora_update(x, A, B, K) - lora).norm() > 0.1 * lora.norm()


def test_consequence_5_as_many_parameters_as_lora_plus_K():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3)
    assert sum(p.numel() for group in hyplora_parameters(layer) for p in group["params"]) == (7 + 6) * 3 + 1
    flat = HypLoRALinear(nn.Linear(7, 6), rank=3, curvature=math.inf)
    assert sum(p.numel() for group in hyplora_parameters(flat) for p in group["params"]) == (7 + 6) * 3


def test_consequence_6_no_matrix_does_what_the_adapter_does(xAB):
    x, A, B = xAB
    update = hyplora_update(x, A, B, 0.5)
    assert (hyplora_update(2 * x, A, B, 0.5) - 2 * update).norm() > 0.1 * update.norm()
    assert not hasattr(HypLoRALinear, "merge")


def test_clip_treats_a_far_token_as_if_it_lay_on_the_sphere(xAB):
    x, A, B = xAB
    K, radius = 0.5, 4.0
    rho = x.norm(dim=-1, keepdim=True) / K**0.5
    moved = torch.where(rho > radius, x * radius / rho, x)
    assert (rho > radius).any() and (rho < radius).any()
    torch.testing.assert_close(hyplora_update(x, A, B, K, max_radius=radius), hyplora_reference(moved, A, B, K))


@pytest.mark.parametrize("x_scale", [1.0, 0.0, 30.0], ids=["inside", "x=0", "clipped"])
@pytest.mark.parametrize("B_scale", [1.0, 0.0], ids=["B", "B=0"])
def test_gradients_against_finite_differences(x_scale, B_scale, xAB):
    x, A, B = xAB
    inputs = [t.requires_grad_() for t in (x * x_scale, A, B * B_scale, torch.tensor([0.7], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *t: hyplora_update(*t, max_radius=3.0), inputs)


@pytest.mark.parametrize("x_scale", [1.0, 0.0, 30.0], ids=["inside", "x=0", "clipped"])
@pytest.mark.parametrize("B_scale", [1.0, 0.0], ids=["B", "B=0"])
def test_the_fast_path_is_the_closed_form_with_its_gradients(x_scale, B_scale, xAB):
    x, A, B = xAB
    out, log_K = randn(5, 6, seed=3), torch.tensor([0.7], dtype=torch.float64).log()
    inputs = [t.requires_grad_() for t in (out, x * x_scale, A, B * B_scale, log_K)]

    def fast(*t):
        return _AddUpdate.apply(*t, 3.0, 1.7)[0]

    def definition(out, x, A, B, log_K):
        return out + hyplora_update(x, A, B, log_K.exp(), max_radius=3.0, scaling=1.7)

    torch.testing.assert_close(fast(*inputs), definition(*inputs), atol=1e-12, rtol=1e-12)
    d_out = randn(5, 6, seed=4)
    for name, got, want in zip(
        ("out", "x", "A", "B", "log_K"),
        torch.autograd.grad(fast(*inputs), inputs, d_out),
        torch.autograd.grad(definition(*inputs), inputs, d_out),
    ):
        torch.testing.assert_close(
            got, want, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
    assert torch.autograd.gradcheck(fast, inputs, check_undefined_grad=False)  # it has one differentiable output


def test_fuzz():
    """A few hundred of benchmarks/fuzz.py's cases, and its figures for accuracy."""
    rng, g = random.Random(1), torch.Generator().manual_seed(1)
    for case in range(600):
        layer, x = fuzz.draw(rng, g)
        assert not fuzz.not_finite(layer, x), (case, x.dtype, x.shape, layer)
    ours, _, gradient, _ = fuzz.accuracy(torch.float32, g)
    assert ours < 1e-5 and gradient < 1e-5
    ours, lora, gradient, lora_gradient = fuzz.accuracy(torch.bfloat16, g)
    assert ours < 2 * lora and gradient < 2 * lora_gradient


# --- the layer --------------------------------------------------------------------------------------


def test_layer_is_its_formula():
    base = nn.Linear(7, 6).double()
    layer = HypLoRALinear(base, rank=3, alpha=6.0, curvature=0.25, dtype=torch.float64)
    layer.lora_B.data = randn(6, 3, seed=2)
    x, K = randn(5, 7), 0.25 * 7  # "rms": lengths in units of sqrt(in_features)
    expected = base(x) + 2.0 * hyplora_reference(x, layer.lora_A, layer.lora_B, K)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # K is float32
    assert layer.K.item() == pytest.approx(K) and layer.log_K.shape == (1,) and layer.scaling == 2.0
    assert HypLoRALinear(base, rank=3, curvature=0.25, curvature_unit="absolute").K.item() == pytest.approx(0.25)
    assert not HypLoRALinear(base, rank=3, learn_curvature=False).log_K.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_adapter_changes_nothing_and_output_has_the_base_dtype(dtype):
    base = nn.Linear(7, 6, dtype=dtype)
    x = randn(2, 4, 7, dtype=dtype)
    layer = HypLoRALinear(copy.deepcopy(base), rank=3)
    out = layer(x)
    assert torch.equal(out, base(x)) and out.dtype == dtype and layer.lora_A.dtype == torch.float32
    layer.lora_B.data.normal_()
    assert not torch.equal(layer(x), out) and layer(x).dtype == dtype


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = randn(100, 7, dtype=torch.float32)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


@pytest.mark.parametrize(
    "wrong",
    [dict(rank=0), dict(rank=2.0), dict(alpha=0), dict(dropout=1.0), dict(curvature=0), dict(curvature=math.nan),
     dict(curvature_unit="metre"), dict(max_radius=0)],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        HypLoRALinear(nn.Linear(7, 6), **wrong)


def test_a_rank_above_the_layer_warns():
    with pytest.warns(UserWarning, match="rank 9"):
        HypLoRALinear(nn.Linear(7, 9), rank=9)


def test_only_linear_layers_are_wrapped():
    with pytest.raises(TypeError, match="Conv2d"):
        HypLoRALinear(nn.Conv2d(3, 3, 1))


# --- injection --------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two blocks with attention-like names, a head, and one linear in two places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "v_proj")}) for _ in range(2))
        self.shared = self.blocks[0]["q_proj"]
        self.lm_head = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block["q_proj"](x)) * block["v_proj"](x)
        return self.lm_head(self.shared(x))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


IDS = torch.arange(11).view(1, 11)


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, HypLoRALinear)}


def train_a_little(model, steps=5):
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


QV = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]


@pytest.mark.parametrize(
    "targets, names",
    [
        ("all-linear", QV),
        (["q_proj", "v_proj"], QV),
        (["1.v_proj"], QV[3:]),
        (("lm_head",), ["lm_head"]),
        (r"blocks\.\d\.v_proj", [QV[1], QV[3]]),
        (["shared"], QV[:1]),  # found under its other name
    ],
    ids=str,
)
def test_targets(toy, targets, names):
    before = toy(IDS)
    assert inject_hyplora(toy, targets, rank=2) == names == list(adapters(toy))
    assert torch.equal(toy(IDS), before)
    trainable = {name for name, p in toy.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{p}" for name in names for p in ("lora_A", "lora_B", "log_K")}


def test_one_linear_in_two_places_gets_one_adapter(toy):
    inject_hyplora(toy, "all-linear", rank=2)
    assert isinstance(toy.shared, HypLoRALinear) and toy.shared is toy.blocks[0]["q_proj"]


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_porj"], "q_proj"),
        (["q_proj", "nothing_like_it"], "nothing_like_it"),
        ("q_proj", r"\['q_proj'\]"),  # a name ending where a regular expression is expected
        ("q_proj(", "regular expression"),
        ([], "list of name endings"),
        ([""], "list of name endings"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_change_nothing_and_name_what_is_close(toy, targets, message):
    with pytest.raises(ValueError, match=message):
        inject_hyplora(toy, targets)
    assert not adapters(toy) and all(p.requires_grad for p in toy.parameters())


def test_a_wrong_option_changes_nothing(toy):
    with pytest.raises(ValueError, match="rank"):
        inject_hyplora(toy, "all-linear", rank=0)
    assert not adapters(toy) and all(p.requires_grad for p in toy.parameters())


def test_injecting_twice_is_an_error(toy):
    inject_hyplora(toy, ["q_proj"])
    with pytest.raises(ValueError, match="already"):
        inject_hyplora(toy, ["v_proj"])
    with pytest.raises(TypeError, match="already"):
        HypLoRALinear(toy.shared)


def test_a_model_that_is_the_linear_layer_or_has_none():
    with pytest.raises(ValueError, match="HypLoRALinear"):
        inject_hyplora(nn.Linear(7, 6), "all-linear")
    with pytest.raises(ValueError, match="no linear layer"):
        inject_hyplora(nn.Sequential(nn.ReLU()), "all-linear")
    with pytest.raises(ValueError, match="inject_hyplora"):
        hyplora_parameters(nn.Sequential(nn.ReLU()))


def test_weight_tied_to_an_embedding_is_an_output_head(toy):
    toy.decoder = toy.lm_head
    del toy.lm_head
    toy.decoder.weight = toy.embed.weight
    assert "decoder" not in inject_hyplora(toy, "all-linear")


class Conv1D(nn.Module):
    """As in transformers: y = x W + b with W (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = (
            nf,
            nn.Parameter(randn(nx, nf, dtype=torch.float32)),
            nn.Parameter(torch.ones(nf)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


def test_weight_of_shape_in_out():
    model = nn.Sequential(Conv1D(6, 7))
    assert inject_hyplora(model, "all-linear", rank=2) == ["0"]
    assert (model[0].in_features, model[0].out_features) == (7, 6)
    nn.init.normal_(model[0].lora_B)
    assert model(torch.zeros(3, 7)).shape == (3, 6)


def test_a_linear_that_is_made_of_linears_gets_one_adapter():
    class Factored(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 8
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.up(self.down(x))

    assert inject_hyplora(nn.ModuleDict({"fc": Factored(), "out": nn.Linear(8, 8)}), "all-linear") == ["fc", "out"]


def test_owners_that_read_the_weight_are_refused():
    """Their adapter would be ignored without a word: the premise, then the refusal."""
    attention = nn.MultiheadAttention(8, 2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="out_proj.*ignored"):
        inject_hyplora(nn.Sequential(attention), ["out_proj"])
    with pytest.raises(ValueError, match="linear1.*ignored"):
        inject_hyplora(nn.Sequential(layer), ["linear1"])
    with pytest.warns(UserWarning, match="out_proj"):
        assert inject_hyplora(nn.ModuleDict({"a": attention, "fc": nn.Linear(8, 8)}), "all-linear") == ["fc"]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert inject_hyplora(nn.Sequential(layer), ["linear1"]) == ["0.linear1"]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_only_adapters_train_and_the_base_does_not_move_by_a_bit(toy):
    base = copy.deepcopy(toy)
    inject_hyplora(toy, "all-linear", rank=4)
    before = {name: p.clone() for name, p in toy.named_parameters()}
    losses = train_a_little(toy)
    assert losses[-1] < losses[0]
    for name, p in toy.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    assert not torch.equal(toy(IDS), base(IDS))
    with disable_hyplora(toy):
        assert torch.equal(toy(IDS), base(IDS))
    assert not torch.equal(toy(IDS), base(IDS))  # on again
    assert remove_hyplora(toy) is toy and not adapters(toy)
    assert torch.equal(toy(IDS), base(IDS)) and toy.shared is toy.blocks[0]["q_proj"]
    assert toy.state_dict().keys() == base.state_dict().keys()


def test_disable_keeps_what_was_disabled_and_survives_an_error(toy):
    inject_hyplora(toy, "all-linear")
    toy.shared.enabled = False
    with pytest.raises(RuntimeError), disable_hyplora(toy):
        raise RuntimeError
    assert [layer.enabled for layer in adapters(toy).values()] == [False, True, True, True]


def test_parameters_are_optimizer_groups_with_K_free_of_weight_decay(toy):
    inject_hyplora(toy, "all-linear")
    weights, curvatures = hyplora_parameters(toy)
    assert len(weights["params"]) == 8 and [p.shape for p in curvatures["params"]] == [(1,)] * 4
    optimizer = torch.optim.AdamW([weights, curvatures], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_calibration_sets_K_from_the_norms(toy):
    inject_hyplora(toy, "all-linear", curvature=0.5)
    toy.train()
    found = calibrate_curvature(toy, IDS)
    x = toy.embed(IDS)
    assert found["blocks.0.v_proj"] == pytest.approx(0.5 * x.square().sum(-1).mean().item(), rel=1e-5)
    assert toy.training and toy.blocks[0]["v_proj"].K.item() == pytest.approx(found["blocks.0.v_proj"])
    toy.embed.weight.data[3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        calibrate_curvature(toy, IDS)
    assert toy.blocks[0]["v_proj"].K.item() == pytest.approx(found["blocks.0.v_proj"])


# --- saving -----------------------------------------------------------------------------------------


def test_save_and_load_round_trip(toy, tmp_path):
    bare, injected = copy.deepcopy(toy), copy.deepcopy(toy)
    names = inject_hyplora(toy, "all-linear", rank=4, alpha=5.0, curvature=1.0, dropout=0.1)
    train_a_little(toy)
    toy.eval()
    save_hyplora(toy, tmp_path / "adapter.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"]  # nothing is left beside it
    inject_hyplora(injected, "all-linear", rank=4, alpha=5.0)
    for model in (bare, injected):
        assert load_hyplora(model, tmp_path / "adapter.pt") == names
        assert torch.equal(model.eval()(IDS), toy(IDS))
        assert {k for k, p in model.named_parameters() if p.requires_grad} == set(hyplora_state_dict(toy))
    assert bare.shared.dropout.p == 0.1 and bare.shared is bare.blocks[0]["q_proj"]


class Payload:
    """A pickle with code in it: loading it without care would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edited(change):
    """A file that save_hyplora wrote, with its content changed."""

    def write(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return write


def tensor(name, value):
    return edited(lambda content: content["tensors"].update({name: value}))


A0, B0, K0 = (f"blocks.0.q_proj.{key}" for key in ("lora_A", "lora_B", "log_K"))
HOSTILE = {
    "missing": (lambda path: path.unlink(), FileNotFoundError, "No such file"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), IsADirectoryError, "directory"),
    "empty": (lambda path: path.write_bytes(b""), ValueError, "damaged or not a file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), ValueError, "damaged or not a file"),
    "text": (lambda path: path.write_text("hello"), ValueError, "damaged or not a file"),
    "code": (lambda path: torch.save(Payload(path.parent / "owned"), path), ValueError, "damaged or not a file"),
    "other program's": (lambda path: torch.save({"weight": torch.ones(2)}, path), ValueError, "damaged or not a file"),
    "other version": (edited(lambda c: c.update(format="hyplora-9")), ValueError, "format 'hyplora-9'"),
    "layers no mapping": (edited(lambda c: c.update(layers=7)), ValueError, "damaged or not a file"),
    "options missing": (
        edited(lambda c: c["layers"].update({"blocks.0.q_proj": {}})),
        ValueError,
        "lacks the option 'rank'",
    ),
    "options unknown": (edited(lambda c: c["layers"]["blocks.0.q_proj"].update(x=1)), ValueError, "'x'"),
    "option out of range": (edited(lambda c: c["layers"]["blocks.0.q_proj"].update(alpha=-1)), ValueError, "alpha"),
    "tensor missing": (edited(lambda c: c["tensors"].pop(B0)), ValueError, "lora_B should be .* found NoneType"),
    "tensor unexpected": (tensor("spy.lora_A", torch.ones(2)), ValueError, "spy.lora_A belongs to no layer"),
    "tensor shape": (tensor(A0, torch.ones(2, 9)), ValueError, r"should be .*\(2, 8\), found torch.float32 \(2, 9\)"),
    "tensor dtype": (tensor(A0, torch.ones(2, 8).long()), ValueError, "found torch.int64"),
    "no tensor": (tensor(A0, "hello"), ValueError, "found str"),
    "NaN": (tensor(A0, torch.full((2, 8), math.nan)), ValueError, "not finite"),
    "infinity": (tensor(B0, torch.full((8, 2), math.inf)), ValueError, "not finite"),
    "K = 0": (tensor(K0, torch.tensor([-math.inf])), ValueError, "not finite"),
    "other layers": (edited(lambda c: c["layers"].update(elsewhere={})), ValueError, "elsewhere"),
}


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "injected"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_gets_one_clear_error_and_changes_nothing(case, bare, toy, tmp_path):
    spoil, error, message = HOSTILE[case]
    path, source = tmp_path / "adapter.pt", copy.deepcopy(toy)
    inject_hyplora(source, ["q_proj"], rank=2)
    save_hyplora(source, path)
    spoil(path)
    if not bare:
        inject_hyplora(toy, ["q_proj"], rank=2)
        if case.startswith("option"):  # an injected model keeps its own options, so only these must agree
            pytest.skip("not read")
    before = {name: (p.clone(), p.requires_grad) for name, p in toy.named_parameters()}
    with pytest.raises(error, match=message):
        load_hyplora(toy, path)
    after = dict(toy.named_parameters())
    assert after.keys() == before.keys() and not (tmp_path / "owned").exists()
    assert all(torch.equal(after[n], p) and after[n].requires_grad == grad for n, (p, grad) in before.items())


@pytest.mark.parametrize(
    "targets, options, message",
    [
        (["q_proj"], dict(rank=4), "rank 2, the model's 4"),
        (["q_proj"], dict(rank=2, alpha=3.0), "alpha 16.0, the model's 3.0"),
        (["v_proj"], dict(rank=2), "blocks.0.q_proj is in one of them only"),
        ("all-linear", dict(rank=2), "v_proj is in one of them only"),
    ],
    ids=str,
)
def test_an_adapter_of_another_shape_or_place_changes_nothing(targets, options, message, toy, tmp_path):
    source = copy.deepcopy(toy)
    inject_hyplora(source, ["q_proj"], rank=2)
    save_hyplora(source, tmp_path / "adapter.pt")
    inject_hyplora(toy, targets, **options)
    before = copy.deepcopy(toy.state_dict())
    with pytest.raises(ValueError, match=message):
        load_hyplora(toy, tmp_path / "adapter.pt")
    assert all(torch.equal(value, before[key]) for key, value in toy.state_dict().items())


def test_an_adapter_of_a_layer_that_is_not_linear_here(tmp_path):
    source = nn.Sequential(nn.Linear(8, 8))
    inject_hyplora(source, "all-linear", rank=2)
    save_hyplora(source, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="0 is a Conv2d, not a linear layer"):
        load_hyplora(nn.Sequential(nn.Conv2d(8, 8, 1)), tmp_path / "adapter.pt")


def test_loading_casts_to_the_models_dtype(toy, tmp_path):
    source, target = copy.deepcopy(toy), copy.deepcopy(toy)
    inject_hyplora(source, ["q_proj"], rank=2, dtype=torch.float64)
    train_a_little(source)
    save_hyplora(source, tmp_path / "adapter.pt")
    inject_hyplora(target, ["q_proj"], rank=2, dtype=torch.bfloat16)
    load_hyplora(target, tmp_path / "adapter.pt")
    assert target.shared.lora_B.dtype == torch.bfloat16
    assert torch.equal(target.shared.lora_B, source.shared.lora_B.bfloat16())


SAVES_FOREVER = """
import sys, torch, torch.nn as nn
from hyplora import inject_hyplora, save_hyplora
model = nn.Sequential(nn.Linear(512, 512))
inject_hyplora(model, "all-linear", rank=64)
for value in range(10**9):
    nn.init.constant_(model[0].lora_B, value)
    save_hyplora(model, sys.argv[1])
    print(value, flush=True)
"""


def test_a_killed_save_leaves_a_whole_file(tmp_path):
    path, rng = tmp_path / "adapter.pt", random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVES_FOREVER, path], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    for _ in range(5):
        saved = int(process.stdout.readline())
    time.sleep(0.02 * rng.random())
    process.kill()
    saved = int((process.stdout.read().split() or [saved])[-1])
    model = nn.Sequential(nn.Linear(512, 512))
    load_hyplora(model, path)
    values = model[0].lora_B.unique()
    assert len(values) == 1 and values.item() in (saved, saved + 1)


def test_a_save_that_fails_keeps_the_old_file(toy, tmp_path, monkeypatch):
    inject_hyplora(toy, ["q_proj"], rank=2)
    save_hyplora(toy, tmp_path / "adapter.pt")
    old = (tmp_path / "adapter.pt").read_bytes()

    def disk_full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_hyplora(toy, tmp_path / "adapter.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"] and (tmp_path / "adapter.pt").read_bytes() == old


# --- analysis ---------------------------------------------------------------------------------------


def four_points(D, base=0):
    """Gromov's definition, written out."""
    n = len(D)
    g = [[(D[i][base] + D[j][base] - D[i][j]) / 2 for j in range(n)] for i in range(n)]
    delta = max(min(g[i][k], g[k][j]) - g[i][j] for i in range(n) for j in range(n) for k in range(n))
    return 2 * delta / max(map(max, D))


def shortest_paths(weights):
    D = weights.clone().fill_diagonal_(0)
    for k in range(len(D)):
        D = torch.minimum(D, D[:, k, None] + D[k])
    return D


def test_delta_is_the_four_point_condition_written_out():
    points = randn(30, 4)
    D = torch.cdist(points, points)
    for base in (0, 7):
        for block in (4, 128):
            got = delta_hyperbolicity(distances=D, base=base, block=block)
            assert got == pytest.approx(four_points(D.tolist(), base), rel=1e-6)
    assert delta_hyperbolicity(points) == pytest.approx(delta_hyperbolicity(distances=D), rel=1e-5)


def test_delta_of_spaces_whose_answer_is_known():
    generator = torch.Generator().manual_seed(0)
    tree = torch.full((60, 60), math.inf)
    for child in range(1, 60):
        parent = int(torch.randint(child, (), generator=generator))
        tree[child, parent] = tree[parent, child] = 0.5 + torch.rand((), generator=generator)
    assert delta_hyperbolicity(distances=shortest_paths(tree)) == pytest.approx(0, abs=1e-6)
    cycle = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    assert delta_hyperbolicity(distances=cycle) == 1  # delta 1, diameter 2
    # The paper's reference values: a sphere 0.99, random graphs 0.62. On the sphere d is the angle.
    sphere = nn.functional.normalize(randn(700, 3), dim=-1)
    assert delta_hyperbolicity(distances=(sphere @ sphere.T).clamp(-1, 1).acos().fill_diagonal_(0)) > 0.93
    p = nn.functional.normalize(randn(200, 2), dim=-1) * 12 * randn(200, 1, seed=3).abs()
    q = expmap0(p, 1.0)  # far out on our own hyperboloid: delta is at most log 2, the diameter dozens
    D = torch.acosh((-lorentz_inner(q[:, None], q[None])).clamp(min=1)).fill_diagonal_(0)
    assert D.max() > 30 and delta_hyperbolicity(distances=D) < 2 * math.log(2) / D.max().item() + 1e-3


def test_delta_sampled_has_a_spread_around_the_exact_value():
    points = randn(300, 8)
    mean, std = delta_hyperbolicity(points, sample=150, repeats=5)
    assert std > 0 and abs(mean - delta_hyperbolicity(points)) < 0.1
    for wrong in (dict(), dict(points=points, distances=points), dict(distances=points), dict(points=points / 0)):
        with pytest.raises(ValueError, match="delta_hyperbolicity"):
            delta_hyperbolicity(**wrong)


@pytest.mark.parametrize("alpha, xmin", [(1.9, 1), (2.5, 1), (2.2, 5)])
def test_power_law_exponent_of_samples_from_the_law(alpha, xmin):
    x = torch.arange(xmin, 200_000, dtype=torch.float64)
    cdf = (x**-alpha).cumsum(0)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * cdf[-1]
    counts = x[torch.searchsorted(cdf, draws)]
    found, error, _ = power_law_exponent(counts, xmin=xmin)
    assert abs(found - alpha) < 4 * error and 0.003 < error < 0.03
    found, error, start = power_law_exponent(torch.cat([counts, torch.zeros(50)]))
    assert abs(found - alpha) < 5 * error + 0.02 and start >= xmin
    with pytest.raises(ValueError, match="ten counts"):
        power_law_exponent([3] * 50)


def test_norm_by_frequency_by_hand():
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    rare, frequent = norm_by_frequency(embedding, [[0] + 99 * [1], 99 * [2] + [0]], bins=2)
    assert (rare["tokens"], rare["mean"], rare["std"]) == (1, 5.0, 0.0)
    assert (frequent["tokens"], frequent["mean"], frequent["std"]) == (2, 2.0, 1.0)
    assert rare["low"] == 1 and rare["high"] == frequent["low"] == pytest.approx(10) and frequent["high"] == 100


# --- the authors' released layer --------------------------------------------------------------------


@pytest.mark.parametrize("curvature, constant", [(0.5, 0.2274), (1.0, 1.62e-3)])
def test_the_authors_layer_keeps_a_constant_length_where_the_formula_vanishes(curvature, constant, xAB):
    """README, "How the authors' code differs": sqrt K arccosh((1/K)^0.5 / sqrt K), floored, however small BAx is."""
    x, A, B = xAB
    for scale in (1e-5, 1e-6):  # (their norm has a floor of 1e-7, so not far below)
        theirs = authors_update(x, A, scale * B, curvature).norm(dim=-1)
        torch.testing.assert_close(theirs, torch.full_like(theirs, constant), rtol=2e-2, atol=0)
        ours = hyplora_update(x, A, scale * B, curvature * 7).norm(dim=-1)
        torch.testing.assert_close(
            ours, hyplora_update(x, A, B * 1e-3, curvature * 7).norm(dim=-1) * scale * 1e3, rtol=1e-2, atol=0
        )


# --- the README -------------------------------------------------------------------------------------


README = (Path(__file__).parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.findall(r"from (torch|transformers)", snippet)[0])
def test_the_readmes_snippets_run(snippet, tmp_path, monkeypatch):
    if "from transformers" in snippet:
        pytest.importorskip("transformers", reason="pip install transformers")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


COMMANDS = re.findall(r"train_minimal\.py(.*)", "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)))


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_are_ones_that_the_script_takes(line, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)  # torchrun's line
    train_minimal.parse_arguments(line.split())


# --- the script -------------------------------------------------------------------------------------


def test_train_minimal_at_its_smallest(tmp_path, capsys):
    argv = (
        "--width 16 --layers 1 --heads 2 --base-steps 8 --steps 6 --batch-size 16 --seeds 2 --curvature 0.5 1".split()
    )
    first = train_minimal.main([*argv, "--out", str(tmp_path)])
    assert "(cached)" not in capsys.readouterr().out
    second = train_minimal.main([*argv, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "(cached)" in printed and "± " in printed and "HypLoRA 1" in printed
    assert [row["name"] for row in first] == ["base"] + 2 * ["LoRA"] + 2 * ["HypLoRA 0.5"] + 2 * ["HypLoRA 1"]
    for a, b in zip(first, second):  # same seed, same table
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert len({row["metrics"]["% add, adapter off"] for row in first}) == 1
    assert {p.suffix for p in tmp_path.iterdir()} == {".pt"}


@pytest.mark.parametrize("task", train_minimal.TASKS)
def test_sums_are_right_and_held_out_pairs_are_apart(task):
    seen = {
        held_out: train_minimal.render(task, train_minimal.operand_pairs(held_out), torch.Generator().manual_seed(0))
        for held_out in (True, False)
    }
    pairs = {}
    for held_out, rows in seen.items():
        for row in rows[::17]:
            question, answer = train_minimal.show(row.tolist()).split("=")
            numbers = [int(n) for n in question.replace("-", "+").split("+")]
            signs = [1] + [1 if s == "+" else -1 for s in question if s in "+-"]
            assert sum(s * n for s, n in zip(signs, numbers)) == int(answer) and len(answer) == 3
        text = [train_minimal.show(row.tolist()) for row in rows]
        pairs[held_out] = {frozenset((t[:2], t[3:5])) for t in text}
    assert not pairs[True] & pairs[False] and len(pairs[True] | pairs[False]) == 5050


def test_a_configuration_fills_in_what_follows_and_keeps_every_layer():
    c = train_minimal.Config(100, 64, 96, 5, 4, 2)
    assert (c.head_dim, c.attention_scale, len(c.layer_types)) == (16, 0.25, 5)
    with pytest.raises(ValueError, match="1 layer_types for 3 layers"):
        train_minimal.Config(layer_types=["full_attention"])


def test_generation_is_greedy_and_later_tokens_do_not_change_earlier_ones():
    torch.manual_seed(0)
    model = train_minimal.GPT(train_minimal.Config(hidden_size=16, intermediate_size=32, num_hidden_layers=1))
    for weight in model.parameters():
        nn.init.normal_(weight)
    ids = torch.randint(13, (3, 5))
    longer = model.generate(ids, 2)
    assert torch.equal(model(longer)[:, 4:6].argmax(-1), longer[:, 5:])
    torch.testing.assert_close(model(longer)[:, :5], model(ids))
