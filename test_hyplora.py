"""The specification of hyplora.py: the life of an adapter, what follows from the law of sinh, the
numbers, the layer, and what is refused. Each test compares with something independent: a literal
formula, float64, finite differences, or a case worked by hand. Copy this file with hyplora.py."""

import math
import warnings

import pytest

with warnings.catch_warnings():  # The newest torch warns where there is no NumPy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

import hyplora
from hyplora import HypLoRALinear, expmap0, hyplora_reference, hyplora_update, llr, logmap0

torch.set_num_threads(1)  # The tensors are tiny, so that threads would only wait for each other.
close = torch.testing.assert_close


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


X, A, B = randn(5, 7), randn(3, 7, seed=1), randn(6, 3, seed=2)


def norm(v):
    return v.norm(dim=-1, keepdim=True)


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

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block["q_proj"](x)) * block["v_proj"](x)
        return self.classifier(self.shared(x))


IDS = torch.arange(11).view(1, 11)
QV = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]
TRAINED = {f"{name}.{key}" for name in QV for key in ("lora_A", "lora_B", "lora_K")}


def train(model, steps=5):
    optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model), lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapted(model, **options):
    """The model with adapters that do something: each B is drawn."""
    hyplora.inject_hyplora(model, "all-linear", **{"rank": 2, **options})
    for seed, layer in enumerate(hyplora.hyplora_layers(model).values()):
        layer.lora_B.data = 0.3 * randn(*layer.lora_B.shape, seed=seed, dtype=torch.float32)
    return model


