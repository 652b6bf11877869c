"""Speed of the generation engine as ratios in the same run, interleaved, process CPU time.

python bench/generate.py     # batch, refill and fork on a 4 x 256 model; one thread
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
    slots: int = 16  # sequences at a time
    tokens: int = 64  # new tokens of each sequence
    prompt: int = 200  # tokens of the prompt that is forked
    forks: int = 8  # how often
    rounds: int = 5  # counted runs of each side; the first of all is the warm-up
    threads: int = 1  # CPU threads


def main(cfg):
    torch.set_num_threads(cfg.threads)
    n_layer, n_embd, vocab = cfg.n_layer, cfg.n_embd, cfg.vocab
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", n_layer, n_embd, vocab)).eval()

    def compare(what, sides):
        """sides: {name: function that does the work and says how many tokens that was}; the first against the second."""
        speed = {name: [] for name in sides}
        for i in range(cfg.rounds + 1):
            for name, work in sides.items():
                t = time.process_time()
                tokens = work()
                if i:
                    speed[name].append(tokens / (time.process_time() - t))
        ours, theirs = speed.values()
        print(
            json.dumps(
                dict(
                    bench="generate",
                    what=what,
                    date=str(date.today()),
                    n_layer=n_layer,
                    n_embd=n_embd,
                    vocab=vocab,
                    slots=cfg.slots,
                    tokens=cfg.tokens,
                    **{
                        f"{name}_tokens_per_s": round(statistics.median(s), 1)
                        for name, s in speed.items()
                    },
                    ratio=round(statistics.median(a / b for a, b in zip(ours, theirs)), 2),
                    threads=cfg.threads,
                    torch=torch.__version__,
                    device=runs.cpu_name(),
                )
            ),
            flush=True,
        )

    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, vocab, (cfg.slots * 4, 8), generator=g).tolist()

    def run(prompts, **options):
        out = sample.generate(
            model, prompts, **{"max_new_tokens": cfg.tokens, "seed": 0, **options}
        )
        return sum(len(c.tokens) for c in out)

    compare(
        "batch",
        {
            "batch": lambda: run(prompts[: cfg.slots]),
            "one_at_a_time": lambda: sum(run([p]) for p in prompts[:2]),
        },
    )
    lengths = torch.randint(
        cfg.tokens // 4, 2 * cfg.tokens + 1, (len(prompts),), generator=g
    ).tolist()  # vary 8 times
    parts = [slice(i, i + cfg.slots) for i in range(0, len(prompts), cfg.slots)]
    compare(
        "refill",
        {
            "refill": lambda: run(prompts, max_new_tokens=lengths, batch_size=cfg.slots),
            "no_refill": lambda: sum(run(prompts[p], max_new_tokens=lengths[p]) for p in parts),
        },
    )
    long = torch.randint(1, vocab, (cfg.prompt,), generator=g).tolist()
    others = [long[i:] + long[:i] for i in range(cfg.forks)]  # equal prompts would be read once
    compare(
        "fork",
        {
            "fork": lambda: run([long], n=cfg.forks, max_new_tokens=1),
            "prefill_each": lambda: run(others, max_new_tokens=1),
        },
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
