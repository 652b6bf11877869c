"""Speed of the recurrences alone, forward and backward: every form that runs here, as a ratio to the naive loop.

    python bench/wkv.py                         # CPU: process CPU time, interleaved, median; JSON lines
    python bench/wkv.py --device=cuda --T=4096 --H=32 --dtype=bfloat16
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import wkv_cuda  # noqa: E402


@dataclass
class Config:
    device: str = "cpu"   # cpu or cuda
    B: int = 8            # rows
    T: int = 512          # tokens
    H: int = 4            # heads of 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of everything but log w and the state
    rounds: int = 5       # counted passes of each form, interleaved
    threads: int = 1      # CPU threads


def make(version, cfg):
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.dtype)
    r, k, v, x, y = (torch.randn(cfg.B, cfg.T, cfg.H, 64, device=cfg.device) for _ in range(5))
    if version == 7:
        kappa = torch.nn.functional.normalize(y, dim=-1)
        xs = [r, -0.6065 * x.sigmoid(), k * 0.3, v, -kappa, kappa * x.sigmoid()]
    else:
        xs = [r, -torch.exp(x - 1), k * 0.3, v, torch.randn(cfg.H, 64, device=cfg.device)]
    return [t.to(torch.float32 if i == 1 else dtype).requires_grad_() for i, t in enumerate(xs)]


def seconds(version, backend, xs):
    """One forward and one backward: CPU time on a CPU, elapsed time between synchronisations on a GPU."""
    cuda = xs[0].is_cuda
    clock = time.perf_counter if cuda else time.process_time
    times = []
    for _ in range(2):
        if cuda:
            torch.cuda.synchronize()
        times.append(clock())
        if len(times) == 1:
            y, _ = (wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6)(*xs, backend=backend)
        else:
            torch.autograd.grad(y, xs, torch.ones_like(y))
    if cuda:
        torch.cuda.synchronize()
    return times[1] - times[0], clock() - times[1]


def main(cfg):
    torch.set_num_threads(cfg.threads)
    forms = ["naive", "chunked", "cuda_seq" if cfg.device.startswith("cuda") else "cpu"]
    for version in (7, 6):
        xs = make(version, cfg)
        us = {form: ([], []) for form in forms}  # per token and head
        for i in range(cfg.rounds + 1):
            for form in forms:
                pair = seconds(version, form, xs)
                if i:  # the first is the warm-up
                    for kept, s in zip(us[form], pair):
                        kept.append(s * 1e6 / (cfg.B * cfg.T * cfg.H))
        for form in forms[1:]:
            ratio = {peer: statistics.median((a + b) / (c + d) for a, b, c, d in zip(*us[peer], *us[form]))
                     for peer in ("naive", "chunked")}
            print(json.dumps(dict(
                bench="wkv", date=str(date.today()), version=version, form=form, B=cfg.B, T=cfg.T, H=cfg.H, dtype=cfg.dtype,
                us_per_token_head_forward=round(statistics.median(us[form][0]), 3),
                us_per_token_head_backward=round(statistics.median(us[form][1]), 3),
                naive_us_per_token_head=round(statistics.median(a + b for a, b in zip(*us["naive"])), 2),
                times_faster_than_naive=round(ratio["naive"], 2),
                times_faster_than_chunked=round(ratio["chunked"], 2), threads=cfg.threads, torch=torch.__version__,
                device=torch.cuda.get_device_name() if cfg.device.startswith("cuda") else common.cpu_name())), flush=True)


if __name__ == "__main__":
    main(common.read_flags(Config))
