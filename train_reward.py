"""A reward model: a scalar head on the hidden state of an answer's end token, trained on preferences or on scores.

    pair     - log s(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2          s = sigmoid
    K-wise   sum over ranks i of log(sum over j >= i of exp r_j) - r_i, best first (Plackett-Luce; K = 2 is the pair)
    regression   (r - score)^2; of a pair the chosen answer's score is 1, the other's -1, as in rwkv_reward

The mean is over prompts. A prompt runs once and its answers start from its state. With tune=state one trunk serves as
policy and as reward model, told apart by a state of a few MB. What is written is an ordinary model file with one tensor
more, score.weight [1, C], or an adapter or a state with that vector beside it; GRPO and self-rewarding load it by path.
Papers: Bradley-Terry pairs arXiv 1706.03741, 2203.02155; centring arXiv 2312.09244.

Usual mistakes: reading the score at a padding token; forgetting that length explains much of it (accuracy where the
chosen answer is the shorter one is reported); more than an epoch or two, which fits the raters' noise.

    python train_reward.py config/reward_tiny.py                                         a laptop: 0.87 of held-out pairs
    python train_reward.py config/reward_1b5.py --tune=lora --lr=1e-4                    one GPU
    python train_reward.py --score=answers.jsonl --init_from=out/reward/rwkv-final.pth   -> answers.scored.jsonl
"""
import dataclasses
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.nn.functional as F

import common
import prepare
from common import UserError, load_config, print0
from model import fork, forked, load_model, load_to_tune


@dataclass
class Config:
    # data
    data: str = "data/pairs.jsonl"   # JSONL of prompt, chosen, rejected (margin), or prompt, responses, scores
    val_data: str = ""               # the same for validation; empty = none
    tokenizer: str = ""              # name or file; empty = what the model's folder says, or World if it has 65536 ids
    score: str = ""                  # do not train: write the scores of this JSONL of prompt and completion(s) beside it
    # method
    loss_type: Literal["ranking", "regression"] = "ranking"  # pairs and K-wise ranks, or the scores themselves
    center_coef: float = 0.0         # pulls the sum of a pair's rewards to zero; 0.01 is usual
    # model
    init_from: str = ""              # weights to start from (.pth, .safetensors); with --score the reward model
    tune: Literal["full", "lora", "state", "head"] = "full"  # every weight, an adapter, the start state, or the head alone
    lora_r: int = 32                 # LoRA rank
    lora_alpha: float = 64.0         # LoRA scale: alpha / r
    lora_dropout: float = 0.0        # LoRA dropout
    lora_rslora: bool = False        # scale alpha / sqrt(r)
    lora_targets: tuple[str, ...] = ()  # matrices: key, att.key, ffn …; none = all of att and ffn
    lora_extra: tuple[str, ...] = ()  # further parameters to train, by parts of their names: ln, x_ …
    adapter: str = ""                # saved adapter or state to go on from
    # run
    out_dir: str = "out/reward"      # folder for weights or adapters, last.pt, config.json, metrics
    resume: bool = False             # go on from out_dir/last.pt
    seed: int = 42                   # of the data order and of a fresh adapter
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto = bfloat16 on CUDA, else float32
    # batch
    micro_bsz: int = 4               # prompts per process and backward pass: lower it when memory runs out
    global_bsz: int = 32             # prompts per optimiser step, over all processes; accumulation follows from it
    ctx_len: int = 4096              # longest prompt and answer in tokens; longer rows are dropped, and counted
    # optimiser
    lr: float = 1e-5                 # peak learning rate; LoRA wants about ten times more
    lr_final: float = 1e-6           # learning rate at the end of the cosine
    warmup_steps: int = 10           # steps from 0.01 lr to lr
    max_steps: int | None = None     # optimiser steps of the whole run; or give epochs
    epochs: float | None = None      # passes over the data; one if neither is given
    weight_decay: float = 0.0        # on the large matrices alone
    beta1: float = 0.9               # AdamW
    beta2: float = 0.99              # AdamW
    adam_eps: float = 1e-18          # AdamW; upstream's value
    grad_clip: float = 1.0           # largest gradient norm; 0 = no clipping
    grad_cp: bool = False            # gradient checkpointing: less memory, about a third more time
    # evaluation, saving, logging
    eval_every: int = 100            # steps between validations; 0 = at the end only
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}; a function in the config file
    save_every: int = 500            # steps between checkpoints; 0 = at the end only
    log_every: int = 10              # steps between progress lines
    keep_last: int = 2               # rwkv-<step>.pth, lora-<step>.safetensors or state-<step>.pth to keep; 0 = all
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl and metrics.png


# ---------------------------------------------------------------------------------------------------------------------
# the method

def preference_loss(chosen, rejected, *, margin=None, center_coef=0.0):
    """Rewards of pairs, each [B] -> losses [B]."""
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + center_coef * (chosen + rejected).square()


