"""Fine-tuning throughput of packed documents as a ratio to right padding.

python bench/packing.py          # 8 documents of 16 to 512 tokens, one thread, process CPU time
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config
from gosling.batch import pack, pad
from model import RWKV, RWKVConfig

import timer


@dataclass
class Config:
    n_layer: int = 4  # layers
    n_embd: int = 256  # width
    vocab: int = 4096  # vocabulary
    shortest: int = 16  # tokens
    longest: int = 512  # tokens
    micro_bsz: int = 8  # documents of a pass
    rounds: int = 9  # counted passes of each, over different documents
    threads: int = 1  # CPU threads


def one_pass(model, layout, batches):
    x, y, weight, cu_seqlens = layout(next(batches))
    scores, _ = model(x, cu_seqlens=cu_seqlens, targets=y)
    loss = -(scores.logps * weight).sum() / weight.sum()
    loss.backward()
    model.zero_grad()


def main(cfg):
    torch.set_num_threads(cfg.threads)
    g = torch.Generator().manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))
    batches = []  # the first is the warm-up's
    for _ in range(cfg.rounds + 1):
        lengths = torch.randint(cfg.shortest, cfg.longest + 1, (cfg.micro_bsz,), generator=g)
        batch = []
        for n in lengths.tolist():
            batch.append((torch.randint(0, cfg.vocab, (n,), generator=g).tolist(), [1] * n))
        batches.append(batch)
    tokens = sum(len(ids) for batch in batches[1:] for ids, _ in batch)
    seconds = timer.interleaved(
        {
            "packed": functools.partial(one_pass, model, pack, iter(batches)),
            "padded": functools.partial(one_pass, model, pad, iter(batches)),
        },
        cfg.rounds,
    )
    timer.report(
        "packing",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        vocab=cfg.vocab,
        lengths=[cfg.shortest, cfg.longest],
        micro_bsz=cfg.micro_bsz,
        packed_tokens_per_s=round(tokens / seconds["packed"].sum()),
        padded_tokens_per_s=round(tokens / seconds["padded"].sum()),
        ratio=timer.median(seconds["padded"] / seconds["packed"], 3),
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
