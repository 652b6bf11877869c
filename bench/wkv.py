"""Speed of the recurrences alone on a CPU, forward and backward, as a ratio to the naive loop.

python bench/wkv.py          # process CPU time, median; JSON lines. A GPU's: bench/kernels.py
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wkv_cuda
from gosling import config

import timer


@dataclass
class Config:
    B: int = 8  # rows
    T: int = 512  # tokens
    H: int = 4  # heads of 64
    dtype: Literal["float32", "bfloat16"] = "float32"  # of everything but log w and the state
    rounds: int = 5  # counted passes of each form, interleaved
    threads: int = 1  # CPU threads


def make(version, cfg):
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.dtype)
    r, k, v, x, y = (torch.randn(cfg.B, cfg.T, cfg.H, 64) for _ in range(5))
    if version == 7:
        kappa = torch.nn.functional.normalize(y, dim=-1)
        xs = [r, -0.6065 * x.sigmoid(), k * 0.3, v, -kappa, kappa * x.sigmoid()]
    else:
        xs = [r, -torch.exp(x - 1), k * 0.3, v, torch.randn(cfg.H, 64)]
    return [t.to(torch.float32 if i == 1 else dtype).requires_grad_() for i, t in enumerate(xs)]


def forward(version, form, xs):
    wkv = wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6
    return wkv(*xs, backend=form)[0]


def forward_and_backward(version, form, xs):
    y = forward(version, form, xs)
    torch.autograd.grad(y, xs, torch.ones_like(y))


def main(cfg):
    torch.set_num_threads(cfg.threads)
    for version in (7, 6):
        xs = make(version, cfg)
        sides = {"naive": functools.partial(forward_and_backward, version, "naive", xs)}
        for form in ("chunked", "cpu"):
            sides[form] = functools.partial(forward_and_backward, version, form, xs)
            sides[f"{form} forward"] = functools.partial(forward, version, form, xs)
        seconds = timer.interleaved(sides, cfg.rounds)
        us = {name: 1e6 * s / (cfg.B * cfg.T * cfg.H) for name, s in seconds.items()}
        for form in ("chunked", "cpu"):
            timer.report(
                "wkv",
                version=version,
                form=form,
                B=cfg.B,
                T=cfg.T,
                H=cfg.H,
                dtype=cfg.dtype,
                us_per_token_head_forward=timer.median(us[f"{form} forward"], 3),
                us_per_token_head_backward=timer.median(us[form] - us[f"{form} forward"], 3),
                naive_us_per_token_head=timer.median(us["naive"], 2),
                times_faster_than_naive=timer.median(us["naive"] / us[form], 2),
                times_faster_than_chunked=timer.median(us["chunked"] / us[form], 2),
            )


if __name__ == "__main__":
    main(config.read_flags(Config))
