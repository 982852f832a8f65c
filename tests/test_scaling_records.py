"""Reading in scaling/: files that are not clean, tokenizers, prompts, options.

pip install transformers safetensors tokenizers jinja2
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

from benchmarks.small_checkpoint import (
    BEGIN,
    END,
    TURN_END,
    byte_tokenizer,
    write_small_checkpoint,
    write_sums,
)
from scaling import finetune
from scaling.records import Tokens, read_records

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def record(i, **change):
    return {
        "instruction": f"What is {i} + {i}?",
        "input": "",
        "output": f"The answer is {2 * i}.",
        "answer": f"{2.0 * i}",
    } | change


@pytest.fixture
def folder(tmp_path):
    return write_small_checkpoint(tmp_path / "model")


@pytest.fixture
def tokens(folder):
    return Tokens(str(folder))


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------
# What training and scoring need


def test_scoring_needs_instruction_and_answer_alone(tmp_path, tokens):
    records = [
        record(1, output=""),
        record(2, output=None),
        {"instruction": "What is it?", "answer": 0},
        record(3, instruction=1000 * "long "),
        record(4, answer=True),
        record(5, answer="D"),
    ]
    read = read_records(write(tmp_path / "a.json", records), tokens, for_scoring=True)
    assert [r.answer for r in read] == ["2.0", "4.0", "0", "6.0", "true", "D"]
    assert len(read[3].prompt_ids) > 5000


def test_training_needs_instruction_and_output_alone(tmp_path, tokens):
    records = [
        {"instruction": "What is it?", "output": 0},
        record(1, answer=None),
        record(2, input=7),
    ]
    read = read_records(write(tmp_path / "a.json", records), tokens)
    assert len(read) == 3
    assert tokens.decode(read[0].target_ids) == "0"
    assert "### Input:\n7\n" in tokens.decode(read[2].prompt_ids)


def test_an_answer_that_cannot_be_scored_is_found_when_the_file_is_read(tmp_path, tokens, capsys):
    path = write(tmp_path / "a.json", [record(1), record(2, answer="a dozen"), record(3)])
    assert len(read_records(path, tokens, for_scoring=True)) == 2
    assert "record 2: answer 'a dozen' cannot be scored" in capsys.readouterr().out
    assert len(read_records(path, tokens)) == 3  # Training does not need it.


@pytest.mark.parametrize("over, kept", [("leave-out", 2), ("truncate", 3)])
def test_records_over_the_cutoff_are_left_out_or_cut_and_counted(
    over, kept, tmp_path, tokens, capsys
):
    records = [record(1), record(2, output=300 * "x"), record(3)]
    path = write(tmp_path / "a.json", records)
    read = read_records(path, tokens, cutoff=256, over_cutoff=over)
    assert len(read) == kept
    said = capsys.readouterr().out
    if over == "leave-out":
        assert "record 2: " in said and "tokens, and --cutoff is 256" in said
        assert "2 records, 1 left out" in said
    else:
        assert "3 records, 1 cut at 256 tokens" in said
        assert len(read[1].prompt_ids) + len(read[1].target_ids) == 256
        assert read[1].target_ids[-1] != END
        assert read[0].target_ids[-1] == END


def test_records_that_cannot_be_used_are_named_counted_and_left_out(tmp_path, tokens, capsys):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(r) for r in (record(1), record(2, output=" "), record(3))]
    path.write_text("\n".join([*lines[:2], "", lines[2], '"text"']))
    read = read_records(str(path), tokens)
    assert [r.position for r in read] == [1, 3]
    said = capsys.readouterr().out
    assert "record 2: output is missing or empty" in said
    assert "record 4: a record is a JSON object" in said
    assert "2 records, 2 left out" in said


def test_a_file_without_a_usable_record_ends_the_run(tmp_path, tokens):
    with pytest.raises(SystemExit, match="no usable record: it takes .*instruction and answer"):
        read_records(write(tmp_path / "a.json", [{"question": "?"}]), tokens, for_scoring=True)
    with pytest.raises(SystemExit, match="cannot be read: No such file"):
        read_records(str(tmp_path / "none.json"), tokens)
    with pytest.raises(SystemExit, match="no usable record"):
        read_records(write(tmp_path / "b.json", []), tokens)


# ---------------------------------------------------------------------------------------------
# Text

BAD_RECORDS = {
    "half a pair": '{"instruction": "x", "output": "\\ud800"}',
    "a list as text": '{"instruction": ["x"], "output": "y"}',
    "nothing": "null",
    "a record as a string": json.dumps(json.dumps({"instruction": "x", "output": "y"})),
}
NO_JSON = {
    "broken": '{"instruction": "x", "output": }',
    "too deep": '{"instruction": "x", "output": ' + 100_000 * "[" + 100_000 * "]" + "}",
    "too many digits": '{"instruction": "x", "output": ' + 5000 * "7" + "}",
}


@pytest.mark.parametrize("form", ["list", "lines", "indented"])
@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_json_that_is_no_record_is_one_bad_record(bad, form, tmp_path, tokens, capsys):
    good = [json.dumps(record(1, output='a "quoted, [bracket {')), json.dumps(record(2))]
    elements = [good[0], BAD_RECORDS[bad], good[1]]
    path = tmp_path / "a.json"
    if form == "list":
        path.write_text("[" + ",".join(elements) + "]")
    elif form == "indented":
        path.write_text("[\n  " + ",\n  ".join(elements) + "\n]\n")
    else:
        path.write_text("\n".join(elements))
    read = read_records(str(path), tokens)
    assert [r.position for r in read] == [1, 3]
    assert tokens.decode(read[0].target_ids) == 'a "quoted, [bracket {'
    assert "record 2: " in capsys.readouterr().out


@pytest.mark.parametrize("bad", NO_JSON)
def test_what_is_not_json_ends_the_run_and_is_named(bad, tmp_path, tokens):
    elements = [json.dumps(record(1)), NO_JSON[bad]]
    path = tmp_path / "a.json"
    path.write_text("\n".join(elements))
    with pytest.raises(SystemExit, match="a.json, line 2 is not JSON: "):
        read_records(str(path), tokens)
    path.write_text("[" + ",".join(elements) + "]")
    with pytest.raises(SystemExit, match="a.json is not JSON: "):
        read_records(str(path), tokens)


def test_bytes_that_are_not_utf8_are_one_bad_record(tmp_path, tokens, capsys):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record(i)).encode() for i in range(3)]
    lines[1] = lines[1].replace(b"What", b"Wh\xe4t")
    path.write_bytes(b"\n".join(lines))
    assert [r.position for r in read_records(str(path), tokens)] == [1, 3]
    assert "record 2: instruction has characters that are not Unicode" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "byte order mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_text_is_utf8_and_ends_lines_at_line_feeds_alone(mark, newline, tmp_path, tokens):
    odd = "naïve 漢字 a\u2028b\u2029c\x85d\x0be"
    lines = [json.dumps(record(i, output=odd), ensure_ascii=False) for i in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_bytes((mark + newline.join(lines) + newline).encode("utf-8"))
    read = read_records(str(path), tokens)
    assert [tokens.decode(r.target_ids) for r in read] == [odd, odd]
    path.write_bytes((mark + "[" + ",".join(lines) + "]").encode("utf-8"))
    assert len(read_records(str(path), tokens)) == 2
    path.write_bytes((mark + json.dumps(record(1), indent=1)).encode("utf-8"))
    assert len(read_records(str(path), tokens)) == 1  # one record over several lines


def test_the_locale_does_not_matter(tmp_path, folder):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(1, output="漢字")], ensure_ascii=False), encoding="utf-8")
    code = (
        "import sys; from scaling.records import *; tokens = Tokens(sys.argv[1]);"
        "(read,) = read_records(sys.argv[2], tokens);"
        "print(ascii(tokens.decode(read.target_ids)))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), str(path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert "'\\u6f22\\u5b57'" in done.stdout, done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------
# The tokenizer


@pytest.mark.parametrize("puts_end", [False, True])
@pytest.mark.parametrize("puts_begin", [False, True])
def test_a_record_is_one_sequence_with_special_tokens_once(puts_begin, puts_end, tmp_path):
    tokenizer = byte_tokenizer(puts_begin, puts_end)
    folder = write_small_checkpoint(tmp_path / "model", tokenizer)
    tokens = Tokens(str(folder))
    path = write(tmp_path / "a.json", [record(1)])
    (training,) = read_records(path, tokens)
    (scoring,) = read_records(path, tokens, for_scoring=True)
    ids = training.prompt_ids + training.target_ids
    assert ids.count(BEGIN) == (1 if puts_begin else 0)
    assert (ids[0] == BEGIN) is puts_begin
    assert ids.count(END) == 1 and ids[-1] == END
    assert scoring.prompt_ids == training.prompt_ids
    text = tokens.prompt("What is 1 + 1?") + "The answer is 2."
    bare = byte_tokenizer().encode(text).ids
    assert ids == ([BEGIN] if puts_begin else []) + bare + [END]


def test_output_is_encoded_in_its_context(tmp_path):
    """A tokenizer that marks the start of a text must not mark the start of an answer."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Prepend("^")
    tokens = Tokens(str(write_small_checkpoint(tmp_path / "model", tokenizer)))
    prompt_ids, target_ids = tokens.split("question:", "answer")
    assert tokens.decode(prompt_ids) == "^question:"
    assert tokens.decode(target_ids) == "answer"


