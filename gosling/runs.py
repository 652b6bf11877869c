"""A run: its schedule, its folder, checkpoints and resuming, the user's eval_fn.

Nothing here knows the network or a method, and no training loop hides here: every function does one
thing that a script's loop calls by name.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import time
from pathlib import Path

from gosling import files, optimizer
from gosling.config import UserError, config_dict, print0, show
from gosling.files import primitive, read_json, save_torch, write_json
from gosling.last import (
    check_last,
    check_shares,
    checked_optimizer,
    in_shares,
    read_last,
    read_shares,
    remove_shares,
    write_shares,
)
from gosling.metrics import OWN_NAMES, Metrics, duration
from gosling.optimizer import make_optimizer
from gosling.processes import (
    Run,
    all_reduce,
    all_sum,
    cpu_name,
    fast_dtype,
    gather,
    pick_device,
    processes,
    sum_on,
)
from gosling.schemas import RunNotes
from gosling.shard import (
    average_gradients,
    clip_gradients,
    fill,
    full,
    is_sharded,
    local,
    whole,
    wrap,
)
from gosling.user_code import call, catch_signals, received

import numpy as np
import torch

# What a loop also calls by `runs.`, from other rooms.
__all__ = ["Metrics", "Run", "all_reduce", "all_sum", "catch_signals", "cpu_name", "fast_dtype"]
__all__ += ["average_gradients", "clip_gradients", "gather", "make_optimizer", "pick_device"]
__all__ += ["processes", "sum_on", "whole", "wrap"]

# ----------------------------------------------------------------------------------------------
# steps: how many, which samples, at which learning rate


def plan_steps(cfg, run, n_items):
    """-> (optimiser steps of the whole run, backward passes of one step).

    Accumulation follows from the global batch, so that a config gives the same run on any number
    of processes.
    """
    per_pass = cfg.micro_bsz * run.world
    if cfg.global_bsz % per_pass:
        raise UserError(
            f"global_bsz={cfg.global_bsz} is not a multiple of micro_bsz x processes = "
            f"{cfg.micro_bsz} x {run.world}; change one of them"
        )
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise UserError("max_steps and epochs are both given; give one of them")
    epochs = 1.0 if cfg.epochs is None else cfg.epochs
    max_steps = math.ceil(epochs * n_items / cfg.global_bsz)
    return max_steps if cfg.max_steps is None else cfg.max_steps, cfg.global_bsz // per_pass


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def shuffled(samples, n, seed):
    """Which of n items the global sample numbers `samples` (step * global_bsz + position) are.

    Every item once an epoch, each epoch in its own order. A function of seed and sample number
    alone: any number of processes and any micro-batch see the same data, and so does a resumed run.
    """
    return [int(permutation(n, seed, sample // n)[sample % n]) for sample in samples]


def samples_of(step, n, cfg, run):
    """Numbers, of n, of this process's samples in an optimiser step."""
    samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)
    return shuffled(samples[run.rank :: run.world], n, cfg.seed)


def chunks(items, n):
    """items, n at a time"""
    return [items[i : i + n] for i in range(0, len(items), n)]


def due(step, every):
    """Whether something that happens every so many steps happens after this one; 0 = never."""
    return every > 0 and step % every == 0


def lr_at(step, lr, lr_final, warmup_steps, max_steps):
    """Upstream's schedule: a cosine from lr to lr_final; the warm-up multiplies it by 0.01 .. 1.

    A function of the step alone, so that a resumed run never warms up twice.
    """
    progress = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    value = lr_final + (lr - lr_final) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return value * (0.01 + 0.99 * step / warmup_steps if step < warmup_steps else 1.0)


def set_lr(opt, cfg, step, max_steps):
    """Give each group its share of lr_at. -> lr"""
    lr = lr_at(step, cfg.lr, cfg.lr_final, cfg.warmup_steps, max_steps)
    optimizer.set_lr(opt, lr)
    return lr


def step_if_finite(opt, loss, grad_norm):
    """opt.step(), which does nothing, to weights and moments, if loss or norm is not a number.

    Two tensors. The device decides, and the host goes on: the fused AdamW takes the answer as a
    tensor, as from a GradScaler. For other optimisers and for weights elsewhere the host waits.
    """
    is_wrong = ~(loss.isfinite() & grad_norm.to(loss.device).isfinite())
    devices = {p.device for group in opt.param_groups for p in group["params"]}
    if opt.defaults.get("fused") and devices <= {loss.device}:
        opt.found_inf = is_wrong.float()
        opt.step()
        del opt.found_inf
    elif not is_wrong:
        opt.step()


