"""Rewards are plain Python functions: (prompts, completions, **columns) -> [number or None]."""

import math

from gosling.config import UserError, show


def reward_functions(cfg):
    """cfg.reward, one function, several or None -> {name: function}"""
    functions = cfg.reward or []
    if not isinstance(functions, (list, tuple)):
        functions = [functions]
    named = {getattr(f, "__name__", type(f).__name__): f for f in functions}
    if len(named) < len(functions):
        raise UserError(
            f"{len(functions)} rewards, but only {len(named)} names: {', '.join(named)}; "
            "give each a name of its own"
        )
    return named


def columns_of(rows):
    """[{key: value}, ...] -> {key: [value or None of each row]}, all but the prompts.

    They are what a reward is called with, besides prompts and completions.
    """
    keys = dict.fromkeys(key for row in rows for key in row if key != "prompt")
    return {key: [row.get(key) for row in rows] for key in keys}


def call_reward(function, prompts, texts, columns):
    """A reward function over a batch -> [number or None]; its NaN is None too.

    columns: {name: [value of each row]}. UserError names the function and the row that it fails on
    or rates with something else than a finite number.
    """
    name = show(function)
    try:
        rewards = function(prompts, texts, **columns)
    except Exception as e:
        failure = failing_row(function, prompts, texts, columns)
        failure = failure or f"the batch, on no row alone: {type(e).__name__}: {e}"
        raise UserError(f"reward {name} failed on {failure}") from e
    if not isinstance(rewards, (list, tuple)) or len(rewards) != len(texts):
        size = f" of {len(rewards)}" if hasattr(rewards, "__len__") else ""
        raise UserError(
            f"reward {name} returned {type(rewards).__name__}{size}; expected a list of "
            f"{len(texts)}, a number or None for each completion"
        )
    for text, reward in zip(texts, rewards, strict=True):
        if reward is not None and (not isinstance(reward, (int, float)) or math.isinf(reward)):
            raise UserError(
                f"reward {name} gave {reward!r} for completion {text[:80]!r}; "
                "expected a finite number or None"
            )
    return [None if r is None or math.isnan(r) else float(r) for r in rewards]


def failing_row(function, prompts, texts, columns):
    """The first row that the function fails on alone, and how, in words; None if there is none."""
    for i, text in enumerate(texts):
        row = {key: values[i : i + 1] for key, values in columns.items()}
        try:
            function(prompts[i : i + 1], [text], **row)
        except Exception as e:
            where = f"prompt {str(prompts[i])[:80]!r}, completion {text[:80]!r}"
            return f"{where}: {type(e).__name__}: {e}"
    return None
