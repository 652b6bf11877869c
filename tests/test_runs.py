"""A run's folder, its metrics and its schedule."""

import json
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from gosling import runs
from gosling.config import UserError

ONE_CPU = runs.Run(0, 1, torch.device("cpu"), torch.float32)


def test_prune_keeps_the_newest_by_number(tmp_path):
    for n in (5, 10, 9, 100):
        (tmp_path / f"rwkv-{n}.pth").touch()
    (tmp_path / "rwkv-final.pth").touch()
    runs.prune(tmp_path / "rwkv-100.pth", 2)
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == ["rwkv-10.pth", "rwkv-100.pth", "rwkv-final.pth"]


def test_metrics_go_to_the_asked_logger_and_a_resumed_run_drops_lost_lines(tmp_path, monkeypatch):
    logged = []

    class FakeRun:
        def log(self, row, step):
            logged.append((step, row))

    def init(**settings):
        logged.append(settings["config"]["lr"])
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))

    @dataclass
    class Cfg:
        out_dir: str = str(tmp_path)
        log: str = "wandb"
        lr: float = 0.5

    metrics = runs.Metrics(Cfg(), ONE_CPU)
    for step in (1, 2, 3):
        metrics.log(step, loss=1.0 / step)
    assert logged == [0.5, (1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # a kill in the middle of a line
    metrics = runs.Metrics(Cfg(log="none"), ONE_CPU, first_step=2)
    metrics.log(3, loss=0.25)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    metrics.plot("loss", "val_loss")
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_follow_from_the_global_batch():
    def plan(world, **over):
        given = dict(micro_bsz=4, global_bsz=16, max_steps=None, epochs=None)
        cfg = types.SimpleNamespace(**{**given, **over})
        return runs.plan_steps(cfg, types.SimpleNamespace(world=world), 100)

    assert plan(1) == (7, 4) and plan(2) == (7, 2)  # ceil(100 / 16)
    assert plan(1, epochs=2.5) == (16, 4) and plan(1, max_steps=3) == (3, 4)
    with pytest.raises(UserError, match="global_bsz=16 is not a multiple of .* = 4 x 3"):
        plan(3)
    with pytest.raises(UserError, match="max_steps and epochs are both given"):
        plan(1, max_steps=3, epochs=1.0)


def test_every_sample_comes_once_an_epoch_whatever_the_batch():
    epoch = runs.shuffled(range(10), 10, seed=1)
    assert sorted(epoch) == list(range(10))
    assert runs.shuffled(range(10, 20), 10, seed=1) != epoch
    assert runs.shuffled([3, 4], 10, seed=1) == epoch[3:5]


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path):
    cfg = types.SimpleNamespace(out_dir=str(tmp_path))
    runs.check_finite(cfg, 0, 1.0, torch.tensor(1.0))
    with pytest.raises(UserError, match="step 3: loss nan"):
        runs.check_finite(cfg, 2, float("nan"), torch.tensor(1.0))
    with pytest.raises(UserError, match="gradient norm inf"):
        runs.check_finite(cfg, 2, 1.0, torch.tensor(float("inf")))
