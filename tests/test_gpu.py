"""bench/gpu.py, which measures on a GPU: that it runs through, on tiny sizes on a CPU, and that a
stage which hangs or fails costs only itself."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench import gpu
from gosling.config import UserError

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "bench"))  # for what they import of each other
gpu_stages = pytest.importorskip("gpu_stages")

TINY = dict(device="cpu", scale="tiny")
# What ncu prints before its table, the table's head, its units, and two kernels.
NCU = """==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes.sum","sm__cycles_elapsed.max"
"","","byte","cycle"
"0","forward(float const*, int)","1,024","77"
"1","backward","","78"
"""


def recorded(stage, **values):
    """What a stage records on tiny sizes, in this process -> {figure: measured}"""
    found = {}

    def record(what, measured, unit="", **more):
        found[what] = measured

    getattr(gpu_stages, stage)(gpu.Config(**TINY, stage=stage, **values), record)
    return found


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        gpu.main(gpu.Config())
    assert e.value.code == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "flags, word",
    [
        (dict(device="cpu"), "--scale=tiny"),
        (dict(TINY, alone=True), "--stage"),
        (dict(TINY, upstream="nowhere.cu"), "nowhere.cu"),
        (dict(TINY, grpo_from="nowhere.pth"), "nowhere.pth"),
    ],
)
def test_flags_that_do_not_fit(flags, word):
    with pytest.raises(UserError, match=word):
        gpu.main(gpu.Config(**flags))


@pytest.mark.parametrize("stage", ["card", "kernels", "train", "decode", "counters"])
def test_a_stage_runs_through(stage):
    found = recorded(stage)
    assert len(found) > 2
    for what, measured in found.items():
        assert measured == "missing" or measured >= 0, what


def test_a_stage_that_hangs_is_stopped_with_what_it_started(tmp_path):
    """Its own process says where it was, and a process that it started ends too."""
    started = tmp_path / "pid"
    code = f"""
import faulthandler, signal, subprocess, sys, time
faulthandler.register(signal.SIGUSR1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(started)!r}, "w").write(str(child.pid))
def hangs_here():
    time.sleep(600)
hangs_here()
"""
    error = gpu.run_apart([sys.executable, "-c", code], 8)
    assert "stopped after" in error and "in hangs_here" in error
    pid = int(started.read_text())
    ended_by = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < ended_by:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    """Whether there is such a process, and not just what is left of it."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_stage_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new/rows.jsonl"
    fails = [sys.executable, "-c", "raise ValueError('of the card')"]
    works = [sys.executable, "-c", "print('fine')"]
    monkeypatch.setattr(gpu, "LIMITS", dict(card=30, build=30))
    monkeypatch.setattr(gpu, "command_of", lambda cfg, stage: fails if stage == "card" else works)
    with pytest.raises(SystemExit) as e:
        gpu.main(gpu.Config(**TINY, out=str(out)))
    assert e.value.code == 1
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["stage"] == "card" and "ValueError: of the card" in row["error"]
    assert "--- build" in capsys.readouterr().out


def test_a_figure_stands_beside_its_prediction(tmp_path, capsys):
    cfg = gpu.Config(**TINY, out=str(tmp_path / "rows.jsonl"))
    what = "0.1B B 8 T 4096: training"
    gpu.record(cfg, "train", what, 123_456.7, "tokens/s")
    assert "123,500 tokens/s predicted 120,000 to 128,000, goal 420,000" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["predicted"] == [120e3, 128e3] and row["goal"] == 420e3
    assert row["device"] and row["torch"] and row["date"] and row["scale"] == "tiny"


class Event:
    """In place of torch.cuda.Event: it writes down what the card is asked; a call takes 3 ms."""

    log = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return 3.0 * self.log[self.log.index("event") :].count("call")


def test_nothing_is_waited_for_between_the_events(monkeypatch):
    timer = pytest.importorskip("timer")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Event.log.append("busy"))
    Event.log.clear()
    ms = timer.elapsed(lambda: Event.log.append("call"), 3, "cuda", ahead=True)
    assert Event.log == ["wait", "busy", "event", "call", "call", "call", "event", "wait"]
    assert ms == 9.0
    Event.log.clear()
    work = functools.partial(Event.log.append, "call")
    monkeypatch.setattr(timer, "elapsed", lambda work, calls, *rest: 4.0 * calls)
    assert timer.queued(work, "cuda") == 4.0 and Event.log == ["call"]


def test_time_limits_are_eight_minutes_together():
    assert sum(gpu.LIMITS.values()) == 480
    assert tuple(gpu.LIMITS) == gpu.STAGES.__args__[1:]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("tests/a.py::b[cuda-x y] PASSED [ 7%]\n", ("tests/a.py::b[cuda-x y]", "PASSED")),
        ("[gw3] [ 50%] FAILED tests/a.py::b[cuda] \n", ("tests/a.py::b[cuda] ", "FAILED")),
        ("FAILED tests/a.py::b[cuda] - assert 1 == 2\n", (None, None)),
        ("tests/a.py::b[cuda] \n", (None, None)),
    ],
)
def test_outcomes_of_tests_are_read(line, expected):
    assert gpu_stages.ended(line) == expected


def test_counters_are_read():
    found = gpu_stages.counted(NCU)
    assert [name for name, _ in found] == ["forward(float const*, int)", "backward"]
    assert found[0][1] == {"dram__bytes.sum": "1,024", "sm__cycles_elapsed.max": "77"}
    assert found[1][1] == {"sm__cycles_elapsed.max": "78"}
    assert gpu_stages.counted("==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    """Every stage, with an ncu that runs what it is given; every prediction meets its figure."""
    fake = tmp_path / "ncu"
    fake.write_text(f"#!/bin/sh\nshift 5\n\"$@\" && cat <<'END'\n{NCU}END\n")
    fake.chmod(0o755)
    out, path = tmp_path / "rows.jsonl", f"{tmp_path}:{os.environ['PATH']}"
    flags = ["--device=cpu", "--scale=tiny", "--minutes=40", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert {row["stage"] for row in rows} == gpu.LIMITS.keys()
    assert {row["what"] for row in rows} >= gpu.PREDICTED.keys() - NEEDS_MORE
    (tests,) = [row for row in rows if row["what"] == "tests that passed"]
    assert tests["skipped"] > 20 or tests["measured"] > 20
    assert "ncu, C 768: backward" in {row["what"] for row in rows}


# With flash-linear-attention installed, and RWKV-LM's file.
NEEDS_MORE = {
    f"WKV-7 C 4096 B 8 T 4096, {form}: forward + backward"
    for form in ("fla", "fla_bounded", "upstream")
}
