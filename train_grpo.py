"""GRPO and its published variants: reinforcement learning from rewards that are plain functions.

G completions of each prompt are sampled, each gets a reward R, and its advantage is what it is
above its group:

    A = (R - mean) / (std + 1e-4)     of its group; scale_rewards = group, batch, none: whose std
                                      (ddof 1), or none
    r = p(token) / p_old(token)       importance_sampling_level = sequence: one r for a row, exp of
                                      the mean (GSPO)
    per token   - min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
                                      delta caps r before (dual clip, for A < 0)
    cispo       - min(r, epsilon_high).detach() A log p
                                      an absolute cap, about 5: it must be given
    + beta k    k3 = exp(ref - lp) - (ref - lp) - 1, k2 = (lp - ref)^2 / 2, k1 = lp - ref;
                without ratio correction
    grpo: mean of rows' means     bnpo: tokens of the micro-batch
    dapo, cispo: tokens of the whole batch     dr_grpo: rows x max_completion_length

GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071 (grpo + sequence,
epsilon 3e-4), CISPO 2506.13585, dual clip 1912.09729. Names and conventions are TRL's: rows that
are masked whole still count in grpo and dr_grpo; of all reductions bnpo alone depends on micro_bsz,
there as here. `reference` of the KL term: empty = the policy as training starts (init_from, with
its `adapter` if one is given), so that the term is 0 at the first step; "off" = its adapter or
tuned state switched off; or a model's file.

A sample is a prompt with all its completions. A prompt is read once and its state forked into its
completions, for sampling and in the training pass. Sampler and trainer are one network;
sampling/sampling_logp_difference is the gap between them, rounding.

Data: JSONL of {"prompt": text or messages, columns for the rewards …}. A reward is a function in
the config file, (prompts, completions, **columns) -> [number or None], None for no reward.

Usual mistakes: rates of SFT (take a tenth; LoRA about ten times more than full, a state 1e-3 and
more); top_p below 1, which trains another distribution than it samples; a reward of None counted as
zero; a reward model, which learnt on answers with their end token, asked about answers without;
LoRA dropout, which makes sampler and trainer differ; a ratio other than 1 on-policy, which means
that padding, state or temperature is wrong.

    python train_grpo.py config/grpo_tiny.py                              exact match 0.75 -> 0.93
    torchrun --nproc_per_node=8 train_grpo.py config/grpo_1b5.py          eight GPUs
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gosling import rollouts, runs, tune
from gosling.batch import fork, score_forks
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0
from gosling.data import read_prompts
from gosling.engine import load_second
from gosling.rewards import reward_functions
from gosling.rollouts import Sampler, are_different, completions_of, roll_out
from gosling.tokenizer import tokenizer_of
from wkv_cuda.packed import to_device

import torch
import tyro
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.utils.rnn import pad_sequence

Functions = tyro.conf.Fixed[Callable | list[Callable] | None]


@dataclass
class Config:
    # data and model
    data: str = "data/prompts.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    skip_bad: bool = False  # leave out and count rows that cannot be read
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # rewards
    reward: Functions = None  # of your own, as the docstring says
    reward_seconds: PositiveFloat | None = None  # longest call of a reward …; none = no limit
    reward_model: str = ""  # a file of train_reward.py, as one more reward
    reward_weights: tuple[float, ...] = ()  # in the rewards' order, the model's last; none = 1 each
    process: Callable | None = None  # (rows, completions) -> masks or None; may change completions
    # rollouts
    num_generations: Annotated[int, Field(ge=2)] = 8  # completions of each prompt
    max_completion_length: PositiveInt = 512  # longest completion in tokens
    temperature: PositiveFloat = 1.0  # of sampling
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # of sampling: total of the likeliest tokens
    top_k: NonNegativeInt = 0  # sample from so many likeliest tokens; 0 = all
    stop: tuple[str, ...] = ("\n\nUser:",)  # texts that end a completion, besides the end id
    json_schema: str = ""  # file with a JSON schema of completions; logps are those without it
    regex: str = ""  # expression that completions match as a whole; logps are those without it
    gen_batch_size: PositiveInt | None = None  # sequences decoded together; none = what fits
    steps_per_generation: PositiveInt = 1  # optimiser steps that share one batch of rollouts
    num_iterations: PositiveInt = 1  # passes over a batch of rollouts
    dynamic_sampling: NonNegativeInt = 0  # rounds that replace groups without spread; 0 = off
    # loss
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"  # formulas above
    importance_sampling_level: Literal["token", "sequence"] = "token"  # sequence = GSPO
    epsilon: NonNegativeFloat = 0.2  # clip range downwards
    epsilon_high: NonNegativeFloat | None = None  # upwards; none = epsilon; DAPO 0.28, cispo 5
    delta: PositiveFloat | None = None  # dual clip: largest ratio, above 1 + epsilon_high
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what advantages are divided by
    advantage_clip: NonNegativeFloat = 0.0  # largest advantage; 0 = none
    beta: NonNegativeFloat = 0.0  # how strongly the policy is held to the reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the KL term, formulas above
    reference: str = ""  # model to stay near: a file, or a word as the docstring says
    mask_truncated_completions: bool = False  # no loss on those that hit max_completion_length
    importance_cap: NonNegativeFloat = 0.0  # weigh tokens by min(p_old / p_sampler, cap); 0 = off
    # what trains
    tune: Literal["full", "lora", "state"] = "full"  # weights, LoRA, state or scalar head
    lora_r: PositiveInt = 32  # LoRA rank
    lora_alpha: PositiveFloat = 64.0  # LoRA scale: alpha / r
    lora_dropout: Decay = 0.0  # LoRA dropout
    lora_rslora: bool = False  # scale alpha / sqrt(r)
    lora_targets: tuple[str, ...] = ()  # key, att.key, ffn, head …; none = all of att and ffn
    lora_extra: tuple[str, ...] = ()  # more parameters to train, by parts of names: ln, x_ …
    adapter: str = ""  # saved adapter or state to go on from
    another_base: bool = False  # an adapter or state of another base than this is meant
    # run
    out_dir: str = "out/grpo"  # folder for checkpoints, last.pt, config.json and metrics
    resume: bool | Literal["auto"] = False  # go on from out_dir/last.pt; auto: if there is one
    seed: Seed = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    hang_minutes: PositiveFloat = 60.0  # longest wait of processes for one another
    shard: Literal["none", "fsdp"] = "none"  # several processes: all weights in each, or a share
    cpu_offload: bool = False  # fsdp: the shares lie in main memory, and AdamW runs there
    gather: Literal["auto", "all", "block"] = "auto"  # fsdp: to sample, all weights or by block
    # batch
    micro_bsz: PositiveInt = 1  # samples per process and backward pass: lower it to save memory
    global_bsz: PositiveInt = 16  # samples per optimiser step, over all processes
    ctx_len: PositiveInt = 4096  # longest sample in tokens
    chunk_len: NonNegativeInt = 0  # tokens whose activations are kept at a time; 0 = all
    # optimiser
    lr: PositiveFloat = 1e-6  # peak learning rate
    lr_final: NonNegativeFloat = 1e-7  # learning rate at the end of the cosine
    warmup_steps: NonNegativeInt = 10  # steps from 0.01 lr to lr
    max_steps: NonNegativeInt | None = None  # optimiser steps of the whole run; or give epochs
    epochs: PositiveFloat | None = None  # passes over the data; one if neither is given
    weight_decay: NonNegativeFloat = 0.0  # on the large matrices alone
    beta1: Decay = 0.9  # AdamW: of the running mean
    beta2: Decay = 0.99  # AdamW: of the running mean of squares
    adam_eps: PositiveFloat = 1e-18  # AdamW: upstream's value
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 = no clipping
    optim: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in a quarter of the memory
    step_in_backward: bool = False  # one gradient in memory at a time; wants grad_clip=0
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    compile: bool = False  # blocks through torch.compile: minutes at first, then faster steps
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 50  # steps between validations; 0 = at the end only
    eval_generations: PositiveInt = 4  # k of pass@k
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    rollouts_every: NonNegativeInt = 50  # steps between files of rollouts/, three shown; 0 = never
    save_every: NonNegativeInt = 100  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 1  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method


def grpo_loss(logps, old_logps, advantages, mask, epsilon=0.2):
    """The plain loss, to be read and copied: what policy_loss is by default.

    logps, old_logps [B, T]: log-probabilities of the sampled tokens under the policy, and under the
    policy that sampled them. advantages [B], mask [B, T]: 1 on the tokens of a completion.
    """
    A = advantages[:, None]  # [B, 1]
    ratio = (logps - old_logps).exp()  # [B, T], 1 on-policy
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    losses = -torch.minimum(ratio * A, clipped * A)
    return (losses * mask).sum() / mask.sum()


def group_advantages(rewards, num_generations, *, scale_rewards="group"):
    """rewards [P*G], prompt-major, NaN = no reward -> advantages [P*G]

    0 for a row without a reward, and exactly 0 in a group whose rewards are all equal. "none" still
    subtracts the mean.
    """
    r = rewards.view(-1, num_generations)  # [P, G]
    has_reward = ~r.isnan()
    n, filled = has_reward.sum(1, keepdim=True), r.nan_to_num(0.0)
    mean = filled.sum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(has_reward, filled - mean, 0.0)
    highest, lowest = r.nan_to_num(-math.inf).amax(1), r.nan_to_num(math.inf).amin(1)
    all_equal = (highest == lowest) | (n[:, 0] < 2)
    centred = centred.masked_fill(all_equal[:, None], 0.0)  # a mean of equal numbers may be off
    if scale_rewards == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-4)
    elif scale_rewards == "batch":
        given = rewards[~rewards.isnan()]
        std = given.std() if len(given) > 1 else 0.0
        centred = centred / (std + 1e-4)
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
    as_tensors=False,
):
    """logps [B, T] of the tokens taken, advantages [B], mask [B, T] of completion tokens
    -> (loss, {metric: number})

    old_logps: under the policy that the rollouts are of; None = logps themselves, on-policy.
    num_items, num_rows: tokens and rows of the whole optimiser batch; absent, those of this call;
    the sum over its parts is then the whole's loss. sampling_logps: what the sampler reported, for
    importance weights up to importance_cap. What stands at masked positions, NaN included, does not
    matter. Metrics are means over num_items or num_rows, which add up; as_tensors: not yet read.
    """
    check_variant(loss_type, importance_sampling_level, epsilon_high, max_new_tokens)
    inside = mask.bool()
    logps = torch.where(inside, logps, 0.0)
    old_logps = logps.detach() if old_logps is None else torch.where(inside, old_logps, 0.0)
    m, A = inside.to(logps.dtype), advantages[:, None]
    if num_items is None:
        num_items = m.sum().clamp(min=1)
    if num_rows is None:
        num_rows = len(m)

    log_ratio = logps - old_logps  # [B, T]
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / inside.sum(1).clamp(min=1))[:, None]  # [B, 1]
    ratio = log_ratio.exp()
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    if loss_type == "cispo":
        losses = -ratio.clamp(max=epsilon_high).detach() * A * logps
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        losses = -torch.minimum(capped * A, ratio.clamp(1 - epsilon, high) * A).expand_as(logps)
    if sampling_logps is not None:
        sampling_logps = torch.where(inside, sampling_logps, 0.0)
        losses = losses * (old_logps - sampling_logps).exp().clamp(max=importance_cap).detach()
    kl = None
    if beta and ref_logps is not None:
        kl = kl_term(torch.where(inside, ref_logps, 0.0) - logps, kl_estimator)
        losses = losses + beta * kl
    loss = reduce_losses(losses * m, m, loss_type, num_items, num_rows, max_new_tokens)

    with torch.no_grad():
        metrics = clip_metrics(ratio, A, loss_type, 1 - epsilon, high, epsilon_high)
        if kl is not None:
            metrics["kl"] = kl
        if entropy is not None:
            metrics["entropy"] = torch.where(inside, entropy, 0.0)
        metrics = {name: (x * m).sum() / num_items for name, x in metrics.items()}
        if not as_tensors:
            metrics = {name: float(value) for name, value in metrics.items()}
        return loss, metrics


def check_variant(loss_type, level, epsilon_high, max_new_tokens):
    """ValueError for what is no variant, or lacks a number."""
    known = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
    if loss_type not in known or level not in ("token", "sequence"):
        raise ValueError(
            f"loss_type={loss_type}, importance_sampling_level={level}: no such variant"
        )
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError(
            "cispo caps the ratio at epsilon_high itself, not at 1 + epsilon_high: give it, about 5"
        )
    if loss_type == "dr_grpo" and not max_new_tokens:
        raise ValueError("dr_grpo divides by rows x max_new_tokens: give max_new_tokens")


def kl_term(difference, estimator):
    """difference [B, T] = log p of the reference - log p of the policy -> k1, k2 or k3 per token"""
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1


def reduce_losses(losses, mask, loss_type, num_items, num_rows, max_new_tokens):
    """Masked losses of the tokens [B, T] -> the loss, by the sums in the docstring above"""
    if loss_type == "grpo":
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / num_rows
    if loss_type == "bnpo":
        return losses.sum() / mask.sum().clamp(min=1) * (len(mask) / num_rows)
    if loss_type == "dr_grpo":
        return losses.sum() / (num_rows * max_new_tokens)
    return losses.sum() / num_items


def clip_metrics(ratio, A, loss_type, low, high, epsilon_high):
    """Where the ratio is cut off, by TRL's names -> {name: [B, T] or [B, 1]}"""
    if loss_type == "cispo":
        return {"ratio": ratio, "cispo_clip_ratio": (ratio > epsilon_high) & (A > 0)}
    too_low, too_high = (ratio < low) & (A < 0), (ratio > high) & (A > 0)
    return {
        "ratio": ratio,
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low | too_high,
    }


