"""State tuning: every weight frozen, only the state that the recurrence starts from is learned.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | S_0, x_1 .. x_t)
    S_0 [H, N, N] of each layer is all that trains

A prompt writes a state; here the optimiser writes it, a few MB that turn one frozen model into
another. The reference is the same model with the state off, many states share one model in memory
and in a batch, and every RWKV engine reads the file. It carries a format, a style or a skill that
the model half knows; it does not hold many facts, and it fades over long texts as the decay forgets
it. Idea and practice: RWKV-StateTuning, RWKV-PEFT; no paper of its own.

Data: JSONL as for SFT, of which a sample is a document; or a folder of such files, for which one
state per file is trained over the same frozen model (val_data: a folder with the same names). Each
row starts from its own task's state, loss, token count and clipping are per task, and a task that a
batch has no row of is not stepped. Each task has its subfolder of out_dir.

Usual mistakes: learning rates of weights (a state wants 1e-2 and more, it starts from zero); rows
and columns swapped (rows = value); validating inside the training loop's variables, which trains on
validation data; weight decay.

    python train_state.py config/state_tiny.py                     0.45 -> 0.99 on an unseen skill
    python train_state.py config/state_1b5.py --data=tasks/        one GPU, a state for each file
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.utils import clip_grad_norm_

from gosling import runs, tune
from gosling.batch import evaluate, pack
from gosling.config import Decay, UserError, load_config, print0
from gosling.data import read_examples
from gosling.engine import prefill, show_answers
from gosling.tokenizer import tokenizer_of
from gosling.weights import fingerprint, from_pretrained, read_state
from wkv_cuda import fused


@dataclass
class Config:
    # data and model
    data: str = "data/sft.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    template: Callable | None = None  # of your own: (row, tokenizer) -> (ids, mask)
    last_reply_only: bool = False  # train on each conversation's last reply alone
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # what trains
    init_state: str = ""  # state file to start from; empty = zero
    init_prompt: str = ""  # or start from the state that this text leaves
    layers: tuple[NonNegativeInt, ...] = ()  # train the states of these layers alone; none = of all
    shift: bool = False  # also train both token-shift vectors; other engines do not read them
    # run
    out_dir: str = "out/state"  # folder for checkpoints, last.pt, config.json and metrics
    resume: bool = False  # go on from out_dir/last.pt
    seed: NonNegativeInt = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    # batch
    micro_bsz: PositiveInt = 8  # samples per process and backward pass: lower it to save memory
    global_bsz: PositiveInt = 32  # samples per optimiser step, over all processes
    ctx_len: PositiveInt = 4096  # longest sample in tokens
    chunk_len: NonNegativeInt = 0  # tokens whose activations are kept at a time; 0 = all
    # optimiser
    lr: PositiveFloat = 1e-2  # peak learning rate
    lr_final: NonNegativeFloat = 1e-4  # learning rate at the end of the cosine
    warmup_steps: NonNegativeInt = 10  # steps from 0.01 lr to lr
    max_steps: NonNegativeInt | None = None  # optimiser steps of the whole run; or give epochs
    epochs: PositiveFloat | None = None  # passes over the data; one if neither is given
    weight_decay: NonNegativeFloat = 0.0  # on the large matrices alone
    beta1: Decay = 0.9  # AdamW: of the running mean
    beta2: Decay = 0.99  # AdamW: of the running mean of squares
    adam_eps: PositiveFloat = 1e-18  # AdamW: upstream's value
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 = no clipping
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_samples: NonNegativeInt = 3  # held-out prompts whose greedy answers are printed then
    eval_off: bool = False  # validate with the state off, too, so that the base stays in view
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method: many tasks in a batch


def read_tasks(path):
    """A JSONL file, or a folder of them -> {task: file}; a single file's task is ""."""
    if not Path(path).is_dir():
        return {"": path}
    tasks = {file.stem: str(file) for file in sorted(Path(path).glob("*.jsonl"))}
    if not tasks:
        raise UserError(
            f"{path} is a folder without .jsonl files; state tuning wants one file for each task"
        )
    return tasks


