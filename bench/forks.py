"""DPO's forward and backward pass with each prompt run once, as a ratio to two full sequences a pair, interleaved.

python bench/forks.py          # prompts of 256 tokens, answers of 64, one thread, process CPU time
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
from model import RWKV, RWKVConfig, fork, forked_backward  # noqa: E402


@dataclass
class Config:
    n_layer: int = 4  # layers
    n_embd: int = 256  # width
    vocab: int = 4096  # vocabulary
    prompt: int = 256  # tokens of a prompt
    answer: int = 64  # tokens of an answer
    pairs: int = 4  # pairs of a pass
    rounds: int = 9  # counted passes of each
    threads: int = 1  # CPU threads


def main(cfg):
    torch.set_num_threads(cfg.threads)
    g = torch.Generator().manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))
    ids = lambda n: torch.randint(0, cfg.vocab, (n,), generator=g).tolist()  # noqa: E731
    groups = [(ids(cfg.prompt), [ids(cfg.answer), ids(cfg.answer)]) for _ in range(cfg.pairs)]
    layouts = {
        "shared": groups,
        "apart": [(prompt, [answer]) for prompt, answers in groups for answer in answers],
    }
    seconds = {name: [] for name in layouts}

    def loss_of(forks):
        def loss(scores):
            chosen, rejected = forks.per_answer(scores.logps).view(-1, 2).T
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean(), None

        return loss

    for i in range(cfg.rounds + 1):
        for name, layout in layouts.items():
            forks = fork(layout)
            t = time.process_time()
            forked_backward(model, forks, loss_of(forks))
            model.zero_grad()
            if i:  # the first is the warm-up
                seconds[name].append(time.process_time() - t)
    print(
        json.dumps(
            dict(
                bench="forks",
                date=str(date.today()),
                n_layer=cfg.n_layer,
                n_embd=cfg.n_embd,
                prompt=cfg.prompt,
                answer=cfg.answer,
                pairs=cfg.pairs,
                shared_pairs_per_s=round(cfg.pairs / statistics.median(seconds["shared"]), 2),
                apart_pairs_per_s=round(cfg.pairs / statistics.median(seconds["apart"]), 2),
                ratio=round(
                    statistics.median(b / a for a, b in zip(seconds["shared"], seconds["apart"])), 3
                ),
                threads=cfg.threads,
                torch=torch.__version__,
                device=runs.cpu_name(),
            )
        )
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