# ----------------------------------------------------------------------------------------------
# the groups of the next steps, and their tensors

HELD_OUT = 2**40  # numbers of held-out prompts, beyond those of training: other random streams


def next_rollouts(sampler, prompts, cursor, cfg, run):
    """-> (the groups of the next optimiser steps, with their advantages; the number of the prompt
    to go on from)"""
    groups, n_wanted = [], cfg.global_bsz * cfg.steps_per_generation
    sampling = dict(temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k)
    for round_number in range(1 + cfg.dynamic_sampling):
        numbers = range(cursor, cursor + n_wanted - len(groups))
        cursor = numbers.stop
        chosen = [prompts[i] for i in runs.shuffled(numbers, len(prompts), cfg.seed)]
        new = roll_out(
            sampler, chosen, list(numbers), cfg.num_generations, cfg, run, cfg.process, **sampling
        )
        if round_number < cfg.dynamic_sampling:  # what the last round gives stays
            new = [group for group in new if are_different(group["reward"])]
        groups += new
        if len(groups) == n_wanted:
            break
    add_advantages(groups, cfg, run)
    return groups, cursor


def add_advantages(groups, cfg, run):
    """Fill in each group's advantages, and mask truncated completions if cfg says so."""
    rewards = torch.tensor([r for group in groups for r in group["reward"]], dtype=torch.float64)
    if rewards.isnan().all():
        rollouts.keep_and_raise("every reward of this batch is None", groups, cfg, run)
    advantages = group_advantages(rewards, cfg.num_generations, scale_rewards=cfg.scale_rewards)
    if cfg.advantage_clip:
        advantages = advantages.clamp(-cfg.advantage_clip, cfg.advantage_clip)
    by_group = advantages.view(-1, cfg.num_generations).tolist()
    for group, of_group in zip(groups, by_group, strict=True):
        group["advantages"] = of_group
        for completion in group["completions"]:
            if cfg.mask_truncated_completions and completion["finish_reason"] == "length":
                completion["mask"] = [0] * len(completion["tokens"])


