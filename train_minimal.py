"""See HypLoRA learn, in under a minute, on one CPU core, with nothing to download.

A tiny GPT learns two-digit addition from scratch and is frozen. Adapters then teach it subtraction,
once as LoRA and once as HypLoRA, from the same start and on the same batches. The table that is
printed at the end has both, scored on pairs of numbers that no phase has seen.

    python train_minimal.py                                 # the sanity check
    python train_minimal.py --seeds 3                       # mean and spread over three seeds
    python train_minimal.py --checkpoint DIR --data FILE    # a real model: see scaling/README.md
"""

import argparse
import math
import os
import statistics
import sys
import time
import warnings

with warnings.catch_warnings():  # The newest torch warns where there is no NumPy; none is needed.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

import hyplora

# --- The sums -----------------------------------------------------------------------------------
#
# A sum is a row of tokens, one for each character. The answer has three digits, the lowest first,
# as one writes them when adding on paper: 12 + 34 = 46 becomes the characters 1 2 + 3 4 = 6 4 0 and
# the tokens 1 2 10 3 4 12 6 4 0. The model reads all but the last token and predicts what comes
# next; the loss counts its predictions of the answer's three digits.

VOCABULARY = "0123456789+-="
ANSWER = 3  # digits
TASKS = {"add": "a+b=", "subtract": "a-b=", "two-step": "a+b-c="}  # No result is below 0.


def pairs_of_numbers(held_out):
    """All (a, b) below 100 that are held out for testing (a tenth), or all others: (N, 2).

    (a, b) and (b, a) are on the same side, and the sides are the same in every run.
    """
    draw = torch.rand(100, 100, generator=torch.Generator().manual_seed(0))
    draw = draw.triu() + draw.triu(1).T
    return ((draw < 0.1) == held_out).nonzero()


def digits_of(numbers, count):
    """(N,) -> (N, count), the lowest digit first."""
    return numbers[:, None] // 10 ** torch.arange(count) % 10


def make_sums(task, pairs, generator):
    """The sums of a task over pairs of numbers, (N, 2) -> (N, T) tokens."""
    a, b = pairs.T
    if task == "subtract":
        a, b = torch.maximum(a, b), torch.minimum(a, b)
    most = (a + b).clamp(max=99)
    c = (torch.rand(len(pairs), generator=generator) * (most + 1)).long()
    results = {"add": a + b, "subtract": a - b, "two-step": a + b - c}
    numbers = {"a": a, "b": b, "c": c}
    columns = []
    for character in TASKS[task]:
        if character in numbers:
            columns.append(digits_of(numbers[character], 2).flip(1))
        else:
            columns.append(torch.full((len(pairs), 1), VOCABULARY.index(character)))
    columns.append(digits_of(results[task], ANSWER))
    return torch.cat(columns, dim=1)


def show(row):
    """Tokens as one reads them: 12+34=046."""
    return "".join(VOCABULARY[token] for token in row[:-ANSWER] + row[-ANSWER:][::-1])


# --- The model: a GPT as they are built today ---------------------------------------------------


