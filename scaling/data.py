"""The paper's JSON -> prompts and answers, as tokens.

A file is a JSON list, or JSON lines, of {"instruction", "input", "output", "answer"}. Training
learns `output` and needs no `answer`; scoring compares with `answer` and needs no `output`.
"""

import json
import os
import sys
from dataclasses import dataclass, field

from scaling.scoring import answer_kind
from scaling.training import say

try:
    import jinja2  # transformers renders chat templates with it.
    import transformers
except ImportError as error:
    sys.exit(f"scaling/ is built on transformers ({error}): pip install transformers jinja2")

ALPACA = (  # of the paper's code, and of Alpaca before it
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
SYSTEM = "You are a helpful assistant."  # what the authors tell Qwen and Gemma
TEMPLATES = ("alpaca", "chat", "chat-alpaca")
# What a chat template is tried with.
QUESTION = "Which number comes after 41?"
ANSWER = "Forty-two."


def read_prompts(args, saved=None):
    """The Prompts of args.checkpoint. saved: options.json of the run that an adapter comes from."""
    folder = args.checkpoint
    if not os.path.isdir(folder):
        sys.exit(f"--checkpoint {folder} is no folder, and nothing is downloaded")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, KeyError, ValueError, ImportError) as error:
        sys.exit(f"--checkpoint {folder} can't be used: {error}")
    stop = config.get_text_config().eos_token_id
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        stop = transformers.GenerationConfig.from_pretrained(folder).eos_token_id or stop
    stop = tokenizer.eos_token_id if stop is None else stop
    template = args.template
    if saved is not None:
        if template not in (None, saved["template"]):
            sys.exit(f"the adapter was trained with --template {saved['template']}: leave it out")
        template = saved["template"]
        stop = saved["stop"]
        tokenizer.chat_template = saved["chat_template"]
    elif template is None:
        template = "chat" if tokenizer.chat_template else "alpaca"
        if template == "chat" and args.recipe is not None and config.model_type == "llama":
            template = "chat-alpaca"  # So the authors ask Llama 3.
    if stop is None:
        sys.exit(f"{folder} names no eos_token_id: add one to its generation_config.json")
    prompts = Prompts(tokenizer, stop if isinstance(stop, list) else [stop], template)
    prompts.family = config.model_type
    say(f"prompts: {template}; an answer ends with {tokenizer.decode([prompts.end])!r}")
    return prompts


class Prompts:
    """A model's tokenizer, and how it is asked.

    template: "alpaca", the plain text of the paper's code; "chat", the tokenizer's own chat
    template around the instruction; "chat-alpaca", that template around the Alpaca text.
    stop: the ids that end an answer. `end` is the one of them that training appends.
    """

    def __init__(self, tokenizer, stop, template):
        self.tokenizer = tokenizer
        self.template = template
        self.stop = stop
        self.end = stop[0]
        self.system = SYSTEM if template == "chat" else None
        self.blanks = ""  # what stands between a prompt and its answer
        self.has_own_prompt = True
        self.start = []  # what the tokenizer puts before a text, such as <s>; a template has it
        if template == "alpaca":
            special = tokenizer("a")["input_ids"]
            self.start = special[: special.index(self.ids("a")[0])]
        else:
            self.try_chat_template()

    def settings(self):
        """What has to be the same where an adapter is scored or resumed."""
        chat = self.tokenizer.chat_template
        return {"template": self.template, "stop": self.stop, "chat_template": chat}

    def try_chat_template(self):
        """See what the chat template does with a question and its answer, or end the run."""
        if not self.tokenizer.chat_template:
            sys.exit("the tokenizer has no chat template; --template alpaca needs none")
        try:
            self.render(QUESTION)
        except jinja2.TemplateError:
            self.system = None  # Some templates, as Gemma 1's, take no system message.
        try:
            prompt = self.render(QUESTION)
            conversation = self.render(QUESTION, ANSWER)
        except jinja2.TemplateError as error:
            sys.exit(f"the chat template can't be rendered: {error}; try --template alpaca")
        before, answer, after = conversation.rpartition(ANSWER)
        if QUESTION not in before or not answer:
            given = f"{QUESTION!r} and {ANSWER!r} as {conversation!r}"
            sys.exit(f"the chat template renders {given}; --template alpaca needs none")
        # Prompt and answer together have to be what the model would read in a conversation. Some
        # templates have no prompt for an answer, or one that opens a thought.
        self.has_own_prompt = prompt == before
        if not self.has_own_prompt:
            self.blanks = before[len(before.rstrip(" ")) :]
            say("prompts are cut from a conversation, as the template's own prompt differs from it")
        for token in self.ids(after):
            if token in self.stop:
                self.end = token
                break

    def render(self, content, answer=None):
        """One turn in the chat template: up to where its answer begins, or with the answer."""
        messages = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, text):
        """Text -> token ids. Nothing is appended, though some tokenizers would."""
        return self.start + self.ids(text)

    def decode(self, ids):
        """Token ids up to the first that ends an answer -> text without special tokens."""
        answer = []
        for token in ids:
            if token in self.stop:
                break
            answer.append(token)
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def prompt(self, instruction, input_text=""):
        """What the model is given for a record, as text. Raises ValueError."""
        content = instruction
        if self.template == "chat" and input_text:
            content = f"{instruction}\n\nInput:\n{input_text}"
        elif self.template != "chat":
            more = f"### Input:\n{input_text}\n\n" if input_text else ""
            content = ALPACA.format(instruction=instruction, input=more)
        if self.template == "alpaca":
            return content
        try:
            if self.has_own_prompt:
                prompt = self.render(content)
            else:
                prompt = self.render(content, ANSWER).rpartition(ANSWER)[0].rstrip(" ")
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from None
        if instruction not in prompt:
            raise ValueError("the chat template changes the instruction")
        return prompt

    def split(self, prompt, output):
        """(prompt ids, target ids) of one sequence: the encoded prompt and output, then the end.

        They are encoded together, as a tokenizer may begin a text of its own in another way. A
        token that stands across the border belongs to the target.
        """
        prompt_ids = self.encode(prompt)
        whole = self.encode(prompt + self.blanks + output)
        border = 0
        while border < min(len(prompt_ids), len(whole)) and prompt_ids[border] == whole[border]:
            border += 1
        end = [] if whole[-1] == self.end else [self.end]
        return whole[:border], whole[border:] + end


