"""What the READMEs say that can be run."""

import re
from pathlib import Path

import torch

import hyplora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    update, use = SNIPPETS
    exec(use, {})
    names = {}
    exec(update, names)
    x, A, B = torch.randn(5, 4), torch.randn(2, 4), torch.randn(3, 2)
    expected = hyplora.hyplora_update(x, A, B, 0.7)
    torch.testing.assert_close(names["hyplora_update"](x, A, B, 0.7), expected)


def test_the_map_of_the_repository_is_true():
    block = README.split("## Try it")[0]
    rows = re.findall(r"^    ([a-z_]+(?:/|\.\w+) .*)", block, re.MULTILINE)
    lines = [row.split() for row in rows]
    ignored = {"README.md", "LICENSE", "ruff.toml", "runs"}
    present = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert {words[0].rstrip("/") for words in lines} == present - ignored
    for name, count, unit, *_ in lines:
        if unit == "lines":
            assert len((ROOT / name).read_text().splitlines()) == int(count), name


def test_links_lead_somewhere():
    for page in ROOT.glob("**/*.md"):
        if ".venv" not in page.parts:
            for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
                assert link.startswith("http") or (page.parent / link).exists(), (page, link)