def check_finite(cfg, step, loss, grad_norm, model):
    """UserError if the loss or the gradient is not a number: step_if_finite has done nothing."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    check_weights(cfg, model, f"step {step + 1}: loss {loss}")  # since an earlier step
    last = Path(cfg.out_dir) / "last.pt"
    stands = f" {last} stands;" if last.exists() else ""
    touched = "stopped before this step touched the weights"
    if getattr(cfg, "step_in_backward", False):
        touched = "this step has touched the weights, and nothing of it is saved"
    raise UserError(
        f"step {step + 1}: loss {loss}, gradient norm {float(grad_norm)}; {touched}.{stands} try a "
        "new run with a lower --lr or --dtype=float32"
    )


@torch.no_grad()
def check_weights(cfg, model, before="not saved"):
    """UserError if what trains holds NaN or infinity. Called before it is written."""
    trained = trained_parameters(model)
    sums = [local(p).sum(dtype=torch.float32) for p in trained.values()]
    is_finite = bool(torch.stack(sums).isfinite().all())  # one look at all
    if all(gather([is_finite])) if is_sharded(model) else is_finite:
        return
    for name, p in trained.items():
        if not full(p).isfinite().all():
            last = Path(cfg.out_dir) / "last.pt"
            stands = f"{last} stands; " if last.exists() else ""
            raise UserError(
                f"{before}: {name} has become NaN or infinite; {stands}try a new run with a "
                "lower --lr, or with another --adam_eps"
            )


# ----------------------------------------------------------------------------------------------
# a run's folder: opened new or gone on from, saved to


def trained_parameters(model):
    """{official name: parameter} of what trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# What may be otherwise on resume: it changes nothing, or only how long, where and how it is run.
# So are all settings of evaluation, eval_….
MAY_CHANGE = ("out_dir", "resume", "device", "micro_bsz", "packing", "chunk_len", "grad_cp")
MAY_CHANGE += ("compile", "step_in_backward", "gen_batch_size", "max_steps", "epochs", "patience")
MAY_CHANGE += ("save_every", "save_minutes", "keep_last")
MAY_CHANGE += ("log", "log_every", "rollouts_every", "val_data", "watch")
MAY_CHANGE += ("hang_minutes", "reward_seconds", "shard", "cpu_offload", "gather")

NAME_FILES = ("data", "init_from", "adapter", "init_state", "tokenizer", "reference")
NAME_FILES += ("reward_model", "json_schema")


def identity(cfg, model, **of_the_data):
    """What must be the same on resume: every setting that changes the result, and the network.

    What NAME_FILES have stands for the files' content, wherever they lie.
    """
    same = {}
    for key, value in config_dict(cfg).items():
        if key in MAY_CHANGE or key.startswith("eval_"):
            continue
        same[key] = primitive(value, key)
        for path in (value, f"{value}.bin"):  # a token file is given without its ending
            if key in NAME_FILES and value and Path(path).exists():
                same[key] = files.digest(path)
    return {**same, **dataclasses.asdict(model.config), **of_the_data}


def goes_on(cfg):
    """Whether cfg.resume is set, or is "auto" and there is a last.pt.

    A worker that torchrun has restarted goes on if it can, whatever its flags say.
    """
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if cfg.resume == "auto" or is_restarted:
        return (Path(cfg.out_dir) / "last.pt").exists()
    return cfg.resume


