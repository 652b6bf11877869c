"""The C++ for a CPU, as ratios in the same run: the recurrence to its PyTorch forms, training to an
equal-size GPT, decoding and prefill to the `rwkv` package with the same weights, the bytes of
weights a decode step reads to those of a plain sum, a training step of the large model to its
matrix products alone, and long sequences to short ones.

    python bench/cpu.py                     # one thread; JSON lines: ratios, medians
    python bench/cpu.py --part=decode --threads=2
"""

import contextlib
import functools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as network
from gosling import config, graph
from model import RWKV, RWKVConfig
from wkv_cuda import cpu, fused

import timer
import train_vs_gpt
import wkv


@dataclass
class Config:
    part: Literal["all", "op", "train", "share", "large", "decode"] = "all"
    n_layer: int = 12  # of the large model, which trains and decodes
    n_embd: int = 768  # its width
    vocab: int = 65536  # its vocabulary
    slots: int = 16  # sequences of a batch
    tokens: int = 5  # decoded in a row
    prompt: int = 1024  # tokens of the prefill
    zeros: config.Share = 0.8  # of the channel mix's hidden units, at 0 in decoding
    rounds: int = 5  # counted runs of each side, interleaved
    threads: int = 1  # CPU threads


def init_uniform(name, p, c):
    """In place of model.init_parameter, whose orthogonal matrices take minutes at this size."""
    p.uniform_(-0.05, 0.05)


def repeat(function, n):
    for _ in range(n):
        function()


# ----------------------------------------------------------------------------------------------
# training


def train_step(model, opt, ids):
    (-model(ids[:, :-1], targets=ids[:, 1:])[0].logps.mean()).backward()
    opt.step()
    opt.zero_grad()


def training(n_layer, n_embd, vocab, rows, length, dtype, version="x070"):
    """-> a function that takes a step on [rows, length] tokens"""
    model = RWKV(RWKVConfig(version, n_layer, n_embd, vocab))
    model.compute_dtype = dtype
    opt = torch.optim.AdamW(model.param_groups(1e-4, 0.1), fused=True)
    ids = torch.randint(0, vocab, (rows, length + 1))
    return functools.partial(train_step, model, opt, ids)


class Clock:
    """Adds up what a function of a module takes, while it stands in its place."""

    def __init__(self, module, name):
        self.module, self.name, self.function = module, name, getattr(module, name)
        self.seconds = self.gflop = 0.0

    def __enter__(self):
        setattr(self.module, self.name, self)
        return self

    def __exit__(self, *error):
        setattr(self.module, self.name, self.function)

    def __call__(self, *args):
        start = time.process_time()
        result = self.function(*args)
        self.seconds += time.process_time() - start
        if self.name == "product":  # x [.., in], w [out, in]
            self.gflop += 2e-9 * args[0].numel() * args[1].shape[0]
        elif self.name == "weight_gradient":  # dy [.., out], x [.., in]
            self.gflop += 2e-9 * args[0].numel() * args[1].shape[-1]
        return result


def share(cfg):
    """What part of a training step, 4 x 256 on 512 x 8, its products and the recurrence are, and
    how fast the products are next to one large product."""
    for version in ("x070", "x060"):
        step = training(4, 256, 4096, 8, 512, torch.float32, version)
        repeat(step, 2)
        x, w = torch.randn(4096, 256), torch.randn(1024, 256)
        rows = []
        for _ in range(cfg.rounds):
            with contextlib.ExitStack() as stack:
                names = ("product", "weight_gradient")
                products = [stack.enter_context(Clock(fused, name)) for name in names]
                recurrence = stack.enter_context(Clock(cpu, "launch"))
                start = time.process_time()
                step()
                whole = time.process_time() - start
            start = time.process_time()
            repeat(functools.partial(fused.product, x, w), 20)
            rate = 20 * 2e-9 * 4096 * 256 * 1024 / (time.process_time() - start)
            seconds = sum(clock.seconds for clock in products)
            gflop_per_s = sum(clock.gflop for clock in products) / seconds
            outside = 1 - (seconds + recurrence.seconds) / whole
            rows.append((seconds / whole, recurrence.seconds / whole, outside, gflop_per_s / rate))
        shares = timer.median(np.array(rows), 3)
        timer.report(
            "cpu",
            what=f"a training step of {version}, 4 x 256 on 512 x 8",
            products=shares[0],
            recurrence=shares[1],
            outside=shares[2],
            rate_of_products_to_a_large_one=shares[3],
        )


def n_multiplied(c):
    """How many weights multiply each token: all but the embedding."""
    with torch.device("meta"):
        named = RWKV(c).named_parameters()
        return sum(p.numel() for name, p in named if name != "emb.weight")


