"""JSON -> records -> batches, and the text on both sides of that: the tokenizer and the prompts.

The paper's files are JSON lists of {"instruction", "input", "output", "answer"}. Training learns
`output` and needs no `answer`; scoring compares with `answer` and needs no `output`.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from scaling.checkpoint import read_json
from scaling.processes import need, say
from scaling.scoring import answer_kind

IGNORE = -100  # The label of a token that has no loss; cross_entropy knows it by this number.


# -------------------------------------------------------------------------------------------------
# Prompts

ALPACA = (  # of the paper's code, and of Alpaca before it
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
SYSTEM = "You are a helpful assistant."  # what the authors tell Qwen and Gemma
TEMPLATES = ("alpaca", "chat", "chat-alpaca")


def alpaca_prompt(instruction, input_text):
    more = f"### Input:\n{input_text}\n\n" if input_text else ""
    return ALPACA.format(instruction=instruction, input=more)


def read_chat_template(folder):
    """The folder's chat template as Jinja source, or None if it has none.

    It is chat_template.jinja or else the field chat_template of tokenizer_config.json; of a list of
    several templates, the one that is named "default".
    """
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    template = read_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        for entry in template:
            if entry["name"] == "default":
                return entry["template"]
        raise ValueError(
            f'{folder}/tokenizer_config.json has several chat templates, none "default"'
        )
    return template


class TemplateRefusal(Exception):
    """What a chat template says that does not take these messages."""


def refuse(message):
    raise TemplateRefusal(message)


class ChatTemplate:
    """A model's own chat template: messages -> text, as transformers' apply_chat_template."""

    def __init__(self, source, special_tokens):
        """source: Jinja. special_tokens: {"bos_token": "<s>", ...}, which templates refer to."""
        jinja2 = need("jinja2", "a chat template")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.add_extension(generation_tag())
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = strftime_now
        self.special_tokens = special_tokens
        self.template_error = jinja2.TemplateError
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template cannot be read: {error}; --template alpaca needs none"
            ) from None

    def render(self, messages, add_generation_prompt=False):
        """messages: [{"role": "user", "content": text}, ...] -> text.

        add_generation_prompt: go on up to where the model's answer begins. Raises TemplateRefusal
        if the template does not take these messages.
        """
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except self.template_error as error:
            raise TemplateRefusal(str(error)) from None


def generation_tag():
    """A Jinja extension for {% generation %}, with which some templates mark the model's turns."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    return Generation


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own tojson escapes HTML, which a prompt is not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(form):
    """What some templates (Llama 3.1's) call to write today's date."""
    import datetime

    return datetime.datetime.now().strftime(form)


# -------------------------------------------------------------------------------------------------
# The tokenizer


