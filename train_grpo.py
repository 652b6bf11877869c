"""GRPO and its published variants: reinforcement learning from rewards that are plain Python functions.

G completions of each prompt are sampled, each gets a reward R, and its advantage is what it is above its group:
    A = (R - mean) / (std + 1e-4)        of its group; scale_rewards = group, batch, none: whose std (ddof 1), or none
    r = p(token) / p_old(token)          importance_sampling_level = sequence: one r for a row, exp of the mean (GSPO)
    per token   - min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)        delta caps r before (dual clip, for A < 0)
    cispo       - min(r, epsilon_high).detach() A log p                     an absolute cap, about 5: it must be given
    + beta k    k3 = exp(ref - lp) - (ref - lp) - 1, k2 = (lp - ref)^2 / 2, k1 = lp - ref; without ratio correction
    grpo: mean of rows' means    bnpo: tokens of the micro-batch    dapo, cispo: tokens of the whole batch
    dr_grpo: rows x max_completion_length
GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071 (grpo + sequence, epsilon 3e-4), CISPO
2506.13585, dual clip 1912.09729. Names and conventions are TRL's: rows that are masked whole still count in grpo and
dr_grpo; of all reductions bnpo alone depends on micro_bsz, there as here. Left out, since they cost more lines than they
gave: sapo, luspo, vespo, entropy bonus and quantile, a reference that moves.

A prompt is read once and its state forked into its completions, for sampling and in the training pass. Sampler and
trainer are one network; sampling/sampling_logp_difference is the gap between them, rounding.

Usual mistakes: rates of SFT (take a tenth); top_p below 1, which trains another distribution than it samples; a reward of
None counted as zero; a reward model, which learnt on answers with their end token, asked about answers without; a ratio
other than 1 on-policy, which means that padding, state or temperature is wrong.

    python train_grpo.py config/grpo_tiny.py                                 a laptop: exact match 0.75 -> 0.93
    torchrun --nproc_per_node=8 train_grpo.py config/grpo_1b5.py             eight GPUs
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
import torch
import tyro
from common import UserError, load_config, print0
from torch.nn.utils.rnn import pad_sequence

import prepare
import sample
from model import fork, forked, forked_backward, load_model, load_to_tune


@dataclass
class Config(common.TuneConfig):
    # data and rewards
    data: str = (
        "data/prompts.jsonl"  # JSONL of {"prompt": text or messages, columns for the rewards …}
    )
    val_data: str = ""  # the same, held out, for pass@1 and pass@k; empty = none
    reward: tyro.conf.Fixed[Callable | list | None] = (
        None  # (prompts, completions, **columns) -> [number or None]; or several
    )
    reward_model: str = ""  # a file of train_reward.py, as one more reward
    reward_weights: tuple[
        float, ...
    ] = ()  # of the rewards in their order, the model's last; none = 1 each
    process: Callable | None = (
        None  # (rows, completions) -> masks or None; may change .tokens and .text before rewards
    )
    # rollouts
    num_generations: int = 8  # completions of each prompt
    max_completion_length: int = 512  # tokens
    temperature: float = 1.0  # of sampling and of training
    top_p: float = 1.0  # below 1 the trainer's distribution is another one
    top_k: int = 0  # the same; 0 = all
    stop: tuple[str, ...] = (
        "\n\nUser:",
    )  # texts that end a completion, besides the tokenizer's end id
    gen_batch_size: int | None = None  # sequences decoded together; none = what fits
    steps_per_generation: int = 1  # optimiser steps that share one batch of rollouts
    num_iterations: int = 1  # passes over a batch of rollouts
    dynamic_sampling: int = (
        0  # replace groups without spread, sampling at most so many more times; 0 = off
    )
    # loss
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"  # formulas above
    importance_sampling_level: Literal["token", "sequence"] = "token"  # sequence = GSPO
    epsilon: float = 0.2  # clip range downwards
    epsilon_high: float | None = None  # upwards; none = epsilon; DAPO 0.28, cispo about 5
    delta: float | None = None  # dual clip: the largest ratio, above 1 + epsilon_high; none = off
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what advantages are divided by
    advantage_clip: float = 0.0  # largest advantage; 0 = none
    beta: float = 0.0  # weight of the KL term
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # formulas above
    reference: str = ""  # a model's file; empty = adapter or state off, with tune=full init_from
    mask_truncated_completions: bool = (
        False  # no loss on completions that hit max_completion_length
    )
    importance_cap: float = 0.0  # weigh tokens by min(p_old / p_sampler, this) (TIS); 0 = off
    # model and run
    tune: Literal["full", "lora", "state"] = "full"  # every weight, an adapter, or the start state
    lora_dropout: float = 0.0  # LoRA dropout; makes sampler and trainer differ
    out_dir: str = (
        "out/grpo"  # folder for weights or adapters, last.pt, config.json, metrics, rollouts
    )
    seed: int = 42  # of the prompts' order, of sampling and of a fresh adapter
    micro_bsz: int = 1  # prompts, with all their completions, per process and backward pass
    global_bsz: int = (
        16  # prompts per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 4096  # longest prompt and completion in tokens
    chunk_len: int = (
        0  # tokens whose activations are kept at a time, with exact gradient; 0 = whole
    )
    lr: float = 1e-6  # peak learning rate; LoRA wants about ten times more, a state 1e-3 and more
    lr_final: float = 1e-7  # learning rate at the end of the cosine
    eval_every: int = 50  # steps between validations; 0 = at the end only
    eval_generations: int = 4  # k of pass@k
    rollouts_every: int = (
        50  # steps between rollouts/<step>.jsonl, three of them on the screen; 0 = never
    )
    save_every: int = 100  # steps between checkpoints; 0 = at the end only
    log_every: int = 1  # steps between progress lines


# ---------------------------------------------------------------------------------------------------------------------
# the method

HELD_OUT = 2**40  # numbers of held-out prompts, beyond those of training: other random streams


def group_advantages(rewards, num_generations, *, scale_rewards="group"):
    """rewards [P*G], prompt-major, NaN = no reward -> advantages [P*G]; 0 for a row without one, and exactly 0 in a group
    whose rewards are all equal. "none" still subtracts the mean."""
    r = rewards.view(-1, num_generations)
    there = ~r.isnan()
    n, filled = there.sum(1, keepdim=True), r.nan_to_num(0.0)
    centred = torch.where(there, filled - filled.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    same = (r.nan_to_num(-math.inf).amax(1) == r.nan_to_num(math.inf).amin(1)) | (n[:, 0] < 2)
    centred = centred.masked_fill(
        same[:, None], 0.0
    )  # the mean of equal numbers is not always that number
    if scale_rewards == "group":
        centred = centred / (
            (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4
        )
    elif scale_rewards == "batch":
        every = rewards[~rewards.isnan()]
        centred = centred / ((every.std() if len(every) > 1 else 0.0) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards}: expected group, batch or none")
    return centred.flatten()


def policy_loss(
    logps,
    old_logps,
    advantages,
    mask,
    *,
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    importance_sampling_level="token",
    ref_logps=None,
    beta=0.0,
    kl_estimator="k3",
    max_new_tokens=None,
    num_items=None,
    num_rows=None,
    entropy=None,
    sampling_logps=None,
    importance_cap=3.0,
):
    """logps [B, T] of the tokens taken, advantages [B], mask [B, T] of completion tokens -> (loss, metrics).

    old_logps: under the policy that the rollouts are of; None = logps themselves, on-policy. num_items, num_rows: tokens
    and rows of the whole optimiser batch; absent, those of this call; the sum over its parts is then the whole's loss.
    sampling_logps: what the sampler reported, for importance weights up to importance_cap. What stands at masked
    positions, NaN included, does not matter. metrics: means over num_items (or num_rows), so they add up like the loss.
    """
    if loss_type not in (
        "grpo",
        "bnpo",
        "dr_grpo",
        "dapo",
        "cispo",
    ) or importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"loss_type={loss_type}, importance_sampling_level={importance_sampling_level}: no such variant"
        )
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError(
            "cispo caps the ratio at epsilon_high itself, not at 1 + epsilon_high: give it, about 5"
        )
    if loss_type == "dr_grpo" and not max_new_tokens:
        raise ValueError("dr_grpo divides by rows x max_new_tokens: give max_new_tokens")
    here = mask.bool()
    clean = lambda x: None if x is None else torch.where(here, x, 0.0)  # noqa: E731
    logps, ref_logps, sampling_logps, entropy = map(
        clean, (logps, ref_logps, sampling_logps, entropy)
    )
    old_logps = logps.detach() if old_logps is None else clean(old_logps)
    m, A, lengths = here.to(logps.dtype), advantages[:, None], here.sum(1).clamp(min=1)
    num_items, num_rows = (
        m.sum().clamp(min=1) if num_items is None else num_items,
        len(m) if num_rows is None else num_rows,
    )

    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None]
    ratio, high = log_ratio.exp(), 1 + (epsilon if epsilon_high is None else epsilon_high)
    if loss_type == "cispo":
        losses = -ratio.clamp(max=epsilon_high).detach() * A * logps
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        losses = -torch.minimum(capped * A, ratio.clamp(1 - epsilon, high) * A).expand_as(logps)
    if sampling_logps is not None:
        losses = losses * (old_logps - sampling_logps).exp().clamp(max=importance_cap).detach()
    kl = None
    if beta and ref_logps is not None:
        d = ref_logps - logps
        kl = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.exp() - d - 1}[
            kl_estimator
        ]()
        losses = losses + beta * kl
    losses = losses * m
    if loss_type == "grpo":
        loss = (losses.sum(1) / lengths).sum() / num_rows
    elif loss_type == "bnpo":
        loss = losses.sum() / m.sum().clamp(min=1) * (len(m) / num_rows)
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (num_rows * max_new_tokens)
    else:
        loss = losses.sum() / num_items

    with torch.no_grad():
        mean = lambda x: float((x * m).sum() / num_items)  # noqa: E731
        low, up = (ratio < 1 - epsilon) & (A < 0), (ratio > high) & (A > 0)
        metrics = {
            "ratio": mean(ratio),
            "clip_ratio/low_mean": mean(low),
            "clip_ratio/high_mean": mean(up),
            "clip_ratio/region_mean": mean(low | up),
        }
        if loss_type == "cispo":
            metrics = {
                "ratio": mean(ratio),
                "cispo_clip_ratio": mean((ratio > epsilon_high) & (A > 0)),
            }
        for name, x in (("kl", kl), ("entropy", entropy)):
            if x is not None:
                metrics[name] = mean(x)
    return loss, metrics


def combine_rewards(columns, weights):
    """columns: a list [rows] of numbers or None for each reward -> weighted sums [rows]; a missing one counts 0, and a row
    that has none at all is NaN."""
    table = torch.tensor(
        [[math.nan if x is None else float(x) for x in column] for column in columns],
        dtype=torch.float64,
    )
    total = (table.nan_to_num(0.0) * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0)
    return total.masked_fill(table.isnan().all(0), math.nan)


def different(rewards):
    """whether a group's rewards are not all equal; exact, which a standard deviation of 0 is not"""
    return len({r for r in map(float, rewards) if not math.isnan(r)}) > 1


