"""Reading configs: order, flags, types, ranges, and that every script's fields mean the same."""

import functools
import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gosling import config, runs
from gosling.config import UserError, load_config

import pydantic
import pytest
import torch
from helpers import ROOT
from pydantic import NonNegativeInt, PositiveFloat

SCRIPTS = (*sorted(path.stem for path in ROOT.glob("train_*.py")), "self_reward")


@dataclass
class Config:
    """a test"""

    lr: PositiveFloat = 1e-3  # a rate
    max_steps: NonNegativeInt | None = None  # steps
    resume: bool = False  # go on
    name: str = ""  # text
    dtype: Literal["auto", "float32"] = "auto"  # a choice
    device: str = "cpu"  # a device
    seed: int = 0  # a seed


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
    "flags, resume, name",
    [
        (["--resume"], True, ""),
        (["--resume=true"], True, ""),
        (["--resume=False"], False, ""),
        (["--resume", "false"], False, ""),
        (["--resume", "--name=x"], True, "x"),
        (["--name=a=b"], False, "a=b"),
    ],
)
def test_flags(flags, resume, name, tmp_path):
    cfg = load(tmp_path, *flags)
    assert (cfg.resume, cfg.name) == (resume, name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_stesp = 3", "a.py: unknown key 'max_stesp'; did you mean 'max_steps'"),
        ("def resum(): pass", "a.py: unknown key 'resum'; did you mean 'resume'"),
        ("max_steps = 1e3", "a.py: max_steps=1000.0: expected a valid integer"),
        ("max_steps = '64'", "a.py: max_steps='64': expected a valid integer"),
        ("max_steps = -1", "a.py: max_steps=-1: expected a number greater than or equal to 0"),
        ("lr = '1e-3'", "a.py: lr='1e-3': expected a valid number"),
        ("lr = 0", "a.py: lr=0: expected a number greater than 0"),
        ("lr = float('nan')", "a.py: lr=nan: expected a"),
        ("lr = float('inf')", "a.py: lr=inf: expected a finite number"),
        ("resume = 1", "a.py: resume=1: expected a valid boolean"),
        ("dtype = 'fp8'", "a.py: dtype='fp8': expected 'auto' or 'float32'"),
        ("1 / 0", r"a.py does not run: ZeroDivisionError: division by zero \(.*a.py, line 1\)"),
        ("import os\nname = os.environ['NO_SUCH']", "a.py does not run: KeyError: .*a.py, line 2"),
        ("name = open('missing.json').read()", "a.py does not run: FileNotFoundError"),
        ("lr = float('1e-4x')", "a.py does not run: ValueError: .*a.py, line 1"),
        ("raise SystemExit('a config')", "a.py does not run: SystemExit: a config"),
        ("import beside_not", "a.py does not run: ModuleNotFoundError: No module named 'beside_n"),
        ("LR = 1e-4", "a.py: unknown key 'LR'; did you mean 'lr'"),
        ("note = 'mine'", "a.py: unknown key 'note'"),
    ],
)
def test_files_are_checked(text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load(tmp_path, a=text)


def test_a_config_imports_what_lies_beside_it_and_has_constants(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "beside_rewards.py").write_text("def name(): return 'beside'")
    (tmp_path / "beside_later.py").write_text("WORD = 'later'")
    text = """
from beside_rewards import name as make_name
from pathlib import Path
OUT = Path("out")
LR = 2
lr = LR * 1.0
name = make_name() + str(OUT)
def call():
    import beside_later
    return beside_later.WORD
"""
    assert load(tmp_path, a=text) == Config(lr=2.0, name="besideout")
    found = config.run_config_file(tmp_path / "a.py")
    assert found["call"]() == "later"
    assert sys.path[0] != str(tmp_path)


def test_a_function_is_shown_alike_in_every_process():
    def scored(prompts, completions, scale, table=()):
        return []

    class Reward:
        def __call__(self):
            return []

    bound = functools.partial(scored, scale=2.0, table=Reward())
    assert config.show(bound) == "scored(scale=2.0, table=Reward)"
    assert config.show(Reward()) == config.show(Reward()) == "Reward"
    assert config.show([scored, bound]) == "[scored, scored(scale=2.0, table=Reward)]"
    bound.__name__ = "mine"
    assert config.show(bound) == "mine" and config.show((1, 2)) == "(1, 2)"


@dataclass
class WithAFunction:
    function: object
    other: object = None

    def __call__(self):
        return []


def of_two_lines():
    return torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())


