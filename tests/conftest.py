"""Small random models in folders as a hub distributes them, and data: nothing to download."""

import json
import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter is chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

END = 257
SPECIAL = {"<s>": 256, "</s>": END, "<|turn|>": 258, "<pad>": 259}
CHATML = (
    "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TOKENS = dict(vocab_size=260, bos_token_id=256, eos_token_id=END, pad_token_id=259)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
SIZES = TOKENS | HEADS | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
GEMMA = SIZES | dict(head_dim=8, sliding_window=16)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=28, patch_size=14)
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | dict(sliding_window=16),
    "qwen2": SIZES,
    "qwen3": SIZES | dict(head_dim=8),
    "gemma3_text": GEMMA,
    "gemma3": dict(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4),
    # Learned positions, biases, layers that store their weight transposed: impossible before.
    "gpt2": TOKENS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=2048),
}


def byte_tokenizer(chat_template=None, puts_end=False):
    """A tokenizer with a token for each byte, which puts <s> before a text, and </s> if asked."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    single = "<s> $A </s>" if puts_end else "<s> $A"
    special = list(SPECIAL.items())
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    options = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    options |= dict(tokenizer_object=tokenizer, chat_template=chat_template)
    return transformers.PreTrainedTokenizerFast(**options)


def write_folder(folder, family="llama", seed=0, chat_template=None, **config):
    """Write a random model of a family with a byte tokenizer, and return the folder as text."""
    import transformers

    torch.manual_seed(seed)
    fields = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **config})
    model = transformers.AutoModelForCausalLM.from_config(fields)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # large enough for what it says to depend on what it reads
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


def write_sums(path, count=40, first=0):
    """Records in the paper's format: What is n + n?"""
    records = []
    for n in range(first, first + count):
        record = {"instruction": f"What is {n} + {n}?", "input": ""}
        records.append(record | {"output": f"The answer is {2 * n}.", "answer": f"{2.0 * n}"})
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    pytest.importorskip("transformers", reason="pip install transformers")
    return write_folder(tmp_path_factory.mktemp("llama") / "model")
