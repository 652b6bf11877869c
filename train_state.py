"""State tuning: every weight is frozen, and only the state that the recurrence starts from learns.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | S_0, x_1 .. x_t)

S_0, [H, N, N] in each layer, is all that trains. A prompt writes a state; here the optimiser writes
it, a few MB that turn one frozen model into another. The reference is the same model with the state
off, many states share one model in memory and in a batch, and every RWKV engine reads the file. A
state carries a format, a style or a skill that the model half knows; it does not hold many facts,
and it fades over long texts as the decay forgets it. Idea and practice: RWKV-StateTuning and
RWKV-PEFT; there is no paper.

Data: JSONL as for SFT, or a folder of such files, which trains one state per file over the same
frozen model: each row starts from its own task's state; loss, token count and clipping are per
task, and a task of which a batch has no row is not stepped. Each state then gets a folder of its
own in out_dir, named like its file; a folder of val_data has files of the same names.

Usual mistakes: learning rates made for weights (a state wants 1e-2 and more, as it starts from
zero); rows and columns swapped (rows = value); validating inside the training loop's variables,
which trains on validation data; weight decay.

    python train_state.py config/state_tiny.py                a laptop: exact match 0.45 -> 0.99
    python train_state.py config/state_1b5.py --data=tasks/   one GPU, a state for each file
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gosling import runs, tune
from gosling.answers import show_answers
from gosling.batch import evaluate, pack
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0, show
from gosling.data import read_examples
from gosling.engine import prefill
from gosling.rows import ROWS, holds_rows
from gosling.shard import place, shards
from gosling.tokenizer import tokenizer_of
from gosling.weights import check_base, fingerprint, from_pretrained, read_state
from wkv_cuda import fused
from wkv_cuda.packed import to_device

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.utils import clip_grad_norm_


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
    init_state: str = ""  # state file to start from; empty = zero
    init_prompt: str = ""  # or start from the state that this text leaves behind
    another_base: bool = False  # an adapter or state of another base than this is meant
    layers: tuple[NonNegativeInt, ...] = ()  # train the states of these layers alone; none = of all
    shift: bool = False  # also train both token-shift vectors, which other engines do not read
    # run
    out_dir: str = "out/state"  # folder for checkpoints, last.pt, config.json and metrics
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
    compile: bool = False  # blocks through torch.compile: minutes at first, then faster steps
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_samples: NonNegativeInt = 3  # held-out prompts whose greedy answers are printed then
    eval_off: bool = False  # validate with the state off as well, so that the base stays in view
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method: many tasks in a batch


def find_tasks(path):
    """A file of rows, or a folder of them -> {task: file}; a single file's task is ""."""
    if not Path(path).is_dir():
        return {"": path}
    files = {}
    for file in sorted(Path(path).iterdir()):
        if file.is_file() and holds_rows(file):
            task = ROWS.sub("", file.name)
            if task in files:
                raise UserError(f"{path}: two files are of one task, {files[task]} and {file}")
            files[task] = str(file)
    if not files:
        raise UserError(f"{path} is a folder without .jsonl files; expected one file for each task")
    return files


def task_weights(weight, cu_seqlens, document_tasks, counts):
    """-> (weight [1, T] of a loss that is each task's mean, task of each token [T]).

    weight [1, T] and cu_seqlens [D + 1]: of packed documents. document_tasks [D]: the number of
    each one's task. counts [tasks]: trained tokens of each task in the whole optimiser batch, 0 for
    a task that is absent.
    """
    device, n_tokens = document_tasks.device, weight.shape[1]
    lengths = to_device(cu_seqlens.diff(), device)
    token_tasks = document_tasks.repeat_interleave(lengths, output_size=n_tokens)
    counts = to_device(torch.as_tensor(counts), device)
    return weight / counts.clamp(min=1)[token_tasks], token_tasks


def count_targets(samples, n_tasks):
    """[(ids, mask, task), ...] -> the trained tokens of each task"""
    counts = [0] * n_tasks
    for _, mask, task in samples:
        counts[task] += sum(mask[1:])
    return counts


def clip_each(states, counts, grad_clip):
    """Clip the gradient of each task's state on its own -> the norm of all of them, before that.

    The state of an absent task loses its gradient of zeros: AdamW would move it by its momentum.
    """
    norms = []
    for state, count in zip(states, counts, strict=True):
        if count == 0:
            state.zero_grad()
        else:
            norms.append(clip_grad_norm_(state.parameters(), grad_clip or math.inf))
    return torch.stack(norms).norm()


