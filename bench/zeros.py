"""How many of the channel mix's hidden units relu^2 leaves at 0 in a trained model, layer by layer:
what step_cpu.cpp need not read of ffn.value.

    python bench/zeros.py --model=out/demo/sft/rwkv-final.pth --data=out/demo/data/tasks_val
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling.config import UserError, read_flags
from gosling.token_files import TokenFile
from model import RWKV

import timer


@dataclass
class Config:
    model: str = "out/demo/sft/rwkv-final.pth"  # a model's weights
    data: str = "out/demo/data/tasks_val"  # a token file of its tokenizer
    groups: int = 4  # of four windows each, from the start of the data
    ctx_len: int = 256  # tokens of a window


def keep_zeros(found, module, inputs, output):
    """A forward hook of ffn.key: which units are 0 after the relu, [rows, T, F], into `found`."""
    found.append(output <= 0)


@torch.no_grad()
def main(cfg):
    model = RWKV.from_pretrained(cfg.model).eval()
    n_tokens = 4 * cfg.groups * cfg.ctx_len
    tokens = TokenFile(cfg.data).tokens[:n_tokens].astype("int64")
    if len(tokens) < n_tokens:
        raise UserError(f"{cfg.data} has {len(tokens)} tokens, {n_tokens} are needed: lower groups")
    found = []
    for block in model.blocks:
        block.ffn.key.register_forward_hook(functools.partial(keep_zeros, found))
    model(torch.from_numpy(tokens).view(-1, cfg.ctx_len))
    together = {}  # share of units that are 0 in all of so many rows at once, mean of the layers
    for rows in (2, 4):
        of_groups = [zero.unflatten(0, (-1, rows)).all(1).float().mean() for zero in found]
        together[rows] = round(torch.stack(of_groups).mean().item(), 3)
    of_layers = [round(zero.float().mean().item(), 3) for zero in found]
    timer.report("zeros", model=cfg.model, of_layers=of_layers, together=together)


if __name__ == "__main__":
    main(read_flags(Config))