def snapshot(model):
    """All that must stay as it was when something is refused."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {name: t.clone() for name, t in model.state_dict().items()}, flags, str(model)


def assert_unchanged(model, before):
    tensors, *rest = snapshot(model)
    assert rest == [*before[1:]] and tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)


# --- the life of an adapter ---------------------------------------------------------------------


def test_the_life_of_an_adapter(tmp_path):
    model, base = Toy(), Toy()
    assert hyplora.inject_hyplora(model, "all-linear", rank=4, alpha=8, curvature=1.0) == QV
    assert model.shared is model.blocks[0]["q_proj"]  # One linear in two places has one adapter.
    assert torch.equal(model(IDS), base(IDS)) and "alpha=8.0" in str(model)
    found = hyplora.calibrate_curvature(model, IDS)
    typical = base.embed(IDS).norm(dim=-1).median().item()
    assert found["blocks.0.v_proj"] == pytest.approx(typical**2, rel=1e-5)
    assert model.blocks[0]["v_proj"].K.item() == pytest.approx(typical**2, rel=1e-5)

    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == TRAINED
    with hyplora.disable_hyplora(model):
        assert torch.equal(model(IDS), base(IDS))

    hyplora.save_hyplora(model, tmp_path / "adapter.pt")
    loaded = Toy()
    assert hyplora.load_hyplora(loaded, tmp_path / "adapter.pt") == QV
    assert torch.equal(loaded(IDS), model(IDS)) and not torch.equal(loaded(IDS), base(IDS))
    assert hyplora.remove_hyplora(model) is model and torch.equal(model(IDS), base(IDS))
    assert model.state_dict().keys() == base.state_dict().keys()


def test_what_trains_is_saved_and_loading_switches_it_on(tmp_path):
    model = adapted(Toy())
    model.classifier.requires_grad_(True)
    train(model)
    hyplora.save_hyplora(model, tmp_path / "adapter.pt")
    for loaded in (Toy(), adapted(Toy())):
        hyplora.load_hyplora(loaded, tmp_path / "adapter.pt")
        assert torch.equal(loaded(IDS), model(IDS)) and loaded.classifier.weight.requires_grad
    assert hyplora.hyplora_state_dict(loaded).keys() == hyplora.hyplora_state_dict(model).keys()
    model.requires_grad_(False)  # Now a trained head would be lost.
    with pytest.warns(UserWarning, match="not saved: .*classifier.weight"):
        hyplora.save_hyplora(model, tmp_path / "adapter.pt")


def test_the_base_model_is_one_switch_away_however_the_switches_overlap():
    model, base = adapted(Toy()), Toy()
    first, second = hyplora.disable_hyplora(model), hyplora.disable_hyplora(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(IDS), base(IDS)) and not model.shared.enabled
    second.__exit__(None, None, None)
    assert not torch.equal(model(IDS), base(IDS)) and model.shared.enabled


def test_targets_are_endings_of_names():
    assert hyplora.inject_hyplora(Toy(), ["v_proj", "q_proj"]) == QV
    assert hyplora.inject_hyplora(Toy(), ["1.v_proj", "classifier"]) == [QV[3], "classifier"]


def test_K_is_in_an_optimizer_group_without_weight_decay():
    weights, curvatures = hyplora.hyplora_parameters(adapted(Toy()))
    assert len(weights["params"]) == 8 and [p.shape for p in curvatures["params"]] == 4 * [(1,)]
    groups = torch.optim.AdamW([weights, curvatures], weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    with pytest.raises(ValueError, match="call inject_hyplora first"):
        hyplora.hyplora_parameters(Toy())


# --- geometry -----------------------------------------------------------------------------------


def textbook_expmap0(v, K):
    r = norm(v) / K**0.5
    return torch.cat([K**0.5 * torch.cosh(r), K**0.5 * torch.sinh(r) * v / norm(v)], dim=-1)


def textbook_logmap0(p, K):
    """By arccosh of time, where hyplora.py goes by asinh of space."""
    return K**0.5 * torch.acosh(p[..., :1] / K**0.5) * p[..., 1:] / norm(p[..., 1:])


def on_manifold(p, K):
    want = torch.tensor(-K, dtype=torch.float64)
    return torch.allclose(hyplora.lorentz_inner(p, p), want, atol=1e-10 * p.max() ** 2)


def test_lorentz_inner_by_hand():
    p, q = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[5.0, 4.0, 6.0], [1.0, 0.0, 0.0]])
    assert hyplora.lorentz_inner(p, q).tolist() == [-15 + 4 + 12, -3]


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_the_maps_are_the_textbooks_stay_on_the_manifold_and_invert_each_other(K):
    p = expmap0(X, K)
    close(p, textbook_expmap0(X, K))
    close(logmap0(p, K), textbook_logmap0(p, K))
    close(logmap0(p, K), X)
    q = llr(p, A, B, K)
    close(q[..., 1:], p[..., 1:] @ (B @ A).T)
    assert on_manifold(p, K) and on_manifold(q, K) and (p[..., 0] > 0).all()
    origin = torch.tensor([K**0.5, *7 * [0.0]], dtype=torch.float64)
    distance = K**0.5 * torch.acosh(-hyplora.lorentz_inner(origin, p) / K)
    close(distance, X.norm(dim=-1))  # As measured along the surface, p is as far as X is long.


def test_at_the_origin_the_map_and_its_differential_are_exact():
    v = torch.zeros(3, requires_grad=True)
    assert expmap0(v, 4.0).tolist() == [2, 0, 0, 0]
    expmap0(v, 4.0)[1:].sum().backward()
    assert v.grad.tolist() == [1, 1, 1]


# --- the law of sinh ----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [0.1, 1.0, 30.0])
def test_the_law_of_sinh_is_the_three_maps(K):
    literal = textbook_logmap0(llr(textbook_expmap0(X, K), A, B, K), K)
    close(hyplora_reference(X, A, B, K), literal)
    close(hyplora_update(X, A, B, K), literal)
    close(hyplora_update(X[0], A, B, torch.tensor(K)), literal[0])
    close(hyplora_update(X.view(5, 1, 7), A, B, K), literal.view(5, 1, 6))


def test_one_token_by_hand():
    """x = 1.4, BA = 0.5, K = 1: LoRA's update is 0.70, HypLoRA's asinh(0.5 * 1.9043) = 0.8471."""
    x, one = torch.tensor([1.4]), torch.eye(1)
    assert hyplora_update(x, one, 0.5 * one, 1.0).item() == pytest.approx(0.8471, abs=1e-4)
    assert hyplora_reference(x, one, 0.5 * one, math.inf).item() == pytest.approx(0.70)


def test_consequence_1_an_infinite_K_is_lora():
    lora = X @ A.T @ B.T
    close(hyplora_update(X, A, B, math.inf), lora, rtol=1e-15, atol=0)
    close(hyplora_update(X, A, B, torch.tensor(math.inf)), lora)


def test_consequence_2_the_length_lies_between_that_of_lora_and_that_of_the_token():
    for K in (1e-3, 0.1, 1.0, 30.0, 1e3):
        for gain in (0.01, 0.5, 1.0, 2.0, 50.0):
            x = randn(1000, 7) * torch.logspace(-2, 1, 1000).view(-1, 1)
            x = x[norm(x).flatten() < 12 * K**0.5]  # Beyond max_radius, it counts as nearer.
            lora = norm(x @ A.T @ B.T) * gain
            got = norm(hyplora_update(x, A, gain * B, K))
            low, high = torch.minimum(lora, norm(x)), torch.maximum(lora, norm(x))
            assert (got >= low * (1 - 1e-12)).all() and (got <= high * (1 + 1e-12)).all()


def test_consequence_3_far_from_the_origin_a_gain_adds():
    x = 10 * F.normalize(X, dim=-1)
    gain = norm(x @ A.T @ B.T) / 10
    close(norm(hyplora_update(x, A, B, 1.0)), 10 + gain.log(), rtol=1e-7, atol=0)


def test_consequence_4_near_the_origin_phi_depends_on_both_lengths():
    """The norm-dependent terms of the paper's Proposition 1."""
    lora, K = X @ A.T @ B.T, 1e5
    first_order = (norm(X) ** 2 - norm(lora) ** 2) / (6 * K)
    phi = hyplora_update(X, A, B, K) / lora
    assert first_order.abs().max() > 1e-5
    assert ((phi - 1 - first_order).abs() < 30 * first_order.abs().max() ** 2).all()
    x, small = 1.41 * F.normalize(X, dim=-1), 1e-6 * B
    phi = norm(hyplora_update(x, A, small, 1.0)) / norm(x @ A.T @ small.T)
    close(phi, torch.full_like(phi, math.sinh(1.41) / 1.41))