@torch.no_grad()
def resume(cfg, model, opt, same):
    """If it goes on: parameters, optimiser and random numbers as in last.pt -> all of last.pt.

    {} in a new run. same: from `identity`; the first difference between then and now is an error.
    """
    path = Path(cfg.out_dir) / "last.pt"
    if not goes_on(cfg):
        return {}
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so there is nothing to resume; check --out_dir, or start "
            "without --resume"
        )
    last, trained = read_last(path), trained_parameters(model)
    check_last(last, path)
    sizes, in_file = {}, shapes(last["model"])
    if last.get("shares"):
        sizes = check_shares(last, cfg.out_dir)
        in_model = {n: list(size) for n, size in sizes.items() if n.startswith("model.")}
        in_file = {n.removeprefix("model."): size for n, size in in_model.items()}
    # A setting that this version has and the one that wrote the file had not is passed over.
    before = {**same, **last["same"], **in_file}
    today = {**same, **shapes(trained)}
    for key in [*today, *before]:
        if before.get(key) != today.get(key):
            was, is_now = (
                "none" if v in (None, "") else v for v in (before.get(key), today.get(key))
            )
            raise UserError(
                f"{path}: {key} was {was!s:.300}, is {is_now!s:.300}; resume with the data and "
                "settings it was made with, or start a new run with --init_from in another "
                "--out_dir"
            )
    if last.get("shares"):
        read_shares(trained, opt, Path(cfg.out_dir) / last["shares"], sizes)
    else:
        state = checked_optimizer(last.get("optimizer"), opt, path)
        for name, p in trained.items():
            fill(p, last["model"][name])
        if is_sharded(model):
            state = in_shares(state, opt)
        opt.load_state_dict(optimizer.from_plain(state))
    torch.set_rng_state(last["rng"])
    print0(f"resumed {path} at step {last['step']}")
    return last


def shapes(tensors):
    """{name: sizes}"""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def save_last(cfg, run, model, opt, same, **values):
    """last.pt, all that `resume` needs; values: the step, and what else the method wants back.

    The last.pt from before is kept as last.previous.pt. A folder that is gone is described again.
    """
    check_weights(cfg, model)
    run.saved_at = time.monotonic()
    out, trained = Path(cfg.out_dir), trained_parameters(model)
    if is_sharded(model):
        shares, digests = write_shares(trained, opt, values["step"], out, run)
        tensors = {"model": {}, "shares": shares, "digests": digests}
    else:
        tensors = {"model": {name: p.detach() for name, p in trained.items()}}
        tensors["optimizer"] = optimizer.to_plain(opt.state_dict())
    if run.main:
        if run.tokenizer and not (out / "config.json").exists():
            write_description(cfg, run)
        # Tensors stay: a second optimiser's state is a value, too.
        values = {name: primitive(value, name, keep_tensors=True) for name, value in values.items()}
        save_torch(
            {**tensors, "rng": torch.get_rng_state(), "same": same, **values},
            out / "last.pt",
            out / "last.previous.pt",
        )
        remove_shares(out)


def open_run(cfg, run, model, tokenizer, first_step, max_steps):
    """Make out_dir, with config.json and the tokenizer in it -> Metrics.

    config.json has every field of cfg, what was worked out from them, and the versions. A folder
    that holds another run is refused unless resume is set: a forgotten flag loses nothing. So is
    one that another process is using.
    """
    out = Path(cfg.out_dir)
    run.described = {
        "arch": dataclasses.asdict(model.config),
        "tokenizer_digest": tokenizer.digest,
        "max_steps": max_steps,
        "processes": run.world,
        "torch": torch.__version__,
        "compute_dtype": str(run.dtype),
    }
    run.tokenizer = tokenizer
    if run.main:
        if (out / "last.pt").exists() and not goes_on(cfg):
            raise UserError(
                f"{out} already holds a run; --resume goes on with it, or choose another --out_dir"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"out_dir={out} cannot be made ({e.strerror}); choose another") from e
        run.held.enter_context(files.locked(out))
        files.remove_half_written(out)
        if not goes_on(cfg):
            keep_clear_of(cfg, out)
            write_json(out / "run.json", {})  # which run this is, and its checkpoints
        write_description(cfg, run)
    gather([])  # the others wait for the folder
    return Metrics(cfg, run, first_step)


def write_description(cfg, run):
    """config.json and the tokenizer's file in out_dir."""
    described = {"tokenizer": run.tokenizer.save(Path(cfg.out_dir)), **run.described}
    write_json(Path(cfg.out_dir) / "config.json", {**config_dict(cfg), **described})


NUMBERED = re.compile(r"(rwkv|lora|state)-(\d+)\.(pth|safetensors)")


def keep_clear_of(cfg, out):
    """UserError if this run would write over a file that it starts from."""
    for key in ("init_from", "adapter", "init_state"):
        path = Path(getattr(cfg, key, ""))
        ours = NUMBERED.fullmatch(path.name) or path.stem == "best" or path.stem.endswith("-final")
        if ours and path.resolve().parent == out.resolve():
            raise UserError(
                f"{key}={path} lies in out_dir, where this run may write over it; choose another "
                "--out_dir"
            )