def call_reward(function, prompts, texts, columns):
    """One reward function over a batch, its result checked. UserError names function and row."""
    name = getattr(function, "__name__", str(function))
    try:
        got = function(prompts, texts, **columns)
    except Exception as e:
        for i in range(len(texts)):  # which row was it?
            try:
                function(
                    prompts[i : i + 1],
                    texts[i : i + 1],
                    **{k: v[i : i + 1] for k, v in columns.items()},
                )
            except Exception as one:
                raise UserError(
                    f"reward {name} failed on prompt {str(prompts[i])[:80]!r}, completion {texts[i][:80]!r}: "
                    f"{type(one).__name__}: {one}"
                ) from e
        raise UserError(
            f"reward {name} failed on the batch, on no row alone: {type(e).__name__}: {e}"
        ) from e
    if not isinstance(got, (list, tuple)) or len(got) != len(texts):
        raise UserError(
            f"reward {name} returned {type(got).__name__}"
            + (f" of {len(got)}" if hasattr(got, "__len__") else "")
            + f"; expected a list of {len(texts)}, a number or None for each completion"
        )
    for i, x in enumerate(got):
        if x is not None and (not isinstance(x, (int, float)) or math.isinf(x)):
            raise UserError(
                f"reward {name} gave {x!r} for completion {texts[i][:80]!r}; expected a finite number or None"
            )
    return [None if x is None or math.isnan(x) else float(x) for x in got]


