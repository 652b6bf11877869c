"""Many states trained together over one frozen model, as a ratio to as many runs, interleaved: CPU time of the processes.

python bench/states.py          # the eight skills of tasks.py, 4 documents of each a step; about two minutes
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, runs  # noqa: E402
import tasks  # noqa: E402
from model import RWKV, RWKVConfig  # noqa: E402


@dataclass
class Config:
    n_layer: int = 5  # layers
    n_embd: int = 64  # width
    each: int = 4  # documents of a task in a step
    steps: int = 50  # optimiser steps
    threads: int = 1  # CPU threads


def main(cfg):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, 257)).save_pretrained(folder / "base.pth")
        (folder / "data").mkdir()
        for skill in tasks.RULES:
            rows = [tasks.with_answer(row) for row in tasks.prompts(64, 0, [skill])]
            (folder / f"data/{skill}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )

        def seconds(data, bsz):
            """CPU time of a whole run, from the shell's point of view"""
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [
                    sys.executable,
                    "train_state.py",
                    f"--data={data}",
                    f"--init_from={folder / 'base.pth'}",
                    "--tokenizer=bytes",
                    f"--out_dir={folder}/{data.stem}-{bsz}",
                    f"--micro_bsz={bsz}",
                    f"--global_bsz={bsz}",
                    f"--max_steps={cfg.steps}",
                    "--eval_every=0",
                    "--save_every=0",
                    "--device=cpu",
                ],
                check=True,
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)},
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        files = sorted((folder / "data").glob("*.jsonl"))
        seconds(files[0], 1)  # the warm-up
        together, alone = (
            seconds(folder / "data", cfg.each * len(files)),
            [seconds(file, cfg.each) for file in files],
        )
    print(
        json.dumps(
            dict(
                bench="states",
                date=str(date.today()),
                n_layer=cfg.n_layer,
                n_embd=cfg.n_embd,
                tasks=len(alone),
                each=cfg.each,
                steps=cfg.steps,
                together_s=round(together, 2),
                alone_s=round(sum(alone), 2),
                ratio=round(together / sum(alone), 3),
                threads=cfg.threads,
                torch=torch.__version__,
                device=runs.cpu_name(),
            )
        )
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
