"""The C++ for a CPU, as ratios in the same run: the recurrence to its PyTorch forms, training to an equal-size GPT, decoding
and prefill to the `rwkv` package with the same weights, the bytes of weights a decode step reads to those of a plain sum, a
training step of the large model to its matrix products alone, and long sequences to short ones.

    python bench/cpu.py                     # one thread; JSON lines: ratios of process CPU time and of wall time, medians
    python bench/cpu.py --part=decode --threads=2
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
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, runs  # noqa: E402
import model as network  # noqa: E402
import train_vs_gpt  # noqa: E402
import wkv  # noqa: E402
import wkv_cuda  # noqa: E402
from model import RWKV, RWKVConfig  # noqa: E402


@dataclass
class Config:
    part: Literal["all", "op", "train", "large", "decode"] = "all"
    n_layer: int = 12  # of the large model, which trains and decodes
    n_embd: int = 768  # its width
    vocab: int = 65536  # its vocabulary
    slots: int = 16  # sequences of a batch
    tokens: int = 5  # decoded in a row
    prompt: int = 1024  # tokens of the prefill
    rounds: int = 5  # counted runs of each side, interleaved
    threads: int = 1  # CPU threads


def say(cfg, what, **values):
    print(
        json.dumps(
            dict(
                bench="cpu",
                what=what,
                date=str(date.today()),
                **values,
                threads=cfg.threads,
                torch=torch.__version__,
                device=runs.cpu_name(),
            )
        ),
        flush=True,
    )


def training(n_layer, n_embd, vocab, rows, length, dtype):
    """-> (a step on [rows, length] tokens, its tokens)"""
    model = RWKV(RWKVConfig("x070", n_layer, n_embd, vocab))
    model.compute_dtype, opt = dtype, torch.optim.AdamW(model.param_groups(1e-4, 0.1), fused=True)
    ids = torch.randint(0, vocab, (rows, length + 1))

    def step():
        (-model(ids[:, :-1], targets=ids[:, 1:])[0].logps.mean()).backward()
        opt.step()
        opt.zero_grad()

    return step, rows * length


def speeds(sides, rounds):
    """{name: (work, how much of it)} -> {name: how much a second of CPU time}, medians, interleaved"""
    found = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, (work, amount) in sides.items():
            start = time.process_time()
            work()
            if i:
                found[name].append(amount / (time.process_time() - start))
    return {name: statistics.median(x) for name, x in found.items()}


def large(cfg):
    """Training the large model, as a share of the speed at which its products alone, 0.845 GFLOP a token at 12 x 768 and
    vocabulary 65536, would go; and 4 x 256 at 16,384 x 1 to 1,024 x 16 tokens."""
    torch.set_num_threads(cfg.threads)
    fused.keep_memory()
    network.init_parameter = lambda name, p, c: p.uniform_(
        -0.05, 0.05
    )  # orthogonal matrices of this size take minutes
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
        found = speeds(
            {
                "train": training(12, 768, 65536, 4, 512, dtype),
                "products": (lambda: [x @ w.T for _ in range(40)], 40 * 2 * 512 * 768 * 3072 / 1e9),
            },
            min(cfg.rounds, 3),
        )
        say(
            cfg,
            "training 12 x 768 to its products",
            dtype=str(dtype)[6:],
            tokens_per_s=round(found["train"], 1),
            gflop_per_s=round(found["products"], 1),
            ratio=round(found["train"] * 0.845 / found["products"], 3),
        )
    found = speeds(
        {
            shape: training(4, 256, 4096, *shape, torch.float32)
            for shape in ((16, 1024), (1, 16384))
        },
        min(cfg.rounds, 3),
    )
    say(
        cfg, "training on 16384 x 1 to 1024 x 16", ratio=round(found[1, 16384] / found[16, 1024], 3)
    )


@torch.no_grad()
def decode(cfg):
    torch.set_num_threads(cfg.threads)
    wkv_cuda.cpu.unavailable()  # build
    network.init_parameter = lambda name, p, c: p.uniform_(
        -0.05, 0.05
    )  # orthogonal matrices of this size take minutes
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab)).eval()
    ids = torch.randint(1, cfg.vocab, (cfg.prompt,)).tolist()
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/m.pth")
        from rwkv.model import RWKV as Official

        official = {
            dtype: Official(model=f"{folder}/m", strategy=f"cpu {name}")
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
    for dtype, theirs in official.items():
        model.to(dtype)
        model.step, state = model.stepper(), {n: model.zero_state(n) for n in (1, cfg.slots)}
        read = sum(p.numel() for name, p in model.named_parameters() if name != "emb.weight")
        plain = torch.empty(read * dtype.itemsize // 4).uniform_()  # as many bytes
        _, their_state = theirs.forward(ids[:1], None)

        def steps(rows):
            for t in range(cfg.tokens):
                model(torch.tensor([[ids[t]]] * rows), state[rows], out=state[rows])

        def their_steps():
            nonlocal their_state
            for t in range(cfg.tokens):
                _, their_state = theirs.forward([ids[t]], their_state)

        # what -> (work, how much of it), so that speeds compare
        sides = {
            "step": (lambda: steps(1), cfg.tokens),
            "batch": (lambda: steps(cfg.slots), cfg.tokens * cfg.slots),
            "rwkv": (their_steps, cfg.tokens),
            "sum": (lambda: [plain.sum() for _ in range(cfg.tokens)], cfg.tokens),
            "prefill": (lambda: model(torch.tensor([ids]), last_only=True), cfg.prompt),
            "rwkv_prefill": (lambda: theirs.forward(ids, None), cfg.prompt),
        }
        speed = {name: [] for name in sides}  # (per second of CPU time, of wall time)
        for i in range(cfg.rounds + 1):
            for name, (work, amount) in sides.items():
                start = time.process_time(), time.perf_counter()
                work()
                if i:
                    speed[name].append(
                        (
                            amount / (time.process_time() - start[0]),
                            amount / (time.perf_counter() - start[1]),
                        )
                    )
        for name, peer in (
            ("step", "rwkv"),
            ("batch", "rwkv"),
            ("prefill", "rwkv_prefill"),
            ("step", "sum"),
        ):
            ratio, wall = (
                round(statistics.median(a[i] / b[i] for a, b in zip(speed[name], speed[peer])), 2)
                for i in (0, 1)
            )
            print(
                json.dumps(
                    dict(
                        bench="cpu",
                        what=f"{name} to {peer}",
                        date=str(date.today()),
                        dtype=str(dtype)[6:],
                        n_layer=cfg.n_layer,
                        n_embd=cfg.n_embd,
                        vocab=cfg.vocab,
                        rows=cfg.slots if name == "batch" else 1,
                        ratio=ratio,
                        wall_ratio=wall,
                        tokens_per_s=round(statistics.median(a for a, _ in speed[name]), 1),
                        threads=cfg.threads,
                        torch=torch.__version__,
                        device=runs.cpu_name(),
                    )
                ),
                flush=True,
            )


def main(cfg):
    if cfg.part in ("all", "op"):
        wkv.main(wkv.Config(rounds=cfg.rounds, threads=cfg.threads))
    if cfg.part in ("all", "train"):
        for n_layer, n_embd in ((4, 256), (6, 512)):
            train_vs_gpt.main(
                train_vs_gpt.Config(
                    n_layer=n_layer, n_embd=n_embd, rounds=cfg.rounds, threads=cfg.threads
                )
            )
    if cfg.part in ("all", "large"):
        large(cfg)
    if cfg.part in ("all", "decode"):
        decode(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