def task_weights(weight, cu_seqlens, tasks, counts):
    """weight [1, T] of packed documents, of the tasks [D] -> (weight / trained tokens of the
    token's task in the whole batch, task of each token [T])

    counts [number of tasks]: 0 for a task that is absent.
    """
    task_of_token = tasks.repeat_interleave(cu_seqlens.diff().to(tasks.device))
    return weight / counts.clamp(min=1)[task_of_token], task_of_token


def clip_each_task(model, present, grad_clip):
    """Clip the gradient of each task that the batch has rows of -> the norm over all of them.

    The gradients of the others go: Adam would move them on by their momentum.
    """
    norms = []
    for task, tuned in enumerate(model.tuned):
        if task in present:
            norms.append(clip_grad_norm_(tuned.parameters(), grad_clip or math.inf))
        else:
            tuned.zero_grad(set_to_none=True)
    return torch.stack(norms).norm()


# ----------------------------------------------------------------------------------------------


def open_model(cfg, run):
    """-> (the frozen model, its tokenizer, its fingerprint)"""
    if not cfg.init_from:
        raise UserError(
            "which model? --init_from=FILE, the .pth or .safetensors of the state's base"
        )
    if cfg.init_state and cfg.init_prompt:
        raise UserError(
            "init_state and init_prompt are both given; a state starts from one of them"
        )
    model = from_pretrained(cfg.init_from, dtype=run.dtype)
    model.score = None
    tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    base = fingerprint(model)
    model.to(run.device)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    fused.build(run.device)
    return model, tokenizer, base


def add_states(model, tokenizer, cfg, n_tasks):
    """A trainable state for each task, from zero, from cfg.init_state or after cfg.init_prompt."""
    start = None
    if cfg.init_state:
        start, _ = read_state(cfg.init_state, model.config)
    elif cfg.init_prompt:
        _, start = prefill(model, [tokenizer.encode(cfg.init_prompt)])
    torch.manual_seed(cfg.seed)
    model.set_tune("state", tasks=n_tasks, shift=cfg.shift, layers=cfg.layers)
    for tuned in model.tuned:
        if start:
            tuned.load(start)


def read_documents(cfg, tokenizer):
    """-> (names of the tasks, [(ids, mask, task number), …], {task: held-out (ids, mask) pairs})"""
    options = dict(template=cfg.template, last_reply_only=cfg.last_reply_only)
    tasks, documents, val_documents = read_tasks(cfg.data), [], {}
    for number, file in enumerate(tasks.values()):
        for ids, mask in read_examples(file, tokenizer, cfg.ctx_len, **options):
            documents.append((ids, mask, number))
    for name, file in (read_tasks(cfg.val_data) if cfg.val_data else {}).items():
        if name not in tasks:
            raise UserError(
                f"{cfg.val_data}: {name or 'one file'} is no task of {cfg.data}; give a folder "
                "with the same names, or one file for each"
            )
        val_documents[name] = read_examples(file, tokenizer, cfg.ctx_len, **options)
    return list(tasks), documents, val_documents


def save_state(model, cfg, run, name, task, task_name, tokenizer, base):
    """Rank 0 writes one task's state as state-<name>.pth, or best.pth; the oldest ones go."""
    if not run.main:
        return
    file = "best.pth" if name == "best" else f"state-{name}.pth"
    path = Path(cfg.out_dir) / task_name / file
    about = tune.origin(cfg, model, tokenizer, path.parent, base)
    about["template"] = cfg.template.__name__ if cfg.template else "User: …\n\nAssistant: …"
    tune.save_state(model, path, task, **about)
    runs.prune(path, cfg.keep_last)


def suffix(task_name):
    """What the metrics of a task end in; nothing where there is one task."""
    return f"/{task_name}" if task_name else ""


def validate(model, val_documents, names, tokenizer, cfg, run):
    """-> {name: number} on each task's held-out documents and of cfg.eval_fn, by its state."""
    values = {}
    for task, name in enumerate(names):
        model.task, of_task = task, {}
        if name in val_documents:
            of_task = evaluate(model, val_documents[name], cfg, run)
            if cfg.eval_off:
                with model.reference():
                    off = evaluate(model, val_documents[name], cfg, run)
                of_task["val_loss_off"] = off["val_loss"]
            if run.main:
                samples = val_documents[name][: cfg.eval_samples]
                show_answers(model, samples, tokenizer, cfg.eval_off)
        if cfg.eval_fn is not None:
            of_task.update(cfg.eval_fn(model, tokenizer))
        values.update({key + suffix(name): value for key, value in of_task.items()})
    return values


