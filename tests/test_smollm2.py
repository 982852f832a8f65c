"""benchmarks/smollm2.py on a tiny model: a stack is what runs of their own are, and it goes on."""

import argparse
import json

import pytest
import torch

from hyplora import HypLoRALinear, hyplora_parameters, inject_hyplora, remove_hyplora

pytest.importorskip("transformers")

from benchmarks import smollm2, smollm2_plan, smollm2_tables  # noqa: E402
from benchmarks.smollm2_plan import METHODS, Run  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def lab():
    sizes = dict(steps=4, batch=2, rank=2, longest=64, test=6)
    more = dict(device="cpu", tokens=2048, accuracy={}, sequences=64, new_tokens=4)
    args = argparse.Namespace(**sizes, **more)
    model, tokenizer, train, tests = smollm2.small(args)
    data, _ = smollm2.split(train, tests, tokenizer, args)
    return smollm2.Lab(model, tokenizer, data, args)


def runs_of(*names, lr=1e-2):
    runs = [Run(name, lr, 7 + i, 64) for i, name in enumerate(names)]
    return sorted(runs, key=lambda run: METHODS[run.method].kind)


def test_a_stack_is_what_hyplora_layers_of_their_own_are(lab):
    names = ["LoRA", "HypLoRA, guessed unit", "HypLoRA, rho 2", "HypLoRA, rho 4", "DoRA"]
    names += ["authors' simplified", "LoRA, down alone", "HypLoRA, rho 1, down alone"]
    runs = runs_of(*names)
    stacks = lab.start(runs)
    starts = {name: [a for p in s.parts for a in p.lora_A.detach()] for name, s in stacks.items()}
    smollm2.take_out(lab.model, stacks)
    results = lab.train(runs)
    for i, (run, result) in enumerate(zip(runs, results)):
        method = METHODS[run.method]
        if method.kind not in ("lora", "hyplora"):
            continue
        options = dict(rank=2, alpha=64, curvature=method.curvature)
        options["learn_curvature"] = method.K_rate > 0
        inject_hyplora(lab.model, [f"{layer}_proj" for layer in method.layers], **options)
        for name, layer in lab.model.named_modules():
            if isinstance(layer, HypLoRALinear):
                layer.lora_A.data.copy_(starts[name][i])
                if method.calibrated:
                    square = torch.tensor(lab.squares[name] / layer.in_features)
                    layer.lora_K.data.fill_(square.log())
        parameters = [p for group in hyplora_parameters(lab.model) for p in group["params"]]
        alone = smollm2.train_alone(lab.model, parameters, lab, run, 4)
        remove_hyplora(lab.model)
        assert result["history"] == pytest.approx(alone, rel=1e-3)
        assert result["history"][-1] != pytest.approx(results[i - 1]["history"][-1], rel=1e-6)


def test_LoRA_and_DoRA_are_pefts(lab):
    pytest.importorskip("peft")
    assert max(smollm2.peft_check(lab, steps=4).values()) < 1e-4


def test_a_run_does_not_depend_on_its_neighbours(lab):
    broken = Run("HypLoRA, rho 1", float("nan"), 7, 64)
    good = Run("HypLoRA, rho 1", 1e-2, 8, 64)
    beside = lab.train([broken, good])[1]
    alone = lab.train([good])[0]
    assert beside["history"] == pytest.approx(alone["history"], rel=1e-5)
    assert beside["validation"] == pytest.approx(alone["validation"], rel=1e-5)


@pytest.mark.parametrize("kind", ["authors", "simplified"])
def test_the_authors_layers_are_those_of_authors_py(lab, kind):
    from benchmarks import authors

    name = {"authors": "authors' hyplora", "simplified": "authors' simplified"}[kind]
    runs = [Run(name, 1e-3, seed, 256) for seed in (1, 2)]
    stacks = lab.start(runs)
    part = next(iter(stacks.values())).parts[0]
    smollm2.take_out(lab.model, stacks)
    part.lora_B.data.normal_()
    x = torch.randn(2, 5, part.lora_A.shape[2])
    function = {"authors": authors.authors_update, "simplified": authors.simplified_update}[kind]
    curvature = {"authors": 1.0, "simplified": 0.5}[kind]
    for i, update in enumerate(part.update(x)):
        expected = function(x[i], part.lora_A[i], part.lora_B[i], curvature)
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-6)