def test_consequence_5_the_unit_of_length_and_K_are_one_choice():
    s, K = 3.7, 0.8
    close(hyplora_update(s * X, A, B, s * s * K), s * hyplora_update(X, A, B, K))


def test_consequence_6_a_product_in_the_tangent_plane_cancels_and_llr_does_not():
    K, lora = 0.8, X @ A.T @ B.T
    lowered = logmap0(expmap0(X, K), K)
    close(logmap0(expmap0(lowered @ A.T @ B.T, K), K), lora)
    assert (hyplora_update(X, A, B, K) - lora).norm() > 0.1 * lora.norm()


@pytest.mark.parametrize("curvature, extra", [(0.5, 1), (math.inf, 0), (1e37, 0)])
def test_consequence_7_there_are_as_many_parameters_as_in_lora_and_one_more(curvature, extra):
    layer = HypLoRALinear(nn.Linear(7, 6).requires_grad_(False), rank=3, curvature=curvature)
    counts = [sum(map(torch.numel, group["params"])) for group in hyplora.hyplora_parameters(layer)]
    assert counts == [(7 + 6) * 3, extra][: 1 + extra]


def test_consequence_7_no_matrix_does_what_the_adapter_does():
    update = hyplora_update(X, A, B, 0.5)
    assert (hyplora_update(2 * X, A, B, 0.5) - 2 * update).norm() > 0.1 * update.norm()


def test_a_token_beyond_max_radius_is_treated_as_if_it_lay_there():
    K, bound = 0.5, 4.0
    r = norm(X) / K**0.5
    moved = torch.where(r > bound, X * bound / r, X)
    assert (r > bound).any() and (r < bound).any()
    close(hyplora_update(X, A, B, K, max_radius=bound), hyplora_reference(moved, A, B, K))


# --- numbers and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_finite_and_right_against_float64(dtype):
    grid = [
        (token, gain, K)
        for token in (0.0, 1e-12, 1e-6, 1.0, 1e3, 1e6, 1e12)
        for gain in (0.0, 1e-10, 1e-3, 1.0, 1e3)
        for K in (1e-6, 1e-3, 1.0, 50.0, 1e6, 1e12, math.inf)
    ]
    for token, gain, K in grid:
        x = (token * F.normalize(X, dim=-1)).to(dtype).requires_grad_()
        a, b, k = (t.float().requires_grad_() for t in (A, gain * B, torch.tensor([K])))
        y = hyplora_update(x, a, b, k)
        results = [y, *torch.autograd.grad(y.sum(), [x, a, b, k])]
        assert all(t.isfinite().all() for t in results), (token, gain, K)
        if dtype == torch.float32 and 0 < token <= 12 * K**0.5 < math.inf and gain > 0:
            exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
            want = hyplora_reference(*exact, K)
            wants = [want, *torch.autograd.grad(want.sum(), exact)]
            for got, want in zip(results, wants):
                assert (got - want).norm() <= 1e-5 * want.norm(), (token, gain, K)


