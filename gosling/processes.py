"""The processes of a run and their device: one, or several under torchrun."""

import contextlib
import dataclasses
import functools
import gc
import os
import platform
import signal
import time
import types
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from gosling import config
from gosling.config import UserError, print0
from wkv_cuda import fused
from wkv_cuda.packed import to_device

import torch
import torch.distributed as dist

START_MINUTES = 5  # until all processes must be there


@dataclass
class Run:
    """Where this process runs."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of activations and of frozen weights
    wrappers: list = dataclasses.field(default_factory=list)  # DDP's, or models in shares
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)  # locks
    described: dict = dataclasses.field(default_factory=dict)  # what config.json says besides cfg
    tokenizer: object = None  # whose file lies beside it
    saved_at: float = dataclasses.field(default_factory=time.monotonic)  # when last.pt was written

    @property
    def main(self):
        return self.rank == 0


@contextlib.contextmanager
def processes(cfg):
    """`with processes(cfg) as run:` config checked; device, dtype, seed and process group set up.

    Under torchrun a live process group is reused and left alone; one that is made here is taken
    down at the end. UserError if the connection to another process is lost.
    """
    config.check(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = pick_device(cfg)
    owns_group = world > 1 and not dist.is_initialized()
    if owns_group:
        join(rank, world, device, cfg.hang_minutes)
    torch.manual_seed(cfg.seed)
    print0(describe_device(device, dtype, world))
    run = Run(rank, world, device, dtype)
    try:
        with run.held:
            yield run
    except RuntimeError as e:
        if owns_group and is_of_connection(e):
            raise UserError(describe_loss(rank, world, cfg.hang_minutes)) from e
        raise
    finally:
        # The caller's frame still holds the wrapper, and that the group: a process that ends with
        # both alive can hang, or be ended by an exception of a thread.
        for wrapper in run.wrappers:
            vars(wrapper).clear()
        if owns_group:
            gc.collect()
            dist.destroy_process_group()
            _noted.store = None


_noted = types.SimpleNamespace(store=None)  # where processes note things for each other


def join(rank, world, device, hang_minutes):
    """The process group of all processes; UserError names those that are not there in time."""
    until = time.monotonic() + 60 * START_MINUTES
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=left_until(until)))
        store = dist.PrefixStore(f"gosling/{meet(store, rank, world, until)}", store)
        _noted.store = store
        note("started")
        store.wait([f"started/{r}" for r in range(world)], left_until(until))
    except dist.DistError:
        raise UserError(
            f"rank {rank}: {without('started', world)} did not start within {START_MINUTES:g} "
            "minutes; look at its own output, and at the address that torchrun was given"
        ) from None
    backend, hang = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=hang_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=hang)


def left_until(until):
    return timedelta(seconds=max(until - time.monotonic(), 0.1))


def meet(store, rank, world, until):
    """A name for this meeting of all processes, the same on each.

    torchrun's store outlives the processes that it restarts, and what ended ones have left there,
    such as their addresses, must not be taken for that of the living. So each process says hello
    with a word of its own, and rank 0 answers to the word.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"gosling/hello/{rank}", word)
        store.wait([f"gosling/{rank}/{word}"], left_until(until))
        return store.get(f"gosling/{rank}/{word}").decode()
    name, waited_for, words = uuid.uuid4().hex, set(range(1, world)), {}
    while waited_for and time.monotonic() < until:
        for other in range(1, world):
            if not store.check([f"gosling/hello/{other}"]):
                continue
            word = store.get(f"gosling/hello/{other}").decode()
            if words.get(other) != word:  # the first may be of a process that has ended
                store.set(f"gosling/{other}/{word}", name)
                words[other] = word
            if store.check([f"gosling/{name}/started/{other}"]):
                waited_for.discard(other)
        time.sleep(0.05)
    return name


def note(what):
    """Tell the other processes, by way of torchrun; where that is gone it is a RuntimeError."""
    if _noted.store is not None:  # None: the process group is not of gosling's making
        _noted.store.set(f"{what}/{os.environ['RANK']}", "")