def better_tasks(values, names, best_losses):
    """Numbers of the tasks whose validation loss is the lowest yet; best_losses is brought up to
    date."""
    better = []
    for task, name in enumerate(names):
        loss = values.get("val_loss" + suffix(name), math.inf)
        if loss < best_losses.get(name, math.inf):
            best_losses[name] = loss
            better.append(task)
    return better


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- model and tokenizer
        model, tokenizer, base = open_model(cfg, run)

        # ---- data
        names, documents, val_documents = read_documents(cfg, tokenizer)
        add_states(model, tokenizer, cfg, len(names))
        max_steps, accumulation = runs.plan_steps(cfg, run, len(documents))
        n_trained = sum(sum(mask[1:]) for _, mask, _ in documents)
        epochs = max_steps * cfg.global_bsz / len(documents)
        print0(
            f"data: {len(documents):,} documents of {len(names)} tasks, {n_trained:,} trained "
            f"tokens; {max_steps:,} steps of {cfg.global_bsz} documents = {epochs:.2f} epochs"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(
            cfg, model, ctx_len=cfg.ctx_len, documents=len(documents), tasks=names, base=base
        )
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_losses = resumed.get("step", 0), resumed.get("best_losses", {})
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(model, val_documents, names, tokenizer, cfg, run)
            for task in better_tasks(values, names, best_losses):
                save_state(model, cfg, run, "best", task, names[task], tokenizer, base)
        metrics.begin(values)

        # ---- the loop
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                samples = [documents[i] for i in runs.samples_of(step, len(documents), cfg, run)]
                counts = [0] * len(names)  # trained tokens of each task in the whole batch
                for _, mask, task in samples:
                    counts[task] += sum(mask[1:])
                n_tokens, *counts = runs.all_sum(sum(len(ids) for ids, *_ in samples), *counts)
                present = [task for task, count in enumerate(counts) if count > 0]
                counts = torch.tensor(counts, device=run.device)
                losses = torch.zeros(len(names), device=run.device)
                for i, micro_batch in enumerate(runs.chunks(samples, cfg.micro_bsz)):
                    x, y, weight, cu_seqlens = pack([row[:2] for row in micro_batch], run.device)
                    tasks = torch.tensor([row[2] for row in micro_batch], device=run.device)
                    weight, task_of_token = task_weights(weight, cu_seqlens, tasks, counts)
                    packed = dict(cu_seqlens=cu_seqlens, targets=y, chunk_len=cfg.chunk_len)
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        scores, _ = wrapped(x, tune.task_states(model, tasks), **packed)
                        nll = -weight * scores.logps  # [1, T], a mean over each task's tokens
                        (nll.sum() * run.world).backward()  # DDP averages over processes: x world
                    losses.index_add_(0, task_of_token, nll.detach()[0])
                grad_norm = clip_each_task(model, present, cfg.grad_clip)
                stop, *losses = runs.all_sum(len(signals), *losses)
                loss = sum(losses[task] for task in present) / len(present)
                runs.check_finite(cfg, step, loss, grad_norm)
                opt.step()
                opt.zero_grad()
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- evaluate, log, save
                if done == max_steps or runs.due(done, cfg.eval_every):
                    values = validate(model, val_documents, names, tokenizer, cfg, run)
                    for task in better_tasks(values, names, best_losses):
                        save_state(model, cfg, run, "best", task, names[task], tokenizer, base)
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    if len(names) > 1:
                        values.update({f"loss/{names[task]}": losses[task] for task in present})
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    for task, name in enumerate(names):
                        save_state(model, cfg, run, checkpoint, task, name, tokenizer, base)
                if checkpoint or stop:
                    runs.save_last(cfg, run, model, opt, same, step=done, best_losses=best_losses)
                    series = [
                        what + suffix(name) for what in ("loss", "val_loss") for name in names
                    ]
                    metrics.plot(*series)
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        runs.finished(cfg, metrics, max_steps, f"{Path(names[0]) / 'state-final.pth'}{others}")


if __name__ == "__main__":
    main(load_config(Config))
