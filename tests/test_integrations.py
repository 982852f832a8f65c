"""hyplora.py inside transformers, compilation, DDP, FSDP, and on quantized linears.

Models are built from small random configurations, so that nothing is downloaded. What needs a
package that is missing is skipped: pip install -r tests/requirements.txt
"""

import copy
import itertools
import os
from pathlib import Path

import conftest
import pytest
import torch
import torch.nn as nn

import hyplora
from hyplora import (
    calibrate_curvature,
    disable_hyplora,
    hyplora_layers,
    hyplora_parameters,
    hyplora_state_dict,
    inject_hyplora,
    load_hyplora,
    save_hyplora,
)
from test_hyplora import adapted

torch.set_num_threads(1)
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def what_trains(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, loss_of):
    """Every adapter has moved, the loss is lower, and the dropout is the same in each step."""
    optimizer = torch.optim.AdamW(hyplora_parameters(model.train()), lr=2e-2)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    assert all(layer.lora_B.any() for layer in hyplora_layers(model).values())


# --- transformers -------------------------------------------------------------------------------

PLAIN = "llama gpt2 bert bloom gpt_neox falcon phi cohere olmo2 granite stablelm mpt"
FAMILIES = dict.fromkeys(PLAIN.split(), {}) | {
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    "gemma": dict(head_dim=16),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "gptj": dict(rotary_dim=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "xglm": dict(ffn_dim=48),
    "t5": dict(d_kv=8, d_ff=48, num_decoder_layers=2, decoder_start_token_id=0),
}


def build(family, **options):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    kinds = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    fields = conftest.FAMILIES["llama"] | FAMILIES[family] | options
    torch.manual_seed(0)
    kind = getattr(transformers, kinds.get(family, "AutoModelForCausalLM"))
    return kind.from_config(transformers.AutoConfig.for_model(family, **fields)).eval()


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS, labels=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_transformers_trains_generates_is_saved_and_gets_its_base_back(
    family, tmp_path
):
    model = build(family)
    base = logits_of(model)
    names = inject_hyplora(model, "all-linear", rank=4)
    assert names and not any("lm_head" in name for name in names)
    assert torch.equal(logits_of(model), base)
    train(model, lambda model: model(input_ids=IDS, labels=IDS).loss)
    model.tie_weights()
    if family != "bert":
        options = dict(max_new_tokens=6, do_sample=False)
        cached = model.generate(IDS, use_cache=True, **options)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    save_hyplora(model, tmp_path / "adapter.pt")
    fresh = build(family)
    assert load_hyplora(fresh, tmp_path / "adapter.pt") == names
    assert torch.equal(logits_of(fresh), logits_of(model))
    with disable_hyplora(model):
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(hyplora.remove_hyplora(model)), base)


def test_an_adapted_model_that_is_saved_whole_comes_back_with_its_base(tmp_path):
    model = build("llama")
    base = {name: p.clone() for name, p in model.state_dict().items()}
    adapted(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, base[name]) for name, p in again.state_dict().items())
    inject_hyplora(again, "all-linear", rank=2)
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_model_with_peft_adapters_is_refused_until_they_are_unloaded():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for part in (model, model.base_model.model, model.base_model.model.model.layers[0]):
        with pytest.raises(ValueError, match="has adapters.*of PEFT"):
            inject_hyplora(part, ["v_proj"])
    assert inject_hyplora(model.unload(), ["q_proj"])


# --- torch's machinery --------------------------------------------------------------------------


def test_a_compiled_model_trains_as_in_eager_mode_in_one_graph_for_all_batch_sizes():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = adapted(mlp()), adapted(mlp())
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (8, 5, 3):
        x = X[:rows].clone()
        torch._dynamo.mark_dynamic(x, 0)
        for each in (compiled, eager):
            each(x).square().mean().backward()
    assert counter.frame_count == 1
    for name, p in what_trains(eager).items():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_gives_the_same_gradients_in_transformers():
    model = adapted(build("llama"))
    found = []
    for options in (None, dict(use_reentrant=False), dict(use_reentrant=True)):
        each = copy.deepcopy(model).train()
        if options:
            each.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        each(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in what_trains(each).items()})
    for name, grad in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], grad)