def rotate(x, positions):
    """Rotary embedding: turn pairs of channels of (batch, heads, T, size) by angles of position."""
    exponent = torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1]
    angle = positions[:, None] * 10000.0**-exponent
    left, right = x.chunk(2, dim=-1)
    turned_left = left * angle.cos() - right * angle.sin()
    turned_right = right * angle.cos() + left * angle.sin()
    return torch.cat([turned_left, turned_right], dim=-1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)

        def split(y):  # (batch, T, width) -> (batch, heads, T, size)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), positions)
        k = rotate(split(self.k_proj(x)), positions)
        y = F.scaled_dot_product_attention(q, k, split(self.v_proj(x)), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 8 * width // 3
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm_1 = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, len(VOCABULARY), bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.blocks:  # Each block starts as the identity, which trains faster.
            nn.init.zeros_(block.attention.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)

    def forward(self, tokens):
        """(batch, T) -> logits (batch, T, vocabulary)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def answer(self, tokens):
        """The most likely answers, digit by digit: (batch, T) -> (batch, T + ANSWER)."""
        for _ in range(ANSWER):
            digit = self(tokens)[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, digit], dim=1)
        return tokens


# --- Training -----------------------------------------------------------------------------------


def loss_of(model, sums):
    """The mean cross entropy of the answers' digits."""
    logits = model(sums[:, :-1])[:, -ANSWER:]
    return F.cross_entropy(logits.flatten(0, 1), sums[:, -ANSWER:].flatten())


def train(model, parameters, task, steps, batch_size, lr, seed, label):
    """AdamW with a short warm-up and a linear decay to 0. Returns the seconds that it took."""
    pairs = pairs_of_numbers(held_out=False)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, (steps - step) / max(1, steps))
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pairs), (batch_size,), generator=generator)
        loss = loss_of(model, make_sums(task, pairs[chosen], generator).to(trained[0].device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"{label:<28} step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    return time.perf_counter() - start


# --- Scoring ------------------------------------------------------------------------------------


def some_sums(model, task, held_out=True):
    """The sums that no phase trains on, or all others: (N, T) on the model's device."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    return make_sums(task, pairs_of_numbers(held_out), generator).to(device)


def percent_right(model, task):
    """Exact answers to the sums that no phase has seen, in percent."""
    sums = some_sums(model, task)
    right = (model.answer(sums[:, :-ANSWER]) == sums).all(dim=1)
    return 100 * right.float().mean().item()


def print_what_it_did(model, task):
    """For each kind of layer, |update| / |BAx|. Without a spread, it would be LoRA's alpha."""
    kinds = {}
    for name, numbers in hyplora.hyplora_statistics(model, some_sums(model, task)[:, :-1]).items():
        kinds.setdefault(name.rpartition(".")[2], []).append(numbers)
    print("|update| / |BAx| over the tokens of the test, mean and spread:")
    for kind, layers in kinds.items():
        phi = statistics.mean(numbers["phi"] for numbers in layers)
        spread = statistics.mean(numbers["phi_spread"] for numbers in layers)
        print(f"  {kind:<10} {phi:.2f} ± {spread:.2f}")


def table(rows):
    """Rows of the same name are seeds: they become one line, with mean ± standard deviation."""
    columns = [column for column in rows[0] if column != "adapter"]
    lines = [f"| adapter | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name in dict.fromkeys(row["adapter"] for row in rows):
        cells = [name]
        for column in columns:
            values = [row[column] for row in rows if row["adapter"] == name]
            form = ".0f" if column == "parameters" else ".1f"
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Main ---------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="Teach a tiny frozen GPT a new kind of sum, with LoRA and with HypLoRA.",
        epilog="For --checkpoint and --data, see python -m scaling.finetune --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=["subtract", "two-step"], default="subtract", help="a-b, or a+b-c")
    add("--curvature", type=float, nargs="+", default=[0.5], help="one HypLoRA for each")
    add("--no-calibrate", action="store_true", help="do not fit K to the model")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--alpha", type=float, default=16.0, help="the updates are scaled by alpha / rank")
    add("--lr", type=float, default=6e-3, help="peak learning rate of the adapters")
    add("--steps", type=int, default=650, help="training steps of an adapter")
    add("--base-steps", type=int, default=700, help="training steps of the base")
    add("--batch-size", type=int, default=64, help="sums in a step of an adapter")
    add("--seeds", type=int, default=1, help="number of seeds; the table shows mean ± deviation")
    add("--width", type=int, default=64, help="of the GPT")
    add("--layers", type=int, default=2, help="of the GPT")
    add("--device", default="cpu", help="a model this small is fastest on one CPU core")
    add("--out", default="runs", help="folder for the adapters")
    return parser.parse_args(argv)


def main(argv=None):
    """Run all of it. Returns the rows of the table."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--checkpoint", "--data") for word in argv):
        from scaling import finetune

        return finetune.main(argv)
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # Two threads would only wait for each other over tensors this small.
    os.makedirs(args.out, exist_ok=True)

    torch.manual_seed(0)
    model = GPT(args.width, args.layers, heads=4).to(args.device)
    train(model, model.parameters(), "add", args.base_steps, 128, 5e-3, 0, "the base learns a+b")
    new, old = f"% {args.task}", "% add, adapter off"
    rows = [{"adapter": "none (the base)", new: percent_right(model, args.task)}]
    rows[0].update({old: percent_right(model, "add"), "parameters": 0, "seconds": 0})

    for curvature in [math.inf, *args.curvature]:
        name = "LoRA" if curvature == math.inf else f"HypLoRA {curvature:g}"
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            options = dict(rank=args.rank, alpha=args.alpha, curvature=curvature)
            hyplora.inject_hyplora(model, "all-linear", **options)
            if not args.no_calibrate:
                seen = some_sums(model, args.task, held_out=False)
                hyplora.calibrate_curvature(model, seen[:256, :-1])
            groups = hyplora.hyplora_parameters(model)
            how = (args.task, args.steps, args.batch_size, args.lr, seed, f"{name}, seed {seed}")
            row = {"adapter": name, "seconds": train(model, groups, *how)}
            row[new] = percent_right(model, args.task)
            with hyplora.disable_hyplora(model):
                row[old] = percent_right(model, "add")
            row["parameters"] = sum(p.numel() for group in groups for p in group["params"])
            rows.append(row)
            if curvature < math.inf:
                print_what_it_did(model, args.task)
            path = os.path.join(args.out, f"{args.task}-{name.replace(' ', '-')}-{seed}.pt")
            hyplora.save_hyplora(model, path)
            hyplora.remove_hyplora(model)

    print(f"\n{table(rows)}\n")
    hyplora.load_hyplora(model, path)
    answers = model.answer(some_sums(model, args.task)[::200, :-ANSWER]).tolist()
    print(f"{path}, loaded into the frozen base, answers {', '.join(map(show, answers))}")
    return rows


if __name__ == "__main__":
    main()