def read_prompts(path, tokenizer, longest):
    """JSONL -> [(ids, row), …]. UserError names the line of a prompt that is empty or longer than `longest` tokens."""
    out = []
    for where, row in prepare.read_jsonl(path, '{"prompt": text or messages, columns …}'):
        prompt = row.get("prompt")
        if not prompt or not isinstance(prompt, (str, list)):
            raise UserError(f'{where}: "prompt" is missing or empty; expected text or messages')
        try:
            ids = (
                tokenizer.encode(prompt)
                if isinstance(prompt, str)
                else prepare.render_chat(prompt, tokenizer, generation_prompt=True)[0]
            )
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        if len(ids) > longest:
            raise UserError(
                f"{where}: the prompt has {len(ids)} tokens; ctx_len - max_completion_length leaves {longest}"
            )
        out.append((ids, row))
    if not out:
        raise UserError(f"{path} holds no prompts")
    return out


def rollout(model, tokenizer, judge, run, cfg, prompts, numbers, n, **options):
    """Sample n completions of each prompt and reward them, a share on every process -> groups, the same list everywhere:
    {"number", "ids", "row", "completions": [{"tokens", "text", "logprobs", "finish_reason", "mask"}], "rewards" by name,
    "reward": their weighted sum}."""
    share = range(len(prompts))[run.rank :: run.world]
    mine, out, error = [prompts[i] for i in share], [], []
    if mine:
        got = sample.generate(
            model,
            [ids for ids, _ in mine],
            n=n,
            max_new_tokens=cfg.max_completion_length,
            stop=cfg.stop,
            tokenizer=tokenizer,
            seed=cfg.seed,
            indices=[numbers[i] for i in share],
            progress=False,
            batch_size=cfg.gen_batch_size,
            **options,
        )
        every = [row for _, row in mine for _ in range(n)]
        before = [list(c.tokens) for c in got]
        masks = cfg.process(every, got) if cfg.process else None
        masks = masks or [[1] * len(c.tokens) for c in got]
        if [len(mask) for mask in masks] != [len(c.tokens) for c in got] or not all(
            c.tokens for c in got
        ):
            raise UserError(
                "process: expected a mask for each completion, a number for each of its tokens, and one token "
                "or more"
            )
        columns, rewards = {**columns_of(every), "completion_ids": [c.tokens for c in got]}, {}
        try:
            for name, function in reward_functions(cfg).items():
                rewards[name] = call_reward(
                    function, [row["prompt"] for row in every], [c.text for c in got], columns
                )
            if judge is not None:
                forks = [
                    (ids, [c.tokens for c in got[i * n : (i + 1) * n]])
                    for i, (ids, _) in enumerate(mine)
                ]
                with torch.no_grad():
                    rewards["reward_model"] = [
                        x
                        for some in common.chunks(forks, cfg.micro_bsz)
                        for x in forked(
                            judge, fork(some, run.device, whole=True), score=True
                        ).tolist()
                    ]
        except UserError as e:
            error = [str(e)]
        for i, (ids, row) in enumerate(mine):
            at = slice(i * n, (i + 1) * n)
            completions = [
                dict(
                    tokens=c.tokens,
                    text=c.text,
                    finish_reason=c.finish_reason,
                    mask=mask,
                    logprobs=c.logprobs if c.tokens == was else None,
                )
                for c, mask, was in zip(got[at], masks[at], before[at])
            ]
            out.append(
                dict(
                    number=numbers[share[i]],
                    ids=ids,
                    row=row,
                    completions=completions,
                    rewards={k: v[at] for k, v in rewards.items()},
                )
            )
    groups, error = (
        sorted(common.gather(out), key=lambda group: group["number"]),
        common.gather(error),
    )
    if error:
        keep_and_raise(error[0], groups, cfg, run)
    for group in groups:
        columns = list(group["rewards"].values())
        group["reward"] = combine_rewards(
            columns, cfg.reward_weights or (1.0,) * len(columns)
        ).tolist()
    return groups