@pytest.mark.parametrize(
    "value, text",
    [
        (
            WithAFunction(of_two_lines),
            "WithAFunction(function=<function of_two_lines>, other=None)",
        ),
        (functools.partial(of_two_lines, words=["a", 1]), "of_two_lines(words=['a', 1])"),
        (functools.partial(of_two_lines, words=["a"] * 99), "of_two_lines(words=list)"),
        (functools.partial(of_two_lines, words=[of_two_lines]), "of_two_lines(words=list)"),
        (of_two_lines(), "Sequential( (0): ReLU() (1): ReLU() )"),
    ],
    ids=["a dataclass with a function", "a list", "a long list", "functions", "a module"],
)
def test_no_address_and_no_line_end_is_in_what_stands_for_a_function(value, text):
    assert config.show(value) == text


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("first\n  second\r\n\nthird"), "ValueError: first second third"),
        (Speechless(), "Speechless: its text cannot be had, RuntimeError"),
        (SystemExit("bye\nbye"), "SystemExit: bye bye"),
    ],
    ids=["several lines", "an error whose text cannot be had", "sys.exit with lines"],
)
def test_an_error_of_the_users_code_is_one_line_whatever_it_says(error, words, capsys):
    assert config.failure(error) == words
    config.one_line_errors(UserError, UserError(f"reward failed: {words}\nmore"), None)
    assert capsys.readouterr().err == f"error: reward failed: {words} more\n"


def test_a_config_may_begin_with_a_future_import(tmp_path):
    assert load(tmp_path, a="from __future__ import annotations\nlr: float = 2.0").lr == 2.0


@dataclass
class WithTexts(Config):
    stop: tuple[str, ...] = ("\n\nUser:",)  # texts that end
    judge_cue: str = ""  # a text


