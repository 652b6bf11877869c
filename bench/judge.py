"""Scores of a judge that keeps its rubric's state, as a ratio to one that reads the whole prompt.

python bench/judge.py          # a rubric of 200 tokens, answers of 50, one thread, process CPU time
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, engine
from gosling.answers import score_choices
from model import RWKV, RWKVConfig

import timer


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
        for p in model.parameters():  # a fresh model's first answers do not depend on the rubric
            p += 0.02 * torch.randn(p.shape, generator=g)

    def random_ids(n):
        return torch.randint(1, cfg.vocab, (n,), generator=g).tolist()

    rubric, answers = random_ids(cfg.rubric), [random_ids(cfg.answer) for _ in range(cfg.answers)]
    choices = [[[i] for i in range(6)]] * cfg.answers

    def from_state():  # the rubric itself is read once a round
        state = engine.prefill(model, [rubric])[1]
        return score_choices(model, answers, choices, state=state)

    def whole():
        return score_choices(model, [rubric + answer for answer in answers], choices)

    gap = (torch.tensor(from_state()) - torch.tensor(whole())).abs().max().item()
    seconds = timer.interleaved({"state": from_state, "whole": whole}, cfg.rounds)
    timer.report(
        "judge",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        rubric=cfg.rubric,
        answer=cfg.answer,
        answers=cfg.answers,
        kept_answers_per_s=timer.median(cfg.answers / seconds["state"], 1),
        whole_answers_per_s=timer.median(cfg.answers / seconds["whole"], 1),
        ratio=timer.median(seconds["state"] / seconds["whole"], 3),
        largest_difference=gap,
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