# ----------------------------------------------------------------------------------------------
# models and data in, states out


def open_model(cfg, run):
    """The frozen model on the device, and its tokenizer."""
    if not cfg.init_from:
        raise UserError("which model? --init_from=FILE, the .pth or .safetensors to start from")
    in_shares = shards(cfg, run)  # in memory each process then needs its share alone
    model = from_pretrained(cfg.init_from, dtype=None if in_shares else run.dtype)
    tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    if not in_shares:
        model.to(run.device)
    fused.build(run.device)
    return model, tokenizer


def read_data(tokenizer, cfg):
    """-> ({task: Documents to train on}, {task: held-out Documents} or {})"""
    reading = dict(
        template=cfg.template, last_reply_only=cfg.last_reply_only, skip_bad=cfg.skip_bad
    )
    files, val_files = find_tasks(cfg.data), {}
    if cfg.val_data:
        val_files = find_tasks(cfg.val_data)
    documents, val_documents = {}, {}
    for task, file in files.items():
        documents[task] = read_examples(file, tokenizer, cfg.ctx_len, **reading)
    for task, file in val_files.items():
        if task not in files:
            raise UserError(
                f"{cfg.val_data}: {task or 'one file'} is no task of {cfg.data}; give a folder "
                "with the same names, or one file for each"
            )
        val_documents[task] = read_examples(file, tokenizer, cfg.ctx_len, **reading)
    return documents, val_documents


def make_states(model, tokenizer, cfg, n_tasks):
    """A tuned state for each task; they start from zero, from a file or from what a text leaves."""
    if cfg.init_state and cfg.init_prompt:
        raise UserError("init_state and init_prompt are both given; a state starts from one")
    state = None  # [L, 1, ...]
    if cfg.init_state:
        state, about = read_state(cfg.init_state, model.config)
        check_base(cfg.init_state, about, model, cfg.init_from, cfg.another_base)
    elif cfg.init_prompt:
        _, state = prefill(model, [tokenizer.encode(cfg.init_prompt)])
    model.set_tune("state", tasks=n_tasks, shift=cfg.shift, layers=cfg.layers)
    if state is not None:
        for tuned in model.tuned:
            tuned.load(state)


def describe(model, tokenizer, cfg, tasks, base):
    """-> {task: what its state's file says of itself}; base: the fingerprint of the weights."""
    abouts = {}
    for task in tasks:
        about = tune.origin(cfg, model, tokenizer, Path(cfg.out_dir) / task, base)
        about.setdefault("template", "User: …\n\nAssistant: …")
        if cfg.template:
            about["template"] = show(cfg.template)
        abouts[task] = about
    return abouts


def metric(name, task):
    """What a number of one task is called."""
    return f"{name}/{task}" if task else name


def save_state(model, cfg, run, name, task, number, about):
    """Rank 0 writes one task's state as state-<name>.pth or best.pth; the oldest numbered go."""
    runs.check_weights(cfg, model)
    if run.main:
        path = tune.tuned_path(model, Path(cfg.out_dir) / task, name)
        tune.save_state(model, path, number, **about)
        runs.prune(path, cfg.keep_last, cfg.out_dir)


def save_best_states(model, cfg, run, values, best_losses, abouts):
    """Write best.pth of each task whose val_loss is below all before -> {task: lowest val_loss}"""
    lowest = dict(best_losses)
    for number, (task, about) in enumerate(abouts.items()):
        val_loss = values.get(metric("val_loss", task), math.inf)
        if val_loss < lowest.get(task, math.inf):
            save_state(model, cfg, run, "best", task, number, about)
            lowest[task] = val_loss
    return lowest


