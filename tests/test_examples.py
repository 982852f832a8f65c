"""The examples do what their docstrings say, and the clients in examples/README.md run.

What needs a package that is missing is skipped: pip install -r tests/requirements.txt
"""

import copy
import importlib
import math
import os
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hyplora import (
    HypLoRALinear,
    calibrate_curvature,
    disable_hyplora,
    hyplora_parameters,
    hyplora_reference,
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    save_hyplora,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "transformers_trainer": ["transformers", "accelerate"],
    "peft_variant": ["transformers", "peft"],
    "variants": [],
}
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def example(name):
    for package in EXAMPLES[name]:
        pytest.importorskip(package, reason=f"pip install {package}")
    return importlib.import_module(f"examples.{name}")


def randomize(model, scale=0.1):
    """Adapters that do something: each B is drawn."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=scale)
    return model


def adapters_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, HypLoRALinear)}


# --- each example prints what its docstring says ------------------------------------------------


def shape_of(text):
    """The lines without their numbers, which differ a little between machines."""
    lines = [" ".join(re.sub(r"\d+(\.\d+)?", "0", line).split()) for line in text.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_prints_what_its_docstring_says(name, capsys):
    module = example(name)
    module.main()
    printed = capsys.readouterr().out
    documented = re.search(r"It prints:\n\n((?:    .*\n|\n)+)", module.__doc__).group(1)
    assert shape_of(printed) == shape_of(documented)
    assert "False" not in printed
    assert "nan" not in printed


@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name]])
def test_a_missing_package_is_named_in_one_line(name, monkeypatch):
    example(name)
    monkeypatch.delitem(importlib.sys.modules, f"examples.{name}")
    package = EXAMPLES[name][1 if name != "transformers_trainer" else 0]
    monkeypatch.setitem(importlib.sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install .*{package}") as caught:
        importlib.import_module(f"examples.{name}")
    assert "\n" not in str(caught.value)


# --- Trainer, SFTTrainer, SentenceTransformerTrainer --------------------------------------------

STEPS = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def tokenizer():
    """A tokenizer for the numbers from 3 to 63, which are its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 64)}}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def transformers_trainer(folder):
    return example("transformers_trainer").make_trainer(folder)


def sft_trainer(folder):
    trl = pytest.importorskip("trl", reason="pip install trl datasets")
    from datasets import Dataset

    module = example("transformers_trainer")

    class HypLoRASFTTrainer(module.AdapterCheckpoints, trl.SFTTrainer):
        pass

    model = module.small_model()
    inject_hyplora(model, ["q_proj", "v_proj"], rank=4, dropout=0.1)
    text = [" ".join(str(start + i) for i in range(8)) for start in range(3, 35)]
    return HypLoRASFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=folder, bf16=False, **STEPS),
        train_dataset=Dataset.from_dict({"text": text}),
        processing_class=tokenizer(),
    )


