"""A reward model: a scalar head on the hidden state of an answer's end token, from preferences.

    pair         - log s(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2
                 s = sigmoid
    K-wise       sum over ranks i of log(sum over j >= i of exp r_j) - r_i, best first
                 (Plackett-Luce; K = 2 is the pair)
    regression   (r - score)^2; of a pair the chosen answer's score is 1, the other's -1, as in
                 rwkv_reward

A sample is a prompt with its answers, and the mean is over prompts. A prompt runs once and its
answers start from its state. With tune=state one trunk serves as policy and as reward model, told
apart by a state of a few MB. What is written is an ordinary model file with one tensor more,
score.weight [1, C], or an adapter or a state with that vector beside it; GRPO and self-rewarding
load it by path. Papers: Bradley-Terry pairs arXiv 1706.03741, 2203.02155; centring 2312.09244.

Data: JSONL of prompt, chosen, rejected (margin), or prompt, responses, scores. Rows longer than
ctx_len are dropped, and counted. LoRA wants about ten times the learning rate.

Usual mistakes: reading the score at a padding token; forgetting that length explains much of it
(accuracy where the chosen answer is the shorter one is reported); more than an epoch or two, which
fits the raters' noise.

    python train_reward.py config/reward_tiny.py                       0.94 of held-out pairs
    python train_reward.py config/reward_1b5.py --tune=lora --lr=1e-4  one GPU
    python train_reward.py --score=answers.jsonl --init_from=out/reward/rwkv-final.pth
                                                                       -> answers.scored.jsonl
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.utils import clip_grad_norm_

from gosling import files, runs, tune
from gosling.batch import score_answers
from gosling.config import Decay, UserError, load_config, print0
from gosling.data import read_jsonl, read_preferences, render_answer
from gosling.engine import load
from gosling.tokenizer import tokenizer_of


@dataclass
class Config:
    # data and model
    data: str = "data/pairs.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    score: str = ""  # do not train: score this JSONL of prompt and completion(s), beside it
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # loss
    loss_type: Literal["ranking", "regression"] = "ranking"  # formulas above
    center_coef: NonNegativeFloat = 0.0  # pulls the sum of a pair's rewards to zero; 0.01 is usual
    # what trains
    tune: Literal["full", "lora", "state", "head"] = "full"  # weights, LoRA, state or scalar head
    lora_r: PositiveInt = 32  # LoRA rank
    lora_alpha: PositiveFloat = 64.0  # LoRA scale: alpha / r
    lora_dropout: Decay = 0.0  # LoRA dropout
    lora_rslora: bool = False  # scale alpha / sqrt(r)
    lora_targets: tuple[str, ...] = ()  # key, att.key, ffn, head …; none = all of att and ffn
    lora_extra: tuple[str, ...] = ()  # more parameters to train, by parts of names: ln, x_ …
    adapter: str = ""  # saved adapter or state to go on from
    # run
    out_dir: str = "out/reward"  # folder for checkpoints, last.pt, config.json and metrics
    resume: bool = False  # go on from out_dir/last.pt
    seed: NonNegativeInt = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    # batch
    micro_bsz: PositiveInt = 4  # samples per process and backward pass: lower it to save memory
    global_bsz: PositiveInt = 32  # samples per optimiser step, over all processes
    ctx_len: PositiveInt = 4096  # longest sample in tokens
    # optimiser
    lr: PositiveFloat = 1e-5  # peak learning rate
    lr_final: NonNegativeFloat = 1e-6  # learning rate at the end of the cosine
    warmup_steps: NonNegativeInt = 10  # steps from 0.01 lr to lr
    max_steps: NonNegativeInt | None = None  # optimiser steps of the whole run; or give epochs
    epochs: PositiveFloat | None = None  # passes over the data; one if neither is given
    weight_decay: NonNegativeFloat = 0.0  # on the large matrices alone
    beta1: Decay = 0.9  # AdamW: of the running mean
    beta2: Decay = 0.99  # AdamW: of the running mean of squares
    adam_eps: PositiveFloat = 1e-18  # AdamW: upstream's value
    grad_clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 = no clipping
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method


def preference_loss(chosen, rejected, *, margin=None, center_coef=0.0):
    """Rewards of pairs, each [B] -> losses [B]."""
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference) + center_coef * (chosen + rejected).square()


def ranking_loss(rewards, scores):
    """Plackett-Luce: rewards [K] of one prompt's answers, scores [K] that rank them -> loss.

    Equal scores rank in the file's order.
    """
    ranks = torch.as_tensor(scores).argsort(descending=True, stable=True)
    r = rewards[ranks]  # [K], the best first
    return (r.flip(0).logcumsumexp(0).flip(0) - r).sum()


def prompt_loss(rewards, row, cfg):
    """rewards [K] of the answers of one data.Preference -> loss"""
    if cfg.loss_type == "regression":
        scores = torch.tensor(row.scores or [1.0, -1.0], device=rewards.device)
        return (rewards - scores).square().mean()
    if row.scores:
        return ranking_loss(rewards, row.scores)
    chosen, rejected = rewards.view(2, 1)
    losses = preference_loss(chosen, rejected, margin=row.margin, center_coef=cfg.center_coef)
    return losses.sum()


def rewards_of(model, rows, device):
    """[data.Preference, …] -> a list of rewards [K] for each: one pass, every prompt once."""
    return score_answers(model, [(row.prompt, row.answers) for row in rows], device)


def best_and_worst(row):
    """Which of a row's answers is the best, which the worst -> their indices."""
    if not row.scores:
        return 0, 1
    return row.scores.index(max(row.scores)), row.scores.index(min(row.scores))


