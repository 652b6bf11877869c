"""Rewards as users write them: what they are called with, what they may return, how they fail."""

import asyncio
import datetime
import functools
import math
import types

from gosling import judge, rollouts
from gosling.config import UserError
from gosling.engine import Completion
from gosling.rewards import call_reward, columns_of, reward_functions

import numpy as np
import pytest
import torch

PROMPTS, TEXTS = ["p1", "p2", "p3"], ["one", "three", "five5"]
COLUMNS = {"answer": ["a", "b", None], "completion_ids": [[1], [2, 3], [4]]}
LENGTHS = [3.0, 5.0, 5.0]


def reward_as_trl_documents(completions, **kwargs):
    return [float(len(text)) for text in completions]


def reward_of_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def reward_without_columns(prompts, completions):
    return [len(text) for text in completions]


async def reward_async(prompts, completions, **columns):
    await asyncio.sleep(0)
    reward_async.loops.add(id(asyncio.get_running_loop()))
    return [len(text) for text in completions]


reward_async.loops = set()


def scored(completions, scale, **columns):
    return [scale * len(text) for text in completions]


class Scorer:
    def __call__(self, prompts, completions, answer):
        return [len(text) for text in completions]


@pytest.mark.parametrize(
    "function, expected",
    [
        (reward_as_trl_documents, LENGTHS),
        (reward_of_ids, [1.0, 2.0, 1.0]),
        (reward_without_columns, LENGTHS),
        (reward_async, LENGTHS),
        (functools.partial(scored, scale=2.0), [6.0, 10.0, 10.0]),
        (Scorer(), LENGTHS),
    ],
)
def test_any_callable_is_called_by_keyword(function, expected):
    assert call_reward(function, PROMPTS, TEXTS, COLUMNS) == expected


def test_async_rewards_keep_one_loop_and_work_inside_another():
    async def notebook():
        return [call_reward(reward_async, PROMPTS, TEXTS, COLUMNS) for _ in range(2)]

    assert asyncio.run(notebook()) == [LENGTHS, LENGTHS]
    assert len(reward_async.loops) == 1  # a client made in the first call serves the second


@pytest.mark.parametrize(
    "returned, expected",
    [
        (np.array([1.0, 2.0, np.nan]), [1.0, 2.0, None]),
        (list(np.array([1, 2, 3], dtype=np.float32)), [1.0, 2.0, 3.0]),
        ([np.int64(4), np.bool_(True), False], [4.0, 1.0, 0.0]),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1.0, 2.0, 3.0]),
        (torch.ones(3, dtype=torch.bfloat16), [1.0, 1.0, 1.0]),
        ([torch.tensor(1.0), None, torch.tensor(2)], [1.0, None, 2.0]),
        ((True, None, 0.5), [1.0, None, 0.5]),
    ],
)
def test_numbers_of_any_kind_count(returned, expected):
    got = call_reward(lambda **columns: returned, PROMPTS, TEXTS, COLUMNS)
    assert got == expected and all(type(x) in (float, type(None)) for x in got)


@pytest.mark.parametrize(
    "returned, words",
    [
        (np.ones(2), "returned ndarray of 2; expected a list of 3"),
        (torch.tensor(1.0), "returned Tensor; expected a list of 3"),
        (np.ones((3, 1)), r"gave \[1.0\] for completion 'one'"),
        ([1, 2, "3"], "gave '3' for completion 'five5'"),
        ([1, 2, np.float32("inf")], "gave inf for completion 'five5'"),
        ([1, 2, 10**400], "gave 1000.* for completion 'five5'; expected a finite number"),
        ([1, 2, object()], r"returned\[2\] is a object; expected numbers"),
        (None, "returned NoneType; expected a list of 3"),
    ],
)
def test_other_values_are_refused_with_their_place(returned, words):
    with pytest.raises(UserError, match=words):
        call_reward(lambda **columns: returned, PROMPTS, TEXTS, COLUMNS)


