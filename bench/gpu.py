"""What only a GPU can say, in eight minutes: whether the kernels build and are right, and how fast
they are, and training, decoding and GRPO. Each figure stands beside what was predicted without one.

    python bench/gpu.py                                  # all stages, 8 minutes at most
    python bench/gpu.py --stage=kernels --upstream=rwkv7_clampw_v3_for_h100.cu
    python bench/gpu.py --device=cpu --scale=tiny        # no GPU: every stage on tiny sizes, which
                                                         # proves this script and measures nothing

Each stage is a process of its own with a time limit: one that hangs or fails costs only itself, and
its error is printed and kept. JSON lines go to bench/results/<date>-gpu.jsonl; of a tiny run only
where --out says. Only requirements.txt is needed; flash-linear-attention, Triton and ncu are used
where they are installed.
"""

import contextlib
import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gosling.config import UserError, read_flags

# Seconds of each stage; 480 together.
LIMITS = {
    "card": 20,
    "build": 95,
    "tests": 60,
    "kernels": 70,
    "counters": 35,
    "train": 70,
    "decode": 45,
    "grpo": 85,
}
STAGES = Literal["all", "card", "build", "tests", "kernels", "counters", "train", "decode", "grpo"]
LAST_LINES = 15  # of what a stage wrote to stderr: printed, and kept with its error


@dataclass
class Config:
    stage: STAGES = "all"  # one of them, or all
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: with --scale=tiny
    scale: Literal["full", "tiny"] = "full"  # tiny: sizes that measure nothing, in seconds
    minutes: PositiveFloat = 8.0  # at most; each stage's limit grows and shrinks with it
    upstream: str = ""  # RWKV-LM's rwkv7_clampw_v3_for_h100.cu, to be timed beside; empty = not
    grpo_from: str = ""  # a model of the small tasks after SFT; empty = one is trained first
    out: str = ""  # file for the JSON lines; empty = bench/results/<date>-gpu.jsonl
    alone: bool = False  # run the stage in this process, without its limit


# ----------------------------------------------------------------------------------------------
# what was predicted

# {figure: (lowest, highest, goal)}. None of it is a measurement: an H200, worked out in November
# 2026 from the compiled kernels' instructions and from the launches and bytes of the code of that
# day. Of our kernels the lowest are the cycles in bench/results/2026-11-28-kernels.jsonl at 1.98
# GHz, and the highest 1.35 times that. The goal is what the changes since then aim at.
PREDICTED = {
    "device copy, read and written": (4.0, 4.4, None),
    "bf16 product, 8192 x 8192 x 8192": (770, 800, None),
    "bf16 product, 32768 x 768 x 768": (400, 500, None),
    "build and trial": (40, 90, None),
    "tests that failed": (0, 0, 0),
    "WKV-7 C 4096 B 8 T 4096, cuda: forward": (0.7, 0.94, None),
    "WKV-7 C 2048 B 8 T 4096, cuda: forward": (0.45, 0.61, None),
    "WKV-7 C 768 B 8 T 4096, cuda: forward": (0.29, 0.39, None),
    "WKV-7 C 2048 B 1 T 65536, cuda: forward": (1.5, 2.03, None),
    "WKV-6 C 4096 B 8 T 4096, cuda: forward": (0.66, 0.89, None),
    "WKV-6 C 2048 B 8 T 4096, cuda: forward": (0.4, 0.54, None),
    "WKV-7 C 4096 B 8 T 4096, cuda: forward + backward": (3, 4.05, 2.6),
    "WKV-7 C 2048 B 8 T 4096, cuda: forward + backward": (1.6, 2.16, 2.0),
    "WKV-7 C 768 B 8 T 4096, cuda: forward + backward": (0.67, 0.9, 0.8),
    "WKV-7 C 2048 B 1 T 65536, cuda: forward + backward": (3.6, 4.86, 6.3),
    "WKV-6 C 4096 B 8 T 4096, cuda: forward + backward": (2.5, 3.38, None),
    "WKV-6 C 2048 B 8 T 4096, cuda: forward + backward": (1.4, 1.89, None),
    "WKV-7 C 4096 B 8 T 4096, fla: forward + backward": (12, 25, None),
    "WKV-7 C 4096 B 8 T 4096, fla_bounded: forward + backward": (12, 25, None),
    "WKV-7 C 4096 B 8 T 4096, upstream: forward + backward": (12, 17, None),
    **{
        f"WKV-{version} {kind}, cuda: error of {what}": (0, most, None)
        for version in (7, 6)
        for kind in ("plain", "repeated", "fastest")
        for what, most in (("y", 2e-3), ("gradients", 3e-3))
    },
    "the head's loss, C 768, PyTorch": (3.0, 3.6, None),
    "the head's loss, C 2048, PyTorch": (4.5, 5.2, None),
    "the head's loss, C 768, Triton": (0.9, 1.3, None),
    "the head's loss, C 2048, Triton": (1.9, 2.4, None),
    "0.1B training step: kernels": (3800, 4200, 2300),
    "0.1B decoding step: kernels": (800, 900, None),
    "0.1B training step: waits of the host": (12, 13, 0),
    "0.1B decoding step: waits of the host": (12, 13, 0),
    "0.1B B 8 T 4096: training": (120e3, 128e3, 420e3),
    "0.1B B 16 T 512: training": (80e3, 120e3, None),
    "1.5B B 2 T 4096: training": (26e3, 28e3, 58e3),
    "1.5B B 8 T 4096 grad_cp: training": (20e3, 25e3, None),
    "0.1B B 1: decoding": (150, 220, 500),
    "1.5B B 1: decoding": (80, 110, 230),
    "0.1B B 256: decoding": (25e3, 35e3, None),
    "1.5B B 256: decoding": (13e3, 19e3, None),
    "GRPO: difference of sampler and trainer": (0, 0.01, None),
}