def gaps_of(rewards, rows):
    """Rewards [K] of each row -> [rows]: the best answer's reward minus the worst's."""
    gaps = []
    for r, row in zip(rewards, rows, strict=True):
        best, worst = best_and_worst(row)
        gaps.append(r[best] - r[worst])
    return torch.stack(gaps).detach()


@torch.no_grad()
def evaluate(model, rows, cfg, run):
    """-> {"val_…": number} over all processes, and their two histograms as rewards.png.

    Loss; accuracy, best against worst (a tie is wrong); margin; mean and spread of the rewards;
    accuracy where the chosen answer is the shorter one.
    """
    share = rows[run.rank :: run.world]
    best, worst, shorter, loss = [], [], [], 0.0
    for batch in runs.chunks(share, cfg.micro_bsz):
        for row, rewards in zip(batch, rewards_of(model, batch, run.device), strict=True):
            i, j = best_and_worst(row)
            best.append(rewards[i].item())
            worst.append(rewards[j].item())
            loss += prompt_loss(rewards, row, cfg).item()
            if len(row.answers[i]) < len(row.answers[j]):
                shorter.append(best[-1] > worst[-1])
    n, n_shorter, loss, right_shorter = runs.all_sum(len(share), len(shorter), loss, sum(shorter))
    best, worst = torch.tensor([runs.gather(best), runs.gather(worst)], dtype=torch.float64)
    if run.main:
        plot_rewards(best, worst, Path(cfg.out_dir) / "rewards.png")
    values = {
        "val_loss": loss / n,
        "val_accuracy": (best > worst).double().mean().item(),
        "val_margin": (best - worst).mean().item(),
        "val_mean_reward": torch.cat([best, worst]).mean().item(),
        "val_std_reward": torch.cat([best, worst]).std(correction=0).item(),
    }
    if n_shorter:
        values["val_accuracy_shorter"] = right_shorter / n_shorter
    return values


def plot_rewards(best, worst, path):
    """Histograms of the rewards of chosen and rejected answers."""
    low, high = min(best.min(), worst.min()).item(), max(best.max(), worst.max()).item()
    with files.figure(path) as ax:
        for rewards, label in ((best, "chosen"), (worst, "rejected")):
            ax.hist(rewards.numpy(), bins=40, range=(low, high + 1e-6), alpha=0.6, label=label)
        ax.set_xlabel("reward")
        ax.legend()


# ----------------------------------------------------------------------------------------------
# --score=FILE

ANSWERS = '{"prompt", "completion"} or {"prompt", "completions": [...]}'


def answers_of(row):
    """The texts to score in a row: its completion(s), or a preference's answers."""
    texts = row.get("completions") or row.get("responses")
    if texts is None:
        keys = ("completion", "chosen", "rejected")
        texts = [row[key] for key in keys if key in row]
    if not isinstance(texts, list):
        raise UserError(f'"completions" is a list; got {texts!r:.60}')
    if not texts:
        raise UserError(f"expected a completion; got the keys {sorted(row)}")
    # sample.py batch writes {"text", …} for each
    return [text["text"] if isinstance(text, dict) and "text" in text else text for text in texts]


