"""The timer of every bench: the sides that are compared take turns, so that the machine's moods
fall on all of them, and a result is one line of JSON."""

import json
import time
from datetime import date

from gosling import runs

import numpy as np
import torch


def interleaved(sides, rounds, clock=time.process_time, warm_ups=1):
    """{name: function} -> {name: seconds of each counted run, an array [rounds]}

    clock: by default the CPU time of this process, with all of its threads. It may give several
    times as an array [clocks]; seconds are then [rounds, clocks].
    """
    seconds = {name: [] for name in sides}
    for i in range(warm_ups + rounds):
        for name, work in sides.items():
            start = clock()
            work()
            if i >= warm_ups:
                seconds[name].append(clock() - start)
    return {name: np.array(of_side) for name, of_side in seconds.items()}


def cpu_and_wall():
    """A clock with two times: CPU time of this process, and the time on the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def gpu():
    """A clock that waits until the GPU has nothing left to do."""
    torch.cuda.synchronize()
    return time.perf_counter()


AHEAD = 40_000_000  # cycles, about 20 ms, in which the host queues its calls


def queued(work, device="cuda", seconds=0.05, most=20, ahead=False):
    """Milliseconds of a call of `work`, after one that is not counted.

    On a GPU: as many calls as take about these seconds, queued one after the other between two
    events, and nothing is waited for in between. ahead: the card is given something else to do
    first, so that the calls stand in its queue when the clock starts; else the time includes what
    the card waits for the host.
    """
    work()
    one = elapsed(work, 1, device)
    if device == "cpu":
        return one
    calls = min(max(int(1e3 * seconds / one), 1), most)
    return elapsed(work, calls, device, ahead) / calls


def elapsed(work, calls, device, ahead=False):
    """Milliseconds of all the calls."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(AHEAD)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median(values, digits):
    """Over the rounds, the first axis, as numbers that JSON can hold."""
    return np.median(values, axis=0).round(digits).tolist()


def report(bench, **values):
    """Print a result, with where and when it was measured."""
    about = dict(threads=torch.get_num_threads(), torch=torch.__version__, device=runs.cpu_name())
    row = {"bench": bench, "date": str(date.today()), **about, **values}
    print(json.dumps(row), flush=True)
