"""A reward model: a scalar head on the hidden state of an answer's end token.

    ranking      - log s(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2
                 of a pair; s = sigmoid (Bradley-Terry)
                 sum over ranks i of log(sum over j >= i of exp r_j) - r_i
                 of K scored answers, best first (Plackett-Luce; K = 2 is the pair)
    regression   (r - score)^2; of a pair the chosen answer's score is 1, the other's -1, as in
                 rwkv_reward

The mean is over prompts. A prompt runs once and its answers start from its state. With tune=state
one trunk serves as policy and as reward model, told apart by a state of a few MB. What is written
is an ordinary model file with one tensor more, score.weight [1, C], or an adapter or a state with
that vector beside it; GRPO and self-rewarding load it by its path. Papers: Bradley-Terry pairs
arXiv 1706.03741, 2203.02155; centring arXiv 2312.09244.

Data: JSONL of prompt, chosen, rejected (and margin), or of prompt, responses, scores; a sample is a
prompt. Rows longer than ctx_len are dropped, and counted. With --score=FILE nothing is trained: the
rows of FILE, a prompt with a completion or completions each, are written beside it with the scores
that the reward model in init_from gives them.

Usual mistakes: reading the score at a padding token; forgetting that length explains much of it
(accuracy where the chosen answer is the shorter one is reported); more than an epoch or two, which
fits the raters' noise.

    python train_reward.py config/reward_tiny.py                        a laptop: 0.94 of pairs
    python train_reward.py config/reward_1b5.py --tune=lora --lr=1e-4   one GPU
    python train_reward.py --score=answers.jsonl --init_from=out/reward/rwkv-final.pth
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gosling import engine, runs, tune
from gosling.batch import score_answers
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0
from gosling.data import read_preferences, render_answers
from gosling.files import figure, write_jsonl
from gosling.rows import read_rows
from gosling.tokenizer import tokenizer_of

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class Config:
    # data and model
    data: str = "data/pairs.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    skip_bad: bool = False  # leave out and count rows that cannot be read
    score: str = ""  # do not train: write this JSONL of prompts and completions with their scores
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
    another_base: bool = False  # an adapter or state of another base than this is meant
    # run
    out_dir: str = "out/reward"  # folder for checkpoints, last.pt, config.json and metrics
    resume: bool | Literal["auto"] = False  # go on from out_dir/last.pt; auto: if there is one
    seed: Seed = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    hang_minutes: PositiveFloat = 60.0  # longest wait of processes for one another
    shard: Literal["none", "fsdp"] = "none"  # several processes: all weights in each, or a share
    cpu_offload: bool = False  # fsdp: the shares lie in main memory, and AdamW runs there
    gather: Literal["auto", "all", "block"] = "auto"  # fsdp: to sample, all weights or by block
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
    optim: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in a quarter of the memory
    step_in_backward: bool = False  # one gradient in memory at a time; wants grad_clip=0
    grad_cp: bool = False  # gradient checkpointing: less memory, about a third more time
    compile: bool = False  # blocks through torch.compile: minutes at first, then faster steps
    # evaluation, saving, logging
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
# the method


def preference_loss(chosen, rejected, *, margin=None, center_coef=0.0):
    """Rewards of pairs, each [B] -> losses [B]; margin: a number or [B]."""
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference) + center_coef * (chosen + rejected).square()


def ranking_loss(rewards, scores):
    """Plackett-Luce: rewards [K] of one prompt's answers, K scores that rank them -> loss.

    Each answer is chosen from itself and all that score less, so equal scores teach nothing about
    each other. Without ties this is the likelihood of the ranking.
    """
    scores = torch.tensor(scores, dtype=torch.float64)  # in float32 near ones would be equal
    itself = torch.eye(len(scores), dtype=torch.bool)
    choices = itself | (scores < scores[:, None])  # [K, K]: row i has what answer i is chosen from
    choices = choices.to(rewards.device)
    chosen_from = rewards.expand_as(choices).masked_fill(~choices, -math.inf)
    return (chosen_from.logsumexp(1) - rewards).sum()


def row_loss(rewards, row, cfg):
    """rewards [K] of the answers of one data.Preference -> loss"""
    if cfg.loss_type == "regression":
        targets = torch.tensor(row.scores or [1.0, -1.0], device=rewards.device)
        return (rewards - targets).square().mean()
    if row.scores:
        return ranking_loss(rewards, row.scores)
    chosen, rejected = rewards
    return preference_loss(chosen, rejected, margin=row.margin, center_coef=cfg.center_coef)


def best_and_worst(row):
    """Which of a row's answers is the best, and which the worst."""
    if row.scores:
        return row.scores.index(max(row.scores)), row.scores.index(min(row.scores))
    return 0, 1