def prune(path, keep, out_dir=None):
    """Of the numbered files like `path`, 'rwkv-100.pth', that this run wrote, keep the newest.

    run.json in the run's folder, by default that of `path`, lists what the run wrote; `path` is
    added, and no other file is touched.
    """
    path, out = Path(path), Path(out_dir or Path(path).parent)
    if not keep or not NUMBERED.fullmatch(path.name):
        return
    notes, alike = read_json(out / "run.json", RunNotes), []
    written = {*notes.get("checkpoints", []), path.relative_to(out).as_posix()}
    kind, number, _ = NUMBERED.fullmatch(path.name).groups()
    for name in written:
        of_kind, of_number, _ = NUMBERED.fullmatch(Path(name).name).groups()
        if (out / name).parent == path.parent and of_kind == kind and int(of_number) <= int(number):
            alike.append((int(of_number), name))
    for _, name in sorted(alike)[:-keep]:
        written.remove(name)
        (out / name).unlink(missing_ok=True)
        (out / name).with_suffix(".json").unlink(missing_ok=True)  # of a state
    write_json(out / "run.json", {**notes, "checkpoints": sorted(written)})


def overdue(cfg, run):
    """Whether last.pt is to be saved by the clock of rank 0, which decides for all."""
    if not run.main or cfg.save_minutes is None:
        return 0
    return int(time.monotonic() - run.saved_at > 60 * cfg.save_minutes)


def checkpoint_name(cfg, done, max_steps):
    """What a checkpoint after `done` steps is called: "final", the step, or None for none."""
    if done == max_steps:
        return "final"
    return str(done) if due(done, cfg.save_every) else None


def call_eval_fn(cfg, model, tokenizer):
    """What cfg.eval_fn measures -> {name: number}, {} if it gives None or there is none.

    A lone number is called "eval_fn". UserError, on every process, for what raises or gives
    something else.
    """
    if cfg.eval_fn is None:
        return {}
    name, error, values = show(cfg.eval_fn), [], {}
    try:
        values = call(f"eval_fn: {name}", cfg.eval_fn, cfg.eval_seconds, model, tokenizer)
        values = primitive(values, f"eval_fn: what {name} returned")
        values = {} if values is None else values
        values = {"eval_fn": values} if isinstance(values, (int, float)) else values
        if not isinstance(values, dict) or not all(map(is_number, values.values())):
            error = [f"eval_fn: {name} returned {values!r:.200}; expected {{name: number}}"]
        elif OWN_NAMES & values.keys():
            taken = ", ".join(sorted(OWN_NAMES & values.keys()))
            error = [f"eval_fn: {name} returned {taken}, names of the run's own; give others"]
        else:
            values = {str(key): value for key, value in values.items()}
    except UserError as e:
        error = [str(e)]
    model.zero_grad()  # what it left there would be trained
    for message in gather(error):
        raise UserError(message)
    return values


def is_number(value):
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


@contextlib.contextmanager
def saving_first(cfg, run, model, opt, same, **values):
    """`with saving_first(…)`: around code that calls what the user wrote, between two steps.

    If that fails or a signal ends it, last.pt is saved first, with `values` as for save_last, and
    the error says how to go on.
    """
    try:
        yield
    except Exception as e:
        text = "there was no step yet to save"
        if values["step"] > 0:
            save_last(cfg, run, model, opt, same, **values)
            last = Path(cfg.out_dir) / "last.pt"
            text = f"{last} is saved at step {values['step']}; --resume goes on"
        if received:
            print0(f"{e}; {text}")
            sys.exit(130)
        if values["step"] == 0:
            raise
        if isinstance(e, UserError):
            raise UserError(f"{e}; {text}") from e
        print0(text)
        raise


def stopped(cfg, done, max_steps):
    """Say how to go on after a signal."""
    last = Path(cfg.out_dir) / "last.pt"
    print0(f"saved {last} at step {done}/{max_steps}; go on with the same command and --resume")


def finished(cfg, metrics, max_steps, *files):
    """The closing line; files: what to look at besides metrics.png, by patterns."""
    out = Path(cfg.out_dir)
    if metrics.first_step >= max_steps:
        print0(f"{out} is already at step {metrics.first_step}; a larger --max_steps goes on")
        return
    paths = [str(path) for pattern in (*files, "metrics.png") for path in sorted(out.glob(pattern))]
    print0(f"done in {duration(time.monotonic() - metrics.start)}: {', '.join(paths)}")
