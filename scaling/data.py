"""The paper's JSON -> prompts and answers, as tokens. README.md has the data format."""

import itertools
import json
import os
import sys
from collections import namedtuple
from pathlib import Path

import transformers

from scaling.scoring import pattern_of
from scaling.training import say

ALPACA = (  # of the paper's code, and of Alpaca before it
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
SYSTEM = "You are a helpful assistant."  # what the authors tell Qwen and Gemma
QUESTION = "Which number comes after 41?"  # A chat template is tried with these two.
ANSWER = "Forty-two."


def read_prompts(args, saved=None):
    """The Prompts of args.checkpoint. saved: options.json of the run that an adapter comes from."""
    folder = Path(args.checkpoint)
    if not folder.is_dir():
        sys.exit(f"--checkpoint {folder} is no folder, and nothing is downloaded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if saved is not None:
        if args.template not in (None, saved["template"]):
            sys.exit(f"the adapter was trained with --template {saved['template']}: leave it out")
        tokenizer.chat_template = saved["chat_template"]
        return Prompts(tokenizer, saved["stop"], saved["template"])
    config = transformers.AutoConfig.from_pretrained(folder)
    template = args.template
    if template is None:
        template = "chat" if tokenizer.chat_template else "alpaca"
        if template == "chat" and args.recipe is not None and config.model_type == "llama":
            template = "chat-alpaca"  # So the authors ask Llama 3.
    sources = [config.get_text_config(), tokenizer]
    if Path(folder, "generation_config.json").exists():
        sources.insert(0, transformers.GenerationConfig.from_pretrained(folder))
    for source in sources:
        stop = source.eos_token_id
        if stop is not None:
            return Prompts(tokenizer, stop if isinstance(stop, list) else [stop], template)
    sys.exit(f"{folder} names no eos_token_id: add one to its generation_config.json")


class Prompts:
    """A tokenizer, and how it is asked: "alpaca" is the plain text of the paper's code, "chat" the
    chat template around the instruction, "chat-alpaca" that template around the Alpaca text.
    stop: the ids that end an answer. `end` is the one of them that training appends."""

    def __init__(self, tokenizer, stop, template):
        self.tokenizer = tokenizer
        self.stop = stop
        self.template = template
        self.end = stop[0]
        self.system = SYSTEM if template == "chat" else None
        self.start = []  # what the tokenizer puts before a text, such as <s>; a template has it
        self.blanks = ""  # what stands between a prompt and its answer
        if len(self.encode(QUESTION)) < 5:  # Without its files, transformers makes an empty one.
            sys.exit("--checkpoint has no tokenizer, or a part of it: copy tokenizer.json there")
        if template == "alpaca":
            special = tokenizer("a")["input_ids"]
            self.start = special[: special.index(self.encode("a")[0])]
        else:
            self.try_chat_template()
        say(f"prompts: {template}; an answer ends with {tokenizer.decode([self.end])!r}")

    def try_chat_template(self):
        """See what the chat template does with a question and its answer, or end the run."""
        try:
            self.render(QUESTION, QUESTION)
        except ValueError:
            self.system = None  # Some templates, as Gemma 1's, take no system message.
        try:
            before, after = self.render(QUESTION, QUESTION)
        except ValueError as error:
            sys.exit(f"{error}; --template alpaca needs no chat template")
        self.blanks = before[len(before.rstrip(" ")) :]
        self.end = next((token for token in self.encode(after) if token in self.stop), self.end)

    def render(self, content, instruction):
        """(what is before ANSWER, what is after it) in a conversation. Raises ValueError."""
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            conversation = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # A template may raise anything.
            raise ValueError(f"the chat template fails: {error}") from None
        before, answer, after = conversation.rpartition(ANSWER)
        if instruction not in before or not answer:
            raise ValueError(f"the chat template renders {instruction!r:.50} as {conversation!r}")
        return before, after

    def encode(self, text):
        """Text -> token ids without an end token, which some tokenizers would append."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return self.start + encoded["input_ids"]

    def decode(self, ids):
        """Token ids up to the first that ends an answer -> text without special tokens."""
        answer = itertools.takewhile(lambda token: token not in self.stop, ids)
        return self.tokenizer.decode([*answer], skip_special_tokens=True)

    def prompt(self, instruction, input_text=""):
        """What the model is given for a record, as text. Raises ValueError."""
        if self.template == "chat":
            content = f"{instruction}\n\nInput:\n{input_text}" if input_text else instruction
        else:
            more = f"### Input:\n{input_text}\n\n" if input_text else ""
            content = ALPACA.format(instruction=instruction, input=more)
        if self.template == "alpaca":
            return content
        return self.render(content, instruction)[0].removesuffix(self.blanks)

    def split(self, prompt, output):
        """(prompt ids, target ids), encoded together; a token across the border is the target's."""
        prompt_ids = self.encode(prompt)
        whole = self.encode(prompt + self.blanks + output)
        border = len(os.path.commonprefix([prompt_ids, whole]))
        end = [] if whole[-1] == self.end else [self.end]
        return whole[:border], whole[border:] + end


# position counts from 1; a record for scoring has no target_ids, one for training no answer.
Record = namedtuple("Record", "position prompt_ids target_ids answer")


def text_field(record, name, needed=True):
    """A field as text: numbers and true/false as JSON writes them. Raises ValueError."""
    value = record.get(name)
    if value is None or value != value:  # NaN is what pandas writes for a missing field.
        value = ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{name} is a {type(value).__name__}, and should be text")
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    if needed and not text:
        raise ValueError(f"{name} is missing or empty")
    text.encode()  # This raises a ValueError for half a character, which JSON can hold.
    return text


def read_objects(path):
    """The JSON objects of a list, or one a line. What is not JSON ends the run."""
    objects = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            objects = json.loads(text)
        else:
            for line in text.split("\n"):
                objects += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        sys.exit(f"{path} is no JSON list and no JSON lines: record {len(objects) + 1}: {error}")
    return objects


def read_record(found, position, prompts, training):
    """A JSON object -> Record. Raises ValueError that says why it can't be used."""
    if not isinstance(found, dict):
        raise ValueError("it should be a JSON object")
    instruction = text_field(found, "instruction")
    prompt = prompts.prompt(instruction, text_field(found, "input", needed=False))
    if training is None:
        answer = text_field(found, "answer")
        pattern_of(answer)  # Raises what nobody could score.
        return Record(position, prompts.encode(prompt), [], answer)
    prompt_ids, target_ids = prompts.split(prompt, text_field(found, "output"))
    target_ids = target_ids[: max(0, training.cutoff - len(prompt_ids))]
    if not target_ids and training.loss_on == "answer":
        raise ValueError(f"--cutoff {training.cutoff} leaves nothing of its output")
    return Record(position, prompt_ids[: training.cutoff], target_ids, "")


def read_records(path, prompts, training=None):
    """The usable records of a file, for scoring, or for training with these options."""
    records = []
    bad = []
    for position, found in enumerate(read_objects(path), 1):
        try:
            records.append(read_record(found, position, prompts, training))
        except ValueError as error:
            bad.append(f"record {position}: {error}")
    cut = [r for r in records if training and r.target_ids[-1:] != [prompts.end]]
    say(f"{path}: {len(records)} records, {len(cut)} of them cut; {len(bad)} left out {bad[:3]}")
    if not records:
        sys.exit(f"{path} has no usable record")
    return records
