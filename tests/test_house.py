"""The house stays readable: what ruff does not check about its form."""

import ast

import pytest
from helpers import ROOT

FOLDERS = ("", "gosling", "wkv_cuda", "config", "runs", "bench", "tests", "tests/campaign")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
LONGEST = {"self_reward.py": 800, "train_grpo.py": 700}  # lines; others: 600
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def trees():
    """(path, syntax tree) of every file"""
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in FILES]


def inside(node, kind):
    """Whether a node of this kind lies within another node."""
    return any(isinstance(x, kind) for x in ast.walk(node) if x is not node)


def compressed(tree):
    """What is packed too tightly to be read: (line, what it is)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and inside(node, ast.IfExp):
            found.append((node.lineno, "a conditional expression inside another"))
        if isinstance(node, ast.JoinedStr) and inside(node, ast.IfExp):
            found.append((node.lineno, "a conditional expression inside an f-string"))
        if isinstance(node, COMPREHENSIONS) and inside(node, ast.NamedExpr):
            found.append((node.lineno, "a walrus inside a comprehension"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a lambda that is given a name"))
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Subscript) and isinstance(called.value, ast.Dict):
            found.append((node.lineno, "a dictionary of functions that is called at once"))
    return found


def test_a_reader_meets_one_thing_at_a_time():
    found = [(path.name, *what) for path, tree in trees() for what in compressed(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "a if b else c if d else e",
        "f'{a if b else c}'",
        "[b for a in c if (b := a)]",
        "f = lambda x: x",
        "{'a': f}[b]()",
    ],
)
def test_what_is_packed_would_be_seen(code):
    assert len(compressed(ast.parse(code))) == 1


def without_encoding(tree):
    """Lines that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if name in ("read_text", "write_text") and len(node.args) < 2:
            found.append(node.lineno)
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = node.args[1] if len(node.args) > 1 else ast.Constant("r")
            if not (isinstance(mode, ast.Constant) and "b" in mode.value):
                found.append(node.lineno)
    return found


def test_text_files_are_utf8_in_any_locale():
    found = [
        (str(path.relative_to(ROOT)), line)
        for path, tree in trees()
        if path.parent.name in (ROOT.name, "gosling", "config", "runs")
        for line in without_encoding(tree)
    ]
    assert found == []


@pytest.mark.parametrize("code", ["open(p)", "open(p, 'a')", "p.read_text()", "p.write_text(x)"])
def test_text_of_the_locales_encoding_would_be_seen(code):
    assert without_encoding(ast.parse(code)) == [1]


def test_a_file_is_read_in_a_sitting():
    for path in FILES:
        lines = path.read_text(encoding="utf-8").count("\n")
        if path.parent.name != "tests":
            assert lines <= LONGEST.get(path.name, 600), path


def test_a_function_fits_on_a_screen():
    """70 lines; a script's main, which is read straight down, 220."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and path.parent.name != "tests":
                longest = 220 if node.name == "main" else 70
                assert node.end_lineno - node.lineno < longest, (path, node.name)


def test_no_training_script_imports_another():
    """Data passes between stages as files."""
    scripts = sorted(path.stem for path in ROOT.glob("train_*.py"))
    for script in scripts:
        tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & ({*scripts, "self_reward", "prepare", "sample"} - {script})
