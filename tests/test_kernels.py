"""scaling/kernels.py beside hyplora.py's own form, in the same dtype and in float64.

On a GPU the kernels are compiled. Without one they run in Triton's interpreter, which has to be
chosen before the kernels are imported.
"""

import copy
import math
import os
import pickle

import pytest
import torch
import torch.nn as nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from hyplora import (
    HypLoRALinear,
    disable_hyplora,
    hyplora_layers,
    hyplora_update,
    length,
    load_hyplora,
    remove_hyplora,
    save_hyplora,
)
from scaling import kernels
from scaling.kernels import KernelHypLoRALinear, use_kernels
from test_hyplora import adapted

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert (DEVICE == "cuda") != kernels.IS_INTERPRETED

# How far an error may be above 1.5 times the plain form's: exp and log on a GPU are approximate,
# and the interpreter cuts a number to bfloat16 where a GPU rounds it.
FLOOR = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 1e-3}
if kernels.IS_INTERPRETED:
    FLOOR[torch.bfloat16] = 4e-3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_layer(d_in, d_out, rank, dtype=torch.float32, **options):
    """A layer that has trained: B and lora_K are not 0."""
    base = nn.Linear(d_in, d_out, device=DEVICE, dtype=dtype)
    layer = HypLoRALinear(base, rank=rank, **options)
    with torch.no_grad():
        layer.lora_A.copy_(randn(rank, d_in, seed=1) / d_in**0.5)
        layer.lora_B.copy_(randn(d_out, rank, seed=2) / d_out**0.5)
        layer.lora_K.fill_(0.3)
    return layer


def with_kernels(layer):
    layer = copy.deepcopy(layer)
    assert use_kernels(nn.Sequential(layer)) == ["0"]
    return layer


def run(layer, x, grad=None):
    """The output of a layer and all gradients, in float64."""
    dtype = layer.weight.dtype
    x = x.detach().to(dtype).requires_grad_()
    out = layer(x)
    grad = torch.ones_like(out) if grad is None else grad.to(dtype)
    wanted = {"x": x, "A": layer.lora_A, "B": layer.lora_B, "K": layer.lora_K}
    gradients = torch.autograd.grad(out, list(wanted.values()), grad)
    results = dict(zip(wanted, gradients), out=out.detach())
    return {name: result.double() for name, result in results.items()}


def error(result, exact):
    return ((result - exact).norm() / exact.norm()).item()


def check_errors(layer, x):
    """The kernels' errors against float64 are no larger than the plain form's.

    The gradient of the output is random, but along the update on the whole: so the tokens' parts
    of K's gradient have one sign, and their sum has no cancellation that would only add noise.
    """
    own = copy.deepcopy(layer).double()
    update = (own(x.double()) - own.base(x.double())).detach()
    grad = randn(*update.shape, seed=4) + update * (update.shape[-1] ** 0.5 / length(update))
    grad = grad.to(x.dtype)
    exact = run(own, x, grad)
    plain = run(layer, x, grad)
    fast = run(with_kernels(layer), x, grad)
    for name in exact:
        bound = 1.5 * error(plain[name], exact[name]) + FLOOR[x.dtype]
        assert error(fast[name], exact[name]) < bound, name


# --- Accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "d_in, d_out, rank",
    [(7, 6, 3), (300, 260, 256), (5000, 9, 2), (9, 9001, 2)],  # The last rows are of many blocks.
)
def test_errors_are_no_larger_than_the_plain_forms(dtype, d_in, d_out, rank):
    layer = make_layer(d_in, d_out, rank, dtype)
    for radius in (0.01, 1.4, 8.0, 20.0):
        check_errors(layer, (radius * math.sqrt(2) * randn(2, 3, d_in, seed=3)).to(dtype))


def test_an_ill_conditioned_B_loses_no_digits():
    """B has one large direction and noise, and the tokens have no part in the large direction."""
    layer = make_layer(64, 96, 8)
    large = nn.functional.normalize(randn(1, 8, seed=5), dim=-1)
    unseen = (large @ layer.lora_A).detach()
    x = randn(20, 64, seed=6)
    x = x - x @ unseen.T / unseen.square().sum() * unseen
    x = 11.9 * layer.K.sqrt().detach() * nn.functional.normalize(x, dim=-1)
    with torch.no_grad():
        column = nn.functional.normalize(randn(96, 1, seed=7), dim=0)
        layer.lora_B.copy_(column @ large + 1e-3 * randn(96, 8, seed=8))
        layer.weight.zero_()
        layer.bias.zero_()
    check_errors(layer, x)