class Tokens:
    """A checkpoint's tokenizer and its prompts.

    template: "alpaca", the plain text of the paper's code; "chat", the folder's own chat template
    around the instruction; "chat-alpaca", that template around the Alpaca text, which is what the
    authors give to Llama 3; None is "chat" if the folder has a template, else "alpaca".

    `stop` has the ids that end an answer; `end` is the one of them that training appends.
    """

    def __init__(self, folder, template=None):
        tokenizers = need("tokenizers", "--checkpoint")
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(path):
            raise ValueError(f"{folder} has no tokenizer.json, the file of the tokenizers library")
        self.tokenizer = tokenizers.Tokenizer.from_file(path)
        # The file may have been saved with limits that served somebody else's batches.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.start = self.find_start()
        self.stop = self.find_stop(folder)
        source = read_chat_template(folder)
        if template is None:
            template = "alpaca" if source is None else "chat"
        if template not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, not {template!r}")
        if template != "alpaca" and source is None:
            raise ValueError(f"{folder} has no chat template; --template alpaca needs none")
        self.template = template
        self.chat = None
        self.end = self.stop[0]
        if template != "alpaca":
            self.chat = ChatTemplate(source, self.read_special_tokens(folder))
            self.end = self.find_chat_end()

    def find_start(self):
        """The special tokens that this tokenizer puts before a text, such as [BOS]; often none."""
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        special = self.tokenizer.encode("a").ids
        for length in range(len(special)):
            if special[length : length + len(plain)] == plain:
                return special[:length]
        return []

    def find_stop(self, folder):
        """The ids that end an answer: the generation config's, or else config.json's."""
        config = read_json(folder, "config.json")
        places = {
            "generation_config.json": read_json(folder, "generation_config.json"),
            "config.json": config,
            "config.json, text_config": config.get("text_config") or {},
        }
        for place, content in places.items():
            stop = content.get("eos_token_id")
            if stop is None:
                continue
            stop = stop if isinstance(stop, list) else [stop]
            for token in stop:
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ValueError(f"{folder}, {place}: eos_token_id {token!r} is no token id")
            if stop:
                return tuple(stop)
        raise ValueError(
            f"{folder}: neither generation_config.json nor config.json has an eos_token_id, so no "
            "answer would end; add the id of the token that ends one to generation_config.json"
        )

    def read_special_tokens(self, folder):
        """{"bos_token": "<s>", ...} for the chat template."""
        fields = read_json(folder, "special_tokens_map.json")
        fields.update(read_json(folder, "tokenizer_config.json"))
        tokens = {}
        for name, value in fields.items():
            if name.endswith("_token") and value is not None and not isinstance(value, bool):
                tokens[name] = value["content"] if isinstance(value, dict) else value
        return tokens

    def find_chat_end(self):
        """Of the ids that end an answer, the one with which the chat template ends it."""
        marker = "0123"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        try:
            after = self.chat.render(messages).rpartition(marker)[2]
        except TemplateRefusal:
            return self.stop[0]
        for token in self.tokenizer.encode(after, add_special_tokens=False).ids:
            if token in self.stop:
                return token
        return self.stop[0]

    def encode(self, text):
        """Text -> a list of token ids that begins, once, with what this tokenizer begins with.

        Nothing is appended, though some tokenizers would. Raises ValueError for text that is none.
        """
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError) as error:
            raise ValueError(f"the text cannot be encoded: {error}") from None
        if ids[: len(self.start)] != self.start:
            ids = self.start + ids
        return ids

    def decode(self, ids):
        """Token ids up to the first that ends an answer -> text without special tokens."""
        answer = []
        for token in ids:
            if token in self.stop:
                break
            answer.append(token)
        return self.tokenizer.decode(answer)

    def prompt(self, instruction, input_text=""):
        """What the model is given for a record, as text."""
        instruction = instruction.strip()
        input_text = input_text.strip()
        if self.template == "alpaca":
            return alpaca_prompt(instruction, input_text)
        if self.template == "chat-alpaca":
            return self.render_turn(alpaca_prompt(instruction, input_text), None)
        if input_text:
            instruction = f"{instruction}\n\nInput:\n{input_text}"
        return self.render_turn(instruction, SYSTEM)

    def render_turn(self, content, system):
        """One user's turn in the model's chat template, up to where its answer begins."""
        messages = [{"role": "user", "content": content}]
        if system is not None:
            try:
                told = [{"role": "system", "content": system}, *messages]
                return self.chat.render(told, add_generation_prompt=True)
            except TemplateRefusal:
                pass  # The template takes no system message (Gemma 1's does not), so there is none.
        try:
            return self.chat.render(messages, add_generation_prompt=True)
        except TemplateRefusal as error:
            raise ValueError(f"the chat template refuses the prompt: {error}") from None

    def split(self, prompt, output):
        """(prompt ids, target ids) of one sequence: the encoded prompt and output, then the end.

        They are encoded together, as a tokenizer may begin a text of its own in another way. A
        token that stands across the border belongs to the target.
        """
        prompt_ids = self.encode(prompt)
        whole = self.encode(prompt + output)
        border = 0
        while border < min(len(prompt_ids), len(whole)) and prompt_ids[border] == whole[border]:
            border += 1
        return whole[:border], [*whole[border:], self.end]


# -------------------------------------------------------------------------------------------------
# Reading


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
    if value is None:
        value = ""
    elif isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    elif not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, and should be text")
    if needed and not value.strip():
        raise ValueError(f"{name} is missing or empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has characters that are not Unicode (half a pair)") from None
    return value