def gap(rewards, row):
    """rewards [K] of a row's answers -> the best answer's less the worst's"""
    best, worst = best_and_worst(row)
    return rewards[best] - rewards[worst]


@torch.no_grad()
def evaluate(model, rows, cfg, run):
    """{"val_...": number} on held-out rows, over all processes; rewards.png has the histograms.

    Loss; accuracy, best answer against worst (a tie is wrong), and the same where the best one is
    the shorter; their margin; mean and standard deviation of both rewards.
    """
    best, worst, right_when_shorter, loss = [], [], [], 0.0
    share = rows[run.rank :: run.world]
    for batch in runs.chunks(share, cfg.micro_bsz):
        groups = [(row.prompt, row.answers) for row in batch]
        for row, rewards in zip(batch, score_answers(model, groups, run.device), strict=True):
            a, b = best_and_worst(row)
            best.append(rewards[a].item())
            worst.append(rewards[b].item())
            loss += row_loss(rewards, row, cfg).item()
            if len(row.answers[a]) < len(row.answers[b]):
                right_when_shorter.append(best[-1] > worst[-1])
    n_right = sum(x > y for x, y in zip(best, worst, strict=True))
    both = best + worst
    n, n_shorter, n_right_shorter, n_right, loss, margin, total, squares = runs.all_sum(
        len(share),
        len(right_when_shorter),
        sum(right_when_shorter),
        n_right,
        loss,
        sum(best) - sum(worst),
        sum(both),
        sum(x * x for x in both),
    )
    draw_rewards(cfg, run, runs.gather(best), runs.gather(worst))
    mean = total / (2 * n)
    values = {
        "val_loss": loss / n,
        "val_accuracy": n_right / n,
        "val_margin": margin / n,
        "val_mean_reward": mean,
        "val_std_reward": math.sqrt(max(squares / (2 * n) - mean**2, 0.0)),
    }
    if n_shorter:
        values["val_accuracy_shorter"] = n_right_shorter / n_shorter
    return values


def draw_rewards(cfg, run, best, worst):
    """rewards.png: histograms of the rewards of best and of worst answers, lists of numbers."""
    if not run.main:
        return
    lowest, highest = min(best + worst), max(best + worst)
    with figure(Path(cfg.out_dir) / "rewards.png") as ax:
        for values, label in ((best, "chosen"), (worst, "rejected")):
            ax.hist(values, bins=40, range=(lowest, highest + 1e-6), alpha=0.6, label=label)
        ax.set_xlabel("reward")
        ax.legend()


# ----------------------------------------------------------------------------------------------
# --score: what a trained reward model says

COMPLETIONS = '{"prompt", "completion"} or {"prompt", "completions": [...]}'


def answers_of(row):
    """[text or messages] of a row of COMPLETIONS, of sample.py batch or of preferences."""
    texts = row.get("completions") or row.get("responses")
    if not texts:
        texts = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    if not isinstance(texts, list):
        raise UserError(f'"completions" is a list; got {texts!r:.60}')
    if not texts:
        raise UserError(f"expected a completion; got the keys {sorted(row)}")
    answers = []
    for text in texts:
        is_sampled = isinstance(text, dict) and "text" in text  # of sample.py batch
        answers.append(text["text"] if is_sampled else text)
    return answers


