"""See LoRA and HypLoRA learn, in 20 seconds on one slow CPU core. Nothing is downloaded.

A tiny GPT learns two-digit addition from scratch and is frozen. Adapters then teach it subtraction,
once as LoRA and once as HypLoRA, from the same start and on the same batches. What is printed is
how often each is right on sums that no phase has seen, and what HypLoRA did to the update.

    python train_minimal.py                                 # the sanity check
    python train_minimal.py --seeds 5                       # mean and spread over five seeds
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
# A sum is a row of nine tokens, one for each character. The answer has three digits, the lowest
# first, as one writes them when adding on paper, where the carry moves to the left:
#
#     12 + 34 = 46    is written as    1 2  + 3 4  = 6 4 0
#     and its tokens are               1 2 10 3 4 12 6 4 0
#
# The model reads all but the last token and predicts, at each, the next one. The loss counts its
# predictions of the answer's three digits.

VOCABULARY = "0123456789+-="  # A character's token is its place in this string.
QUESTION = 6  # tokens
ANSWER = 3  # tokens


def digits_of(numbers, count):
    """(N,) -> (N, count), the lowest digit first."""
    return numbers[:, None] // 10 ** torch.arange(count) % 10


def make_sums(sign, held_out):
    """All a + b, or all a - b that are not below 0, of numbers below 100: (N, QUESTION + ANSWER).

    A fixed tenth of the pairs is held out for testing; if (a, b) is, so is (b, a)."""
    draw = torch.rand(100, 100, generator=torch.Generator().manual_seed(0))
    chosen = (draw.triu() + draw.triu(1).T < 0.1) == held_out
    if sign == "-":
        chosen = chosen.tril()  # where a >= b
    a, b = chosen.nonzero().T
    result = {"+": a + b, "-": a - b}[sign]
    operator = torch.full((len(a), 1), VOCABULARY.index(sign))
    equals = torch.full((len(a), 1), VOCABULARY.index("="))
    question = [digits_of(a, 2).flip(1), operator, digits_of(b, 2).flip(1), equals]
    return torch.cat([*question, digits_of(result, ANSWER)], dim=1)


def characters(tokens):
    """The tokens as text: 12+34= for a question."""
    return "".join(VOCABULARY[token] for token in tokens.tolist())


# --- The model: a GPT with one block ------------------------------------------------------------

WIDTH = 64
HIDDEN = 170
HEADS = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.o_proj.weight)  # The block starts as the identity, which trains faster.

    def forward(self, x):
        def split(y):  # (batch, T, WIDTH) -> (batch, HEADS, T, WIDTH / HEADS)
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        q, k, v = [split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), WIDTH)
        self.position = nn.Embedding(QUESTION + ANSWER, WIDTH)
        self.norm_1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention()
        self.norm_2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = MLP()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.lm_head = nn.Linear(WIDTH, len(VOCABULARY), bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens):
        """(batch, T) -> logits (batch, T, len(VOCABULARY))."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        x = x + self.attention(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def answer(self, tokens):
        """The most likely answers, digit by digit: (batch, QUESTION) -> (batch, ANSWER)."""
        for _ in range(ANSWER):
            digit = self(tokens)[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, digit], dim=1)
        return tokens[:, -ANSWER:]


# --- Training and scoring -----------------------------------------------------------------------


def train(model, *, parameters, sums, steps, batch_size, lr, seed):
    """AdamW with a warm-up of 20 steps and a linear decay. Returns the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    is_terminal = sys.stdout.isatty()
    lines = 50 if is_terminal else 2
    reported = {steps * line // lines for line in range(1, lines + 1)}
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 20, (steps + 1 - step) / steps)
        chosen = torch.randint(len(sums), (batch_size,), generator=generator)
        batch = sums[chosen.to(sums.device)]
        logits = model(batch[:, :-1])[:, -ANSWER:]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, -ANSWER:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step in reported:
            end = "\r" if is_terminal and step < steps else "\n"  # "\r" lets the next overwrite it.
            print(f"  step {step:>3} of {steps}, loss {loss.item():.4f}", end=end, flush=True)
    return time.perf_counter() - start


def answers_to(model, sums):
    """The model's answers as one reads them."""
    return [characters(answer.flip(0)) for answer in model.answer(sums[:, :QUESTION])]


def percent_right(model, sums):
    """How many of the answers are right in all three digits."""
    right = (model.answer(sums[:, :QUESTION]) == sums[:, QUESTION:]).all(dim=1)
    return 100 * right.float().mean().item()


# --- Reporting ----------------------------------------------------------------------------------


