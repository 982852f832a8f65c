"""How to have HypLoRA inside PEFT, with its adapters by name, its saving and its clients.

    python -m examples.peft_variant                  # needs transformers, peft

It prints:

    loss on         low numbers   high numbers
    no adapter           4.1451         4.1891
    low                  3.7141         4.1460
    high                 4.1678         3.7310
    the second adapter, loaded alone, gives the same loss: True
    merging: HypLoRA can't be merged: its update is not linear in the token

HypLoRAConfig stands where LoraConfig would stand, and takes the curvature besides:

    model = get_peft_model(base, HypLoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    calibrate(model, **sample_inputs)
    ...
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder, config=HypLoRAConfig.from_pretrained(folder))

Do pass the config there. Without it, PEFT warns of an unexpected "curvature" and then loads A and
B as a plain LoRA. The interface of the variants is a private one of PEFT;
tests/test_examples.py names the versions with which this file was run.
"""

import tempfile
from dataclasses import dataclass

import torch
import torch.nn as nn

from examples.transformers_trainer import counting_examples, small_model
from hyplora import hyplora_update, length

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora import layer as lora
except ImportError as error:
    raise SystemExit(f"{error}: pip install peft") from error


class HypLoRAVariant(lora.LoraVariant):
    """What PEFT asks of a variant of LoRA: its own parameters, its forward and its merging."""

    def supports_lora_conversion(self):
        return False

    @staticmethod
    def init(module, adapter_name, config, **kwargs):
        if not hasattr(module, "lora_K"):
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_K")
            module.lora_K = nn.ParameterDict()
            module.other_param_names = (*module.other_param_names, "lora_unit")
            module.lora_unit = BufferDict({}, persistent=True)
            module.curvature = {}
        device = module.lora_A[adapter_name].weight.device
        module.lora_K[adapter_name] = nn.Parameter(torch.zeros(1, device=device))
        unit = torch.full((1,), module.in_features**0.5, device=device)
        module.lora_unit[adapter_name] = unit
        module.curvature[adapter_name] = config.curvature

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        A = module.lora_A[active_adapter].weight
        B = module.lora_B[active_adapter].weight
        unit = module.lora_unit[active_adapter].float()
        K = module.curvature[active_adapter] * unit**2 * module.lora_K[active_adapter].float().exp()
        x = module.lora_dropout[active_adapter](x.to(result.dtype))
        update = hyplora_update(x, A, B, K)
        return torch.add(result, update, alpha=module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        raise RuntimeError("HypLoRA can't be merged: its update is not linear in the token")

    merge_unsafe = merge_safe


class HypLoRAPeftLinear(lora.Linear):
    """PEFT's layer, which asks HypLoRAConfig for its variant."""

    def resolve_lora_variant(self, *, config, **kwargs):
        if isinstance(config, HypLoRAConfig):
            return HypLoRAVariant()
        return super().resolve_lora_variant(config=config, **kwargs)


@dataclass
class HypLoRAConfig(LoraConfig):
    curvature: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        self._register_custom_module({nn.Module: HypLoRAPeftLinear})

    @classmethod
    def from_peft_type(cls, **kwargs):
        return cls(**kwargs)


@torch.no_grad()
def calibrate(model, adapter="default", **inputs):
    """What calibrate_curvature does: the unit is the median of |x| over the tokens of inputs."""

    def look(layer, arguments):
        tokens = arguments[0][(arguments[0] != 0).any(dim=-1)]
        layer.lora_unit[adapter].copy_(length(tokens).median())

    layers = [module for module in model.modules() if isinstance(module, HypLoRAPeftLinear)]
    if not layers:
        raise ValueError("the first adapter of a model has to be one of HypLoRAConfig")
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    with model.disable_adapter():
        model(**inputs)
    for hook in hooks:
        hook.remove()


# --- the demonstration --------------------------------------------------------------------------


def batch(first, last):
    rows = counting_examples(16, first, last)
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(model, inputs, steps=20):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_of(model, inputs):
    return model(**inputs).loss.item()


def main():
    low, high = batch(3, 10), batch(40, 50)
    options = dict(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(small_model(), HypLoRAConfig(**options), adapter_name="low")
    calibrate(model, "low", **low)
    train(model, low)
    model.add_adapter("high", HypLoRAConfig(**options, curvature=2.0))
    model.set_adapter("high")
    calibrate(model, "high", **high)
    train(model, high)

    print("loss on         low numbers   high numbers")
    with model.disable_adapter():
        print(f"no adapter      {loss_of(model, low):11.4f}   {loss_of(model, high):12.4f}")
    for name in ("low", "high"):
        model.set_adapter(name)
        print(f"{name:15s} {loss_of(model, low):11.4f}   {loss_of(model, high):12.4f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = HypLoRAConfig.from_pretrained(f"{folder}/high")
        loaded = PeftModel.from_pretrained(small_model(), f"{folder}/high", config=config)
        same = loss_of(loaded, high) == loss_of(model, high)
        print(f"the second adapter, loaded alone, gives the same loss: {same}")

    try:
        model.merge_and_unload()
    except RuntimeError as error:
        print(f"merging: {error}")


if __name__ == "__main__":
    main()
