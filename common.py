"""Run plumbing shared by every script: config, processes and devices, schedule, atomic files, a run's folder, metrics.

Functions, and one class that writes metrics: nothing here knows the network or a method, no training loop hides here.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import json
import math
import os
import platform
import runpy
import signal
import sys
import time
import types
import typing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """What the person at the terminal can mend. The message is one line: the thing, what was expected, the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# config: defaults < files, left to right < flags


@dataclass
class RunConfig:
    """The fields of every training script, which says what its own defaults are, and what a batch counts. Read by the loops,
    by the functions below, and by model.load_to_tune (grad_cp, and all of TuneConfig but eval_fn)."""

    # data and model
    data: str = ""  # training data
    val_data: str = ""  # the same for validation; empty = none
    tokenizer: str = (
        ""  # name or file; empty = what the model's folder says, or World if it has 65536 ids
    )
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # run
    out_dir: str = "out/run"  # folder for weights or adapters, last.pt, config.json, metrics
    resume: bool = False  # go on from out_dir/last.pt
    seed: int = 42  # of the data order, and of weights or an adapter that are fresh
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the computation; auto = bfloat16 on CUDA, else float32
    )
    # batch
    micro_bsz: int = 8  # samples per process and backward pass: lower it when memory runs out
    global_bsz: int = (
        32  # samples per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 4096  # longest sample in tokens
    # optimiser
    lr: float = 1e-5  # peak learning rate
    lr_final: float = 1e-6  # learning rate at the end of the cosine
    warmup_steps: int = 10  # steps from 0.01 lr to lr
    max_steps: int | None = None  # optimiser steps of the whole run; or give epochs
    epochs: float | None = None  # passes over the data; one if neither is given
    weight_decay: float = 0.0  # on the large matrices alone
    beta1: float = 0.9  # AdamW
    beta2: float = 0.99  # AdamW
    adam_eps: float = 1e-18  # AdamW; upstream's value
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    # evaluation, saving, logging
    eval_every: int = 100  # steps between validations; 0 = at the end only
    save_every: int = 500  # steps between checkpoints; 0 = at the end only
    log_every: int = 10  # steps between progress lines
    keep_last: int = (
        2  # rwkv-<step>.pth, lora-<step>.safetensors or state-<step>.pth to keep; 0 = all
    )
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = (
        "none"  # besides metrics.jsonl and metrics.png
    )


@dataclass
class TuneConfig(RunConfig):
    """Besides, where `tune` has a choice."""

    lora_r: int = 32  # LoRA rank
    lora_alpha: float = 64.0  # LoRA scale: alpha / r
    lora_dropout: float = 0.0  # LoRA dropout
    lora_rslora: bool = False  # scale alpha / sqrt(r)
    lora_targets: tuple[
        str, ...
    ] = ()  # matrices: key, att.key, ffn, head …; none = all of att and ffn
    lora_extra: tuple[
        str, ...
    ] = ()  # further parameters to train, by parts of their names: ln, x_ …
    adapter: str = ""  # saved adapter or state to go on from
    eval_fn: Callable | None = (
        None  # of your own: (model, tokenizer) -> {name: number}; a function in the config file
    )


def load_config(cls, argv=None):
    """Read `[file.py ...] [--key=value ...]` into the dataclass `cls`.

    A file is plain Python assignments. An unknown key is an error with a suggestion, a wrong type an error that names
    key, expected type and value. Flags may be `--key=value`, `--key value` and, for booleans, `--key` alone; `--help`
    shows every field with its comment. A file after a flag is an error, because the flag would not win over it.
    """
    sys.excepthook = _one_line_errors
    argv = list(sys.argv[1:] if argv is None else argv)
    n_files = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    values = {}
    for path in argv[:n_files]:
        values.update(read_config_file(path, cls))
    given = cls(**values)
    cfg = read_flags(cls, argv[n_files:], default=given)
    flags = [f"{k}={_show(v)}" for k, v in vars(cfg).items() if v != getattr(given, k)]
    print0("config: " + ", ".join([*argv[:n_files], *flags] or ["defaults"]))
    return cfg


def read_flags(cls, args=None, default=None):
    """`--key=value` flags (and positional fields, where `cls` has them) into the dataclass `cls`, through tyro."""
    import tyro

    sys.excepthook = _one_line_errors
    return tyro.cli(
        cls,
        default=default,
        args=_bool_flags(sys.argv[1:] if args is None else args, cls),
        description=sys.modules[cls.__module__].__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def read_config_file(path, cls):
    """{key: value} of a config file, every key and type checked against the dataclass `cls`."""
    import typeguard

    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    hints = typing.get_type_hints(cls)
    try:
        found = runpy.run_path(str(path))
    except (SyntaxError, ImportError, NameError) as e:
        raise UserError(f"config file {path} does not run: {type(e).__name__}: {e}") from e
    values = {}
    for key, value in found.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if key not in hints:
            near = difflib.get_close_matches(
                key, hints, n=1, cutoff=0.8 if callable(value) else 0.6
            )
            if callable(value) and not near:  # a helper of the config's own functions
                continue
            raise UserError(
                f"{path}: unknown key '{key}'"
                + (f"; did you mean '{near[0]}'?" if near else "")
                + f" ({Path(sys.modules[cls.__module__].__file__ or cls.__name__).name} --help lists all)"
            )
        try:
            typeguard.check_type(value, hints[key])
        except typeguard.TypeCheckError:
            expected = (
                hints[key].__name__
                if isinstance(hints[key], type)
                else str(hints[key]).replace("typing.", "")
            )
            raise UserError(
                f"{path}: {key} expects {expected}, got {value!r} ({type(value).__name__})"
            ) from None
        values[key] = value
    return values


def _bool_flags(args, cls):
    """`--resume` -> `--resume True`; `--resume=false` -> `--resume False`, which is what tyro reads."""
    bools = {k for k, t in typing.get_type_hints(cls).items() if t is bool}
    words = {"true": "True", "false": "False", "1": "True", "0": "False"}
    out, i = [], 0
    while i < len(args):
        key, eq, value = args[i].partition("=")
        if key.startswith("--") and key[2:].replace("-", "_") in bools:
            if not eq and i + 1 < len(args) and args[i + 1].lower() in words:
                value, i = args[i + 1], i + 1
            out += [key, words.get(value.lower(), value) if value else "True"]
        else:
            out.append(args[i])
        i += 1
    return out


def _show(value):
    return getattr(value, "__name__", None) or str(value)


def _one_line_errors(kind, error, traceback):
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


# ---------------------------------------------------------------------------------------------------------------------
# processes, devices


@dataclass
class Run:
    """Where this process runs."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self):
        return self.rank == 0


def launch(main):
    """Decorator: a script's `def main(cfg, run)` becomes `main(cfg)`, with device, dtype, seed and process group from `cfg`
    and torchrun. A live process group is reused and left alone; one made here is taken down at the end."""

    @functools.wraps(main)
    def launched(cfg):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device, dtype = pick_device(cfg)
        owns_group = world > 1 and not dist.is_initialized()
        if owns_group:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24)
            )  # a reward may take long; torchrun sees a process that dies
        torch.manual_seed(cfg.seed)
        if device.type == "cpu":
            keep_memory()
            if dtype == torch.bfloat16 and rank == 0:
                print0(
                    f"products in bfloat16: {bfloat16_speed():.1f} x the speed of float32 on this CPU"
                )
        print0(
            f"device: {device} x {world}, {str(dtype)[6:]}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
            + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
        )
        try:
            return main(cfg, Run(rank, world, device, dtype))
        finally:
            if owns_group:
                dist.destroy_process_group()

    return launched


def pick_device(cfg):
    """cfg.device and cfg.dtype, either of them "auto" -> (torch.device, torch.dtype); an error if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    try:
        device = torch.device(
            next(name for name in there if there[name]) if cfg.device == "auto" else cfg.device
        )
    except RuntimeError:
        raise UserError(
            f"device={cfg.device} is not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if not there.get(device.type, True):
        raise UserError(
            f"device={cfg.device}: PyTorch {torch.__version__} sees no {device.type.upper()} device here; use "
            "--device=cpu, or install a driver and a build of PyTorch for it"
        )
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


@functools.cache
def bfloat16_speed():
    """How many times as fast as float32 this CPU multiplies bfloat16: about 2 with AVX512-BF16 or AMX, well below 1 without."""

    def seconds(dtype):
        x, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(4):
            t = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - t)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def fast_dtype():
    """For a config file: "bfloat16" where it is faster than float32 on a CPU too, else "auto"."""
    return "bfloat16" if not torch.cuda.is_available() and bfloat16_speed() > 1.2 else "auto"


def keep_memory():
    """Let glibc keep what tensors free for the next ones. It gives large blocks back to the system at once, and taking them
    again, page by page, is up to a third of a small model's step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        libc = ctypes.CDLL(None)
        for option, size in (
            (-3, 2**25),
            (-1, 2**30),
        ):  # M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


def cpu_name():
    """'AMD EPYC …', where the system tells it; for result files."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print0(*args):
    """print on rank 0, at once (a log that lags is no log)."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def all_reduce(x):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.to(torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu"))
        dist.all_reduce(x)
    return x


def all_sum(*values):
    """Sum python numbers or scalar tensors over all processes; -> list of float, in float64."""
    return all_reduce(
        torch.stack([torch.as_tensor(v).detach().cpu().double() for v in values])
    ).tolist()


def gather(items):
    """A list of primitives from every process -> all of them, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return list(items)
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(items))
    return [item for part in lists for item in part]


@contextlib.contextmanager
def catch_signals():
    """Turn SIGTERM and Ctrl-C into a list that the loop reads between steps, so that it can save first.
    A second Ctrl-C interrupts at once. Outside the main thread (notebook executors) signals are left alone."""
    got, before = [], {}

    def handler(number, frame):
        if got and number == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(number)
        print0(f"\n{signal.Signals(number).name}: finishing this step, then saving")

    with contextlib.suppress(ValueError):
        before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield got
    finally:
        for s, old in before.items():
            signal.signal(s, old)


# ---------------------------------------------------------------------------------------------------------------------
# schedule


def lr_at(step, lr, lr_final, warmup_steps, max_steps):
    """Upstream's schedule: cosine from lr to lr_final after the warm-up, which multiplies by 0.01 .. 1.
    A function of the step alone, so that a resumed run never warms up twice."""
    progress = min(max((step - warmup_steps) / max(max_steps - warmup_steps, 1), 0.0), 1.0)
    value = lr_final + (lr - lr_final) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return value * (0.01 + 0.99 * step / warmup_steps if step < warmup_steps else 1.0)


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def shuffled(samples, n, seed):
    """Which of n items the global sample numbers `samples` (step * global_bsz + position) are: every item once an epoch,
    each epoch in its own order. A function of seed and sample number alone, so any number of processes and any
    micro-batch see the same data, and a resumed run goes on where it was."""
    return [int(_permutation(n, seed, s // n)[s % n]) for s in samples]


def samples_of(step, n, cfg, run):
    """Numbers, of n, of this process's samples in an optimiser step."""
    return shuffled(
        range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)[run.rank :: run.world],
        n,
        cfg.seed,
    )


def chunks(items, n):
    """items, n at a time"""
    return [items[i : i + n] for i in range(0, len(items), n)]


def plan_steps(cfg, run, n_items):
    """-> (optimiser steps of the whole run, backward passes of one step). One of max_steps and epochs; the accumulation
    follows from the global batch, so that the same config gives the same run on any number of processes."""
    for key in ("micro_bsz", "global_bsz", "ctx_len", "log_every", "lr"):
        if getattr(cfg, key) <= 0:
            raise UserError(f"{key}={getattr(cfg, key)}: expected a number above 0")
    if (
        cfg.max_steps is not None
        and cfg.max_steps < 0
        or cfg.epochs is not None
        and cfg.epochs <= 0
    ):
        raise UserError(
            f"max_steps={cfg.max_steps}, epochs={cfg.epochs}: expected a number above 0"
        )
    if cfg.global_bsz % (cfg.micro_bsz * run.world):
        raise UserError(
            f"global_bsz={cfg.global_bsz} is not a multiple of micro_bsz x processes = {cfg.micro_bsz} x "
            f"{run.world}; change one of them"
        )
    if getattr(cfg, "chunk_len", 0) < 0:
        raise UserError(
            f"chunk_len={cfg.chunk_len}: expected 0 (whole documents) or a number of tokens"
        )
    if (
        getattr(cfg, "chunk_len", 0)
        and getattr(cfg, "lora_dropout", 0)
        and getattr(cfg, "bptt", "full") == "full"
    ):
        raise UserError(
            "chunk_len with an exact gradient runs every chunk twice, which lora_dropout would make different; "
            "give one of them up"
        )
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise UserError("max_steps and epochs are both given; give one of them")
    steps = math.ceil((1.0 if cfg.epochs is None else cfg.epochs) * n_items / cfg.global_bsz)
    return steps if cfg.max_steps is None else cfg.max_steps, cfg.global_bsz // (
        cfg.micro_bsz * run.world
    )


def make_optimizer(model, cfg, run):
    """AdamW over model.param_groups, printed with counts. Each group keeps its share of the learning rate as lr_scale."""
    groups = [
        dict(g, lr_scale=g["lr"] / cfg.lr) for g in model.param_groups(cfg.lr, cfg.weight_decay)
    ]
    c = model.config
    print0(
        f"model: {c.version}, {c.n_layer} layers x {c.n_embd}, vocabulary {c.vocab_size}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; trained: "
        + ", ".join(
            f"{g['name']} {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} (lr {g['lr']:g}, "
            f"wd {g['weight_decay']:g})"
            for g in groups
        )
    )
    return torch.optim.AdamW(
        groups,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        fused=run.device.type in ("cpu", "cuda"),
    )


def set_lr(opt, cfg, step, max_steps):
    """Each group's share of lr_at. -> lr"""
    lr = lr_at(step, cfg.lr, cfg.lr_final, cfg.warmup_steps, max_steps)
    for group in opt.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def wrap(model, run):
    """-> (the model to call while training, its no_sync): DDP when there are several processes."""
    if run.world == 1:
        return model, contextlib.nullcontext
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[run.device] if run.device.type == "cuda" else None
    )
    return wrapped, wrapped.no_sync


def check_finite(cfg, step, loss, grad_norm):
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        last = Path(cfg.out_dir) / "last.pt"
        raise UserError(
            f"step {step + 1}: loss {loss}, gradient norm {float(grad_norm)}; stopped before this step touched the "
            + (f"weights. {last} stands;" if last.exists() else "weights;")
            + " try a lower --lr or --dtype=float32"
        )


def duration(seconds):
    """3725 -> '1h02m', 65 -> '1m05s'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


# ---------------------------------------------------------------------------------------------------------------------
# files


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp:` write to `tmp`; then it is fsynced and renamed. A reader, or a run killed at
    any moment, sees the old file or the new one, never half of one. A full disk leaves the old file as it was."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        tmp.chmod(0o666 & ~umask)  # some writers make private files
        os.replace(tmp, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself; Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:
        # torch.save reports a failed write as a RuntimeError of its zip writer
        if (
            isinstance(e, RuntimeError)
            and "PytorchStreamWriter" not in str(e)
            and "unexpected pos" not in str(e)
        ):
            raise
        reason = getattr(e, "strerror", None) or "the write failed: is the disk full?"
        raise UserError(
            f"cannot write {path}: {reason}; what was there before is untouched. "
            "Free some space or choose another folder, then run again"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def save_torch(obj, path):
    """torch.save, atomically. `obj`: tensors and primitives only, so that weights_only=True reads it back."""
    with atomic_write(path) as tmp:
        torch.save(obj, tmp)


def load_torch(path, device="cpu"):
    """torch.load of tensors and primitives; a missing, truncated or foreign file is an error that names it."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        raise UserError(
            f"{path} cannot be read as a PyTorch file of tensors ({str(e).splitlines()[0][:120]}): "
            "truncated, or not a checkpoint"
        ) from e