def large(cfg):
    """The large model's training as a share of the speed of its products alone, and 4 x 256 at
    16,384 x 1 to 1,024 x 16 tokens."""
    rounds = min(cfg.rounds, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
        sides = {
            "train": training(cfg.n_layer, cfg.n_embd, cfg.vocab, 4, 512, dtype),
            "products": functools.partial(repeat, functools.partial(torch.mm, x, w.T), 40),
        }
        seconds = timer.interleaved(sides, rounds)
        tokens_per_s = 4 * 512 / seconds["train"]
        gflop_per_s = 40 * 2 * 512 * 768 * 3072 / 1e9 / seconds["products"]
        weights = n_multiplied(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab))
        timer.report(
            "cpu",
            what=f"training {cfg.n_layer} x {cfg.n_embd} to its products",
            dtype=str(dtype)[6:],
            tokens_per_s=timer.median(tokens_per_s, 1),
            gflop_per_s=timer.median(gflop_per_s, 1),
            ratio=timer.median(tokens_per_s * 6e-9 * weights / gflop_per_s, 3),
        )
    sides = {
        "short": training(4, 256, 4096, 16, 1024, torch.float32),
        "long": training(4, 256, 4096, 1, 16384, torch.float32),
    }
    seconds = timer.interleaved(sides, rounds)
    ratio = timer.median(seconds["short"] / seconds["long"], 3)
    timer.report("cpu", what="training on 16384 x 1 to 1024 x 16", ratio=ratio)


# ----------------------------------------------------------------------------------------------
# decoding


def load_official(model):
    """-> {dtype: the `rwkv` package's model of the same weights}"""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV as Official

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/m.pth")
        return {
            torch.float32: Official(model=f"{folder}/m", strategy="cpu fp32"),
            torch.bfloat16: Official(model=f"{folder}/m", strategy="cpu bf16"),
        }


def decode_ours(model, step, ids, rows):
    state = model.zero_state(rows)
    for token in ids:
        graph.decode(model, step, torch.full((rows,), token), state)


def decode_all(model, step, ids):
    """decode_ours of one row, all of ffn.value read, whatever is 0."""
    most_few, cpu.MOST_FEW = cpu.MOST_FEW, 0
    decode_ours(model, step, ids, 1)
    cpu.MOST_FEW = most_few


def decode_theirs(official, ids):
    state = None
    for token in ids:
        _, state = official.forward([token], state)


def compare(cfg, model, official, ids):
    dtype = model.emb.weight.dtype
    step, step_all = fused.decoder(model), fused.decoder(model)
    n_read = sum(p.numel() for name, p in model.named_parameters() if name != "emb.weight")
    as_many_bytes = torch.empty(n_read * dtype.itemsize // 4).uniform_()
    some = ids[: cfg.tokens]
    sides = {
        "step": functools.partial(decode_ours, model, step, some, 1),
        "step_all": functools.partial(decode_all, model, step_all, some),
        "batch": functools.partial(decode_ours, model, step, some, cfg.slots),
        "rwkv": functools.partial(decode_theirs, official, some),
        "sum": functools.partial(repeat, as_many_bytes.sum, cfg.tokens),
        "prefill": functools.partial(model, torch.tensor([ids]), last_only=True),
        "rwkv_prefill": functools.partial(official.forward, ids, None),
    }
    seconds = timer.interleaved(sides, cfg.rounds, timer.cpu_and_wall)  # [rounds, 2]
    tokens = dict(
        step=cfg.tokens,
        step_all=cfg.tokens,
        batch=cfg.tokens * cfg.slots,
        rwkv=cfg.tokens,
        sum=cfg.tokens,
        prefill=len(ids),
        rwkv_prefill=len(ids),
    )
    speed = {name: tokens[name] / seconds[name] for name in sides}
    for name, peer in dict(step="rwkv", batch="rwkv", prefill="rwkv_prefill").items():
        report_pair(cfg, dtype, speed, name, peer)
    report_pair(cfg, dtype, speed, "step", "sum")
    report_pair(cfg, dtype, speed, "step", "step_all")


def report_pair(cfg, dtype, speed, name, peer):
    ratio, wall_ratio = timer.median(speed[name] / speed[peer], 2)
    timer.report(
        "cpu",
        what=f"{name} to {peer}",
        dtype=str(dtype)[6:],
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        vocab=cfg.vocab,
        zeros=cfg.zeros,
        rows=cfg.slots if name == "batch" else 1,
        ratio=ratio,
        wall_ratio=wall_ratio,
        tokens_per_s=timer.median(speed[name], 1)[0],
    )


def set_zeros(model, share):
    """Shift the channel mix's hidden units so that about this share is 0, others for each token."""
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = normal.icdf(torch.tensor(share)).clamp(-9, 9)  # of units with a deviation of 1
    for block in model.blocks:
        block.ln2.bias.fill_(1)  # inputs of mean 1, so that the weights can hold a bias
        weight = block.ffn.key.weight
        deviation = (2 * weight.square().sum(1, keepdim=True)).sqrt()
        weight -= threshold * deviation / weight.shape[1]


@torch.no_grad()
def decode(cfg):
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab)).eval()
    set_zeros(model, cfg.zeros)
    ids = torch.randint(1, cfg.vocab, (cfg.prompt,)).tolist()
    for dtype, official in load_official(model).items():
        compare(cfg, model.to(dtype), official, ids)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    if cfg.part in ("all", "op"):
        wkv.main(wkv.Config(rounds=cfg.rounds, threads=cfg.threads))
    if cfg.part in ("all", "train"):
        for n_layer, n_embd in ((4, 256), (6, 512)):
            options = dict(rounds=cfg.rounds, threads=cfg.threads)
            train_vs_gpt.main(train_vs_gpt.Config(n_layer=n_layer, n_embd=n_embd, **options))
    fused.build("cpu")
    network.init_parameter = init_uniform
    fused.keep_memory()
    if cfg.part in ("all", "share"):
        share(cfg)
    if cfg.part in ("all", "large"):
        large(cfg)
    if cfg.part in ("all", "decode"):
        decode(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
