"""torch.compile against the network as it is: a training step, a forward pass, one token.

python bench/compile.py          # RWKV-7, 6 layers of width 384, one thread, process CPU time
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config
from model import RWKV, RWKVConfig
from wkv_cuda import fused

import timer


@dataclass
class Config:
    version: str = "x070"  # or x060
    n_layer: int = 6  # layers
    n_embd: int = 384  # width
    vocab: int = 4096  # vocabulary
    ctx: int = 256  # tokens of a row
    bsz: int = 4  # rows
    rounds: int = 9  # counted runs of each
    threads: int = 1  # CPU threads


def train(model, network, ids):
    """Loss and gradients, without the optimiser."""
    scores, _ = network(ids[:, :-1], targets=ids[:, 1:])
    (-scores.logps.mean()).backward()
    model.zero_grad()


@torch.no_grad()
def forward(network, ids):
    network(ids)


@torch.no_grad()
def tokens(network, ids, state):
    """One token a call, 16 calls."""
    for t in range(16):
        _, state = network(ids[:1, t : t + 1], state)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    fused.build("cpu")
    model = RWKV(RWKVConfig(cfg.version, cfg.n_layer, cfg.n_embd, cfg.vocab))
    compiled = torch.compile(model)
    ids = torch.randint(0, cfg.vocab, (cfg.bsz, cfg.ctx + 1))
    start = time.perf_counter()
    train(model, compiled, ids)
    compile_s = round(time.perf_counter() - start)
    ratios, ms = {}, {}
    for name, work, args in (
        ("train", functools.partial(train, model), (ids,)),
        ("forward", forward, (ids[:, :-1],)),
        ("token", tokens, (ids, model.zero_state(1))),
    ):
        sides = {
            "eager": functools.partial(work, model, *args),
            "compiled": functools.partial(work, compiled, *args),
        }
        seconds = timer.interleaved(sides, cfg.rounds, warm_ups=2)
        ratios[name] = timer.median(seconds["eager"] / seconds["compiled"], 2)
        ms[name] = {side: timer.median(s * 1e3, 1) for side, s in seconds.items()}
    timer.report("compile", **vars(cfg), compile_s=compile_s, ms=ms, ratios=ratios)


if __name__ == "__main__":
    main(config.read_flags(Config))
