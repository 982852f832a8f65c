"""What scaling/ reads: records, prompts, and its own options.

pip install transformers
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers
from conftest import CHATML, END, SPECIAL, byte_tokenizer, write_folder, write_sums

from scaling import finetune
from scaling.data import Prompts, read_prompts, read_records

ROOT = Path(__file__).parent.parent
TURN = SPECIAL["<|turn|>"]
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] | trim + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_PROMPT = CHATML[: CHATML.index("{% if add_generation_prompt")]
THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
BLANK = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + '</s>' }}{% elif message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TOOLS = CHATML + "{% if tools is not none or documents is not none %}{{ 'TOOLS' }}{% endif %}"


def record(n, **fields):
    return {"instruction": f"What is {n}?", "input": "", "output": f"{n}", "answer": n, **fields}


def parse(line=""):
    return finetune.parse_arguments(f"--checkpoint m --data x --device cpu {line}".split())


def prompts_of(template, chat, **settings):
    return Prompts(byte_tokenizer(chat, **settings), [END, TURN], template)


# --- Prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "chat-alpaca"])
@pytest.mark.parametrize("chat", [CHATML, NO_SYSTEM, NO_PROMPT, THINKING, BLANK, TOOLS])
def test_prompt_and_answer_are_the_templates_own_conversation(chat, template):
    prompts = prompts_of(template, chat)
    prompt = prompts.prompt("Which <b>?", "1 2")
    prompt_ids, target_ids = prompts.split(prompt, "It is 7.")
    content = "Which <b>?\n\nInput:\n1 2"
    if template == "chat-alpaca":
        content = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nWhich <b>?\n\n### Input:\n1 2\n\n"
            "### Response:"
        ) + ("" if chat == NO_SYSTEM else "\n")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is 7."}]
    if template == "chat" and chat != NO_SYSTEM:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    whole = byte_tokenizer(chat).apply_chat_template(messages, return_dict=False)
    assert prompt_ids + target_ids == whole[: len(prompt_ids + target_ids)]
    assert prompts.decode(target_ids).strip() == "It is 7."
    assert target_ids[-1] == prompts.end == (TURN if chat == NO_SYSTEM else END)
    assert prompts.encode(prompt) == prompt_ids


@pytest.mark.parametrize(
    "chat", ["{{ 'Hello' }}", "{% for %}", CHATML.replace("message['content']", "'x'")]
)
def test_a_template_that_does_not_render_the_question_ends_the_run(chat):
    with pytest.raises(SystemExit, match="the chat template .*--template alpaca"):
        prompts_of("chat", chat)


@pytest.mark.parametrize("puts_end", [False, True])
def test_the_alpaca_text_begins_once_and_ends_once(puts_end):
    prompts = prompts_of("alpaca", None, puts_end=puts_end)
    text = prompts.prompt("Add.", "1 2")
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    for output in ("It is 3.", "It is 3.</s>"):  # An output may bring the end token along.
        prompt_ids, target_ids = prompts.split(text, output)
        assert prompt_ids == [256, *text.encode()] or prompts.decode(prompt_ids) == text
        assert prompts.decode(target_ids) == "It is 3."
        ids = prompt_ids + target_ids
        assert ids[0] == 256 and ids.count(256) == 1 and ids[-1] == END and ids.count(END) == 1


def test_the_end_tokens_are_the_generation_configs(tmp_path):
    folder = Path(write_folder(tmp_path / "model", chat_template=NO_SYSTEM))
    args = parse(f"--checkpoint {folder}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, TURN]}))
    prompts = read_prompts(args)
    assert prompts.stop == [END, TURN] and prompts.end == TURN and prompts.template == "chat"
    (folder / "generation_config.json").unlink()
    assert read_prompts(args).stop == [END]
    args.recipe = "paper"
    assert read_prompts(args).template == "chat-alpaca"  # as the authors ask Llama 3
    args.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        read_prompts(args)


def test_a_date_in_the_template_does_not_keep_a_run_from_resuming(tmp_path, capsys):
    dated = CHATML.replace("{% for", "{{ strftime_now('%f')[:2] }}{% for", 1)
    folder = write_folder(tmp_path / "model", chat_template=dated)
    argv = ["--checkpoint", folder, "--data", write_sums(tmp_path / "sums.json"), "--steps", "1"]
    argv += ["--curvature", "inf", "--device", "cpu", "--out", str(tmp_path / "out")]
    finetune.main(argv)
    finetune.main([*argv, "--resume"])
    assert "going on from step 1" in capsys.readouterr().out


# --- Records ------------------------------------------------------------------------------------


def read(tmp_path, text, **settings):
    path = tmp_path / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_records(str(path), prompts_of("alpaca", None), **settings)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lists_and_lines_are_read_as_utf8(mark, newline, tmp_path):
    odd = "naïve 漢字 a\u2028b\x85d"
    lines = [json.dumps(record(i, output=odd), ensure_ascii=False) for i in range(2)]
    for text in (newline.join(lines) + newline, "[" + ",".join(lines) + "]"):
        found = read(tmp_path, mark + text, training=parse())
        decoded = [byte_tokenizer().decode(r.target_ids[:-1]) for r in found]
        assert decoded == [odd, odd]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[{}]\n[{}]", "no JSON list and no JSON lines: .*Extra data"),
        ('{"a": 1}\n{"a": 2}\n{"a"', "record 3: .*delimiter"),
        (b"\xff\xfe", "can't decode"),
        ("[]", "no usable record"),
        (json.dumps(record(1), indent=1), "no JSON list and no JSON lines: record 1"),
    ],
)
def test_what_is_not_json_ends_the_run_with_its_position(text, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        read(tmp_path, text)


def test_fields_that_are_missing_and_fields_that_are_numbers(tmp_path, capsys):
    nan = math.nan  # what pandas writes for a missing field
    found = [record(1, input=nan), record(2, output=nan), record(3, output=7), {"output": "x"}]
    found += [record(5, input=None), record(6, output="\ud800"), record(7, output=["x"]), 8]
    kept = read(tmp_path, json.dumps(found), training=parse())
    assert [r.position for r in kept] == [1, 3, 5]
    same = read(tmp_path, json.dumps([record(1)]), training=parse())[0]
    assert kept[0].prompt_ids == same.prompt_ids and kept[1].target_ids == [*b"\x16", END]
    said = capsys.readouterr().out
    assert "3 records, 0 of them cut; 5 left out ['record 2: output is missing" in said
    found = [record(1, answer="maybe"), record(2, answer=True), record(3, answer=nan)]
    assert [r.answer for r in read(tmp_path, json.dumps(found))] == ["true"]


def test_long_records_are_cut_and_what_teaches_nothing_is_left_out(tmp_path, capsys):
    text = json.dumps([record(1), record(2, output=300 * "x")])
    room = len(read(tmp_path, text, training=parse())[0].prompt_ids)
    for cutoff, loss_on, lengths in ((room + 9, "answer", [2, 9]), (room - 9, "all", [0, 0])):
        more = f"--cutoff {cutoff} --loss-on {loss_on}"
        kept = read(tmp_path, text, training=parse(more))
        assert [len(r.target_ids) for r in kept] == lengths
        assert f"2 records, {lengths.count(9) or 2} of them cut" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no usable record"):
        read(tmp_path, text, training=parse(f"--cutoff {room}"))


# --- Options ------------------------------------------------------------------------------------


def test_the_papers_recipe_and_what_overrides_it():
    args = parse("--recipe paper --rank 4")
    assert args.rank == 4
    assert args.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (args.lr, args.warmup_steps, args.batch_size, args.epochs) == (3e-4, 100, 16, 3)
    assert (args.cutoff, args.loss_on, args.dropout, args.seed) == (256, "all", 0.05, 42)
    assert (args.curvature, args.beams, args.max_new_tokens) == ([math.inf, 1.0], 4, 512)
    args = parse("--recipe paper-commonsense")
    assert (args.max_new_tokens, args.rank) == (32, 32)


@pytest.mark.parametrize(
    "family, paper, commonsense",
    [("llama", 128, 128), ("qwen2", 128, 256), ("gemma", 128, 128), ("gemma3_text", 32, 32)],
)
def test_the_recipes_alphas_are_the_authors(family, paper, commonsense):
    for recipe, alpha in (("paper", paper), ("paper-commonsense", commonsense)):
        args = parse(f"--recipe {recipe}")
        assert finetune.choose_alpha(args, family, 1.0) == alpha
        assert finetune.choose_alpha(args, family, math.inf) == 64
        with pytest.raises(SystemExit, match="no alpha for mistral: give --alpha"):
            finetune.choose_alpha(args, "mistral", 1.0)
        assert finetune.choose_alpha(parse(f"--recipe {recipe} --alpha 5"), "mistral", 1.0) == 5
    assert finetune.choose_alpha(parse(), family, 1.0) == 16


# The sizes of Llama 3 8B, Qwen2.5 7B and Gemma 3 4B, in the order of NAMES.
NAMES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
PAPERS = {
    "llama": ([128256, 4096, 14336, 32, 32], 8, "0.70"),
    "qwen2": ([152064, 3584, 18944, 28, 28], 4, "0.71"),
    "gemma3": ([262208, 2560, 10240, 34, 8], 4, "1.04"),
}


@pytest.mark.parametrize("family", PAPERS)
def test_the_trainable_share_is_the_papers(family):
    sizes, heads, percent = PAPERS[family]
    fields = dict(zip(NAMES, sizes), num_key_value_heads=heads)
    if family == "gemma3":  # Its vision tower does not count.
        fields = dict(text_config=fields | dict(head_dim=256))
    config = transformers.AutoConfig.for_model(family, **fields)
    args = parse("--recipe paper")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        names = finetune.adapter_targets(model, args.targets)
        finetune.hyplora.inject_hyplora(model, names, rank=args.rank)
    assert f"{finetune.share_of(model)['share %']:.2f}" == percent


@pytest.mark.parametrize(
    "line, message",
    [
        ("--data x", "--checkpoint"),
        ("--checkpoint m", "either train with --data FILE, or score"),
        ("--checkpoint m --score-only a --data x", "either train with --data FILE, or score"),
        ("--checkpoint m --score-only a", "need --eval FILE"),
        ("--checkpoint m --data x --predictions p", "need --eval FILE"),
        ("--checkpoint m --data x --shard", "torchrun"),
    ],
)
def test_options_that_clash_say_what_to_do(line, message, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_arguments(line.split())
    assert re.search(message, capsys.readouterr().err)


def test_what_the_layers_cannot_be_is_said_before_anything_is_trained(llama, tmp_path):
    argv = ["--checkpoint", llama, "--data", write_sums(tmp_path / "sums.json"), "--steps", "1"]
    argv += ["--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="rank >= 1.*got"):
        finetune.main([*argv, "--rank", "0"])
    with pytest.raises(ValueError, match="list of names.*'q_proj'.*got .'query'"):
        finetune.main([*argv, "--targets", "query"])


def test_without_transformers_there_is_one_line_and_the_rules_still_work():
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "from scaling.scoring import is_right; print(is_right('It is 5.', 5))\n"
    code += "import scaling.finetune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "True\n"
    assert done.stderr.count("\n") == 1 and "pip install transformers" in done.stderr