def test_a_model_in_bfloat16_trains_with_every_method(lab):
    lab.model.bfloat16()
    lab.args.accuracy = {"MAWPS": 2}
    runs = [Run(name, 1e-2, 0, 64) for name in METHODS]
    runs.sort(key=lambda run: METHODS[run.method].kind)
    for result in lab.train(runs):
        assert result["history"][-1] == pytest.approx(5.5, abs=0.2)
        assert 0 <= result["MAWPS right"] <= 100


def test_the_adapters_are_measured(lab):
    small, large = lab.train(runs_of("HypLoRA, rho 0.4", "HypLoRA, rho 4", lr=1e-4))
    for kind in ("q", "up", "down"):
        assert small["adapters"][kind]["radius"][0] == pytest.approx(0.4, rel=0.3)
        assert small["adapters"][kind]["phi"][0] == pytest.approx(1.03, abs=0.05)
        assert large["adapters"][kind]["phi"][0] > 4
        assert large["adapters"][kind]["K_moved"] == [1, 1]


def test_batches_are_those_of_the_seed_and_of_one_range_of_lengths(lab):
    records = lab.data["train"]
    first, again, other = (list(smollm2.batches(records, s, 9, 4)) for s in (1, 1, 2))
    assert first == again
    assert first != other
    for a, b in zip(first, other):
        spread = [smollm2.length(r) for r in a + b]
        assert max(spread) - min(spread) <= 6


def test_questions_of_the_tests_are_taken_out():
    train = [dict(instruction=text) for text in ("How  many?\n", "How much?")]
    left = smollm2.without_questions_of(train, [[dict(instruction="How many?")]])
    assert left == train[1:]


def test_the_last_number_counts():
    assert smollm2.is_right("3 + 4 = 7. The answer is 1,007.", "1007.0")
    assert not smollm2.is_right("The answer is 7", "8.0")
    assert not smollm2.is_right("I do not know", "8.0")


def made_up(losses):
    """plan() played through where losses(run) is the validation loss."""
    done = {}
    while runs := smollm2_plan.plan(done, seeds=2):
        for run in runs[:16]:
            values = dict(validation=losses(run), phi=2.0, method=run.method, lr=run.lr)
            done[run.key()] = dict(values, seed=run.seed, alpha=run.alpha)
    return done


def test_the_sweep_goes_on_beyond_its_edges():
    best = {"LoRA": 0.1, "DoRA": 1e-5}
    done = made_up(lambda run: abs(torch.tensor(run.lr / best.get(run.method, 1e-3)).log().item()))
    for name, rate in best.items():
        assert rate / 1.5 < smollm2_plan.sweep(name, done)[1] < rate * 1.5
    assert smollm2_plan.alpha_of("control, rho 2", done) == 128


def test_a_method_that_diverges_ends_the_sweep():
    made_up(lambda run: float("nan"))


def test_runs_that_were_made_twice_say_how_far_they_are_apart():
    def made(*losses):
        return {"LoRA": {seed: {"held out": loss} for seed, loss in enumerate(losses)}}

    sentence = smollm2_tables.repetition(made(1.0, 1.0), made(1.001, 1.005), [])
    assert sentence.startswith("2 runs") and "deviation of 2.0, by 5.0 at most" in sentence


def test_a_second_call_goes_on_and_prints_the_tables(tmp_path, capsys, monkeypatch):
    chosen = {name: METHODS[name] for name in ("LoRA", "HypLoRA, rho 2", "control, rho 2")}
    for module in (smollm2, smollm2_plan, smollm2_tables):
        monkeypatch.setattr(module, "METHODS", chosen)
    path = tmp_path / "results.json"
    common = ["--small", "--no-peft", "--dry-run", "--results", str(path), "--stack", "6"]
    common += ["--accuracy", "MAWPS=2", "--new-tokens", "4"]
    smollm2.main([*common, "--seconds", "0"])
    assert json.loads(path.read_text())["runs"] == {}
    smollm2.main([*common, "--seeds", "1"])
    first = json.loads(path.read_text())["runs"]
    smollm2.main([*common, "--seeds", "2"])
    second = json.loads(path.read_text())["runs"]
    assert len(second) == len(first) + 3
    assert {key: second[key] for key in first} == first
    capsys.readouterr()
    smollm2.main(["--tables", "--dry-run", "--results", str(path)])
    page = capsys.readouterr().out
    assert "HypLoRA, rho 2 - control, rho 2" in page
    assert "HypLoRA, rho 2 | down" in page
    assert "Questions: 2 of MAWPS. An answer has at most 4 tokens." in page
    pytest.importorskip("matplotlib")
    smollm2_tables.picture(json.loads(path.read_text()), tmp_path / "phi.png")
    assert (tmp_path / "phi.png").exists()
