"""Rollouts: completions of prompts, sampled and rewarded, as groups that every process holds.

A group is of primitives, so that it can be gathered, saved and read back; one for each prompt:

    {"number", "ids", "row", "reward": weighted sums, "rewards": {name: [number or None]},
     "completions": [{"tokens", "text", "finish_reason", "mask", "logprobs"}]}
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from gosling import files, runs
from gosling.batch import score_answers
from gosling.config import UserError, print0, show
from gosling.engine import Completion, Options, complete, generate
from gosling.files import primitive
from gosling.grammar import read_schema
from gosling.rewards import call_reward, columns_of, reward_functions
from gosling.user_code import call

import torch


@dataclass
class Sampler:
    """What turns prompts into groups: the policy, its tokenizer, the reward model or None.

    fits: keywords of `generate`, the json_schema or the regex of every completion.
    """

    model: torch.nn.Module
    tokenizer: object
    reward_model: torch.nn.Module | None
    fits: dict = field(default_factory=dict)


def what_fits(cfg, model, tokenizer):
    """Sampler.fits of a config; UserError for what is no schema or no regex."""
    fits = dict(json_schema=read_schema(cfg.json_schema), regex=cfg.regex or None)
    complete(model, [], Options(tokenizer=tokenizer, **fits))
    return fits


def roll_out(sampler, prompts, numbers, n, cfg, run, process=None, **sampling):
    """Sample n completions of each prompt and reward them, a share on every process -> groups,
    without advantages, the same list on every process.

    prompts: (prompt_ids, row) pairs; numbers: theirs, for the random streams.
    """
    share = range(len(prompts))[run.rank :: run.world]
    groups, errors = [], []
    if len(share):
        prompts, numbers = [prompts[i] for i in share], [numbers[i] for i in share]
        completions = generate(
            sampler.model,
            [prompt_ids for prompt_ids, _ in prompts],
            n=n,
            max_new_tokens=cfg.max_completion_length,
            stop=cfg.stop,
            tokenizer=sampler.tokenizer,
            seed=cfg.seed,
            indices=numbers,
            batch_size=cfg.gen_batch_size,
            progress=False,
            **sampler.fits,
            **sampling,
        )
        try:
            masks = masks_of(
                prompts,
                completions,
                n,
                process,
                sampler.model.config.vocab_size,
                cfg.reward_seconds,
            )
            groups = make_groups(prompts, numbers, completions, masks)
            add_rewards(groups, sampler.reward_model, cfg, run)
        except UserError as e:
            errors = [str(e)]
    groups = sorted(runs.gather(groups), key=lambda group: group["number"])
    errors = runs.gather(errors)
    if errors:
        keep_and_raise(errors[0], groups, cfg, run)
    for group in groups:
        columns = list(group["rewards"].values())
        weights = cfg.reward_weights or (1.0,) * len(columns)
        group["reward"] = combine_rewards(columns, weights).tolist()
    return groups


def masks_of(prompts, completions, n, process, vocab_size, seconds=None):
    """cfg.process over the completions, which it may rewrite -> a mask for each [tokens]

    What it rewrote by hand, the sampler has no log-probabilities of.
    """
    if process is None:
        return [[1] * len(completion.tokens) for completion in completions]
    before, name = [list(completion.tokens) for completion in completions], show(process)
    rows = [primitive(row, "the data's row") for _, row in prompts for _ in range(n)]  # copies
    masks = call(f"process: {name}", process, seconds, rows, completions)
    masks = primitive(masks, f"process: what {name} returned")
    if len(completions) != len(before) or not all(map(is_completion, completions)):
        raise UserError(
            f"process: {name} left something else than the {len(before)} completions and their "
            "texts; change texts and tokens, and no more"
        )
    for i, (completion, tokens) in enumerate(zip(completions, before, strict=True)):
        completion.tokens = primitive(completion.tokens, f"process: tokens of completion {i}")
        if completion.tokens != tokens:
            completion.logprobs = None
        for token in completion.tokens:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UserError(
                    f"process: {name} left the token {token!r} in completion {i}; expected whole "
                    f"numbers below {vocab_size}"
                )
    lengths = [len(completion.tokens) for completion in completions]
    masks = masks or [[1] * length for length in lengths]
    if 0 in lengths or not isinstance(masks, list) or not fit(masks, lengths):
        raise UserError(
            "process: expected a mask for each completion, 0 or 1 for each of its tokens, and one "
            "token or more"
        )
    return masks


def fit(masks, lengths):
    """Whether there is a list of so many 0 or 1 for each length."""
    of_numbers = [m for m in masks if isinstance(m, list) and all(x in (0, 1) for x in m)]
    return [len(mask) for mask in of_numbers] == lengths and len(masks) == len(lengths)


def is_completion(value):
    """Whether a function of the user's left it a Completion with whole characters as its text."""
    if not isinstance(value, Completion) or not isinstance(value.text, str):
        return False
    return value.text == value.text.encode("utf-8", "replace").decode()