def markdown(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def table(rows):
    """Rows of the same adapter are seeds: they become one line, with mean ± deviation."""
    lines = []
    for name in dict.fromkeys(row["adapter"] for row in rows):
        seeds = [row for row in rows if row["adapter"] == name]
        cells = [name, str(seeds[0]["parameters"])]
        for column in list(rows[0])[2:]:
            values = [row[column] for row in seeds]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(cells)
    return markdown(list(rows[0]), lines)


def what_it_did(name, measured):
    """HypLoRA's effect in words, from what hyplora_statistics returned for each seed."""
    layers = [layer for seed in measured for layer in seed.values()]
    phi = statistics.mean(layer["phi"] for layer in layers)
    spread = statistics.mean(layer["phi_spread"] for layer in layers)
    return f"""{name}: updates are {phi:.2f} times as long as LoRA's, the mean over all tokens.
From token to token of a layer, this varies by ± {spread:.2f}. Without such a spread, each layer
would be LoRA with another alpha."""


# --- Main ---------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="With --checkpoint or --data, see python -m scaling.finetune --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--curvature", type=float, nargs="+", default=[0.5], help="one HypLoRA for each")
    add("--rank", type=int, default=16, help="of the adapters")
    add("--alpha", type=float, default=64.0, help="the updates are scaled by alpha / rank")
    add("--lr", type=float, default=6e-3, help="learning rate before warm-up and decay")
    add("--steps", type=int, default=450, help="training steps of an adapter")
    add("--base-steps", type=int, default=350, help="training steps of the base")
    add("--seeds", type=int, default=1, help="number of seeds; the table shows mean ± deviation")
    add("--device", default="cpu", help="a model this small is fastest on one CPU core")
    add("--out", default="runs", help="folder for the adapters")
    args = parser.parse_args(argv)
    counts = (args.seeds, args.steps, args.base_steps, args.rank)
    if min(counts) < 1 or not all(x > 0 for x in (args.alpha, args.lr, *args.curvature)):
        parser.error("--seeds, --steps, --base-steps, --rank must be >= 1, the other numbers > 0")
    return args


def main(argv=None):
    """Run all of it. Returns the rows of the table."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--checkpoint", "--data") for word in argv):
        from scaling import finetune

        return finetune.main(argv)
    args = parse_arguments(argv)
    os.makedirs(args.out, exist_ok=True)
    torch.set_num_threads(1)  # Two would only wait for each other over tensors this small.
    additions = make_sums("+", held_out=False).to(args.device)
    subtractions = make_sums("-", held_out=False).to(args.device)
    new_additions = make_sums("+", held_out=True).to(args.device)
    new_subtractions = make_sums("-", held_out=True).to(args.device)
    examples = new_subtractions[100:400:100]

    print("The base, a small GPT, learns a+b from scratch, as there must be a model to adapt.")
    torch.manual_seed(0)
    model = GPT().to(args.device)
    how = {"steps": args.base_steps, "batch_size": 128, "lr": 1e-2, "seed": 0}
    train(model, parameters=model.parameters(), sums=additions, **how)
    rows = [{"adapter": "none (the base)", "parameters": 0, "seconds": 0}]
    rows[0]["% a-b"] = percent_right(model, new_subtractions)
    rows[0]["% a+b, adapter off"] = percent_right(model, new_additions)
    questions = [characters(row[:QUESTION]) for row in examples]
    answers = {"sum": questions, "the base": answers_to(model, examples)}
    conclusions = []

    for curvature in dict.fromkeys([math.inf, *args.curvature]):
        if curvature == math.inf:
            name, why = "LoRA", "A and B beside the frozen base learn a-b, to compare HypLoRA with"
        else:
            name, why = f"HypLoRA {curvature:g}", "the same, but with BAx taken in hyperbolic space"
        measured = []
        for seed in range(args.seeds):
            print(f"{name}, seed {seed}: {why}.")
            torch.manual_seed(seed)  # LoRA and HypLoRA start alike, and get the same batches.
            options = {"rank": args.rank, "alpha": args.alpha, "curvature": curvature}
            hyplora.inject_hyplora(model, "all-linear", **options)
            hyplora.calibrate_curvature(model, subtractions[::20, :-1])
            groups = hyplora.hyplora_parameters(model)
            how = {"steps": args.steps, "batch_size": 96, "lr": args.lr, "seed": seed}
            seconds = train(model, parameters=groups, sums=subtractions, **how)
            number = sum(p.numel() for group in groups for p in group["params"])
            rows.append({"adapter": name, "parameters": number, "seconds": seconds})
            rows[-1]["% a-b"] = percent_right(model, new_subtractions)
            with hyplora.disable_hyplora(model):
                rows[-1]["% a+b, adapter off"] = percent_right(model, new_additions)
            answers[name] = answers_to(model, examples)
            measured.append(hyplora.hyplora_statistics(model, new_subtractions[:, :-1]))
            path = os.path.join(args.out, f"{name.replace(' ', '-')}-{seed}.pt")
            hyplora.save_hyplora(model, path)
            hyplora.remove_hyplora(model)
        if curvature < math.inf:
            conclusions.append(what_it_did(name, measured))

    print("\nWhat each model answers to three sums that no phase has seen, in three digits:\n")
    print(markdown(list(answers), zip(*answers.values())))
    print(f"\nHow often they are right, over all such sums:\n\n{table(rows)}\n")
    hyplora.load_hyplora(model, path)
    print(f"Read back from {path}: {percent_right(model, new_subtractions):.1f} % a-b.\n")
    print(*conclusions, sep="\n")
    return rows


if __name__ == "__main__":
    main()
