"""Which answers are right, by the rules of the paper's code, and generation in batches to get them.

The rules are literal, also where a reader would judge otherwise; README.md says where.
"""

import math
import re

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from scaling.processes import Progress, rank_and_count

# -------------------------------------------------------------------------------------------------
# The rules

# The commonsense sets answer in one of these words.
WORD_SETS = (
    ("true", "false"),  # BoolQ
    ("solution1", "solution2"),  # PIQA
    ("answer1", "answer2", "answer3", "answer4", "answer5"),  # SIQA, ARC, OBQA
    ("ending1", "ending2", "ending3", "ending4"),  # HellaSwag
    ("option1", "option2"),  # WinoGrande
)
TOLERANCE = 0.001
# Letters, in the released code: the last match of the first of these patterns that matches at all.
RELEASED_LETTERS = (
    r"\\boxed\{\\text\{\(?([A-E])\)?\}\}",
    r"\\boxed\{\(?([A-E])\)?\}",
    r"\(?([A-E])\)",
    r"(?i:(?:correct )?answer is[:\s]+\(?([A-E])\)?)",
    r"is[:\s]+([A-E])\.?\s*$",
    r"[Oo]ption\s+\(?([A-E])\)?",
)
LETTER_RULES = ("first", "released")


def answer_kind(answer):
    """How an answer is compared: "number", "letter" or "word". Raises ValueError if it is none."""
    answer = answer.strip()
    if re.fullmatch("[A-E]", answer):
        return "letter"
    if word_set(answer):
        return "word"
    try:
        value = float(answer.replace(",", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"answer {answer[:40]!r} cannot be scored: it is neither a number, nor a letter A to "
            "E, nor a word of a commonsense set (true, solution1, answer1, ending1, option1, ...)"
        )
    return "number"


def word_set(answer):
    """The set of words that has this answer, or ()."""
    for words in WORD_SETS:
        if answer.strip().lower() in words:
            return words
    return ()


def extract(output, answer, letters="first"):
    """What an output is taken to answer, to be compared with `answer`: text, a number, or None.

    Numbers: the last one in the output. Words: the first of the set's words in the lower-cased
    output. Letters: "first" is the first of A to E anywhere in the output, the rule of
    LLM-Adapters, from which the paper's code comes; "released" is the rule of the released code.
    """
    kind = answer_kind(answer)
    if kind == "word":
        found = re.findall("|".join(word_set(answer)), output.lower())
        return found[0] if found else None
    if kind == "number":
        found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
        return float(found[-1]) if found else None
    if letters == "first":
        found = re.findall("[A-E]", output)
        return found[0] if found else None
    for pattern in RELEASED_LETTERS:
        found = re.findall(pattern, output.strip())
        if found:
            return found[-1]
    return None


def is_right(output, answer, letters="first"):
    """Whether the output answers the question, by the paper's rules; see extract().

    output: text. answer: text, or a number. Numbers may differ by 0.001. Raises ValueError if the
    answer cannot be scored.
    """
    answer = str(answer).strip()
    found = extract(output, answer, letters)
    if found is None:
        return False
    kind = answer_kind(answer)
    if kind == "number":
        return abs(found - float(answer.replace(",", ""))) <= TOLERANCE
    if kind == "word":
        return found == answer.lower()
    return found == answer


# -------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def greedy(model, ids, count, pad=None, stop=()):
    """The likeliest token at each step: (batch, T) -> (batch, at most T + count), int64.

    pad: (batch,), how many tokens of left padding each row begins with. It ends early once every
    row has a token of `stop`; what a row has behind that token means nothing.
    """
    cache = model.new_cache()
    stop = torch.tensor(stop, dtype=ids.dtype, device=ids.device)
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    new = ids
    for _ in range(count):
        new = model(new, cache, pad, last_only=True)[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
        done = done | torch.isin(new, stop)
        if done.all():
            break
    return ids


@torch.no_grad()
def beam_search(model, ids, count, pad=None, stop=(), beams=4):
    """The best continuation that beam search finds: (batch, T) -> (batch, at most T + count).

    A continuation's score is the mean log-probability of its new tokens (length penalty 1). A row
    ends when its best unfinished beam scores no better than its worst finished one and it has as
    many finished as beams (transformers' early_stopping=False). Rows are filled up with their last
    token of `stop`. pad, stop: as in greedy().
    """
    batch, prompt = ids.shape
    device = ids.device
    stop = torch.tensor(stop, dtype=ids.dtype, device=device)
    keep = max(2, 1 + len(stop)) * beams  # So that `beams` of them go on, whatever else ends.
    row = torch.arange(batch, device=device)[:, None]
    rank = torch.arange(keep, device=device)
    cache = model.new_cache()
    logits = model(ids, cache, pad, last_only=True)[:, -1]
    for block in cache:
        block.select(row.expand(-1, beams).flatten())
    logits = logits.repeat_interleave(beams, dim=0)
    pad = None if pad is None else pad.repeat_interleave(beams)
    # At the start all beams of a row are one and the same, so all but the first are ruled out.
    scores = torch.full((batch, beams), -1e9, device=device)
    scores[:, 0] = 0.0
    tokens = ids.new_zeros(batch, beams, 0)
    finished = ids.new_full((batch, beams, count), stop[0].item() if len(stop) else 0)
    finished_scores = torch.full((batch, beams), -math.inf, device=device)
    searching = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for length in range(1, count + 1):
        steps = logits.float().log_softmax(dim=-1).view(batch, beams, -1)
        totals = (scores[:, :, None] + steps).flatten(1)
        best, index = totals.topk(keep)
        parent = index // steps.shape[-1]
        token = index % steps.shape[-1]
        candidates = torch.cat([tokens[row, parent], token[:, :, None]], dim=-1)
        ends = torch.isin(token, stop) | (length == count)
        # Those among the best `beams` that end are finished; they compete with the finished before.
        closing = ends & (rank < beams) & searching
        closing_scores = torch.where(closing, best / length, -math.inf)
        filled = finished[:, :1].expand(-1, keep, -1).clone()
        filled[:, :, :length] = candidates
        filled[:, :, length:] = stop[0] if len(stop) else 0
        all_scores = torch.cat([finished_scores, closing_scores], dim=1)
        finished_scores, chosen = all_scores.topk(beams)
        finished = torch.cat([finished, filled], dim=1)[row, chosen]
        # The others go on.
        scores, chosen = best.masked_fill(ends, -1e9).topk(beams)
        tokens = candidates[row, chosen]
        could_improve = scores[:, :1] / length > finished_scores[:, -1:]
        searching = searching & could_improve
        if length == count or not searching.any():
            break
        rows = (row * beams + parent[row, chosen]).flatten()
        for block in cache:
            block.select(rows)
        logits = model(tokens[:, :, -1].reshape(-1, 1), cache, pad, last_only=True)[:, -1]
    return torch.cat([ids, finished[:, 0, :length]], dim=1)


def generate_answers(model, records, tokens, batch_size, count, device, label, beams=1):
    """The answers to records, as text, in their order.

    Prompts of similar length share a batch. Each process answers its own batches.
    """
    model.eval()
    order = sorted(range(len(records)), key=lambda i: -len(records[i].prompt_ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, processes = rank_and_count()
    mine = batches[rank::processes]
    progress = Progress(label, sum(len(batch) for batch in mine))
    answers = {}
    for batch in mine:
        prompts = [torch.tensor(records[i].prompt_ids, device=device) for i in batch]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        width = ids.shape[1]
        pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        if not pad.any():
            pad = None
        if beams > 1:
            result = beam_search(model, ids, count, pad, tokens.stop, beams)
        else:
            result = greedy(model, ids, count, pad, tokens.stop)
        for i, row in zip(batch, result[:, width:].tolist()):
            answers[i] = tokens.decode(row)
        progress(len(answers))
    if processes > 1:
        gathered = [None] * processes
        dist.all_gather_object(gathered, answers)
        for part in gathered:
            answers.update(part)
    return [answers[i] for i in range(len(records))]


def score_records(
    model, records, tokens, batch_size, count, device, label, beams=1, letters="first"
):
    """Generate and compare: (a list of whether each record is right, the answers as text)."""
    answers = generate_answers(model, records, tokens, batch_size, count, device, label, beams)
    rights = []
    for record, answer in zip(records, answers):
        rights.append(is_right(answer, record.answer, letters))
    return rights, answers


def averages(results):
    """The paper's averages of {test set: list of whether each record is right}, and their kinds.

    results: {name: (kind, rights)}. Arithmetic sets (numbers and letters) have the micro average,
    M.AVG, over all their records; commonsense sets (words) have the macro average, AVG, over the
    sets. Returns {"M.AVG": percent, "AVG": percent}, without a kind that is absent.
    """
    pooled = []
    percents = []
    for kind, rights in results.values():
        if kind == "word":
            percents.append(100 * sum(rights) / len(rights))
        else:
            pooled.extend(rights)
    found = {}
    if pooled:
        found["M.AVG"] = 100 * sum(pooled) / len(pooled)
    if percents:
        found["AVG"] = sum(percents) / len(percents)
    return found