def read_elements(path):
    """The records of a file: a JSON list's elements or JSON lines'. What is not JSON ends the run.

    Text is UTF-8, with or without a byte order mark, whatever the locale says; bytes that are not
    become half pairs, which text_field refuses. A line ends at a line feed and nowhere else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            sys.exit(f"{path} is not JSON: {error}")
        return read_lines(path, text)
    return whole if isinstance(whole, list) else [whole]  # one record, perhaps over several lines


def read_lines(path, text):
    elements = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                elements.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                sys.exit(f"{path}, line {number} is not JSON: {error}")
    return elements


def read_record(element, position, tokens, for_scoring, cutoff, over_cutoff):
    """An element of read_elements -> Record. Raises ValueError that says why it cannot be used."""
    if not isinstance(element, dict):
        raise ValueError(f"a record is a JSON object, and this is {str(element)[:20]!r}")
    instruction = text_field(element, "instruction")
    prompt = tokens.prompt(instruction, text_field(element, "input", needed=False))
    if for_scoring:
        answer = text_field(element, "answer").strip()
        answer_kind(answer)  # Raises what nobody could score.
        return Record(position, instruction, tokens.encode(prompt), answer=answer)
    output = text_field(element, "output").strip()
    prompt_ids, target_ids = tokens.split(prompt, output)
    length = len(prompt_ids) + len(target_ids)
    if cutoff is not None and length > cutoff:
        if over_cutoff == "leave-out":
            raise ValueError(f"{length} tokens, and --cutoff is {cutoff}")
        prompt_ids = prompt_ids[:cutoff]
        target_ids = target_ids[: cutoff - len(prompt_ids)]
    return Record(position, instruction, prompt_ids, target_ids)


def read_records(path, tokens, cutoff=None, over_cutoff="leave-out", for_scoring=False):
    """A file of records -> a list of Record.

    for_scoring: read instruction, input and answer, at any length; else instruction, input and
    output, and a record of more than `cutoff` tokens is left out ("leave-out") or cut ("truncate").
    What is wrong with a record is said with its position, and it is left out and counted. A file
    without a usable record ends the run.
    """
    elements = read_elements(path)
    records = []
    bad = 0
    truncated = 0
    for position, element in enumerate(elements, 1):
        try:
            record = read_record(element, position, tokens, for_scoring, cutoff, over_cutoff)
        except ValueError as error:
            bad += 1
            if bad <= 3:
                say(f"{path}, record {position}: {error}: left out")
            continue
        records.append(record)
        if not for_scoring and (not record.target_ids or record.target_ids[-1] != tokens.end):
            truncated += 1
    counts = [f"{path}: {len(records)} records"]
    if bad:
        counts.append(f"{bad} left out")
    if truncated:
        counts.append(f"{truncated} cut at {cutoff} tokens")
    say(", ".join(counts))
    if not records:
        wanted = "instruction and answer" if for_scoring else "instruction and output"
        sys.exit(f"{path} has no usable record: it takes a JSON list or JSON lines with {wanted}")
    return records


# -------------------------------------------------------------------------------------------------
# Batches


def seeded(*numbers):
    """A torch.Generator that depends on all of the numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Batches:
    """Batches of records, as a function of the step alone: a run can stop and go on anywhere.

    batches(step) -> ids (batch, T) and labels (batch, T), int64; a label is the next token, or
    IGNORE where there is no loss. loss_on: "answer" learns the target alone, "all" the prompt too.
    An epoch has every record once, in an order of its own. by_length: records of similar length
    come together, which wastes less on padding.
    """

    def __init__(self, records, batch_size, seed, loss_on="answer", by_length=True):
        self.batch_size = batch_size
        self.seed = seed
        self.by_length = by_length
        self.ids = []
        self.labels = []
        for record in records:
            ids = torch.tensor(record.prompt_ids + record.target_ids)
            labels = ids.clone()
            if loss_on == "answer":
                labels[: len(record.prompt_ids)] = IGNORE
            self.ids.append(ids[:-1])
            self.labels.append(labels[1:])
        self.steps_per_epoch = -(-len(records) // batch_size)
        self.planned_epoch = None
        self.plan = []

    def plan_epoch(self, epoch):
        """The records of each batch of an epoch: a list of lists of indices."""
        generator = seeded(self.seed, epoch)
        order = torch.randperm(len(self.ids), generator=generator).tolist()
        if self.by_length:
            # Sorting within chunks brings similar lengths together and still shuffles.
            chunk = 50 * self.batch_size
            for start in range(0, len(order), chunk):
                order[start : start + chunk] = sorted(order[start : start + chunk], key=self.length)
        plan = []
        for start in range(0, len(order), self.batch_size):
            plan.append(order[start : start + self.batch_size])
        if self.by_length:
            shuffled = torch.randperm(len(plan), generator=generator).tolist()
            plan = [plan[i] for i in shuffled]
        return plan

    def length(self, index):
        return len(self.ids[index])

    def __call__(self, step):
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.planned_epoch:
            self.plan = self.plan_epoch(epoch)
            self.planned_epoch = epoch
        chosen = self.plan[place]
        ids = pad_sequence([self.ids[i] for i in chosen], batch_first=True)
        labels = [self.labels[i] for i in chosen]
        return ids, pad_sequence(labels, batch_first=True, padding_value=IGNORE)