def take_rollouts(roll, data, cursor, cfg, run):
    """The groups of the next optimiser steps, with their advantages, and the number of the prompt to go on from. roll:
    `rollout` of (cfg, prompts, numbers, n)."""
    kept, want = [], cfg.global_bsz * cfg.steps_per_generation
    for round_ in range(1 + cfg.dynamic_sampling):
        numbers = range(cursor, cursor + want - len(kept))
        cursor = numbers.stop
        got = roll(
            cfg,
            [data[i] for i in common.shuffled(numbers, len(data), cfg.seed)],
            list(numbers),
            cfg.num_generations,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
        )
        kept += [
            g for g in got if round_ == cfg.dynamic_sampling or different(g["reward"])
        ]  # what the last round gives stays
        if len(kept) == want:
            break
    rewards = torch.tensor([r for g in kept for r in g["reward"]], dtype=torch.float64)
    if rewards.isnan().all():
        keep_and_raise("every reward of this batch is None", kept, cfg, run)
    advantages = group_advantages(rewards, cfg.num_generations, scale_rewards=cfg.scale_rewards)
    if cfg.advantage_clip:
        advantages = advantages.clamp(-cfg.advantage_clip, cfg.advantage_clip)
    for group, row in zip(kept, advantages.view(-1, cfg.num_generations).tolist()):
        group["advantages"] = row
        for c in group["completions"]:
            if cfg.mask_truncated_completions and c["finish_reason"] == "length":
                c["mask"] = [0] * len(c["tokens"])
    return kept, cursor