def sentence_transformer(folder):
    """A random BERT of two layers with mean pooling."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sentences = pytest.importorskip("sentence_transformers", reason="see tests/requirements.txt")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    path = os.path.join(folder, "bert")
    transformers.BertModel(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    encoder = Transformer(path)
    return sentences.SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")


def sentence_trainer(folder):
    model = sentence_transformer(folder)
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    mixin = example("transformers_trainer").AdapterCheckpoints

    class HypLoRASentenceTrainer(mixin, SentenceTransformerTrainer):
        pass

    inject_hyplora(model, ["query", "value"], rank=4, dropout=0.1)
    rows = {
        "a": [f"{i} {i + 1}" for i in range(3, 35)],
        "b": [f"{i + 2} {i + 3}" for i in range(3, 35)],
        "score": [float(i % 2) for i in range(3, 35)],
    }
    return HypLoRASentenceTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=folder, **STEPS),
        train_dataset=Dataset.from_dict(rows),
        loss=CosineSimilarityLoss(model),
    )


@pytest.mark.parametrize("make", [transformers_trainer, sft_trainer, sentence_trainer])
def test_the_mix_in_saves_adapters_alone_and_resumes_bit_for_bit(make, tmp_path):
    straight = make(str(tmp_path / "straight"))
    base = {n: p.clone() for n, p in straight.model.named_parameters() if not p.requires_grad}
    start = copy.deepcopy(hyplora_state_dict(straight.model))
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert (checkpoint / "hyplora.pt").exists()
    assert not [path for path in checkpoint.rglob("*") if "model" in path.name]
    for name, p in straight.model.named_parameters():
        assert p.requires_grad or torch.equal(p, base[name])

    resumed = make(str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    finished = hyplora_state_dict(straight.model)
    for name, p in hyplora_state_dict(resumed.model).items():
        assert torch.equal(p, finished[name]), name
        assert torch.equal(p, start[name]) == name.endswith("lora_unit"), name

    groups = straight.optimizer.param_groups
    names = {p: name for name, p in straight.model.named_parameters()}
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name.rpartition(".")[2] for name in decayed} == {"lora_A", "lora_B"}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = example("transformers_trainer").make_trainer(
        str(tmp_path), load_best_model_at_end=True
    )
    trainer.train()
    losses = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    best = min(losses, key=losses.get)
    assert best != max(losses)
    content = torch.load(tmp_path / f"checkpoint-{best}" / "hyplora.pt")
    for name, p in hyplora_state_dict(trainer.model).items():
        assert torch.equal(p, content["tensors"][name])


# --- HypLoRA inside PEFT ------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "up_proj"]


def peft_and_ours(dtype=torch.float32, **options):
    """The same numbers in PEFT's variant and in inject_hyplora."""
    variant = example("peft_variant")
    config = variant.HypLoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)
    theirs = variant.get_peft_model(variant.small_model().to(dtype), config)
    ours = variant.small_model().to(dtype)
    inject_hyplora(ours, TARGETS, rank=4, alpha=8, **options)
    torch.manual_seed(0)
    randomize(theirs)
    for name, layer in adapters_of(ours).items():
        module = theirs.get_base_model().get_submodule(name)
        layer.lora_A.data.copy_(module.lora_A["default"].weight)
        layer.lora_B.data.copy_(module.lora_B["default"].weight)
    return theirs, ours


VERSIONS = {"peft": "0.21", "transformers": "5.24", "torch": "2.13"}


def versions_note():
    """What the tests of the private interface were run with, for whoever finds them failing."""
    here = {name: importlib.import_module(name).__version__ for name in VERSIONS}
    return f"this was written for {VERSIONS}, and here are {here}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_variant_is_bit_equal_to_inject_hyplora(dtype, autocast):
    variant = example("peft_variant")
    theirs, ours = peft_and_ours(dtype, curvature=0.7)
    variant.calibrate(theirs.eval(), input_ids=IDS)
    calibrate_curvature(ours, input_ids=IDS)
    for name, layer in adapters_of(ours).items():
        found = theirs.get_base_model().get_submodule(name).lora_unit["default"]
        assert torch.equal(found, layer.lora_unit), versions_note()
    results = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        results.append(out.logits)
    assert torch.equal(*results), versions_note()
    assert len(adapters_of(ours)) == 6
    for name, layer in adapters_of(ours).items():
        module = theirs.get_base_model().get_submodule(name)
        for found, parameter in (
            (module.lora_A["default"].weight.grad, layer.lora_A),
            (module.lora_B["default"].weight.grad, layer.lora_B),
            (module.lora_K["default"].grad, layer.lora_K),
        ):
            if dtype == torch.float32:
                assert torch.equal(found, parameter.grad), versions_note()
            else:  # PEFT casts x to float32 and back, so that gradients are added in another order.
                assert (found - parameter.grad).norm() < 2e-2 * parameter.grad.norm()