@pytest.mark.parametrize("kind", ["loop", "helper", "async", "batch"])
def test_a_reward_that_fails_is_called_once_and_its_row_is_named(kind):
    calls = []

    def check(text):
        if text == "three":
            raise KeyError("seven")
        return 1.0

    def in_loop(completions, **columns):
        calls.append(kind)
        return [float("three".index(text[0])) for text in completions]  # "o" is not in it

    def with_helper(completions, **columns):
        calls.append(kind)
        return list(map(check, completions))

    async def in_async(completions, **columns):
        calls.append(kind)
        return [check(text) for text in completions]

    def on_batch(completions, **columns):
        calls.append(kind)
        raise TimeoutError("judge API: 503")

    function = {"loop": in_loop, "helper": with_helper, "async": in_async, "batch": on_batch}[kind]
    row = r"failed: KeyError: 'seven' .*test_rewards.py, line \d+\); on prompt 'p2', .* 'three'"
    words = {
        "loop": "in_loop failed: ValueError: substring.*; on prompt 'p1', completion 'one'",
        "helper": f"reward with_helper {row}",
        "async": f"reward in_async {row}",
        "batch": "reward on_batch failed: TimeoutError: judge API: 503 .*test_rewards.py, line ",
    }
    with pytest.raises(UserError, match=words[kind]):
        call_reward(function, PROMPTS, TEXTS, COLUMNS)
    assert calls == [kind]


def test_a_wish_that_no_column_meets_names_the_columns():
    def reward(completions, anwser, **columns):
        return []

    words = "reward reward wants 'anwser'; there are prompts, completions, answer, completion_ids"
    with pytest.raises(UserError, match=words):
        call_reward(reward, PROMPTS, TEXTS, COLUMNS)


def test_columns_that_are_called_as_the_arguments_do_not_collide():
    rows = [{"prompt": "p", "completions": "mine", "completion": "gold"}]
    with pytest.warns(UserWarning, match="do not get the data's column 'completions'"):
        columns = columns_of(rows)
    assert columns == {"completion": ["gold"]}
    assert call_reward(reward_as_trl_documents, ["p"], ["text"], columns) == [4.0]
    bound = functools.partial(scored, scale=2.0)  # what is bound is not undone by the data
    assert call_reward(bound, ["p"], ["text"], {"scale": [7.0]}) == [8.0]


def test_names_of_rewards():
    def names(*functions):
        return list(reward_functions(types.SimpleNamespace(reward=list(functions))))

    double, triple = functools.partial(scored, scale=2), functools.partial(scored, scale=3)
    assert names(double, reward_of_ids, Scorer()) == ["scored", "reward_of_ids", "Scorer"]
    assert names(double, triple) == ["scored(scale=2)", "scored(scale=3)"]
    with pytest.raises(UserError, match="2 rewards, but only 1 names: Scorer"):
        names(Scorer(), Scorer())


# ----------------------------------------------------------------------------------------------
# cfg.process, and rows of a data set


def masks_of(process):
    completions = [Completion([1, 2, 3], "abc", [-1.0] * 3, "stop") for _ in range(2)]
    prompts = [([5], {"prompt": "p", "day": datetime.date(2026, 1, 2)})]
    masks = rollouts.masks_of(prompts, completions, 2, process, 10)
    return rollouts.make_groups(prompts, [7], completions, masks)[0]


def test_what_process_gives_is_made_primitive():
    def process(rows, completions):
        completions[0].tokens = list(np.array([1, 2]))
        return [np.ones(2, dtype=int), torch.tensor([True, False, True])]

    group = masks_of(process)
    assert group["row"] == {"prompt": "p", "day": "2026-01-02"} and group["number"] == 7
    first, second = group["completions"]
    assert first["tokens"] == [1, 2] and first["mask"] == [1, 1] and first["logprobs"] is None
    assert second["mask"] == [True, False, True] and second["logprobs"] == [-1.0] * 3
    assert all(type(x) in (int, bool) for c in group["completions"] for x in c["mask"])