@dataclass
class Record:
    """One question. Training needs target_ids, scoring needs answer."""

    position: int  # in its file, from 1
    instruction: str
    prompt_ids: list
    target_ids: list = field(default_factory=list)
    answer: str = ""


def text_field(record, name, needed=True):
    """A field as text: numbers and true/false as JSON writes them. Raises ValueError."""
    value = record.get(name)
    if value is None or value != value:  # NaN is what pandas writes for a missing field.
        value = ""
    elif isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    elif not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, and should be text")
    if needed and not value.strip():
        raise ValueError(f"{name} is missing or empty")
    value.encode()  # This raises a ValueError for half a character, which JSON can hold.
    return value.strip()


def read_objects(path):
    """The JSON objects of a file: a list's, or one a line. What is not JSON ends the run.

    Text is UTF-8, with or without a byte order mark, whatever the locale says. A line ends at a
    line feed and nowhere else.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} can't be read: {error}")
    objects = []
    try:
        if text.lstrip().startswith("["):
            objects = json.loads(text)
        else:
            for line in text.split("\n"):
                objects += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        place = f"record {len(objects) + 1}: " if objects else ""
        sys.exit(f"{path} is neither one JSON list nor JSON lines: {place}{error}")
    for position, found in enumerate(objects, 1):
        if not isinstance(found, dict):
            sys.exit(f"{path}, record {position} should be a JSON object, and is {found!r:.40}")
    return objects


def read_record(found, position, prompts, for_scoring):
    """A JSON object -> Record. Raises ValueError that says why it can't be used."""
    instruction = text_field(found, "instruction")
    prompt = prompts.prompt(instruction, text_field(found, "input", needed=False))
    if for_scoring:
        answer = text_field(found, "answer")
        answer_kind(answer)  # Raises what nobody could score.
        return Record(position, instruction, prompts.encode(prompt), answer=answer)
    return Record(position, instruction, *prompts.split(prompt, text_field(found, "output")))


def read_records(path, prompts, for_scoring=False):
    """A file of records -> a list of Record, with target_ids or, for_scoring, with answer.

    A record that can't be used is named and left out. A file without a usable one ends the run.
    """
    records = []
    bad = 0
    for position, found in enumerate(read_objects(path), 1):
        try:
            records.append(read_record(found, position, prompts, for_scoring))
        except ValueError as error:
            bad += 1
            if bad <= 3:
                say(f"{path}, record {position} is left out: {error}")
    say(f"{path}: {len(records)} records" + (f", {bad} left out" if bad else ""))
    if not records:
        wanted = "instruction and answer" if for_scoring else "instruction and output"
        sys.exit(f"{path} has no usable record: it takes JSON objects with {wanted}")
    return records


def cut_records(records, cutoff, loss_on):
    """Cut what is longer than cutoff tokens, and leave out what has then nothing left to learn."""
    kept = []
    cut = 0
    for record in records:
        room = max(0, cutoff - len(record.prompt_ids))
        cut += len(record.target_ids) > room
        record.prompt_ids = record.prompt_ids[:cutoff]
        record.target_ids = record.target_ids[:room]
        if record.target_ids or loss_on == "all":
            kept.append(record)
    if cut:
        say(f"{cut} records are cut at {cutoff} tokens, {len(records) - len(kept)} are left out")
    if not kept:
        sys.exit("--cutoff leaves nothing to learn: raise it, or take --loss-on all")
    return kept
