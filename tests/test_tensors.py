"""One set of names: parameters, buffers and state dicts agree, whatever moves or copies a model."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
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
    got = torch.func.functional_call(model, trained.state_dict(), (ROWS,))
    assert torch.equal(got, trained(ROWS)) and not torch.equal(got, model(ROWS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_nothing_with_its_original_and_is_still_one(copied):
    model = adapted(Twice())
    other = copied(model)
    assert torch.equal(other(ROWS), model(ROWS))
    assert other.body.base.weight is other.body.weight is not model.body.weight
    hyplora.remove_hyplora(other)
    assert other.state_dict().keys() == Twice().state_dict().keys()
    assert "body.lora_A" in model.state_dict()


def test_compile_and_export_need_no_graph_break_and_train_as_in_eager_mode():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, eager = adapted(Twice()), adapted(Twice())
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (5, 3, 4):
        x = ROWS[:rows].clone()
        torch._dynamo.mark_dynamic(x, 0)
        for each in (compiled, eager):
            each(x).square().mean().backward()
    assert counter.frame_count == 1
    for (name, p), (_, q) in zip(model.named_parameters(), eager.named_parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)
    for strict in (False, True):
        exported = torch.export.export(model.eval(), (ROWS,), strict=strict).module()
        torch.testing.assert_close(exported(ROWS), model(ROWS))


class LikeHQQ(nn.Module):
    """Packed weights, buffers, a child, and a dict of tensors that only state_dict knows."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("W_q", torch.arange(48).view(6, 8).to(torch.int8))
        self.register_buffer("cache", torch.ones(1), persistent=False)
        self.norm = nn.BatchNorm1d(6, affine=False).eval()  # It alone: the layer trains.
        self.meta = {"scale": torch.tensor(0.01)}

    def forward(self, x):
        return self.norm(x @ (self.W_q * self.meta["scale"]).T)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination.update({f"{prefix}W_q": self.W_q, f"{prefix}scale": self.meta["scale"]})
        return self.norm.state_dict(destination=destination, prefix=f"{prefix}norm.")


def test_a_quantized_linear_keeps_its_buffers_its_children_and_what_only_state_dict_knows():
    model = nn.Sequential(LikeHQQ())
    want, names = model(ROWS), model.state_dict().keys()
    assert {"0.W_q", "0.scale", "0.norm.running_mean"} < names
    hyplora.inject_hyplora(model, "all-linear")
    state = model.state_dict()
    assert state.keys() == names | {f"0.{key}" for key in OWN}
    assert torch.equal(state["0.scale"], model[0].base.meta["scale"])
    assert torch.equal(model(ROWS), want)
    model(ROWS).square().sum().backward()
    assert model[0].lora_B.grad.any()
    assert model.train()[0].base.training and not model.eval()[0].base.training
    assert torch.equal(hyplora.remove_hyplora(model)(ROWS), want)
    assert model.state_dict().keys() == names
    assert hyplora.HypLoRALinear(LikeHQQ().to("meta")).lora_A.is_meta


def test_a_layer_that_is_called_by_keyword_runs_and_is_measured():
    class Keyword(Twice):
        def forward(self, x):
            return self.score(input=torch.tanh(self.body(input=x)))

    model = adapted(Keyword())
    assert torch.equal(model(ROWS), adapted(Twice())(ROWS))
    measured = hyplora.calibrate_curvature(model, ROWS)
    assert measured == hyplora.calibrate_curvature(adapted(Twice()), ROWS)