@pytest.mark.parametrize("token", [1.0, 0.0, 30.0], ids=["inside", "x=0", "clipped"])
@pytest.mark.parametrize("gain", [1.0, 0.0], ids=["B", "B=0"])
def test_gradients_against_finite_differences(token, gain):
    K = torch.tensor([0.7], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (token * X, A, gain * B, K)]
    assert torch.autograd.gradcheck(lambda *t: hyplora_update(*t, max_radius=6.0), inputs)


# --- the layer ----------------------------------------------------------------------------------


def test_the_layer_is_its_formula():
    base = nn.Linear(7, 6)
    layer = HypLoRALinear(base, rank=3, alpha=6.0, curvature=0.25)
    nn.init.normal_(layer.lora_B)
    x, a, b = X.float(), layer.lora_A, layer.lora_B
    assert layer.lora_unit.item() == pytest.approx(7**0.5)
    assert layer.scaling == 2 and a.abs().max() <= 7**-0.5  # A is drawn as in LoRA.
    close(layer(x), base(x) + 2.0 * hyplora_reference(x, a, b, 0.25 * 7))
    nn.init.constant_(layer.lora_unit, 5.0)
    nn.init.constant_(layer.lora_K, 1.0)
    assert layer.K.item() == pytest.approx(0.25 * 25 * math.e)
    close(layer(x), base(x) + 2.0 * hyplora_reference(x, a, b, 0.25 * 25 * math.e))


def test_an_infinite_curvature_runs_loras_two_products():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3, curvature=math.inf)
    nn.init.normal_(layer.lora_B)
    x = X.float()
    update = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    assert torch.equal(layer(x), torch.add(layer.base(x), update, alpha=layer.scaling))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_changes_nothing_and_the_output_has_the_bases_dtype(dtype):
    layer = HypLoRALinear(nn.Linear(7, 6, dtype=dtype), rank=3, alpha=6)
    x = randn(2, 4, 7, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_K.dtype == torch.float32
    nn.init.normal_(layer.lora_B)
    exact = hyplora_update(*[t.double() for t in (x, layer.lora_A, layer.lora_B, layer.K)])
    want = layer.base(x).double() + 2 * exact
    assert layer(x).dtype == dtype
    close(layer(x).double(), want, rtol=2e-2, atol=2e-2)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    layer = HypLoRALinear(nn.Linear(7, 6).eval(), rank=3, dropout=0.5)
    x = randn(100, 7, dtype=torch.float32)
    assert not layer.training and torch.equal(layer.train()(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


# --- measuring ----------------------------------------------------------------------------------


def test_calibration_is_by_the_median_so_that_a_sink_does_not_rule_it():
    model, x = adapted(nn.Sequential(nn.Linear(64, 64))), randn(1024, 64, dtype=torch.float32)
    x[::256] *= 300  # This is an attention sink.
    K = hyplora.calibrate_curvature(model, x)["0"]
    assert (norm(x) / K**0.5).median().item() == pytest.approx(1 / math.sqrt(0.5), rel=1e-3)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["rank", "alpha", "dropout", "curvature"])
def test_an_option_out_of_range_is_refused_and_changes_nothing(option):
    model, before = Toy(), snapshot(Toy())
    values = dict(rank=[0, -1], dropout=[1.0, -0.1], alpha=[0, -1.0, math.nan, math.inf])
    for wrong in values.get(option, [0, -1.0, 9e-13, math.nan]):
        with pytest.raises(ValueError, match=f"{option}.*got .*'{option}': {wrong}"):
            hyplora.inject_hyplora(model, "all-linear", **{option: wrong})
        assert_unchanged(model, before)


def test_a_target_that_names_nothing_or_a_second_adapter_is_refused():
    model, before = Toy(), snapshot(Toy())
    for targets in (["q_porj"], ["proj"], ["q_proj", "embed"], "q_proj", []):
        with pytest.raises(ValueError, match="a list out of|no layer"):
            hyplora.inject_hyplora(model, targets)
    assert_unchanged(model, before)
    before = snapshot(adapted(model))
    with pytest.raises(ValueError, match="has adapters"):
        hyplora.inject_hyplora(model, "all-linear")
    assert_unchanged(model, before)