def test_stored_truncation_and_padding_are_off(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=20, pad_id=0)
    tokens = Tokens(str(write_small_checkpoint(tmp_path / "model", tokenizer)))
    for text in ("abc", 30 * "abc"):
        assert tokens.encode(text) == byte_tokenizer().encode(text).ids


def test_the_end_token_is_the_generation_configs(tmp_path):
    folder = write_small_checkpoint(tmp_path / "model")
    assert Tokens(str(folder)).stop == (END,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN_END, 65]}))
    tokens = Tokens(str(folder))
    assert tokens.stop == (TURN_END, 65) and tokens.end == TURN_END
    (folder / "generation_config.json").write_text("{}")
    assert Tokens(str(folder)).stop == (END,)
    write_small_checkpoint(folder, eos_token_id=None)
    with pytest.raises(
        ValueError, match="neither generation_config.json nor config.json has an eos"
    ):
        Tokens(str(folder))


# ---------------------------------------------------------------------------------------------
# Prompts

CHATML = (
    "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}\n"
    "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\n"
    "    {{- role + ': ' + message['content'] | trim + '<|turn|>' }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'model: ' }}{% endif %}"
)
DATED = (
    "{{ strftime_now('%d %b %Y') }} {{ messages | tojson }}"
    "{% for message in messages %}{% break %}{% endfor %}"
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
)


