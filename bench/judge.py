"""Scores of a judge that keeps its rubric's state, as a ratio to one that reads the whole prompt each time, interleaved.

python bench/judge.py          # a rubric of 200 tokens, answers of 50, one thread, process CPU time
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
import sample  # noqa: E402
from model import RWKV, RWKVConfig  # noqa: E402


@dataclass
class Config:
    n_layer: int = 4  # layers
    n_embd: int = 256  # width
    vocab: int = 4096  # vocabulary
    rubric: int = 200  # tokens that every judge prompt begins with
    answer: int = 50  # tokens that follow
    answers: int = 64  # judged in a round
    rounds: int = 7  # counted rounds of each
    threads: int = 1  # CPU threads


def main(cfg):
    torch.set_num_threads(cfg.threads)
    g = torch.Generator().manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))
    with torch.no_grad():
        for p in model.parameters():  # a fresh model's first answers would not depend on the rubric
            p += 0.02 * torch.randn(p.shape, generator=g)
    ids = lambda n: torch.randint(1, cfg.vocab, (n,), generator=g).tolist()  # noqa: E731
    rubric, answers = ids(cfg.rubric), [ids(cfg.answer) for _ in range(cfg.answers)]
    choices = [[[i] for i in range(6)]] * cfg.answers

    def kept():  # with the rubric's own reading, once a round
        return sample.score_choices(
            model, answers, choices, state=sample.prefill(model, [rubric])[1]
        )

    def whole():
        return sample.score_choices(model, [rubric + answer for answer in answers], choices)

    seconds, gap = (
        {"kept": [], "whole": []},
        (torch.tensor(kept()) - torch.tensor(whole())).abs().max().item(),
    )
    for i in range(cfg.rounds + 1):
        for name, function in (("kept", kept), ("whole", whole)):
            t = time.process_time()
            function()
            if i:  # the first is the warm-up
                seconds[name].append(time.process_time() - t)
    print(
        json.dumps(
            dict(
                bench="judge",
                date=str(date.today()),
                n_layer=cfg.n_layer,
                n_embd=cfg.n_embd,
                rubric=cfg.rubric,
                answer=cfg.answer,
                answers=cfg.answers,
                kept_answers_per_s=round(cfg.answers / statistics.median(seconds["kept"]), 1),
                whole_answers_per_s=round(cfg.answers / statistics.median(seconds["whole"]), 1),
                ratio=round(
                    statistics.median(a / b for a, b in zip(seconds["kept"], seconds["whole"])), 3
                ),
                largest_difference=gap,
                threads=cfg.threads,
                torch=torch.__version__,
                device=runs.cpu_name(),
            )
        )
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
