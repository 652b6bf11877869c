"""What README.md and docs/ show exists and parses."""

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap

from runs import demo

import pytest
from helpers import PAGES, ROOT, blocks_of, commands_of, page_name, readme

METHODS = [page for page in PAGES if page.parent.name == "methods"]
COMMANDS = [command for page in PAGES for command in commands_of(page)]

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
    sys.path.append(str(ROOT / "bench"))  # for what they import of each other
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
    assert len(commands_of(PAGES[0])) >= 8


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *LADDER]))
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


# ----------------------------------------------------------------------------------------------
# the pages of the methods, and changes to the scripts that a page shows


def has_lines(text, quote):
    """Whether the quote's lines stand in the text one after the other, at whatever indentation."""
    lines, quoted = text.splitlines(), textwrap.dedent(quote).splitlines()
    for i in range(len(lines) - len(quoted) + 1):
        if textwrap.dedent("\n".join(lines[i : i + len(quoted)])).splitlines() == quoted:
            return True
    return False


def quotes_of(page):
    """[(file's name, lines quoted from it)] of the blocks that begin with `# FILE.py`."""
    found = []
    for block in blocks_of(page, "python"):
        first, _, rest = block.partition("\n")
        if re.fullmatch(r"# [\w/]+\.py", first):
            found.append((first[2:], rest))
    return found


def test_every_method_has_a_page_that_quotes_its_script():
    scripts = [path.name for path in ROOT.glob("train_*.py")] + ["self_reward.py"]
    quoted = {page.stem: {name for name, _ in quotes_of(page)} for page in METHODS}
    for script in scripts:
        method = script.removeprefix("train_").removesuffix(".py")
        assert script in quoted[method], script


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_a_page_quotes_stands_in_the_file(page):
    for name, quote in quotes_of(page):
        assert quote.strip(), f"{page}: an empty quote of {name}"
        assert has_lines((ROOT / name).read_text(encoding="utf-8"), quote), f"{name}:\n{quote}"


def test_a_quote_that_is_not_word_for_word_would_be_seen():
    text = "def f():\n    a = 1\n    if a:\n        b = 2\n"
    assert has_lines(text, "a = 1\nif a:\n    b = 2\n")
    for quote in ("a = 1\nif a:\nb = 2\n", "a = 1\n    b = 2\n", "a = 1 \n", "a = 1\n\nif a:\n"):
        assert not has_lines(text, quote)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_change_that_a_page_shows_applies(page):
    for diff in blocks_of(page, "diff"):
        git = ["git", "apply", "--check", "-"]
        done = subprocess.run(git, cwd=ROOT, input=diff, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{diff}"


def made_by_the_demo():
    """The folders of out/demo: one for each stage of the ladder."""
    return {stage.name for stage in demo.ladder(demo.Config())}


@pytest.mark.parametrize("page", METHODS, ids=page_name)
def test_a_page_starts_from_what_the_demo_leaves(page):
    """A run writes to a folder of its own, and what it reads of out/demo is there."""
    commands = commands_of(page)
    assert commands
    for command in commands:
        assert not re.search(r"out\w*=out/demo", command), command
        assert set(re.findall(r"out/demo/(\w+)", command)) <= made_by_the_demo(), command


@pytest.mark.parametrize("page", METHODS, ids=page_name)
def test_a_page_fits_a_narrow_window(page):
    """No line has more than 100 columns of text, no table more than five."""
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 100, line
        assert not line.startswith("|") or line.count(" | ") < 5, line


# ----------------------------------------------------------------------------------------------
# docs/files.md: the engines


def engines():
    """[cells of a row] of the table of engines."""
    page = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    head = "| engine | command of `export.py` | compared | figure | test |\n|---|---|---|---|---|\n"
    table = page.split(head)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def names_in(name):
    """The names of the tests in tests/test_NAME.py."""
    path = ROOT / f"tests/test_{name}.py"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return re.findall(r"^def (test_\w+)", text, re.M)


@pytest.mark.parametrize("row", engines(), ids=lambda row: row[0])
def test_every_engine_has_a_test(row):
    *_, test = row
    name, word = re.fullmatch(r"`(\w+): (\w+)`", test).groups()
    assert any(word in function for function in names_in(name)), test


def test_a_missing_test_of_an_engine_would_be_seen():
    assert len(engines()) > 12 and all(len(row) == 5 for row in engines())
    assert names_in("hubb") == [] and "test_a_folder_of_rwkv_6" in names_in("hub")


# ----------------------------------------------------------------------------------------------
# README's map, and links


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


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target.split("#")[0]
        drawn_later = path.parent.name == "pictures" and not path.parent.exists()
        assert target.startswith("https://") or path.exists() or drawn_later, target
