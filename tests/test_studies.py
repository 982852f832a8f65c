"""studies/ against definitions written out, spaces whose answer is known, and files as the hubs
distribute them."""
# ruff: noqa: E402  (what is not installed is skipped before it is imported)

import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for package in ("scipy", "transformers", "peft", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="pip install -r tests/requirements.txt")

import peft
import safetensors.torch
import tokenizers
import transformers

from studies import authors, embeddings, geometry, nulls, tables
from studies.geometry import delta_hyperbolicity, power_law_exponent, power_law_p_value

torch.set_num_threads(1)  # The tensors are tiny: threads would only wait for each other.


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def delta_written_out(D):
    """Gromov's definition, on lists."""
    n = len(D)

    def product(i, j):
        return (D[i][0] + D[j][0] - D[i][j]) / 2

    delta = 0
    for i, j, k in itertools.product(range(n), repeat=3):
        delta = max(delta, min(product(i, k), product(k, j)) - product(i, j))
    return 2 * delta / max(max(row) for row in D)


@pytest.mark.parametrize("block", [4, 128])
def test_delta_is_gromovs_definition_and_no_estimate(block, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", block)
    points = randn(30, 4)
    D = torch.cdist(points, points)
    expected = delta_written_out(D.tolist())
    assert delta_hyperbolicity(distances=D) == pytest.approx(expected, rel=1e-6)
    assert delta_hyperbolicity(points) == pytest.approx(expected, rel=1e-5)
    assert delta_hyperbolicity(1e6 * points) == pytest.approx(expected, rel=1e-5)  # no unit
    assert delta_hyperbolicity(points[:1].expand(5, 4)) == 0


def test_delta_tells_trees_and_hyperbolic_space_from_cycles_and_spheres():
    assert delta_hyperbolicity(distances=nulls.random_tree(60, generator())) < 1e-6
    cycle = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    assert delta_hyperbolicity(distances=cycle) == 1  # delta is 1, and so is half the diameter
    sphere = nulls.sphere(1000, generator())  # The supremum is 1, and the paper gives 0.99.
    assert 0.95 < delta_hyperbolicity(distances=sphere) < 1
    # In the hyperbolic plane of curvature -1 delta is at most log 2, whatever the diameter.
    radius = 12 * randn(200, 1, seed=3).abs()
    space = torch.sinh(radius) * F.normalize(randn(200, 2), dim=-1)
    inner = space @ space.T - torch.cosh(radius) @ torch.cosh(radius).T
    D = torch.acosh((-inner).clamp(min=1)).fill_diagonal_(0)
    assert delta_hyperbolicity(distances=D) < 2 * math.log(2) / D.max().item() + 1e-3 < 0.05


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


BAD_SPACES = {
    "either points or distances": {},
    "not finite": {"points": randn(4, 3) / 0},
    r"shape \(4, 3\)": {"distances": randn(4, 3)},
    "diagonal of zeros": {"distances": torch.ones(3, 3)},
    "symmetric": {"distances": torch.ones(3, 3).triu(1)},
    "at least 0": {"distances": -torch.ones(3, 3)},
}
BAD_COUNTS = {
    "0 counts above 0": [0] * 50,
    "at least ten counts": [3] * 50,
    "whole numbers": [math.inf] * 50,
    "follow no power law": [1000] * 50 + [1001],
}


def test_no_number_is_made_up_where_there_is_nothing_to_measure():
    for message, arguments in BAD_SPACES.items():
        with pytest.raises(ValueError, match=message):
            delta_hyperbolicity(**arguments)
    for message, counts in BAD_COUNTS.items():
        with pytest.raises(ValueError, match=message):
            power_law_exponent(counts)


def test_the_p_value_is_uniform_under_the_law_and_rejects_another():
    laws = [samples_of_the_law(2.2, xmin=3, n=500, seed=seed) for seed in range(8)]
    p_values = [power_law_p_value(counts, draws=15) for counts in laws]
    assert 0.25 < sum(p_values) / 8 < 0.75
    assert max(p_values) - min(p_values) > 0.4
    uniform = torch.rand(2000, generator=generator(), dtype=torch.float64)
    exponential = (1 - 8 * uniform.log()).floor()
    assert power_law_p_value(exponential[exponential < 40], draws=20) <= 0.1


@pytest.mark.parametrize("alpha", [2.5, 19.0])  # A steep law has to end, too.
def test_samples_of_the_p_value_follow_the_law(alpha):
    law = geometry.PowerLaw(alpha, 0.0, 4.0, 0.0)
    drawn = geometry.sample_power_law(law, 50_000, np.random.default_rng(0))
    x = np.arange(4, 10**6, dtype=float)
    chances = x**-alpha / (x**-alpha).sum()
    for low, high, error in ((4, 5, 0.008), (5, 6, 0.008), (9, 10, 0.008), (401, 10**6, 0.001)):
        share = ((low <= drawn) & (drawn < high)).mean()
        assert share == pytest.approx(chances[low - 4 : high - 4].sum(), abs=error)
    assert drawn.min() == 4


def test_norms_are_put_beside_how_often_their_tokens_occur():
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    token_ids = [[0] + 99 * [1], 99 * [2] + [0]]
    rare, frequent = geometry.norm_by_frequency(embedding, token_ids, bins=2)
    assert (rare["norms"].tolist(), frequent["norms"].tolist()) == ([5.0], [1.0, 3.0])
    assert (rare["low"], rare["high"], frequent["high"]) == pytest.approx((1, 10, 100))
    with pytest.raises(ValueError, match="token 4, .* rows 0 to 3"):
        geometry.norm_by_frequency(embedding, [0, 4])


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8], [9, 7, 9, 3]]


