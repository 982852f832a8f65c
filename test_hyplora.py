"""The specification of hyplora.py. Each test compares it with something independent: a literal
formula, float64, finite differences, or a case worked by hand. Copy this file with hyplora.py."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    disable_hyplora,
    expmap0,
    hyplora_parameters,
    hyplora_reference,
    hyplora_update,
    inject_hyplora,
    llr,
    load_hyplora,
    logmap0,
    lorentz_inner,
    remove_hyplora,
    save_hyplora,
)

torch.set_num_threads(1)  # The tensors are tiny, so that threads would only wait for each other.


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


X, A, B = randn(5, 7), randn(3, 7, seed=1), randn(6, 3, seed=2)


def length(v):
    return v.norm(dim=-1, keepdim=True)


# --- geometry -----------------------------------------------------------------------------------


def textbook_expmap0(v, K):
    r = length(v) / K**0.5
    return torch.cat([K**0.5 * torch.cosh(r), K**0.5 * torch.sinh(r) * v / length(v)], dim=-1)


def textbook_logmap0(p, K):
    """By arccosh of time, where hyplora.py goes by asinh of space."""
    space = p[..., 1:]
    return K**0.5 * torch.acosh(p[..., :1] / K**0.5) * space / length(space)


def on_manifold(p, K):
    return torch.allclose(lorentz_inner(p, p), torch.tensor(-K).double(), atol=1e-10 * p.max() ** 2)


def test_lorentz_inner_by_hand():
    p, q = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[5.0, 4.0, 6.0], [1.0, 0.0, 0.0]])
    assert lorentz_inner(p, q).tolist() == [-15 + 4 + 12, -3]


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_the_maps_are_the_textbooks_stay_on_the_manifold_and_invert_each_other(K):
    p = expmap0(X, K)
    torch.testing.assert_close(p, textbook_expmap0(X, K))
    torch.testing.assert_close(logmap0(p, K), textbook_logmap0(p, K))
    torch.testing.assert_close(logmap0(p, K), X)
    q = llr(p, A, B, K)
    torch.testing.assert_close(q[..., 1:], p[..., 1:] @ (B @ A).T)
    assert on_manifold(p, K) and on_manifold(q, K) and (p[..., 0] > 0).all()


def test_expmap0_keeps_the_length_as_measured_along_the_surface():
    K = 2.5
    origin = torch.tensor([K**0.5, *7 * [0.0]], dtype=torch.float64)
    distance = K**0.5 * torch.acosh(-lorentz_inner(origin, expmap0(X, K)) / K)
    torch.testing.assert_close(distance, X.norm(dim=-1))


def test_at_the_origin_the_map_and_its_differential_are_exact():
    v = torch.zeros(3, requires_grad=True)
    assert expmap0(v, 4.0).tolist() == [2, 0, 0, 0]
    expmap0(v, 4.0)[1:].sum().backward()
    assert v.grad.tolist() == [1, 1, 1]


# --- the law of sinh ----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_the_law_of_sinh_is_the_three_maps(K):
    literal = textbook_logmap0(llr(textbook_expmap0(X, K), A, B, K), K)
    torch.testing.assert_close(hyplora_reference(X, A, B, K), literal)
    torch.testing.assert_close(hyplora_update(X, A, B, K), literal)
    torch.testing.assert_close(hyplora_update(X[0], A, B, torch.tensor(K)), literal[0])
    torch.testing.assert_close(hyplora_update(X.view(5, 1, 7), A, B, K), literal.view(5, 1, 6))


def test_the_law_by_hand():
    """A token of radius 1 and a gain of 2: sinh r' = 2 sinh 1, so that r' = 1.5902."""
    update = hyplora_update(torch.tensor([[3.0, 4.0]]), torch.eye(2), 2 * torch.eye(2), 25.0)
    assert update[0].tolist() == pytest.approx([1.5902 * 3, 1.5902 * 4], rel=1e-4)


def test_consequence_1_an_infinite_K_is_lora():
    lora = X @ A.T @ B.T
    torch.testing.assert_close(hyplora_update(X, A, B, math.inf), lora, rtol=1e-15, atol=0)
    torch.testing.assert_close(hyplora_update(X, A, B, torch.tensor(math.inf)), lora)


def test_consequence_2_the_length_lies_between_that_of_lora_and_that_of_the_token():
    for K in (1e-3, 0.1, 1.0, 30.0, 1e3):
        for gain in (0.01, 0.5, 1.0, 2.0, 50.0):
            x = randn(1000, 7) * torch.logspace(-2, 1, 1000).view(-1, 1)
            x = x[length(x).flatten() < 12 * K**0.5]  # Beyond max_radius, it counts as nearer.
            lora = length(x @ A.T @ B.T) * gain
            got = length(hyplora_update(x, A, gain * B, K))
            low, high = torch.minimum(lora, length(x)), torch.maximum(lora, length(x))
            assert (got >= low * (1 - 1e-12)).all() and (got <= high * (1 + 1e-12)).all()
    large = length(hyplora_update(X, A, B, 1e9))
    torch.testing.assert_close(large, length(X @ A.T @ B.T), rtol=1e-6, atol=0)
    near_zero = length(hyplora_update(X, A, B, 1e-3, max_radius=1e3))
    torch.testing.assert_close(near_zero, length(X), rtol=0.05, atol=0)


def test_consequence_3_far_from_the_origin_a_gain_adds():
    x = 10 * F.normalize(X, dim=-1)
    gain = length(x @ A.T @ B.T) / 10
    got = length(hyplora_update(x, A, B, 1.0))
    torch.testing.assert_close(got, 10 + gain.log(), rtol=1e-7, atol=0)


def test_consequence_4_near_the_origin_phi_depends_on_both_lengths():
    lora, K = X @ A.T @ B.T, 1e5
    first_order = (length(X) ** 2 - length(lora) ** 2) / (6 * K)
    phi = hyplora_update(X, A, B, K) / lora
    assert first_order.abs().max() > 1e-5
    assert ((phi - 1 - first_order).abs() < 30 * first_order.abs().max() ** 2).all()
    x, small = 1.41 * F.normalize(X, dim=-1), 1e-6 * B
    phi = length(hyplora_update(x, A, small, 1.0)) / length(x @ A.T @ small.T)
    torch.testing.assert_close(phi, torch.full_like(phi, math.sinh(1.41) / 1.41))


def test_consequence_5_the_unit_of_length_and_K_are_one_choice():
    s, K = 3.7, 0.8
    scaled = hyplora_update(s * X, A, B, s * s * K)
    torch.testing.assert_close(scaled, s * hyplora_update(X, A, B, K))


def test_consequence_6_a_product_in_the_tangent_plane_cancels_and_llr_does_not():
    K, lora = 0.8, X @ A.T @ B.T
    lowered = logmap0(expmap0(X, K), K)
    torch.testing.assert_close(logmap0(expmap0(lowered @ A.T @ B.T, K), K), lora)
    assert (hyplora_update(X, A, B, K) - lora).norm() > 0.1 * lora.norm()


@pytest.mark.parametrize("curvature, extra", [(0.5, 1), (math.inf, 0)])
def test_consequence_7_there_are_as_many_parameters_as_in_lora_and_one_more(curvature, extra):
    layer = HypLoRALinear(nn.Linear(7, 6).requires_grad_(False), rank=3, curvature=curvature)
    count = sum(p.numel() for group in hyplora_parameters(layer) for p in group["params"])
    assert count == (7 + 6) * 3 + extra


def test_consequence_8_no_matrix_does_what_the_adapter_does():
    update = hyplora_update(X, A, B, 0.5)
    assert (hyplora_update(2 * X, A, B, 0.5) - 2 * update).norm() > 0.1 * update.norm()


def test_a_token_beyond_max_radius_is_treated_as_if_it_lay_there():
    K, radius = 0.5, 4.0
    r = length(X) / K**0.5
    moved = torch.where(r > radius, X * radius / r, X)
    assert (r > radius).any() and (r < radius).any()
    got = hyplora_update(X, A, B, K, max_radius=radius)
    torch.testing.assert_close(got, hyplora_reference(moved, A, B, K))


# --- numbers and gradients ----------------------------------------------------------------------

GRID = [
    (token, gain, K)
    for token in (0.0, 1e-12, 1e-6, 1.0, 1e3, 1e6, 1e12)
    for gain in (0.0, 1e-10, 1e-3, 1.0, 1e3)
    for K in (1e-6, 1e-3, 1.0, 50.0, 1e6, 1e12, math.inf)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_finite_and_right_against_float64(dtype):
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for token, gain, K in GRID:
        x = (token * F.normalize(X, dim=-1)).to(dtype).requires_grad_()
        a, b, k = (t.float().requires_grad_() for t in (A, gain * B, torch.tensor([K])))
        y = hyplora_update(x, a, b, k)
        results = [y, *torch.autograd.grad(y.sum(), [x, a, b, k])]
        assert all(t.isfinite().all() for t in results), (token, gain, K)
        alone = torch.no_grad()(hyplora_update)(x, a, b, k)  # Then |BAx| is read off BAx.
        assert (alone - y).norm() <= rounding * y.norm(), (token, gain, K)
        if dtype == torch.float32 and 0 < token <= 12 * K**0.5 < math.inf and gain > 0:
            exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
            want = hyplora_reference(*exact, K)
            wants = [want, *torch.autograd.grad(want.sum(), exact)]
            for got, want in zip(results, wants):
                assert (got - want).norm() <= 1e-5 * want.norm(), (token, gain, K)


def test_float16_is_finite_wherever_loras_own_product_is():
    layer = HypLoRALinear(nn.Linear(64, 64, bias=False, dtype=torch.float16), alpha=8)
    nn.init.zeros_(layer.base.weight)
    nn.init.normal_(layer.lora_B)
    x = randn(64, 64, dtype=torch.float32) * torch.logspace(-6, 4, 64).view(-1, 1)
    x = x.clamp(-65504, 65504).half()
    lora = F.linear(F.linear(x, layer.lora_A.half()), layer.lora_B.half())
    out = layer(x)
    assert out.dtype == torch.float16 and out.isfinite()[lora.isfinite()].all()
    exact = [t.double() for t in (x, layer.lora_A, layer.lora_B, layer.K)]
    want = hyplora_update(*exact).clamp(-65504, 65504)
    assert (length(out - want) <= 2e-3 * length(want) + 1e-6).all()


@pytest.mark.parametrize("token", [1.0, 0.0, 30.0], ids=["inside", "x=0", "clipped"])
@pytest.mark.parametrize("gain", [1.0, 0.0], ids=["B", "B=0"])
def test_gradients_against_finite_differences(token, gain):
    K = torch.tensor([0.7], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (token * X, A, gain * B, K)]
    assert torch.autograd.gradcheck(lambda *t: hyplora_update(*t, max_radius=6.0), inputs)
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3).double()
    nn.init.normal_(layer.lora_B, std=gain)
    assert torch.autograd.gradcheck(layer, inputs[:1])


def test_gradients_of_gradients_and_forward_mode_are_those_of_the_three_maps():
    v, K = randn(5, 7, seed=4), 0.7

    def hessian_product(update, x):
        gradient = torch.func.grad(lambda x: update(x, A, B, K).square().sum())
        return torch.func.jvp(gradient, (x,), (v,))[1]

    ours = hessian_product(hyplora_update, X)
    torch.testing.assert_close(ours, hessian_product(hyplora_reference, X))
    at_zero = hessian_product(hyplora_update, 0 * X)
    torch.testing.assert_close(at_zero, 2 * v @ (B @ A).T @ (B @ A))  # There, BAx is all of it.
    penalty = []
    for update in (hyplora_update, hyplora_reference):
        b = B.clone().requires_grad_()
        (slope,) = torch.autograd.grad(update(X, A, b, K).sum(), b, create_graph=True)
        penalty.append(torch.autograd.grad(slope.square().sum(), b)[0])
    torch.testing.assert_close(*penalty)


def test_the_output_may_be_changed_in_place():
    layer = HypLoRALinear(nn.Linear(7, 7), rank=3)
    nn.init.normal_(layer.lora_B)
    x = X.float()
    (want,) = torch.autograd.grad((2.0 * layer(x) + x).relu().sum(), layer.lora_A)
    out = layer(x)
    out *= 2.0
    out += x
    (got,) = torch.autograd.grad(nn.ReLU(inplace=True)(out).sum(), layer.lora_A)
    assert torch.equal(got, want) and want.norm() > 0


def test_a_trace_can_be_saved(tmp_path):
    model = adapted(nn.Sequential(nn.Linear(7, 6), nn.Tanh()))
    x = X.float()
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "trace.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "trace.pt")(x[:2]), model(x[:2]))


# --- the layer ----------------------------------------------------------------------------------


def adapted(model, targets="all-linear", **options):
    """The model with adapters that do something: each B is drawn."""
    inject_hyplora(model, targets, **{"rank": 2, **options})
    for seed, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("lora_B"):
            p.data = 0.3 * randn(*p.shape, seed=seed, dtype=torch.float32)
    return model


def test_the_layer_is_its_formula():
    base = nn.Linear(7, 6)
    layer = HypLoRALinear(base, rank=3, alpha=6.0, curvature=0.25)
    nn.init.normal_(layer.lora_B)
    x, K = X.float(), 0.25 * 7
    assert layer.K.item() == pytest.approx(K) and layer.lora_K.item() == 0 and layer.scaling == 2
    want = base(x) + 2.0 * hyplora_reference(x, layer.lora_A, layer.lora_B, K)
    torch.testing.assert_close(layer(x), want)
    nn.init.constant_(layer.lora_K, 1.0)
    want = base(x) + 2.0 * hyplora_reference(x, layer.lora_A, layer.lora_B, K * math.e)
    torch.testing.assert_close(layer(x), want)
    assert not HypLoRALinear(base, learn_curvature=False).lora_K.requires_grad


def test_an_infinite_curvature_runs_loras_two_products_and_nothing_else():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3, curvature=math.inf)
    nn.init.normal_(layer.lora_B)
    x = X.float()
    update = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    assert torch.equal(layer(x), torch.add(layer.base(x), update, alpha=layer.scaling))
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::linear"] == 3 and counts["aten::add"] == 1
    assert not counts.keys() & {"aten::mul", "aten::sum", "aten::sqrt", "aten::exp", "aten::asinh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_changes_nothing_and_the_output_has_the_bases_dtype(dtype):
    layer = HypLoRALinear(nn.Linear(7, 6, dtype=dtype), rank=3)
    x = randn(2, 4, 7, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_K.dtype == torch.float32
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer.base(x)) and layer(x).dtype == dtype


def test_under_autocast_the_lengths_are_still_in_float32():
    model = adapted(nn.Sequential(nn.Linear(7, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X.float())
    exact = copy.deepcopy(model).bfloat16()
    exact[0].lora_B.data, exact[0].lora_A.data = model[0].lora_B.data, model[0].lora_A.data
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact(X.bfloat16()))


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3, dropout=0.5)
    x = randn(100, 7, dtype=torch.float32)
    assert torch.equal(layer.train()(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_further_arguments_reach_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, factor, shift=0.0):
            return factor * super().forward(x) + shift

    layer = HypLoRALinear(Scaled(7, 6))
    assert torch.equal(layer(X.float(), 2.0, shift=1.0), layer.base(X.float(), 2.0, shift=1.0))


def test_K_goes_on_learning_after_a_move_to_bfloat16():
    model = adapted(nn.Sequential(nn.Linear(7, 6))).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-4)
    before = model[0].K.item()
    for _ in range(3):
        model(X.bfloat16()).square().sum().backward()
        optimizer.step()
    assert model[0].K.item() != before


WRONG = [dict(rank=0), dict(rank=2.0), dict(alpha=0), dict(alpha="16"), dict(dropout=1.0)]
WRONG += [dict(curvature=0), dict(curvature=math.nan), dict(max_radius=0), dict(max_radius=100)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_option_out_of_range_is_named_and_changes_nothing(wrong):
    model = nn.Sequential(nn.Linear(7, 6))
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        inject_hyplora(model, "all-linear", **wrong)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


# --- injection ----------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two blocks with the names of attention, one linear that stands in two places, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        blocks = [{name: nn.Linear(8, 8) for name in ("q_proj", "v_proj")} for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.shared = self.blocks[0]["q_proj"]
        self.classifier = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block["q_proj"](x)) * block["v_proj"](x)
        return self.classifier(self.shared(x))


IDS = torch.arange(11).view(1, 11)
QV = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]


def train(model, steps=5):
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_life_of_an_adapter(tmp_path):
    model, base = Toy(), Toy()
    assert inject_hyplora(model, "all-linear", rank=4, alpha=8, curvature=1.0) == QV
    assert model.shared is model.blocks[0]["q_proj"]  # One linear in two places has one adapter.
    assert torch.equal(model(IDS), base(IDS))
    found = calibrate_curvature(model, IDS)
    seen = base.embed(IDS).square().sum(dim=-1).mean().item()
    assert found["blocks.0.v_proj"] == pytest.approx(seen, rel=1e-5)
    assert model.blocks[0]["v_proj"].K.item() == pytest.approx(seen, rel=1e-5)

    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.{key}" for name in QV for key in ("lora_A", "lora_B", "lora_K")}
    with disable_hyplora(model):
        assert torch.equal(model(IDS), base(IDS))

    save_hyplora(model, tmp_path / "adapter.pt")
    loaded = Toy()
    assert load_hyplora(loaded, tmp_path / "adapter.pt") == QV
    assert torch.equal(loaded(IDS), model(IDS)) and not torch.equal(loaded(IDS), base(IDS))
    assert remove_hyplora(model) is model and torch.equal(model(IDS), base(IDS))
    assert model.state_dict().keys() == base.state_dict().keys()


def test_targets_are_endings_of_names():
    assert inject_hyplora(Toy(), ["v_proj", "q_proj"]) == QV
    assert inject_hyplora(Toy(), ["1.v_proj", "classifier"]) == [QV[3], "classifier"]
    with pytest.raises(ValueError, match="'q_porj' names nothing.*classifier, q_proj, v_proj"):
        inject_hyplora(Toy(), ["q_porj"])
    with pytest.raises(ValueError, match="'embed' names Embedding"):
        inject_hyplora(Toy(), ["embed"])


def test_K_is_in_an_optimizer_group_without_weight_decay():
    weights, curvatures = hyplora_parameters(adapted(Toy()))
    assert len(weights["params"]) == 8 and [p.shape for p in curvatures["params"]] == 4 * [(1,)]
    groups = torch.optim.AdamW([weights, curvatures], weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
