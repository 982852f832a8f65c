"""scaling/kernels.py beside hyplora.py's own form, on a GPU or in Triton's interpreter, which has
to be chosen before the kernels are imported."""

import copy
import math
import pickle
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from test_integrations import mlp

import hyplora
from hyplora import HypLoRALinear
from scaling import kernels
from scaling.kernels import KernelHypLoRALinear, use_kernels
from test_hyplora import adapted

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert (DEVICE == "cuda") != kernels.IS_INTERPRETED

# How far an error may be above 1.5 times the plain form's: exp and log on a GPU are approximate,
# and the interpreter cuts a number to bfloat16 where a GPU rounds it.
BFLOAT16 = 4e-3 if kernels.IS_INTERPRETED else 1e-3
FLOOR = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: BFLOAT16}


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
    return ((result.double() - exact).norm() / exact.norm()).item()


def check_errors(layer, x):
    """The kernels' errors against float64 are no larger than the plain form's.

    The gradient of the output is random, but along the update on the whole: so the tokens' parts
    of K's gradient have one sign, and their sum has no cancellation that would only add noise."""
    own = copy.deepcopy(layer).double()
    update = (own(x.double()) - own.base(x.double())).detach()
    along = update * (update.shape[-1] ** 0.5 / hyplora.length(update))
    grad = (randn(*update.shape, seed=4) + along).to(x.dtype)
    fast = with_kernels(layer)
    exact = run(own, x, grad)
    plain = run(layer, x, grad)
    trained = run(fast, x, grad)
    for name in exact:
        bound = 1.5 * error(plain[name], exact[name]) + FLOOR[x.dtype]
        assert error(trained[name], exact[name]) < bound, name
    with torch.no_grad():
        inferred = fast(x)
    assert inferred.dtype == x.dtype
    assert error(inferred, exact["out"]) < 1.2 * error(plain["out"], exact["out"]) + FLOOR[x.dtype]


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_errors_are_no_larger_than_the_plain_forms(dtype):
    for sizes in ((7, 6, 3), (300, 260, 256), (5000, 9, 2), (9, 9001, 2)):  # the last: many blocks
        for radius in (0.01, 1.4, 8.0, 20.0):
            x = radius * math.sqrt(2) * randn(2, 3, sizes[0], seed=3)
            check_errors(make_layer(*sizes, dtype), x.to(dtype))
    # Above 64 tokens without a backward pass, the products are in the dtype of x.
    layer = make_layer(24, 20, 4, dtype)
    check_errors(layer, (2 * randn(65, 24, seed=3)).to(dtype))
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.half(), 1e5 * layer.lora_B.bfloat16()
    check_errors(layer, (2 * randn(5, 24, seed=3)).to(dtype))


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