def beside(what):
    """A figure's prediction, as text; empty where there is none."""
    if what not in PREDICTED:
        return ""
    low, high, goal = PREDICTED[what]
    text = f"predicted {low:,g} to {high:,g}"
    return text if goal is None else f"{text}, goal {goal:,g}"


# ----------------------------------------------------------------------------------------------
# what is kept


@functools.cache
def about(device):
    """Where it is measured, and with what."""
    from gosling import runs

    import torch

    found = dict(date=str(date.today()), device=runs.cpu_name(), torch=torch.__version__)
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(OSError):
            done = subprocess.run(query, capture_output=True, text=True)
            found["driver"] = done.stdout.strip()
        found |= dict(device=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    for package in ("triton", "fla-core"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def keep(cfg, row):
    """Add a line of JSON to the file of results, if there is one."""
    if not cfg.out and cfg.scale == "full":
        cfg.out = str(ROOT / f"bench/results/{date.today()}-gpu.jsonl")
    if cfg.out:
        path = Path(cfg.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def record(cfg, stage, what, measured, unit="", **more):
    """Print a figure beside its prediction, and keep it."""
    if isinstance(measured, float):
        measured = float(f"{measured:.4g}")
    number = f"{measured:,g}" if isinstance(measured, (int, float)) else measured
    print(f"{stage:9}{what:56} {number:>9} {unit:9}{beside(what)}", flush=True)
    low, high, goal = PREDICTED.get(what, (None, None, None))
    predicted = None if low is None else [low, high]
    row = dict(bench="gpu", stage=stage, what=what, measured=measured, unit=unit)
    row |= dict(predicted=predicted, goal=goal, **more, scale=cfg.scale, **about(cfg.device))
    keep(cfg, row)


# ----------------------------------------------------------------------------------------------
# running the stages


def run_here(cfg):
    """A stage in this process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # `stop` asks where it hangs
    import gpu_stages
    import torch

    torch.manual_seed(0)
    getattr(gpu_stages, cfg.stage)(cfg, functools.partial(record, cfg, cfg.stage))


def command_of(cfg, stage):
    """The command line of a stage's process."""
    command = [sys.executable, __file__, f"--stage={stage}", "--alone"]
    keys = ("device", "scale", "minutes", "upstream", "grpo_from", "out")
    return command + [f"--{key}={getattr(cfg, key)}" for key in keys]


def run_apart(command, limit):
    """A stage in a process of its own, for so many seconds -> None, or what went wrong.

    What it wrote to stderr comes after it, the last lines: which form took over, and why.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, stderr=said, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            stop(process)
        said.seek(0)
        lines = [line.rstrip()[:300] for line in said if line.strip()]
    words = "\n".join(lines[-LAST_LINES:])
    if status == 0:
        print(words, end="\n" if words else "", flush=True)
        return None
    return f"status {status}:\n{words}"


def stop(process):
    """It, and all that it started. One that still runs first says where it is."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(cfg):
    """-> how many stages failed"""
    end, failed = time.monotonic() + 60 * cfg.minutes, 0
    if cfg.scale == "tiny":  # nothing there is worth a second thread
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for stage in LIMITS if cfg.stage == "all" else [cfg.stage]:
        start = time.monotonic()
        limit = LIMITS[stage] * 60 * cfg.minutes / sum(LIMITS.values())
        error = run_apart(command_of(cfg, stage), min(limit, max(end - start, 1)))
        if error:
            failed += 1
            print(f"{stage:9}failed, {error}", flush=True)
            row = dict(bench="gpu", stage=stage, error=error, scale=cfg.scale)
            keep(cfg, {**row, "date": str(date.today())})
        print(f"--- {stage}: {time.monotonic() - start:.0f} s", flush=True)
    return failed


def main(cfg):
    if cfg.device == "cpu" and cfg.scale == "full":
        raise UserError("--device=cpu measures nothing; give it --scale=tiny")
    if cfg.alone and cfg.stage == "all":
        raise UserError("--alone runs one stage; give it --stage=…")
    for key in ("upstream", "grpo_from"):
        path = getattr(cfg, key)
        if path and not Path(path).is_file():
            raise UserError(f"{key}={path}: no such file")
    if cfg.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here; --device=cpu --scale=tiny proves the script without one")
            sys.exit(2)
    if cfg.alone:
        run_here(cfg)
    else:
        sys.exit(1 if run_all(cfg) else 0)


if __name__ == "__main__":
    main(read_flags(Config))
