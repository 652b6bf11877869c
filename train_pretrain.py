"""Pretraining: next-token prediction on a stream of text, from scratch or from any official file.

    loss = - (1 / tokens) sum_t log p(x_{t+1} | x_1 .. x_t)      over windows of ctx_len tokens, each from a zero state

Windows are cut from the whole stream and may cross document borders, as upstream's do (RWKV-LM; RWKV-7:
arXiv 2503.14456, RWKV-6: arXiv 2404.05892). Optimiser, groups, schedule and clipping are upstream's too.

Usual mistakes: one learning rate for all (w0 and time_decay learn at twice the rate), weight decay on vectors, Adam's
eps at 1e-8 (upstream: 1e-18), a warm-up that starts again on resume, a mean of micro-batch means.

    python train_pretrain.py config/pretrain_tiny.py                            a laptop: 1.28 bits per byte
    torchrun --nproc_per_node=8 train_pretrain.py config/pretrain_0b1.py        one machine with eight cards
"""

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import common
import prepare
from common import UserError, load_config, print0
from model import RWKV, RWKVConfig


@dataclass
class Config(common.RunConfig):
    data: str = (
        "data/stdlib_train"  # token file (.bin + .idx) from prepare.py or from RWKV-LM's tools
    )
    val_data: str = ""  # token file for validation; empty = none
    order: Literal["shuffle", "magic_prime"] = (
        "shuffle"  # of the windows; magic_prime = RWKV-LM's offsets
    )
    tokenizer: str = ""  # name or file; empty = what prepare.py noted beside the data
    init_from: str = ""  # weights to start from (.pth, .safetensors); empty = a fresh model
    version: Literal["x070", "x060"] = "x070"  # fresh model: RWKV-7 or RWKV-6
    n_layer: int = 12  # fresh model: layers
    n_embd: int = 768  # fresh model: width
    head_size: int = 64  # fresh model: width of a head; the CUDA kernels want 64
    out_dir: str = "out/pretrain"  # folder for weights, last.pt, config.json, metrics
    micro_bsz: int = 8  # windows per process and backward pass: lower it when memory runs out
    global_bsz: int = (
        16  # windows per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 512  # tokens of a window (nanoGPT: block_size)
    lr: float = 6e-4  # peak learning rate; upstream's hint is about 0.45 / n_embd
    lr_final: float = 6e-5  # learning rate at the end of the cosine
    weight_decay: float = 0.001  # on the large matrices alone
    l2wrap: float = 0.0  # upstream's L2Wrap, 1e-4 there: keeps logits from drifting; 0 = off
    eval_windows: int = 0  # validation windows, spread over the file; 0 = all


# ---------------------------------------------------------------------------------------------------------------------
# the method: which windows, in which order


@functools.lru_cache
def magic_prime(n_tokens, ctx_len):
    """RWKV-LM's prime: the largest p <= n_tokens // ctx_len - 1 with p % 3 == 2. Cubing is then a bijection mod p."""
    windows = n_tokens // ctx_len
    p = windows - 1
    while p > 1 and (p % 3 != 2 or any(p % d == 0 for d in range(2, math.isqrt(p) + 1))):
        p -= 1
    if p <= 0.9 * windows:
        raise UserError(
            f"order=magic_prime: {n_tokens:,} tokens are too few for ctx_len={ctx_len} (the prime {p} is not "
            f"above 0.9 x {windows} windows); use --order=shuffle, which takes any size"
        )
    return p


def window_starts(samples, n_tokens, ctx_len, order="shuffle", seed=0):
    """First tokens of the windows for global sample numbers `samples` (step * global_bsz + position in the batch).

    shuffle: every window once an epoch, each epoch in its own order (common.shuffled). magic_prime: RWKV-LM's offsets,
    window ((phi n^3) mod p) for its sample n = 1 + number; tokens past p * ctx_len are never seen, as there.
    """
    if order == "magic_prime":
        p = magic_prime(n_tokens, ctx_len)
        phi = int(p * (math.sqrt(5) - 1) / 2)
        return [
            phi * (s + 1) ** 3 % p * ctx_len for s in samples
        ]  # python integers: the cube overflows 64 bits
    return [i * ctx_len for i in common.shuffled(samples, (n_tokens - 1) // ctx_len, seed)]


def batch_at(tokens, starts, length, device):
    """Windows of length + 1 tokens -> (inputs, targets), each [B, length] int64."""
    x = torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in starts]))
    if torch.device(device).type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    return x[:, :-1].to(device), x[:, 1:].to(device)