def columns_of(rows):
    """[{key: value}, …] -> {key: [value or None of each row]}, without the prompts: what a reward is called with"""
    return {
        k: [row.get(k) for row in rows]
        for k in dict.fromkeys(k for row in rows for k in row)
        if k != "prompt"
    }


def reward_functions(cfg):
    """{name: function}"""
    given = (
        cfg.reward if isinstance(cfg.reward, (list, tuple)) else [cfg.reward] if cfg.reward else []
    )
    named = {getattr(function, "__name__", type(function).__name__): function for function in given}
    if len(named) < len(given):
        raise UserError(
            f"{len(given)} rewards, but only {len(named)} names: {', '.join(named)}; give each a name of its own"
        )
    return named


def write_rollouts(groups, path, run):
    if run.main:
        with common.atomic_write(path) as tmp:
            tmp.write_text(
                "".join(
                    json.dumps(
                        dict(
                            prompt=group["row"]["prompt"],
                            completions=[c["text"] for c in group["completions"]],
                            rewards=group["rewards"],
                            finish_reasons=[c["finish_reason"] for c in group["completions"]],
                        ),
                        ensure_ascii=False,
                    )
                    + "\n"
                    for group in groups
                )
            )


def keep_and_raise(error, groups, cfg, run):
    path = Path(cfg.out_dir) / "rollouts" / "failed.jsonl"
    write_rollouts(groups, path, run)
    raise UserError(f"{error}; the rollouts are in {path}, the last checkpoint stands")


