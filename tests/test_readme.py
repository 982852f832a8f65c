"""What the READMEs say that can be run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def first_import(snippet):
    return re.search(r"from (torch|transformers)", snippet)[1]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=first_import)
def test_the_snippets_run(snippet, tmp_path, monkeypatch):
    if "from transformers" in snippet:
        pytest.importorskip("transformers", reason="pip install transformers")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


def test_the_map_of_the_repository_is_true():
    block = README.split("## A map of the repository")[1].split("##")[0]
    named = {line.split()[0].rstrip("/") for line in block.splitlines() if line.startswith("    ")}
    ignored = {"README.md", "LICENSE", "ruff.toml", "runs"}
    present = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert named == present - ignored


def test_links_lead_somewhere():
    for page in ROOT.glob("**/*.md"):
        if ".venv" not in page.parts:
            for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
                assert link.startswith("http") or (page.parent / link).exists(), (page, link)
