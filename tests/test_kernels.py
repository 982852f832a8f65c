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
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from hyplora import (
    HypLoRALinear,
    disable_hyplora,
    hyplora_layers,
    hyplora_state_dict,
    hyplora_statistics,
    hyplora_update,
    inject_hyplora,
    length,
    load_hyplora,
    remove_hyplora,
    save_hyplora,
)
from scaling import kernels
from scaling.kernels import KernelHypLoRALinear, use_kernels

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
@pytest.mark.parametrize("d_in, d_out, rank", [(7, 6, 3), (48, 300, 32), (300, 260, 256)])
@pytest.mark.parametrize("radius", [0.01, 1.4, 8.0, 20.0])
def test_errors_are_no_larger_than_the_plain_forms(dtype, d_in, d_out, rank, radius):
    layer = make_layer(d_in, d_out, rank, dtype)
    x = radius * math.sqrt(2) * randn(2, 10, d_in, seed=3)
    check_errors(layer, x.to(dtype))


@pytest.mark.parametrize("d_in, d_out", [(5000, 9), (9, 9001)])
def test_rows_longer_than_a_block(d_in, d_out):
    layer = make_layer(d_in, d_out, 2)
    check_errors(layer, 2 * randn(3, d_in, seed=3))


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
    exact = run(copy.deepcopy(layer).double(), x)["out"].norm(dim=-1)
    fast = run(with_kernels(layer), x)["out"].norm(dim=-1)
    assert ((fast - exact).abs() / layer.K.sqrt()).max() < 1e-4  # These are radii.


def token_layer(gain, K):
    """A layer of width 1 without a base: out = phi * gain * x."""
    layer = make_layer(1, 1, 1, alpha=1)
    with torch.no_grad():
        for name, value in (("weight", 0), ("bias", 0), ("lora_A", 1), ("lora_K", 0)):
            getattr(layer, name).fill_(value)
        layer.lora_B.fill_(gain)
        layer.lora_unit.fill_(math.sqrt(2 * K))
    return layer


