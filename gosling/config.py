"""Reading configs: defaults < files, left to right < flags; types and ranges, checked in one place.

A script's config is a dataclass with one field a line, and the comment behind a field is its help
text. Ranges stand in the types, which are pydantic's: `lr: PositiveFloat = 1e-5`. tyro makes the
flags and --help.
"""

import __future__

import dataclasses
import difflib
import functools
import os
import re
import runpy
import signal
import sys
import sysconfig
import traceback
import types
import typing
from pathlib import Path

import pydantic

Decay = typing.Annotated[float, pydantic.Field(ge=0, lt=1)]  # of a running mean
Share = typing.Annotated[float, pydantic.Field(ge=0, le=1)]
Seed = typing.Annotated[int, pydantic.Field(ge=0, lt=2**62)]  # PyTorch takes 64 bits
PRIMITIVES = (int, float, str, bool, type(None))


class UserError(Exception):
    """What the person at the terminal can mend, in one line: what is wrong, what was expected."""


def warn(text):
    """A line on stderr about what works and may not be meant."""
    print(f"warning: {text}", file=sys.stderr)


def print0(*args):
    """Print on rank 0, at once: a log that lags is no log.

    If nobody reads any more (a closed pipe or terminal, a full disk), a signal ends the run, which
    saves first; what is printed from then on goes nowhere.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    try:
        print(*args, flush=True)
    except ValueError:
        if not sys.stdout.closed:
            raise
        sys.stdout = None  # a function of the user's has closed it
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.raise_signal(signal.SIGTERM)


def show(value):
    """A function by its name and what is bound to it, anything else as text.

    The text is the same after a restart: no address in memory is part of it.
    """
    if isinstance(value, (list, tuple)) and any(callable(item) for item in value):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, functools.partial) and not hasattr(value, "__name__"):
        bound = [show_bound(item) for item in value.args]
        bound += [f"{key}={show_bound(item)}" for key, item in value.keywords.items()]
        return f"{show(value.func)}({', '.join(bound)})"
    if type(value).__repr__ is object.__repr__:
        return getattr(value, "__name__", type(value).__name__)
    text = getattr(value, "__name__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
    return " ".join(text.split()) if callable(value) else text  # of a module: many lines


def show_bound(value):
    """What a functools.partial holds: small values as they are, others by their kind."""
    if callable(value):
        return show(value)
    if isinstance(value, PRIMITIVES):
        return repr(value)
    is_list = isinstance(value, (list, tuple)) and all(isinstance(x, PRIMITIVES) for x in value)
    return repr(value) if is_list and len(repr(value)) < 100 else type(value).__name__


def failure(error):
    """An exception of the user's code in a line: its kind, its words, and where it was raised."""
    try:
        words = " ".join(str(error).split())
    except Exception as e:  # it cannot say what it is
        words = f"its text cannot be had, {type(e).__name__}"
    text = f"{type(error).__name__}: {words}"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is our call
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    places = [frame for frame in frames if not frame.filename.startswith(library)]
    return f"{text} ({places[-1].filename}, line {places[-1].lineno})" if places else text


