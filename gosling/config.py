"""Reading configs: defaults < files, left to right < flags; types and ranges, checked in one place.

A script's config is a dataclass with one field a line, and the comment behind a field is its help
text. Ranges stand in the types, which are pydantic's: `lr: PositiveFloat = 1e-5`. tyro makes the
flags and --help.
"""

import dataclasses
import difflib
import functools
import os
import runpy
import sys
import types
import typing
from pathlib import Path

import pydantic

Decay = typing.Annotated[float, pydantic.Field(ge=0, lt=1)]  # of a running mean
Share = typing.Annotated[float, pydantic.Field(ge=0, le=1)]


class UserError(Exception):
    """What the person at the terminal can mend, in one line: what is wrong, what was expected."""


def print0(*args):
    """Print on rank 0, at once: a log that lags is no log."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def show(value):
    """A function by its name, anything else as text."""
    return getattr(value, "__name__", None) or str(value)


def config_dict(cfg):
    """cfg as primitives, for config.json and the loggers; functions are shown by their names."""
    primitives = (int, float, str, bool, type(None))
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {key: v if isinstance(v, primitives) else show(v) for key, v in values.items()}


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
    cfg = read_flags(cls, argv[n_files:], default=cls(**from_files))
    print0("config: " + " ".join(argv or ["defaults"]))
    return cfg


def read_flags(cls, args=None, default=None):
    """`--key=value` flags (and positional fields, where there are any) into the dataclass `cls`."""
    import tyro

    sys.excepthook = one_line_errors
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
    """{key: value} of a config file, every key and value checked against the dataclass `cls`."""
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        found = runpy.run_path(str(path))
    except Exception as e:
        raise UserError(f"config file {path} does not run: {type(e).__name__}: {e}") from e
    fields = {field.name for field in dataclasses.fields(cls)}
    values = {}
    for key, value in found.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if key in fields:
            values[key] = value
            continue
        # Functions and classes may be helpers of the config's own; only a likely typo is an error.
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.8 if callable(value) else 0.6)
        if near or not callable(value):
            script = Path(sys.modules[cls.__module__].__file__ or cls.__name__).name
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{path}: unknown key '{key}'{hint} ({script} --help lists all)")
    check(cls(**values), f"{path}: ")
    return values


def check(cfg, where=""):
    """UserError for the first field whose value is not of its declared type or in its range."""
    for key, validator in validators(type(cfg)).items():
        value = getattr(cfg, key)
        try:
            validator.validate_python(value)
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
    booleans = {key for key, hint in typing.get_type_hints(cls).items() if hint is bool}
    words = {"true": "True", "false": "False", "1": "True", "0": "False"}
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
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)