def completions_of(groups):
    return [c for group in groups for c in group["completions"]]


def by_row(values, forks):
    """[1, all tokens] of forks -> [B, T], zeros at the end"""
    return pad_sequence(values[0].split(forks.borders2.diff().tolist()), batch_first=True)


def tensors(groups, device):
    """groups of a micro-batch -> (forks, mask [B, T], advantages [B], said [B, T]: what the sampler reported, NaN where it did
    not, old [B, T]: log-probabilities when the rollouts were taken, or None)"""
    rows = completions_of(groups)
    tensor = functools.partial(torch.tensor, dtype=torch.float32)
    padded = lambda rows: pad_sequence(list(map(tensor, rows)), batch_first=True).to(device)  # noqa: E731
    forks = fork([(g["ids"], [c["tokens"] for c in g["completions"]]) for g in groups], device)
    advantages = tensor([a for g in groups for a in g["advantages"]]).to(device)
    said = padded(
        c["logprobs"] or [math.nan] * len(c["tokens"]) for c in rows
    )  # NaN: rewritten by hand
    old = padded(c["old"] for c in rows) if "old" in rows[0] else None
    return forks, padded(c["mask"] for c in rows), advantages, said, old


@torch.no_grad()
def logps_of(network, forks, cfg):
    """Log-probabilities [B, T] of forks' completions under a network, without a graph"""
    return by_row(forked(network, forks, cfg.chunk_len, cfg.temperature).logps, forks)


def batch_metrics(groups):
    """What rewards and completions of an optimiser batch are like -> {name: number}"""
    rewards = torch.tensor([g["reward"] for g in groups], dtype=torch.float64)
    spread = torch.tensor([g[~g.isnan()].std() if different(g) else 0.0 for g in rewards])
    rows = completions_of(groups)
    sizes = torch.tensor([float(len(c["tokens"])) for c in rows])
    of = lambda name: torch.tensor(
        [math.nan if r is None else r for g in groups for r in g["rewards"][name]]
    )  # noqa: E731
    return {
        "reward": float(rewards.nanmean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread == 0).double().mean()),
        **{f"rewards/{name}/mean": float(of(name).nanmean()) for name in groups[0]["rewards"]},
        "completions/mean_length": float(sizes.mean()),
        "completions/max_length": float(sizes.max()),
        "completions/clipped_ratio": sum(c["finish_reason"] == "length" for c in rows) / len(rows),
    }


