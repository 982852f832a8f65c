"""The examples do what their docstrings say, and the clients in examples/README.md run.

What needs a package that is missing is skipped: pip install -r tests/requirements.txt"""

import copy
import importlib
import json
import math
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import write_folder
from test_integrations import IDS, logits_of, mlp

import hyplora

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
# PEFT itself needs transformers and accelerate.
EXAMPLES = {"transformers_trainer": "peft", "peft_variant": "peft", "variants": "torch"}
X = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))


def example(name):
    pytest.importorskip(EXAMPLES[name], reason=f"pip install {EXAMPLES[name]}")
    return importlib.import_module(f"examples.{name}")


def randomize(model):
    """Adapters that do something: each B is drawn."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


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
    assert "False" not in printed and "nan" not in printed


def test_the_lesson_prints_and_draws_what_is_stored_in_it(tmp_path, monkeypatch, capsys):
    """From the toy on, numbers may differ between machines, but its own assertions hold."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="pip install matplotlib")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.syspath_prepend(ROOT)  # This also undoes the lesson's own change of the path.
    found, picture = {}, str(tmp_path / "picture.png")
    cells = json.loads((ROOT / "examples/lesson.ipynb").read_text())["cells"]
    for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
        exec("".join(cell["source"]).replace("PICTURE = None", f"PICTURE = {picture!r}"), found)
        printed, outputs = capsys.readouterr(), cell["outputs"]
        stored = "".join(line for output in outputs for line in output.get("text", []))
        assert not printed.err and shape_of(printed.out) == shape_of(stored)
        assert printed.out == stored or "Transformer" in found
        assert len(plt.get_fignums()) == len([output for output in outputs if "data" in output])
        plt.close("all")
    new, old = plt.imread(picture), plt.imread(ROOT / "assets/hyperboloid.png")
    assert new.shape == old.shape and abs(new - old).mean() < 0.02  # Fonts may differ.
    found["draw_law"](plt.gca())
    for gain, line in zip((4, 2, 1, 1 / 2, 1 / 4), plt.gca().lines[::2]):
        radius, new_radius = torch.tensor(line.get_xydata()).T
        torch.testing.assert_close(new_radius.sinh(), gain * radius.sinh(), rtol=1e-4, atol=0)


def test_the_mix_in_saves_adapters_alone_decays_no_K_and_loads_the_best_at_the_end(tmp_path):
    """Its own main shows that a run that is resumed ends with the same numbers."""
    options = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    options |= dict(weight_decay=0.1)
    trainer = example("transformers_trainer").make_trainer(str(tmp_path), **options)
    trainer.train()
    names = {p: name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name.rpartition(".")[2] for name in decayed} == {"lora_A", "lora_B"}
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    best = min(logs, key=lambda log: log["eval_loss"])["step"]
    assert best != logs[-1]["step"]
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert not [path for path in checkpoint.rglob("*") if "model" in path.name]
    content = torch.load(checkpoint / "hyplora.pt")
    for name, p in hyplora.hyplora_state_dict(trainer.model).items():
        assert torch.equal(p, content["tensors"][name])


TARGETS = ["q_proj", "v_proj", "up_proj"]


def variant_model(dtype=torch.float32):
    variant = example("peft_variant")
    config = variant.HypLoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS, curvature=0.7)
    model = variant.get_peft_model(variant.small_model().to(dtype), config)
    variant.calibrate(randomize(model).eval(), input_ids=IDS)
    return variant, model