@contextlib.contextmanager
def figure(path):
    """`with figure(path) as ax:` a PNG of one pair of axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4))
    yield ax
    with atomic_write(path) as tmp:
        fig.savefig(tmp, format="png", dpi=120, bbox_inches="tight")
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# a run's folder: opened new or gone on from, saved to, closed


def open_run(
    cfg, run, model, opt, max_steps, *, data_order, kept, tokenizer, plot, about=None, write=None
):
    """A new run in out_dir, or with --resume on from its last.pt.

    data_order: besides seed and global_bsz, what the order of the data follows from; it must be the same on resume. kept:
    what the method wants back then, {name: value in a new run}. tokenizer() writes the tokenizer and says what config.json
    should. plot: the series of metrics.png. about: what an adapter's file says of itself. write: in place of the one below.
    -> ({name: trained parameter}, kept, metrics, write(name): what trains, save(step, name=None): that if it has a name,
    last.pt and the plot)
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    arch = dataclasses.asdict(model.config)
    same = dict(
        architecture=arch, data_order=dict(seed=cfg.seed, global_bsz=cfg.global_bsz, **data_order)
    )
    last = resume(cfg, trained, opt, same)
    kept = {name: last.get(name, value) for name, value in kept.items()}
    open_out_dir(cfg, run, arch=arch, tokenizer=tokenizer, max_steps=max_steps)
    metrics = Metrics(cfg, run, from_step=last.get("step", 0))

    def write_tuned(name):
        if run.main:
            prune(model.save_tuned(cfg.out_dir, name, run.dtype, **(about or {})), cfg.keep_last)

    write = write or write_tuned

    def save(step, name=None):
        if name:
            write(name)
        if run.main:
            save_torch(
                dict(
                    step=step,
                    model={n: p.detach() for n, p in trained.items()},
                    optimizer=opt.state_dict(),
                    rng=torch.get_rng_state(),
                    **same,
                    **kept,
                ),
                Path(cfg.out_dir) / "last.pt",
            )
        metrics.plot(*plot)

    return trained, kept, metrics, write, save


