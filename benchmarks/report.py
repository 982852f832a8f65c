"""What the benchmarks share: the name of a machine, ratios, reasons, sections of RESULTS.md."""

import datetime
import platform
import statistics
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine(device, threads=None):
    """The processor or the GPU, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    return f"{name} CPU, {threads or torch.get_num_threads()} threads"


def stamp(command):
    """The line under a title that says when, with what, and by which command."""
    return f"{datetime.date.today()}, torch {torch.__version__}. `{command}`"


def ratio(seconds, baseline):
    """The median of the rounds' ratios, with their quartiles."""
    ratios = sorted(a / b for a, b in zip(seconds, baseline))
    low = ratios[len(ratios) // 4]
    high = ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def reason(error):
    """Why there is no figure, in the words of a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = f"{type(error).__name__}: {error}".replace("|", "/")
    return " ".join(text.split())[:120]


def write_beside(path, text):
    """Write the text beside path and rename it, so that path has the old text or the new, whole."""
    part = Path(path).with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def write_section(title, text, path=RESULTS):
    """Replace the section "## title" of the file, or append it."""
    old = (
        path.read_text()
        if path.exists()
        else "# Results\n\nWritten by the scripts beside this file.\n"
    )
    first, *sections = ("\n" + old).split("\n## ")
    kept = [section for section in sections if section.split("\n", 1)[0] != title]
    parts = [first.strip()]
    for section in [*kept, f"{title}\n\n{text}"]:
        parts.append(f"## {section.strip()}")
    write_beside(path, "\n\n".join(parts) + "\n")