def ranking_loss(rewards, scores):
    """Plackett-Luce: rewards [K] of one prompt's answers, scores [K] that rank them -> loss. Equal scores: file order."""
    r = rewards[torch.as_tensor(scores).argsort(descending=True, stable=True)]
    return (r.flip(0).logcumsumexp(0).flip(0) - r).sum()


def row_loss(rewards, row, cfg):
    """rewards [K] of the answers of one prepare.Preference -> loss"""
    if cfg.loss_type == "regression":
        return (rewards - torch.tensor(row.scores or [1.0, -1.0], device=rewards.device)).square().mean()
    if row.scores:
        return ranking_loss(rewards, row.scores)
    return preference_loss(*rewards.view(2, 1), margin=row.margin, center_coef=cfg.center_coef).sum()


def rewards_of(model, rows, device):
    """[Preference, …] -> a list of rewards [K] for each: all in one pass, every prompt once."""
    forks = fork([(row.prompt, row.answers) for row in rows], device, whole=True)
    return forked(model, forks, score=True).split([len(row.answers) for row in rows])


def pair_of(row):
    """Which of a row's answers is the best, which the worst."""
    return (row.scores.index(max(row.scores)), row.scores.index(min(row.scores))) if row.scores else (0, 1)


@torch.no_grad()
def evaluate(model, rows, cfg, run, picture=None):
    """{"val_…": number} over all processes: loss; accuracy, best against worst (a tie is wrong); margin; mean and spread of
    the rewards; accuracy where the chosen answer is the shorter one. picture: a file for both histograms."""
    mine, best, worst, loss, shorter = rows[run.rank::run.world], [], [], 0.0, []
    for i in range(0, len(mine), cfg.micro_bsz):
        batch = mine[i:i + cfg.micro_bsz]
        for row, rewards in zip(batch, rewards_of(model, batch, run.device)):
            a, b = pair_of(row)
            best.append(rewards[a].item())
            worst.append(rewards[b].item())
            loss += row_loss(rewards, row, cfg).item()
            if len(row.answers[a]) < len(row.answers[b]):
                shorter.append(best[-1] > worst[-1])
    every = best + worst
    n, n_short, loss, right, right_short, margin, total, squares = common.all_sum(
        len(mine), len(shorter), loss, sum(x > y for x, y in zip(best, worst)), sum(shorter),
        sum(best) - sum(worst), sum(every), sum(x * x for x in every))
    mean = total / (2 * n)
    if picture:
        best, worst = common.gather(best), common.gather(worst)
    if picture and run.main:
        plot_histograms(best, worst, picture)
    return {"val_loss": loss / n, "val_accuracy": right / n, "val_margin": margin / n, "val_mean_reward": mean,
            "val_std_reward": math.sqrt(max(squares / (2 * n) - mean ** 2, 0.0)),
            **({"val_accuracy_shorter": right_short / n_short} if n_short else {})}


def plot_histograms(best, worst, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    low, high = min(best + worst), max(best + worst) + 1e-6
    for values, label in ((best, "chosen"), (worst, "rejected")):
        ax.hist(values, bins=40, range=(low, high), alpha=0.6, label=label)
    ax.set_xlabel("reward")
    ax.legend()
    with common.atomic_write(path) as tmp:
        fig.savefig(tmp, format="png", dpi=120, bbox_inches="tight")
    plt.close(fig)


@torch.no_grad()
def write_scores(cfg, run):
    """`--score FILE`: each row of prompt and "completion" or "completions" (or a preference's answers) gets its "scores"."""
    if not cfg.init_from:
        raise UserError("which reward model? --init_from=FILE, as train_reward.py wrote it")
    model, about = load_model(cfg.init_from, run.device, run.dtype)
    model.eval()
    if model.score is None:
        raise UserError(f"{cfg.init_from} has no score.weight: give a reward model, as train_reward.py writes it")
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer, about)
    out = Path(cfg.score).with_suffix(".scored.jsonl")
    with common.atomic_write(out) as tmp, open(tmp, "w") as f:
        n = 0
        for where, row in prepare.read_jsonl(cfg.score, '{"prompt", "completion"} or {"prompt", "completions": [...]}'):
            texts = row.get("completions") or row.get("responses") or [
                row[k] for k in ("completion", "chosen", "rejected") if k in row]
            try:
                if not isinstance(texts, list):
                    raise UserError(f'"completions" is a list; got {texts!r:.60}')
                texts = [text["text"] if isinstance(text, dict) and "text" in text else text for text in texts]  # sample.py batch's
                rendered = [prepare.render_answer(row.get("prompt"), text, tokenizer) for text in texts]
                if not rendered:
                    raise UserError(f"expected a completion; got the keys {sorted(row)}")
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
            group = prepare.Preference(rendered[0][0], [answer for _, answer in rendered], None)
            f.write(json.dumps({**row, "scores": rewards_of(model, [group], run.device)[0].tolist()}, ensure_ascii=False) + "\n")
            n += 1
    print0(f"{out}: {n:,} rows scored")


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    run = common.start(cfg)
    try:
        (write_scores if cfg.score else train)(cfg, run)
    finally:
        common.finish(run)


