"""One set of names: parameters, buffers and state dicts agree, whatever moves or copies a model."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn

import hyplora
from test_hyplora import QV, Toy, adapted


class Twice(nn.Module):
    """Two linear layers, of which none stands in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.score = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.score(torch.tanh(self.body(x)))


ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
OWN = ["lora_A", "lora_B", "lora_K", "lora_unit"]


def test_a_tensor_has_the_same_name_everywhere_and_the_bases_names_stay():
    model = adapted(Toy())
    names = {name for name, p in model.named_parameters(remove_duplicate=False)}
    names |= {name for name, b in model.named_buffers(remove_duplicate=False)}
    assert model.state_dict().keys() == names
    places = [*QV, "shared"]
    assert names == Toy().state_dict().keys() | {f"{n}.{key}" for n in places for key in OWN}
    layer = model.shared
    assert layer.base.weight is layer.weight and layer.base.bias is layer.bias
    model.double()
    assert layer.base.weight is layer.weight and layer.base.weight.dtype == torch.float64


def test_functional_call_with_a_state_dict():
    model, other = adapted(Twice()), adapted(Twice())
    for p in other.parameters():
        p.data += 1
    got = torch.func.functional_call(model, other.state_dict(), (ROWS,))
    assert torch.equal(got, other(ROWS))


def test_a_model_from_the_meta_device_is_whole_or_loading_says_what_is_missing():
    trained = adapted(Twice())
    with torch.device("meta"):
        model = Twice()
    hyplora.inject_hyplora(model, "all-linear", rank=2)
    assert model.body.lora_A.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(ROWS), trained(ROWS))
    with pytest.raises(RuntimeError, match="Missing.*body.lora_B"):
        model.load_state_dict(Twice().state_dict())
    model.load_state_dict(Twice().state_dict(), strict=False)  # The adapter stays as it is.
    assert torch.equal(model.body.lora_A, trained.body.lora_A)
    model.body.reset_parameters()
    assert model.body.lora_B.abs().max() == 0 and model.body.K.item() == pytest.approx(4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_nothing_with_its_original_and_is_still_one(copied):
    model = adapted(Twice())
    other = copied(model)
    assert torch.equal(other(ROWS), model(ROWS))
    assert other.body.base.weight is other.body.weight is not model.body.weight
    hyplora.remove_hyplora(other)
    assert other.state_dict().keys() == Twice().state_dict().keys()
    assert "body.lora_A" in model.state_dict()


def test_compile_and_export_need_no_graph_break():
    model = adapted(Twice()).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 3, 4):
        x = ROWS[:rows].clone()
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1
    for strict in (False, True):
        exported = torch.export.export(model, (ROWS,), strict=strict).module()
        torch.testing.assert_close(exported(ROWS), model(ROWS))


def test_modes_reach_the_base():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = nn.Sequential(Noisy(8, 8))
    hyplora.inject_hyplora(model, "all-linear")
    assert torch.equal(model.eval()(ROWS), model(ROWS))
    assert not torch.equal(model.train()(ROWS), model(ROWS))


def test_further_arguments_reach_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, factor, shift=0.0):
            return factor * super().forward(x) + shift

    layer = hyplora.HypLoRALinear(Scaled(8, 6))
    assert torch.equal(layer(ROWS, 2.0, shift=1.0), layer.base(ROWS, 2.0, shift=1.0))


def test_a_base_with_children_and_buffers_keeps_them():
    class Quantized(nn.Module):
        """A linear of integers in a buffer, with a table in a child and no parameter."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.register_buffer("integers", torch.arange(48).view(6, 8).to(torch.int8))
            self.register_buffer("cache", torch.ones(1), persistent=False)
            self.scale = nn.BatchNorm1d(6, affine=False)

        def forward(self, x):
            return self.scale(x @ self.integers.T.to(x.dtype))

    model = nn.Sequential(Quantized()).eval()
    want, names = model(ROWS), model.state_dict().keys()
    hyplora.inject_hyplora(model, "all-linear")
    assert model.state_dict().keys() == names | {f"0.{key}" for key in OWN}
    assert torch.equal(model(ROWS), want)
    assert torch.equal(hyplora.remove_hyplora(model)(ROWS), want)
    assert model.state_dict().keys() == names


def test_a_layer_that_is_called_by_keyword_runs_and_is_measured():
    class Keyword(Twice):
        def forward(self, x):
            return self.score(input=torch.tanh(self.body(input=x)))

    model = adapted(Keyword())
    assert torch.equal(model(ROWS), adapted(Twice())(ROWS))
    measured = hyplora.calibrate_curvature(model, ROWS)
    assert measured == hyplora.calibrate_curvature(adapted(Twice()), ROWS)
