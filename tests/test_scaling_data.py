"""What scaling/ reads (records, prompts, its own options), and how it scores."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers
from conftest import CHATML, END, SPECIAL, byte_tokenizer, write_folder, write_sums

from scaling import finetune, scoring
from scaling.data import ALPACA, Prompts, Record, read_prompts, read_records
from scaling.scoring import averages, is_right, pattern_of

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


@pytest.mark.parametrize("template", ["chat", "chat-alpaca"])
@pytest.mark.parametrize("chat", [CHATML, NO_SYSTEM, NO_PROMPT, THINKING, BLANK, TOOLS])
def test_prompt_and_answer_are_the_templates_own_conversation(chat, template):
    prompts = prompts_of(template, chat)
    prompt = prompts.prompt("Which <b>?", "1 2")
    prompt_ids, target_ids = prompts.split(prompt, "It is 7.")
    content = "Which <b>?\n\nInput:\n1 2"
    if template == "chat-alpaca":
        content = ALPACA.format(instruction="Which <b>?", input="### Input:\n1 2\n\n")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is 7."}]
    if template == "chat" and chat != NO_SYSTEM:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    whole = byte_tokenizer(chat).apply_chat_template(messages, return_dict=False)
    assert prompt_ids + target_ids == whole[: len(prompt_ids + target_ids)]
    assert prompts.decode(target_ids).strip() == "It is 7."
    assert target_ids[-1] == prompts.end == (TURN if chat == NO_SYSTEM else END)
    assert prompts.encode(prompt) == prompt_ids


def test_a_template_that_does_not_render_the_question_ends_the_run():
    for chat in ("{{ 'Hello' }}", "{% for %}", CHATML.replace("message['content']", "'x'")):
        with pytest.raises(SystemExit, match="the chat template .*--template alpaca"):
            prompts_of("chat", chat)


@pytest.mark.parametrize("puts_end", [False, True])
def test_the_alpaca_text_begins_once_and_ends_once(puts_end):
    prompts = prompts_of("alpaca", None, puts_end=puts_end)
    text = prompts.prompt("Add.", "1 2")
    assert text.endswith(".\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    for output in ("It is 3.", "It is 3.</s>"):  # An output may bring the end token along.
        prompt_ids, target_ids = prompts.split(text, output)
        assert prompt_ids == [256, *text.encode()] or prompts.decode(prompt_ids) == text
        assert prompts.decode(target_ids) == "It is 3."
        ids = prompt_ids + target_ids
        assert ids[0] == 256 and ids.count(256) == 1 and ids[-1] == END and ids.count(END) == 1


def test_the_end_tokens_are_the_generation_configs(tmp_path):
    folder = Path(write_folder(tmp_path / "model", chat_template=NO_SYSTEM))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, TURN]}))
    prompts = read_prompts(parse(f"--checkpoint {folder}"))
    assert prompts.stop == [END, TURN] and prompts.end == TURN and prompts.template == "chat"
    assert read_prompts(parse(f"--checkpoint {folder} --recipe paper")).template == "chat-alpaca"
    saved = dict(template="chat", stop=[END], chat_template=CHATML)
    assert read_prompts(parse(f"--checkpoint {folder}"), saved).prompt("Hi").startswith("<|turn|>")
    with pytest.raises(SystemExit, match="m is no folder"):
        read_prompts(parse())
    with pytest.raises(SystemExit, match="has no tokenizer"):  # It is Gemma's without its files.
        Prompts(transformers.GemmaTokenizer(), [END], "alpaca")


def read(tmp_path, text, **settings):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode())
    return read_records(str(path), prompts_of("alpaca", None), **settings)


@pytest.mark.parametrize("mark, newline", [("", "\n"), ("\ufeff", "\r\n")])
def test_lists_and_lines_are_read_as_utf8(mark, newline, tmp_path):
    odd = "naïve 漢字 a\u2028b\x85d"
    lines = [json.dumps(record(i, output=odd), ensure_ascii=False) for i in range(2)]
    for text in (newline.join(lines) + newline, "[" + ",".join(lines) + "]"):
        found = read(tmp_path, mark + text, training=parse())
        assert [byte_tokenizer().decode(r.target_ids[:-1]) for r in found] == [odd, odd]


def test_what_is_not_json_ends_the_run_with_its_position(tmp_path):
    messages = {"[{}]\n[{}]": "no JSON list and no JSON lines: .*Extra data"}
    messages['{"a": 1}\n{"a": 2}\n{"a"'] = "record 3: .*delimiter"
    messages["[]"] = "no usable record"
    for text, message in messages.items():
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


def test_the_recipes_are_the_authors():
    args = parse("--recipe paper --rank 4")
    assert (args.rank, args.targets[0], args.targets[-1]) == (4, "q_proj", "down_proj")
    assert (args.lr, args.warmup_steps, args.batch_size, args.epochs) == (3e-4, 100, 16, 3)
    assert (args.cutoff, args.loss_on, args.dropout, args.seed) == (256, "all", 0.05, 42)
    assert (args.curvature, args.beams, args.max_new_tokens) == ([math.inf, 1.0], 4, 512)
    assert parse("--recipe paper-commonsense").max_new_tokens == 32
    for recipe, qwen2 in (("paper", 128), ("paper-commonsense", 256)):
        args = parse(f"--recipe {recipe}")
        alphas = {"llama": 128, "qwen2": qwen2, "gemma": 128, "gemma3": 32, "gemma3_text": 32}
        for family, alpha in alphas.items():
            assert finetune.choose_alpha(args, family, 1.0) == alpha
            assert finetune.choose_alpha(args, family, math.inf) == 64
    with pytest.raises(SystemExit, match="no alpha for mistral: give --alpha"):
        finetune.choose_alpha(args, "mistral", 1.0)


@pytest.mark.parametrize(
    "family, percent, sizes",
    [
        ("llama", "0.70", [128256, 4096, 14336, 32, 32, 8]),  # Llama 3 8B
        ("qwen2", "0.71", [152064, 3584, 18944, 28, 28, 4]),  # Qwen2.5 7B
        ("gemma3", "1.04", [262208, 2560, 10240, 34, 8, 4]),  # Gemma 3 4B
    ],
)
def test_the_trainable_share_is_the_papers(family, percent, sizes):
    heads = "num_hidden_layers num_attention_heads num_key_value_heads"
    fields = dict(zip(f"vocab_size hidden_size intermediate_size {heads}".split(), sizes))
    if family == "gemma3":  # Its vision tower does not count.
        fields = dict(text_config=fields | dict(head_dim=256))
    config = transformers.AutoConfig.for_model(family, **fields)
    args = parse("--recipe paper")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        names = finetune.adapter_targets(model, args.targets)
        finetune.hyplora.inject_hyplora(model, names, rank=args.rank)
    assert f"{finetune.share_of(model)['share %']:.2f}" == percent


@pytest.mark.parametrize("missing", [["transformers"], ["transformers", "tqdm"]])
def test_without_transformers_there_is_one_line_that_says_what_to_install(missing):
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import scaling.finetune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == done.stderr.count("\n") == 1
    assert "pip install transformers" in done.stderr


RULES = [
    ("5 and 7 make 12. The answer is 1,200.", "1,200.0", True),
    ("12, or rather 12.002", "12", False),
    ("0.3339", "0.333", True),
    ("It falls by -3.5", "-35e-1", True),
    ("(B) or (C)", "B", True),
    ("A guess. The answer is (D).", "D", False),  # The rule takes the A of the first word.
    ("not false but true", "true", False),
    ("It is Solution2.", "solution2", True),
    ("an answer12 and TRUE", "answer1", True),  # A word is found inside others.
]
RELEASED = {"(A) or (C)": "C", r"\boxed{B} (C)": "B", r"\boxed{\text{E}} (C)": "E", "Option D": "D"}


def test_the_rules_and_what_none_of_them_could_score():
    for output, answer, right in RULES:
        assert is_right(output, answer) is right, output
    for output, letter in (RELEASED | {"A? The answer is: C": "C", "It is B.": "B"}).items():
        assert is_right(output, letter, letters="released"), output
    assert not is_right("A", "A", letters="released")
    for answer in ("", "maybe", "F", "a", "nan", "inf", "1/2", "12 apples", "answer6"):
        with pytest.raises(ValueError, match="cannot be scored"):
            pattern_of(answer)


def test_letters_are_scored_by_the_rule_of_the_option(monkeypatch):
    monkeypatch.setattr(finetune, "generate_answers", lambda *a: ["A train: the answer is C"])
    tests = {"t.json": [Record(1, [], [], "C")]}
    found = finetune.score(None, "base", parse("--letters released"), None, tests)
    assert found == {"% t": 100, "M.AVG": 100}


def test_the_averages_are_micro_for_arithmetic_and_macro_for_commonsense():
    results = [(["1"] * 8, [True] * 3 + [False] * 5), (["A", "B"], [True, True])]
    results += [(["true", "false"], [True, False]), (["ending4", "option2"] * 4, [True] * 8)]
    assert averages(results) == {"M.AVG": pytest.approx(50.0), "AVG": pytest.approx(75.0)}
    assert averages([]) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_means_greedy_and_answers_come_back_in_order(family, tmp_path):
    """The folder asks for sampling, a penalty and a length; a batch has padding on the left."""
    folder = Path(write_folder(tmp_path / "model", family))
    asked = dict(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, min_length=300)
    (folder / "generation_config.json").write_text(json.dumps(asked | {"eos_token_id": END}))
    args = parse(f"--checkpoint {folder} --max-new-tokens 8")
    model = finetune.place(finetune.load_base(args), args)
    prompts = Prompts(byte_tokenizer(), [END], "alpaca")
    records = [Record(1, prompts.encode("word " * i), [], "0") for i in (5, 1, 9, 3)]
    answers = scoring.generate_answers(model, records, prompts, args, "")
    for record, answer in zip(records, answers):
        ids = list(record.prompt_ids)  # and now token by token, without padding or cache
        while len(ids) < len(record.prompt_ids) + 8 and END not in ids:
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer == prompts.decode(ids[len(record.prompt_ids) :])
    assert len(set(answers)) > 1


def test_batches_have_few_tokens():
    """A model and a tokenizer that only write down what they are given."""
    model = Mock(generate=Mock(side_effect=lambda input_ids, **options: input_ids))
    prompts = argparse.Namespace(stop=[END, TURN], end=END, decode=lambda row: "")
    args = argparse.Namespace(max_new_tokens=100, beams=4, device="cpu")
    records = [Record(1, [7] * length, [], "") for length in (20, 9000, 900, *80 * [50])]
    scoring.generate_answers(model, records, prompts, args, "")
    asked = [call.kwargs for call in model.generate.call_args_list]
    seen = [options["input_ids"] for options in asked]
    assert sum(len(ids) for ids in seen) == 83 and seen[0].shape == (1, 9000)
    for ids in seen:
        assert len(ids) == 1 or len(ids) * (ids.shape[1] + 100) * 4 <= 16384
    assert max(len(ids) for ids in seen) > 15
    assert asked[0]["num_beams"] == 4 and asked[0]["eos_token_id"] == [END, TURN]


def test_predictions_and_a_saved_adapter_that_knows_how_it_was_trained(tmp_path):
    folder = write_folder(tmp_path / "model", chat_template=CHATML)
    sums = write_sums(tmp_path / "SVAMP.json", count=4)
    words = tmp_path / "boolq.json"
    words.write_text(json.dumps([{"instruction": "Is it?", "input": "", "answer": True}] * 2))
    said = tmp_path / "said.jsonl"
    scored = ["--eval", sums, str(words), "--predictions", str(said), "--max-new-tokens", "3"]
    argv = ["--checkpoint", folder, "--device", "cpu", *scored]
    train = ["--data", write_sums(tmp_path / "sums.json"), "--steps", "20", "--lr", "1e-2"]
    more = ["--template", "alpaca", "--out", str(tmp_path / "out"), "--curvature", "0.5"]
    base, adapted = finetune.main([*argv, *train, *more])
    columns = [*(f"% {path.removesuffix('.json')}" for path in (sums, str(words))), "M.AVG", "AVG"]
    assert list(base) == ["adapter", "trainable", "share %", "loss", *columns]
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert [line["record"] for line in lines] == [1, 2, 3, 4, 1, 2] * 2
    assert lines[-1]["answer"] == "true" and lines[-1]["adapter"] == "HypLoRA-0.5"
    again = [*argv, "--score-only", str(tmp_path / "out" / "HypLoRA-0.5.pt")]
    (only,) = finetune.main(again)
    outputs = [line["output"] for line in lines]
    repeated = [json.loads(line)["output"] for line in said.read_text().splitlines()]
    assert repeated == outputs[6:] != outputs[:6]
    assert {column: only[column] for column in columns} == {c: adapted[c] for c in columns}
    finetune.main([*again, "--dtype", "bfloat16"])  # the same base
    other = write_folder(tmp_path / "other", seed=1)
    refused = {"was trained with --template alpaca: leave it out": ["--template", "chat"]}
    refused["was trained on another base"] = ["--checkpoint", other]
    refused["^2$"] = ["--predictions", f"{folder}/../SVAMP.json"]  # This is the file sums.
    files = [Path(path).read_bytes() for path in (said, sums)]
    for message, more in refused.items():
        with pytest.raises(SystemExit, match=message):
            finetune.main([*again, *more])
    assert files == [Path(path).read_bytes() for path in (said, sums)] and all(files)


def test_a_folder_that_lacks_a_tensor_ends_the_run(tmp_path):
    folder = write_folder(tmp_path / "model", num_hidden_layers=1)
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(SystemExit, match="lacks the tensors .*layers.1"):
        finetune.load_base(parse(f"--checkpoint {folder}"))
