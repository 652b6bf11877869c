"""Pretraining: next-token prediction on a stream of text, from scratch or from any official file.

    loss = - (1 / tokens) sum_t log p(x_{t+1} | x_1 .. x_t)     over windows, each from a zero state

A sample is a window of ctx_len tokens (nanoGPT: block_size). Windows are cut from the whole stream
and may cross document borders, as upstream's do (RWKV-LM; RWKV-7: arXiv 2503.14456, RWKV-6: arXiv
2404.05892). Optimiser, groups, schedule and clipping are upstream's too; its hint for the peak
learning rate is about 0.45 / n_embd.

Data: token files (.bin + .idx) from prepare.py or from RWKV-LM's tools. Without init_from the model
is a fresh one.

Usual mistakes: one learning rate for all (w0 and time_decay learn at twice the rate), weight decay
on vectors, Adam's eps at 1e-8 (upstream: 1e-18), a warm-up that starts again on resume, a mean of
micro-batch means.

    python train_pretrain.py config/pretrain_tiny.py                 a laptop: 1.28 bits per byte
    torchrun --nproc_per_node=8 train_pretrain.py config/pretrain_0b1.py       eight cards
"""

import functools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from gosling import runs, tune
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0
from gosling.shard import place, shards
from gosling.token_files import TokenFile, tokenizer_of_data
from gosling.weights import from_pretrained
from model import RWKV, RWKVConfig
from wkv_cuda.packed import to_device

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class Config:
    # data and model
    data: str = "data/stdlib_train"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    order: Literal["shuffle", "magic_prime"] = "shuffle"  # of the windows; magic_prime = RWKV-LM's
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    version: Literal["x070", "x060"] = "x070"  # fresh model: RWKV-7 or RWKV-6
    n_layer: PositiveInt = 12  # fresh model: layers
    n_embd: PositiveInt = 768  # fresh model: width
    head_size: PositiveInt = 64  # fresh model: width of a head; the CUDA kernels want 64
    # run
    out_dir: str = "out/pretrain"  # folder for checkpoints, last.pt, config.json and metrics
    resume: bool | Literal["auto"] = False  # go on from out_dir/last.pt; auto: if there is one
    seed: Seed = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    hang_minutes: PositiveFloat = 60.0  # longest wait of processes for one another
    shard: Literal["none", "fsdp"] = "none"  # several processes: all weights in each, or a share
    cpu_offload: bool = False  # fsdp: the shares lie in main memory, and AdamW runs there
    gather: Literal["auto", "all", "block"] = "auto"  # fsdp: to sample, all weights or by block
    # batch
    micro_bsz: PositiveInt = 8  # samples per process and backward pass: lower it to save memory
    global_bsz: PositiveInt = 16  # samples per optimiser step, over all processes
    ctx_len: PositiveInt = 512  # longest sample in tokens
    # optimiser
    lr: PositiveFloat = 6e-4  # peak learning rate
    lr_final: NonNegativeFloat = 6e-5  # learning rate at the end of the cosine
    warmup_steps: NonNegativeInt = 10  # steps from 0.01 lr to lr
    max_steps: NonNegativeInt | None = None  # optimiser steps of the whole run; or give epochs
    epochs: PositiveFloat | None = None  # passes over the data; one if neither is given
    weight_decay: NonNegativeFloat = 0.001  # on the large matrices alone
    beta1: Decay = 0.9  # AdamW: of the running mean
    beta2: Decay = 0.99  # AdamW: of the running mean of squares
    adam_eps: PositiveFloat = 1e-18  # AdamW: upstream's value
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 = no clipping
    optim: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in a quarter of the memory
    step_in_backward: bool = False  # one gradient in memory at a time; wants grad_clip=0
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    compile: bool = False  # blocks through torch.compile: minutes at first, then faster steps
    l2wrap: NonNegativeFloat = 0.0  # upstream's L2Wrap, 1e-4 there: keeps logits from drifting
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_windows: NonNegativeInt = 0  # windows to validate on, spread over the file; 0 = all
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method: which windows, in which order