class LikeDeepSpeed(nn.Sequential):
    """Its engine's eval and train return nothing."""

    def eval(self):
        self.train(False)

    def train(self, mode=True):
        super().train(mode)


def test_an_engine_whose_eval_returns_nothing_is_calibrated():
    engine = LikeDeepSpeed(adapted(mlp()))
    want = calibrate_curvature(adapted(mlp()), X)
    assert list(calibrate_curvature(engine, X).values()) == list(want.values())
    assert all(module.training for module in engine.modules())


# --- linears that are not nn.Linear -------------------------------------------------------------


class LikeHQQ(nn.Module):
    """Packed weights in a parameter, and beside it a dict of tensors that only state_dict knows."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.W_q = nn.Parameter((100 * linear.weight).to(torch.int8), requires_grad=False)
        self.meta = {"scale": torch.tensor(0.01)}

    def forward(self, x):
        return x @ (self.W_q * self.meta["scale"]).T

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination.update({f"{prefix}W_q": self.W_q, f"{prefix}scale": self.meta["scale"]})
        return destination


def test_a_quantized_linear_whose_state_dict_has_more_than_its_tensors_loses_nothing():
    model = nn.Sequential(LikeHQQ(mlp()[0]), nn.Tanh(), LikeHQQ(mlp()[2]))
    inject_hyplora(model, "all-linear", rank=4)
    train(model, lambda model: (model(X) - X).square().mean())
    keys = {"W_q", "scale", "lora_A", "lora_B", "lora_K", "lora_unit"}
    state = model.state_dict()
    assert set(state) == {f"{i}.{key}" for i in (0, 2) for key in keys}
    assert torch.equal(state["2.scale"], model[2].base.meta["scale"])
    bare = hyplora.remove_hyplora(model).state_dict()
    assert set(bare) == {"0.W_q", "0.scale", "2.W_q", "2.scale"}


def test_adapters_learn_on_torchaos_weight_only_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = mlp()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model[0].weight) is not nn.Parameter
    inject_hyplora(model, "all-linear", rank=4)
    train(model, lambda model: (model(X) - X).square().mean())


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.mark.parametrize("options", [NF4, dict(load_in_8bit=True)], ids=["4 bit", "8 bit"])
def test_bases_of_bitsandbytes_pass_the_gradient_on_and_are_saved_whole(options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    full = build("llama", hidden_size=64, intermediate_size=64)
    full.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**options)
    options = dict(quantization_config=config, dtype=torch.float32)
    quantized = type(full).from_pretrained(tmp_path, **options)
    names = set(quantized.state_dict())
    assert any("lm_head" not in name and name.endswith((".SCB", ".absmax")) for name in names)
    gradients = []
    for model in (full, quantized):
        torch.manual_seed(0)
        inject_hyplora(model, "all-linear", rank=4)
        model(input_ids=IDS, labels=IDS).loss.backward()
        layers = hyplora_layers(model).items()
        gradients.append({name: layer.lora_B.grad.flatten() for name, layer in layers})
    assert names < set(quantized.state_dict()) and len(layers) == 14
    for name, gradient in gradients[0].items():
        assert torch.cosine_similarity(gradient, gradients[1][name], dim=0) > 0.9, name
    train(quantized, lambda model: model(input_ids=IDS, labels=IDS).loss)


# --- several processes --------------------------------------------------------------------------


def steps(model, rows, count=4):
    optimizer = torch.optim.SGD(hyplora_parameters(model), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(rows).float().square().mean().backward()
        optimizer.step()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_two(rank, mesh, path, kind, dtype):
    model = adapted(mlp(dtype))
    wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else shard(model, mesh)
    steps(wrapped, X[rank * 4 : rank * 4 + 4].to(dtype))
    tensors = hyplora_state_dict(model) if kind == "ddp" else None
    if kind == "fsdp":
        tensors = {n: p.detach().full_tensor() for n, p in what_trains(model).items()}
        tensors.update(model.named_buffers())
    save_hyplora(model, path / f"{kind}-{dtype}-{rank}.pt", tensors)


def of_meta_and_sharded(mesh):
    """Adapted on the meta device and sharded; only then it gets memory, and fresh adapters."""
    with torch.device("meta"):
        model = mlp()
    inject_hyplora(model, "all-linear", rank=2)
    shard(model, mesh).to_empty(device="cpu")
    for layer in hyplora_layers(model).values():
        layer.reset_parameters()
    return model


def check_distributed_checkpoints(rank, mesh, path):
    """Base weights and adapters arrive in a sharded model, from rank 0 and from shards on disk."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    for one, strict in ((mlp(), False), (adapted(mlp()), True)):
        model = of_meta_and_sharded(mesh)
        full = one.state_dict() if rank == 0 else {}
        options = dict(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        options = state_dict.StateDictOptions(**options)
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


def check_refusals(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole = nn.Sequential(mlp())
    fully_shard(whole, mesh=mesh)
    zero_3 = mlp()
    zero_3[0].weight.ds_id = 0
    for bare in (
        nn.parallel.DistributedDataParallel(mlp()),
        FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")),
        shard(mlp(), mesh),
        whole[0],  # It is no FSDPModule itself, but its parameters are sharded.
        zero_3,
    ):
        flags = [p.requires_grad for p in bare.parameters()]
        with pytest.raises(ValueError, match="before it is sharded or put into DDP"):
            inject_hyplora(bare, "all-linear")
        assert flags == [p.requires_grad for p in bare.parameters()]


def check_calibration(rank, mesh):
    """Each process gives its own batch, and all have the unit of rank 0."""
    from torch.distributed.fsdp import fully_shard

    one = adapted(mlp())
    want = calibrate_curvature(one, X[:4])
    for wrap in (
        nn.parallel.DistributedDataParallel,
        lambda model: shard(model, mesh),
        lambda model: fully_shard(model, mesh=mesh),  # This stays whole after a forward pass.
    ):
        model = wrap(adapted(mlp()))
        found = calibrate_curvature(model, X[rank * 4 : rank * 4 + 4])
        assert list(found.values()) == list(want.values())
        model(X)
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), one.buffers()))