def add_old_logps(groups, model, cfg, run):
    """Note the policy's log-probabilities before its first update, each process those of its share;
    they are the old ones of the updates that follow. -> groups, the same on every process"""
    share = groups[run.rank :: run.world]
    for some in runs.chunks(share, cfg.micro_bsz):
        forks = fork_groups(some, run.device)
        for completion, logps in zip(
            completions_of(some), logps_of(model, forks, cfg), strict=True
        ):
            completion["old"] = logps[: len(completion["tokens"])].tolist()
    return sorted(runs.gather(share), key=lambda group: group["number"])


def fork_groups(groups, device):
    """Groups -> batch.Forks: every prompt once, its completions from its state."""
    pairs = [(g["ids"], [c["tokens"] for c in g["completions"]]) for g in groups]
    return fork(pairs, device)


@torch.no_grad()
def logps_of(model, forks, cfg):
    """Log-probabilities [B, T] of the completions under a model, without a graph."""
    return forks.by_row(score_forks(model, forks, cfg.chunk_len, cfg.temperature).logps)


def padded(rows, device):
    """Lists of numbers -> [B, T] float32, zeros on the right."""
    rows = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return to_device(pad_sequence(rows, batch_first=True), device)


def tensors_of(groups, device):
    """Groups of a micro-batch -> (mask [B, T], advantages [B], sampler_logps [B, T], old_logps
    [B, T] or None)

    sampler_logps: what the sampler reported, NaN where it did not. old_logps: when the rollouts
    were taken; None on-policy.
    """
    rows = completions_of(groups)
    mask = padded([c["mask"] for c in rows], device)
    advantages = torch.tensor([a for g in groups for a in g["advantages"]], dtype=torch.float32)
    reported = [c["logprobs"] or [math.nan] * len(c["tokens"]) for c in rows]
    old_logps = padded([c["old"] for c in rows], device) if "old" in rows[0] else None
    return mask, to_device(advantages, device), padded(reported, device), old_logps


