"""Speed of the generation engine as ratios in the same run, process CPU time.

python bench/generate.py     # batch, refill and fork on a 4 x 256 model; one thread
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, engine
from model import RWKV, RWKVConfig

import timer


@dataclass
class Config:
    n_layer: int = 4  # layers
    n_embd: int = 256  # width
    vocab: int = 4096  # vocabulary
    slots: int = 16  # sequences at a time
    tokens: int = 64  # new tokens of each sequence
    prompt: int = 200  # tokens of the prompt that is forked
    forks: int = 8  # how often
    rounds: int = 5  # counted runs of each side; the first of all is the warm-up
    threads: int = 1  # CPU threads


def compare(cfg, what, sides):
    """{name: (function, tokens that it makes)}: the speed of the first side to the second's."""
    works = {name: work for name, (work, _) in sides.items()}
    seconds = timer.interleaved(works, cfg.rounds)
    speed = {name: tokens / seconds[name] for name, (_, tokens) in sides.items()}
    ours, theirs = speed.values()
    timer.report(
        "generate",
        what=what,
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        vocab=cfg.vocab,
        slots=cfg.slots,
        tokens=cfg.tokens,
        **{f"{name}_tokens_per_s": timer.median(of_side, 1) for name, of_side in speed.items()},
        ratio=timer.median(ours / theirs, 2),
    )


@torch.no_grad()
def main(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab)).eval()
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, cfg.vocab, (cfg.slots * 4, 8), generator=g).tolist()
    shortest, longest = cfg.tokens // 4, 2 * cfg.tokens  # lengths that vary 8 times
    lengths = torch.randint(shortest, longest + 1, (len(prompts),), generator=g).tolist()
    long = torch.randint(1, cfg.vocab, (cfg.prompt,), generator=g).tolist()
    others = [long[i:] + long[:i] for i in range(cfg.forks)]  # equal prompts would be read once

    def run(prompts, max_new_tokens=cfg.tokens, **options):
        engine.generate(model, prompts, max_new_tokens=max_new_tokens, seed=0, **options)

    def batch():
        run(prompts[: cfg.slots])

    def one_at_a_time():
        run(prompts[:1])
        run(prompts[1:2])

    def refill():
        run(prompts, lengths, batch_size=cfg.slots)

    def no_refill():
        for i in range(0, len(prompts), cfg.slots):
            run(prompts[i : i + cfg.slots], lengths[i : i + cfg.slots])

    def fork():
        run([long], 1, n=cfg.forks)

    def prefill_each():
        run(others, 1)

    n_batch, n_lengths = cfg.slots * cfg.tokens, sum(lengths)
    sides = {"batch": (batch, n_batch), "one_at_a_time": (one_at_a_time, 2 * cfg.tokens)}
    compare(cfg, "batch", sides)
    compare(cfg, "refill", {"refill": (refill, n_lengths), "no_refill": (no_refill, n_lengths)})
    compare(cfg, "fork", {"fork": (fork, cfg.forks), "prefill_each": (prefill_each, cfg.forks)})


if __name__ == "__main__":
    main(config.read_flags(Config))