def train(cfg, run):
    # ---- model and tokenizer
    model = load_to_tune(cfg, run, score=True)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    arch, about = dataclasses.asdict(model.config), common.origin(cfg, model, tokenizer)

    # ---- data
    data, val = (prepare.read_preferences(path, tokenizer, cfg.ctx_len) if path else None for path in (cfg.data, cfg.val_data))
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(f"data: {len(data):,} prompts, {sum(len(row.answers) for row in data):,} answers; {max_steps:,} steps of "
           f"{cfg.global_bsz} prompts = {max_steps * cfg.global_bsz / len(data):.2f} epochs")

    # ---- a new run, or on from last.pt
    out, trained = Path(cfg.out_dir), {name: p for name, p in model.named_parameters() if p.requires_grad}
    same = dict(architecture=arch, data_order=dict(seed=cfg.seed, ctx_len=cfg.ctx_len, global_bsz=cfg.global_bsz,
                                                   prompts=len(data)))
    last = common.resume(cfg, trained, opt, same)
    step0, best = last.get("step", 0), last.get("best", math.inf)
    common.open_out_dir(cfg, run, arch=arch, tokenizer=lambda: prepare.save_tokenizer(tokenizer, out), max_steps=max_steps)
    metrics = common.Metrics(cfg, run, from_step=step0)

    def save(step, name=None):
        if run.main:
            if name:
                path = model.save_tuned(out, name, run.dtype, **about)
                common.prune(out, f"{path.stem.split('-')[0]}-*{path.suffix}", cfg.keep_last)
            common.save_last(cfg, step, trained, opt, same, best=best)
        metrics.plot("loss", "val_loss", "accuracy", "val_accuracy")

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        nonlocal best
        model.eval()
        values = evaluate(model, val, cfg, run, out / "rewards.png") if val else {}
        if cfg.eval_fn is not None:
            values.update(cfg.eval_fn(model, tokenizer))
        if values.get("val_loss", math.inf) < best:
            best = values["val_loss"]
            if run.main:
                model.save_tuned(out, "best", run.dtype, **about)
        return values

    # ---- the loop
    if step0 == 0 and (values := validate()):
        metrics.log(0, **values)
        print0("before: " + " | ".join(f"{k} {v:.4f}" for k, v in values.items()))
    wrapped, no_sync = common.wrap(model, run)
    metrics.t0 = time.time()
    with common.catch_signals() as signals:
        for step in range(step0, max_steps):
            lr = common.lr_at(step, cfg.lr, cfg.lr_final, cfg.warmup_steps, max_steps)
            common.set_lr(opt, lr)

            samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)[run.rank::run.world]
            batch = [data[i] for i in common.shuffled(samples, len(data), cfg.seed)]
            loss = right = margin = 0.0
            model.train()
            for i in range(accumulation):
                rows = batch[i * cfg.micro_bsz:(i + 1) * cfg.micro_bsz]
                with nullcontext() if i == accumulation - 1 else no_sync():
                    rewards = rewards_of(wrapped, rows, run.device)
                    # the mean over the whole batch's prompts; x world because DDP averages gradients
                    now = sum(row_loss(r, row, cfg) for r, row in zip(rewards, rows)) / cfg.global_bsz
                    (now * run.world).backward()
                gaps = torch.stack([r[a] - r[b] for r, row in zip(rewards, rows) for a, b in [pair_of(row)]]).detach()
                loss, right, margin = loss + now.detach(), right + (gaps > 0).sum(), margin + gaps.sum()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, right, margin, stop, n_tokens = common.all_sum(
                loss, right, margin, len(signals), sum(len(row.prompt) + sum(map(len, row.answers)) for row in batch))
            common.check_finite(cfg, step, loss, grad_norm)
            opt.step()
            opt.zero_grad()
            done, values = step + 1, {}
            metrics.tokens += n_tokens

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                metrics.progress(done, max_steps, loss=loss, lr=lr, grad_norm=grad_norm, accuracy=right / cfg.global_bsz,
                                 margin=margin / cfg.global_bsz, **values)
            if done == max_steps:
                save(done, "final")
            elif cfg.save_every and done % cfg.save_every == 0:
                save(done, str(done))
            if stop and done < max_steps:
                save(done)
                common.stopped(cfg, done, max_steps)
    if step0 >= max_steps:
        print0(f"{out} is already at step {step0} of {max_steps}; give a larger --max_steps to go on")
        return
    print0(f"done in {common.duration(time.time() - metrics.t0)}: {out}/*-final.*, {out / 'metrics.png'}"
           + f", {out / 'rewards.png'}" * bool(val))


if __name__ == "__main__":
    main(load_config(Config))
