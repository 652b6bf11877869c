"""Models in shares (shard=fsdp), in two processes on a CPU: the numbers of DDP."""

import json
import os
import re
import subprocess
import sys

from gosling.weights import read_weights
from model import RWKV, RWKVConfig

import pytest
import torch
from helpers import ROOT, config_of, make_files, rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("shard"))


def torchrun(script, *words, nproc=2):
    """A script in so many processes -> the completed process."""
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    line += ["--master_port", str(29500 + os.getpid() % 1000), script, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(word) for word in line],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_all(folder, wanted, nproc=2):
    """The runs, one after the other, in so many processes -> the completed process."""
    (folder / "runs.json").write_text(json.dumps(wanted))
    return torchrun("tests/several.py", folder / "runs.json", nproc=nproc)


RUNS = [  # script, version, what else is set
    ("train_sft", "x070", dict(chunk_len=16, gather="block")),
    ("train_grpo", "x070", dict(reward_model="score", gather="block", steps_per_generation=2)),
    ("train_state", "x070", dict(eval_off=True)),
    ("train_dpo", "x060", dict(tune="lora", lora_extra=("ln",), reference="off", chunk_len=8)),
    ("train_pretrain", "x070", {}),
    ("train_pretrain", "x060", dict(grad_cp=True)),
    ("train_sft", "x060", dict(tune="lora", lora_extra=("ln",))),
    ("train_sft", "x070", dict(dtype="bfloat16", tune="lora")),
    ("train_state", "x070", dict(eval_off=True, gather="block")),
    ("train_reward", "x070", {}),
    ("train_reward", "x070", dict(tune="head")),
    ("train_dpo", "x070", dict(gather="block")),
    ("train_grpo", "x070", dict(tune="lora", lora_extra=("ln",))),
]
NOT_COMPARED = {"time", "tokens_per_s", "seconds/rollout", "seconds/train"}


def both(base, folder, number, steps):
    """Two runs that differ in `shard` alone, of RUNS."""
    script, version, over = RUNS[number]
    over = {**over, "max_steps": steps, "eval_every": steps // 2}
    if over.get("reward_model"):
        over["reward_model"] = str(base / f"{version}-score.pth")
    file = str(base / ("reward.py" if script == "train_grpo" else "empty.py"))
    wanted = []
    for shard in ("none", "fsdp"):
        cfg = config_of(base, script, version, folder / f"{number}-{shard}", **over, shard=shard)
        wanted.append({"script": script, "config": cfg, "file": file})
    return wanted


def check_equal(folder, number):
    """What both runs logged, and what they made."""
    script, _, over = RUNS[number]
    # bfloat16 has 8 bits, and the two add gradients of it up in another order.
    near = 1e-3 if over.get("dtype") == "bfloat16" else 1e-5
    one, other = folder / f"{number}-none", folder / f"{number}-fsdp"
    for a, b in zip(rows(one), rows(other), strict=True):
        for key in a.keys() - NOT_COMPARED:
            margin = a.get(key.replace("accuracies", "margins"), 1)
            if key.endswith("accuracies") and abs(margin) < 1e-4:
                continue  # of ties, which rounding decides
            if near > 1e-5 and key.endswith("accuracy"):
                continue  # the likeliest of two tokens that are as likely in bfloat16
            if script == "train_grpo" and key.startswith("val_") and a["step"] > 0:
                continue  # sampled from weights that differ by rounding: one token may be another
            assert b[key] == pytest.approx(a[key], rel=near, abs=near), (RUNS[number], key, a)
    (final,) = [file.name for file in one.glob("*-final.*") if file.suffix != ".json"]
    check_weights(one / final, other / final, near)


def check_weights(one, other, near=1e-5):
    a, b = read_weights(one), read_weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=near, rtol=near)


def test_scripts_give_what_ddp_gives(base, tmp_path):
    """Losses, gradient norms, validations and weights to 1e-5."""
    numbers = range(2)
    done = run_all(tmp_path, [one for i in numbers for one in both(base, tmp_path, i, 4)])
    assert done.returncode == 0, done.stderr[-3000:]
    for number in numbers:
        check_equal(tmp_path, number)


