"""Training over one process or many, and resuming it.

All that a step does depends on its number and on what the state file keeps, so that a run that was
stopped and resumed ends, bit for bit, where an uninterrupted one does. Several processes use
torch's own engines: DDP, where each has the whole base, and FSDP2, which spreads it over them.
"""

import contextlib
import hashlib
import inspect
import math
import os
import signal
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import hyplora

IGNORE = -100  # The label of a token that has no loss, as everywhere in PyTorch.

# --- Processes ----------------------------------------------------------------------------------


def rank_and_count():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_count()[0] == 0


def say(text):
    """Print from the main process alone."""
    if is_main():
        print(text, flush=True)


def progress(what=None, **settings):
    """tqdm on the main process alone, and seldom where nobody watches."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(what, disable=not is_main(), mininterval=seconds, **settings)


def start_processes(device):
    """Join the processes that torchrun, or what sets its variables, has started.

    Those that only a scheduler has started would each be a whole run, all writing the same files.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if count == 1 and int(os.environ.get(name, 1)) > 1:
            sys.exit(f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: start torchrun")
    if count > 1 and device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def is_sharded(model):
    return isinstance(model, FSDPModule)


def spread(whole, empty, device):
    """Let FSDP2 spread a model over the processes, of which the main one alone has it whole.

    empty: the same model on the meta device, in each process. Returns it with its share of whole.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = set(empty._no_split_modules or ())  # the names of the classes of the model's blocks
    for module in list(empty.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    # By default, what is in no block stays whole between a forward pass and a backward pass.
    fully_shard(empty, mesh=mesh, reshard_after_forward=True)
    empty.to_empty(device=device)
    options = checkpoint.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    tensors = whole.state_dict() if is_main() else {}
    checkpoint.set_model_state_dict(empty, tensors, options=options)
    # Buffers such as rotary frequencies are in no state dict, and to_empty has left them blank.
    buffers = dict(whole.named_buffers()) if is_main() else {}
    for name, buffer in empty.named_buffers():
        if is_main():
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    return empty


def whole_adapters(model):
    """hyplora_state_dict(model) as copies on the CPU, gathered on every process."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor.detach() for name, tensor in named if "lora_" in name}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = whole.cpu().clone()
    return tensors


def set_adapters(model, tensors):
    """Give the model what whole_adapters returned."""
    if is_sharded(model):
        options = checkpoint.StateDictOptions(full_state_dict=True, strict=False)
        checkpoint.set_model_state_dict(model, dict(tensors), options=options)
    else:
        hyplora.set_hyplora_state_dict(model, tensors)


# --- Batches and their loss ---------------------------------------------------------------------


def seeded(*numbers):
    """A torch.Generator that depends on all of the numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def records_of_step(records, step, args):
    """The records of a step. An epoch has each record once, in an order of its own."""
    epoch, place = divmod(step, math.ceil(len(records) / args.batch_size))
    order = torch.randperm(len(records), generator=seeded(args.seed, epoch)).tolist()
    chosen = order[place * args.batch_size : (place + 1) * args.batch_size]
    return [records[i] for i in chosen]


def make_batch(records, loss_on, device="cpu"):
    """ids, attention mask and labels, each (batch, T). A label is the next token, or IGNORE.

    loss_on: "answer" learns the target alone, "all" the prompt too, "nothing" neither.
    """
    ids = []
    labels = []
    for record in records:
        row = torch.tensor(record.prompt_ids + record.target_ids)
        ignored = {"answer": len(record.prompt_ids) - 1, "all": 0, "nothing": len(row)}
        ids.append(row[:-1])
        labels.append(row[1:].clone())
        labels[-1][: ignored[loss_on]] = IGNORE
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    return pad_sequence(ids, batch_first=True).to(device), mask.to(device), labels.to(device)


def make_parts(records, args):
    """This process's batches, args.accumulate of them, of the records of a step.

    Engines of several processes work at the same time, so who has no record gets one to ignore.
    """
    rank, processes = rank_and_count()
    for part in range(rank, processes * args.accumulate, processes):
        mine = records[part :: processes * args.accumulate]
        loss_on = args.loss_on if mine else "nothing"
        yield make_batch(mine or records[:1], loss_on, args.device)


def can_leave_out_logits(model):
    forward = getattr(model, "module", model).forward  # DDP keeps the model as its module.
    return "logits_to_keep" in inspect.signature(forward).parameters


def summed_loss(model, batch):
    """The sum of the cross entropies over the labels; logits are computed where labels are."""
    ids, mask, labels = batch
    columns = (labels != IGNORE).any(dim=0).nonzero().flatten()
    inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    if can_leave_out_logits(model):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    labels = labels[:, columns]
    labelled = labels != IGNORE
    return F.cross_entropy(logits[labelled].float(), labels[labelled], reduction="sum")


def sum_over_processes(*numbers):
    """The sums over all processes of some numbers."""
    everyone = [numbers]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, numbers)
    return [sum(column) for column in zip(*everyone)]


@torch.no_grad()
def mean_loss(model, records, args):
    """The loss per label of the records, which the processes share; a float."""
    model.eval()
    loss = 0.0
    count = 0
    for start in range(0, len(records), args.batch_size):
        for part in make_parts(records[start : start + args.batch_size], args):
            loss += summed_loss(model, part).item()
            count += (part[2] != IGNORE).sum().item()
    loss, count = sum_over_processes(loss, count)
    return loss / count


# --- The loop -----------------------------------------------------------------------------------


def learning_rate(args, step):
    """A linear warm-up, then a linear decay to zero."""
    rising = (step + 1) / args.warmup_steps
    falling = (args.steps - step) / max(1, args.steps - args.warmup_steps)
    return args.lr * min(rising, falling, 1)


@contextlib.contextmanager
def hear_signals():
    """Ctrl-C and SIGTERM only fill the list that this context gives. A second Ctrl-C acts at once.

    A second SIGTERM does not: a scheduler sends one to every process, and torchrun another.
    """
    heard = []
    handlers = {}

    def hear(number, frame):
        heard.append(number)
        if number == signal.SIGINT:
            signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_or_exit(write, content, path):
    """write(content, path), by the main process; a full disk is one line and loses nothing old."""
    try:
        if is_main():
            write(content, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full.
        why = str(error).splitlines()[0]
        sys.exit(f"\n{path} can't be written: {why}. What was saved there before is whole")


def save_atomically(content, path):
    """torch.save, such that path has the old content or the new, whole, whatever happens."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
        torch.save(content, os.path.join(folder, "state"))
        os.replace(os.path.join(folder, "state"), path)


def train(model, args, label, records, validation, state_path):
    """Train the adapters with AdamW. Returns the seconds that it took, earlier runs included.

    The adapters, the optimizer and the step are written to state_path every args.save_steps steps,
    at the end, and after a signal. The adapters with the lowest loss on the validation records, if
    there are any, are what the model has at the end. args: the options of finetune.py.
    """
    optimizer = torch.optim.AdamW(hyplora.hyplora_parameters(model), weight_decay=0.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rank, processes = rank_and_count()
    whole = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True)
    best = {"loss": math.inf, "step": 0, "adapters": None}
    first = 0
    start = time.perf_counter()
    if args.resume and os.path.exists(state_path):
        try:
            state = torch.load(state_path, map_location="cpu", weights_only=True)
        except Exception as error:
            sys.exit(f"{state_path} is damaged, so that nothing can go on from it: {error}")
        first = state["step"]
        start -= state["seconds"]
        best = state["best"]
        set_adapters(model, state["adapters"])
        checkpoint.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)
        say(f"{label}: going on from step {first} of {state_path}")
    engine = model
    if processes > 1 and not is_sharded(model):
        engine = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    bar = progress(total=args.steps, initial=first, desc=label)
    with hear_signals() as heard:
        for step in range(first, args.steps):
            engine.train()
            torch.manual_seed(seeded(args.seed, step, "dropout", rank).initial_seed())
            chosen = records_of_step(records, step, args)
            count = (make_batch(chosen, args.loss_on)[2] != IGNORE).sum().item()
            loss = 0.0
            for part in make_parts(chosen, args):
                part_loss = summed_loss(engine, part) / count
                (part_loss * processes).backward()  # The engines take the mean over processes.
                loss += part_loss.item()
            loss, stop = sum_over_processes(loss, len(heard))
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if not math.isfinite(loss + norm.item()):
                why = f"the loss is {loss}, the length of its gradient {norm.item()}"
                sys.exit(f"\n{label}, step {step + 1}: {why}: lower --lr, or look at the data")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

            done = step + 1
            last = done == args.steps
            if validation and (last or done % args.eval_steps == 0):
                now = mean_loss(engine, validation, args)
                say(f"\n{label}, step {done}: validation loss {now:.4f}")
                if now < best["loss"]:
                    best = {"loss": now, "step": done, "adapters": whole_adapters(model)}
            if stop or last or done % args.save_steps == 0:
                state = {"adapters": whole_adapters(model), "best": best, "step": done}
                state["seconds"] = time.perf_counter() - start
                state["optimizer"] = checkpoint.get_optimizer_state_dict(
                    model, optimizer, options=whole
                )
                write_or_exit(save_atomically, state, state_path)
            if stop:
                bar.close()
                say(f"{label}: stopped at step {done}; the same command with --resume goes on")
                sys.exit(130)
    bar.close()
    if best["adapters"] is not None:
        set_adapters(model, best["adapters"])
        say(f"{label}: the adapters of step {best['step']} have the lowest validation loss")
    return time.perf_counter() - start
