"""Hostile files: every reader, fed what is damaged or odd, ends well or in one line with the name.

    python tests/campaign/fuzz.py [target …] [--n=N] [--show=K]      about N tries of each target

A try runs in a forked process, with 20 seconds of processor time (200 of waiting) and 3 GiB more
than it begins with. What came of it:
ok; error, a UserError in one line that names the file; vague, one that does not; traceback; hang;
crash. Seeds are fixed. --show: so many of each kind that should not be. targets.py has the readers,
odd.py what is odd. Linux only.
"""

import argparse
import collections
import contextlib
import os
import pickle
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process waits for ever for its parent's threads

from gosling.config import UserError

from targets import TARGETS

SECONDS, MEMORY = 20, 3 << 30  # of a try
KINDS = ("ok", "error", "vague", "traceback", "hang", "crash")
GOOD = KINDS[:2]


class Hang(BaseException):
    """A try took too long."""


def alarm(*_):
    raise Hang


def place_of(error):
    """The last line of ours that an exception went through."""
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))
    ]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def attempt(target, payload):
    """One try -> (kind, where, what was said)"""
    signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    file = Path(target.file)
    try:
        file.write_bytes(payload)
        target.read()
        return "ok", "", ""
    except UserError as e:
        text = str(e)
        is_named = any(name in text for name in (file.name, *target.names))
        is_good = is_named and "\n" not in text and len(text) < 2000
        return "error" if is_good else "vague", place_of(e), text
    except Hang as e:
        return "hang", place_of(e), ""
    except BaseException as e:
        return "traceback", place_of(e), f"{type(e).__name__}: {e}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def work_off(target, payloads, pipe):
    """In a process of its own: the tries one after the other, each result into the pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # as every command does
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with os.fdopen(pipe, "wb") as f:
        for payload in payloads:
            pickle.dump(attempt(target, payload), f)
            f.flush()


def in_child(target, payloads):
    """-> (results until the process ended, how it ended)"""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            work_off(target, payloads, writing)
        finally:
            os._exit(0)
    os.close(writing)
    results, end = [], "crash"
    with os.fdopen(reading, "rb", buffering=0) as f:
        while len(results) < len(payloads):
            if not select.select([f], [], [], 10 * SECONDS)[
                0
            ]:  # it waits, or the alarm did not reach it
                end = "hang"
                os.kill(pid, signal.SIGKILL)
                break
            try:
                results.append(pickle.load(f))
            except EOFError:
                break
    _, status = os.waitpid(pid, 0)
    return results, (end, f"wait status {status}", "")


def tries(target, payloads):
    """The result of every payload; a process that dies costs one try."""
    results = []
    while len(results) < len(payloads):
        some, end = in_child(target, payloads[len(results) :])
        results += some
        if len(results) < len(payloads):
            results.append(end)
    return results


def campaign(names, n, show, folder):
    """The table, a line for each target, in a folder of its own -> Counter of kinds"""
    total, width = collections.Counter(), max(map(len, TARGETS))
    print(f"{'':{width}}" + "".join(f"{kind:>10}" for kind in KINDS) + "   seconds")
    for name in names or TARGETS:
        start = time.monotonic()
        rng = random.Random(name)
        os.chdir(tempfile.mkdtemp(dir=folder))
        with contextlib.redirect_stdout(None):
            target = TARGETS[name](rng, n)
        payloads = list(target.payloads)
        results = tries(target, payloads)
        counts = collections.Counter(kind for kind, _, _ in results)
        total += counts
        cells = "".join(f"{counts[kind]:10}" for kind in KINDS)
        print(f"{name:{width}}{cells}{time.monotonic() - start:10.0f}", flush=True)
        bad = collections.defaultdict(list)
        for (kind, where, what), payload in zip(results, payloads, strict=True):
            if kind not in GOOD:
                bad[kind, where].append((what, payload))
        for (kind, where), found in sorted(bad.items()) if show else ():
            print(f"    {kind} {where}: {len(found)} x")
            for what, payload in found[:show]:
                print(f"        {what[:200]!r} of {payload[:200]!r}")
    print(f"{'total':{width}}" + "".join(f"{total[kind]:10}" for kind in KINDS))
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--show", type=int, default=0)
    flags = parser.parse_args()
    unknown = set(flags.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        total = campaign(flags.targets, flags.n, flags.show, folder)
        os.chdir(ROOT)
    sys.exit(sum(total[kind] for kind in KINDS if kind not in GOOD) > 0)


if __name__ == "__main__":
    main()
