"""Config reading and atomic files."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import common
from common import UserError, load_config
from conftest import ROOT


@dataclass
class Config:
    """a test"""

    lr: float = 1e-3  # a rate
    max_steps: int | None = None  # steps
    resume: bool = False  # go on
    name: str = ""  # text
    dtype: Literal["auto", "float32"] = "auto"  # a choice


def load(tmp_path, *argv, **files):
    paths = []
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        paths.append(str(tmp_path / f"{name}.py"))
    return load_config(Config, [*paths, *argv])


def test_order_is_defaults_files_flags(tmp_path):
    cfg = load(
        tmp_path,
        "--lr=3",
        a="lr = 1\nmax_steps = 10_000\nname = 'a'",
        b="import os\n_x = 2\nname = 'b' * _x\ndef helper(): pass",
    )
    assert cfg == Config(lr=3, max_steps=10000, name="bb")


@pytest.mark.parametrize(
    "flags, want",
    [
        (["--resume"], True),
        (["--resume=true"], True),
        (["--resume=False"], False),
        (["--resume", "false"], False),
        (["--resume", "--name=x"], True),
        (["--name=a=b"], False),
    ],
)
def test_flags(flags, want, tmp_path):
    cfg = load(tmp_path, *flags)
    assert cfg.resume is want and cfg.name == {"--name=x": "x", "--name=a=b": "a=b"}.get(
        flags[-1], ""
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_stesp = 3", "a.py: unknown key 'max_stesp'; did you mean 'max_steps'"),
        ("max_steps = 1e3", r"a.py: max_steps expects int \| None, got 1000.0 \(float\)"),
        ("max_steps = '64'", "max_steps expects int"),
        ("lr = '1e-3'", "lr expects float, got '1e-3'"),
        ("resume = 1", "resume expects bool, got 1"),
        ("dtype = 'fp8'", "dtype expects Literal"),
        ("def resum(): pass", "unknown key 'resum'; did you mean 'resume'"),
    ],
)
def test_files_are_checked(text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load(tmp_path, a=text)


def test_bad_flags_and_missing_files(tmp_path, capsys):
    for argv in (["--lrr=1"], ["--max_steps=1e3"], ["--dtype=fp8"], ["--lr=1", "late.py"]):
        with pytest.raises(SystemExit) as e:
            load(tmp_path, *argv)
        assert e.value.code != 0
    with pytest.raises(UserError, match="nowhere.py does not exist"):
        load_config(Config, ["nowhere.py"])


def test_every_config_fits_its_script():
    configs = sorted(path for path in (ROOT / "config").glob("*.py") if path.stem != "rewards")
    assert configs
    for path in configs:
        name = path.stem.rsplit("_", 1)[0]
        script = importlib.import_module(
            name if (ROOT / f"{name}.py").exists() else f"train_{name}"
        )
        load_config(script.Config, [str(path)])


def test_atomic_write_keeps_the_old_file_on_any_failure(tmp_path):
    path = tmp_path / "x" / "f"
    with common.atomic_write(path) as tmp:
        tmp.write_text("old")
        tmp.chmod(0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ZeroDivisionError):
        with common.atomic_write(path) as tmp:
            tmp.write_text("half")
            1 / 0
    assert path.read_text() == "old" and [f.name for f in path.parent.iterdir()] == ["f"]
    with pytest.raises(UserError, match="cannot write .*f/g: "):
        with common.atomic_write(path / "g") as tmp:
            tmp.write_text("under a file")


def test_prune_keeps_the_newest_by_number(tmp_path):
    for n in (5, 10, 9, 100):
        (tmp_path / f"rwkv-{n}.pth").touch()
    (tmp_path / "rwkv-final.pth").touch()
    common.prune(tmp_path / "rwkv-100.pth", 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "rwkv-10.pth",
        "rwkv-100.pth",
        "rwkv-final.pth",
    ]


def test_metrics_go_to_the_asked_logger_and_a_resumed_run_drops_lost_lines(tmp_path, monkeypatch):
    logged = []
    fake = type(sys)("wandb")
    fake.init = lambda **kw: (
        logged.append(kw["config"]["lr"]),
        type("Run", (), {"log": lambda self, row, step: logged.append((step, row))})(),
    )[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)

    @dataclass
    class Cfg:
        out_dir: str = str(tmp_path)
        log: str = "wandb"
        lr: float = 0.5

    run = common.Run(0, 1, torch.device("cpu"), torch.float32)
    metrics = common.Metrics(Cfg(), run)
    for step in (1, 2, 3):
        metrics.log(step, loss=1.0 / step)
    assert logged == [0.5, (1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # a kill in the middle of a line
    metrics = common.Metrics(Cfg(log="none"), run, from_step=2)
    metrics.log(3, loss=0.25)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    metrics.plot("loss", "val_loss")
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_of_pickled_classes_is_refused(tmp_path):
    torch.save({"cfg": Config()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt cannot be read"):
        common.load_torch(tmp_path / "x.pt")


def test_nothing_is_built_or_loaded_at_import():
    """Importing the scripts touches neither compiler nor process group nor optional packages."""
    import subprocess

    code = "import train_pretrain, sample, sys; print([m for m in ('wandb', 'matplotlib', 'torch.utils.cpp_extension') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr or done.stdout


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("train_pretrain.py", ["--data=DATA", "--ctx_len=0"], "ctx_len=0: expected"),
        ("train_pretrain.py", ["--data=DATA", "--n_layer=0", "--ctx_len=4"], "n_layer=0: expected"),
        ("train_pretrain.py", ["broken.py"], "broken.py does not run: SyntaxError"),
        (
            "train_pretrain.py",
            [
                "--data=DATA",
                "--ctx_len=4",
                "--micro_bsz=1",
                "--global_bsz=1",
                "--n_layer=1",
                "--n_embd=64",
                "--out_dir=/proc/none",
                "--device=cpu",
            ],
            "out_dir=/proc/none cannot be made",
        ),
        (
            "train_pretrain.py",
            [
                "--data=DATA",
                "--ctx_len=4",
                "--micro_bsz=1",
                "--global_bsz=1",
                "--n_layer=1",
                "--n_embd=64",
                "--out_dir=new",
                "--resume",
                "--device=cpu",
            ],
            "nothing to resume",
        ),
        ("sample.py", ["--model=."], "is a folder; give a file in it"),
    ],
)
def test_a_mistake_at_the_terminal_is_one_line(script, flags, words, tmp_path):
    (tmp_path / "broken.py").write_text("lr = = 3\n")
    (tmp_path / "t.txt").write_text("some words to train on, and some more\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, ROOT / "prepare.py", "t.txt", "--out=t", "--tokenizer=bytes"],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, ROOT / script, *(f.replace("DATA", "t_train") for f in flags)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and words in done.stderr
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    ), done.stderr