def load_other(what, path, model, run):
    """A model beside the one that trains; it must read the same tokens."""
    other, _ = load_model(path, run.device, run.dtype)
    if other.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{what}={path} has a vocabulary of {other.config.vocab_size}, the model one of "
            f"{model.config.vocab_size}; it must read the same tokens"
        )
    return other.eval()


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    # ---- model and tokenizer
    model = load_to_tune(cfg, run)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    out, about = Path(cfg.out_dir), common.origin(cfg, model, tokenizer)
    names = [*reward_functions(cfg)] + ["reward_model"] * bool(cfg.reward_model)
    if not names:
        raise UserError(
            "no reward: define `def reward(prompts, completions, **columns)` in the config file, or give "
            "--reward_model"
        )
    if cfg.reward_weights and len(cfg.reward_weights) != len(names):
        raise UserError(
            f"reward_weights has {len(cfg.reward_weights)} numbers for {len(names)} rewards: {', '.join(names)}"
        )
    for key, low in (
        ("num_generations", 2),
        ("steps_per_generation", 1),
        ("num_iterations", 1),
        ("max_completion_length", 1),
    ):
        if getattr(cfg, key) < low:
            raise UserError(f"{key}={getattr(cfg, key)}: expected {low} or more")
    if cfg.temperature <= 0:
        raise UserError(
            f"temperature={cfg.temperature}: expected a number above 0; a greedy group is one answer G times"
        )
    method = {
        key: getattr(cfg, key)
        for key in (
            "loss_type",
            "importance_sampling_level",
            "epsilon",
            "epsilon_high",
            "delta",
            "beta",
            "kl_estimator",
        )
    } | {"max_new_tokens": cfg.max_completion_length}
    try:
        policy_loss(torch.zeros(1, 1), None, torch.zeros(1), torch.ones(1, 1), **method)
    except ValueError as e:
        raise UserError(str(e)) from None
    judge = load_other("reward_model", cfg.reward_model, model, run) if cfg.reward_model else None
    if judge is not None and judge.score is None:
        raise UserError(f"reward_model={cfg.reward_model} has no score.weight")
    elsewhere = cfg.beta and (
        cfg.reference or cfg.tune == "full"
    )  # else the reference is the model, its adapter or state off
    reference = (
        load_other("reference", cfg.reference or cfg.init_from, model, run) if elsewhere else None
    )

    # ---- data
    longest = cfg.ctx_len - cfg.max_completion_length
    data, val = (
        read_prompts(path, tokenizer, longest) if path else None
        for path in (cfg.data, cfg.val_data)
    )
    max_steps, accumulation = common.plan_steps(cfg, run, len(data) * cfg.num_iterations)

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(data):,} prompts; {max_steps:,} steps of {cfg.global_bsz} prompts x {cfg.num_generations} completions; "
        f"rewards {', '.join(names)}"
    )

    # ---- a new run, or on from last.pt
    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        kept=dict(best=-math.inf, cursor=0, groups=[]),
        data_order=dict(
            prompts=len(data),
            num_generations=cfg.num_generations,
            steps_per_generation=cfg.steps_per_generation,
            num_iterations=cfg.num_iterations,
        ),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, out),
        about=about,
        plot=("reward", "val_pass@1", f"val_pass@{cfg.eval_generations}", "entropy"),
    )
    roll = functools.partial(rollout, model, tokenizer, judge, run)

    def validate():
        """{name: number} on held-out prompts, and the best checkpoint: by pass@1"""
        model.eval()
        values, k = {}, cfg.eval_generations
        if val is not None:
            numbers = [HELD_OUT + i for i in range(len(val))]
            got = roll(
                dataclasses.replace(cfg, process=None), val, numbers, k, temperature=cfg.temperature
            )
            # right is what the first reward gives 1 or more; a missing one is not
            right = torch.tensor(
                [[r is not None and r >= 1 for r in g["rewards"][names[0]]] for g in got]
            )
            values = {
                "val_reward": float(
                    torch.tensor([g["reward"] for g in got], dtype=torch.float64).nanmean()
                ),
                "val_pass@1": float(right.double().mean()),
                f"val_pass@{k}": float(right.any(1).double().mean()),
            }
        if cfg.eval_fn is not None:
            values.update(cfg.eval_fn(model, tokenizer))
        if values.get("val_pass@1", -math.inf) > kept["best"]:
            kept["best"] = values["val_pass@1"]
            write("best")
        return values

    # ---- the loop
    metrics.begin(validate() if metrics.from_step == 0 else {})
    wrapped, no_sync = common.wrap(model, run)
    updates = (
        cfg.steps_per_generation * cfg.num_iterations
    )  # optimiser steps of one batch of rollouts
    quiet = {
        "ratio",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "reward_std",
        "completions/max_length",  # not on the screen
        "sampling/sampling_logp_difference/mean",
        *(f"rewards/{k}/mean" for k in names),
    }
    with common.catch_signals() as signals:
        for step in range(metrics.from_step, max_steps):
            lr = common.set_lr(opt, cfg, step, max_steps)
            t = time.time()
            if step % updates == 0:
                model.eval()
                kept["groups"], kept["cursor"] = take_rollouts(roll, data, kept["cursor"], cfg, run)
                if updates > 1:  # with one update the policy is still the one that sampled
                    mine = common.chunks(kept["groups"][run.rank :: run.world], cfg.micro_bsz)
                    for batch in mine:
                        for c, logps in zip(
                            completions_of(batch),
                            logps_of(model, tensors(batch, run.device)[0], cfg),
                        ):
                            c["old"] = logps[: len(c["tokens"])].tolist()
                    kept["groups"] = sorted(
                        common.gather([g for batch in mine for g in batch]),
                        key=lambda g: g["number"],
                    )
                if (
                    cfg.rollouts_every
                    and (step // updates * updates) % cfg.rollouts_every < updates
                ):
                    write_rollouts(kept["groups"], out / "rollouts" / f"{step}.jsonl", run)
                    for group in kept["groups"][:3]:
                        print0(
                            f"  {str(group['row']['prompt'])[-100:]!r}\n"
                            f"    {group['reward'][0]:.3f} {group['completions'][0]['text'][:200]!r}"
                        )

            seconds_rollout, t = time.time() - t, time.time()
            batch = kept["groups"][step % cfg.steps_per_generation * cfg.global_bsz :][
                : cfg.global_bsz
            ]
            completions = completions_of(batch)
            # sums over the whole batch's tokens and rows; x world because DDP averages gradients
            n_items = max(sum(sum(c["mask"]) for c in completions), 1)
            share = dict(num_items=n_items / run.world, num_rows=len(completions) / run.world)
            loss, totals, gaps = 0.0, {}, []
            model.train()
            for i, micro in enumerate(common.chunks(batch[run.rank :: run.world], cfg.micro_bsz)):
                forks, mask, advantages, said, old = tensors(micro, run.device)
                ref = None
                if cfg.beta:
                    with nullcontext() if reference is not None else model.reference():
                        ref = logps_of(reference or model, forks, cfg)

                def loss_of(scores):
                    logps, entropy = by_row(scores.logps, forks), by_row(scores.entropy, forks)
                    now = old if old is not None else logps.detach()
                    gap = (now - said)[mask.bool()].abs()
                    gaps.append(gap[~gap.isnan()])
                    return policy_loss(
                        logps,
                        old,
                        advantages,
                        mask,
                        ref_logps=ref,
                        entropy=entropy.detach(),
                        **method,
                        **share,
                        sampling_logps=torch.where(said.isnan(), now, said)
                        if cfg.importance_cap
                        else None,
                        importance_cap=cfg.importance_cap,
                    )

                now, values = forked_backward(
                    wrapped,
                    forks,
                    loss_of,
                    cfg.chunk_len,
                    cfg.temperature,
                    nullcontext if i == accumulation - 1 else no_sync,
                )
                loss, totals = (
                    loss + now / run.world,
                    {k: totals.get(k, 0.0) + v / run.world for k, v in values.items()},
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            gaps = torch.cat(gaps)
            loss, stop, gap_sum, gap_n, *values = common.all_sum(
                loss, len(signals), gaps.sum(), len(gaps), *totals.values()
            )
            common.check_finite(cfg, step, loss, grad_norm)
            opt.step()
            opt.zero_grad()
            done, now, values = step + 1, dict(zip(totals, values)), {}
            metrics.tokens += sum(len(c["tokens"]) for c in completions)
            if done % updates == 0:
                kept["groups"] = []  # used up

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                metrics.progress(
                    done,
                    max_steps,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm,
                    quiet=quiet,
                    **batch_metrics(batch),
                    **now,
                    **{
                        "sampling/sampling_logp_difference/mean": gap_sum / max(gap_n, 1),
                        "sampling/sampling_logp_difference/max": max(
                            common.gather([float(gaps.max()) if len(gaps) else 0.0])
                        ),
                        "seconds/rollout": seconds_rollout,
                        "seconds/train": time.time() - t,
                    },
                    **values,
                )
            common.end_step(cfg, save, done, max_steps, stop)
    common.end_run(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
