"""How to have HypLoRA inside PEFT, with its adapters by name, its saving and its clients.

    python -m examples.peft_variant                  # needs transformers, peft

It prints:

    step  0: loss 4.1451
    step 20: loss 3.7159
    the adapter, loaded into another base, gives the same logits: True
    merging: HypLoRA can't be merged: its update is not linear in the token

HypLoRAConfig stands where LoraConfig would stand, and takes the curvature besides:

    model = get_peft_model(base, HypLoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    calibrate(model, **sample_inputs)
    ...
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder, config=HypLoRAConfig.from_pretrained(folder))
    model.add_adapter("second", HypLoRAConfig.from_pretrained(other))  # PEFT needs both.
    model.load_adapter(other, "second")

Do pass the config: without it, PEFT warns of "curvature" and loads A and B as a plain LoRA. Options
of LoraConfig that make another layer of LoRA, such as use_dora and lora_bias, have no effect.
The interface is private; examples/README.md names the version that this was run with.
"""

import contextlib
import tempfile
from dataclasses import dataclass, field

import torch
import torch.nn as nn

import hyplora
from examples.transformers_trainer import counting_examples, small_model

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
            module.hyplora_config = {}
        device = module.lora_A[adapter_name].weight.device
        module.lora_K[adapter_name] = nn.Parameter(torch.zeros(1, device=device))
        module.lora_unit[adapter_name] = torch.full((1,), module.in_features**0.5, device=device)
        module.hyplora_config[adapter_name] = config

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        A = module.lora_A[active_adapter].weight
        B = module.lora_B[active_adapter].weight
        unit = module.lora_unit[active_adapter].float()
        config = module.hyplora_config[active_adapter]
        K = config.curvature * unit**2 * module.lora_K[active_adapter].float().exp()
        x = module.lora_dropout[active_adapter](x.to(result.dtype))
        update = hyplora.hyplora_update(x, A, B, K, config.max_radius)
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
    max_radius: float = field(default_factory=lambda: hyplora.MAX_RADIUS)  # It is saved, too.

    def __post_init__(self):
        super().__post_init__()
        if not 1e-12 <= self.curvature <= 1e24:  # Beyond this K would overflow.
            raise ValueError(f"curvature must be within 1e-12 to 1e24, got {self.curvature}")
        self._register_custom_module({nn.Module: HypLoRAPeftLinear})

    @classmethod
    def from_peft_type(cls, **kwargs):
        return cls(**kwargs)


@torch.no_grad()
def calibrate(model, adapter="default", **inputs):
    """Set the units to the median of |x| over all tokens of inputs, so leave padding out of them.
    A layer that sees none keeps its unit. Raises ValueError, with no unit changed, if a length is
    infinite. Put the model into eval mode first, if its base has dropout of its own."""
    seen = {}

    def look(layer, arguments):
        tokens = arguments[0][(arguments[0] != 0).any(dim=-1)]
        seen.setdefault(layer, []).append(hyplora.length(tokens))

    layers = [module for module in model.modules() if adapter in getattr(module, "lora_unit", ())]
    if not layers:
        raise ValueError(f"no HypLoRA is {adapter!r}: the first adapter has to be of HypLoRAConfig")
    with model.disable_adapter(), contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(look))
        model(**inputs)
    lengths = {layer: torch.cat(parts) for layer, parts in seen.items() if any(map(len, parts))}
    if not all(found.isfinite().all() for found in lengths.values()):
        raise ValueError("the length of a token is infinite")
    for layer, found in lengths.items():
        layer.lora_unit[adapter].copy_(found.median())


# --- the demonstration --------------------------------------------------------------------------


def main():
    ids = torch.stack([row["input_ids"] for row in counting_examples(16, first=3, last=10)])
    config = HypLoRAConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], curvature=1.0)
    model = get_peft_model(small_model(), config)
    calibrate(model, input_ids=ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    for step in range(21):
        loss = model(input_ids=ids, labels=ids).loss
        if step in (0, 20):
            print(f"step {step:2d}: loss {loss.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = HypLoRAConfig.from_pretrained(folder)
        loaded = PeftModel.from_pretrained(small_model(), folder, config=config)
    same = torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    print(f"the adapter, loaded into another base, gives the same logits: {same}")
    try:
        model.merge_and_unload()
    except RuntimeError as error:
        print(f"merging: {error}")


if __name__ == "__main__":
    main()