@pytest.mark.parametrize(
    "tokens, masks, words",
    [
        ([1, 10], None, "process left the token 10 in completion 0; expected .* below 10"),
        ([1.5], None, "process left the token 1.5 in completion 0"),
        ([], None, "expected a mask for each completion"),
        ([1, 2, 3], [[1, 1, 1]], "expected a mask for each completion"),
        ([1, 2, 3], [[1, 1, 1], ["1"] * 3], "expected a mask for each completion"),
        ([1, 2, 3], [[1, 1, 1], [0.5, 1, 1]], "0 or 1 for each of its tokens"),
        ([1, 2, 3], [[1, 1, 1], [math.nan, 1, 1]], "0 or 1 for each of its tokens"),
        ([1, 2, 3], 5, "expected a mask for each completion"),
        ([1, 2, 3], [object()], r"what process returned\[0\] is a object"),
    ],
)
def test_what_process_may_not_give(tokens, masks, words):
    def process(rows, completions):
        completions[0].tokens = tokens
        return masks

    with pytest.raises(UserError, match=words):
        masks_of(process)


@pytest.mark.parametrize("what", ["text is None", "half a character", "one fewer", "no completion"])
def test_a_process_leaves_completions_with_their_texts(what):
    def process(rows, completions):
        if what == "text is None":
            completions[0].text = None
        elif what == "half a character":
            completions[0].text += "\ud83d"
        elif what == "one fewer":
            completions.pop()
        else:
            completions[0] = "text"

    with pytest.raises(UserError, match="process left something else than the 2 completions"):
        masks_of(process)


def test_a_process_that_raises_is_named():
    def process(rows, completions):
        return rows[0]["tools"]

    with pytest.raises(UserError, match="process: process failed: KeyError: 'tools' .*test_rew"):
        masks_of(process)


# ----------------------------------------------------------------------------------------------
# scores that a judge writes


@pytest.mark.parametrize(
    "text, score",
    [
        ("Score: 4\nNote: 2", 4),
        ("Score: 4/5\nNote: 2 of 3 facts are right", 4),
        ("Score: 4\nOverall: 2 facts are wrong", 4),
        ("Overall: 4/5", 4),
        ("**Overall**: 4 out of 5", 4),
        ("Overall: 8/10", None),
        ("I would rate this response 4 out of 5.", 4),
        ("I'd give this a 4/5", 4),
        ("4 out of 5 because it is short", 4),
        ("3 out of 5 facts are right", None),
        ("on 4/5/2026", None),
        ("\\boxed{4}", 4),
        ("So the score is $\\boxed{3.5}$ as it is short.", 3.5),
        ("\\boxed{9}", None),
        ("Points: 4", 4),
        ("My score: 4\nMax score: 5", 4),
        ("Score: 4\nMaximum points: 5", 4),
        ("Score: 4 (best possible score: 5)", 4),
        ("I rate it 4 out of 5 overall.", 4),
        ("4 points out of 5", 4),
        ("2 points out of 5 facts", None),
    ],
)
def test_scores_in_words_that_judges_use(text, score):
    assert judge.parse_score(text) == score


def test_a_choice_that_another_begins_with_counts_where_its_text_ends():
    """A judge that writes " 10" gave 1 to " 1" and to " 10": the mean was 5.5."""
    choices = [[9, 1], [9, 2], [9, 1, 0], [9, 1, 0, 0]]  # 1, 2, 10, 100
    begins = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.9, 0.1, 0.6, 0.2]], dtype=torch.float64)
    p = judge.without_longer(begins, choices)
    assert torch.allclose(p, torch.tensor([[0, 0, 1, 0], [0.3, 0.1, 0.4, 0.2]]).double())
    apart = [[1], [2], [3], [4]]
    assert torch.equal(judge.without_longer(begins, apart), begins)
