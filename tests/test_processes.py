"""Several processes under torchrun, of which one is killed, stopped or missing: the others say
which in one line and end; what torchrun restarts goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

from model import RWKV, RWKVConfig

import pytest
from helpers import ROOT, rows, write


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(tmp_path, *flags, torchrun=()):
    """train_sft.py in two processes -> the running torchrun; its output goes to tmp_path/log."""
    if not (tmp_path / "m.pth").exists():
        RWKV(RWKVConfig("x070", 1, 64, 257)).save_pretrained(tmp_path / "m.pth")
        write(
            tmp_path / "d.jsonl", *({"prompt": f"q{i} ", "completion": f"a{i}"} for i in range(64))
        )
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *torchrun]
    line += [f"--master_port={free_port()}", "train_sft.py", f"--data={tmp_path}/d.jsonl"]
    line += [f"--init_from={tmp_path}/m.pth", "--tokenizer=bytes", "--ctx_len=32", "--micro_bsz=4"]
    line += ["--global_bsz=8", "--save_every=5", "--eval_every=0", "--log_every=1", "--device=cpu"]
    line += [f"--out_dir={tmp_path}/run", *flags]
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)


def workers_at(process, tmp_path, step):
    """The processes of a torchrun, rank 0 first, once the run is at that step."""
    until = time.time() + 120
    while f"step {step}/" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.time() < until, (tmp_path / "log").read_text()
        time.sleep(0.05)
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def errors(tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    return [line for line in lines if "error: " in line]


def test_a_rank_that_is_killed_is_named_in_one_line(tmp_path):
    process = launch(tmp_path, "--max_steps=3000")
    pids = workers_at(process, tmp_path, 6)
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(60) == 1
    (line,) = errors(tmp_path)
    assert "error: rank 0: rank 1 has ended" in line
    assert all(map(is_gone, pids))


def test_a_worker_that_torchrun_restarts_goes_on(tmp_path):
    process = launch(tmp_path, "--max_steps=16", torchrun=["--max-restarts=1"])
    os.kill(workers_at(process, tmp_path, 11)[1], signal.SIGKILL)
    assert process.wait(120) == 0
    assert "resumed" in (tmp_path / "log").read_text()
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == 16


@pytest.mark.slow
def test_a_rank_that_stops_is_named_and_the_job_ends(tmp_path):
    process = launch(tmp_path, "--max_steps=3000", "--hang_minutes=0.1")
    pids = workers_at(process, tmp_path, 6)
    os.kill(pids[1], signal.SIGSTOP)
    assert process.wait(120) == 1
    (line,) = errors(tmp_path)
    assert "error: rank 0: rank 1 has ended, or has not answered for 0.1 minutes" in line
    assert all(map(is_gone, pids))


@pytest.mark.slow
def test_workers_end_when_torchrun_is_killed(tmp_path):
    process = launch(tmp_path, "--max_steps=3000")
    pids = workers_at(process, tmp_path, 6)
    process.kill()
    process.wait()
    until = time.time() + 60
    while not all(map(is_gone, pids)):
        assert time.time() < until
        time.sleep(0.2)
    assert len(errors(tmp_path)) == 2


def test_a_process_that_does_not_start_is_missed_within_minutes(tmp_path):
    line = (
        "import gosling.processes as p, torch; p.START_MINUTES = 0.05\n"
        "p.join(0, 2, torch.device('cpu'), 1.0)"
    )
    world = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env = {**os.environ, **world, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "did not start within 0.05 minutes" in done.stderr
