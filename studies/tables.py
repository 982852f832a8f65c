"""Tables, intervals and stamps: what every study prints, in Markdown."""

import datetime
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
from scipy import stats


def markdown(rows):
    """Rows, each {column: cell} -> the text of a table. The first column is aligned to the left.

    A column stands where the first row that has it puts it; a row without it has an empty cell.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def grid(names, columns, cell):
    """The rows of a table whose cell in a row and a column is cell(name, column)."""
    return [{"": name} | {column: cell(name, column) for column in columns} for name in names]


def mean_and_spread(values, digits=3):
    """The mean of numbers and their standard deviation: how far they lie apart."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def mean_and_interval(values, digits=4):
    """The mean of independent numbers and its 95 % interval, as Student's law gives it."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def two_way_interval(differences, counts, level=0.95, draws=10000):
    """(mean, low, high) of a difference per token, by a bootstrap over seeds and over records.

    differences: (seeds, records), each summed over a record's tokens. counts: their numbers.
    """
    differences = np.asarray(differences, dtype=float)
    generator = np.random.default_rng(0)
    n_seeds, n_records = differences.shape
    seeds = generator.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=draws)
    records = generator.multinomial(n_records, [1 / n_records] * n_records, size=draws)
    means = (seeds @ differences * records).sum(axis=1) / (n_seeds * records @ counts)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return differences.sum() / (n_seeds * np.sum(counts)), low, high


def median_and_quartiles(values, digits=2):
    """The median of numbers, and between what the middle half of them lies."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine(device="cpu"):
    """The processor or the GPU, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def stamp(command, device="cpu", libraries=()):
    """When, where, with what and by which command: the line above what a study prints."""
    versions = [f"{library.__name__} {library.__version__}" for library in (torch, *libraries)]
    options = dict(shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = subprocess.run("git describe --always --dirty --exclude='*'", **options).stdout.strip()
    where = f"{datetime.date.today()}, {machine(device)}, commit {commit or 'unknown'}"
    return f"{where}, {', '.join(versions)}. `{command}`"


def report(title, body, path=None):
    """Print the section "## title"; replace it in the Markdown file at path, or append it."""
    print(f"\n## {title}\n\n{body}", flush=True)
    if path is None:
        return
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    old = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    before, after = (text[: old.start()], text[old.end() :]) if old else (text, "")
    text = f"{before.rstrip()}\n\n## {title}\n\n{body.strip()}\n\n{after}".rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