@pytest.mark.slow
def test_every_script_gives_what_ddp_gives_for_20_steps(base, tmp_path):
    numbers = range(len(RUNS))
    done = run_all(tmp_path, [one for i in numbers for one in both(base, tmp_path, i, 20)])
    assert done.returncode == 0, done.stderr[-3000:]
    for number in numbers:
        check_equal(tmp_path, number)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_and_back(base, tmp_path):
    """Whole, in shares of 2, of 4, whole in one process, in shares again: as if never stopped."""

    def one(name, **more):
        over = dict(max_steps=12, eval_every=0, val_data="", save_every=0, global_bsz=8)
        cfg = config_of(base, "train_sft", "x070", tmp_path / name, **over, **more)
        return {"script": "train_sft", "config": cfg, "file": str(base / "empty.py")}

    whole = dict(shard="none")
    shares = dict(shard="fsdp", eval_samples=0)
    plan = [
        (2, [one("undisturbed", **whole), {**one("moved", **whole), "stop": 1}]),
        (2, [{**one("moved", **shares, resume=True), "stop": 3}]),
        (4, [{**one("moved", **shares, resume=True), "stop": 5}]),
        (1, [{**one("moved", **shares, resume=True), "stop": 7}]),
        (2, [{**one("moved", **shares, resume=True), "stop": 9}]),
        (2, [one("moved", **whole, resume=True)]),
    ]
    out = tmp_path / "moved"
    for step, (nproc, wanted) in enumerate(plan, 1):
        done = run_all(tmp_path, wanted, nproc)
        assert done.returncode == 0, done.stderr[-3000:]
        last = torch.load(out / "last.pt", weights_only=True)
        previous = torch.load(out / "last.previous.pt", weights_only=True) if step > 1 else {}
        named = {last.get("shares"), previous.get("shares")} - {None}
        assert last["step"] == 2 * step and named == {path.name for path in out.glob("*shares-*")}
        assert bool(last["model"]) == (step in (1, 4, 6))
    for a, b in zip(rows(tmp_path / "undisturbed"), rows(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    check_weights(tmp_path / "undisturbed" / "rwkv-final.pth", out / "rwkv-final.pth")


@pytest.mark.slow
def test_damaged_shares_are_named_and_the_ones_before_go_on(base, tmp_path):
    over = dict(max_steps=2, eval_every=0, val_data="", save_every=1, shard="fsdp")
    cfg = config_of(base, "train_sft", "x070", tmp_path / "run", **over)
    run = {"script": "train_sft", "config": cfg, "file": str(base / "empty.py")}
    done = run_all(tmp_path, [run])
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "run").glob("shares-2/__1_*")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    again = {**run, "config": {**cfg, "resume": True, "max_steps": 3}}
    done = run_all(tmp_path, [again])
    assert done.returncode != 0 and f"{file} is not what was written" in done.stderr
    (tmp_path / "run" / "last.previous.pt").replace(tmp_path / "run" / "last.pt")
    done = run_all(tmp_path, [again])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 1" in done.stdout and rows(tmp_path / "run")[-1]["step"] == 3


LOADING = """
import ctypes, re, sys, threading, time
import torch
import train_sft
from gosling import runs, shard, tune

def private():  # this process's own memory, in bytes
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

def watch():
    while watching:
        peaks.append(private())
        time.sleep(0.002)

ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back to the system
cfg = train_sft.Config(data="-", init_from=sys.argv[1], out_dir=sys.argv[2], shard="fsdp")
with runs.processes(cfg) as run:
    before, peaks, watching = private(), [], True
    thread = threading.Thread(target=watch)
    thread.start()
    model = tune.load_to_tune(cfg, run)
    watching = False
    thread.join()
    mine = sum(shard.local(p).nbytes for p in model.parameters())
    of_all = runs.gather([(max(peaks) - before) / mine])
    if run.rank == 0:
        print("peaks:", *of_all)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_start_takes_no_more_memory_than_the_share(tmp_path):
    """0.4 GB of weights in shares of 4: each process's peak while it loads is 1.3 x its share."""
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 6, 1024, 12288))
    model.save_pretrained(tmp_path / "a.pth", dtype=torch.bfloat16)
    (tmp_path / "load.py").write_text(LOADING)
    done = torchrun(tmp_path / "load.py", tmp_path / "a.pth", tmp_path / "out", nproc=4)
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [float(peak) for peak in re.search("peaks: (.+)", done.stdout)[1].split()]
    assert len(peaks) == 4 and min(peaks) > 1 and max(peaks) < 1.3, peaks