@pytest.mark.parametrize("K", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("gain", [1e-10, 1e-3, 1.0, 1e3])
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


@pytest.mark.parametrize("zero", ["x", "A", "B"])
def test_zeros_have_finite_gradients(zero):
    layer = make_layer(8, 6, 2)
    x = 2 * randn(4, 8)
    with torch.no_grad():
        {"x": x[1:], "A": layer.lora_A, "B": layer.lora_B}[zero].zero_()
    exact = run(copy.deepcopy(layer).double(), x)
    fast = run(with_kernels(layer), x)
    for name in exact:
        assert torch.allclose(fast[name], exact[name], rtol=1e-5, atol=1e-6), name


# --- Shapes and modes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        randn(8),
        randn(0, 8),
        randn(2, 0, 8),
        randn(3, 2, 2, 8),
        randn(8, 5).T,
        randn(4, 3, 8).transpose(0, 1),
        randn(5, 20)[:, 3:11],
        randn(1, 8).expand(5, 8),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_shapes(x):
    layer = make_layer(8, 6, 2)
    exact = run(copy.deepcopy(layer).double(), x)  # The gradient is expanded from one number.
    fast = run(with_kernels(layer), x)
    for name in exact:
        assert fast[name].shape == exact[name].shape
        assert torch.allclose(fast[name], exact[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("tokens", [3, 100])
def test_without_a_backward_pass_it_is_as_accurate(dtype, tokens):
    layer = make_layer(24, 20, 4, dtype)
    x = (2 * randn(tokens, 24, seed=3)).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    fast = with_kernels(layer)
    with torch.no_grad():
        plain = layer(x)
        inferred = fast(x)
    assert inferred.dtype == dtype and not inferred.requires_grad
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


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_the_plain_form_runs_for_float64_and_for_all_that_traces(monkeypatch):
    layer = with_kernels(make_layer(8, 6, 2))
    x = randn(4, 8)
    eager = layer(x)
    launches = record_launches(monkeypatch)
    layer_64 = copy.deepcopy(layer).double()
    assert torch.allclose(layer_64(x.double()).float(), eager, atol=1e-5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), eager, atol=1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.allclose(traced(2 * x), copy.deepcopy(layer_64)(2 * x.double()).float(), atol=1e-5)
    if DEVICE == "cuda":
        copy.deepcopy(layer).cpu()(x.cpu())
    assert launches == []
    layer(x)
    assert len(launches) == 1


def test_dropout_drops_what_it_drops_in_the_plain_form():
    layer = make_layer(32, 6, 2, dropout=0.5)
    results = []
    for each in (layer, with_kernels(layer)):
        torch.manual_seed(0)
        results.append(run(each, randn(4, 32)))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], rtol=1e-4, atol=1e-5), name
    fast = with_kernels(layer).eval()
    assert torch.allclose(fast(randn(4, 32)), layer.eval()(randn(4, 32)), atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_16_bits_train_too(dtype):
    layer = with_kernels(make_layer(24, 20, 4)).to(dtype)
    layer(randn(5, 24).to(dtype)).sum().backward()
    for name in ("lora_A", "lora_B", "lora_K"):
        gradient = getattr(layer, name).grad
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    layer = with_kernels(make_layer(8, 6, 2))
    gradients = []
    for is_checkpointed in (False, True):
        layer.zero_grad()
        x = randn(4, 8).requires_grad_()
        out = checkpoint(layer, x, use_reentrant=use_reentrant) if is_checkpointed else layer(x)
        out.square().sum().backward()
        gradients.append([x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_K.grad])
    for expected, result in zip(*gradients):
        assert expected.any() and torch.equal(result, expected)


def test_the_output_may_be_changed_in_place():
    layer = make_layer(8, 6, 2)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    x = randn(2, 3, 8)
    model(x).sum().backward()
    expected = layer.lora_B.grad.clone()
    layer.zero_grad()
    use_kernels(model)
    model(x).sum().backward()
    assert torch.allclose(layer.lora_B.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused():
    layer = with_kernels(make_layer(8, 6, 2))
    x = randn(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative.*hyplora.py's own form"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# --- The life of an adapter ---------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted_toy(**options):
    torch.manual_seed(0)
    model = Toy().to(DEVICE)
    inject_hyplora(model, "all-linear", rank=2, **options)
    for layer in hyplora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def test_only_the_class_changes(tmp_path):
    model = adapted_toy()
    x = randn(5, 8)
    with disable_hyplora(model):
        base = model(x)
    plain = model(x)
    names = [name for name, _ in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    statistics = hyplora_statistics(model, x)
    assert use_kernels(model) == use_kernels(model) == ["first", "second"]
    assert type(model.first) is KernelHypLoRALinear and isinstance(model.first, HypLoRALinear)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    for name, row in hyplora_statistics(model, x).items():
        assert row == pytest.approx(statistics[name], rel=1e-4)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same.first) is KernelHypLoRALinear
        assert torch.allclose(same(x), plain, atol=1e-5)
        with disable_hyplora(same):
            assert torch.equal(same(x), base)
    save_hyplora(model, tmp_path / "adapter.pt")
    torch.manual_seed(0)
    other = Toy().to(DEVICE)
    load_hyplora(other, tmp_path / "adapter.pt")
    assert torch.allclose(other(x), plain)
    assert torch.equal(remove_hyplora(model)(x), base) and not hyplora_layers(model)


def test_plain_lora_and_the_layers_of_others_are_left_alone():
    class Other(HypLoRALinear):
        pass

    model = adapted_toy(curvature=math.inf)
    assert use_kernels(model) == [] and type(model.first) is HypLoRALinear
    model = adapted_toy()
    model.first.__class__ = Other
    assert use_kernels(model) == ["second"] and type(model.first) is Other


def train_steps(model, x, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def process_group(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_with_ddp_and_fsdp2(process_group):
    from torch.distributed.fsdp import fully_shard

    alone = adapted_toy()
    train_steps(alone, randn(5, 8))
    in_ddp = adapted_toy()
    use_kernels(in_ddp)
    train_steps(nn.parallel.DistributedDataParallel(in_ddp), randn(5, 8))
    sharded = adapted_toy()
    use_kernels(sharded)
    fully_shard(sharded.second)
    fully_shard(sharded)
    assert isinstance(sharded.second, KernelHypLoRALinear)
    train_steps(sharded, randn(5, 8))
    expected = hyplora_state_dict(alone)
    assert not torch.equal(
        expected["first.lora_A"], hyplora_state_dict(adapted_toy())["first.lora_A"]
    )
    for model in (in_ddp, sharded):
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            torch.testing.assert_close(whole, alone.state_dict()[name], rtol=1e-4, atol=1e-5)
