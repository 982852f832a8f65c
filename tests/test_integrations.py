"""hyplora.py inside transformers, DDP, FSDP, and on quantized linears.

Models are built from small random configurations, so that nothing is downloaded. What needs a
package that is missing is skipped: pip install -r tests/requirements.txt"""

import copy
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import conftest
import pytest
import torch
import torch.nn as nn

import hyplora
from test_hyplora import adapted

torch.set_num_threads(1)
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def train(model, loss_of):
    """Every adapter has moved, the loss is lower, and the dropout is the same in each step."""
    optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model.train()), lr=2e-2)
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
    assert all(layer.lora_B.any() for layer in hyplora.hyplora_layers(model).values())


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
def test_a_family_of_transformers_trains_generates_is_saved_and_keeps_its_base(family, tmp_path):
    model = build(family)
    base = logits_of(model)
    names = hyplora.inject_hyplora(model, "all-linear", rank=4)
    assert names and not any("lm_head" in name for name in names)
    assert torch.equal(logits_of(model), base)
    train(model, lambda model: model(input_ids=IDS, labels=IDS).loss)
    model.tie_weights()
    if family != "bert":
        options = dict(max_new_tokens=6, do_sample=False)
        cached = model.generate(IDS, use_cache=True, **options)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    hyplora.save_hyplora(model, tmp_path / "adapter.pt")
    fresh = build(family)
    assert hyplora.load_hyplora(fresh, tmp_path / "adapter.pt") == names
    assert torch.equal(logits_of(fresh), logits_of(model))
    with hyplora.disable_hyplora(model):
        assert torch.equal(logits_of(model), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), base)
    assert torch.equal(logits_of(hyplora.remove_hyplora(model)), base)


def test_adapters_learn_on_torchaos_weight_only_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = mlp()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    hyplora.inject_hyplora(model, "all-linear", rank=4)
    train(model, lambda model: (model(X) - X).square().mean())


@pytest.mark.parametrize("options", [NF4, dict(load_in_8bit=True)], ids=["4 bit", "8 bit"])
def test_adapters_learn_on_bases_of_bitsandbytes_which_are_saved_whole(options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    full = build("llama", hidden_size=64, intermediate_size=64)
    full.save_pretrained(tmp_path)
    config = dict(quantization_config=transformers.BitsAndBytesConfig(**options))
    quantized = type(full).from_pretrained(tmp_path, dtype=torch.float32, **config)
    names = set(quantized.state_dict())
    assert any("lm_head" not in name and name.endswith((".SCB", ".absmax")) for name in names)
    assert len(hyplora.inject_hyplora(quantized, "all-linear", rank=4)) == 14
    assert names < set(quantized.state_dict())
    # Of 4 bits, bitsandbytes does not read all that it writes.
    quantized.load_state_dict(quantized.state_dict(), strict="load_in_8bit" in options)
    train(quantized, lambda model: model(input_ids=IDS, labels=IDS).loss)


def steps(model, rows, count=4):
    optimizer = torch.optim.SGD(hyplora.hyplora_parameters(model), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(rows).float().square().mean().backward()
        optimizer.step()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_meta_and_sharded(mesh):
    """Adapted on the meta device and sharded; only then it gets memory, and fresh adapters."""
    with torch.device("meta"):
        model = mlp()
    hyplora.inject_hyplora(model, "all-linear", rank=2)
    shard(model, mesh).to_empty(device="cpu")
    for layer in hyplora.hyplora_layers(model).values():
        layer.reset_parameters()
    return model


def check_distributed_checkpoints(rank, mesh, path):
    """Base weights and adapters arrive in a sharded model from rank 0."""
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
    with pytest.raises(ValueError, match="the adapter of 0 is sharded .*gather it"):
        hyplora.save_hyplora(model, path / "adapter.pt")


def check_refusals(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole, ran = nn.Sequential(mlp()), fully_shard(mlp(), mesh=mesh)
    fully_shard(whole, mesh=mesh)
    ran(X)  # Now its parameters are whole.
    zero_3 = mlp()
    zero_3[0].weight.ds_id = 0
    fsdp_1 = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    # whole[0] is no FSDPModule itself, but its parameters are sharded.
    for bare in (nn.parallel.DistributedDataParallel(mlp()), fsdp_1, ran, whole[0], zero_3):
        flags = [p.requires_grad for p in bare.parameters()]
        with pytest.raises(ValueError, match="before it is sharded or put into DDP"):
            hyplora.inject_hyplora(bare, "all-linear")
        assert flags == [p.requires_grad for p in bare.parameters()]


def check_calibration(rank, mesh):
    """Each process gives its own batch, and all have the unit of rank 0."""
    from torch.distributed.fsdp import fully_shard

    one = adapted(mlp())
    want = hyplora.calibrate_curvature(one, X[:4])
    wraps = [nn.parallel.DistributedDataParallel, lambda model: shard(model, mesh)]
    wraps += [lambda model: fully_shard(model, mesh=mesh)]  # It stays whole after a forward pass.
    for wrap in wraps:
        model = wrap(adapted(mlp()))
        found = hyplora.calibrate_curvature(model, X[rank * 4 : rank * 4 + 4])
        assert list(found.values()) == list(want.values())
        model(X)
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), one.buffers()))


def in_ddp(model, x, train):
    hyplora.inject_hyplora(model, "all-linear", rank=8)
    hyplora.calibrate_curvature(model, x)
    train(nn.parallel.DistributedDataParallel(model))
    if torch.distributed.get_rank() == 0:
        with warnings.catch_warnings(action="error"):  # DDP wrote to all parameters.
            hyplora.save_hyplora(model, "adapter.pt")


def in_fsdp2(model, x, train):
    readme = (Path(__file__).parent.parent / "examples" / "README.md").read_text()
    snippet = readme.split("### FSDP2")[1].split("```python\n")[1].split("```")[0]
    exec(snippet, {"model": model, "x": x, "train": train})


def check_training(rank, path):
    """Both processes, each with half of the batch, end with the adapters of one.
    Sums are taken in another order: hence the tolerances."""
    os.chdir(path)
    cases = [(in_ddp, torch.float32), (in_fsdp2, torch.float32), (in_fsdp2, torch.bfloat16)]
    for program, dtype in cases:
        x = X.to(dtype)
        one = nn.Sequential(OrderedDict(layers=mlp(dtype)))
        bare, two = copy.deepcopy(one), copy.deepcopy(one)
        state = torch.get_rng_state()
        hyplora.inject_hyplora(one, "all-linear", rank=8)
        hyplora.calibrate_curvature(one, x)
        start = copy.deepcopy(hyplora.hyplora_state_dict(one))
        steps(one, x)
        torch.set_rng_state(state)
        program(two, x, lambda model: steps(model, x[rank * 4 : rank * 4 + 4]))
        torch.distributed.barrier()
        assert hyplora.load_hyplora(bare, "adapter.pt") == ["layers.0", "layers.2"]
        torch.testing.assert_close(bare(x), two(x))
        found = hyplora.hyplora_state_dict(bare)
        for name, p in hyplora.hyplora_state_dict(one).items():
            error = (found[name] - p).norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2) * p.norm(), (program, name)
            assert torch.equal(p, start[name]) == name.endswith("lora_unit"), name
        torch.distributed.barrier()


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
    check_training(rank, path)
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes_refuse_calibrate_shard_save_and_train_as_one_does(tmp_path):
    torch.multiprocessing.spawn(machinery, (tmp_path,), nprocs=2)
