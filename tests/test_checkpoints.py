"""The decoder of scaling/ against transformers, on small random checkpoints in the hubs' layout.

pip install transformers safetensors
"""

import json
import math
import shutil

import pytest
import torch

from hyplora import inject_hyplora
from scaling.checkpoint import from_checkpoint, load_checkpoint, read_config
from scaling.decoder import Decoder
from scaling.finetune import adapter_size, table
from scaling.scoring import beam_search, greedy

transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("safetensors", reason="pip install safetensors")
torch.set_num_threads(1)

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=1e5, factor=4.0)
FULL = "full_attention"
SLIDING = "sliding_attention"
FAMILIES = {
    "llama 2": ("Llama", SMALL),
    "llama, biased": ("Llama", dict(SMALL, attention_bias=True, head_dim=16)),
    "llama, linear rope": ("Llama", dict(SMALL, rope_parameters=LINEAR)),
    "llama 3.1": ("Llama", dict(SMALL, rope_parameters=LLAMA3, num_key_value_heads=4)),
    "llama 3.2, tied": ("Llama", dict(SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(SMALL, sliding_window=None, head_dim=16)),
    "mistral, window": ("Mistral", dict(SMALL, sliding_window=8)),
    "qwen2": ("Qwen2", dict(SMALL, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2, tied": ("Qwen2", dict(SMALL, tie_word_embeddings=True)),
    "qwen2, window from layer 1": (
        "Qwen2",
        dict(SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(SMALL, head_dim=16)),
    "qwen3, biased": ("Qwen3", dict(SMALL, head_dim=16, attention_bias=True)),
    "gemma": ("Gemma", dict(SMALL, head_dim=16, num_key_value_heads=1)),
    "gemma3": (
        "Gemma3Text",
        dict(
            SMALL,
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=24,
            num_hidden_layers=7,
            layer_types=3 * [SLIDING, FULL] + [SLIDING],
        ),
    ),
}


def saved(family, dtype, folder):
    """A random checkpoint in several files, and the transformers model in float32 that reads it."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    classes = {"Gemma3Text": "Gemma3ForCausalLM"}
    return save(
        getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(config), dtype, folder
    )


def save(model, dtype, folder):
    torch.manual_seed(0)
    gemma = "Gemma" in type(model).__name__
    for parameter in model.parameters():
        if parameter.ndim == 1:  # Norms and biases too, so that none can be left out unseen.
            torch.nn.init.normal_(parameter, 0.0 if gemma else 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder):
    return from_checkpoint(str(folder), torch.float32, torch.device("cpu")).eval()


IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_generation_equal_transformers(family, dtype, tmp_path):
    theirs = saved(family, dtype, tmp_path)
    model = ours(tmp_path)
    with torch.no_grad():
        error = relative_error(model(IDS), theirs(IDS).logits)
        print(f"\nparity | {family} | {str(dtype)[6:]} | {error:.1e} |")
        assert error < 1e-4
        want = theirs.generate(IDS[:, :20], max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert torch.equal(greedy(model, IDS[:, :20], 64), want)
        # With left padding, each row gives in the batch what it gives alone.
        padded = IDS[:, :20].clone()
        padded[1, :7] = 0
        alone = greedy(model, IDS[1:, 7:20], 30)[0, 13:]
        together = greedy(model, padded, 30, pad=torch.tensor([0, 7]))
        assert torch.equal(together[1, 20:], alone)


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("stop", [(2,), (2, 5)], ids=["one end", "two ends"])
@pytest.mark.parametrize("family", ["llama 2", "qwen2", "gemma3"])
def test_beam_search_equals_transformers(family, stop, beams, tmp_path):
    theirs = saved(family, torch.float32, tmp_path)
    model = ours(tmp_path)
    # Ends must be likely enough to occur early, late and never among the rows.
    ids = torch.randint(6, 128, (8, 12), generator=torch.Generator().manual_seed(2))
    ids[0, :5] = 0
    ids[3, :2] = 0
    pad = torch.tensor([5, 0, 0, 2, 0, 0, 0, 0])
    mask = torch.arange(12) >= pad[:, None]
    for boost in (0.0, 1.5, 3.0):
        with torch.no_grad():
            for net in (theirs, model):
                head = net.get_output_embeddings() if net is theirs else net.lm_head
                head.weight[list(stop)] *= 1 + boost
        want = theirs.generate(
            ids,
            attention_mask=mask.long(),
            max_new_tokens=16,
            num_beams=beams,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
        )[:, 12:]
        got = beam_search(model, ids, 16, pad, stop, beams)[:, 12:]
        for row, (a, b) in enumerate(zip(got.tolist(), want.tolist())):
            assert until_end(a, stop) == until_end(b, stop), (boost, row)


def until_end(tokens, stop):
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[: i + 1]
    return tokens


def edit_config(folder, remove=(), **change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in remove:
        config.pop(name)
    path.write_text(json.dumps({**config, **change}))


def test_fields_that_change_nothing_are_accepted(tmp_path):
    """SmolLM2's config.json on the hub has such fields beside those of a Llama."""
    saved("llama 2", torch.float32, tmp_path)
    config = read_config(tmp_path)
    more = {"transformers.js_config": {"dtype": "fp16"}, "_name": "x", "new_switch": False}
    edit_config(tmp_path, is_llama_config=True, rope_interleaved=False, pretraining_tp=2, **more)
    assert read_config(tmp_path) == config


def test_older_config_files_mean_the_same(tmp_path):
    """Files before transformers 5 have rope_theta and rope_scaling beside each other."""
    saved("llama 3.1", torch.float32, tmp_path)
    new = read_config(tmp_path)
    rope = dict(LLAMA3)
    theta = rope.pop("rope_theta")
    edit_config(tmp_path, ["rope_parameters"], rope_theta=theta, rope_scaling=rope)
    assert read_config(tmp_path) == new


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="gpt_neox"), "gpt_neox.*supported are llama"),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "'yarn'"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
        (dict(rope_scaling=dict(type="linear")), "factor of 'linear' must be above 0, not None"),
        (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(hidden_act="relu"), "hidden_act 'relu'"),
        (dict(mlp_bias=True), "mlp_bias True"),
        (dict(attention_dropout=0.1), "attention_dropout 0.1"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention True"),
        (dict(is_causal=False), "is_causal False"),
        (dict(auto_map={"AutoModelForCausalLM": "modeling_x.X"}), "auto_map"),
        (dict(sliding_window=8), "sliding_window 8"),
        (dict(layer_types=[SLIDING, FULL, FULL]), "layer_types"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(residual_multiplier=0.22), "residual_multiplier 0.22 is not supported for llama"),
        (dict(hidden_size="32"), "hidden_size must be a whole number"),
        (dict(num_key_value_heads=3), "multiple of num_key_value_heads"),
        (dict(num_attention_heads=5, num_key_value_heads=1, head_dim=None), "hidden_size must be"),
        (dict(head_dim=7), "head_dim must be even, not 7"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be at least 1"),
        (dict(rope_parameters="linear"), "rope_parameters must be a JSON object"),
        (dict(rms_norm_eps="small"), "rms_norm_eps must be a number above 0"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
    saved("llama 2", torch.float32, tmp_path)
    if "rope_scaling" in change:
        edit_config(tmp_path, ["rope_parameters"])
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_tensors_that_do_not_fit_are_named_before_any_is_read(tmp_path):
    saved("llama 2", torch.float32, tmp_path / "two")
    saved("llama, biased", torch.float32, tmp_path / "biased")
    with pytest.raises(ValueError, match="misses: model.layers.0.self_attn.k_proj.bias"):
        load_checkpoint(Decoder(read_config(tmp_path / "biased")), tmp_path / "two")
    config = read_config(tmp_path / "two")
    model = Decoder(config)
    before = model.lm_head.weight.clone()
    config.head_dim = 16
    with pytest.raises(ValueError, match="unknown: .*k_proj.bias"):
        load_checkpoint(Decoder(config), tmp_path / "biased")
    config.hidden_size = 64
    with pytest.raises(ValueError, match="shape: .*embed_tokens.weight"):
        load_checkpoint(Decoder(config), tmp_path / "two")
    for file in (tmp_path / "two").glob("*.safetensors"):
        shutil.move(file, tmp_path)
    with pytest.raises(ValueError, match="lacks model-00001.*, which model.safetensors.index.json"):
        load_checkpoint(model, tmp_path / "two")
    (tmp_path / "two" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors.index.json nor"):
        load_checkpoint(model, tmp_path / "two")
    assert torch.equal(model.lm_head.weight, before)


def test_files_that_the_index_does_not_name_do_not_count(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = saved("llama 2", torch.float32, tmp_path)
    for file in list(tmp_path.glob("*.safetensors")):
        stray = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file({**stray, "other.weight": torch.ones(3)}, tmp_path / f"consolidated-{file.name}")
    save_file({"adapter": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert relative_error(ours(tmp_path)(IDS), theirs(IDS).logits) < 1e-4


def test_quantized_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    saved("llama 2", torch.float32, tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{name} is I8"):
        ours(tmp_path)


# ---------------------------------------------------------------------------------------------
# The bases of the paper, with the keys that their config.json has on the hub, sizes included

LLAMA_3_8B = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=128009,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=8192,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.40.0.dev0",
    use_cache=True,
    vocab_size=128256,
)
QWEN_25_7B = dict(
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=151643,
    dual_chunk_attention_config=dict(
        chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
    ),
    eos_token_id=151645,
    hidden_act="silu",
    hidden_size=3584,
    initializer_range=0.02,
    intermediate_size=18944,
    max_position_embeddings=1010000,
    max_window_layers=28,
    model_type="qwen2",
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-05,
    rope_theta=10000000.0,
    sliding_window=32768,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.48.0",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=152064,
)
GEMMA_3_4B = dict(
    architectures=["Gemma3ForConditionalGeneration"],
    boi_token_index=255999,
    eoi_token_index=256000,
    eos_token_id=[1, 106],
    image_token_index=262144,
    initializer_range=0.02,
    mm_tokens_per_image=256,
    model_type="gemma3",
    text_config=dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0",
    vision_config=dict(
        hidden_size=1152,
        image_size=896,
        intermediate_size=4304,
        model_type="siglip_vision_model",
        num_attention_heads=16,
        num_hidden_layers=27,
        patch_size=14,
        vision_use_head=False,
    ),
)
GEMMA_7B = dict(
    architectures=["GemmaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=2,
    eos_token_id=1,
    head_dim=256,
    hidden_act="gelu",
    hidden_size=3072,
    initializer_range=0.02,
    intermediate_size=24576,
    max_position_embeddings=8192,
    model_type="gemma",
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=16,
    pad_token_id=0,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=10000.0,
    torch_dtype="bfloat16",
    transformers_version="4.38.0.dev0",
    use_cache=True,
    vocab_size=256000,
)


def written(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "config, share",
    [(LLAMA_3_8B, "0.70"), (GEMMA_3_4B, "1.04"), (QWEN_25_7B, "0.71")],
    ids=["Llama 3 8B", "Gemma 3 4B", "Qwen2.5 7B"],
)
def test_the_trainable_share_is_the_papers(config, share, tmp_path):
    with torch.device("meta"):
        model = Decoder(read_config(written(tmp_path / "model", config)))
    base_size = sum(parameter.numel() for parameter in model.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    inject_hyplora(model, targets, rank=32, curvature=math.inf)
    size = adapter_size(model)
    row = {"name": "LoRA", "trainable": size, "metrics": {}, "seconds": 0.0, "K": []}
    assert f"| {size} | {share} % |" in table([row], base_size)
    print(f"\nshare | {config['model_type']} | {size} | {base_size} | {share} |")


def shrunk(config, **sizes):
    """The same keys, with small sizes; keys that the hub's file leaves out stay left out."""
    small = json.loads(json.dumps(config))
    inner = small.get("text_config", small)
    for name, value in sizes.items():
        if name in inner:
            inner[name] = value
    return small


@pytest.mark.parametrize(
    "config, theirs",
    [
        (LLAMA_3_8B, "LlamaForCausalLM"),
        (QWEN_25_7B, "Qwen2ForCausalLM"),
        (GEMMA_3_4B, "Gemma3ForConditionalGeneration"),
        (GEMMA_7B, "GemmaForCausalLM"),
    ],
    ids=["Llama 3 8B", "Qwen2.5 7B", "Gemma 3 4B", "Gemma 7B"],
)
def test_the_hubs_config_files_give_transformers_logits(config, theirs, tmp_path):
    """What gemma-3-4b-it leaves out (vocabulary, heads, head size, rope) is the family's own."""
    small = shrunk(
        config,
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
    )
    if "vision_config" in small:
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
        small["vision_config"].update(vision, num_attention_heads=2)
    original = written(tmp_path / "original", small)
    model_config = transformers.AutoConfig.from_pretrained(original)
    model = getattr(transformers, theirs)(model_config)
    want_model = save(model, torch.float32, tmp_path / "model")
    # transformers writes every field out; the hub's file comes back in its place.
    shutil.copy(tmp_path / "original" / "config.json", tmp_path / "model" / "config.json")
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = want_model(input_ids=ids).logits
        error = relative_error(ours(tmp_path / "model")(ids), want)
    print(f"\nparity | hub's config of {config['model_type']} | float32 | {error:.1e} |")
    assert error < 1e-4


def test_the_decoder_beside_a_vision_tower_is_found_under_either_name(tmp_path):
    """The hub's gemma-3-4b-it says language_model.model., newer files model.language_model."""
    from safetensors.torch import load_file, save_file

    theirs = saved("gemma3", torch.float32, tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    tensors = {}
    for file in (tmp_path / "text").glob("*.safetensors"):
        tensors.update(load_file(file))
    for prefix, tower in (("language_model.model.", ""), ("model.language_model.", "model.")):
        folder = tmp_path / prefix
        written(folder, dict(model_type="gemma3", text_config=config, vision_config={}))
        renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
        renamed[f"{tower}vision_tower.weight"] = torch.ones(2)
        renamed[f"{tower}multi_modal_projector.weight"] = torch.ones(2)
        save_file(renamed, folder / "model.safetensors")
        assert relative_error(ours(folder)(IDS), theirs(IDS).logits) < 1e-4


def test_what_gemma_3_leaves_out_is_its_familys_default(tmp_path):
    config = read_config(written(tmp_path, GEMMA_3_4B))
    assert (config.vocab_size, config.num_attention_heads, config.head_dim) == (262208, 8, 256)
    assert config.num_key_value_heads == 4
    assert config.rope[FULL] == dict(rope_type="linear", rope_theta=1e6, factor=8.0)
    assert config.rope[SLIDING] == dict(rope_type="default", rope_theta=1e4)
    assert config.layer_types == ([SLIDING] * 5 + [FULL]) * 5 + [SLIDING] * 4
    assert config.attention_scale == 256**-0.5 and config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"])
def test_an_empty_config_is_that_of_transformers(family, tmp_path):
    """Every default is the family's, as transformers has it, and none is ours."""
    names = {"gemma3_text": "Gemma3Text"}
    theirs = getattr(transformers, f"{names.get(family, family.capitalize())}Config")()
    config = read_config(written(tmp_path, dict(model_type=family)))
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
    ):
        assert getattr(config, name) == getattr(theirs, name), name
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    assert config.head_dim == getattr(theirs, "head_dim", head_dim)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    if family == "mistral":
        types = [SLIDING] * theirs.num_hidden_layers
    assert config.layer_types == (types or [FULL] * theirs.num_hidden_layers)
    assert config.sliding_window == window
    ropes = theirs.rope_parameters
    assert config.rope[FULL]["rope_theta"] == ropes.get(FULL, ropes)["rope_theta"]
    if SLIDING in config.layer_types:
        assert config.rope[SLIDING]["rope_theta"] == ropes.get(SLIDING, ropes)["rope_theta"]


@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text", "Gemma3"]
)
def test_every_field_that_transformers_writes_is_known(name, tmp_path):
    written(tmp_path, getattr(transformers, f"{name}Config")().to_dict())
    read_config(tmp_path)
