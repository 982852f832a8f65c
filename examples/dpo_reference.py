"""How to have the frozen base, or a first adapter, as DPO's reference without a second base.

    python -m examples.dpo_reference                 # needs transformers, trl, datasets

It prints:

    the base as the reference shares 19616 numbers and has 0 of its own
        the loss starts at 0.6931 and ends at 0.2146
    the first adapter as the reference shares 19616 numbers and has 900 of its own
        the loss starts at 0.6931 and ends at 0.4527

DPO (Rafailov et al., 2023) compares the model in training with a frozen reference. TRL would load
the reference as a second model. reference_model is the answer: it copies the modules, which are
small, and shares the frozen tensors, which are large. With the first adapter as the reference,
training goes on from there, and both losses start at log 2.
"""

import copy
import tempfile

import torch

from examples.transformers_trainer import AdapterCheckpoints, small_model
from hyplora import inject_hyplora, remove_hyplora

try:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise SystemExit(f"{error}: pip install transformers trl datasets") from error


class HypLoRADPOTrainer(AdapterCheckpoints, DPOTrainer):
    pass


def reference_model(model, keep_adapters=False):
    """A frozen copy of model that shares the base's tensors.

    Without keep_adapters it is the base. With them it is the model as it is now, and training
    goes on from there.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(t): t for name, t in named if "lora_" not in name and not t.requires_grad}
    reference = copy.deepcopy(model, memo=shared)
    if not keep_adapters:
        remove_hyplora(reference)
    return reference.requires_grad_(False).eval()


# --- the demonstration --------------------------------------------------------------------------


def tokenizer():
    """A tokenizer for the numbers from 3 to 63, which are its words."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 64)}}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def preferences(count=32):
    """Counting upwards is preferred to counting downwards."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in torch.randint(10, 50, (count,), generator=generator).tolist():
        upwards = " ".join(str(start + i) for i in range(1, 5))
        downwards = " ".join(str(start - i) for i in range(1, 5))
        rows.append({"prompt": f"{start} ", "chosen": upwards, "rejected": downwards})
    return Dataset.from_list(rows)


def make_trainer(model, reference, folder, **options):
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        beta=1.0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **{"max_steps": 30, "save_strategy": "no", **options},
    )
    trainer = HypLoRADPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def numbers(model):
    return {p.data_ptr(): p.numel() for p in model.parameters()}


def main():
    model = small_model()
    inject_hyplora(model, ["q_proj", "v_proj"], rank=4)
    with tempfile.TemporaryDirectory() as folder:
        for kind, keep_adapters in [("the base", False), ("the first adapter", True)]:
            reference = reference_model(model, keep_adapters)
            ours = numbers(model)
            extra = sum(n for place, n in numbers(reference).items() if place not in ours)
            shared = sum(n for place, n in numbers(reference).items() if place in ours)
            trainer = make_trainer(model, reference, folder)
            trainer.train()
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            print(f"{kind} as the reference shares {shared} numbers and has {extra} of its own")
            print(f"    the loss starts at {losses[0]:.4f} and ends at {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