@functools.lru_cache
def magic_prime(n_tokens, ctx_len):
    """RWKV-LM's prime: the largest p <= n_tokens // ctx_len - 1 with p % 3 == 2.

    Cubing is then a bijection modulo p.
    """
    windows = n_tokens // ctx_len
    p = windows - 1
    while p > 1 and (p % 3 != 2 or any(p % d == 0 for d in range(2, math.isqrt(p) + 1))):
        p -= 1
    if p <= 0.9 * windows:
        raise UserError(
            f"order=magic_prime: {n_tokens:,} tokens are too few for ctx_len={ctx_len} (the prime "
            f"{p} is not above 0.9 x {windows} windows); use --order=shuffle, which takes any size"
        )
    return p


def window_starts(samples, n_tokens, ctx_len, order="shuffle", seed=0):
    """First tokens of the windows of global sample numbers (step * global_bsz + position in the
    batch).

    shuffle: every window once an epoch, each epoch in its own order (runs.shuffled). magic_prime:
    RWKV-LM's offsets, window ((phi n^3) mod p) for its sample n = 1 + number; tokens past p *
    ctx_len are never seen, as there.
    """
    if order == "shuffle":
        windows = runs.shuffled(samples, (n_tokens - 1) // ctx_len, seed)
        return [window * ctx_len for window in windows]
    p = magic_prime(n_tokens, ctx_len)
    phi = int(p * (math.sqrt(5) - 1) / 2)
    # Python's integers: the cube overflows 64 bits.
    return [phi * (sample + 1) ** 3 % p * ctx_len for sample in samples]


def batch_at(tokens, starts, length, device):
    """Windows of length + 1 tokens -> (inputs, targets), each [B, length] int64."""
    windows = [tokens[start : start + length + 1].astype(np.int64) for start in starts]
    x = to_device(torch.from_numpy(np.stack(windows)), device)
    return x[:, :-1], x[:, 1:]


@torch.no_grad()
def evaluate(model, file, cfg, run):
    """-> {"val_loss": mean nats per token over a TokenFile's windows, "val_bpb": bits per byte}.

    Every process takes its share. Bits per byte where the file's sidecar says how many bytes its
    text has.
    """
    tokens, about = file.tokens, file.meta
    length = min(cfg.ctx_len, len(tokens) - 1)
    starts = np.arange(0, len(tokens) - length, length)
    if cfg.eval_windows and len(starts) > cfg.eval_windows:
        starts = starts[np.linspace(0, len(starts) - 1, cfg.eval_windows).astype(int)]
    share = starts[run.rank :: run.world]
    sums = [torch.zeros((), device=run.device)]  # left on the device: no batch waits for another
    with runs.whole(model):
        for some_starts in runs.chunks(share, cfg.micro_bsz):
            x, y = batch_at(tokens, some_starts, length, run.device)
            sums.append(model(x, targets=y)[0].logps.sum())
    logps, n_tokens = runs.all_sum(torch.stack(sums).cpu().double().sum(), len(share) * length)
    values = {"val_loss": -logps / n_tokens}
    if about.get("bytes") and about.get("tokens"):
        values["val_bpb"] = values["val_loss"] / math.log(2) * about["tokens"] / about["bytes"]
    return values


def open_data(cfg):
    """-> (TokenFile to train on, TokenFile to validate on or None, number of windows)"""
    train_file = TokenFile(cfg.data)
    val_file = TokenFile(cfg.val_data) if cfg.val_data else None
    n_tokens = len(train_file.tokens)
    if n_tokens <= cfg.ctx_len:
        raise UserError(
            f"{cfg.data} holds {n_tokens:,} tokens, fewer than ctx_len + 1 = {cfg.ctx_len + 1}; "
            "lower --ctx_len or prepare more text"
        )
    if val_file and len(val_file.tokens) < 2:
        raise UserError(f"{cfg.val_data} holds one token; validation needs at least 2")
    if cfg.order == "magic_prime":
        return train_file, val_file, magic_prime(n_tokens, cfg.ctx_len)
    return train_file, val_file, (n_tokens - 1) // cfg.ctx_len


def open_model(cfg, run, train_file, val_file):
    """-> (fresh model, or the one in cfg.init_from, on the device; the data's tokenizer)"""
    files = [file for file in (train_file, val_file) if file]
    if cfg.init_from:
        model = from_pretrained(cfg.init_from, dtype=None if shards(cfg, run) else torch.float32)
        n_ids = model.config.vocab_size
        tokenizer = tokenizer_of_data(files, cfg.tokenizer, cfg.init_from, n_ids)
    else:
        tokenizer = tokenizer_of_data(files, cfg.tokenizer)
        try:
            config = RWKVConfig(
                cfg.version, cfg.n_layer, cfg.n_embd, tokenizer.vocab_size, cfg.head_size
            )
            with torch.device("meta" if shards(cfg, run) else "cpu"):
                model = RWKV(config)
        except ValueError as e:
            raise UserError(str(e)) from None
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but {cfg.init_from} has a vocabulary "
            f"of {vocab_size}; use the tokenizer the model was trained with"
        )
    for file in files:
        file.check_vocab(vocab_size)
    model.set_tune("full", cast=not shards(cfg, run))
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    place(model, cfg, run)
    return model, tokenizer