@pytest.mark.filterwarnings("ignore:overflow")  # The interpreter warns of it.
@pytest.mark.parametrize("gain", [1e-10, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("K, bound", [(1e-6, 12.0), (1e6, 12.0), (1e6, 0.3)])
def test_each_token_is_right_to_six_digits(K, bound, gain, monkeypatch):
    monkeypatch.setattr(hyplora, "MAX_RADIUS", bound)
    layer = make_layer(1, 1, 1, alpha=1)
    values = {"weight": 0, "bias": 0, "lora_A": 1, "lora_B": gain, "lora_K": 0}
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer, name).fill_(value)
        layer.lora_unit.fill_(math.sqrt(2 * K))
    radii = torch.tensor([1e-12, 1e-6, 1e-3, 0.1, 0.29, 0.49, 0.51, 1, 3, 11.9, 12.1, 40, 1e6])
    x = (radii * math.sqrt(K))[:, None].to(DEVICE)
    own = copy.deepcopy(layer).double()
    exact = hyplora.hyplora_update(x.double(), own.lora_A, own.lora_B, own.K, bound)
    for result in (run(with_kernels(layer), x)["out"], with_kernels(layer)(x)):
        assert torch.allclose(result.double(), exact, rtol=3e-6, atol=0)
    overflow = with_kernels(layer)(torch.tensor([[1e20], [1e19 / max(gain, 1)]], device=DEVICE))
    assert overflow.isnan().flatten().tolist() == [True, False]


STRIDED = [randn(8, 5).T, randn(4, 3, 8).transpose(0, 1), randn(5, 20)[:, 3:11]]
SHAPES = [randn(8), randn(0, 8), randn(2, 0, 8), randn(3, 2, 2, 8), randn(1, 8).expand(5, 8)]


@pytest.mark.parametrize("zero", [None, "lora_A", "lora_B"])
def test_every_shape_stride_and_zero_is_read_right(zero):
    layer = make_layer(8, 6, 2)
    if zero:
        torch.nn.init.zeros_(getattr(layer, zero))
    for x in [*STRIDED, *SHAPES, torch.zeros(2, 8, device=DEVICE)]:
        exact = run(copy.deepcopy(layer).double(), x)  # The gradient is expanded from one number.
        fast = run(with_kernels(layer), x)
        for name in exact:
            assert fast[name].shape == exact[name].shape
            assert torch.allclose(fast[name], exact[name], rtol=1e-4, atol=1e-5), (name, x.shape)


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(kernels, "launch", Mock(wraps=kernels.launch))
    return kernels.launch


def test_a_step_is_two_launches_and_a_frozen_x_gets_no_gradient(launch):
    layer = with_kernels(make_layer(8, 6, 2))
    for x in (randn(4, 8), randn(4, 8).requires_grad_()):
        launch.reset_mock()
        layer(x).sum().backward()
        forward, backward = (call.args for call in launch.call_args_list)
        assert (forward[0], backward[0]) == (kernels.forward_kernel, kernels.backward_kernel)
        assert (backward[5] is not None) == x.requires_grad == (x.grad is not None)
    with pytest.raises(RuntimeError, match="second derivative.*hyplora.py's own form"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_the_plain_form_runs_for_float64_for_dispatch_modes_and_for_what_is_compiled(launch):
    layer, x = with_kernels(make_layer(8, 6, 2)), randn(4, 8)
    eager = layer(x)
    assert launch.call_count == 1
    assert torch.allclose(copy.deepcopy(layer).double()(x.double()).float(), eager, atol=1e-5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), eager, atol=1e-5)
    save = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    checkpoint(layer, x, use_reentrant=False, context_fn=save).sum().backward()
    half = with_kernels(make_layer(8, 6, 2, torch.float16))
    assert torch.compile(half, backend="eager")(x.half()).dtype == torch.float16
    if DEVICE == "cuda":
        copy.deepcopy(layer).cpu()(x.cpu())
    assert launch.call_count == 1


def test_a_base_with_an_output_for_one_token_adds_it_to_all_as_in_the_plain_form():
    class First(nn.Linear):
        def forward(self, x):
            return super().forward(x[:1])

    layer = HypLoRALinear(First(8, 6, device=DEVICE))
    assert torch.equal(with_kernels(layer)(randn(4, 8)), layer(randn(4, 8)))


def test_dropout_drops_what_it_drops_in_the_plain_form():
    layer = make_layer(32, 6, 2, dropout=0.5)
    results = []
    for each in (layer, with_kernels(layer)):
        torch.manual_seed(0)
        results.append(each(randn(4, 32)))
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_autocast():
    layer = make_layer(24, 20, 4)
    layer.lora_B.data *= 1e5  # Now BAx is beyond what float16 has.
    x = 2 * randn(5, 24, seed=3)
    exact = run(copy.deepcopy(layer).double(), x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            result = run(with_kernels(layer), x)
            assert with_kernels(layer)(x).dtype == dtype
        for name in exact:
            assert error(result[name], exact[name]) < 0.02, (dtype, name)


def test_only_the_class_of_our_own_layers_changes_and_an_adapter_lives_on(tmp_path):
    model, base, x = adapted(mlp()).to(DEVICE), mlp().to(DEVICE), randn(5, 16)
    plain, names = model(x), list(model.state_dict())
    assert use_kernels(model) == use_kernels(model) == ["0", "2"]
    assert list(model.state_dict()) == names
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same[0]) is KernelHypLoRALinear
        assert torch.allclose(same(x), plain, atol=1e-5)
        with hyplora.disable_hyplora(same):
            assert torch.equal(same(x), base(x))
    hyplora.save_hyplora(model, tmp_path / "adapter.pt")
    other = mlp().to(DEVICE)
    hyplora.load_hyplora(other, tmp_path / "adapter.pt")
    assert torch.allclose(other(x), plain)
    assert torch.equal(hyplora.remove_hyplora(model)(x), base(x))
    assert not hyplora.hyplora_layers(model)
    model = adapted(mlp(), curvature=math.inf)
    assert use_kernels(model) == [] and type(model[0]) is HypLoRALinear
    model = adapted(mlp())
    model[0].__class__ = type("Other", (HypLoRALinear,), {})
    assert use_kernels(model) == ["2"]


def test_fsdp2_trains_in_kernels_what_one_process_trains_in_the_plain_form(launch, monkeypatch):
    dist = torch.distributed
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    alone, sharded = adapted(mlp()).to(DEVICE), adapted(mlp()).to(DEVICE)
    use_kernels(sharded)
    for model in (alone, fully_shard(sharded)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(randn(5, 16)).square().mean().backward()
            optimizer.step()
    assert launch.call_count == 3 * 2 * 2  # three steps through two layers, back and forth
    for name, p in sharded.named_parameters():
        torch.testing.assert_close(p.full_tensor(), alone.get_parameter(name), rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
