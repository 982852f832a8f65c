"""studies/ against definitions written out, spaces whose answer is known, and hubs' folders."""
# ruff: noqa: E402  (what is not installed is skipped before it is imported)

import argparse
import asyncio
import itertools
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

for package in ("scipy", "transformers", "peft", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="pip install -r tests/requirements.txt")

import numpy as np
import safetensors.torch
import transformers
from conftest import write_folder, write_sums

from studies import authors, comparison, embeddings, geometry, nulls, tables
from studies.geometry import delta_hyperbolicity, euclidean_distances, power_law_exponent

torch.set_num_threads(1)  # The tensors are tiny: threads would only wait for each other.


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def delta_written_out(D):
    """Gromov's definition, on lists."""
    product = [[(D[i][0] + D[j][0] - d) / 2 for j, d in enumerate(row)] for i, row in enumerate(D)]
    delta = 0
    for i, j, k in itertools.product(range(len(D)), repeat=3):
        delta = max(delta, min(product[i][k], product[k][j]) - product[i][j])
    return 2 * delta / max(max(row) for row in D)


def test_delta_is_gromovs_definition_and_no_estimate():
    points = randn(30, 4)
    D = torch.cdist(points, points)
    expected = delta_written_out(D.tolist())
    assert delta_hyperbolicity(D) == pytest.approx(expected, rel=1e-5)
    for others in (points, points.float(), 1e6 * points):  # no unit
        found = delta_hyperbolicity(euclidean_distances(others))
        assert found == pytest.approx(expected, rel=1e-5)
    assert delta_hyperbolicity(torch.zeros(5, 5)) == 0


def test_distances_of_points_that_are_near_each_other_do_not_cancel():
    near = 1000 + 1e-3 * randn(5, 4)
    difference = near[:, None] - near
    assert torch.allclose(euclidean_distances(near), difference.norm(dim=-1), rtol=1e-2)


def test_delta_tells_trees_from_cycles_and_spheres():
    assert delta_hyperbolicity(nulls.random_tree(60, generator())) < 1e-6
    cycle = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    assert delta_hyperbolicity(cycle) == 1  # delta is 1, and so is half the diameter
    sphere = nulls.sphere(1000, generator())  # The supremum is 1, and the paper gives 0.99.
    assert 0.95 < delta_hyperbolicity(sphere) < 1


def samples_of_the_law(alpha, xmin, n=20_000, seed=0):
    x = torch.arange(xmin, 200_000, dtype=torch.float64)
    cumulated = (x**-alpha).cumsum(0)
    uniform = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    return x[torch.searchsorted(cumulated, uniform * cumulated[-1])]


@pytest.mark.parametrize("alpha", [1.9, 2.5])
def test_the_exponent_is_that_of_the_law_that_counts_were_drawn_from(alpha):
    counts = torch.cat([samples_of_the_law(alpha, 1), torch.zeros(50)])
    law = power_law_exponent(counts)
    assert abs(law.alpha - alpha) < 5 * law.error + 0.02
    assert 0.003 < law.error < 0.03
    noise = torch.randint(1, 20, (20_000,), generator=generator(1))  # The law begins behind it.
    law = power_law_exponent(torch.cat([samples_of_the_law(alpha, xmin=20), noise]))
    assert 18 <= law.xmin <= 40
    assert abs(law.alpha - alpha) < 5 * law.error + 0.02


def test_no_number_is_made_up_where_there_is_nothing_to_measure():
    wrong = [torch.ones(3, 3).triu(1), torch.ones(3, 3), torch.full((3, 3), math.inf)]
    for distances in [*wrong, torch.full((3, 3), math.nan)]:
        with pytest.raises(ValueError, match="finite, symmetric, and 0 on the diagonal"):
            delta_hyperbolicity(distances)
    messages = {"whole numbers": [1.5] * 50, "no ten counts": [0] * 50}
    messages["follow a power law"] = [1000] * 50 + [1001]
    for message, counts in messages.items():
        with pytest.raises(ValueError, match=message):
            power_law_exponent(counts)


def test_norms_are_put_beside_how_often_their_tokens_occur():
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    token_ids = torch.tensor([0] + 99 * [1] + 99 * [2] + [0])
    found = geometry.norm_by_frequency(embedding, token_ids, bins=2)
    lengths = [norms.tolist() for norms in found.values()]
    assert lengths == [pytest.approx([math.sqrt(162)]), [5.0], [1.0, 3.0]]
    assert list(found) == [(0, 1), pytest.approx((1, 10)), pytest.approx((10, 100))]