def token_layer(gain, K):
    """A layer of width 1 without a base: out = phi * gain * x."""
    layer = make_layer(1, 1, 1, alpha=1)
    with torch.no_grad():
        for name, value in (("weight", 0), ("bias", 0), ("lora_A", 1), ("lora_K", 0)):
            getattr(layer, name).fill_(value)
        layer.lora_B.fill_(gain)
        layer.lora_unit.fill_(math.sqrt(2 * K))
    return layer


@pytest.mark.parametrize("gain", [1e-10, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("K", [1e-6, 1e6])
def test_each_token_is_right_to_six_digits(K, gain):
    radii = torch.tensor([1e-12, 1e-6, 1e-3, 0.1, 0.29, 0.49, 0.51, 1, 3, 11.9, 12.1, 40, 1e6])
    x = (radii * math.sqrt(K))[:, None].to(DEVICE)
    layer = token_layer(gain, K)
    own = copy.deepcopy(layer).double()
    exact = hyplora_update(x.double(), own.lora_A, own.lora_B, own.K)
    for result in (run(with_kernels(layer), x)["out"], with_kernels(layer)(x)):
        assert torch.allclose(result.double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("gain", [0.0, 0.5, 3.0])
def test_the_gradient_of_K_near_the_origin_is_that_of_proposition_1(gain):
    """phi is 1 + (|x|^2 - |BAx|^2) / (6 K) there, of which a float32 holds nothing."""
    x = torch.tensor([[1e-3]], device=DEVICE)
    result = run(with_kernels(token_layer(gain, 1.0)), x)
    expected = -gain * x.double() * x.double().square() * (1 - gain**2) / 6
    assert torch.allclose(result["K"], expected[0], rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # It is the interpreter's.
def test_a_square_that_overflows_is_not_finite():
    for gain, x in ((1.0, 1e20), (1e-30, 1e20), (1e10, 1e15)):
        layer = with_kernels(token_layer(gain, 1.0))
        x = torch.tensor([[x], [1.0]], device=DEVICE, requires_grad=True)
        out = layer(x)
        assert not out[0].isfinite() and out[1].isfinite()
        with torch.no_grad():
            assert not layer(x)[0].isfinite()


def check_against_float64(layer, x):
    exact = run(copy.deepcopy(layer).double(), x)  # The gradient is expanded from one number.
    fast = run(with_kernels(layer), x)
    for name in exact:
        assert fast[name].shape == exact[name].shape
        assert torch.allclose(fast[name], exact[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("zero", ["x", "A", "B"])
def test_zeros_have_finite_gradients(zero):
    layer = make_layer(8, 6, 2)
    x = 2 * randn(4, 8)
    with torch.no_grad():
        {"x": x[1:], "A": layer.lora_A, "B": layer.lora_B}[zero].zero_()
    check_against_float64(layer, x)


# --- Shapes and modes ---------------------------------------------------------------------------

STRIDED = [randn(8, 5).T, randn(4, 3, 8).transpose(0, 1), randn(5, 20)[:, 3:11]]
SHAPES = [randn(8), randn(0, 8), randn(2, 0, 8), randn(3, 2, 2, 8), randn(1, 8).expand(5, 8)]


@pytest.mark.parametrize("x", STRIDED + SHAPES, ids=lambda x: str(tuple(x.shape)))
def test_every_shape_and_stride_is_read_right(x):
    check_against_float64(make_layer(8, 6, 2), x)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("tokens", [3, 65])  # Above 64, the products are in the dtype of x.
def test_without_a_backward_pass_it_is_as_accurate(dtype, tokens):
    layer = make_layer(24, 20, 4, dtype)
    x = (2 * randn(tokens, 24, seed=3)).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    fast = with_kernels(layer)
    with torch.no_grad():
        plain, inferred = layer(x), fast(x)
    assert inferred.dtype == dtype
    bound = 1.2 * error(plain.double(), exact) + FLOOR[dtype]
    assert error(inferred.double(), exact) < bound
    with torch.inference_mode():
        assert torch.equal(fast(x), inferred)


def record_launches(monkeypatch):
    launches = []
    launch = kernels.launch

    def record(kernel, *arguments):
        launches.append((kernel, arguments))
        launch(kernel, *arguments)

    monkeypatch.setattr(kernels, "launch", record)
    return launches


def test_a_step_is_two_launches_and_a_frozen_x_gets_no_gradient(monkeypatch):
    layer = with_kernels(make_layer(8, 6, 2))
    launches = record_launches(monkeypatch)
    for x in (randn(4, 8), randn(4, 8).requires_grad_()):
        launches.clear()
        layer(x).sum().backward()
        (forward, _), (backward, arguments) = launches
        assert (forward, backward) == (kernels.forward_kernel, kernels.backward_kernel)
        assert (arguments[4] is not None) == x.requires_grad == (x.grad is not None)


def test_the_plain_form_runs_for_float64_and_for_what_is_compiled(monkeypatch):
    layer, x = with_kernels(make_layer(8, 6, 2)), randn(4, 8)
    eager = layer(x)
    launches = record_launches(monkeypatch)
    assert torch.allclose(copy.deepcopy(layer).double()(x.double()).float(), eager, atol=1e-5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), eager, atol=1e-5)
    if DEVICE == "cuda":
        copy.deepcopy(layer).cpu()(x.cpu())
    assert launches == []
    layer(x)
    assert len(launches) == 1


def test_dropout_drops_what_it_drops_in_the_plain_form():
    layer = make_layer(32, 6, 2, dropout=0.5)
    results = []
    for each in (layer, with_kernels(layer), with_kernels(layer).eval()):
        torch.manual_seed(0)
        results.append(each(randn(4, 32)))
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(results[2], layer.eval()(randn(4, 32)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    layer = make_layer(24, 20, 4, dtype)
    x = 2 * randn(5, 24, seed=3).to(dtype)
    exact = run(copy.deepcopy(layer).double(), x)
    fast = with_kernels(layer)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
        result = run(fast, x, torch.ones(5, 20, device=DEVICE, dtype=torch.bfloat16))
        with torch.no_grad():
            assert fast(x).dtype == torch.bfloat16
    for name in exact:
        assert error(result[name], exact[name]) < 0.02, name


def test_a_second_derivative_is_refused():
    layer = with_kernels(make_layer(8, 6, 2))
    x = randn(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative.*hyplora.py's own form"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# --- The life of an adapter ---------------------------------------------------------------------


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(DEVICE)


def adapted_toy(**options):
    return adapted(toy(), **options).to(DEVICE)


def test_only_the_class_changes_and_an_adapter_lives_on(tmp_path):
    model, base, x = adapted_toy(), toy(), randn(5, 8)
    plain = model(x)
    state = copy.deepcopy(model.state_dict())
    assert use_kernels(model) == use_kernels(model) == ["0", "2"]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same[0]) is KernelHypLoRALinear
        assert torch.allclose(same(x), plain, atol=1e-5)
        with disable_hyplora(same):
            assert torch.equal(same(x), base(x))
    save_hyplora(model, tmp_path / "adapter.pt")
    other = toy()
    load_hyplora(other, tmp_path / "adapter.pt")
    assert torch.allclose(other(x), plain)
    assert torch.equal(remove_hyplora(model)(x), base(x)) and not hyplora_layers(model)


def test_plain_lora_and_the_layers_of_others_are_left_alone():
    model = adapted_toy(curvature=math.inf)
    assert use_kernels(model) == [] and type(model[0]) is HypLoRALinear
    model = adapted_toy()
    model[0].__class__ = type("Other", (HypLoRALinear,), {})
    assert use_kernels(model) == ["2"]


def test_fsdp2_trains_in_kernels_what_one_process_trains_in_the_plain_form(monkeypatch):
    from torch.distributed.fsdp import fully_shard

    dist, launches = torch.distributed, record_launches(monkeypatch)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    alone, sharded = adapted_toy(), adapted_toy()
    use_kernels(sharded)
    for model in (alone, fully_shard(sharded)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(randn(5, 8)).square().mean().backward()
            optimizer.step()
    assert len(launches) == 3 * 2 * 2  # three steps through two layers, back and forth
    assert not torch.equal(alone[0].lora_A, adapted_toy()[0].lora_A)
    for name, p in sharded.named_parameters():
        whole = p.full_tensor()
        torch.testing.assert_close(whole, alone.get_parameter(name), rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