# ----------------------------------------------------------------------------------------------


def check_settings(cfg):
    """-> names of the rewards, the reward model's last. UserError for what does not go together."""
    names = list(reward_functions(cfg))
    if cfg.reward_model:
        names.append("reward_model")
    if not names:
        raise UserError(
            "no reward: define `def reward(prompts, completions, **columns)` in the config file, "
            "or give --reward_model"
        )
    if cfg.reward_weights and len(cfg.reward_weights) != len(names):
        raise UserError(
            f"reward_weights has {len(cfg.reward_weights)} numbers for {len(names)} rewards: "
            f"{', '.join(names)}"
        )
    if cfg.max_completion_length >= cfg.ctx_len:
        raise UserError(
            f"max_completion_length={cfg.max_completion_length} leaves no prompt any room in "
            f"ctx_len={cfg.ctx_len}; raise ctx_len, or lower it"
        )
    if cfg.reference == "off" and cfg.tune == "full":
        raise UserError(
            "reference=off switches an adapter or a tuned state off, and tune=full has neither; "
            "leave it empty"
        )
    try:
        level = cfg.importance_sampling_level
        check_variant(cfg.loss_type, level, cfg.epsilon_high, cfg.max_completion_length)
    except ValueError as e:
        raise UserError(str(e)) from None
    return names