def pairs_of(theirs, ours, keys):
    """PEFT's tensors beside ours, which get the same numbers."""
    pairs = []
    for name, layer in hyplora.hyplora_layers(ours).items():
        module = theirs.get_base_model().get_submodule(name)
        for key in keys:
            their, our = getattr(module, key)["default"], getattr(layer, key.replace("_vector", ""))
            pairs.append((getattr(their, "weight", their), our))
            assert pairs[-1][0].shape == our.shape
            our.data.copy_(pairs[-1][0])
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_variant_in_peft_is_bit_equal_to_inject_hyplora(dtype, autocast):
    variant, theirs = variant_model(dtype)
    ours = variant.small_model().to(dtype).eval()
    hyplora.inject_hyplora(ours, TARGETS, rank=4, alpha=8, curvature=0.7)
    hyplora.calibrate_curvature(ours, input_ids=IDS)
    for name, layer in hyplora.hyplora_layers(ours).items():
        module = theirs.get_base_model().get_submodule(name)
        assert torch.equal(module.lora_unit["default"], layer.lora_unit)
    pairs = pairs_of(theirs, ours, ["lora_A", "lora_B", "lora_K"])
    assert len(pairs) == 3 * 6
    results = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        results.append(out.logits)
    assert torch.equal(*results)
    # PEFT casts a bfloat16 x to float32 and back, so that gradients are added in another order.
    bound = 0 if dtype == torch.float32 else 2e-2
    for their, our in pairs:
        assert (their.grad - our.grad).norm() <= bound * our.grad.norm()


def test_the_variant_in_peft_is_one_of_two_and_loads_by_its_own_config(tmp_path, monkeypatch):
    """Its own main saves, loads and is refused a merge."""
    monkeypatch.setattr(hyplora, "MAX_RADIUS", 1.0)
    variant, model = variant_model()
    model.save_pretrained(tmp_path)
    first, base = logits_of(model), logits_of(variant.small_model().eval())
    model.add_adapter("other", variant.HypLoRAConfig(r=2, target_modules=["q_proj"]))
    pytest.raises(ValueError, variant.HypLoRAConfig, curvature=1e37)  # K would be infinite.
    model.set_adapter("other")
    assert torch.equal(logits_of(model), base) and not torch.equal(first, base)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
    with pytest.warns(UserWarning, match="curvature"):
        plain = variant.PeftModel.from_pretrained(variant.small_model(), tmp_path)
    with pytest.raises(ValueError, match="first adapter"):
        variant.calibrate(plain, input_ids=IDS)
    monkeypatch.undo()  # The config has the bound that the adapter was made with.
    config = variant.HypLoRAConfig.from_pretrained(tmp_path)
    loaded = variant.PeftModel.from_pretrained(variant.small_model(), tmp_path, config=config)
    assert torch.equal(logits_of(loaded), first)
    assert not torch.equal(logits_of(variant_model()[1]), first)


class Uneven(nn.ModuleDict):
    def forward(self, x):  # One layer runs twice, the other sees no token.
        return self["never"](self["often"](10 * self["often"](x))[:0])


def test_the_variant_in_peft_is_calibrated_by_all_tokens_or_not_at_all():
    variant = example("peft_variant")
    base = Uneven({name: nn.Linear(16, 16) for name in ("often", "never")})
    config = variant.HypLoRAConfig(r=2, target_modules=["often", "never"])
    model = variant.get_peft_model(copy.deepcopy(base), config)
    hyplora.inject_hyplora(base, ["often"])
    hyplora.calibrate_curvature(base, X)
    variant.calibrate(model, x=X)
    with pytest.raises(ValueError, match="infinite"):
        variant.calibrate(model, x=X / 0)
    found = model.get_base_model()
    assert found["often"].lora_unit["default"] == base["often"].lora_unit
    assert found["never"].lora_unit["default"] == 4


# PEFT's names of the tensors of each class.
VARIANTS = {
    "DoraHypLoRALinear": ["lora_A", "lora_B", "lora_magnitude_vector"],
    "AdaHypLoRALinear": ["lora_A", "lora_B", "lora_E"],
}


class WithLoss(nn.Sequential):
    """PEFT adds AdaLoRA's penalty to the loss in a model's output."""

    def forward(self, x):
        out = super().forward(x)
        return types.SimpleNamespace(out=out, loss=(out - Y).square().mean())


def variant_network(kind, **options):
    variants, model = example("variants"), mlp()
    variants.inject_variant(getattr(variants, kind), model, ["0", "2"], **options)
    return variants, model