@torch.no_grad()
def resume(cfg, trained, opt, same):
    """With cfg.resume: parameters, optimiser and random numbers as last.pt has them. -> all of it; {} in a new run. same:
    {what: dict}; the first difference between then and now is an error."""
    path = Path(cfg.out_dir) / "last.pt"
    if not cfg.resume:
        return {}
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so there is nothing to resume; check --out_dir, or start without --resume"
        )
    last = load_torch(path)
    then, now = ({n: list(p.shape) for n, p in ps.items()} for ps in (last["model"], trained))
    for what, then, now in (
        *((k, last[k], same[k]) for k in same),
        ("set of trained parameters", then, now),
    ):
        for key in sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k)):
            raise UserError(
                f"{path} has another {what.replace('_', ' ')}: {key} was {then.get(key)}, is {now.get(key)}; "
                "resume with the data and settings it was made with, or start a new run with --init_from in another "
                "--out_dir"
            )
    for name, p in trained.items():
        p.copy_(last["model"][name])
    opt.load_state_dict(last["optimizer"])
    torch.set_rng_state(last["rng"])
    print0(f"resumed {path} at step {last['step']}")
    return last


def open_out_dir(cfg, run, *, tokenizer, **resolved):
    """Make out_dir and write config.json: every field of cfg, what was worked out from them, and the versions. A folder that
    holds another run is refused unless resume is set, so that nothing is lost by a forgotten flag."""
    out = Path(cfg.out_dir)
    if run.main:
        if (out / "last.pt").exists() and not cfg.resume:
            raise UserError(
                f"{out} already holds a run; --resume goes on with it, or choose another --out_dir"
            )
        for stale in out.glob(".*.tmp"):  # of a run that was killed while writing
            stale.unlink()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"out_dir={out} cannot be made ({e.strerror}); choose another") from e
        with atomic_write(out / "config.json") as tmp:
            tmp.write_text(
                json.dumps(
                    {
                        **config_dict(cfg),
                        **resolved,
                        "tokenizer": tokenizer(),
                        "processes": run.world,
                        "torch": torch.__version__,
                        "compute_dtype": str(run.dtype),
                    },
                    indent=1,
                )
                + "\n"
            )
    gather([])  # all wait for it


