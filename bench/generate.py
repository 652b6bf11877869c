"""Speed of the generation engine as ratios in the same run, interleaved, process CPU time.

    python bench/generate.py                  # batch, refill and fork on a 4 x 256 model; one thread
    python bench/generate.py --rwkv           # 12 x 768, vocabulary 65536, against the rwkv package's single stream
"""
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import model as network  # noqa: E402
import sample  # noqa: E402
from model import RWKV, RWKVConfig  # noqa: E402


@dataclass
class Config:
    n_layer: int = 0      # layers; 0 = 4, with --rwkv 12
    n_embd: int = 0       # width; 0 = 256, with --rwkv 768
    vocab: int = 0        # vocabulary; 0 = 4096, with --rwkv 65536
    slots: int = 16       # sequences at a time
    tokens: int = 64      # new tokens of each sequence
    prompt: int = 200     # tokens of the prompt that is forked
    forks: int = 8        # how often
    rounds: int = 5       # counted runs of each side; the first of all is the warm-up
    rwkv: bool = False    # against the rwkv package
    threads: int = 1      # CPU threads


def main(cfg):
    torch.set_num_threads(cfg.threads)
    n_layer, n_embd = cfg.n_layer or (12 if cfg.rwkv else 4), cfg.n_embd or (768 if cfg.rwkv else 256)
    vocab = cfg.vocab or (65536 if cfg.rwkv else 4096)
    network.init_parameter = lambda name, p, c: p.uniform_(-0.05, 0.05)  # orthogonal matrices of this size take minutes
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
        print(json.dumps(dict(
            bench="generate", what=what, date=str(date.today()), n_layer=n_layer, n_embd=n_embd, vocab=vocab, slots=cfg.slots,
            tokens=cfg.tokens,
            **{f"{name}_tokens_per_s": round(statistics.median(s), 1) for name, s in speed.items()},
            ratio=round(statistics.median(a / b for a, b in zip(ours, theirs)), 2), threads=cfg.threads,
            torch=torch.__version__, device=common.cpu_name())), flush=True)

    g = torch.Generator().manual_seed(0)
    # against the package, decoding alone: prompts of one token
    prompts = torch.randint(1, vocab, (cfg.slots * 4, 1 if cfg.rwkv else 8), generator=g).tolist()

    def run(prompts, **options):
        out = sample.generate(model, prompts, **{"max_new_tokens": cfg.tokens, "seed": 0, **options})
        return sum(len(c.tokens) for c in out)

    if cfg.rwkv:
        os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/m.pth")
            from rwkv.model import RWKV as Official
            official = Official(model=f"{folder}/m", strategy="cpu fp32")

        @torch.no_grad()
        def single():
            out, state = official.forward(prompts[0], None)
            for _ in range(cfg.tokens - 1):
                out, state = official.forward([int(out.softmax(-1).multinomial(1))], state)
            return cfg.tokens
        return compare("batch against the rwkv package", {"batch": lambda: run(prompts[:cfg.slots]), "rwkv": single})
    compare("batch", {"batch": lambda: run(prompts[:cfg.slots]), "one_at_a_time": lambda: sum(run([p]) for p in prompts[:2])})
    lengths = torch.randint(cfg.tokens // 4, 2 * cfg.tokens + 1, (len(prompts),), generator=g).tolist()  # vary 8 times
    parts = [slice(i, i + cfg.slots) for i in range(0, len(prompts), cfg.slots)]
    compare("refill", {"refill": lambda: run(prompts, max_new_tokens=lengths, batch_size=cfg.slots),
                       "no_refill": lambda: sum(run(prompts[p], max_new_tokens=lengths[p]) for p in parts)})
    long = torch.randint(1, vocab, (cfg.prompt,), generator=g).tolist()
    others = [long[i:] + long[:i] for i in range(cfg.forks)]  # equal prompts would be read once
    compare("fork", {"fork": lambda: run([long], n=cfg.forks, max_new_tokens=1),
                     "prefill_each": lambda: run(others, max_new_tokens=1)})


if __name__ == "__main__":
    main(common.read_flags(Config))