def test_the_variant_saves_resumes_and_keeps_adapters_apart(tmp_path):
    variant = example("peft_variant")
    theirs, _ = peft_and_ours(curvature=0.7)
    variant.calibrate(theirs, input_ids=IDS)
    base = variant.small_model()
    with torch.no_grad(), theirs.disable_adapter():
        assert torch.equal(theirs(IDS).logits, base(IDS).logits)

    def steps(model, count):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(count):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(theirs, 2)
    theirs.save_pretrained(tmp_path)
    steps(theirs, 2)
    config = variant.HypLoRAConfig.from_pretrained(tmp_path)
    assert config.curvature == 0.7
    resumed = variant.PeftModel.from_pretrained(
        variant.small_model(), tmp_path, config=config, is_trainable=True
    )
    steps(resumed, 2)
    one = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    two = {name: p for name, p in resumed.named_parameters() if p.requires_grad}
    assert len([name for name in one if "lora_K" in name]) == 6
    units = {name: b for name, b in theirs.named_buffers() if "lora_unit" in name}
    assert len(units) == 6 and all(torch.equal(b, resumed.get_buffer(n)) for n, b in units.items())
    assert one.keys() == two.keys(), versions_note()
    assert all(torch.equal(p, two[name]) for name, p in one.items())

    with torch.no_grad():
        first = theirs(IDS).logits
        theirs.add_adapter("other", variant.HypLoRAConfig(r=2, target_modules=["q_proj"]))
        theirs.set_adapter("other")
        assert torch.equal(theirs(IDS).logits, base(IDS).logits)
        theirs.set_adapter("default")
        assert torch.equal(theirs(IDS).logits, first)
        theirs.delete_adapter("other")
        assert not any("other" in name for name, _ in theirs.named_parameters())
    for merge in (theirs.merge_adapter, theirs.merge_and_unload):
        with pytest.raises(RuntimeError, match="can't be merged"):
            merge()
    with pytest.warns(UserWarning, match="curvature"):
        plain = variant.PeftModel.from_pretrained(variant.small_model(), tmp_path)
    with pytest.raises(ValueError, match="first adapter"):
        variant.calibrate(plain, input_ids=IDS)


# --- DoRA and AdaLoRA ---------------------------------------------------------------------------


def one_linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10))


X = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))


def test_dora_at_curvature_infinity_is_pefts():
    peft = pytest.importorskip("peft", reason="pip install peft")
    variants = example("variants")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=True)
    theirs = peft.get_peft_model(one_linear(), config)
    ours = one_linear()
    options = dict(rank=3, alpha=6, curvature=math.inf)
    variants.inject_variant(variants.DoraHypLoRALinear, ours, "all-linear", **options)
    randomize(theirs)
    pairs = []
    for i in (0, 2):
        module = theirs.get_base_model()[i]
        pairs += [
            (module.lora_A["default"].weight, ours[i].lora_A),
            (module.lora_B["default"].weight, ours[i].lora_B),
            (module.lora_magnitude_vector["default"].weight, ours[i].lora_magnitude),
        ]
    with torch.no_grad():
        for their, our in pairs:
            assert their.shape == our.shape
            our.copy_(their)
    optimizers = [torch.optim.SGD([pair[i] for pair in pairs], lr=0.1) for i in (0, 1)]
    for _ in range(3):
        outputs = [theirs(X), ours(X)]
        torch.testing.assert_close(*outputs)
        for out, optimizer in zip(outputs, optimizers):
            optimizer.zero_grad()
            (out - Y).square().mean().backward()
        for their, our in pairs:
            torch.testing.assert_close(our.grad, their.grad)
        for optimizer in optimizers:
            optimizer.step()


def test_a_fresh_dora_changes_nothing_and_is_an_adapter_of_hyplora(tmp_path):
    variants = example("variants")
    for kind in (variants.DoraHypLoRALinear, variants.AdaHypLoRALinear):
        models = [one_linear(), one_linear()]
        for model in models:
            variants.inject_variant(kind, model, "all-linear", rank=3)
        torch.testing.assert_close(models[0](X), one_linear()(X))
        optimizer = torch.optim.AdamW(hyplora_parameters(models[0]), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (models[0](X) - Y).square().mean().backward()
            optimizer.step()
        save_hyplora(models[0], tmp_path / "adapter.pt")
        load_hyplora(models[1], tmp_path / "adapter.pt")
        assert torch.equal(models[1](X), models[0](X))
        copied = copy.deepcopy(models[1])
        for p in copied.parameters():
            nn.init.zeros_(p)
        copied.load_state_dict(models[0].state_dict())
        assert torch.equal(copied(X), models[0](X))
        with disable_hyplora(models[0]):
            assert torch.equal(models[0](X), one_linear()(X))


def test_dora_with_hyplora_is_its_formula():
    variants = example("variants")
    base = nn.Linear(16, 12)
    layer = variants.DoraHypLoRALinear(base, rank=3, alpha=6, curvature=0.5)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_magnitude)
    A, B, W, b = (p.double() for p in (layer.lora_A, layer.lora_B, base.weight, base.bias))
    z = X.double() @ W.T + 2 * hyplora_reference(X.double(), A, B, 8.0)
    expected = layer.lora_magnitude.double() * z / (W + 2 * B @ A).norm(dim=1) + b
    torch.testing.assert_close(layer(X), expected.float())
    assert layer.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="rows of W"):
        variants.DoraHypLoRALinear(transposed())


