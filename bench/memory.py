"""How much memory a training run takes: worked out for any size on no memory at all, and measured
on a CPU.

    python bench/memory.py                       what fits on which card, as the README's table
    python bench/memory.py --measure             the estimate against peaks of real runs (VmHWM of a
        process each), and ratios: LoRA to full tuning, 65,536 tokens to 4,096 at one chunk_len
    python bench/memory.py --n_layer=24 --n_embd=2048 --tune=lora --ctx_len=4096 --micro_bsz=2
                                                 one case, item by item

The estimate runs the real network, forward and backward, on tensors that have shapes and no
content, and counts them.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import unittest.mock
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config
from gosling.batch import pack
from model import RWKV, RWKVConfig
from wkv_cuda import fused

import timer

MIB = 2**20
SIZES = {
    "0.1B": (12, 768),
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
CARDS = (8, 12, 16, 24, 48, 80, 141)  # GB
METHODS = {  # sequences and decoding slots of a row
    "pretraining, SFT": (1, 0),
    "DPO, reward model": (2, 0),
    "GRPO, 8 completions": (8, 8),
}
LORA = dict(r=32)


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


# ----------------------------------------------------------------------------------------------
# worked out


class Peak(TorchDispatchMode):
    """.most: the bytes of the tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self.drop, size)

    def drop(self, size):
        self.alive -= size


def rows_on_a_gpu(h, weight):
    """fused.ScoreTokens.rows_at_a_time, wherever the tensors are."""
    return max(256, 2**26 // len(weight))


def rows_on_a_cpu(h, weight):
    return max(256, 2**22 // len(weight))


def estimate(c, tune, tokens, dtype, grad_cp=False, slots=0, gpu=True):
    """Bytes by what they are for. tokens: of a backward pass; slots: sequences decoded together."""
    with torch.device("meta"):
        model = RWKV(c)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.set_tune(tune, **(LORA if tune == "lora" else {}))
    model.compute_dtype, model.grad_cp = dtype, grad_cp
    rows = staticmethod(rows_on_a_gpu if gpu else rows_on_a_cpu)
    as_meant = unittest.mock.patch.object(fused.ScoreTokens, "rows_at_a_time", rows)
    with as_meant, FakeTensorMode(), Peak() as memory:
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                fake = torch.empty(p.shape, dtype=p.dtype)
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=p.requires_grad))
        weights = memory.alive
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        fixed, idx = memory.alive, torch.zeros(1, tokens, dtype=torch.long)
        scores, _ = model(idx, targets=idx)
        scores.logps.sum().backward()
    state = slots * c.n_layer * c.n_embd * (4 * c.head_size + 2 * dtype.itemsize)
    return dict(
        weights=weights,
        optimiser=sum(x.nbytes for x in moments),
        backward=memory.most - fixed,
        states=2 * state,
    )


def estimate_case(cfg, n_layer, n_embd):
    sequences, slots = METHODS[cfg.method]
    return estimate(
        RWKVConfig("x070", n_layer, n_embd, cfg.vocab),
        cfg.tune,
        cfg.micro_bsz * sequences * cfg.ctx_len,
        getattr(torch, cfg.dtype),
        cfg.grad_cp,
        cfg.micro_bsz * slots,
    )


def cell(gb):
    """The table's words for so many GB; the allocator leaves gaps, and CUDA takes some itself."""
    for card in CARDS:
        if gb * 1.05 + 0.6 < card:
            return f"{gb:.1f} -> {card}"
    return f"{gb:.0f}: more than one"


def table(cfg):
    print(
        f"ctx_len {cfg.ctx_len}, micro_bsz {cfg.micro_bsz}, grad_cp {cfg.grad_cp}, {cfg.dtype}; "
        "GB, and the smallest card that holds it"
    )
    print("| | tune | " + " | ".join(SIZES) + " |\n|---|---|" + "---|" * len(SIZES))
    for method in METHODS:
        for tune in ("full", "lora", "state"):
            row = dataclasses.replace(cfg, method=method, tune=tune)
            cells = [cell(sum(estimate_case(row, *size).values()) / 1e9) for size in SIZES.values()]
            print(f"| {method} | {tune} | " + " | ".join(cells) + " |", flush=True)