def validate(model, val_documents, tasks, tokenizer, cfg, run):
    """-> {name: number} of each task on held-out documents and of cfg.eval_fn; prints answers."""
    model.eval()
    values = {}
    with runs.whole(model):
        for number, task in enumerate(tasks):
            model.task = number
            of_task = {}
            if task in val_documents:
                of_task = evaluate(model, val_documents[task], cfg, run)
                if cfg.eval_off:
                    with model.reference():
                        off = evaluate(model, val_documents[task], cfg, run)
                    of_task["val_loss_off"] = off["val_loss"]
                if run.main:
                    shown = val_documents[task][: cfg.eval_samples]
                    show_answers(model, shown, tokenizer, off=cfg.eval_off)
            of_task.update(runs.call_eval_fn(cfg, model, tokenizer))
            values.update({metric(name, task): value for name, value in of_task.items()})
    return values


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- model and tokenizer
        model, tokenizer = open_model(cfg, run)

        # ---- data
        documents, val_documents = read_data(tokenizer, cfg)
        tasks = list(documents)
        rows = [(k, i) for k, task in enumerate(tasks) for i in range(len(documents[task]))]
        max_steps, accumulation = runs.plan_steps(cfg, run, len(rows))
        n_trained = sum(sum(mask[1:]) for task in tasks for _, mask in documents[task])
        epochs = max_steps * cfg.global_bsz / len(rows)
        print0(
            f"data: {len(rows):,} documents of {len(tasks)} tasks, {n_trained:,} trained tokens; "
            f"{max_steps:,} steps of {cfg.global_bsz} documents = {epochs:.2f} epochs"
        )

        # ---- a state for each task
        make_states(model, tokenizer, cfg, len(tasks))
        base = fingerprint(model)
        place(model, cfg, run)
        abouts = describe(model, tokenizer, cfg, tasks, base)

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        of_the_data = dict(ctx_len=cfg.ctx_len, documents=len(rows), tasks=tasks, base=base)
        same = runs.identity(cfg, model, **of_the_data)
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_losses = resumed.get("step", 0), resumed.get("best_losses", {})
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(model, val_documents, tasks, tokenizer, cfg, run)
            best_losses = save_best_states(model, cfg, run, values, best_losses, abouts)
        metrics.begin(values)

        # ---- the loop
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                numbers = runs.samples_of(step, len(rows), cfg, run)
                samples = [(*documents[tasks[k]][i], k) for k, i in (rows[n] for n in numbers)]
                n_tokens, *counts = runs.all_sum(
                    sum(len(ids) for ids, _, _ in samples), *count_targets(samples, len(tasks))
                )
                losses = torch.zeros(len(tasks), device=run.device)
                model.train()
                for i, micro_batch in enumerate(runs.chunks(samples, cfg.micro_bsz)):
                    packed = [(ids, mask) for ids, mask, _ in micro_batch]
                    x, y, weight, cu_seqlens = pack(packed, run.device)  # each [1, T]
                    document_tasks = [task for _, _, task in micro_batch]
                    document_tasks = to_device(torch.tensor(document_tasks), run.device)  # [D]
                    weight, token_tasks = task_weights(weight, cu_seqlens, document_tasks, counts)
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        scores, _ = wrapped(
                            x,
                            tune.task_states(model, document_tasks),  # [L, D, ...]
                            cu_seqlens=cu_seqlens,
                            targets=y,
                            chunk_len=cfg.chunk_len,
                        )
                        nll = -(weight * scores.logps)[0]  # [T]
                        (nll.sum() * run.world).backward()  # DDP averages over processes: x world
                    losses.index_add_(0, token_tasks, nll.detach())
                runs.average_gradients(model)
                grad_norm = clip_each(model.tuned, counts, cfg.grad_clip)
                present = [k for k, count in enumerate(counts) if count > 0]
                loss = losses.sum() / len(present)  # that of an absent task is 0
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(run.device, loss, len(signals), overdue, *losses)
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, stop, overdue, *losses = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- save what trains, evaluate, log, save the run
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    for number, (task, about) in enumerate(abouts.items()):
                        save_state(model, cfg, run, checkpoint, task, number, about)
                if done == max_steps or runs.due(done, cfg.eval_every):
                    at = dict(step=done, best_losses=best_losses)
                    with runs.saving_first(cfg, run, model, opt, same, **at):
                        values = validate(model, val_documents, tasks, tokenizer, cfg, run)
                    best_losses = save_best_states(model, cfg, run, values, best_losses, abouts)
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    if len(tasks) > 1:
                        values.update({metric("loss", tasks[k]): losses[k] for k in present})
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                if checkpoint or stop or overdue:
                    at = dict(step=done, best_losses=best_losses)
                    runs.save_last(cfg, run, model, opt, same, **at)
                    metrics.plot(*(metric(n, task) for n in ("loss", "val_loss") for task in tasks))
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        folder = "*/" if len(tasks) > 1 else ""
        runs.finished(cfg, metrics, max_steps, f"{folder}state-final.pth")


if __name__ == "__main__":
    main(load_config(Config))