def config_dict(cfg):
    """cfg as primitives, for config.json and the loggers; functions are shown by their names."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {key: v if isinstance(v, PRIMITIVES) else show(v) for key, v in values.items()}


def load_config(cls, argv=None):
    """Read `[file.py ...] [--key=value ...]` into the dataclass `cls`.

    A file is plain Python assignments. An unknown key is an error with a suggestion, a wrong type
    or range an error that names key, value and what was expected. Flags may be `--key=value`,
    `--key value` and, for booleans, `--key` alone; `--help` shows every field with its comment.
    A file after a flag is an error, because the flag would not win over it.
    """
    sys.excepthook = one_line_errors
    argv = list(sys.argv[1:] if argv is None else argv)
    n_files = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    from_files = {}
    for path in argv[:n_files]:
        from_files.update(read_config_file(path, cls))
    before = cls(**from_files)
    cfg = read_flags(cls, argv[n_files:], default=before)
    print0("config: " + " ".join(argv or ["defaults"]))
    for key in ("stop", "judge_template", "judge_cue"):
        value = getattr(cfg, key, "")
        if value != getattr(before, key, "") and "\\n" in "".join(value):
            print0(f"--{key}: \\n is a backslash and an n; in a config file it is a line end")
    return cfg


def read_flags(cls, args=None, default=None):
    """`--key=value` flags (and positional fields, where there are any) into the dataclass `cls`."""
    import tyro

    sys.excepthook = one_line_errors
    if hasattr(sys.stdout, "reconfigure"):  # whatever the locale; half a character as an escape
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    cfg = tyro.cli(
        cls,
        default=default,
        args=spell_out_booleans(sys.argv[1:] if args is None else args, cls),
        description=sys.modules[cls.__module__].__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    check(cfg)
    return cfg


def read_config_file(path, cls):
    """{key: value} of a config file, every key and value checked against the dataclass `cls`.

    It imports what lies beside it. Functions, classes and constants in capitals may be its own.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    values, found = {}, run_config_file(path)
    for key, value in found.items():
        if key.startswith("_") or isinstance(value, (types.ModuleType, __future__._Feature)):
            continue
        if key in fields:
            values[key] = value
            continue
        # What may be the config's own is an error only if it is a likely typo.
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.8 if callable(value) else 0.6)
        if key.isupper():
            near = [key.lower()] if fields - found.keys() >= {key.lower()} else []
        if near or not (callable(value) or key.isupper()):
            script = Path(sys.modules[cls.__module__].__file__ or cls.__name__).name
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{path}: unknown key '{key}'{hint} ({script} --help lists all)")
    check(cls(**values), f"{path}: ")
    return values


def run_config_file(path):
    """-> {name: value} that the file leaves"""
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise UserError(f"config file {path} does not run: {failure(e)}") from e
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)  # its functions may import later, after everything of ours


def check(cfg, where=""):
    """UserError for the first field whose value is not of its declared type or in its range.

    A number of numpy's becomes one of Python's.
    """
    for key, validator in validators(type(cfg)).items():
        value = getattr(cfg, key)
        try:
            valid = validator.validate_python(value)
            if isinstance(valid, PRIMITIVES):
                setattr(cfg, key, valid)
        except pydantic.ValidationError as e:
            expected = e.errors()[0]["msg"].replace("Input should be", "expected")
            expected = expected.replace("expected greater", "expected a number greater")
            expected = expected.replace("expected less", "expected a number less")
            shown = repr(value) if isinstance(value, str) else show(value)
            raise UserError(f"{where}{key}={shown}: {expected}") from None


@functools.cache
def validators(cls):
    """{field: what checks its values} of a dataclass"""
    strict = pydantic.ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: pydantic.TypeAdapter(hints[name], config=strict) for name in names}


def spell_out_booleans(args, cls):
    """`--resume` -> `--resume True`, `--resume=false` -> `--resume False`: what tyro reads."""
    hints = typing.get_type_hints(cls).items()
    booleans = {key for key, hint in hints if bool in (hint, *typing.get_args(hint))}
    words = {"true": "True", "false": "False", "1": "True", "0": "False", "auto": "auto"}
    spelled, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or key[2:].replace("-", "_") not in booleans:
            spelled.append(word)
            continue
        if not equals and rest and rest[0].lower() in words:
            value = rest.pop(0)
        spelled += [key, words.get(value.lower(), value or "True")]
    return spelled


def one_line_errors(kind, error, traceback):
    """sys.excepthook: a UserError is one line on stderr; anything else keeps its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    elif issubclass(kind, BrokenPipeError):  # what reads our output, as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    else:
        sys.__excepthook__(kind, error, traceback)