@pytest.mark.parametrize("kind", VARIANTS)
def test_at_curvature_infinity_a_variant_is_pefts_and_saved_and_switched_off(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    adaptive, options = kind.startswith("Ada"), dict(lora_alpha=8, target_modules=["0", "2"])
    schedule = dict(init_r=4, target_r=2, tinit=3, tfinal=5, deltaT=1, total_step=20)
    if adaptive:
        config = peft.AdaLoraConfig(orth_reg_weight=0.1, **schedule, **options)
    else:
        config = peft.LoraConfig(r=4, use_dora=True, **options)
    theirs = randomize(peft.get_peft_model(WithLoss(*mlp()), config))
    variants, ours = variant_network(kind, rank=4, alpha=8, curvature=math.inf)
    torch.testing.assert_close(ours(X), mlp()(X))
    budget = variants.RankBudget(ours, target_rank=2, total=20, warmup=3, final=5)
    pairs = pairs_of(theirs, ours, VARIANTS[kind])
    optimizers = [torch.optim.AdamW(parameters, lr=0.05) for parameters in zip(*pairs)]
    for step in range(1, 21):
        outputs, out = theirs.base_model(X), ours(X)
        penalty = 0.1 * variants.orthogonality(ours) if adaptive else 0  # as AdaLoRA's loss has
        losses = (outputs.loss, (out - Y).square().mean() + penalty)
        torch.testing.assert_close(out, outputs.out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for their, our in pairs:
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-3, atol=1e-4)
        if adaptive:
            theirs.base_model.update_and_allocate(step)
            budget.step(step)
            assert all(torch.equal(our == 0, their == 0) for their, our in pairs), step
            kept = sum(layer.lora_E.count_nonzero() for layer in (ours[0], ours[2]))
            assert kept == 4 or step < 15
    hyplora.save_hyplora(ours, tmp_path / "adapter.pt")
    _, other = variant_network(kind, rank=4, alpha=8, curvature=math.inf)
    hyplora.load_hyplora(other, tmp_path / "adapter.pt")
    assert torch.equal(copy.deepcopy(other)(X), ours(X))
    with hyplora.disable_hyplora(ours):
        assert torch.equal(ours(X), mlp()(X))
    assert hyplora.remove_hyplora(ours).state_dict().keys() == mlp().state_dict().keys()
    with pytest.raises(ValueError, match="warmup 15 must end before total - final, 15"):
        variants.RankBudget(ours, target_rank=2, total=20, warmup=15, final=5)


def test_variants_with_hyplora_are_their_formulas_also_where_a_lambda_is_pruned():
    variants = example("variants")
    x, base = X.double(), nn.Linear(16, 12)
    layer = variants.DoraHypLoRALinear(base, rank=3, alpha=6, curvature=0.5)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_magnitude)
    A, B, W, b = (p.double() for p in (layer.lora_A, layer.lora_B, base.weight, base.bias))
    z = x @ W.T + 2 * hyplora.hyplora_reference(x, A, B, 8.0)
    expected = layer.lora_magnitude.double() * z / (W + 2 * B @ A).norm(dim=1) + b
    torch.testing.assert_close(layer(X), expected.float())

    layer = variants.AdaHypLoRALinear(nn.Linear(16, 12), rank=3, alpha=3, curvature=0.5)
    nn.init.normal_(layer.lora_E)
    layer.lora_E.data[1] = 0
    A = (layer.lora_E * layer.lora_A)[[0, 2]].double()
    update = hyplora.hyplora_reference(x, A, layer.lora_B[:, [0, 2]].double(), 8.0)
    torch.testing.assert_close(layer(X), layer.base(X) + update.float())


def snippet(title):
    """The diff or program under a title of examples/README.md."""
    text = (ROOT / "examples" / "README.md").read_text().split(f"### {title}\n")[1]
    return re.search(r"```(?:diff|python)\n(.*?)```", text, re.S)[1]