def chat_folder(path, template, in_config=False, **config):
    folder = write_small_checkpoint(path, byte_tokenizer(puts_begin=True), **config)
    fields = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    if in_config:
        fields["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return str(folder)


def test_the_alpaca_prompt(tokens):
    assert tokens.template == "alpaca"
    assert tokens.prompt(" Add. ", " 1 2 ") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert tokens.prompt("Add.").endswith("### Instruction:\nAdd.\n\n### Response:\n")


@pytest.mark.parametrize("in_config", [False, True])
def test_the_models_own_chat_template_is_used(in_config, tmp_path):
    pytest.importorskip("jinja2")
    tokens = Tokens(chat_folder(tmp_path / "model", CHATML, in_config))
    assert tokens.template == "chat"
    assert tokens.prompt("Add.", "1 2") == (
        "<|turn|>system\nYou are a helpful assistant.</s>\n"
        "<|turn|>user\nAdd.\n\nInput:\n1 2</s>\n<|turn|>assistant\n"
    )
    ids = tokens.encode(tokens.prompt("Add."))
    assert ids[0] == BEGIN and ids.count(BEGIN) == 1 and ids.count(TURN_END) == 3
    assert Tokens(str(tmp_path / "model"), "alpaca").prompt("Add.").startswith("Below is")
    wrapped = Tokens(str(tmp_path / "model"), "chat-alpaca").prompt("Add.")
    assert wrapped.startswith("<|turn|>user\nBelow is") and "system" not in wrapped


def test_a_template_without_a_system_role_and_with_its_own_begin(tmp_path):
    pytest.importorskip("jinja2")
    folder = chat_folder(tmp_path / "model", NO_SYSTEM, eos_token_id=[END, TURN_END])
    tokens = Tokens(folder)
    assert tokens.prompt("Add.") == "<s>user: Add.<|turn|>\nmodel: "
    assert tokens.encode(tokens.prompt("Add.")).count(BEGIN) == 1
    # Of the ids that end an answer, training appends the one that this template ends a turn with.
    assert tokens.stop == (END, TURN_END) and tokens.end == TURN_END


@pytest.mark.parametrize(
    "template", [CHATML, NO_SYSTEM, DATED], ids=["chatml", "no system", "dated"]
)
def test_chat_templates_render_as_in_transformers(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    folder = chat_folder(tmp_path / "model", template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    messages = [
        {"role": "user", "content": " Wie <gut> geht's? "},
        {"role": "assistant", "content": "ä"},
    ]
    chat = Tokens(folder).chat
    for add in (False, True):
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert chat.render(messages, add) == want


def test_a_template_that_is_not_jinja_says_so(tmp_path):
    pytest.importorskip("jinja2")
    folder = chat_folder(tmp_path / "model", "{% for %}")
    with pytest.raises(ValueError, match="chat template cannot be read.*--template alpaca"):
        Tokens(folder)
    assert Tokens(folder, "alpaca").chat is None


def test_a_template_that_is_asked_for_and_not_there(tokens, folder):
    with pytest.raises(ValueError, match="has no chat template; --template alpaca needs none"):
        Tokens(str(folder), "chat")


@pytest.mark.parametrize("module", ["safetensors", "tokenizers", "jinja2"])
def test_a_missing_package_gives_one_line(module, tmp_path, monkeypatch):
    chat_folder(tmp_path / "model", CHATML)
    data = str(write_sums(tmp_path / "sums.json"))
    monkeypatch.setitem(sys.modules, module, None)
    argv = ["--checkpoint", str(tmp_path / "model"), "--data", data, "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"needs the package {module}: pip install {module}$"):
        finetune.main([*argv, "--device", "cpu", "--steps", "1"])


# ---------------------------------------------------------------------------------------------
# Options


def parse(text):
    return finetune.parse_arguments(text.split())


def test_the_papers_recipe_and_what_overrides_it():
    args = parse("--checkpoint m --data x --recipe paper --rank 4")
    assert args.rank == 4
    assert args.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (args.lr, args.warmup, args.batch_size, args.epochs) == (3e-4, 100, 16, 3)
    assert (args.cutoff, args.over_cutoff, args.loss_on) == (256, "truncate", "all")
    assert (args.weight_decay, args.clip_norm, args.dropout, args.seed) == (0.0, 1.0, 0.05, 42)
    assert (args.validation, args.validate_every) == (120, 200)
    assert (args.beams, args.max_new_tokens, args.curvature) == (4, 512, [1.0])


@pytest.mark.parametrize(
    "recipe, family, alpha",
    [
        ("paper", "llama", 128),
        ("paper", "qwen2", 128),
        ("paper", "gemma3", 32),
        ("paper", "gemma3_text", 32),
        ("paper-commonsense", "llama", 128),
        ("paper-commonsense", "qwen2", 256),
        ("paper-commonsense", "gemma3", 32),
    ],
)
def test_the_recipes_alphas_are_the_authors(recipe, family, alpha):
    args = parse(f"--checkpoint m --data x --recipe {recipe}")
    assert finetune.choose_alpha(args, family, hyperbolic=True) == alpha
    assert finetune.choose_alpha(args, family, hyperbolic=False) == 64
    given = parse(f"--checkpoint m --data x --recipe {recipe} --alpha 5")
    assert finetune.choose_alpha(given, family, hyperbolic=True) == 5
    with pytest.raises(SystemExit, match="no alpha for the family mistral.*--alpha"):
        finetune.choose_alpha(args, "mistral", hyperbolic=True)


@pytest.mark.parametrize(
    "template, recipe, family, used",
    [
        (None, None, "llama", "alpaca"),
        (None, "paper", "llama", "alpaca"),
        (CHATML, None, "llama", "chat"),
        (CHATML, "paper", "llama", "chat-alpaca"),
        (CHATML, "paper", "qwen2", "chat"),
    ],
)
def test_the_recipe_prompts_as_the_authors_do(template, recipe, family, used, tmp_path):
    pytest.importorskip("jinja2")
    if template is None:
        write_small_checkpoint(tmp_path / "model", model_type=family)
    else:
        chat_folder(tmp_path / "model", template, model_type=family)
    data = write_sums(tmp_path / "sums.json")
    args = parse(f"--checkpoint {tmp_path}/model --data {data} --validation 5")
    args.recipe = recipe
    args.family = family
    tokens, _, _ = finetune.read_inputs(args)
    assert tokens.template == args.template == used


@pytest.mark.parametrize(
    "options, message",
    [
        ("--data x", "add --checkpoint DIR"),
        ("--eval x", "add --checkpoint DIR"),
        ("--checkpoint m", "add --data FILE, or --score-only ADAPTER"),
        ("--checkpoint m --score-only a", "add --eval FILE"),
        ("--checkpoint m --score-only a --eval x --data y", "trains nothing"),
        ("--checkpoint m --data x --predictions p", "add --eval FILE"),
        ("--checkpoint m --data x --rank 0", "at least 1"),
        ("--checkpoint m --data x --lr nan", "above 0"),
        ("--checkpoint m --data x --dropout 1", "in \\[0, 1\\)"),
        ("--checkpoint m --data x --curvature 0", "above 0"),
    ],
)
def test_options_that_clash_or_are_out_of_range_say_what_to_do(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(options)
    assert re.search(message, capsys.readouterr().err)


def test_shard_says_that_it_is_not_available():
    with pytest.raises(SystemExit, match="not available until the loading is rebuilt"):
        parse("--checkpoint m --data x --shard")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--targets", "query"], "query"),
        (["--cutoff", "20", "--over-cutoff", "truncate"], "--cutoff leaves nothing to learn"),
        (["--template", "chat"], "has no chat template"),
        (["--recipe", "paper", "--checkpoint", "mistral"], "no alpha for the family mistral"),
        (["--checkpoint", "nowhere"], "nowhere has no config.json"),
        (["--checkpoint", "small"], "has the token 257, and the model's vocab_size is 100"),
    ],
)
def test_what_is_wrong_is_found_before_the_weights_are_read(change, message, tmp_path, monkeypatch):
    write_small_checkpoint(tmp_path / "model")
    write_small_checkpoint(tmp_path / "mistral", model_type="mistral")
    write_small_checkpoint(tmp_path / "small", vocab_size=100)
    write_sums(tmp_path / "sums.json", count=200)
    monkeypatch.setattr(finetune, "from_checkpoint", lambda *arguments: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", "model", "--data", "sums.json", "--device", "cpu", *change]
    with pytest.raises(SystemExit, match=message):
        finetune.main(argv)


def test_columns_have_the_shortest_names_that_differ():
    paths = ["data/gsm8k/test.json", "data/SVAMP/test.json", "data/boolq.json"]
    assert list(finetune.column_names(paths).values()) == ["gsm8k/test", "SVAMP/test", "boolq"]
    paths = ["a/test.json", "a/test.jsonl"]
    assert list(finetune.column_names(paths).values()) == ["test.json", "test.jsonl"]
