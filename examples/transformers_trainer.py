"""How to fine-tune with transformers' Trainer and keep only the adapters in the checkpoints.

    python -m examples.transformers_trainer          # needs transformers, accelerate

It prints:

    a checkpoint's adapters: 10 kB, where the whole model has 82 kB
    a resumed run ends with the same numbers: True

AdapterCheckpoints is the answer. It is a mix-in of four methods, which stands in front of the
trainer's class. It serves the Trainer of transformers, TRL's SFTTrainer and the
SentenceTransformerTrainer alike:

    class HypLoRATrainer(AdapterCheckpoints, Trainer):
        pass

The methods that begin with an underscore are private ones of Trainer. tests/test_examples.py fails
when a new version of it no longer calls them.
"""

import os
import tempfile

import torch

from hyplora import calibrate_curvature, inject_hyplora, load_hyplora, save_hyplora

try:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
except ImportError as error:
    raise SystemExit(f"{error}: pip install transformers accelerate") from error


class AdapterCheckpoints:
    def _save(self, output_dir=None, state_dict=None):
        """Each checkpoint contains hyplora.pt in place of the whole model."""
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        save_hyplora(self.model, os.path.join(output_dir, "hyplora.pt"))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, checkpoint, model=None):
        """trainer.train(resume_from_checkpoint=...) starts here, then restores the optimizer."""
        load_hyplora(self.model, os.path.join(checkpoint, "hyplora.pt"))

    def _load_best_model(self):
        """The option load_best_model_at_end ends here."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def get_decay_parameter_names(self, model):
        """K is a property of the space: weight decay would pull it back to where it started."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("lora_K")]


class HypLoRATrainer(AdapterCheckpoints, Trainer):
    pass


# --- the demonstration --------------------------------------------------------------------------


def small_model():
    """A random Llama. Replace it with LlamaForCausalLM.from_pretrained("...")."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))


def counting_examples(count, first, last):
    """Sequences that count upwards from a number between first and last."""
    generator = torch.Generator().manual_seed(first)
    starts = torch.randint(first, last, (count, 1), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in starts + torch.arange(12)]


def make_trainer(folder, **options):
    model = small_model()
    inject_hyplora(model, ["q_proj", "v_proj"], rank=4, dropout=0.1)
    data = counting_examples(64, first=3, last=20)
    sample = torch.stack([example["input_ids"] for example in data[:8]])
    calibrate_curvature(model, input_ids=sample)
    steps = dict(max_steps=12, save_steps=3, learning_rate=2e-2)
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True)
    arguments = TrainingArguments(output_dir=folder, **steps, **quiet, **options)
    other_data = counting_examples(16, first=40, last=50)
    trainer = HypLoRATrainer(model, arguments, train_dataset=data, eval_dataset=other_data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def main():
    with tempfile.TemporaryDirectory() as folder:
        straight = make_trainer(f"{folder}/straight")
        straight.train()
        size = os.path.getsize(f"{folder}/straight/checkpoint-6/hyplora.pt") / 1000
        whole = sum(p.nbytes for p in straight.model.parameters()) / 1000
        print(f"a checkpoint's adapters: {size:.0f} kB, where the whole model has {whole:.0f} kB")

        resumed = make_trainer(f"{folder}/resumed")
        resumed.train(resume_from_checkpoint=f"{folder}/straight/checkpoint-6")
        finished = dict(straight.model.named_parameters())
        parameters = resumed.model.named_parameters()
        same = all(torch.equal(p, finished[name]) for name, p in parameters)
        print(f"a resumed run ends with the same numbers: {same}")


if __name__ == "__main__":
    main()
