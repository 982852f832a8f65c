"""train_minimal.py's GPT against transformers, on small random checkpoints of each family in the hubs' layout.

pip install transformers safetensors
"""

import json
import shutil

import pytest
import torch

from train_minimal import GPT, from_checkpoint, load_checkpoint, parse_arguments, read_config

transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("safetensors", reason="pip install safetensors")
torch.set_num_threads(1)

SMALL = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
FAMILIES = {
    "llama 2": ("Llama", SMALL),
    "llama, biased": ("Llama", dict(SMALL, attention_bias=True, head_dim=16)),
    "llama 3.1": ("Llama", dict(SMALL, rope_parameters=LLAMA3, num_key_value_heads=4)),
    "llama 3.2, tied": ("Llama", dict(SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(SMALL, sliding_window=None, head_dim=16)),
    "mistral, window": ("Mistral", dict(SMALL, sliding_window=8)),
    "qwen2": ("Qwen2", dict(SMALL, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2, tied": ("Qwen2", dict(SMALL, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(SMALL, head_dim=16)),
    "gemma3": (
        "Gemma3Text",
        dict(SMALL, head_dim=16, sliding_window=8, query_pre_attn_scalar=24, num_hidden_layers=7,
             layer_types=3 * ["sliding_attention", "full_attention"] + ["sliding_attention"]),
    ),
}  # fmt: skip


def saved(family, dtype, folder):
    """A random checkpoint in several files, and the transformers model in float32 that reads it."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    classes = {"Gemma3Text": "Gemma3ForCausalLM"}
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(config)
    for parameter in model.parameters():  # norms and biases too, so that none can be left out unseen
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.0 if name == "Gemma3Text" else 1.0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder, *more):
    args = parse_arguments(["--checkpoint", str(folder), "--data", "-", *more])
    return from_checkpoint(args, torch.device("cpu")).eval()


IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
WORST = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_generation_equal_transformers(family, dtype, tmp_path):
    theirs, model = saved(family, dtype, tmp_path), ours(tmp_path)
    with torch.no_grad():
        want, got = theirs(IDS).logits, model(IDS)
        error = ((got - want).norm() / want.norm()).item()
        print(f"\nparity | {family} | {str(dtype)[6:]} | {error:.1e} |")
        assert error < 1e-4
        want = theirs.generate(IDS[:, :20], max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert torch.equal(model.generate(IDS[:, :20], 64), want)
        # Left padding: each row alone gives what it gives in the batch.
        padded = IDS[:, :20].clone()
        padded[1, :7] = 0
        alone = model.generate(IDS[1:, 7:20], 30)[0, 13:]
        assert torch.equal(model.generate(padded, 30, pad=torch.tensor([0, 7]))[1, 20:], alone)


def test_older_config_files_mean_the_same(tmp_path):
    """rope_theta and rope_scaling beside each other, as files before transformers 5 have them."""
    saved("llama 3.1", torch.float32, tmp_path)
    new = read_config(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    path.write_text(json.dumps(config))
    assert read_config(tmp_path).rope["full_attention"] == new.rope["full_attention"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="gpt_neox"), "gpt_neox.*supported are llama"),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "rope_type 'yarn'"),
        (dict(hidden_act="relu"), "hidden_act 'relu'"),
        (dict(mlp_bias=True), "mlp_bias True"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
    saved("llama 2", torch.float32, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_tensors_that_do_not_fit_are_named_before_any_is_read(tmp_path):
    saved("llama 2", torch.float32, tmp_path / "two")
    saved("llama, biased", torch.float32, tmp_path / "biased")
    with pytest.raises(ValueError, match="misses: model.layers.0.self_attn.k_proj.bias"):
        load_checkpoint(GPT(read_config(tmp_path / "biased")), tmp_path / "two")
    config = read_config(tmp_path / "two")
    model = GPT(config)
    before = model.lm_head.weight.clone()
    config.head_dim = 16
    with pytest.raises(ValueError, match="unknown: .*k_proj.bias"):
        load_checkpoint(GPT(config), tmp_path / "biased")
    config.hidden_size = 64
    with pytest.raises(ValueError, match="shape: .*embed_tokens.weight"):
        load_checkpoint(GPT(config), tmp_path / "two")
    for file in (tmp_path / "two").glob("*.safetensors"):
        shutil.move(file, tmp_path)
    with pytest.raises(ValueError, match="no .*safetensors"):
        load_checkpoint(model, tmp_path / "two")
    assert torch.equal(model.lm_head.weight, before)