def test_other_tokens_lose_the_meaning_of_a_prompt_and_nothing_else():
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8], [9, 7, 9, 3]]
    shuffled = nulls.shuffled_prompts(prompts, 10, generator())
    assert [len(prompt) for prompt in shuffled] == [5, 7, 4] and shuffled != prompts
    assert sorted(itertools.chain(*shuffled)) == sorted(itertools.chain(*prompts))
    drawn = nulls.random_tokens(prompts, 1000, generator())
    assert 100 < max(itertools.chain(*drawn)) < 1000
    for old, new in zip(prompts, drawn):
        assert [old.index(token) for token in old] == [new.index(token) for token in new]


def test_other_vectors_keep_what_their_name_says():
    points = randn(400, 3) @ randn(3, 3, seed=1) + 5
    permuted = nulls.entries_permuted(points, None, generator(1))
    assert torch.equal(permuted.sort(dim=0).values, points.sort(dim=0).values)
    drawn = nulls.gaussian_like(torch.empty(200_000, 3), nulls.moments(points), generator(2))
    assert torch.allclose(drawn.double().mean(dim=0), points.mean(dim=0), atol=0.05)
    expected = torch.cov(points.T)
    assert torch.allclose(torch.cov(drawn.double().T), expected, atol=0.05 * expected.max())
    drawn = nulls.gaussian_of_same_norms(points, None, generator(1))
    assert torch.allclose(drawn.norm(dim=1), points.norm(dim=1))
    assert torch.cosine_similarity(drawn, points).abs().median() < 0.9
    # In many dimensions the steps of a hierarchy are orthogonal: squared distances count them.
    vectors = nulls.hierarchy(torch.empty(15, 20_000), None, generator()).double()
    steps = torch.cdist(vectors, vectors).square() / 20_000
    assert (steps - steps.round()).abs().max() < 0.1
    assert steps.round().max() == 6  # from leaf to leaf over the root of a binary tree of 15
    assert delta_hyperbolicity(steps.round()) == 0


def hyplora_by_hand(x, A, B, k):
    K = math.log1p(math.exp(k)) + 1e-6
    r = min(math.hypot(*x) / math.sqrt(len(x)) / math.sqrt(K), 12.0)
    y = B @ (A @ (x / math.hypot(*x))) * math.sqrt(K) * math.sinh(r)
    theta = math.sqrt(math.hypot(*y) ** 2 + 1 / K) / math.sqrt(K)
    near = theta < 1.01
    distance = math.sqrt(2 * max(theta - 1, 1e-6)) if near else math.acosh(theta)
    return math.sqrt(K) * distance * y / max(math.hypot(*y), 1e-7)


def simplified_by_hand(x, A, B, k):
    y = B @ (A @ (2 * x / (1 + k * math.hypot(*x) ** 2)))
    return y / (1 + math.sqrt(abs(k)) * math.sqrt(math.hypot(*y) ** 2 + k))


@pytest.mark.parametrize("k", [0.5, 1.0])
@pytest.mark.parametrize("size", [1e-5, 0.1, 3.0])
def test_the_authors_layers_are_what_one_reads_off_their_code(size, k):
    x = randn(6, 20) * torch.tensor([0.1, 0.5, 1, 2, 10, 100])[:, None]
    A = randn(3, 20, seed=1) / 4
    B = size * randn(7, 3, seed=2)
    updates = authors.authors_update, authors.simplified_update
    for update, by_hand in zip(updates, (hyplora_by_hand, simplified_by_hand)):
        want = torch.stack([by_hand(token, A, B, k) for token in x])
        error = (update(x, A, B, k) - want).norm(dim=1)
        assert (error <= 1e-6 * want.norm(dim=1)).all()


def test_the_dead_zone_ends_where_the_length_begins_to_grow():
    assert authors.dead_zone(0.5) == 0
    edge = authors.dead_zone(1.0)
    K = authors.effective_curvature(1.0)
    one = torch.ones(1, 1)
    unit = K.sqrt() * torch.sinh(1 / K.sqrt())  # |y| for this token when B is 1
    lengths = []
    for y in (0.01, edge - 1e-3, edge + 1e-3):
        lengths.append(authors.authors_update(one, one, one * y / unit, 1.0).item())
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert lengths[2] > 10 * lengths[1]


def test_the_numbers_in_authors_md_are_those_that_the_program_prints(capsys):
    authors.main()
    page = (Path(authors.__file__).parent / "AUTHORS.md").read_text(encoding="utf-8")
    *printed, numbers = re.findall(r"(?:^\|.*\n)+", capsys.readouterr().out, re.MULTILINE)
    kept = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    for table in printed:
        other = next(t for t in kept if t.splitlines()[0] == table.splitlines()[0])
        for cell, other_cell in zip(table.split("|"), other.split("|"), strict=True):
            if re.search(r"\d", cell) and "," not in cell:
                assert float(cell) == pytest.approx(float(other_cell), rel=0.02)  # the last digit
            else:
                assert cell == other_cell
    in_text = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", page)]
    for line in numbers.splitlines()[2:]:
        number = float(line.rsplit("|", 2)[1])
        assert any(number == pytest.approx(other, rel=0.005) for other in in_text), line


