"""Speed of the recurrences alone on a CPU, forward and backward, as a ratio to the naive loop. A GPU's: bench/kernels.py.

python bench/wkv.py                         # process CPU time, interleaved, median; JSON lines
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
from gosling import config, runs  # noqa: E402
import wkv_cuda  # noqa: E402


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


def seconds(version, backend, xs):
    """CPU time of one forward and one backward."""
    start = time.process_time()
    y, _ = (wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6)(*xs, backend=backend)
    middle = time.process_time()
    torch.autograd.grad(y, xs, torch.ones_like(y))
    return middle - start, time.process_time() - middle


def main(cfg):
    torch.set_num_threads(cfg.threads)
    forms = ["naive", "chunked", "cpu"]
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
            ratio = {
                peer: statistics.median(
                    (a + b) / (c + d) for a, b, c, d in zip(*us[peer], *us[form])
                )
                for peer in ("naive", "chunked")
            }
            print(
                json.dumps(
                    dict(
                        bench="wkv",
                        date=str(date.today()),
                        version=version,
                        form=form,
                        B=cfg.B,
                        T=cfg.T,
                        H=cfg.H,
                        dtype=cfg.dtype,
                        us_per_token_head_forward=round(statistics.median(us[form][0]), 3),
                        us_per_token_head_backward=round(statistics.median(us[form][1]), 3),
                        naive_us_per_token_head=round(
                            statistics.median(a + b for a, b in zip(*us["naive"])), 2
                        ),
                        times_faster_than_naive=round(ratio["naive"], 2),
                        times_faster_than_chunked=round(ratio["chunked"], 2),
                        threads=cfg.threads,
                        torch=torch.__version__,
                        device=runs.cpu_name(),
                    )
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(config.read_flags(Config))
