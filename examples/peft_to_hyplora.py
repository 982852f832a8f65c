"""How to start HypLoRA from a LoRA adapter that PEFT has trained.

    python -m examples.peft_to_hyplora               # needs transformers, peft

It prints:

    curvature                       distance from LoRA
    infinity                                     0.0 %
    0.5                                         24.1 %
    0.5, calibrated                             24.1 %
    0.5, calibrated and matched                 11.5 %
    to match the lengths, B was multiplied by 0.749 to 1.706

At curvature infinity HypLoRA is LoRA, so that the conversion is exact. At a finite one each update
keeps LoRA's direction and gets another length: up to sinh(r)/r times LoRA's for a token of the
radius r where the gain is small, and less than LoRA's where the gain is above 1. match_lengths
scales each B so that the mean length of the updates is again LoRA's. What remains is what HypLoRA
adds: the token's own length counts.

The distance is that of the logits, as a share of what LoRA has changed in them. Calibrating changes
nothing here, since the tokens of this random Llama have the length that inject_hyplora assumes.
"""

import math

import torch
import torch.nn.functional as F

from examples.peft_variant import batch, train
from examples.transformers_trainer import small_model
from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    disable_hyplora,
    hyplora_update,
    inject_hyplora,
)

try:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise SystemExit(f"{error}: pip install peft") from error


def from_peft(peft_model, adapter="default", curvature=0.5):
    """Take the adapter out of peft_model, and return its base with HypLoRA in its place."""
    config = peft_model.peft_config[adapter]
    if config.use_dora or config.lora_bias:
        raise ValueError("a DoRA adapter, or one with a bias, is more than LoRA's A and B")
    found = {}
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            A = module.lora_A[adapter].weight.detach().float()
            B = module.lora_B[adapter].weight.detach().float()
            found[name] = (A, B, module.scaling[adapter])
    ranks = {len(A) for A, _, _ in found.values()}
    scalings = {scaling for _, _, scaling in found.values()}
    if len(ranks) != 1 or len(scalings) != 1:
        raise ValueError(f"expected one rank and one scaling, found {ranks} and {scalings}")
    rank, scaling = ranks.pop(), scalings.pop()

    peft_model.set_adapter(adapter)
    model = peft_model.unload()
    inject_hyplora(
        model,
        list(found),
        train_also=config.modules_to_save or (),
        rank=rank,
        alpha=scaling * rank,
        curvature=curvature,
    )
    for name, (A, B, _) in found.items():
        layer = model.get_submodule(name)
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
    return model


@torch.no_grad()
def match_lengths(model, **inputs):
    """Scale each B so that the updates have LoRA's mean length on these inputs.

    Returns {name: scale}. The layers run in turn, so that each one sees what those before it, which
    are scaled already, have made.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, HypLoRALinear)}
    scales = {name: 1.0 for name in names.values()}

    def scale(layer, arguments):
        x, A, B = arguments[0], layer.lora_A, layer.lora_B
        wanted = F.linear(F.linear(x, A), B).norm(dim=-1).mean()
        factor = 1.0
        for _ in range(20):  # The length grows with the scale, though never faster than it.
            length = hyplora_update(x, A, factor * B, layer.K).norm(dim=-1).mean()
            factor = factor * (wanted / length).item()
        layer.lora_B.mul_(factor)
        scales[names[layer]] = factor

    hooks = [layer.register_forward_pre_hook(scale) for layer in names]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return scales


# --- the demonstration --------------------------------------------------------------------------


def trained_lora(inputs):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(small_model(), config)
    train(model, inputs)
    return model.eval()


@torch.no_grad()
def distance(model, inputs, wanted):
    """How far the logits are from wanted, as a share of what LoRA has changed in the base's."""
    logits = model(**inputs).logits
    with disable_hyplora(model):
        base = model(**inputs).logits
    return ((logits - wanted).norm() / (wanted - base).norm()).item()


def main():
    inputs = batch(3, 10)
    wanted = trained_lora(inputs)(**inputs).logits.detach()

    print("curvature                       distance from LoRA")
    for label, curvature in [
        ("infinity", math.inf),
        ("0.5", 0.5),
        ("0.5, calibrated", 0.5),
        ("0.5, calibrated and matched", 0.5),
    ]:
        model = from_peft(trained_lora(inputs), curvature=curvature)
        if "calibrated" in label:
            calibrate_curvature(model, **inputs)
        if "matched" in label:
            scales = match_lengths(model, **inputs)
        print(f"{label:30s} {100 * distance(model, inputs, wanted):17.1f} %")
    low, high = min(scales.values()), max(scales.values())
    print(f"to match the lengths, B was multiplied by {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