def without(what, world):
    """The ranks that have not noted this, in words."""
    ranks = []
    if _noted.store is not None:
        with contextlib.suppress(RuntimeError):
            ranks = [str(r) for r in range(world) if not _noted.store.check([f"{what}/{r}"])]
    return f"rank {', '.join(ranks)}" if ranks else "another process, or torchrun,"


def is_of_connection(error):
    """Whether an error is of the connection between processes, and not of the code."""
    words = str(error)
    return isinstance(error, dist.DistError) or any(
        w in words for w in ("gloo", "NCCL", "TCPStore")
    )


def describe_loss(rank, world, hang_minutes):
    """Which process does not answer: every other one sees that, and notes it within seconds."""
    with contextlib.suppress(ValueError):  # another thread: a notebook
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all at once, before the line
    with contextlib.suppress(RuntimeError):
        note("lost")
        time.sleep(3)
    return (
        f"rank {rank}: {without('lost', world)} has ended, or has not answered for "
        f"{hang_minutes:g} minutes (hang_minutes); its own output may say why. --resume goes on "
        "from the last checkpoint"
    )


def pick_device(cfg):
    """cfg.device and cfg.dtype, either may be "auto" -> (torch.device, torch.dtype), made ready."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    first_available = next(name for name, is_there in available.items() if is_there)
    try:
        device = torch.device(first_available if cfg.device == "auto" else cfg.device)
    except RuntimeError:
        raise UserError(
            f"device={cfg.device} is not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if not available.get(device.type, True):
        raise UserError(
            f"device={cfg.device}: PyTorch {torch.__version__} sees no {device.type.upper()} "
            "device here; use --device=cpu, or install a driver and a build of PyTorch for it"
        )
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if device.type == "cpu":
        fused.keep_memory()
    auto_dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, auto_dtype if cfg.dtype == "auto" else cfg.dtype)


def describe_device(device, dtype, world):
    """One line for the log."""
    name = cpu_name()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    line = f"device: {device} x {world}, {str(dtype)[6:]}, torch {torch.__version__}, {name}, "
    line += f"{torch.get_num_threads()} CPU threads"
    if device.type == "cpu" and dtype == torch.bfloat16:
        line += f"; products in bfloat16 run at {bfloat16_speed():.1f} x the speed of float32"
    return line


@functools.cache
def bfloat16_speed():
    """How many times as fast as float32 this CPU multiplies bfloat16: about 2 with AVX512-BF16 or
    AMX, well below 1 without."""

    def seconds(dtype):
        x, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def fast_dtype():
    """For a config file: "bfloat16" where it is faster than float32 on a CPU too, else "auto"."""
    return "bfloat16" if not torch.cuda.is_available() and bfloat16_speed() > 1.2 else "auto"


def cpu_name():
    """'AMD EPYC …', where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


before_talk = []  # what shard.in_step wants done before processes exchange anything


def all_reduce(x):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        note("alive")
        for act in before_talk:
            act()
        x = x.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(x)
    return x


def sum_on(device, *values):
    """all_sum, as a tensor on the device that nobody has waited for: .tolist() does."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    numbers = [0.0 if isinstance(v, torch.Tensor) else v for v in values]
    sums = list(to_device(torch.tensor(numbers, dtype=dtype), device))
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            sums[i] = value.detach().to(dtype)
    return all_reduce(torch.stack(sums))


def all_sum(*values):
    """Sum python numbers or scalar tensors over all processes; -> list of float, in float64."""
    values = [torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in values]
    return all_reduce(torch.stack(values)).tolist()


def gather(items):
    """A list of primitives from every process -> all of them by rank, the same everywhere."""
    if not dist.is_initialized():
        return list(items)
    note("alive")
    for act in before_talk:
        act()
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(items))
    return [item for of_rank in lists for item in of_rank]