def config_dict(cfg):
    """cfg as primitives; a function is shown by its name."""
    plain = (int, float, str, bool, type(None))
    return {
        f.name: v if isinstance(v := getattr(cfg, f.name), plain) else _show(v)
        for f in dataclasses.fields(cfg)
    }


def origin(cfg, model, tokenizer, folder=None, fingerprint=None):
    """What the file of an adapter or a state in `folder`, by default out_dir, says of itself: the base, seen from there,
    its fingerprint, and the tokenizer. {} for whole weights."""
    if getattr(cfg, "tune", "state") in ("full", "head"):
        return {}
    folder = folder or cfg.out_dir
    name = (
        os.path.relpath(Path(cfg.out_dir) / tokenizer.file_name, folder)
        if tokenizer.text
        else tokenizer.name
    )
    return dict(
        model=os.path.relpath(cfg.init_from, folder),
        fingerprint=fingerprint or model.fingerprint(),
        tokenizer=name,
    )


def prune(path, keep):
    """Of the files numbered by step that `path` is one of ('rwkv-100.pth'), delete all but the `keep` newest; 0 keeps all."""
    kind, end = Path(path).stem.split("-")[0], Path(path).suffix
    numbered = [
        (int(n), p)
        for p in Path(path).parent.glob(f"{kind}-*{end}")
        if (n := p.stem.split("-")[1]).isdigit()
    ]
    for _, old in sorted(numbered)[:-keep] if keep else ():
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)  # of a state


