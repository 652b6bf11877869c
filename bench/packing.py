"""Fine-tuning throughput of packed documents as a ratio to right padding, in the same run, interleaved.

python bench/packing.py          # lengths uniform in 16..512, micro-batch 8, one thread, process CPU time
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, runs  # noqa: E402
from model import RWKV, RWKVConfig, backward, pack, pad  # noqa: E402


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


def main(cfg):
    torch.set_num_threads(cfg.threads)
    g = torch.Generator().manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))
    seconds, tokens = {"packed": [], "padded": []}, []
    for i in range(cfg.rounds + 1):
        lengths = torch.randint(
            cfg.shortest, cfg.longest + 1, (cfg.micro_bsz,), generator=g
        ).tolist()
        docs = [(torch.randint(0, cfg.vocab, (n,), generator=g).tolist(), [1] * n) for n in lengths]
        for name, layout in (("packed", pack), ("padded", pad)):
            t = time.process_time()
            x, y, weight, borders = layout(docs)
            backward(model, x, y, weight / weight.sum(), borders)
            model.zero_grad()
            if i:  # the first is the warm-up
                seconds[name].append(time.process_time() - t)
        if i:
            tokens.append(sum(lengths))
    print(
        json.dumps(
            dict(
                bench="packing",
                date=str(date.today()),
                n_layer=cfg.n_layer,
                n_embd=cfg.n_embd,
                vocab=cfg.vocab,
                lengths=[cfg.shortest, cfg.longest],
                micro_bsz=cfg.micro_bsz,
                packed_tokens_per_s=round(sum(tokens) / sum(seconds["packed"])),
                padded_tokens_per_s=round(sum(tokens) / sum(seconds["padded"])),
                ratio=round(
                    statistics.median(b / a for a, b in zip(seconds["packed"], seconds["padded"])),
                    3,
                ),
                threads=cfg.threads,
                torch=torch.__version__,
                device=runs.cpu_name(),
            )
        )
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