def make_groups(prompts, numbers, completions, masks):
    """engine.Completions, prompt-major, and their masks -> groups without rewards"""
    plain = [
        {
            "tokens": completion.tokens,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "mask": mask,
            "logprobs": completion.logprobs,
        }
        for completion, mask in zip(completions, masks, strict=True)
    ]
    groups, n = [], len(plain) // len(prompts)
    for i, (prompt_ids, row) in enumerate(prompts):
        row = {key: primitive(value, f"the data's column {key!r}") for key, value in row.items()}
        group = {"number": numbers[i], "ids": prompt_ids, "row": row, "rewards": {}}
        groups.append({**group, "completions": plain[i * n : (i + 1) * n]})
    return groups


def add_rewards(groups, reward_model, cfg, run):
    """Fill in each group's rewards: the config's functions, and the reward model's scores."""
    completions = completions_of(groups)
    rows = [group["row"] for group in groups for _ in group["completions"]]
    columns = {**columns_of(rows), "completion_ids": [c["tokens"] for c in completions]}
    texts, columns_of_rewards = [c["text"] for c in completions], {}
    prompts = [row["prompt"] for row in rows]
    for name, function in reward_functions(cfg).items():
        columns_of_rewards[name] = call_reward(
            function, prompts, texts, columns, cfg.reward_seconds
        )
    if reward_model is not None:
        scores = []
        with torch.no_grad():
            for some in runs.chunks(groups, cfg.micro_bsz):
                answers = [(g["ids"], [c["tokens"] for c in g["completions"]]) for g in some]
                for of_prompt in score_answers(reward_model, answers, run.device):
                    scores += of_prompt.tolist()
        columns_of_rewards["reward_model"] = scores
    first = 0
    for group in groups:
        end = first + len(group["completions"])
        group["rewards"] = {name: c[first:end] for name, c in columns_of_rewards.items()}
        first = end


def combine_rewards(columns, weights):
    """A list [rows] of numbers or None for each reward -> weighted sums [rows].

    A missing reward counts 0, and a row that has none at all is NaN.
    """
    columns = [[math.nan if x is None else float(x) for x in column] for column in columns]
    table = torch.tensor(columns, dtype=torch.float64)  # [rewards, rows]
    weights = torch.tensor(weights, dtype=torch.float64)[:, None]
    total = (table.nan_to_num(0.0) * weights).sum(0)
    return total.masked_fill(table.isnan().all(0), math.nan)


def are_different(rewards):
    """Whether a group's rewards are not all equal; exact, which a standard deviation of 0 is
    not."""
    return len({reward for reward in map(float, rewards) if not math.isnan(reward)}) > 1


def check_resumed(groups, n, cfg, vocab_size):
    """UserError unless the groups in last.pt are `n`, or none, as this run samples them."""
    completions = completions_of(groups)
    ids = [i for answered in groups for i in answered["ids"]]
    ids += [i for completion in completions for i in completion["tokens"]]
    is_whole = (
        len(groups) in (0, n) and len({"old" in completion for completion in completions}) < 2
    )
    sizes = {len(group["completions"]) for group in groups}
    if not is_whole or sizes - {cfg.num_generations} or max(ids, default=0) >= vocab_size:
        raise UserError(
            f"{Path(cfg.out_dir) / 'last.pt'}: groups are not {n} of {cfg.num_generations} "
            "completions each, of the model's ids; start a new run with --init_from"
        )


def completions_of(groups):
    return [completion for group in groups for completion in group["completions"]]


# ----------------------------------------------------------------------------------------------
# on disk, on the screen, in numbers


def write_rollouts(groups, path, run):
    """Prompts, completions and rewards as JSONL, by rank 0."""
    if not run.main:
        return
    rows = []
    for group in groups:
        completions = group["completions"]
        rows.append(
            {
                "prompt": group["row"]["prompt"],
                "completions": [c["text"] for c in completions],
                "rewards": group["rewards"],
                "finish_reasons": [c["finish_reason"] for c in completions],
            }
        )
    files.write_jsonl(path, rows)


def show_rollouts(groups):
    """The first completion of three groups, on the screen."""
    for group in groups[:3]:
        print0(f"  {str(group['row']['prompt'])[-100:]!r}")
        print0(f"    {group['reward'][0]:.3f} {group['completions'][0]['text'][:200]!r}")


def keep_and_raise(error, groups, cfg, run):
    """UserError, once the rollouts are on disk to be looked at."""
    path = Path(cfg.out_dir) / "rollouts" / "failed.jsonl"
    if groups:
        write_rollouts(groups, path, run)
    raise UserError(f"{error}; the rollouts are in {path}" if groups else error)


def rollout_metrics(groups):
    """What rewards and completions of an optimiser batch are like -> {name: number}"""
    rewards = torch.tensor([group["reward"] for group in groups], dtype=torch.float64)
    stds = [r[~r.isnan()].std() if are_different(r) else torch.tensor(0.0) for r in rewards]
    stds, completions = torch.stack([std.double() for std in stds]), completions_of(groups)
    lengths = torch.tensor([float(len(c["tokens"])) for c in completions])
    n_clipped = sum(c["finish_reason"] == "length" for c in completions)
    values = {
        "reward": float(rewards.nanmean()),
        "reward_std": float(stds.mean()),
        "frac_reward_zero_std": float((stds == 0).double().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": n_clipped / len(completions),
    }
    for name in groups[0]["rewards"]:
        column = [math.nan if r is None else r for g in groups for r in g["rewards"][name]]
        values[f"rewards/{name}/mean"] = float(torch.tensor(column).nanmean())
    return values
