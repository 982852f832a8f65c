"""A random checkpoint of a published shape in the hubs' layout, with records of about 1000 tokens.

For scaling/finetune at the size of a real model. Each block has a file, and they are written
one after the other, so that the model need not fit into memory. A token is a byte.

    python -m benchmarks.large_checkpoint 7b /tmp/7b
    torchrun --nproc-per-node 2 -m scaling.finetune --shard --checkpoint /tmp/7b \\
        --data /tmp/7b/records.json --dtype bfloat16 --rank 32 --batch-size 4 --steps 12 \\
        --targets q_proj k_proj v_proj up_proj down_proj --loss-on all --out /tmp/7b/runs

pip install safetensors tokenizers
"""

import argparse
import json
import random
from pathlib import Path

import torch

from benchmarks.processes import SHAPES
from benchmarks.small_checkpoint import END, byte_tokenizer
from scaling.checkpoint import names_in_files, read_config
from scaling.decoder import Decoder
from scaling.processes import need

RECORDS = 16


def write_large_checkpoint(folder, shape, device):
    """Write config.json, tokenizer.json, the index and the files of the weights, in bfloat16."""
    safetensors = need("safetensors.torch", "a checkpoint")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family, fields = SHAPES[shape]
    fields = dict(model_type=family, eos_token_id=END, **fields)
    fields["vocab_size"] = max(fields["vocab_size"], END + 2)
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        model = Decoder(read_config(folder))
    files = {}
    for name, parameter in names_in_files(model, ()).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    weight_map = {}
    torch.manual_seed(0)
    for file, shapes in files.items():
        tensors = {}
        for name, size in shapes.items():
            tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
            if name.endswith(".bias"):
                tensor.zero_()
            elif len(size) == 1:
                tensor.fill_(1)  # The weight of an RMSNorm.
            else:
                tensor.normal_(std=0.02)
            tensors[name] = tensor.cpu()
            weight_map[name] = file
        safetensors.save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_records(path):
    """Records whose texts are as long as one another."""
    rng = random.Random(0)
    records = []
    for _ in range(RECORDS):
        digits = "".join(rng.choice("0123456789") for _ in range(400))
        records.append({"instruction": f"Repeat {digits}", "input": "", "output": digits})
    Path(path).write_text(json.dumps(records))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = write_large_checkpoint(args.folder, args.shape, device)
    write_records(folder / "records.json")
    print(f"{args.shape} is written to {folder}")


if __name__ == "__main__":
    main()