def test_other_tokens_lose_the_meaning_of_a_prompt_and_nothing_else():
    shuffled = nulls.shuffled_prompts(PROMPTS, 10, generator())
    assert [len(prompt) for prompt in shuffled] == [5, 7, 4] and shuffled != PROMPTS
    assert sorted(itertools.chain(*shuffled)) == sorted(itertools.chain(*PROMPTS))
    reordered = nulls.reordered_prompts(PROMPTS, 10, generator())
    assert [sorted(prompt) for prompt in reordered] == [sorted(prompt) for prompt in PROMPTS]
    assert reordered != PROMPTS
    drawn = nulls.random_tokens(PROMPTS, 1000, generator())
    assert 100 < max(itertools.chain(*drawn)) < 1000
    for old, new in zip(PROMPTS, drawn):
        assert [old.index(token) for token in old] == [new.index(token) for token in new]


def test_other_vectors_keep_what_their_name_says():
    points = randn(400, 3) @ randn(3, 3, seed=1) + 5
    permuted = nulls.entries_permuted(points, None, generator(1))
    assert torch.equal(permuted.sort(dim=0).values, points.sort(dim=0).values)
    columns = nulls.entries_permuted(points[:, :1].expand(400, 4), None, generator()).T
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.2
    drawn = nulls.gaussian_like(torch.empty(200_000, 3), nulls.moments(points), generator(2))
    assert torch.allclose(drawn.double().mean(dim=0), points.mean(dim=0), atol=0.05)
    expected = torch.cov(points.T)
    assert torch.allclose(torch.cov(drawn.double().T), expected, atol=0.05 * expected.max())
    drawn = nulls.gaussian_of_same_norms(points, None, generator(1))
    assert torch.allclose(drawn.norm(dim=1), points.norm(dim=1))
    assert torch.cosine_similarity(drawn, points).abs().median() < 0.9


def test_a_hierarchy_is_a_tree_where_dimensions_are_many():
    """There steps are orthogonal, so that squared distances count the steps."""
    vectors = nulls.hierarchy(torch.empty(15, 20_000), None, generator()).double()
    steps = torch.cdist(vectors, vectors).square() / 20_000
    assert (steps - steps.round()).abs().max() < 0.1
    assert steps.round().max() == 6  # from leaf to leaf over the root of a binary tree of 15
    assert delta_hyperbolicity(distances=steps.round()) == 0


def test_a_cell_can_not_break_its_table():
    rows = [{"": "a|b", "x": 1}, {"": "two\nlines", "y": 0.5}]
    lines = ["|  | x | y |", "| --- | ---: | ---: |", "| a\\|b | 1 |  |", "| two lines |  | 0.5 |"]
    assert tables.markdown(rows) == "\n".join(lines)


def test_a_section_is_replaced_where_it_stands_and_others_stay_as_they_are(tmp_path):
    path = tmp_path / "RESULTS.md"
    text = (
        "# Results\n\nHead.\n\n## One\n\nold\n\n### Part\n\n## One more\n\nkept\n\n\n## Last\n\nl\n"
    )
    path.write_text(text)
    tables.write_section(path, "One", "new\n")
    assert path.read_text() == text.replace("old\n\n### Part", "new")
    tables.write_section(path, "Last", "L")
    tables.write_section(path, "Added", "a")
    assert path.read_text().endswith("## Last\n\nL\n\n## Added\n\na\n")
    assert [path] == list(tmp_path.iterdir())


