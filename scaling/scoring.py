"""Which answers are right, by the paper's rules, to the letter, and generation to get answers."""

import re
from statistics import mean

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from scaling.training import PROCESSES, RANK, gather, pad

# Each kind of answer has the pattern that finds one in an output.
NUMBER = r"-?\d+\.?\d*"
LETTER = "[A-E]"
WORDS = (
    "true|false",  # BoolQ
    "solution1|solution2",  # PIQA
    "answer1|answer2|answer3|answer4|answer5",  # SIQA, ARC, OBQA
    "ending1|ending2|ending3|ending4",  # HellaSwag
    "option1|option2",  # WinoGrande
)
TOKENS = 16384  # in a batch of prompts, with those to come; a beam counts as a sequence
# Letters, in the released code: the last match of the first of these patterns that matches at all.
RELEASED_LETTERS = (
    r"\\boxed\{\\text\{\(?([A-E])\)?\}\}",
    r"\\boxed\{\(?([A-E])\)?\}",
    r"\(?([A-E])\)",
    r"(?i:(?:correct )?answer is[:\s]+\(?([A-E])\)?)",
    r"is[:\s]+([A-E])\.?\s*$",
    r"[Oo]ption\s+\(?([A-E])\)?",
)


def pattern_of(answer):
    """The pattern of the kind of answer that this is. Raises ValueError if it is of none."""
    if re.fullmatch(LETTER, answer):
        return LETTER
    for words in WORDS:
        if re.fullmatch(words, answer.lower()):
            return words
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d\d?)?", answer.replace(",", "").lower()):
        return NUMBER
    known = ["a number", "A to E", *WORDS]
    raise ValueError(f"answer {answer[:40]!r} cannot be scored, as it is none of {known}")


def extract(output, answer, letters="first"):
    """What an output is taken to answer, to be compared with `answer`: text, a number, or None.

    letters: "first" is the rule of LLM-Adapters, "released" that of the paper's released code."""
    pattern = pattern_of(answer)
    if pattern == NUMBER:
        found = re.findall(NUMBER, output.replace(",", ""))
        return float(found[-1]) if found else None
    if pattern == LETTER and letters == "released":
        hits = [re.findall(released, output.strip()) for released in RELEASED_LETTERS]
        return next((found[-1] for found in hits if found), None)
    found = re.search(pattern, output if pattern == LETTER else output.lower())
    return found.group() if found else None


def is_right(output, answer, letters="first"):
    """Whether a text is right. answer: text, or a number; ValueError if nobody could score it."""
    answer = str(answer).strip()
    found = extract(output, answer, letters)
    if isinstance(found, float):
        return abs(found - float(answer.replace(",", ""))) <= 0.001
    return found == (answer if pattern_of(answer) == LETTER else answer.lower())


def averages(results):
    """M.AVG over all records of sets of numbers and letters, AVG over sets of words, in percent."""
    pooled = []
    shares = []
    for answers, rights in results:
        if {pattern_of(answer) for answer in answers}.issubset(WORDS):
            shares.append(mean(rights))
        else:
            pooled.extend(rights)
    means = {"M.AVG": pooled, "AVG": shares}
    return {name: 100 * mean(values) for name, values in means.items() if values}


def generate_answers(model, records, prompts, args, label):
    """The answers to records, as text, in their order. args: the options of finetune.py."""
    model.eval()
    batches = []
    left = sorted(range(len(records)), key=lambda i: -len(records[i].prompt_ids))
    while left:
        longest = len(records[left[0]].prompt_ids) + args.max_new_tokens
        size = max(1, TOKENS // (args.beams * longest))
        batches.append(left[:size])
        left = left[size:]
    if not isinstance(model, FSDPModule):  # What is spread needs all processes for a batch.
        batches = batches[RANK::PROCESSES]
    how = dict(do_sample=False, num_beams=args.beams, max_new_tokens=args.max_new_tokens)
    how.update(eos_token_id=prompts.stop, pad_token_id=prompts.end)
    answers = {}
    for batch in tqdm(batches, label, disable=RANK > 0):
        ids, mask = pad([torch.tensor(records[i].prompt_ids) for i in batch], "left", args.device)
        result = model.generate(input_ids=ids, attention_mask=mask, **how)
        for i, row in zip(batch, result[:, ids.shape[1] :].tolist()):
            answers[i] = prompts.decode(row)
    for part in gather(answers):
        answers.update(part)
    return [answers[i] for i in range(len(records))]
