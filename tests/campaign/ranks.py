"""Ranks of torchrun that are killed at random moments: torchrun restarts them, and the run ends as
one that nobody disturbed.

python tests/campaign/ranks.py [--kills=100] [--nproc=2] [--shard=none|fsdp] [--seed=0]

Compared are the weights (bit for bit with one process, to 1e-5 with two), the steps that were
logged, and what is left over: no process, and no file that a whole run has not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gosling.weights import read_weights

from kills import CASES, make_data


def furthest(out):
    """The last step that a run has logged."""
    if not (out / "metrics.jsonl").exists():
        return -1
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else -1


def weights_gap(one, other):
    """The largest difference of two runs' final weights."""
    a, b = read_weights(one / "rwkv-final.pth"), read_weights(other / "rwkv-final.pth")
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def left_over(folder):
    """Processes that still have this folder on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(place.name) != os.getpid():
            found.append(words)
    return found


def start(words, nproc, log):
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    line += ["--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*line, *words], cwd=ROOT, env=env, stdout=log, stderr=log)


def workers(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def disturbed(words, nproc, out, rng, seconds, seen):
    """One run, of which up to three times a rank is killed -> torchrun's exit status."""
    with open(out.with_suffix(".log"), "w") as log:
        process = start([*words, f"--out_dir={out}"], nproc, log)
        for _ in range(3):
            wait = rng.uniform(0.5, seconds)
            while wait > 0 and process.poll() is None:
                time.sleep(0.05)
                wait -= 0.05
            pids = workers(process)
            if process.poll() is not None or not pids:
                break
            try:
                os.kill(rng.choice(pids), signal.SIGKILL)
                seen["kills"] += 1
            except ProcessLookupError:
                continue
        return process.wait(600)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--shard", default="none", choices=["none", "fsdp"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, rng, seen = (
        Path(tempfile.mkdtemp(prefix="gosling-ranks-")),
        random.Random(args.seed),
        Counter(),
    )
    make_data(folder)
    words = CASES["sft"].replace("W/", f"{folder}/").split()
    words += ["--micro_bsz=2", "--adam_eps=1e-4", f"--shard={args.shard}"]
    whole, began = folder / "whole", time.monotonic()
    with open(folder / "whole.log", "w") as log:
        assert start([*words, f"--out_dir={whole}"], args.nproc, log).wait() == 0
    seconds, names = time.monotonic() - began, {path.name for path in whole.iterdir()}
    limit = 0 if args.nproc == 1 else 1e-5
    failed = False
    while seen["kills"] < args.kills:
        out = folder / f"run{seen['runs']}"
        status = disturbed(words, args.nproc, out, rng, seconds, seen)
        seen["runs"] += 1
        steps = [
            json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        problems = [f"status {status}"] if status else []
        if not status and weights_gap(whole, out) > limit:
            problems.append(f"weights differ by {weights_gap(whole, out)}")
        if steps != sorted(set(steps)):
            problems.append("steps are logged twice")
        extra = {path.name for path in out.iterdir()} - names - {"last.previous.pt"}
        if extra:
            problems.append(f"left are {extra}")
        if left_over(folder):
            problems.append(f"processes are left: {left_over(folder)[:2]}")
        seen["; ".join(problems) or "as undisturbed"] += 1
        failed |= bool(problems)
        if not problems:
            shutil.rmtree(out)
        print(dict(seen), flush=True)
    if not failed:
        shutil.rmtree(folder)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