@torch.no_grad()
def write_scores(cfg, run):
    """Each row of cfg.score with its answers' "scores", as <name>.scored.jsonl beside it.

    An answer that is empty has no score: None.
    """
    if not cfg.init_from:
        raise UserError("which reward model? --init_from=FILE, as train_reward.py wrote it")
    model, tokenizer, _ = engine.load(
        cfg.init_from, run.device, run.dtype, cfg.tokenizer, cfg.another_base
    )
    if model.score is None:
        raise UserError(
            f"{cfg.init_from} has no score.weight: give a reward model, as train_reward.py "
            "writes it"
        )

    def render(row):
        answers = answers_of(row)
        is_empty = [isinstance(answer, str) and not answer.strip() for answer in answers]
        there = [answer for answer, empty in zip(answers, is_empty, strict=True) if not empty]
        group = render_answers(row.get("prompt"), there, tokenizer) if there else None
        return row, is_empty, group

    scored = []
    for _, (row, is_empty, group) in read_rows(cfg.score, COMPLETIONS, render, cfg.skip_bad):
        scores = iter(score_answers(model, [group], run.device)[0].tolist() if group else ())
        scored.append({**row, "scores": [None if empty else next(scores) for empty in is_empty]})
    out = Path(cfg.score).with_suffix(".scored.jsonl")
    write_jsonl(out, scored)
    print0(f"{out}: {len(scored):,} rows scored")


# ----------------------------------------------------------------------------------------------


def validate(model, val_rows, tokenizer, cfg, run):
    """-> {name: number} on held-out rows and of cfg.eval_fn."""
    model.eval()
    with runs.whole(model):
        values = {}
        if val_rows:
            values = evaluate(model, val_rows, cfg, run)
        values.update(runs.call_eval_fn(cfg, model, tokenizer))
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
        rows = read_preferences(cfg.data, tokenizer, cfg.ctx_len, cfg.skip_bad)
        val_rows = []
        if cfg.val_data:
            val_rows = read_preferences(cfg.val_data, tokenizer, cfg.ctx_len, cfg.skip_bad)
        max_steps, accumulation = runs.plan_steps(cfg, run, len(rows))
        n_answers = sum(len(row.answers) for row in rows)
        epochs = max_steps * cfg.global_bsz / len(rows)
        print0(
            f"data: {len(rows):,} prompts, {n_answers:,} answers; "
            f"{max_steps:,} steps of {cfg.global_bsz} prompts = {epochs:.2f} epochs"
        )

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(cfg, model, prompts=len(rows))
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
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                samples = [rows[i] for i in runs.samples_of(step, len(rows), cfg, run)]
                n_tokens = sum(len(row.prompt) + sum(map(len, row.answers)) for row in samples)
                model.train()
                loss = n_right = margin = 0.0
                for i, micro_batch in enumerate(runs.chunks(samples, cfg.micro_bsz)):
                    groups = [(row.prompt, row.answers) for row in micro_batch]
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        rewards = score_answers(wrapped, groups, run.device)  # [K] of each row
                        rated = list(zip(rewards, micro_batch, strict=True))
                        losses = [row_loss(r, row, cfg) for r, row in rated]
                        batch_loss = sum(losses) / cfg.global_bsz
                        (batch_loss * run.world).backward()  # DDP averages over processes: x world
                    gaps = torch.stack([gap(r, row) for r, row in rated]).detach()  # [B]
                    loss += batch_loss.detach()
                    n_right += (gaps > 0).sum()
                    margin += gaps.sum()
                grad_norm = runs.clip_gradients(model, cfg.grad_clip or math.inf)
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(
                    run.device, loss, n_right, margin, n_tokens, len(signals), overdue
                )
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, n_right, margin, n_tokens, stop, overdue = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- save what trains, evaluate, log, save the run
                checkpoint = runs.checkpoint_name(cfg, done, max_steps)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint, about)
                if done == max_steps or runs.due(done, cfg.eval_every):
                    at = dict(step=done, best_loss=best_loss)
                    with runs.saving_first(cfg, run, model, opt, same, **at):
                        values = validate(model, val_rows, tokenizer, cfg, run)
                    best_loss = tune.save_best(
                        model, cfg, run, values.get("val_loss"), best_loss, about
                    )
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    means = dict(accuracy=n_right / cfg.global_bsz, margin=margin / cfg.global_bsz)
                    values = {**means, **values}
                    metrics.progress(done, max_steps, loss, lr, grad_norm, **values)
                if checkpoint or stop or overdue:
                    runs.save_last(cfg, run, model, opt, same, step=done, best_loss=best_loss)
                    metrics.plot("loss", "val_loss", "accuracy", "val_accuracy")
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        pictures = ["rewards.png"] if val_rows else []
        runs.finished(cfg, metrics, max_steps, "*-final.*", *pictures)


if __name__ == "__main__":
    main(load_config(Config))
