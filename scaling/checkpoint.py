"""A folder as the model hubs distribute it -> a Decoder: config.json, then the safetensors files.

`read_config` knows three kinds of fields. Those in DEFAULTS are obeyed; where a file leaves one
out, the value is the family's own, as in transformers. Those in WITHOUT_EFFECT do not change what
the decoder computes. Any other field that is set to something is refused, so that none that matters
is passed over.
"""

import contextlib
import json
import os

import torch

from scaling.decoder import ACTIVATIONS, FULL, SLIDING, Config, Decoder
from scaling.processes import need

# The values that transformers (configuration_<family>.py) gives to what a config.json leaves out.
COMMON = dict(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    head_dim=None,  # None is hidden_size / num_attention_heads.
    num_key_value_heads=None,  # None is one for each query head.
    rope_theta=10000.0,
    rope_scaling=None,
    rope_parameters=None,
    layer_types=None,
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
QWEN = COMMON | dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
GEMMA = COMMON | dict(
    hidden_act="gelu_pytorch_tanh",
    hidden_activation=None,  # None is hidden_act.
    tie_word_embeddings=True,
    attention_bias=False,
    head_dim=256,
)
DEFAULTS = {
    "llama": COMMON | dict(attention_bias=False),
    "mistral": COMMON | dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096),
    "qwen2": QWEN,
    "qwen3": QWEN | dict(attention_bias=False, head_dim=128),
    "gemma": GEMMA
    | dict(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "gemma3_text": GEMMA
    | dict(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        rope_theta=1e6,
        rope_local_base_freq=10000.0,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_pattern=6,
    ),
}
FAMILIES = (*DEFAULTS, "gemma3")  # gemma3 is gemma3_text beside a vision tower, which is left out.

# Fields that say nothing about what the decoder computes for the texts that this program reads.
# (Qwen2.5's 1M models have a dual_chunk_attention_config; it begins at 262144 tokens, and
# transformers leaves it out too.)
WITHOUT_EFFECT = (
    "architectures boi_token_id boi_token_index bos_token_id cache_implementation dtype "
    "dual_chunk_attention_config eoi_token_id eoi_token_index eos_token_id finetuning_task "
    "id2label image_token_id image_token_index initializer_range is_llama_config label2id "
    "max_position_embeddings max_sequence_length mm_tokens_per_image model_type name_or_path "
    "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "task_specific_params text_config tokenizer_class torch_dtype transformers.js_config "
    "transformers_version unsloth_fixed unsloth_version use_cache vision_config"
).split()
# Fields that are accepted with the one value that asks for nothing.
NEUTRAL = {"attention_dropout": 0, "partial_rotary_factor": 1, "chunk_size_feed_forward": 0}
# Fields for which false asks for another computation, where elsewhere it asks for nothing.
CAUSAL = ("is_causal", "causal", "use_causal_mask", "use_rope")
# What each kind of rope needs beside its rope_theta.
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read_json(folder, name):
    """The object in a JSON file in UTF-8, or {} if there is no file. Raises ValueError."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should be a JSON object, and is a {type(content).__name__}")
    return content


def read_fields(folder):
    """config.json -> (family, {every field that counts: its value, given or the family's own}).

    Raises ValueError for a family that is not supported and for a field that is not known.
    """
    raw = read_json(folder, "config.json")
    if not raw:
        raise ValueError(
            f"{folder} has no config.json; --checkpoint takes a folder from a model hub"
        )
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder} is of the family {family!r}; supported are {', '.join(FAMILIES)}"
        )
    given = dict(raw)
    if family == "gemma3":
        family = "gemma3_text"
        given.update(raw.get("text_config") or {})
    defaults = DEFAULTS[family]
    for name, value in given.items():
        known = name in defaults or name in WITHOUT_EFFECT or name.startswith("_")
        if name in CAUSAL:
            asks_for_nothing = value is None or value is True
        else:
            asks_for_nothing = value is None or value is False or value == NEUTRAL.get(name)
        if not known and not asks_for_nothing:
            raise ValueError(
                f"{folder}/config.json: {name} {value!r} is not supported for {family}. If the "
                "field changes nothing in what the model computes, remove it from the file"
            )
    fields = dict(defaults)
    for name in defaults:
        # null means "left out", except that a model whose sliding_window is null has no window.
        if name in given and (given[name] is not None or name == "sliding_window"):
            fields[name] = given[name]
    return family, fields


def read_rope(family, fields):
    """{layer type: {"rope_type", "rope_theta", and what the type needs}}, of old files and of new.

    Old ones have rope_theta and rope_scaling beside each other (and Gemma 3 rope_local_base_freq);
    new ones have rope_parameters, which Gemma 3 nests by layer type. Raises ValueError.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields[name], (dict, type(None))):
            raise ValueError(f"{name} must be a JSON object, not {fields[name]!r}")
    scaling = fields["rope_scaling"]
    parameters = fields["rope_parameters"] or {}
    if family == "gemma3_text":
        nested = {
            FULL: dict(parameters.get(FULL) or {}),
            SLIDING: dict(parameters.get(SLIDING) or {}),
        }
        surplus = parameters.keys() - nested.keys()
        if surplus:
            raise ValueError(f"rope_parameters: {min(surplus)!r} is not a layer type of gemma3")
        nested[FULL].update(scaling or {})
        nested[FULL].setdefault("rope_theta", fields["rope_theta"])
        nested[SLIDING].setdefault("rope_theta", fields["rope_local_base_freq"])
    else:
        one = {"rope_theta": fields["rope_theta"], **(scaling or parameters)}
        nested = {FULL: one, SLIDING: one}
    return {layer_type: check_rope(rope) for layer_type, rope in nested.items()}


def check_rope(rope):
    """The fields of one rope, checked. Raises ValueError for a kind or a field not known."""
    rope = dict(rope)
    old_name = rope.pop("type", None)
    kind = rope.setdefault("rope_type", old_name or "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type {kind!r} is not supported; known are {', '.join(ROPE_FIELDS)}")
    wanted = {"rope_type", "rope_theta"} | ROPE_FIELDS[kind]
    for name in sorted(rope.keys() - wanted):
        neutral = rope[name] is None or (name == "partial_rotary_factor" and rope[name] == 1)
        # A rope that does not stretch may say what it would have been stretched from.
        if not neutral and name != "original_max_position_embeddings":
            raise ValueError(f"rope_parameters: {name} {rope[name]!r} is not supported")
    for name in sorted(wanted - {"rope_type"}):
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"rope_parameters: {name} of {kind!r} must be above 0, not {value!r}")
    return {name: rope[name] for name in wanted}


def read_layer_types(family, fields):
    """(FULL or SLIDING for each layer, the window of SLIDING ones or None). Raises ValueError."""
    layers = range(fields["num_hidden_layers"])
    window = fields.get("sliding_window")
    if family in ("qwen2", "qwen3") and not fields["use_sliding_window"]:
        window = None
    if window is None:
        derived = [FULL for _ in layers]
    elif family in ("qwen2", "qwen3"):
        derived = [SLIDING if i >= fields["max_window_layers"] else FULL for i in layers]
    elif family == "gemma3_text":
        pattern = fields["sliding_window_pattern"]
        derived = [FULL if (i + 1) % pattern == 0 else SLIDING for i in layers]
    else:
        derived = [SLIDING for _ in layers]
    types = fields["layer_types"] or derived
    unknown = set(types) - {FULL, SLIDING}
    if unknown:
        raise ValueError(f"layer_types: {min(unknown)!r} is not supported")
    if len(types) != len(layers):
        raise ValueError(f"layer_types has {len(types)} entries for {len(layers)} layers")
    if family not in ("qwen2", "qwen3", "gemma3_text") and types != derived:
        raise ValueError(f"layer_types of {family} must be {derived[0]!r} throughout")
    if SLIDING in types:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"sliding_window must be at least 1 for {SLIDING}, not {window!r}")
    return types, window