# --- the authors' layers, read off anew, token by token -------------------------------------------


def length_of(y):
    return math.sqrt(sum(value * value for value in y.tolist()))


def hyplora_by_hand(x, A, B, k):
    K = math.log1p(math.exp(k)) + 1e-6
    r = min(length_of(x) / math.sqrt(len(x)) / math.sqrt(K), 12.0)
    y = B @ (A @ (x / length_of(x))) * math.sqrt(K) * math.sinh(r)
    theta = math.sqrt(length_of(y) ** 2 + 1 / K) / math.sqrt(K)
    near = theta < 1.01
    distance = math.sqrt(2 * max(theta - 1, 1e-6)) if near else math.acosh(theta)
    return math.sqrt(K) * distance * y / max(length_of(y), 1e-7)


def simplified_by_hand(x, A, B, k):
    y = B @ (A @ (2 * x / (1 + k * length_of(x) ** 2)))
    return y / (1 + math.sqrt(abs(k)) * math.sqrt(length_of(y) ** 2 + k))


@pytest.mark.parametrize("k", [0.5, 1.0])
@pytest.mark.parametrize("size", [1e-5, 0.1, 3.0])
def test_the_authors_layers_are_what_one_reads_off_their_code(size, k):
    x = randn(6, 20) * torch.tensor([0.1, 0.5, 1, 2, 10, 100])[:, None]
    A = randn(3, 20, seed=1) / 4
    B = size * randn(7, 3, seed=2)
    for update, by_hand in (
        (authors.authors_update, hyplora_by_hand),
        (authors.simplified_update, simplified_by_hand),
    ):
        want = torch.stack([by_hand(token, A, B, k) for token in x])
        error = (update(x, A, B, k) - want).norm(dim=1)
        assert (error <= 1e-6 * want.norm(dim=1)).all()


def test_the_dead_zone_ends_where_the_length_begins_to_grow():
    edge = authors.dead_zone(1.0)
    assert authors.dead_zone(0.5) == 0
    x = torch.ones(1, 16)
    direction = torch.eye(16)[:, :1]
    K = authors.effective_curvature(1.0)
    unit = K.sqrt() * torch.sinh(1 / K.sqrt()) / 4  # |y| for this token when B has length 1

    def length(y):
        return authors.authors_update(x, x / 16, direction * (y / unit), 1.0).norm().item()

    assert length(0.01) == pytest.approx(length(edge - 1e-3), rel=1e-4)
    assert length(edge + 1e-3) > 10 * length(edge - 1e-3)


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


# --- a model's embeddings -------------------------------------------------------------------------

WORDS = "what is the sum of two and three apples or pears how many are left".split()


@pytest.fixture
def checkpoint(tmp_path):
    """A small Llama as the hubs distribute it, with a tokenizer of whole words."""
    folder = tmp_path / "checkpoint"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)  # The length of the prompts must not depend on it.
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """JSON lines, as half of the data sets are distributed."""
    lines = []
    for seed in range(40):
        chosen = (len(WORDS) * torch.rand(9, generator=generator(seed)) ** 3).long()
        lines.append(json.dumps({"instruction": " ".join(WORDS[i] for i in chosen)}))
    path = tmp_path / "sums.json"
    path.write_text("\n".join(lines))
    return path


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["embeddings", *map(str, arguments)])
    embeddings.main()


def refused(call, *arguments):
    """The one line that a user reads."""
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedding_of_whole_sharded_and_4_bit_checkpoints_is_the_models(checkpoint, tmp_path):
    expected = tensors_of(checkpoint)["model.embed_tokens.weight"]
    assert torch.equal(embeddings.read_embedding(checkpoint), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(embeddings.read_embedding(tmp_path / "sharded"), expected)
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes accelerate")
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=four_bit, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "four_bit")
    assert any("quant_state" in name for name in tensors_of(tmp_path / "four_bit"))
    assert torch.equal(embeddings.read_embedding(tmp_path / "four_bit"), expected)