def report_validation(values, about):
    """The last validation beside what xz -9 makes of the same text."""
    line = f"validation: {values['val_loss']:.4f} nats per token"
    if "val_bpb" in values:
        line += f", {values['val_bpb']:.3f} bits per byte"
    if about.get("xz_bits_per_byte"):
        line += (
            f"; xz -9 on the same held-out files: {about['xz_bits_per_byte']:.3f} bits per byte "
            "(xz, unlike the model, never saw the training files)"
        )
    print0(line)


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- data, model and tokenizer
        train_file, val_file, n_windows = open_data(cfg)
        tokens = train_file.tokens  # [N], memory-mapped
        model, tokenizer = open_model(cfg, run, train_file, val_file)
        max_steps, accumulation = runs.plan_steps(cfg, run, n_windows)
        tokens_per_step = cfg.global_bsz * cfg.ctx_len
        epochs = max_steps * cfg.global_bsz / n_windows
        print0(
            f"data: {len(tokens):,} tokens, {n_windows:,} windows of {cfg.ctx_len}; "
            f"{max_steps:,} steps of {cfg.global_bsz} windows = {epochs:.2f} epochs"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(cfg, model, tokens=len(tokens))
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_loss = resumed.get("step", 0), resumed.get("best_loss", math.inf)
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- the loop
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)
                samples = samples[run.rank :: run.world]
                starts = window_starts(samples, len(tokens), cfg.ctx_len, cfg.order, cfg.seed)
                loss = 0.0
                for i, some_starts in enumerate(runs.chunks(starts, cfg.micro_bsz)):
                    x, y = batch_at(tokens, some_starts, cfg.ctx_len, run.device)  # [B, T] each
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        scores, _ = wrapped(x, targets=y, l2wrap=cfg.l2wrap)
                        # The sum over the whole batch's tokens is not a mean of means.
                        nll = -scores.logps.sum() / tokens_per_step
                        (nll * run.world).backward()  # DDP averages over processes: x world
                    loss += nll.detach()
                grad_norm = runs.clip_gradients(model, cfg.grad_clip or math.inf)
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(run.device, loss, len(signals), overdue)
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, stop, overdue = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += tokens_per_step

                # ---- save what trains, evaluate, log, save the run
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint)
                if val_file and (done == max_steps or runs.due(done, cfg.eval_every)):
                    values = evaluate(model, val_file, cfg, run)
                    best_loss = tune.save_best(model, cfg, run, values["val_loss"], best_loss)
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                if checkpoint or stop or overdue:
                    runs.save_last(cfg, run, model, opt, same, step=done, best_loss=best_loss)
                    metrics.plot("loss", "val_loss")
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        runs.finished(cfg, metrics, max_steps, "rwkv-final.pth")
        if val_file and first_step < max_steps:
            report_validation(values, val_file.meta)


if __name__ == "__main__":
    main(load_config(Config))
