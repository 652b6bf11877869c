"""The border to the user's Python: what functions raise, how long they take, what they leave
behind; signals while the run prints, and while a function of the user's runs."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

from gosling.config import UserError
from gosling.rewards import call_reward
from gosling.user_code import call, calls, catch_signals

import pytest
import torch
from helpers import ROOT


class Unusual(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(0), GeneratorExit(), Unusual("x")])
def test_whatever_is_raised_becomes_a_line(error):
    def function():
        raise error

    with pytest.raises(UserError, match=f"reward f failed: {type(error).__name__}.*test_user") as e:
        call("reward f", function)
    assert e.value.__cause__ is error and not calls


def test_ctrl_c_goes_through():
    def function():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("reward f", function)


def sleep():
    time.sleep(60)


def spin():
    while True:
        pass


def swallow():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


async def wait():
    await asyncio.sleep(60)


def with_an_alarm_of_its_own():  # as some answer checkers have
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.alarm(1)
    signal.alarm(0)
    time.sleep(60)


@pytest.mark.parametrize("function", [sleep, spin, swallow, wait, with_an_alarm_of_its_own])
def test_what_hangs_ends_at_its_limit(function):
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match="reward f took longer than 0.2 s"):
        call("reward f", function, 0.2)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert call("reward f", int, 0.2, "7") == 7  # no signal comes late


@pytest.mark.parametrize("function", [sleep, spin, wait])
def test_what_hangs_ends_with_the_first_signal(function):
    kill = "import os, sys, time; time.sleep(0.5); os.kill(int(sys.argv[1]), 15)"
    with (
        catch_signals() as signals,
        subprocess.Popen([sys.executable, "-c", kill, str(os.getpid())]),
    ):
        with pytest.raises(UserError, match="reward f was ended by SIGTERM"):
            call("reward f", function)
        assert signals == [signal.SIGTERM]


def test_pytorch_and_the_folder_are_afterwards_as_they_were(tmp_path):
    def function():
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        os.chdir(tmp_path)
        raise ValueError

    before = os.getcwd()
    with pytest.raises(UserError):
        call("reward f", function)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert os.getcwd() == before


def test_a_reward_changes_lists_of_its_own():
    prompts, texts = [[{"role": "user", "content": "hi"}]], ["a", "b"]
    columns = {"answer": [{"n": [1]}, {"n": [2]}], "completion_ids": [[5, 6], [7]]}

    def reward(prompts, completions, answer, completion_ids, **columns):
        prompts[0][0]["content"] = "changed"
        completion_ids[0].pop()
        answer[1]["n"].clear()
        completions.clear()
        return [1.0, 2.0]

    assert call_reward(reward, prompts, texts, columns) == [1.0, 2.0]
    assert prompts[0][0]["content"] == "hi" and texts == ["a", "b"]
    assert columns == {"answer": [{"n": [1]}, {"n": [2]}], "completion_ids": [[5, 6], [7]]}


LOOP = """
import sys, time
sys.path.insert(0, sys.argv[1])
from gosling.config import print0
from gosling.user_code import catch_signals
with catch_signals() as signals:
    while not signals:
        print0("x" * 1000)
    open(sys.argv[2], "w").write("saved")
    print0("saved")
sys.exit(130)
"""


def loop(tmp_path, **options):
    words = [sys.executable, "-c", LOOP, str(ROOT), str(tmp_path / "saved")]
    return subprocess.Popen(words, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_output_is_blocked_saves(number, tmp_path):
    """As in a pager or after Ctrl-S: the loop waits within print when the signal comes."""
    reading, writing = os.pipe()
    with loop(tmp_path, stdout=writing) as run:
        os.close(writing)
        os.read(reading, 1000)  # it runs, and nobody reads on
        time.sleep(0.5)
        run.send_signal(number)
        time.sleep(0.5)
        while os.read(reading, 2**16):
            pass
        os.close(reading)
        assert run.wait(20) == 130
        assert f"{number.name}: finishing this step" in run.stderr.read().decode()
    assert (tmp_path / "saved").exists()


def test_a_reader_that_goes_away_ends_the_run_after_saving(tmp_path):
    with loop(tmp_path, stdout=subprocess.PIPE) as run:
        run.stdout.read(5000)
        run.stdout.close()
        assert run.wait(20) == 130
        assert "Traceback" not in run.stderr.read().decode()
    assert (tmp_path / "saved").exists()


def test_nohup_is_left_alone(tmp_path):
    ignored = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    with loop(tmp_path, stdout=subprocess.PIPE, **ignored) as run:
        run.stdout.read(5000)
        run.send_signal(signal.SIGHUP)
        run.stdout.read(200_000)  # it runs on
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=20)
    assert run.returncode == 130