@pytest.fixture
def checkpoint(tmp_path):
    return Path(write_folder(tmp_path / "checkpoint"))


def test_no_random_packed_or_unscaled_numbers_are_taken_for_vectors(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    vectors = tensors.pop("model.embed_tokens.weight")
    assert torch.equal(embeddings.read_embedding(checkpoint), vectors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SystemExit, match=r"\A.*no tensor for embed_tokens.weight.*\Z"):
        embeddings.read_embedding(checkpoint)  # One line is printed.
    tensors["model.embed_tokens.weight"] = (1000 * vectors).to(torch.int8)
    tensors["model.embed_tokens.weight_scale"] = torch.full((260,), 0.001)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SystemExit, match=r"\A.*is quantized.*\Z"):
        embeddings.read_embedding(checkpoint)


def test_delta_of_a_prompt_takes_its_tokens_in_order_and_the_first_as_base():
    embedding = randn(9, 3).float()
    prompt = [4, 2, 7, 2, 1, 8]
    D = torch.cdist(embedding, embedding)[prompt][:, prompt].fill_diagonal_(0)
    found = embeddings.deltas_of(embedding, [prompt, [8, 4, 2, 7, 2, 1]])
    assert found[0] == pytest.approx(delta_written_out(D.tolist()), rel=1e-5)
    assert found[1] != pytest.approx(found[0], rel=1e-2)


def test_the_program_replaces_its_own_sections_alone(checkpoint, tmp_path, monkeypatch, capsys):
    results = tmp_path / "RESULTS.md"
    section = "## Embeddings: delta where it is known"
    results.write_text(f"# Results\n\n{section}\n\nold\n\n{section}, too\n\nkept\n\n\n## K\n\nk\n")
    monkeypatch.setattr(embeddings, "DIMENSIONS", (2, 8))
    monkeypatch.setattr(embeddings, "SIZES", {"20 points": (20, 2)})
    data = write_sums(tmp_path / "sums.json")
    picture = tmp_path / "delta.png"
    line = f"{checkpoint} --data {data} --seeds 2 --results {results} --picture {picture}"
    monkeypatch.setattr(sys, "argv", ["embeddings", *line.split()])
    embeddings.main()
    printed = capsys.readouterr().out
    written = results.read_text()
    assert "old" not in written and f"\n\n{section}, too\n\nkept\n\n\n## K\n\nk\n\n## Em" in written
    length = sum(len(r["instruction"]) for r in json.loads(Path(data).read_text()))  # bytes
    assert f"| checkpoint, sums | {length} |" in printed
    for line in printed.splitlines():
        assert line in written and "nan" not in line
        assert str(tmp_path) not in line
    assert picture.stat().st_size > 10_000


def test_the_two_way_interval_has_the_variance_of_seeds_and_of_records():
    draw = np.random.default_rng(0)
    counts = np.full(400, 5)
    seeds = draw.normal(0, 0.3, size=(20, 1))
    records = draw.normal(0, 1, size=(1, 400))
    mean, low, high = tables.two_way_interval(5 * (seeds + records), counts)
    spread = np.sqrt(seeds.var() / 20 + records.var() / 400)  # of a mean of independent effects
    assert mean == pytest.approx(seeds.mean() + records.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.05)
    assert tables.two_way_interval(np.outer(np.ones(3), counts), counts)[1:] == (1, 1)


