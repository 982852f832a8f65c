"""Does K from measured norms (calibrate_curvature) beat the paper's 0.5 and 1.0 in units of the width? On the toy.

python -m benchmarks.calibration              # some minutes; prints the README's table
"""

import argparse
import contextlib
import io
import statistics

import torch

import train_minimal as toy
from hyplora import calibrate_curvature, hyplora_parameters, inject_hyplora, remove_hyplora


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="few, so that the methods are still apart")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cpu")
    args = toy.parse_arguments([])
    toy.os.makedirs(args.out, exist_ok=True)
    base = toy.sums(args, device)[0]
    print(
        f"subtraction, {options.steps} steps of {args.batch_size}, rank {args.rank}, learning rate {args.lr}, ", end=""
    )
    print(f"seeds 0 to {options.seeds - 1}, CPU, torch {torch.__version__}: mean ± standard deviation\n")
    print("| K at the start | loss | % subtract | K / width at the start, over layers |\n| --- | ---: | ---: | ---: |")
    for curvature in (0.5, 1.0):
        for calibrated in (False, True):
            losses, accuracies = [], []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                names = inject_hyplora(base, "all-linear", rank=args.rank, alpha=args.alpha, curvature=curvature)
                batch = toy.sum_batches(args.task, args.batch_size, seed)
                if calibrated:
                    calibrate_curvature(base, batch(0)[0])
                layers = [base.get_submodule(name) for name in names]
                K = [layer.K.item() / layer.in_features for layer in layers]
                with contextlib.redirect_stdout(io.StringIO()):
                    toy.train(base, hyplora_parameters(base), batch, options.steps, args.lr, seed, "")
                accuracy, loss = toy.score_sums(base, args.task, device)
                losses.append(loss), accuracies.append(accuracy)
                remove_hyplora(base)
            name = f"{curvature} {'of the measured mean squared norm' if calibrated else 'of the width'}"
            cells = [
                f"{statistics.mean(v):{f}} ± {statistics.stdev(v):{f}}"
                for v, f in ((losses, ".3f"), (accuracies, ".1f"))
            ]
            print(f"| {name} | {cells[0]} | {cells[1]} | {min(K):.2g} to {max(K):.2g} |", flush=True)


if __name__ == "__main__":
    main()