def end_step(cfg, save, done, max_steps, stop):
    """The end of each step: the weights if it is the last, or save_every says so; after a signal last.pt, how to go on, and
    the status that shells expect."""
    name = (
        "final"
        if done == max_steps
        else str(done)
        if cfg.save_every and done % cfg.save_every == 0
        else None
    )
    if name or stop:
        save(done, name)
    if stop and done < max_steps:
        print0(
            f"saved {Path(cfg.out_dir) / 'last.pt'} at step {done}/{max_steps}; go on with the same command and --resume"
        )
        sys.exit(130)


def end_run(cfg, metrics, max_steps, *files):
    """The closing line; files: what to look at besides metrics.png."""
    out = Path(cfg.out_dir)
    if metrics.from_step >= max_steps:
        return print0(
            f"{out} is already at step {metrics.from_step} of {max_steps}; give a larger --max_steps to go on"
        )
    print0(
        f"done in {duration(time.time() - metrics.t0)}: {', '.join(f'{out}/{file}' for file in (*files, 'metrics.png'))}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# metrics


class Metrics:
    """metrics.jsonl (always), metrics.png, and wandb, tensorboard or swanlab when asked for. Rank 0 writes.

    from_step: the step a resumed run goes on from; lines beyond it belong to work that was lost and are dropped.
    """

    def __init__(self, cfg, run, from_step=0):
        self.path, self.active, self.from_step, self.t0 = (
            Path(cfg.out_dir) / "metrics.jsonl",
            run.main,
            from_step,
            time.time(),
        )
        self.backend, self.rows, self.tokens = None, [], 0
        if not self.active:
            return
        for line in self.path.read_text().splitlines() if from_step and self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can tear the last line
                self.rows.append(json.loads(line))
        self.rows = [row for row in self.rows if row["step"] <= from_step]
        with atomic_write(self.path) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        name = Path(cfg.out_dir).name
        try:
            if cfg.log == "wandb":
                import wandb

                self.backend = wandb.init(
                    project="gosling", name=name, config=config_dict(cfg), resume="allow"
                ).log
            elif cfg.log == "swanlab":
                import swanlab

                self.backend = swanlab.init(
                    project="gosling", experiment_name=name, config=config_dict(cfg)
                ).log
            elif cfg.log == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(cfg.out_dir)
                self.backend = lambda row, step: [
                    *(writer.add_scalar(k, v, step) for k, v in row.items()),
                    writer.flush(),
                ]
        except ImportError as e:
            raise UserError(
                f"log={cfg.log} needs a package that is not installed ({e.name}): "
                f"pip install {e.name}, or --log=none"
            ) from None

    def log(self, step, **values):
        """One JSON line {"step": …, name: number, …}."""
        if not self.active:
            return
        self.rows.append({"step": step, "time": round(time.time() - self.t0, 3), **values})
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(self.rows[-1]) + "\n")
        except OSError as e:
            raise UserError(
                f"cannot write {self.path}: {e.strerror}; free some space, then --resume"
            ) from e
        if self.backend:
            self.backend(values, step=step)

    def begin(self, values):
        """The numbers from before the first step, {} for none; then the clock starts."""
        if values:
            self.log(0, **values)
            print0("before: " + " | ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self.t0 = time.time()

    def progress(self, done, max_steps, *, loss, lr, grad_norm, quiet=(), **values):
        """log, and a line on the screen without what is in `quiet`; tokens/s and the time left from self.tokens, to which
        the loop adds."""
        seconds = (time.time() - self.t0) / max(done - self.from_step, 1)
        speed = self.tokens / max(time.time() - self.t0, 1e-9)
        self.log(done, loss=loss, lr=lr, grad_norm=float(grad_norm), tokens_per_s=speed, **values)
        print0(
            f"step {done}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {float(grad_norm):.2f} | "
            f"{speed:,.0f} tokens/s | {duration(seconds * (max_steps - done))} left"
            + "".join(f" | {k} {v:.4f}" for k, v in values.items() if k not in quiet)
        )

    def plot(self, *names):
        """metrics.png: the named series over steps."""
        if not self.active:
            return
        with figure(self.path.with_name("metrics.png")) as ax:
            for name in names:
                points = [(row["step"], row[name]) for row in self.rows if name in row]
                if points:
                    ax.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
            ax.set_xlabel("step")
            ax.grid(alpha=0.3)
            ax.legend()
