"""LoRA, DoRA, HypLoRA and the authors' two layers on a language model, each at its own best rate.

Training: GSM8K and MAWPS, without the questions of the test files. Each method has a learning rate
of its own, chosen by validation loss on seeds that are not reported; then seeds are compared in
pairs: one seed is one start of A and one order of batches, whatever the method. HypLoRA runs along
a dial: rho is the radius that calibration gives to a typical token. Its control at each rho is LoRA
with alpha times the mean phi = |update| / |BAx| of that HypLoRA. The runs are made, and their
results are in benchmarks/smollm2.json.

    python -m benchmarks.smollm2                     # writes RESULTS.md and the picture from them
"""

import argparse
import json
from pathlib import Path

from benchmarks import smollm2_tables as tables
from benchmarks.report import write_section

RESULTS = Path(__file__).parent / "smollm2.json"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text())
    page = tables.page(results)
    print(f"\n{page}")
    if not args.dry_run:
        write_section("A language model: SmolLM2-135M-Instruct", page)
        tables.picture(results, tables.PICTURE)


if __name__ == "__main__":
    main()
