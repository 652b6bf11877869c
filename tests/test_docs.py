"""What README.md shows exists and parses."""

import dataclasses
import importlib
import inspect
import re
import shlex

import pytest

from conftest import ROOT
from runs import demo

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip().split("  #")[0]
    for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if re.match(r"\s*(python|torchrun|bash) ", line)
]
LADDER = [
    shlex.join(["python", *command])
    for version in ("x070", "x060")
    for mode in ("full", "quick")
    for stage in demo.ladder(demo.Config(mode, version))
    for command in stage.commands
]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [*COMMANDS, *dict.fromkeys(LADDER)])
def test_scripts_configs_and_flags_exist(command):
    words = [
        w
        for w in shlex.split(command, comments=True)
        if w not in ("python", "torchrun", "bash", "--", "\\")
    ]
    while words and words[0].startswith("--"):
        words.pop(0)  # torchrun's own flags
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if script.endswith(".sh"):
        return
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    fields = {
        f.name
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and c.__name__.endswith("Config")
        for f in dataclasses.fields(c)
    }
    for word in rest:
        if word.startswith("config/"):
            assert (ROOT / word).is_file(), word
        elif word.startswith("--"):
            assert re.split("=", word[2:])[0] in fields | {"help"}, word


def test_every_python_file_is_in_the_map_of_the_house():
    for path in [*ROOT.glob("*.py"), *(ROOT / "wkv_cuda").glob("*.py")]:
        assert path.name in README or path.parent.name in README, path.name