def read_config(folder):
    """config.json of a supported family -> Config.

    Raises ValueError for a family, a field or a value that this decoder does not know; the message
    names it.
    """
    family, fields = read_fields(folder)
    try:
        return build_config(family, fields)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def build_config(family, fields):
    """The Config of a family's fields. Raises ValueError."""
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name in (*SIZES, "max_window_layers", "sliding_window_pattern"):
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
        least = 0 if name == "max_window_layers" else 1
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")
    if fields["head_dim"] is None:
        if fields["hidden_size"] % fields["num_attention_heads"]:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, or give head_dim"
            )
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields["head_dim"] % 2:
        raise ValueError(f"head_dim must be even, not {fields['head_dim']}")
    for name in ("rms_norm_eps", "query_pre_attn_scalar"):
        value = fields.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name} must be a number above 0, not {value!r}")
    for name in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if not isinstance(fields.get(name, False), bool):
            raise ValueError(f"{name} must be true or false, not {fields[name]!r}")
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    gemma = family in ("gemma", "gemma3_text")
    activation = fields["hidden_act"]
    if gemma:
        activation = fields["hidden_activation"] or activation
    if family == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # The first release said gelu and meant its approximation.
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported")
    biased = fields.get("attention_bias", False)
    layer_types, window = read_layer_types(family, fields)
    scalar = fields.get("query_pre_attn_scalar", fields["head_dim"])
    return Config(
        **{name: fields[name] for name in SIZES},
        rms_norm_eps=fields["rms_norm_eps"],
        activation=activation,
        attention_scale=scalar**-0.5,
        tie_word_embeddings=fields["tie_word_embeddings"],
        qkv_bias=biased or family == "qwen2",
        o_bias=biased,
        qk_norm=family in ("qwen3", "gemma3_text"),
        norm_offset=1.0 if gemma else 0.0,
        post_norms=family == "gemma3_text",
        scale_embeddings=gemma,
        layer_types=layer_types,
        sliding_window=window,
        rope=read_rope(family, fields),
    )


