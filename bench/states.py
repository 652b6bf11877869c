"""Many states trained together over one frozen model, as a ratio to as many runs: CPU time of the
processes.

python bench/states.py          # the eight skills of tasks.py, 4 documents of each a step
"""

import functools
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tasks
from gosling import config, files
from model import RWKV, RWKVConfig

import timer


@dataclass
class Config:
    n_layer: int = 5  # layers
    n_embd: int = 64  # width
    each: int = 4  # documents of a task in a step
    steps: int = 50  # optimiser steps
    threads: int = 1  # CPU threads


def children():
    """A clock: the CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(cfg, folder, name, data, bsz):
    subprocess.run(
        [
            sys.executable,
            "train_state.py",
            f"--data={data}",
            f"--init_from={folder / 'base.pth'}",
            "--tokenizer=bytes",
            f"--out_dir={folder / name}",
            f"--micro_bsz={bsz}",
            f"--global_bsz={bsz}",
            f"--max_steps={cfg.steps}",
            "--eval_every=0",
            "--save_every=0",
            "--device=cpu",
        ],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)},
    )


def train_each(cfg, folder):
    for skill in tasks.ALL_SKILLS:
        train(cfg, folder, f"alone-{skill}", folder / f"data/{skill}.jsonl", cfg.each)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    n_tasks = len(tasks.ALL_SKILLS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "data"
        RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, 257)).save_pretrained(folder / "base.pth")
        for skill in tasks.ALL_SKILLS:
            rows = [tasks.with_answer(row) for row in tasks.prompts(64, 0, [skill])]
            files.write_jsonl(data / f"{skill}.jsonl", rows)
        train(cfg, folder, "warm-up", data / f"{skill}.jsonl", 1)
        seconds = timer.interleaved(
            {
                "together": functools.partial(
                    train, cfg, folder, "together", data, cfg.each * n_tasks
                ),
                "alone": functools.partial(train_each, cfg, folder),
            },
            rounds=1,
            clock=children,
            warm_ups=0,
        )
    timer.report(
        "states",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        tasks=n_tasks,
        each=cfg.each,
        steps=cfg.steps,
        together_s=timer.median(seconds["together"], 2),
        alone_s=timer.median(seconds["alone"], 2),
        ratio=timer.median(seconds["together"] / seconds["alone"], 3),
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