def test_a_line_end_that_a_shell_left_as_two_letters_is_said(capsys):
    """Of flags alone: in a file Python has made it a line end."""
    load_config(WithTexts, ["--judge_cue=a\\nb", "--stop", "x", "\\n"])
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        f"--{key}: \\n is a backslash and an n; in a config file it is a line end"
        for key in ("stop", "judge_cue")
    ]
    load_config(WithTexts, ["--lr=1"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_number_of_numpys_becomes_one_of_pythons(tmp_path):
    """In the optimiser it would go to last.pt, which then could not be read."""
    cfg = load(tmp_path, a="import numpy as np\nlr = np.float32(0.5)\nname = np.str_('x')")
    assert cfg == Config(lr=0.5, name="x") and type(cfg.lr) is float and type(cfg.name) is str


def test_ranges_hold_for_flags_and_for_a_config_made_in_python(tmp_path):
    with pytest.raises(UserError, match="lr=-1.0: expected a number greater than 0"):
        load(tmp_path, "--lr=-1")
    with pytest.raises(UserError, match="lr=nan"), runs.processes(Config(lr=float("nan"))):
        pass


FLAGS_OF = {
    **dict.fromkeys(SCRIPTS, "Config"),
    "sample": "BatchConfig",
    "eval": "Config",
    "prepare": "Config",
    "tasks": "Config",
    "export": "MergeConfig",
}


@pytest.mark.parametrize("script", FLAGS_OF)
def test_every_number_has_its_range(script):
    """None takes NaN or infinity, and those alone go below zero that have a largest size, too."""
    cls = getattr(importlib.import_module(script), FLAGS_OF[script])
    for name, validator in config.validators(cls).items():

        def takes(value, validator=validator):
            try:
                return validator.validate_python(value) is not None
            except pydantic.ValidationError:
                return False

        assert not takes(float("nan")) and not takes(float("inf")), name
        assert not takes(-1) or not takes(-1e300), name
        assert name != "seed" or (takes(2**61) and (script == "sample" or not takes(2**63)))


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
        is_script = (ROOT / f"{name}.py").exists()
        script = importlib.import_module(name if is_script else f"train_{name}")
        load_config(script.Config, [str(path)])


def fields_of(script):
    """{field: comment} of a script's Config, read from its source."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    body = source.split("class Config:\n")[1].split("\n\n\n")[0]
    lines = [line for line in body.splitlines() if re.match(r"    \w+: ", line)]
    fields = {}
    for line in lines:
        name, comment = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line).groups()
        fields[name] = comment
    return fields


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_stands_in_the_script_with_its_comment(script):
    fields = fields_of(script)
    declared = importlib.import_module(script).Config.__dataclass_fields__
    assert set(fields) == set(declared) and all(fields.values())


def test_a_field_of_one_name_has_one_meaning_everywhere():
    """The comment is the manual: what is special about a script stands in its docstring."""
    meanings = {}
    for script in SCRIPTS:
        for name, comment in fields_of(script).items():
            meanings.setdefault(name, {}).setdefault(comment, []).append(script)
    several = {name: by_comment for name, by_comment in meanings.items() if len(by_comment) > 1}
    assert not several


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_read(script):
    """A field that nothing reads is a lie: it is named as an attribute, or through its prefix."""
    sources = [ROOT / f"{script}.py", *(ROOT / "gosling").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in fields_of(script):
        by_prefix = name.startswith("lora_") and 'startswith("lora_")' in text
        assert by_prefix or re.search(rf"\.{name}\b|\"{name}\"", text), name


def test_nothing_is_built_or_loaded_at_import():
    """Importing the scripts touches neither compiler nor process group nor optional packages."""
    unwanted = ("wandb", "matplotlib", "torch.utils.cpp_extension")
    code = f"import train_pretrain, sample, sys; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr or done.stdout


SMALL = ["--data=DATA", "--ctx_len=4", "--micro_bsz=1", "--global_bsz=1", "--device=cpu"]
NETWORK = ["--n_layer=1", "--n_embd=64"]


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("train_pretrain.py", ["--data=DATA", "--ctx_len=0"], "ctx_len=0: expected"),
        ("train_pretrain.py", ["--n_layer=0", *SMALL], "n_layer=0: expected"),
        ("train_pretrain.py", ["--n_embd=100", *SMALL], "n_embd=100 is not a multiple"),
        ("train_pretrain.py", ["broken.py"], "broken.py does not run: SyntaxError"),
        (
            "train_pretrain.py",
            [*SMALL, *NETWORK, "--out_dir=/proc/none"],
            "out_dir=/proc/none cannot be made",
        ),
        (
            "train_pretrain.py",
            [*SMALL, *NETWORK, "--out_dir=new", "--resume"],
            "nothing to resume",
        ),
        ("sample.py", ["--model=."], "is a folder"),
    ],
)
def test_a_mistake_at_the_terminal_is_one_line(script, flags, words, tmp_path):
    (tmp_path / "broken.py").write_text("lr = = 3\n")
    (tmp_path / "t.txt").write_text("some words to train on, and some more\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    run(ROOT / "prepare.py", "t.txt", "--out=t", "--tokenizer=bytes").check_returncode()
    done = run(ROOT / script, *(flag.replace("DATA", "t_train") for flag in flags))
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_the_comment_is_the_help(capsys):
    with pytest.raises(SystemExit):
        config.read_flags(Config, ["--help"])
    assert "a rate" in capsys.readouterr().out


def test_no_script_writes_outside_of_its_folder():
    """Every default out_dir lies in out/, which git ignores."""
    for script in SCRIPTS:
        assert Path(importlib.import_module(script).Config().out_dir).parts[0] == "out"


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A package of that name, which is found first, stands for the seconds of its import."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise KeyboardInterrupt\n")
    for script in (*SCRIPTS, "sample", "prepare", "export", "eval"):
        command = [sys.executable, f"{script}.py", "--help"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (script, done.stderr) == (script, "interrupted\n")
        assert done.returncode == -signal.SIGINT


def test_a_reader_that_has_enough_of_the_help():
    command = f"{sys.executable} train_sft.py --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage") and done.stderr == ""
