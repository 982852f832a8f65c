"""The compile switch: hyplora.hyplora_update compiled once, for all eager layers of a shape."""

import copy

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend

import hyplora
from hyplora import HypLoRALinear, compile_hyplora, hyplora_state_dict, inject_hyplora

torch.set_num_threads(1)


class Block(nn.Module):
    """Linear layers of four shapes, two of which share an input."""

    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width // 3)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        attended = x + self.q(x) + self.k(x).repeat(1, 1, 3)
        return attended + self.down(torch.tanh(self.up(attended)))


def adapted(blocks=2, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(12) for _ in range(blocks))).to(dtype)
    inject_hyplora(model, "all-linear", rank=2)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.3)
    return model


def tokens(batch, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + length)
    x = torch.randn(batch, length, 12, generator=generator).to(dtype)
    return x.requires_grad_(torch.is_grad_enabled())


@pytest.fixture
def switched(monkeypatch):
    """The switch, with a backend that counts its graphs and compiles nothing to machine code."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hyplora.hyplora_update, dynamic=True, backend=counter)
    monkeypatch.setattr(hyplora, "hyplora_update", compiled)
    with torch._dynamo.config.patch(cache_size_limit=64):
        yield counter
    torch._dynamo.reset()


def test_training_needs_one_graph_for_each_shape_of_layer_whatever_the_number_of_tokens(switched):
    model = adapted()
    model(tokens(2, 5)).sum().backward()
    assert switched.frame_count == 4
    for batch, length in ((2, 7), (3, 12), (4, 16), (2, 512)):
        model(tokens(batch, length)).sum().backward()
    model.eval()(tokens(3, 6)).sum().backward()
    assert switched.frame_count == 4


def test_generation_needs_two_and_never_one_for_a_length(switched):
    model = adapted().eval()
    with torch.no_grad():
        model(tokens(2, 5))
        model(tokens(2, 1))
        assert switched.frame_count == 8
        for length in (7, 12, 16, 512):
            model(tokens(2, length))
            model(tokens(3, 1))
    assert switched.frame_count == 8


def test_compile_hyplora_is_that_switch_also_when_it_is_called_again(compile_with):
    counter = CompileCounterWithBackend("aot_eager")
    compile_with(counter)
    model = adapted()
    for _ in range(2):
        compile_hyplora()
        for batch, length in ((2, 5), (3, 12), (2, 512)):
            model(tokens(batch, length)).sum().backward()
    assert torch._dynamo.config.cache_size_limit == 64
    assert counter.frame_count == 1 + 4  # One is the trial.


def test_where_no_compiler_works_a_warning_says_so_and_the_update_stays(compile_with):
    def broken(graph, inputs):
        raise FileNotFoundError("there is no g++")

    compile_with(broken)
    eager = hyplora.hyplora_update
    with pytest.warns(UserWarning, match=r"(?s)adapters stay eager.*there is no g\+\+") as warned:
        compile_hyplora()
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert hyplora.hyplora_update is eager


def test_more_layers_need_no_more_graphs(switched):
    model = adapted(blocks=9)
    model(tokens(2, 5)).sum().backward()
    assert switched.frame_count == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_eager_layers(dtype):
    model = adapted(dtype=dtype)
    exact = copy.deepcopy(model)
    eager = hyplora.hyplora_update
    torch._dynamo.reset()
    results = []
    try:
        for update, net in ((eager, exact), (torch.compile(eager, dynamic=True), model)):
            hyplora.hyplora_update = update
            x = tokens(2, 5, dtype)
            out = net(x)
            adapters = [p for p in net.parameters() if p.requires_grad]
            results.append([out, *torch.autograd.grad(out.float().sum(), [x, *adapters])])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no C++ compiler works here: {error!s:.80}")
    finally:
        hyplora.hyplora_update = eager
    for got, want in zip(results[1], results[0]):
        # The float32 gradient of an eager lora_K itself is up to 1e-5 away from float64's here.
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert (got - want).float().norm() <= bound * want.float().norm()


def test_the_switch_leaves_state_dicts_and_the_layers_as_they_are(switched):
    model = adapted()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = hyplora_state_dict(model)
    model(tokens(2, 5))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert hyplora_state_dict(model).keys() == small.keys()
    assert all(type(m) is HypLoRALinear for m in model.modules() if hasattr(m, "lora_A"))