def transposed():
    """A linear layer with a weight of the shape (in, out), as GPT-2 has it."""
    layer = nn.Module()
    layer.nx, layer.nf = 16, 12
    layer.weight = nn.Parameter(torch.ones(16, 12))
    return layer


def test_adalora_at_curvature_infinity_is_pefts_with_its_budget():
    peft = pytest.importorskip("peft", reason="pip install peft")
    variants = example("variants")
    total = 20
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=4,
        target_modules=["0", "2"],
        tinit=3,
        tfinal=5,
        deltaT=2,
        total_step=total,
        orth_reg_weight=0.1,
    )

    class WithLoss(nn.Module):  # PEFT adds the penalty to outputs.loss.
        def __init__(self):
            super().__init__()
            self.net = one_linear()

        def forward(self, x):
            out = self.net(x)
            outputs = type("Outputs", (), {})()
            outputs.loss = (out - Y).square().mean()
            outputs.out = out
            return outputs

    torch.manual_seed(0)
    theirs = peft.get_peft_model(WithLoss(), config)
    ours = one_linear()
    options = dict(rank=4, alpha=4, curvature=math.inf)
    variants.inject_variant(variants.AdaHypLoRALinear, ours, "all-linear", **options)
    budget = variants.RankBudget(ours, target_rank=2, total=total, warmup=3, final=5, every=2)
    pairs = []
    for i in (0, 2):
        module = theirs.get_base_model().net[i]
        for key in ("lora_A", "lora_B", "lora_E"):
            pairs.append((getattr(module, key)["default"], getattr(ours[i], key)))
    with torch.no_grad():
        for their, our in pairs:
            our.copy_(their)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=0.05) for i in (0, 1)]
    for step in range(1, total + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = theirs.base_model(X)
        outputs.loss.backward()
        out = ours(X)
        loss = (out - Y).square().mean() + 0.1 * variants.orthogonality(ours)
        loss.backward()
        torch.testing.assert_close(out, outputs.out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, outputs.loss, rtol=1e-4, atol=1e-5)
        for their, our in pairs:
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        budget.step(step)
        for their, our in pairs:
            assert torch.equal(our == 0, their == 0), step
    assert sum(int((our != 0).sum()) for _, our in pairs if our.shape[1] == 1) == 4


def test_a_pruned_lambda_leaves_a_hyplora_of_lower_rank():
    variants = example("variants")
    layer = variants.AdaHypLoRALinear(nn.Linear(16, 12), rank=3, alpha=3, curvature=0.5)
    nn.init.normal_(layer.lora_E)
    layer.lora_E.data[1] = 0
    kept = [0, 2]
    A = (layer.lora_E * layer.lora_A)[kept].double()
    update = hyplora_reference(X.double(), A, layer.lora_B[:, kept].double(), 8.0)
    torch.testing.assert_close(layer(X), layer.base(X) + update.float())


# --- the README's snippets -----------------------------------------------------------------------


def snippets():
    """{title: diff or program} of examples/README.md."""
    text = (ROOT / "examples" / "README.md").read_text()
    return dict(
        re.findall(r"### (.+?)\n(?:(?!###)[^`]|`(?!``))*```(?:diff|python)\n(.*?)```", text, re.S)
    )


def sides(diff):
    """The program before the change, and the one after it."""
    lines = diff.splitlines()
    before = [line[2:] for line in lines if not line.startswith("+")]
    after = [line[2:] for line in lines if not line.startswith("-")]
    return "\n".join(before), "\n".join(after)


def small_checkpoint(folder):
    """A Llama that 4-bit layers can take, with its tokenizer, as from_pretrained reads it."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


NEEDS = {"Plain PyTorch": [], "A 4-bit base": ["transformers", "bitsandbytes"]}


@pytest.mark.parametrize(
    "title", ["Plain PyTorch", "transformers", "A classifier with a new head", "A 4-bit base"]
)
def test_the_snippets_run_before_and_after_the_change(title, tmp_path, monkeypatch):
    for package in NEEDS.get(title, ["transformers"]):
        pytest.importorskip(package, reason=f"pip install {package}")
    monkeypatch.chdir(tmp_path)
    if title != "Plain PyTorch":
        small_checkpoint(tmp_path / "checkpoint")
    before, after = sides(snippets()[title])
    assert "inject_hyplora" in after and "inject_hyplora" not in before
    for program in (before, after):
        labels = torch.tensor([0, 1, 1, 0]) if "classifier" in title else IDS
        inputs = (torch.randn(8, 16), torch.randn(8, 16))
        batches = [{"input_ids": IDS, "labels": labels}]
        if title == "Plain PyTorch":
            batches = [inputs]
        namespace = {"batches": 5 * batches, "model": one_linear_of(16)}
        exec(program, namespace)
        model, loss = namespace["model"], namespace["loss"]
        assert math.isfinite(loss.item())
        adapted = list(adapters_of(model).values())
        assert bool(adapted) == (program is after)
    assert all(layer.lora_B.any() for layer in adapted)
    assert (tmp_path / "adapter.pt").exists()


def one_linear_of(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width))


def test_two_adapters_stand_on_one_base():
    generator = torch.Generator().manual_seed(0)
    tasks = {name: torch.randn(2, 8, 16, generator=generator) for name in ("one", "two")}
    made = {}

    def train(model, x, y):
        assert not any(layer.lora_B.any() for layer in adapters_of(model).values())
        optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        made[len(made)] = model(X).detach()

    namespace = {"model": one_linear_of(16), "tasks": tasks, "train": train}
    exec(snippets()["Two adapters on one base"], namespace)
    assert torch.equal(namespace["model"](X), made[0])
    assert not torch.equal(made[0], made[1])


def test_dpo_starts_from_a_reference_that_shares_the_base(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install trl datasets")
    from datasets import Dataset

    rows = []
    for start in range(10, 26):
        upwards, downwards = (" ".join(str(start + i * s) for i in range(1, 5)) for s in (1, -1))
        rows.append({"prompt": f"{start} ", "chosen": upwards, "rejected": downwards})
    options = dict(output_dir=str(tmp_path), bf16=False, beta=1.0, logging_steps=1)
    arguments = dict(
        args=trl.DPOConfig(**options, **STEPS | {"save_strategy": "no"}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    model = example("transformers_trainer").small_model().eval()
    base = copy.deepcopy(model)
    found = {"model": model, "arguments": arguments}
    exec(snippets()["DPO's reference without a second base"], found)
    reference = found["reference"]
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours for p in reference.parameters())
    assert torch.equal(reference(IDS).logits, base(IDS).logits)
    losses = [log["loss"] for log in found["trainer"].state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("curvature", ["", ", curvature=float('inf')"], ids=["0.5", "infinity"])
def test_a_lora_of_pefts_is_the_start_and_at_infinity_the_result(curvature):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    torch.manual_seed(0)
    model = peft.get_peft_model(example("transformers_trainer").small_model(), config)
    wanted = randomize(model).eval()(IDS).logits.detach()
    program = snippets()["Starting from a LoRA that PEFT trained"]
    program = program.replace("alpha=config.lora_alpha", f"alpha=config.lora_alpha{curvature}")
    namespace = {"peft_model": model, "batches": [{"input_ids": IDS}]}
    exec(program, namespace)
    assert len(adapters_of(namespace["model"])) == 6
    logits = namespace["model"](IDS).logits.detach()
    assert torch.allclose(logits, wanted, rtol=1e-6, atol=1e-6) == bool(curvature)


# --- the rest of the field test -----------------------------------------------------------------


def test_lightning_trains_and_its_checkpoints_contain_the_adapters_alone(tmp_path):
    lightning = pytest.importorskip("lightning", reason="pip install lightning")
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = one_linear()
            self.strict_loading = False
            inject_hyplora(self.net, "all-linear", rank=3)

        def training_step(self, batch):
            x, y = batch
            return (self.net(x) - y).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(hyplora_parameters(self), lr=1e-2)

        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if "lora_" in name}

    def fit(module, epochs, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=10), **options)
        return trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        straight = Module()
        start = copy.deepcopy(straight)
        trainer = fit(straight, 2)
        path = str(tmp_path / "adapters.ckpt")
        trainer.save_checkpoint(path)
        content = torch.load(path, weights_only=False)["state_dict"]
        assert content and all("lora_" in name for name in content)
        fit(straight, 4, ckpt_path=path)
        resumed = copy.deepcopy(start)
        fit(resumed, 4, ckpt_path=path)
    for name, p in straight.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name))
        assert torch.equal(p, start.get_parameter(name)) != p.requires_grad, name


def trains(model, loss_of, targets="all-linear"):
    """Every adapter moves in five steps, and the loss falls. The first step's gradients return."""
    inject_hyplora(model, targets, rank=4)
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    losses = []
    first = {}
    for _ in range(5):
        optimizer.zero_grad()
        torch.manual_seed(0)  # The same dropout in each step, so that losses can be compared.
        loss = loss_of(model)
        loss.backward()
        if not first:
            first = {name: layer.lora_B.grad.clone() for name, layer in adapters_of(model).items()}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(layer.lora_B.any() for layer in adapters_of(model).values())
    return first


@pytest.mark.parametrize(
    "options",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_8bit=True),
    ],
    ids=["4 bit", "8 bit"],
)
def test_bases_of_bitsandbytes_pass_the_gradient_on(options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    small_checkpoint(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = []
    for config in (None, transformers.BitsAndBytesConfig(**options)):
        model = load(tmp_path, quantization_config=config, dtype=torch.float32).train()
        names = set(model.state_dict())
        torch.manual_seed(0)
        found.append(trains(model, lambda m: m(input_ids=IDS, labels=IDS).loss))
        assert names < set(model.state_dict())  # What belongs to quantized weights is in it.
    assert any("lm_head" not in name and name.endswith((".SCB", ".absmax")) for name in names)
    full, quantized = found
    assert len(full) == 14
    for name, gradient in full.items():
        similar = F.cosine_similarity(gradient.flatten(), quantized[name].flatten(), dim=0)
        assert similar > 0.9, name


@pytest.mark.parametrize("package", ["torch.ao.quantization", "torchao.quantization"])
def test_dynamic_quantization_passes_no_gradient_on(package):
    """It is torch's own limit. The first layer's adapter would learn from the second's alone."""
    quantization = pytest.importorskip(package, reason="pip install torchao")
    model = one_linear()
    if package == "torch.ao.quantization":
        model = quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
        quantization.quantize_(model, config)
    inject_hyplora(model, "all-linear", rank=3)
    model(X).square().sum().backward()
    assert model[2].lora_B.grad.any()
    gradient = model[0].lora_B.grad
    assert gradient is None or not gradient.any()


def test_a_unet_of_diffusers_trains():
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    noisy, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def loss_of(model):
        return (model(noisy, torch.tensor([3, 5]), prompt).sample - noisy).square().mean()

    assert trains(model, loss_of, ["to_q", "to_k", "to_v", "to_out.0"])


def gradients(model, **checkpointing):
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_reentrant_checkpointing_trains_in_transformers():
    model = example("transformers_trainer").small_model()
    inject_hyplora(model, "all-linear", rank=4)
    randomize(model)
    plain = gradients(model)
    for use_reentrant in (False, True):
        found = gradients(model, use_reentrant=use_reentrant)
        assert found.keys() == plain.keys()
        for name, grad in found.items():
            assert grad is not None, name
            torch.testing.assert_close(grad, plain[name])


def test_reentrant_checkpointing_by_hand_warns_and_trains_once_its_input_requires_grad():
    model = one_linear()
    inject_hyplora(model, "all-linear", rank=3)
    x = X.clone()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
    assert not out.requires_grad
    out = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=True)
    out.square().sum().backward()
    assert model[0].lora_B.grad.any()


def test_disable_is_one_switch_for_all_threads_and_says_so():
    assert "for all threads" in disable_hyplora.__doc__
    model = one_linear()
    inject_hyplora(model, "all-linear", rank=3)
    randomize(model)
    results = []
    with torch.no_grad(), disable_hyplora(model):
        thread = threading.Thread(target=lambda: results.append(model(X).detach()))
        thread.start()
        thread.join()
    assert torch.equal(results[0], one_linear()(X))


@pytest.mark.parametrize("gain", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_the_curves_of_the_picture_follow_the_law_of_sinh(gain):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from examples.hyperboloid import radius_of_update

    radius = torch.linspace(0.01, 5, 50, dtype=torch.float64)
    expected = torch.asinh(gain * torch.sinh(radius))
    assert radius_of_update(radius.float(), gain).double() == pytest.approx(expected, rel=1e-4)


def test_the_picture_of_the_maps_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from examples import hyperboloid

    monkeypatch.setattr("sys.argv", ["hyperboloid", "--out", str(tmp_path)])
    hyperboloid.main()
    assert (tmp_path / "hyperboloid.png").stat().st_size > 10_000
