"""What README.md and docs/ show exists and parses."""

import dataclasses
import importlib
import inspect
import re
import shlex

from runs import demo

import pytest
from helpers import ROOT, readme, readme_commands

LADDER = [
    shlex.join(["python", *command])
    for version in ("x070", "x060")
    for mode in ("full", "quick")
    for stage in demo.ladder(demo.Config(mode, version))
    for command in stage.commands
]


def wrong_word(command):
    """The first word of a command line that names no script, config or flag of ours; None."""
    words = shlex.split(command, comments=True)
    words = [word for word in words if word not in ("python", "torchrun", "bash", "--", "\\")]
    while words and words[0].startswith("--"):
        words.pop(0)  # torchrun's own flags
    script, *rest = words
    if not (ROOT / script).is_file():
        return script
    if script.endswith(".sh"):
        return None
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    fields = {"help"}
    for config in vars(module).values():
        if inspect.isclass(config) and config.__name__.endswith("Config"):
            fields |= {field.name.rstrip("_") for field in dataclasses.fields(config)}
    for word in rest:
        if word.startswith("config/") and not (ROOT / word).is_file():
            return word
        if word.startswith("--") and word[2:].split("=")[0] not in fields:
            return word
    return None


def test_there_are_commands():
    assert len(readme_commands()) >= 8


@pytest.mark.parametrize("command", dict.fromkeys([*readme_commands(), *LADDER]))
def test_scripts_configs_and_flags_exist(command):
    assert wrong_word(command) is None


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("python train_sft.py config/sft_tiny.py --lr=1", None),
        ("python train_ssft.py", "train_ssft.py"),
        ("python train_sft.py config/sft_tinny.py", "config/sft_tinny.py"),
        ("python train_sft.py --lrr=1", "--lrr=1"),
        ("torchrun --nproc_per_node=8 -- train_sft.py --num_generations=4", "--num_generations=4"),
    ],
)
def test_a_wrong_command_would_be_seen(command, wrong):
    assert wrong_word(command) == wrong


def map_of_the_house():
    """The rows of README's table of files: {words in the first two columns of backticks}."""
    table = readme().split("| file | what |")[1].split("\n\n")[0]
    return set(re.findall(r"[\w./]+", table))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_every_script_is_in_the_map_of_the_house(path):
    assert path.name in map_of_the_house()


@pytest.mark.parametrize("folder", ["gosling", "wkv_cuda"])
def test_every_module_is_in_the_map_of_the_house(folder):
    known = {word.removesuffix(".py") for word in map_of_the_house()}
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "native"}
    assert modules <= known


def test_every_link_in_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", readme()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