@torch.no_grad()
def write_scores(cfg, run):
    """Each row of cfg.score gets its "scores" -> FILE.scored.jsonl"""
    if not cfg.init_from:
        raise UserError("which reward model? --init_from=FILE, as train_reward.py wrote it")
    model, tokenizer, _ = load(cfg.init_from, run.device, run.dtype, cfg.tokenizer)
    if model.score is None:
        raise UserError(
            f"{cfg.init_from} has no score.weight: give a reward model of train_reward.py"
        )

    def render(row):
        """-> (the row, prompt_ids, [answer_ids, …])"""
        rendered = [render_answer(row.get("prompt"), text, tokenizer) for text in answers_of(row)]
        return row, rendered[0][0], [answer_ids for _, answer_ids in rendered]

    out, n = Path(cfg.score).with_suffix(".scored.jsonl"), 0
    with files.atomic_write(out) as tmp, open(tmp, "w", encoding="utf-8") as f:
        for _, (row, prompt_ids, answers) in read_jsonl(cfg.score, ANSWERS, render):
            scores = score_answers(model, [(prompt_ids, answers)], run.device)[0].tolist()
            f.write(json.dumps({**row, "scores": scores}, ensure_ascii=False) + "\n")
            n += 1
    print0(f"{out}: {n:,} rows scored")


# ----------------------------------------------------------------------------------------------


def validate(model, val_rows, tokenizer, cfg, run):
    """-> {name: number} on held-out preferences and of cfg.eval_fn."""
    model.eval()
    values = {}
    if val_rows:
        values = evaluate(model, val_rows, cfg, run)
    if cfg.eval_fn is not None:
        values.update(cfg.eval_fn(model, tokenizer))
    return values


def main(cfg):
    with runs.processes(cfg) as run:
        if cfg.score:
            write_scores(cfg, run)
            return

        # ---- model and tokenizer
        model = tune.load_to_tune(cfg, run, score=True)
        tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
        about = tune.origin(cfg, model, tokenizer)

        # ---- data
        rows = read_preferences(cfg.data, tokenizer, cfg.ctx_len)
        val_rows = []
        if cfg.val_data:
            val_rows = read_preferences(cfg.val_data, tokenizer, cfg.ctx_len)
        max_steps, accumulation = runs.plan_steps(cfg, run, len(rows))
        n_answers, epochs = (
            sum(len(row.answers) for row in rows),
            max_steps * cfg.global_bsz / len(rows),
        )
        print0(
            f"data: {len(rows):,} prompts, {n_answers:,} answers; {max_steps:,} steps of "
            f"{cfg.global_bsz} prompts = {epochs:.2f} epochs"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(cfg, model, ctx_len=cfg.ctx_len, prompts=len(rows))
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_loss = resumed.get("step", 0), resumed.get("best_loss", math.inf)
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(model, val_rows, tokenizer, cfg, run)
            best_loss = tune.save_best(model, cfg, run, values.get("val_loss"), best_loss, about)
        metrics.begin(values)

        # ---- the loop
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                samples = [rows[i] for i in runs.samples_of(step, len(rows), cfg, run)]
                n_tokens = sum(len(row.prompt) + sum(map(len, row.answers)) for row in samples)
                model.train()
                loss = right = margin = 0.0
                for i, micro_batch in enumerate(runs.chunks(samples, cfg.micro_bsz)):
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        rewards = rewards_of(wrapped, micro_batch, run.device)  # [K] for each row
                        losses = [
                            prompt_loss(r, row, cfg)
                            for r, row in zip(rewards, micro_batch, strict=True)
                        ]
                        # The mean over the whole batch's prompts is not a mean of means.
                        batch_loss = torch.stack(losses).sum() / cfg.global_bsz
                        (batch_loss * run.world).backward()  # DDP averages over processes: x world
                    gaps = gaps_of(rewards, micro_batch)
                    loss += batch_loss.detach()
                    right += (gaps > 0).sum() / cfg.global_bsz
                    margin += gaps.sum() / cfg.global_bsz
                grad_norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                loss, right, margin, stop, n_tokens = runs.all_sum(
                    loss, right, margin, len(signals), n_tokens
                )
                runs.check_finite(cfg, step, loss, grad_norm)
                opt.step()
                opt.zero_grad()
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- evaluate, log, save
                if done == max_steps or runs.due(done, cfg.eval_every):
                    values = validate(model, val_rows, tokenizer, cfg, run)
                    best_loss = tune.save_best(
                        model, cfg, run, values.get("val_loss"), best_loss, about
                    )
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    values = {"accuracy": right, "margin": margin, **values}
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint, about)
                if checkpoint or stop:
                    runs.save_last(cfg, run, model, opt, same, step=done, best_loss=best_loss)
                    metrics.plot("loss", "val_loss", "accuracy", "val_accuracy")
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        runs.finished(cfg, metrics, max_steps, "*-final.*", *(["rewards.png"] if val_rows else []))


if __name__ == "__main__":
    main(load_config(Config))
