"""--log=…: what wandb, tensorboard and swanlab then hold is what metrics.jsonl holds.

Each test runs where its package is installed.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

RUN = """
import sys
from dataclasses import dataclass
import torch
from gosling.runs import Metrics, Run

@dataclass
class Config:
    out_dir: str
    log: str

metrics = Metrics(Config(sys.argv[1], sys.argv[2]), Run(0, 1, torch.device("cpu"), torch.float32))
for step in range(1, 4):
    metrics.log(step, loss=1 / step, lr=0.5)
"""


def run(folder, log, **env):
    pytest.importorskip(log)
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder / "run", log],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]


def test_tensorboard(tmp_path):
    rows = run(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in rows
    ]


def test_wandb_offline(tmp_path):
    rows = run(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kept = file.read_bytes()  # records of protobuf, uncompressed, values as JSON text
    assert all(str(row["loss"]).encode() in kept for row in rows) and kept.count(b"loss") >= 3


@pytest.mark.parametrize("log, folder", [("wandb", "wandb"), ("swanlab", "swanlog")])
def test_without_a_key_a_line_says_so_and_the_run_is_kept_in_its_folder(log, folder, tmp_path):
    """Nothing lies where the command was typed."""
    before = set(os.listdir(ROOT))
    home = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "SWANLAB_API_KEY": ""}
    rows = run(tmp_path, log, **home)
    assert len(rows) == 3 and any((tmp_path / "run" / folder).rglob("*run-*"))
    assert set(os.listdir(ROOT)) == before


def test_wandb_without_a_network(tmp_path):
    """A key and an address where nobody answers."""
    rows = run(tmp_path, "wandb", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert len(rows) == 3 and list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))


def test_swanlab_on_disk(tmp_path):
    rows = run(tmp_path, "swanlab", SWANLAB_MODE="offline", SWANLAB_LOG_DIR=str(tmp_path / "swan"))
    assert len(rows) == 3 and any((tmp_path / "swan").rglob("*"))