def load_others(cfg, model, tokenizer, run):
    """-> (the reward model or None, the reference or None where it is the model itself)"""
    reward_model = reference_model = None
    if cfg.reward_model:
        reward_model = load_second("reward_model", cfg.reward_model, model, tokenizer, cfg, run)
        if reward_model.score is None:
            raise UserError(f"reward_model={cfg.reward_model} has no score.weight")
    # The reference is what training starts from; a fresh adapter or state is the model without.
    path = cfg.reference or cfg.adapter
    if cfg.tune == "full":
        path = cfg.reference or cfg.init_from
    if cfg.beta and path not in ("", "off"):
        if cfg.another_base and path == cfg.adapter:
            raise UserError(
                "beta, with an adapter of another base: no file has the reference; merge them "
                "first (export.py merge --another_base), or say --reference=off"
            )
        reference_model = load_second("reference", path, model, tokenizer, cfg, run)
    return reward_model, reference_model


def validate(sampler, val_prompts, cfg, run):
    """-> {name: number} on held-out prompts and of cfg.eval_fn."""
    sampler.model.eval()
    with runs.whole(sampler.model, sampler.reward_model):
        values, k = {}, cfg.eval_generations
        if val_prompts:
            numbers = [HELD_OUT + i for i in range(len(val_prompts))]
            groups = roll_out(
                sampler, val_prompts, numbers, k, cfg, run, temperature=cfg.temperature
            )
            # Right is what the first reward gives 1 or more; a missing one is not.
            first = [next(iter(group["rewards"].values())) for group in groups]
            right = torch.tensor([[r is not None and r >= 1 for r in rewards] for rewards in first])
            rewards = torch.tensor([group["reward"] for group in groups], dtype=torch.float64)
            values = {
                "val_reward": float(rewards.nanmean()),
                "val_pass@1": float(right.double().mean()),
                f"val_pass@{k}": float(right.any(1).double().mean()),
            }
        values.update(runs.call_eval_fn(cfg, sampler.model, sampler.tokenizer))
    return values


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- model and tokenizer
        names = check_settings(cfg)
        model = tune.load_to_tune(cfg, run)
        tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
        about = tune.origin(cfg, model, tokenizer)
        reward_model, reference_model = load_others(cfg, model, tokenizer, run)
        fits = rollouts.what_fits(cfg, model, tokenizer)
        sampler = Sampler(model, tokenizer, reward_model, fits)

        # ---- data
        longest = cfg.ctx_len - cfg.max_completion_length
        prompts = read_prompts(cfg.data, tokenizer, longest, skip_bad=cfg.skip_bad)
        val_prompts = []
        if cfg.val_data:
            val_prompts = read_prompts(cfg.val_data, tokenizer, longest, skip_bad=cfg.skip_bad)
        max_steps, accumulation = runs.plan_steps(cfg, run, len(prompts) * cfg.num_iterations)
        print0(
            f"data: {len(prompts):,} prompts; {max_steps:,} steps of {cfg.global_bsz} prompts x "
            f"{cfg.num_generations} completions; rewards {', '.join(names)}"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(cfg, model, prompts=len(prompts))
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_loss = resumed.get("step", 0), resumed.get("best_loss", math.inf)
        cursor, groups = resumed.get("cursor", 0), resumed.get("groups", [])
        n_groups = cfg.global_bsz * cfg.steps_per_generation
        rollouts.check_resumed(groups, n_groups, cfg, model.config.vocab_size)
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(sampler, val_prompts, cfg, run)
            # pass@1 is better when higher, so its negative is the loss.
            watched = -values.get("val_pass@1", -math.inf)
            best_loss = tune.save_best(model, cfg, run, watched, best_loss, about)
        metrics.begin(values)

        # ---- the loop
        variant = dict(
            loss_type=cfg.loss_type,
            importance_sampling_level=cfg.importance_sampling_level,
            epsilon=cfg.epsilon,
            epsilon_high=cfg.epsilon_high,
            delta=cfg.delta,
            beta=cfg.beta,
            kl_estimator=cfg.kl_estimator,
            max_new_tokens=cfg.max_completion_length,
            importance_cap=cfg.importance_cap,
        )
        not_shown = {"ratio", "clip_ratio/low_mean", "clip_ratio/high_mean", "reward_std"}
        not_shown |= {"completions/max_length", "sampling/sampling_logp_difference/mean"}
        not_shown |= {f"rewards/{name}/mean" for name in names}
        updates = cfg.steps_per_generation * cfg.num_iterations  # optimiser steps per rollouts
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)

                # ---- rollouts
                start = time.monotonic()
                if step % updates == 0:
                    model.eval()
                    at = dict(step=step, best_loss=best_loss, cursor=cursor, groups=[])
                    saving = runs.saving_first(cfg, run, model, opt, same, **at)
                    with saving, runs.whole(model, reward_model):
                        groups, cursor = next_rollouts(sampler, prompts, cursor, cfg, run)
                    if updates > 1:  # with one update the policy is still the one that sampled
                        groups = add_old_logps(groups, model, cfg, run)
                    if cfg.rollouts_every and step % cfg.rollouts_every < updates:
                        path = Path(cfg.out_dir) / "rollouts" / f"{step}.jsonl"
                        rollouts.write_rollouts(groups, path, run)
                        rollouts.show_rollouts(groups)
                seconds_rollout, start = time.monotonic() - start, time.monotonic()

                # ---- forward, loss, backward
                first = step % cfg.steps_per_generation * cfg.global_bsz
                samples = groups[first : first + cfg.global_bsz]  # the same on every process
                completions = completions_of(samples)
                n_items = max(sum(sum(c["mask"]) for c in completions), 1)
                model.train()
                loss, totals, gap_sum, n_gaps = 0.0, {}, 0.0, 0
                largest_gap = torch.zeros((), device=run.device)
                share = samples[run.rank :: run.world]
                for i, micro_batch in enumerate(runs.chunks(share, cfg.micro_bsz)):
                    forks = fork_groups(micro_batch, run.device)
                    mask, advantages, sampler_logps, old_logps = tensors_of(micro_batch, run.device)
                    ref_logps = None
                    if cfg.beta and reference_model is not None:
                        ref_logps = logps_of(reference_model, forks, cfg)
                    elif cfg.beta:
                        with model.reference():
                            ref_logps = logps_of(model, forks, cfg)
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        scores = score_forks(wrapped, forks, cfg.chunk_len, cfg.temperature)
                        logps = forks.by_row(scores.logps)  # [B, T]
                        before = logps.detach() if old_logps is None else old_logps
                        reported = torch.where(sampler_logps.isnan(), before, sampler_logps)
                        batch_loss, batch_metrics = policy_loss(
                            logps,
                            old_logps,
                            advantages,
                            mask,
                            ref_logps=ref_logps,
                            entropy=forks.by_row(scores.entropy.detach()),
                            sampling_logps=reported if cfg.importance_cap else None,
                            num_items=n_items,
                            num_rows=len(completions),
                            as_tensors=True,
                            **variant,
                        )
                        (batch_loss * run.world).backward()  # DDP averages over processes: x world
                    loss += batch_loss.detach()
                    for name, value in batch_metrics.items():
                        totals[name] = totals.get(name, 0.0) + value
                    was_reported = mask.bool() & ~sampler_logps.isnan()
                    gaps = torch.where(was_reported, (before - reported).abs(), 0.0)
                    gap_sum, n_gaps = gap_sum + gaps.sum(), n_gaps + was_reported.sum()
                    if gaps.numel():
                        largest_gap = torch.maximum(largest_gap, gaps.max())
                grad_norm = runs.clip_gradients(model, cfg.grad_clip or math.inf)
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(
                    run.device, loss, len(signals), overdue, gap_sum, n_gaps, *totals.values()
                )
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, stop, overdue, gap_sum, n_gaps, *sums = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += sum(len(c["tokens"]) for c in completions)
                if done % updates == 0:
                    groups = []  # used up
                largest_gap = max(runs.gather([float(largest_gap)]))

                # ---- save what trains, evaluate, log, save the run
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint, about)
                if done == max_steps or runs.due(done, cfg.eval_every):
                    at = dict(step=done, best_loss=best_loss, cursor=cursor, groups=groups)
                    with runs.saving_first(cfg, run, model, opt, same, **at):
                        values = validate(sampler, val_prompts, cfg, run)
                    watched = -values.get("val_pass@1", -math.inf)
                    best_loss = tune.save_best(model, cfg, run, watched, best_loss, about)
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    values = {
                        **rollouts.rollout_metrics(samples),
                        **dict(zip(totals, sums, strict=True)),
                        "sampling/sampling_logp_difference/mean": gap_sum / max(n_gaps, 1),
                        "sampling/sampling_logp_difference/max": largest_gap,
                        "seconds/rollout": seconds_rollout,
                        "seconds/train": time.monotonic() - start,
                        **values,
                    }
                    metrics.progress(done, max_steps, loss, lr, grad_norm, not_shown, **values)
                if checkpoint or stop or overdue:
                    at = dict(step=done, best_loss=best_loss, cursor=cursor, groups=groups)
                    runs.save_last(cfg, run, model, opt, same, **at)
                    passes = ("val_pass@1", f"val_pass@{cfg.eval_generations}")
                    metrics.plot("reward", *passes, "entropy")
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        runs.finished(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