# The decoder's tensors are called model.*; beside a vision tower they have one of the longer names.
PREFIXES = {
    "model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "model.language_model.": "lm_head.weight",
}
TOWERS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def weight_files(folder):
    """The names of the files that hold the weights: those of the index, or model.safetensors.

    Other files in the folder do not count. Raises ValueError if one of them is missing.
    """
    index = read_json(folder, "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            continue
        if index:
            raise ValueError(f"{folder} lacks {name}, which model.safetensors.index.json names")
        raise ValueError(
            f"{folder} has neither model.safetensors.index.json nor model.safetensors; other "
            "formats of weights are not read"
        )
    return names


def names_in_files(model, stored):
    """{the name in the files: the parameter}. stored: the names that the files have."""
    prefix = "model."
    for candidate in PREFIXES:
        if f"{candidate}embed_tokens.weight" in stored:
            prefix = candidate
    wanted = {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight":
            name = PREFIXES[prefix]
        else:
            name = prefix + name.removeprefix("model.")
        if not model.config.post_norms:  # See Block.
            name = name.replace("pre_feedforward_layernorm", "post_attention_layernorm")
        wanted[name] = parameter
    return wanted


def check_names(folder, model, wanted, shapes):
    """Raise ValueError that names the tensors that are missing, surplus or of another shape."""
    unused = ["rotary_emb.inv_freq"]  # Old files store what the model computes.
    if model.config.tie_word_embeddings:
        unused.append("lm_head.weight")
    missing = wanted.keys() - shapes.keys()
    surplus = set()
    for name in shapes.keys() - wanted.keys():
        if not name.endswith(tuple(unused)) and not name.startswith(TOWERS):
            surplus.add(name)
    misfits = set()
    for name in wanted.keys() & shapes.keys():
        if tuple(shapes[name]) != tuple(wanted[name].shape):
            misfits.add(name)
    problems = {"misses": missing, "has unknown": surplus, "has in another shape": misfits}
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder} {problem}: {', '.join(sorted(names)[:5])}{more}")


def load_checkpoint(model, folder):
    """Fill the Decoder with the folder's weights, in the dtype and on the device that it has.

    Raises ValueError, before anything is read, if the names, shapes or dtypes in the files are not
    the model's.
    """
    safetensors = need("safetensors", "--checkpoint")
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in weight_files(folder):
            path = os.path.join(folder, file)
            try:
                reader = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
            for name in reader.keys():
                tensors[name] = reader.get_slice(name)
        wanted = names_in_files(model, tensors)
        shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
        check_names(folder, model, wanted, shapes)
        for name in wanted:
            dtype = tensors[name].get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder}: {name} is {dtype}; quantized weights are not supported"
                )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(tensors[name][:])


def empty_decoder(config, dtype, device):
    """A frozen Decoder on the device; whoever calls this sets its weights."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype).requires_grad_(False)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty has parted the head from the embedding.
    return model


def from_checkpoint(folder, dtype, device):
    """The folder's model, frozen, on the device.

    dtype: a torch.dtype. Raises what read_config and load_checkpoint raise.
    """
    model = empty_decoder(read_config(folder), dtype, device)
    load_checkpoint(model, folder)
    return model