# ----------------------------------------------------------------------------------------------
# measured


@dataclass(frozen=True)
class Case:
    tune: str
    n_layer: int
    n_embd: int
    vocab: int
    T: int
    chunk_len: int = 0
    grad_cp: bool = False


def random_model(case):
    """A network whose initial values are quick to draw, and its optimiser."""
    with torch.device("meta"):
        model = RWKV(RWKVConfig("x070", case.n_layer, case.n_embd, case.vocab))
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.set_tune(case.tune, **(LORA if case.tune == "lora" else {}))
    model.grad_cp = case.grad_cp
    return model, torch.optim.AdamW(model.param_groups(1e-4, 0.0), fused=True)


def train(case):
    """Two optimiser steps, or none without a case -> the largest memory of this process, bytes."""
    torch.set_num_threads(1)
    if case is not None:
        model, opt = random_model(case)
        for _ in range(2):
            ids = torch.randint(0, case.vocab, (case.T + 1,)).tolist()
            x, y, weight, cu_seqlens = pack([(ids, [1] * len(ids))])
            scores, _ = model(x, cu_seqlens=cu_seqlens, targets=y, chunk_len=case.chunk_len)
            loss = -(weight * scores.logps).sum() / case.T
            loss.backward()
            opt.step()
            opt.zero_grad()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def peak(case):
    """`train` in a process of its own."""
    # Every tensor is a mapping of its own: glibc's heap, left to itself, keeps up to 1.6 times as
    # much.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(train, case).result()


def compare_with_estimate(case, measured):
    c = RWKVConfig("x070", case.n_layer, case.n_embd, case.vocab)
    items = estimate(c, case.tune, case.T, torch.float32, case.grad_cp, gpu=False)
    estimated = sum(items.values())
    words = f"{case.tune}, {case.n_layer} x {case.n_embd}, vocabulary {case.vocab}, {case.T} tokens"
    timer.report(
        "memory",
        case=f"{words}, grad_cp" if case.grad_cp else words,
        estimate_mib=round(estimated / MIB),
        measured_mib=round(measured / MIB),
        ratio=round(estimated / measured, 3),
    )


def measure(cfg):
    torch.set_num_threads(1)
    nothing = peak(None)
    full = Case("full", 12, 768, 65536, 128)
    lora = dataclasses.replace(full, tune="lora")
    peaks = {}
    for case in (
        full,
        lora,
        Case("full", 12, 768, 65536, 1024, grad_cp=True),
        Case("full", 6, 512, 4096, 2048),
        Case("lora", 6, 512, 4096, 4096),
        Case("state", 6, 512, 4096, 4096, grad_cp=True),
    ):
        peaks[case] = peak(case)
        compare_with_estimate(case, peaks[case] - nothing)
    timer.report(
        "memory",
        case="lora to full, 12 x 768, vocabulary 65536, ctx 128, one document",
        lora_mib=round(peaks[lora] / MIB),
        full_mib=round(peaks[full] / MIB),
        ratio=round(peaks[lora] / peaks[full], 3),
    )
    short, long = (peak(Case("full", 4, 256, 4096, T, cfg.chunk_len)) for T in (4096, 65536))
    timer.report(
        "memory",
        case=f"65,536 tokens to 4,096, 4 x 256, chunk_len {cfg.chunk_len}, exact gradient",
        short_mib=round(short / MIB),
        long_mib=round(long / MIB),
        ratio=round(long / short, 3),
    )


def main(cfg):
    if cfg.measure:
        measure(cfg)
    elif cfg.n_layer:
        items = estimate_case(cfg, cfg.n_layer, cfg.n_embd)
        items["together"] = sum(items.values())
        print(" | ".join(f"{name} {size / 1e9:.2f} GB" for name, size in items.items()))
    else:
        table(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
