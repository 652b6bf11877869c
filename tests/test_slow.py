"""Slow proofs, `runs/test.sh slow`: the demo's number, both versions, integer data, and a run
killed again and again."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from model import RWKV

import numpy as np
import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.slow


def python(*words, threads=2, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "stdlib"
    python("prepare.py", "stdlib", f"--out={prefix}", "--tokenizer=bpe:2048", "--val=0.04")
    return prefix


def tiny(prefix, out, *flags):
    return python(
        "train_pretrain.py",
        "config/pretrain_tiny.py",
        f"--data={prefix}_train",
        f"--val_data={prefix}_val",
        f"--out_dir={out}",
        "--device=cpu",
        *flags,
    )


def last_row(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_small_run_reaches_its_number(stdlib, tmp_path):
    """bits per byte of config/pretrain_tiny.py; the standard library differs a little between
    Python versions."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    said = float(re.search(r"([\d.]+) bits a byte", page)[1])
    out = tiny(stdlib, tmp_path / "run")
    got = last_row(tmp_path / "run")["val_bpb"]
    print(got, said)
    assert abs(got - said) < 0.08, (got, said)
    assert (
        "xz -9 on the same held-out files" in out
        and (tmp_path / "run/metrics.png").stat().st_size > 5000
    )
    text = python(
        "sample.py",
        f"--model={tmp_path / 'run/rwkv-final.pth'}",
        "--prompt=import ",
        "--seed=1",
        "--max_new_tokens=60",
        "--temperature=0.7",
        "--device=cpu",
    )
    assert text.startswith("import ") and len(text) > 60


def test_version_6_learns_too(stdlib, tmp_path):
    tiny(stdlib, tmp_path / "run", "--version=x060", "--max_steps=120", "--eval_windows=32")
    row = last_row(tmp_path / "run")
    assert row["loss"] < 5.0 and row["val_loss"] < 5.4, row  # ln 2048 = 7.6 at the start


def test_integer_series(tmp_path):
    """Angles 0..359 that turn by a constant step: all but the first two of a document can be known
    exactly."""
    rng = np.random.default_rng(0)
    start, turn = rng.integers(0, 360, (2000, 1)), rng.integers(1, 8, (2000, 1))
    np.save(tmp_path / "angles.npy", (start + turn * np.arange(63)) % 360)
    python(
        "prepare.py",
        tmp_path / "angles.npy",
        f"--out={tmp_path / 'angles'}",
        "--tokenizer=integers:359",
        "--val=0.05",
    )
    tiny(tmp_path / "angles", tmp_path / "run", "--max_steps=400")
    # a perfect model pays ln 360 + ln 7 for the first two of every 64 tokens, and at worst a little
    # for the rest
    best = (np.log(360) + np.log(7)) / 64
    got = last_row(tmp_path / "run")["val_loss"]
    assert best * 0.9 < got < 3 * best, (got, best)


def test_killed_at_random_moments_it_still_ends_where_it_would(stdlib, tmp_path):
    """SIGKILL at ten random moments, each time on from last.pt: every checkpoint is whole, the end
    is bit for bit."""
    flags = [
        "config/pretrain_tiny.py",
        f"--data={stdlib}_train",
        "--val_data=",
        "--max_steps=60",
        "--save_every=3",
        "--keep_last=2",
        "--log_every=1",
        "--device=cpu",
        "--n_layer=2",
        "--n_embd=64",
        "--ctx_len=64",
    ]
    python("train_pretrain.py", *flags, f"--out_dir={tmp_path / 'whole'}", threads=1)
    rng, out, kills = random.Random(0), tmp_path / "parts", 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    while True:
        resume = ["--resume"] if (out / "last.pt").exists() else []
        p = subprocess.Popen(
            [sys.executable, "train_pretrain.py", *flags, f"--out_dir={out}", *resume],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < 10:
            time.sleep(rng.uniform(1.5, 5.0))
            p.send_signal(signal.SIGKILL)
            kills += 1
        output, errors = p.communicate(timeout=300)
        if p.returncode == 0:
            break
        assert p.returncode == -signal.SIGKILL, errors
        if (out / "last.pt").exists():
            torch.load(out / "last.pt", weights_only=True)
            for path in out.glob("*.pth"):
                RWKV.from_pretrained(path)
    assert kills == 10 or "already at step" in output or "done in" in output
    a, b = (
        torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True)
        for name in ("whole", "parts")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """The C++ for the CPU under the address and undefined-behaviour sanitizers, with all tests that
    call it."""
    cxx, library = os.environ.get("CXX", "c++"), {}
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        library[name] = subprocess.run(
            [*cxx.split(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(library[name]):
            pytest.skip(f"{cxx} has no {name}")
    env = {
        **os.environ,
        "CXX": f"{cxx} -fsanitize=address,undefined -fno-sanitize-recover=all",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "LD_PRELOAD": " ".join(library.values()),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-s",
            "-k",
            "cpp or cpu or one_call",
            "tests/test_wkv.py",
            "tests/test_model.py",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert (
        done.returncode == 0
        and " passed" in said
        and "Sanitizer" not in said
        and "runtime error" not in said
    ), said[-3000:]
    assert list(tmp_path.glob("*.so"))