TITLES = ["Plain PyTorch", "transformers", "A classifier with a new head", "A 4-bit base"]


@pytest.mark.parametrize("title", TITLES)
def test_the_snippets_run_before_and_after_the_change(title, tmp_path, monkeypatch):
    is_plain = title == "Plain PyTorch"
    if not is_plain:
        pytest.importorskip("bitsandbytes" if "4-bit" in title else "transformers")
        write_folder(tmp_path / "checkpoint", hidden_size=64, intermediate_size=64)
    monkeypatch.chdir(tmp_path)
    labels = torch.tensor([0, 1, 1, 0]) if "classifier" in title else IDS
    batch = (X, Y) if is_plain else {"input_ids": IDS, "labels": labels}
    lines = snippet(title).splitlines()
    for sign in "+-":
        found = {"batches": 5 * [batch], "model": mlp()}
        exec("\n".join(line[2:] for line in lines if not line.startswith(sign)), found)
        assert math.isfinite(found["loss"].item())
        assert bool(hyplora.hyplora_layers(found["model"])) == (sign == "-")
    trained = copy.deepcopy(hyplora.hyplora_state_dict(found["model"]))
    assert all(p.any() for name, p in trained.items() if "lora_B" in name)
    assert "score.weight" in trained or "classifier" not in title
    for p in hyplora.hyplora_state_dict(found["model"]).values():
        p.zero_()
    hyplora.load_hyplora(found["model"], "adapter.pt")
    for name, p in hyplora.hyplora_state_dict(found["model"]).items():
        assert torch.equal(p, trained[name]), name


def test_two_adapters_stand_on_one_base():
    tasks = {"one": (X, Y), "two": (Y, X)}
    made = []

    def train(model, x, y):
        assert not any(layer.lora_B.any() for layer in hyplora.hyplora_layers(model).values())
        optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model), lr=1e-2)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        made.append(model(X).detach())

    found = {"model": mlp(), "tasks": tasks, "train": train}
    exec(snippet("Two adapters on one base"), found)
    assert torch.equal(found["model"](X), made[0]) and not torch.equal(*made)


def test_dpo_starts_from_a_reference_that_shares_the_base(tmp_path, llama):
    trl = pytest.importorskip("trl", reason="pip install trl datasets")
    import transformers
    from datasets import Dataset

    rows = [{"prompt": f"{n} ", "chosen": f"{n + 1}", "rejected": f"{n - 1}"} for n in range(16)]
    steps = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1)
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    options = trl.DPOConfig(output_dir=str(tmp_path), bf16=False, beta=1.0, **steps, **quiet)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    data = Dataset.from_list(rows)
    arguments = dict(args=options, train_dataset=data, processing_class=tokenizer)
    base = copy.deepcopy(model)
    found = {"model": model, "arguments": arguments}
    exec(snippet("DPO's reference without a second base"), found)
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours for p in found["reference"].parameters())
    assert torch.equal(logits_of(found["reference"]), logits_of(base))
    losses = [log["loss"] for log in found["trainer"].state.log_history[:-1]]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("curvature", ["", ", curvature=float('inf')"], ids=["0.5", "infinity"])
def test_a_lora_of_pefts_is_the_start_and_at_infinity_the_result(curvature):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    model = peft.get_peft_model(example("transformers_trainer").small_model(), config)
    wanted = logits_of(randomize(model).eval())
    base = model.get_base_model()
    for part in (model, base, base.model.layers[0]):
        with pytest.raises(ValueError, match="has adapters.*of PEFT"):
            hyplora.inject_hyplora(part, ["v_proj"])
    program = snippet("Starting from a LoRA that PEFT trained")
    program = program.replace("alpha=config.lora_alpha", f"alpha=config.lora_alpha{curvature}")
    found = {"peft_model": model, "batches": [{"input_ids": IDS}]}
    exec(program, found)
    logits = logits_of(found["model"])
    assert torch.allclose(logits, wanted, rtol=1e-6, atol=1e-6) == bool(curvature)
