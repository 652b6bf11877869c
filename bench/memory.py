"""How much memory a training run takes: worked out for any size on no memory at all, and measured on a CPU.

    python bench/memory.py                       what fits on which card, as the README's table
    python bench/memory.py --measure             estimate against peaks of real runs (VmHWM of a process each), and ratios:
                                                 LoRA to full tuning, 65,536 tokens to 4,096 at the same chunk_len
    python bench/memory.py --n_layer=24 --n_embd=2048 --tune=lora --ctx_len=4096 --micro_bsz=2       one case, item by item

The estimate runs the real network, forward and backward, on tensors that have shapes and no content, and counts them.
"""

import json
import os
import re
import subprocess
import sys
import weakref
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gosling import config, runs  # noqa: E402
from model import RWKV, RWKVConfig, ScoreTokens  # noqa: E402

SIZES = {
    "0.1B": (12, 768),
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
CARDS = (8, 12, 16, 24, 48, 80, 141)  # GB
METHODS = {
    "pretraining, SFT": (1, 0),
    "DPO, reward model": (2, 0),
    "GRPO, 8 completions": (8, 8),
}  # sequences and decoding slots of a row
CASE = """
import sys, torch
from model import RWKV, RWKVConfig, backward, pack
tune, n_layer, n_embd, vocab, T, chunk_len, grad_cp = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
if tune != "nothing":
    with torch.device("meta"):
        model = RWKV(RWKVConfig("x070", n_layer, n_embd, vocab))
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.set_tune(tune, **(dict(r=32) if tune == "lora" else {}))
    model.grad_cp = bool(grad_cp)
    opt = torch.optim.AdamW(model.param_groups(1e-4, 0.0), fused=True)
for step in range(2 if tune != "nothing" else 0):
    ids = torch.randint(0, vocab, (T + 1,)).tolist()
    x, y, weight, borders = pack([(ids, [1] * len(ids))])
    backward(model, x, y, weight / T, borders, chunk_len)
    opt.step()
    opt.zero_grad()
print(open("/proc/self/status").read())
"""


@dataclass
class Config:
    measure: bool = False  # real runs, minutes
    n_layer: int = 0  # one case: layers; 0 = the table
    n_embd: int = 768  # width
    vocab: int = 65536  # vocabulary
    tune: Literal["full", "lora", "state"] = "full"  # what trains
    method: str = "pretraining, SFT"  # or "DPO, reward model", "GRPO, 8 completions"
    ctx_len: int = 1024  # tokens of a sequence
    micro_bsz: int = 1  # documents, pairs or prompts of a backward pass
    grad_cp: bool = True  # gradient checkpointing
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of frozen weights and of the computation
    chunk_len: int = 1024  # --measure: of the long-context pair


class Peak(TorchDispatchMode):
    """.most: the bytes of the tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (
            x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ):
            if storage not in self.seen:
                self.seen[storage] = size = storage.nbytes()
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self.drop, size)
        return out

    def drop(self, size):
        self.alive -= size


def estimate(c, tune, tokens, dtype, grad_cp=False, slots=0, gpu=True):
    """Bytes by what they are for. tokens: of a backward pass; slots: sequences decoded together."""
    with torch.device("meta"):
        model = RWKV(c)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.set_tune(tune, **(dict(r=32) if tune == "lora" else {}))
    model.compute_dtype, model.grad_cp, rows = dtype, grad_cp, ScoreTokens.rows
    ScoreTokens.rows = staticmethod(
        lambda h, w: max(256, (2**26 if gpu else 2**22) // len(w))
    )  # as on the device meant
    with FakeTensorMode(), Peak() as memory:
        for m in model.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    m._parameters[name] = torch.nn.Parameter(
                        torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad
                    )
        weights = memory.alive
        moments = [
            torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)
        ]
        fixed, idx = memory.alive, torch.zeros(1, tokens, dtype=torch.long)
        scores, _ = model(idx, targets=idx)
        scores.logps.sum().backward()
    ScoreTokens.rows = rows
    state = slots * c.n_layer * c.n_embd * (4 * c.head_size + 2 * dtype.itemsize)
    return dict(
        weights=weights,
        optimiser=sum(x.nbytes for x in moments),
        backward=memory.most - fixed,
        states=2 * state,
    )


def peak(*args):
    """Bytes of a process that takes two optimiser steps. Every tensor is a mapping of its own: glibc's heap, left to itself,
    keeps up to 1.6 times as much."""
    done = subprocess.run(
        [sys.executable, "-c", CASE, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) * 1024


def measure(cfg):
    about, MB = (
        dict(
            bench="memory",
            date=str(date.today()),
            device=runs.cpu_name(),
            torch=torch.__version__,
        ),
        2**20,
    )
    print_ = lambda **row: print(json.dumps({**about, **row}), flush=True)  # noqa: E731
    nothing = peak("nothing", 0, 0, 0, 0, 0, 0)
    measured = {}
    for case in (
        ("full", 12, 768, 65536, 128, 0, 0),
        ("lora", 12, 768, 65536, 128, 0, 0),
        ("full", 12, 768, 65536, 1024, 0, 1),
        ("full", 6, 512, 4096, 2048, 0, 0),
        ("lora", 6, 512, 4096, 4096, 0, 0),
        ("state", 6, 512, 4096, 4096, 0, 1),
    ):
        tune, n_layer, n_embd, vocab, T, _, grad_cp = case
        measured[case] = peak(*case)
        said = sum(
            estimate(
                RWKVConfig("x070", n_layer, n_embd, vocab),
                tune,
                T,
                torch.float32,
                bool(grad_cp),
                gpu=False,
            ).values()
        )
        print_(
            case=f"{tune}, {n_layer} x {n_embd}, vocabulary {vocab}, {T} tokens"
            + ", grad_cp" * grad_cp,
            estimate_mib=round(said / MB),
            measured_mib=round((measured[case] - nothing) / MB),
            ratio=round(said / (measured[case] - nothing), 3),
        )
    full, lora = (measured[tune, 12, 768, 65536, 128, 0, 0] for tune in ("full", "lora"))
    print_(
        case="lora to full, 12 x 768, vocabulary 65536, ctx 128, one document",
        lora_mib=round(lora / MB),
        full_mib=round(full / MB),
        ratio=round(lora / full, 3),
    )
    short, long = (peak("full", 4, 256, 4096, T, cfg.chunk_len, 0) for T in (4096, 65536))
    print_(
        case=f"65,536 tokens to 4,096, 4 x 256, chunk_len {cfg.chunk_len}, exact gradient",
        short_mib=round(short / MB),
        long_mib=round(long / MB),
        ratio=round(long / short, 3),
    )


def case(cfg, n_layer, n_embd):
    sequences, slots = METHODS[cfg.method]
    return estimate(
        RWKVConfig("x070", n_layer, n_embd, cfg.vocab),
        cfg.tune,
        cfg.micro_bsz * sequences * cfg.ctx_len,
        getattr(torch, cfg.dtype),
        cfg.grad_cp,
        cfg.micro_bsz * slots,
    )


def main(cfg):
    if cfg.measure:
        return measure(cfg)
    if cfg.n_layer:
        items = case(cfg, cfg.n_layer, cfg.n_embd)
        return print(
            " | ".join(
                f"{k} {v / 1e9:.2f} GB"
                for k, v in {**items, "together": sum(items.values())}.items()
            )
        )
    print(
        f"ctx_len {cfg.ctx_len}, micro_bsz {cfg.micro_bsz}, grad_cp {cfg.grad_cp}, {cfg.dtype}; GB, and the smallest card that holds it"
    )
    print("| | tune | " + " | ".join(SIZES) + " |\n|---|---|" + "---|" * len(SIZES))
    for method in METHODS:
        for tune in ("full", "lora", "state"):
            cells = []
            for size in SIZES.values():
                gb = (
                    sum(
                        case(
                            Config(**{**asdict(cfg), "method": method, "tune": tune}), *size
                        ).values()
                    )
                    / 1e9
                )
                card = next(
                    (c for c in CARDS if gb * 1.05 + 0.6 < c), None
                )  # the allocator's gaps; CUDA itself
                cells.append(f"{gb:.1f} -> {card}" if card else f"{gb:.0f}: more than one")
            print(f"| {method} | {tune} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(config.read_flags(Config))
