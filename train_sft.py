"""Supervised fine-tuning on conversations, full or LoRA: the loss is on the assistant's words.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | x_1 .. x_t)

m = 1 where x_{t+1} is trained: the assistant's words and what ends them. N is the sum of m over the
whole optimiser batch, so the loss is the same however the batch is split over micro-batches and
processes. Documents lie end to end (cu_seqlens) and each starts from a zero state: no padding, and
no document feels another. A document longer than memory is trained exactly: with chunk_len its
activations are kept for one chunk at a time, and the gradient of the state is carried back from
chunk to chunk (bptt = "full"), or cut there ("truncated").

Data: JSONL of conversations; `python prepare.py show FILE` prints what is trained. A sample is a
document, cut at ctx_len tokens. LoRA (arXiv 2106.09685) wants about ten times the learning rate.

Usual mistakes: training on the prompt; a mean of micro-batch means over ragged masks; the end token
left out of the loss, after which the model never stops; padding, which a recurrence feels.

    python train_sft.py config/sft_tiny.py                     a laptop: exact match 0.00 -> 0.75
    python train_sft.py config/sft_1b5.py --tune=lora          one GPU
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from gosling import runs, tune
from gosling.answers import show_answers
from gosling.batch import evaluate, pack, pad
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0
from gosling.data import read_examples
from gosling.tokenizer import tokenizer_of
from model import pieces

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class Config:
    # data and model
    data: str = "data/sft.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    template: Callable | None = None  # of your own: (row, tokenizer) -> (ids, mask)
    last_reply_only: bool = False  # train on each conversation's last reply alone
    skip_bad: bool = False  # leave out and count rows that cannot be read
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # what trains
    tune: Literal["full", "lora"] = "full"  # weights, LoRA, state or scalar head
    lora_r: PositiveInt = 32  # LoRA rank
    lora_alpha: PositiveFloat = 64.0  # LoRA scale: alpha / r
    lora_dropout: Decay = 0.0  # LoRA dropout
    lora_rslora: bool = False  # scale alpha / sqrt(r)
    lora_targets: tuple[str, ...] = ()  # key, att.key, ffn, head …; none = all of att and ffn
    lora_extra: tuple[str, ...] = ()  # more parameters to train, by parts of names: ln, x_ …
    adapter: str = ""  # saved adapter or state to go on from
    another_base: bool = False  # an adapter or state of another base than this is meant
    # run
    out_dir: str = "out/sft"  # folder for checkpoints, last.pt, config.json and metrics
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
    global_bsz: PositiveInt = 32  # samples per optimiser step, over all processes
    ctx_len: PositiveInt = 4096  # longest sample in tokens
    packing: bool = True  # documents end to end; false = right padding (slower, the same loss)
    chunk_len: NonNegativeInt = 0  # tokens whose activations are kept at a time; 0 = all
    bptt: Literal["full", "truncated"] = "full"  # the gradient across chunks: exact, or cut
    # optimiser
    lr: PositiveFloat = 2e-5  # peak learning rate
    lr_final: NonNegativeFloat = 2e-6  # learning rate at the end of the cosine
    warmup_steps: NonNegativeInt = 10  # steps from 0.01 lr to lr
    max_steps: NonNegativeInt | None = None  # optimiser steps of the whole run; or give epochs
    epochs: PositiveFloat | None = None  # passes over the data; one if neither is given
    weight_decay: NonNegativeFloat = 0.0  # on the large matrices alone
    beta1: Decay = 0.9  # AdamW: of the running mean
    beta2: Decay = 0.99  # AdamW: of the running mean of squares
    adam_eps: PositiveFloat = 1e-18  # AdamW: upstream's value
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 = no clipping
    optim: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in a quarter of the memory
    step_in_backward: bool = False  # one gradient in memory at a time; wants grad_clip=0
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    compile: bool = False  # blocks through torch.compile: minutes at first, then faster steps
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_samples: NonNegativeInt = 3  # held-out prompts whose greedy answers are printed then
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


def validate(model, val_documents, tokenizer, cfg, run):
    """-> {name: number} on held-out documents and of cfg.eval_fn; prints a few greedy answers."""
    model.eval()
    with runs.whole(model):
        values = {}
        if val_documents:
            values = evaluate(model, val_documents, cfg, run)
            if run.main:
                show_answers(model, val_documents[: cfg.eval_samples], tokenizer)
        values.update(runs.call_eval_fn(cfg, model, tokenizer))
    return values


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- model and tokenizer
        model = tune.load_to_tune(cfg, run)
        tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
        about = tune.origin(cfg, model, tokenizer)

        # ---- data
        if cfg.chunk_len and not cfg.packing:
            raise UserError("chunk_len needs packing")
        if cfg.bptt == "truncated" and cfg.shard != "none":
            raise UserError("bptt=truncated is not for shares; leave it out, or shard")
        reading = dict(
            template=cfg.template, last_reply_only=cfg.last_reply_only, skip_bad=cfg.skip_bad
        )
        documents = read_examples(cfg.data, tokenizer, cfg.ctx_len, **reading)
        val_documents = []
        if cfg.val_data:
            val_documents = read_examples(cfg.val_data, tokenizer, cfg.ctx_len, **reading)
        max_steps, accumulation = runs.plan_steps(cfg, run, len(documents))
        n_trained = sum(sum(mask[1:]) for _, mask in documents)
        epochs = max_steps * cfg.global_bsz / len(documents)
        print0(
            f"data: {len(documents):,} documents, {n_trained:,} trained tokens; "
            f"{max_steps:,} steps of {cfg.global_bsz} documents = {epochs:.2f} epochs"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        backward_len = cfg.chunk_len if cfg.bptt == "truncated" else 0  # tokens of a backward pass
        same = runs.identity(cfg, model, documents=len(documents), backward_len=backward_len)
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_loss = resumed.get("step", 0), resumed.get("best_loss", math.inf)
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(model, val_documents, tokenizer, cfg, run)
            best_loss = tune.save_best(model, cfg, run, values.get("val_loss"), best_loss, about)
        metrics.begin(values)

        # ---- the loop
        layout = pack if cfg.packing else pad
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                samples = [documents[i] for i in runs.samples_of(step, len(documents), cfg, run)]
                n_targets, n_tokens = runs.all_sum(
                    sum(sum(mask[1:]) for _, mask in samples), sum(len(ids) for ids, _ in samples)
                )
                model.train()
                loss = hits = 0.0
                for i, micro_batch in enumerate(runs.chunks(samples, cfg.micro_bsz)):
                    x, y, weight, cu_seqlens = layout(micro_batch, run.device)  # each [B, T]
                    state = None
                    for a, b, cu in pieces(x.shape[1], cu_seqlens, backward_len):
                        last = i == accumulation - 1 and b == x.shape[1]
                        packed = dict(cu_seqlens=cu, targets=y[:, a:b], chunk_len=cfg.chunk_len)
                        with nullcontext() if last else no_sync():
                            scores, state = wrapped(x[:, a:b], state, **packed)
                            nll = -(weight[:, a:b] * scores.logps).sum() / n_targets
                            (nll * run.world).backward()  # DDP averages over processes: x world
                        state = {key: value.detach() for key, value in state.items()}
                        loss += nll.detach()
                        hits += (weight[:, a:b] * scores.hits).sum() / n_targets
                grad_norm = runs.clip_gradients(model, cfg.grad_clip or math.inf)
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(run.device, loss, hits, len(signals), overdue)
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, accuracy, stop, overdue = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- save what trains, evaluate, log, save the run
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint, about)
                if done == max_steps or runs.due(done, cfg.eval_every):
                    at = dict(step=done, best_loss=best_loss)
                    with runs.saving_first(cfg, run, model, opt, same, **at):
                        values = validate(model, val_documents, tokenizer, cfg, run)
                    best_loss = tune.save_best(
                        model, cfg, run, values.get("val_loss"), best_loss, about
                    )
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    values = {"accuracy": accuracy, **values}
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                if checkpoint or stop or overdue:
                    runs.save_last(cfg, run, model, opt, same, step=done, best_loss=best_loss)
                    metrics.plot("loss", "val_loss")
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        runs.finished(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