def test_a_comparison_in_words_is_over_the_seeds_that_both_have():
    base = {seed: {"loss": np.array([1.0, 3.0])} for seed in (0, 1, 2)}
    runs = {"LoRA": base, "DoRA": {seed: {"loss": np.array([2.0, 4.0])} for seed in (1, 2, 3)}}
    found = comparison.compare_all("DoRA", runs, tokens=[1, 3])
    assert found["seeds"] == 3 and found["loss"] == "1.5000 ± 0.0000"
    assert found["loss minus LoRA"] == "+0.5000 (+0.3333 to +1.0000), median +0.5000, 2 of 2 above"
    assert comparison.measures_of(dict(losses=[1, 3], hits="10"))["% right"].tolist() == [100, 0]


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A setting of studies/comparison.py with a random model, eight training records, two steps."""
    for size in ("HELD_OUT", "VALIDATION", "TEST"):
        monkeypatch.setattr(comparison, size, 3)
    monkeypatch.setattr(comparison, "BATCH", 4)
    for number, name in enumerate(("gsm8k_train", "mawps_train", "gsm8k", "svamp")):
        write_sums(tmp_path / f"{name}.json", count=8, first=8 * number)
    folder = write_folder(tmp_path / "model")
    shared = dict(model=folder, task="arithmetic", alpha=64, rate=1e-3, steps=2, factors={})
    return shared | {"method": "LoRA", "sets": ["held out", "gsm8k"]}


def test_the_comparison_reads_the_choices_and_keeps_tests_apart(tmp_path, setting):
    text = "Which is the question: Wet?\n\nAnswer1: sand Answer2: the sea\n\nAnswer format: answer1"
    wrong = {"instruction": "What is 1 + 1?", "output": "The answer is 3", "answer": "2"}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([dict(instruction=text, output="", answer="answer2"), wrong]))
    expected = ("Wet?", ["sand", "the sea"], 1)
    assert comparison.read_questions(path) == [expected]
    records = comparison.read_task("arithmetic", setting["model"], str(tmp_path))
    assert [len(found) for found in records.values()] == [3, 3, 3, 10, 3]
    prompts = [str(record.question) for found in records.values() for record in found]
    assert len(set(prompts)) == len(prompts)


def test_the_comparison_scores_as_transformers_does(setting, tmp_path):
    row = comparison.work(setting | comparison.UNTRAINED, 0, str(tmp_path))
    records = comparison.read_task("arithmetic", setting["model"], str(tmp_path))["held out"]
    model = transformers.AutoModelForCausalLM.from_pretrained(setting["model"])
    for record, loss, count in zip(records, row["held out"]["losses"], row["held out"]["tokens"]):
        ids = torch.tensor([record.question + record.choices[0]])
        labels = ids.clone()
        labels[:, : len(record.question)] = -100
        assert loss == pytest.approx(count * model(ids, labels=labels).loss.item(), abs=0.01)


def test_a_control_is_lora_with_the_alpha_of_its_layers(setting, tmp_path, monkeypatch):
    def losses(**changes):
        return comparison.work(setting | changes, 0, str(tmp_path))["held out"]["losses"]

    layers = [name for name, _ in comparison.load(setting["model"]).named_modules()]
    factors = {name: 2.0 for name in layers if name.endswith(tuple(comparison.TARGETS))}
    control = losses(method="control of HypLoRA", factors=factors)
    assert control == losses(alpha=128) != losses()
    others = ["DoRA", "HypLoRA", "HypLoRA, raw K = 0.5", "HypLoRA, radius 4"]
    others += ["HypLoRA, down alone, radius 1", *comparison.AUTHORS]
    assert len({str(losses(method=method)) for method in others}) == len(others)
    assert losses(method="HypLoRA, bound 4") == losses(method="HypLoRA")  # No token is farther out.
    monkeypatch.setattr(comparison, "CURVATURES", dict.fromkeys(comparison.CURVATURES, 0.01))
    assert losses(method="HypLoRA, bound 4") != losses(method="HypLoRA")


def test_a_tier_is_tuned_printed_and_never_run_twice(setting, tmp_path, monkeypatch, capsys):
    best = {"LoRA": 1.3e-3, "DoRA": 0.6e-3, "HypLoRA": 2.4e-3, "control of HypLoRA": 1.7e-3}
    calls = []

    def work(found, seed, folder):  # The loss is a parabola in the rate, lowest for alpha = 128.
        calls.append(found)
        row = comparison.name_of(found) | dict(seed=seed, date="today", machine="none")
        if found["steps"] == 0:
            return row | {name: dict(losses=[9.0], tokens=[2]) for name in found["sets"]}
        loss = 1 + math.log2(found["rate"] / best[found["method"]]) ** 2
        loss += abs(found["alpha"] - 128) / 64
        if found["sets"] != ["validation"]:
            return row | {name: dict(losses=[loss + seed / 100]) for name in found["sets"]}
        return row | dict(validation=loss, phi={"model.layers.0.q_proj": 1 + seed / 1000})

    monkeypatch.setattr(comparison, "work", work)
    args = argparse.Namespace(out=tmp_path / "rows.jsonl", data="", workers=1, tier=1, steps=100)
    for expected in (True, False):
        plan = comparison.Plan(args)
        plan.pool = ThreadPoolExecutor(1)
        calls.clear()
        asyncio.run(plan.run_tier("folder/name", "arithmetic"))
        assert bool(calls) == expected
    rows = comparison.read_rows(args.out)
    reported = [row for row in rows.values() if "held out" in row and row["steps"]]
    assert len(reported) == 40 and len({row["seed"] for row in reported}) == 10
    for row in reported:
        assert row["alpha"] == 128 and row["rate"] == pytest.approx(best[row["method"]], rel=0.2)
    comparison.print_tables(rows, None)
    printed = capsys.readouterr().out
    assert "{1: 28, " in printed and "(untrained: 4.5000)" in printed
    comparison.draw_pictures(rows, tmp_path)
    assert len(list(tmp_path.glob("comparison_*.png"))) == 2