def test_the_packed_numbers_of_mlx_are_not_taken_for_vectors(checkpoint):
    tensors = tensors_of(checkpoint)
    for name in [name for name in tensors if tensors[name].ndim == 2]:
        rows = len(tensors[name])
        tensors[name] = torch.randint(2**31, (rows, 8)).to(torch.uint32)
        for part in ("scales", "biases"):
            tensors[name.replace("weight", part)] = torch.ones(rows, 2)
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", {"format": "mlx"})
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("quantization", "quantization_config"):  # Not every file has the second.
        config[key] = {"group_size": 32, "bits": 4}
        (checkpoint / "config.json").write_text(json.dumps(config))
        assert "transformers can't load" in refused(embeddings.read_embedding, checkpoint)


def test_whole_numbers_are_not_measured_without_their_scales(checkpoint):
    tensors = tensors_of(checkpoint)
    vectors = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = (1000 * vectors).to(torch.int8)
    tensors["model.embed_tokens.weight_scale"] = torch.full((16,), 0.001)
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert "is quantized" in refused(embeddings.read_embedding, checkpoint)


def test_an_adapters_embedding_is_not_taken_for_the_models(checkpoint, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    assert "holds an adapter" in refused(embeddings.read_embedding, tmp_path / "adapter")


def test_no_random_embedding_is_measured_where_a_file_has_none(checkpoint):
    tensors = tensors_of(checkpoint)
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert "no tensor for embed_tokens.weight" in refused(embeddings.read_embedding, checkpoint)
    shutil.rmtree(checkpoint)
    assert "nothing is downloaded" in refused(embeddings.read_embedding, checkpoint)


def test_a_model_without_its_tokenizer_or_with_anothers_is_refused(checkpoint, data):
    texts = {"sums": embeddings.read_instructions(data, None)}
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(3)
    model.save_pretrained(checkpoint)
    assert "rows 0 to 2" in refused(embeddings.read_model, checkpoint, texts)
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    assert "can't load" in refused(embeddings.read_model, checkpoint, texts)


def test_json_lines_are_records_and_a_text_without_them_is_refused(data, tmp_path):
    instructions = embeddings.read_instructions(data, 3)
    assert len(instructions) == 3 and set(" ".join(instructions).split()) <= set(WORDS)
    path = tmp_path / "other.json"
    for text in ("What is two and two?", '[{"instruction": "a"}, {}]'):
        path.write_text(text)
        assert "other.json" in refused(embeddings.read_instructions, path, None)


def test_delta_of_a_prompt_takes_its_tokens_in_order_and_the_first_as_base():
    embedding = randn(9, 3).float()
    prompt = [4, 2, 7, 2, 1, 8]
    D = torch.cdist(embedding, embedding)[prompt][:, prompt].fill_diagonal_(0)
    found = embeddings.deltas_of(embedding, [prompt, [8, 4, 2, 7, 2, 1]])
    assert found[0] == pytest.approx(delta_written_out(D.tolist()), rel=1e-5)
    assert found[1] != pytest.approx(found[0], rel=1e-2)


def test_each_null_is_drawn_anew_for_each_seed_and_prompt():
    embedding = randn(30, 6).float()
    deltas = embeddings.prompt_deltas(embedding, [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]], seeds=3)
    assert deltas.pop(embeddings.MODEL).shape == (1, 2)
    for name, drawn in deltas.items():
        assert drawn.shape == (3, 2)
        assert len(set(drawn[:, 1])) == 3, name
    # Two vectors are a tree, however they are drawn.
    for drawn in embeddings.prompt_deltas(embedding, [[0, 1, 0, 1, 0]], seeds=2).values():
        assert abs(drawn).max() < 1e-6


def test_the_program_prints_writes_and_draws(checkpoint, data, tmp_path, monkeypatch, capsys):
    results = tmp_path / "RESULTS.md"
    results.write_text(
        "# Results\n\n## Embeddings: delta where it is known\n\nold\n\n## Kept\n\nkept\n"
    )
    monkeypatch.setattr(embeddings, "DIMENSIONS", (2, 8))
    monkeypatch.setattr(embeddings, "SIZES", {"20 points": (20, 2)})
    arguments = [checkpoint, "--data", data, "--seeds", 2, "--prompts", 12]
    picture = tmp_path / "delta.png"
    run(monkeypatch, *arguments, "--results", results, "--picture", picture)
    printed = capsys.readouterr().out
    written = results.read_text()
    assert "old" not in written and "kept" in written
    assert "| checkpoint, sums | 108 |" in printed  # 12 prompts of 9 words
    for line in printed.splitlines():
        assert line in written and "nan" not in line
        assert str(tmp_path) not in line
    assert picture.stat().st_size > 10_000
