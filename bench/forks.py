"""DPO's forward and backward pass with each prompt run once, as a ratio to two whole sequences.

python bench/forks.py          # prompts of 256 tokens, answers of 64, one thread, process CPU time
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config
from gosling.batch import fork, score_forks
from model import RWKV, RWKVConfig

import timer


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


def one_pass(model, forks):
    chosen, rejected = forks.per_answer(score_forks(model, forks).logps).view(-1, 2).T
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    model.zero_grad()


def main(cfg):
    torch.set_num_threads(cfg.threads)
    g = torch.Generator().manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))

    def random_ids(n):
        return torch.randint(0, cfg.vocab, (n,), generator=g).tolist()

    shared = [
        (random_ids(cfg.prompt), [random_ids(cfg.answer), random_ids(cfg.answer)])
        for _ in range(cfg.pairs)
    ]
    apart = [(prompt_ids, [answer]) for prompt_ids, answers in shared for answer in answers]
    seconds = timer.interleaved(
        {
            "shared": functools.partial(one_pass, model, fork(shared)),
            "apart": functools.partial(one_pass, model, fork(apart)),
        },
        cfg.rounds,
    )
    timer.report(
        "forks",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        prompt=cfg.prompt,
        answer=cfg.answer,
        pairs=cfg.pairs,
        shared_pairs_per_s=timer.median(cfg.pairs / seconds["shared"], 2),
        apart_pairs_per_s=timer.median(cfg.pairs / seconds["apart"], 2),
        ratio=timer.median(seconds["apart"] / seconds["shared"], 3),
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
