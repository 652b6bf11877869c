"""Rewards are plain functions, called as TRL calls them:

    function(prompts=[…], completions=[…], **columns) -> [number or None]

An async function is awaited. Without `**columns` it is given those columns alone that it names.
"""

import functools
import inspect
import math
import sys
import traceback
import warnings

from gosling.config import UserError, show
from gosling.files import primitive
from gosling.user_code import call

GIVEN = ("prompt", "prompts", "completions", "completion_ids")  # these are no names of columns


def reward_functions(cfg):
    """cfg.reward, one function, several or None -> {name: function}"""
    functions = cfg.reward or []
    if not isinstance(functions, (list, tuple)):
        functions = [functions]
    names = [name_of(f) for f in functions]
    if len(set(names)) < len(names):  # two uses of one function, say
        names = [show(f) for f in functions]
    if len(set(names)) < len(names):
        raise UserError(
            f"{len(names)} rewards, but only {len(set(names))} names: {', '.join(set(names))}; "
            "give each a name of its own"
        )
    return dict(zip(names, functions, strict=True))


def name_of(function):
    """What a function, a functools.partial or a callable object is called."""
    while isinstance(function, functools.partial) and not hasattr(function, "__name__"):
        function = function.func
    return show(function)


def columns_of(rows):
    """[{key: value}, ...] -> {key: [value or None of each row]}: what rewards are called with.

    A column with a name of GIVEN is left out, with a warning unless it is the prompt.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    for key in keys.keys() & set(GIVEN[1:]):
        warnings.warn(f"rewards do not get the data's column {key!r}; rename it", stacklevel=2)
    return {key: [row.get(key) for row in rows] for key in keys if key not in GIVEN}


def call_reward(function, prompts, texts, columns, seconds=None):
    """A reward function over a batch -> [number or None]; its NaN is None too.

    columns: {name: [value of each row]}. UserError names the function, and the row that it failed
    on or rated with something else than a finite number. It is called once, whatever happens, with
    lists of its own. seconds: its time limit.
    """
    name = show(function)
    values = {"prompts": prompts, "completions": texts, **columns}
    copies = {key: primitive(value, key) for key, value in values.items()}  # it may change them
    given = arguments(function, copies)
    try:
        returned = call(f"reward {name}", function, seconds, **given)
    except UserError as e:
        row = failing_row(e.__cause__, texts) if e.__cause__ else None
        if row is None:
            raise
        where = f"on prompt {str(prompts[row])[:80]!r}, completion {texts[row][:80]!r}"
        raise UserError(f"{e}; {where}") from e.__cause__
    rewards = primitive(returned, f"what reward {name} returned")
    if not isinstance(rewards, list) or len(rewards) != len(texts):
        size = f" of {len(rewards)}" if isinstance(rewards, (list, dict, str)) else ""
        raise UserError(
            f"reward {name} returned {type(returned).__name__}{size}; expected a list of "
            f"{len(texts)}, a number or None for each completion"
        )
    for text, reward in zip(texts, rewards, strict=True):
        if not is_reward(reward):
            raise UserError(
                f"reward {name} gave {reward!r:.60} for completion {text[:80]!r}; "
                "expected a finite number or None"
            )
    return [None if r is None or math.isnan(r) else float(r) for r in rewards]


def is_reward(value):
    """Whether it is None or a number that a float holds; NaN is one."""
    return value is None or (
        isinstance(value, (int, float)) and not abs(value) > sys.float_info.max
    )


def arguments(function, values):
    """Of {name: value} those that the function takes; UserError for one that it wants besides."""
    bound = getattr(function, "keywords", {})  # by functools.partial
    values = {name: value for name, value in values.items() if name not in bound}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a builtin
        return values
    for p in parameters:
        is_named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if is_named and p.default is p.empty and p.name not in values:
            raise UserError(
                f"reward {show(function)} wants {p.name!r}; there are {', '.join(values)}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return values
    return {p.name: values[p.name] for p in parameters if p.name in values}


def failing_row(error, texts):
    """Which of the texts was at hand, in a variable of its own, where the error was raised.

    None if that cannot be told. Asking the function again, row by row, might cost as much again.
    """
    numbers = {id(text): i for i, text in enumerate(texts) if len(text) > 1}  # "a" is shared
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if id(value) in numbers:
                return numbers[id(value)]
    return None
