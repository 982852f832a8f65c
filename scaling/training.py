"""Training over one process or many: DDP, or FSDP2, which spreads the base over them.

A step depends on its number and the state file alone: a run can stop and go on anywhere."""

import copy
import math
import os
import random
import signal
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.rnn import pad_sequence

import hyplora

try:
    import transformers  # noqa: F401  (data.py and finetune.py use it.)
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"scaling/ is built on transformers ({error}): pip install transformers jinja2")

IGNORE = -100  # The label of a token that has no loss, as everywhere in PyTorch.
SAVE_STEPS = 200  # A state is written every so many steps.
RANK = int(os.environ.get("RANK", 0))  # this process's number; torchrun sets both
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Print from the first process alone."""
    if RANK == 0:
        print(text, flush=True)


def gather(thing):
    """A list of what each process gave; each process gets it."""
    everyone = [thing] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(everyone, thing)
    return everyone


def start_processes(device):
    """Join the processes that torchrun has started; refuse to be one of a scheduler's alone."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if PROCESSES == 1 and int(os.environ.get(name, 1)) > 1:
            sys.exit(f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: start torchrun")
    if PROCESSES > 1 and device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if PROCESSES > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def spread(whole, device):
    """Let FSDP2 spread a model over the processes, of which all but the first give None."""
    sent = [None]
    if RANK == 0:  # It sends the model without the values of its parameters.
        blank = {}
        for p in whole.parameters():
            blank[id(p)] = torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        sent = [copy.deepcopy(whole, memo=blank)]
    dist.broadcast_object_list(sent)
    model = sent[0]
    buffers = dict(model.named_buffers())
    mesh = dist.init_device_mesh(device.type, (PROCESSES,))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):  # It is one of the blocks.
            fully_shard(module, mesh=mesh)
    # By default, what is in no block stays whole between a forward pass and a backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():  # Some, such as rotary frequencies, are in no state.
        buffer.copy_(buffers[name])
    options = checkpoint.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    checkpoint.set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    return model


def whole_adapters(model):
    """hyplora_state_dict(model) as copies on the CPU, gathered by all processes for each."""
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lora_" in name}
    for name, t in tensors.items():
        tensors[name] = (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone()
    return tensors


def save_whole(state, path):
    """torch.save, such that path has the old state or the new one; OSError if the disk is full."""
    with open(f"{path}.part", "wb") as file:  # For a path, torch would raise a RuntimeError.
        torch.save(state, file)
    os.replace(f"{path}.part", path)


def records_of_step(records, step, args):
    """The records of a step. An epoch has each record once, in an order of its own."""
    epoch, place = divmod(step, math.ceil(len(records) / args.batch_size))
    order = random.Random(f"{args.seed}, epoch {epoch}").sample(records, len(records))
    return order[place * args.batch_size : (place + 1) * args.batch_size]


def pad(rows, side, device):
    """Rows of token ids -> (ids, attention mask), both (batch, T)."""
    ids = pad_sequence(rows, batch_first=True, padding_side=side, padding_value=-1).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


def make_batch(records, args):
    """ids, attention mask and labels, each (batch, T). A label is the next token, or IGNORE."""
    ids = []
    labels = []
    for record in records:
        row = torch.tensor(record.prompt_ids + record.target_ids)
        ids.append(row[:-1])
        labels.append(row[1:].clone())
        if args.loss_on == "answer":
            labels[-1][: len(record.prompt_ids) - 1] = IGNORE
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    return *pad(ids, "right", args.device), labels.to(args.device)


def share_batch(records, args):
    """make_batch of this process's share of the records; who has none gets one to ignore."""
    mine = records[RANK::PROCESSES]
    batch = make_batch(mine or records[:1], args)
    if not mine:
        batch[2].fill_(IGNORE)
    return batch


def summed_loss(model, batch):
    """The sum of the cross entropies over the labels; logits are computed where labels are."""
    ids, mask, labels = batch
    columns = (labels != IGNORE).any(dim=0).nonzero().flatten()
    inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns)
    logits = model(**inputs).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, labels[:, columns].flatten(), reduction="sum")


@torch.no_grad()
def mean_loss(model, records, args):
    """The loss per label of the records, which the processes share; a float."""
    model.eval()
    loss = 0.0
    count = 0
    for start in range(0, len(records), args.batch_size):
        batch = share_batch(records[start : start + args.batch_size], args)
        loss += summed_loss(model, batch).item()
        count += (batch[2] != IGNORE).sum().item()
    losses, counts = zip(*gather((loss, count)))
    return sum(losses) / sum(counts)


def train(model, args, label, records):
    """Train the adapters; the state is saved every SAVE_STEPS steps, at the end, after a signal."""
    optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model), args.lr, weight_decay=0.0)
    options = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    first = 0
    path = os.path.join(args.out, f"state-{label}.pt")
    if args.resume and os.path.exists(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        first = state["step"]
        if isinstance(model, FSDPModule):
            checkpoint.set_model_state_dict(model, state["adapters"], options=options)
        else:
            hyplora.set_hyplora_state_dict(model, state["adapters"])
        checkpoint.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        say(f"{label}: going on from step {first} of {path}")
    engine = model
    if PROCESSES > 1 and not isinstance(model, FSDPModule):
        engine = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM):  # A step is finished before the run stops.
        signal.signal(number, lambda number, frame: heard.append(number))
    engine.train()
    bar = tqdm(range(first, args.steps), label, args.steps, initial=first, disable=RANK > 0)
    for step in bar:
        torch.manual_seed(hash((args.seed, step, RANK)))  # for dropout
        chosen = records_of_step(records, step, args)
        count = (make_batch(chosen, args)[2] != IGNORE).sum().item()
        loss = summed_loss(engine, share_batch(chosen, args)) / count
        (loss * PROCESSES).backward()  # The engines take the mean over processes.
        loss, signals = (sum(column) for column in zip(*gather((loss.item(), len(heard)))))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(loss + norm):
            sys.exit(f"\n{label}, step {step + 1}: loss {loss}, gradient {norm:g}: lower --lr")
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        rising = (step + 1) / max(1, args.warmup_steps)
        falling = (args.steps - step) / max(1, args.steps - args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(rising, falling, 1)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if signals or done == args.steps or done % SAVE_STEPS == 0:
            moments = checkpoint.get_optimizer_state_dict(model, optimizer, options=options)
            state = {"step": done, "adapters": whole_adapters(model), "optimizer": moments}
            if RANK == 0:
                save_whole(state, path)
        if signals:
            say(f"\n{label}: stopped at step {done}; the same command with --resume goes on")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
