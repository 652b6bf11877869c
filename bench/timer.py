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


def median(values, digits):
    """Over the rounds, the first axis, as numbers that JSON can hold."""
    return np.median(values, axis=0).round(digits).tolist()


def report(bench, **values):
    """Print a result, with where and when it was measured."""
    about = dict(threads=torch.get_num_threads(), torch=torch.__version__, device=runs.cpu_name())
    row = {"bench": bench, "date": str(date.today()), **about, **values}
    print(json.dumps(row), flush=True)
