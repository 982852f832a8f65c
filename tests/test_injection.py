"""What inject_hyplora finds, and what it refuses without a change."""

import concurrent.futures

import pytest
import torch.nn as nn

import hyplora
from hyplora import HypLoRALinear
from test_hyplora import QV, Toy, adapted


def test_all_linear_leaves_out_the_head_that_a_model_declares():
    model = Toy()
    model.decoder = model.classifier
    del model.classifier
    for block in (model, model.blocks):  # It is the layers within these that count.
        block.in_features = block.out_features = 8
    model.shared.gate = nn.Linear(8, 8)  # The layer around it is linear, too.
    model.get_output_embeddings = lambda: model.decoder
    names = "lm_head embed_out head classification_head score qa_outputs".split()
    model.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 2)) for name in names})
    names = [QV[0], "blocks.0.q_proj.gate", *QV[1:]]
    assert hyplora.inject_hyplora(model, "all-linear") == names


@pytest.mark.filterwarnings("ignore:left out")
def test_a_model_that_is_the_layer_itself_or_has_none():
    with pytest.raises(ValueError, match=r"HypLoRALinear\(layer\) wraps a lone one"):
        hyplora.inject_hyplora(nn.Linear(7, 6), "all-linear")
    with pytest.raises(ValueError, match="no layer within the model"):
        hyplora.inject_hyplora(nn.Sequential(nn.MultiheadAttention(8, 2)), "all-linear")
    layer = HypLoRALinear(nn.Linear(7, 6))
    assert hyplora.remove_hyplora(layer) is layer.base
    assert set(layer.base.state_dict()) == {"weight", "bias"}


def test_owners_that_read_the_weight_are_refused_by_name_or_left_out_with_a_warning():
    attention, layer = nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="can't be adapted.*0.out_proj"):
        hyplora.inject_hyplora(nn.Sequential(attention), ["out_proj"])
    with pytest.raises(ValueError, match="can't be adapted.*0.linear1"):
        hyplora.inject_hyplora(nn.Sequential(layer), ["linear1"])
    model = nn.ModuleDict({"a": attention, "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="left out.*a.out_proj"):
        assert hyplora.inject_hyplora(model, "all-linear") == ["fc"]


def test_a_module_of_the_users_own_may_be_called_lora_A():
    model = nn.ModuleDict({"lora_A": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
    assert hyplora.inject_hyplora(model, ["fc"]) == ["fc"]
    assert hyplora.hyplora_layers(model).keys() == {"fc"}


def test_a_layer_with_an_adapter_of_anybodys_is_refused_by_itself():
    class LoRA(nn.Linear):
        lora_A = None

    for base in (LoRA(8, 8), HypLoRALinear(nn.Linear(8, 8)), nn.Conv2d(3, 3, 1)):
        with pytest.raises(TypeError, match=f"bare linear layer.*{type(base).__name__}"):
            HypLoRALinear(base)


def test_an_adapter_that_breaks_off_midway_leaves_the_model_bare():
    class Breaks(nn.Linear):
        def parameters(self, recurse=True):
            raise KeyboardInterrupt("out of memory")

    model = nn.Sequential(nn.Linear(8, 8), Breaks(8, 8))
    model[0].bias.requires_grad_(False)
    model[0].inner = nn.Linear(8, 8)
    names = model.state_dict().keys()
    for second, message in (("1", "out of memory"), ("0.inner", "lora_A is only in the model")):
        with pytest.raises((KeyboardInterrupt, ValueError), match=message):
            hyplora.wrap_layers(model, {"0": {}, second: {}}, tensors={})
    assert model.state_dict().keys() == names and type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad


def test_disabling_survives_errors_and_threads():
    model = adapted(nn.Sequential(*[nn.Linear(1, 1) for _ in range(100)]))

    def passes(_):
        for _ in range(1000):
            with pytest.raises(ZeroDivisionError), hyplora.disable_hyplora(model):
                raise ZeroDivisionError

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(passes, range(4)))
    assert all(layer.enabled for layer in model)