@torch.no_grad()
def evaluate(model, file, cfg, run):
    """{"val_loss": mean nats per token over a TokenFile's windows, "val_bpb": bits per byte of its text, where it knows how
    many bytes that is}; every process takes its share."""
    tokens, meta = file.tokens, file.meta
    length = min(cfg.ctx_len, len(tokens) - 1)
    starts = np.arange(0, len(tokens) - length, length)
    if cfg.eval_windows and len(starts) > cfg.eval_windows:
        starts = starts[np.linspace(0, len(starts) - 1, cfg.eval_windows).astype(int)]
    mine, nll = starts[run.rank :: run.world], 0.0
    for some in common.chunks(mine, cfg.micro_bsz):
        x, y = batch_at(tokens, some, length, run.device)
        nll -= model(x, targets=y)[0].logps.sum().item()
    nll, n = common.all_sum(nll, len(mine) * length)
    bpb = (
        {"val_bpb": nll / n / math.log(2) * meta["tokens"] / meta["bytes"]}
        if meta.get("bytes")
        else {}
    )
    return {"val_loss": nll / n, **bpb}


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    # ---- data
    data = prepare.TokenFile(cfg.data)
    val = prepare.TokenFile(cfg.val_data) if cfg.val_data else None
    tokens = data.tokens
    n_windows = (len(tokens) - 1) // max(cfg.ctx_len, 1)  # 0 is found by plan_steps
    if n_windows < 1:
        raise UserError(
            f"{cfg.data} holds {len(tokens):,} tokens, fewer than ctx_len + 1 = {cfg.ctx_len + 1}; "
            "lower --ctx_len or prepare more text"
        )
    if val is not None and len(val.tokens) < 2:
        raise UserError(
            f"{cfg.val_data} holds {len(val.tokens)} tokens; validation needs at least 2"
        )
    if cfg.order == "magic_prime":
        n_windows = magic_prime(len(tokens), cfg.ctx_len)
    max_steps, accumulation = common.plan_steps(cfg, run, n_windows)
    tokens_per_step = cfg.global_bsz * cfg.ctx_len

    # ---- tokenizer and model
    tokenizer = prepare.load_tokenizer(cfg.tokenizer) if cfg.tokenizer else data.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{cfg.data} has no note of its tokenizer beside it; say --tokenizer=world (RWKV-LM's own data), "
            "or the name or file it was made with"
        )
    if cfg.init_from:
        model = RWKV.from_pretrained(cfg.init_from)
    else:
        model = RWKV(
            RWKVConfig(cfg.version, cfg.n_layer, cfg.n_embd, tokenizer.vocab_size, cfg.head_size)
        )
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but {cfg.init_from} has a vocabulary of {vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    for file in filter(None, (data, val)):
        file.check_vocab(vocab_size)
    model.set_tune("full")
    model.to(run.device)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(tokens):,} tokens, {n_windows:,} windows of {cfg.ctx_len}; {max_steps:,} steps of {cfg.global_bsz} "
        f"windows = {max_steps * cfg.global_bsz / n_windows:.2f} epochs"
    )

    # ---- a new run, or on from last.pt
    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        data_order=dict(order=cfg.order, ctx_len=cfg.ctx_len, tokens=len(tokens)),
        kept=dict(best=math.inf),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, cfg.out_dir),
        plot=("loss", "val_loss"),
    )

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        values = evaluate(model, val, cfg, run) if val is not None else {}
        if values.get("val_loss", math.inf) < kept["best"]:
            kept["best"] = values["val_loss"]
            write("best")
        return values

    # ---- the loop
    wrapped, no_sync = common.wrap(model, run)
    with common.catch_signals() as signals:
        for step in range(metrics.from_step, max_steps):
            lr = common.set_lr(opt, cfg, step, max_steps)
            samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)[
                run.rank :: run.world
            ]
            nll = 0.0
            starts = window_starts(samples, len(tokens), cfg.ctx_len, cfg.order, cfg.seed)
            for i, some in enumerate(common.chunks(starts, cfg.micro_bsz)):
                x, y = batch_at(tokens, some, cfg.ctx_len, run.device)
                # the sum over the whole batch's tokens, not a mean of means; x world because DDP averages gradients
                with no_sync() if i < accumulation - 1 else nullcontext():
                    scores, _ = wrapped(x, targets=y, l2wrap=cfg.l2wrap)
                    loss = -scores.logps.sum() / tokens_per_step
                    (loss * run.world).backward()
                nll += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, stop = common.all_sum(nll, len(signals))
            common.check_finite(cfg, step, loss, grad_norm)
            opt.step()
            opt.zero_grad()
            done, values = step + 1, {}
            metrics.tokens += tokens_per_step

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                metrics.progress(done, max_steps, loss=loss, lr=lr, grad_norm=grad_norm, **values)
            common.end_step(cfg, save, done, max_steps, stop)
    common.end_run(cfg, metrics, max_steps, "rwkv-final.pth")
    if val is not None and metrics.from_step < max_steps:
        xz = val.meta.get("xz_bits_per_byte")
        print0(
            f"validation: {values['val_loss']:.4f} nats per token"
            + (f", {values['val_bpb']:.3f} bits per byte" if "val_bpb" in values else "")
            + (
                f"; xz -9 on the same held-out files: {xz:.3f} bits per byte (xz, unlike "
                "the model, never saw the training files)"
                if xz
                else ""
            )
        )


if __name__ == "__main__":
    main(load_config(Config))
