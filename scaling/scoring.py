"""Which answers are right, by the rules of the paper's code, and generation in batches to get them.

The rules are literal, also where a reader would judge otherwise; README.md says where.
"""

import math
import re

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from scaling.training import is_sharded, progress, rank_and_count

# --- The rules ----------------------------------------------------------------------------------

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


# --- Generation ---------------------------------------------------------------------------------


def plan_batches(lengths, args):
    """Prompts of similar length together, as lists of indices: args.eval_batch_size sequences each.

    Long ones are fewer, as there are at most 512 tokens a sequence on average.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0] if batches else i] + args.max_new_tokens
        sequences = args.eval_batch_size * min(1, 512 / longest)
        if not batches or len(batches[-1]) + 1 > sequences / args.beams:
            batches.append([])
        batches[-1].append(i)
    return batches


def generate_answers(model, records, prompts, args, label):
    """The answers to records, as text, in their order. args: the options of finetune.py.

    Where each process has the whole model, each answers its own batches; where FSDP2 has spread it,
    all have to work on the same ones.
    """
    model.eval()
    device = next(model.parameters()).device
    rank, processes = (0, 1) if is_sharded(model) else rank_and_count()
    batches = plan_batches([len(record.prompt_ids) for record in records], args)
    answers = {}
    for batch in progress(batches[rank::processes], desc=label):
        ids = [torch.tensor(records[i].prompt_ids) for i in batch]
        mask = [torch.ones_like(row) for row in ids]
        ids = pad_sequence(ids, batch_first=True, padding_side="left").to(device)
        mask = pad_sequence(mask, batch_first=True, padding_side="left").to(device)
        result = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=args.beams,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=prompts.stop,
            pad_token_id=prompts.end,
        )
        for i, row in zip(batch, result[:, ids.shape[1] :].tolist()):
            answers[i] = prompts.decode(row)
    if processes > 1:
        gathered = [None] * processes
        dist.all_gather_object(gathered, answers)
        for part in gathered:
            answers.update(part)
    return [answers[i] for i in range(len(records))]


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