def check_the_snippet_of_the_readme(path):
    readme = (Path(__file__).parent.parent / "examples" / "README.md").read_text()
    snippet = readme.split("### FSDP2")[1].split("```python\n")[1].split("```")[0]
    model, bare = nn.Sequential(), nn.Sequential()
    model.layers, bare.layers = mlp(), mlp()
    os.chdir(path)
    exec(snippet, {"model": model, "x": X, "train": lambda model: steps(model, X)})
    torch.distributed.barrier()
    assert load_hyplora(bare, "adapter.pt") == ["layers.0", "layers.2"]
    assert bare.layers[0].lora_B.any()
    torch.testing.assert_close(bare(X), model(X))


CASES = [("ddp", torch.float32), ("fsdp", torch.float32), ("fsdp", torch.bfloat16)]


def machinery(rank, path):
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(path / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    check_refusals(mesh)
    check_calibration(rank, mesh)
    check_distributed_checkpoints(rank, mesh, path)
    check_the_snippet_of_the_readme(path)
    for kind, dtype in CASES:
        train_in_two(rank, mesh, path, kind, dtype)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes_refuse_calibrate_shard_save_and_train_as_one_does(tmp_path):
    """What machinery checks; and in the end the adapters are those of one process.

    Each has half of the batch, so that sums are taken in another order: hence the tolerances.
    """
    torch.multiprocessing.spawn(machinery, (tmp_path,), nprocs=2)
    for (kind, dtype), rank in itertools.product(CASES, (0, 1)):
        one = adapted(mlp(dtype))
        start = copy.deepcopy(hyplora_state_dict(one))
        steps(one, X.to(dtype))
        two = mlp(dtype)
        load_hyplora(two, tmp_path / f"{kind}-{dtype}-{rank}.pt")
        for name, p in hyplora_state_dict(one).items():
            error = (hyplora_state_dict(two)[name] - p).norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2) * p.norm(), (kind, name)
            assert torch.equal(p, start[name]) == name.endswith("lora_unit"), name
