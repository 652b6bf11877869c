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

    python train_reward.py config/reward_tiny.py                                         a laptop: 0.94 of held-out pairs
    python train_reward.py config/reward_1b5.py --tune=lora --lr=1e-4                    one GPU
    python train_reward.py --score=answers.jsonl --init_from=out/reward/rwkv-final.pth   -> answers.scored.jsonl
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import common
import prepare
from common import UserError, load_config, print0
from model import fork, forked, load_model, load_to_tune


@dataclass
class Config(common.TuneConfig):
    data: str = "data/pairs.jsonl"  # JSONL of prompt, chosen, rejected (margin), or prompt, responses, scores
    score: str = (
        ""  # do not train: write the scores of this JSONL of prompt and completion(s) beside it
    )
    loss_type: Literal["ranking", "regression"] = (
        "ranking"  # pairs and K-wise ranks, or the scores themselves
    )
    center_coef: float = 0.0  # pulls the sum of a pair's rewards to zero; 0.01 is usual
    init_from: str = ""  # weights to start from (.pth, .safetensors); with --score the reward model
    tune: Literal["full", "lora", "state", "head"] = (
        "full"  # every weight, an adapter, the start state, or the head alone
    )
    lora_targets: tuple[str, ...] = ()  # matrices: key, att.key, ffn …; none = all of att and ffn
    out_dir: str = "out/reward"  # folder for weights or adapters, last.pt, config.json, metrics
    micro_bsz: int = 4  # prompts per process and backward pass: lower it when memory runs out
    global_bsz: int = (
        32  # prompts per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 4096  # longest prompt and answer in tokens; longer rows are dropped, and counted
    lr: float = 1e-5  # peak learning rate; LoRA wants about ten times more
    lr_final: float = 1e-6  # learning rate at the end of the cosine


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
        return (
            (rewards - torch.tensor(row.scores or [1.0, -1.0], device=rewards.device))
            .square()
            .mean()
        )
    if row.scores:
        return ranking_loss(rewards, row.scores)
    return preference_loss(
        *rewards.view(2, 1), margin=row.margin, center_coef=cfg.center_coef
    ).sum()


def rewards_of(model, rows, device):
    """[Preference, …] -> a list of rewards [K] for each: all in one pass, every prompt once."""
    forks = fork([(row.prompt, row.answers) for row in rows], device, whole=True)
    return forked(model, forks, score=True).split([len(row.answers) for row in rows])


def pair_of(row):
    """Which of a row's answers is the best, which the worst."""
    return (
        (row.scores.index(max(row.scores)), row.scores.index(min(row.scores)))
        if row.scores
        else (0, 1)
    )


@torch.no_grad()
def evaluate(model, rows, cfg, run, picture=None):
    """{"val_…": number} over all processes: loss; accuracy, best against worst (a tie is wrong); margin; mean and spread of
    the rewards; accuracy where the chosen answer is the shorter one. picture: a file for both histograms."""
    mine, best, worst, loss, shorter = rows[run.rank :: run.world], [], [], 0.0, []
    for batch in common.chunks(mine, cfg.micro_bsz):
        for row, rewards in zip(batch, rewards_of(model, batch, run.device)):
            a, b = pair_of(row)
            best.append(rewards[a].item())
            worst.append(rewards[b].item())
            loss += row_loss(rewards, row, cfg).item()
            if len(row.answers[a]) < len(row.answers[b]):
                shorter.append(best[-1] > worst[-1])
    every = best + worst
    n, n_short, loss, right, right_short, margin, total, squares = common.all_sum(
        len(mine),
        len(shorter),
        loss,
        sum(x > y for x, y in zip(best, worst)),
        sum(shorter),
        sum(best) - sum(worst),
        sum(every),
        sum(x * x for x in every),
    )
    mean = total / (2 * n)
    if picture:
        best, worst = common.gather(best), common.gather(worst)
    if picture and run.main:
        with common.figure(picture) as ax:
            for values, label in ((best, "chosen"), (worst, "rejected")):
                ax.hist(
                    values,
                    bins=40,
                    range=(min(best + worst), max(best + worst) + 1e-6),
                    alpha=0.6,
                    label=label,
                )
            ax.set_xlabel("reward")
            ax.legend()
    return {
        "val_loss": loss / n,
        "val_accuracy": right / n,
        "val_margin": margin / n,
        "val_mean_reward": mean,
        "val_std_reward": math.sqrt(max(squares / (2 * n) - mean**2, 0.0)),
        **({"val_accuracy_shorter": right_short / n_short} if n_short else {}),
    }


@torch.no_grad()
def write_scores(cfg, run):
    """`--score FILE`: each row of prompt and "completion" or "completions" (or a preference's answers) gets its "scores"."""
    if not cfg.init_from:
        raise UserError("which reward model? --init_from=FILE, as train_reward.py wrote it")
    model, about = load_model(cfg.init_from, run.device, run.dtype)
    model.eval()
    if model.score is None:
        raise UserError(
            f"{cfg.init_from} has no score.weight: give a reward model, as train_reward.py writes it"
        )
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer, about)
    out = Path(cfg.score).with_suffix(".scored.jsonl")
    with common.atomic_write(out) as tmp, open(tmp, "w") as f:
        n = 0
        for where, row in prepare.read_jsonl(
            cfg.score, '{"prompt", "completion"} or {"prompt", "completions": [...]}'
        ):
            texts = (
                row.get("completions")
                or row.get("responses")
                or [row[k] for k in ("completion", "chosen", "rejected") if k in row]
            )
            try:
                if not isinstance(texts, list):
                    raise UserError(f'"completions" is a list; got {texts!r:.60}')
                texts = [
                    t["text"] if isinstance(t, dict) and "text" in t else t for t in texts
                ]  # sample.py batch's
                rendered = [
                    prepare.render_answer(row.get("prompt"), text, tokenizer) for text in texts
                ]
                if not rendered:
                    raise UserError(f"expected a completion; got the keys {sorted(row)}")
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
            group = prepare.Preference(rendered[0][0], [answer for _, answer in rendered], None)
            f.write(
                json.dumps(
                    {**row, "scores": rewards_of(model, [group], run.device)[0].tolist()},
                    ensure_ascii=False,
                )
                + "\n"
            )
            n += 1
    print0(f"{out}: {n:,} rows scored")


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    if cfg.score:
        return write_scores(cfg, run)

    # ---- model and tokenizer
    model = load_to_tune(cfg, run, score=True)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    out, about = Path(cfg.out_dir), common.origin(cfg, model, tokenizer)

    # ---- data
    data, val = (
        prepare.read_preferences(path, tokenizer, cfg.ctx_len) if path else None
        for path in (cfg.data, cfg.val_data)
    )
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(data):,} prompts, {sum(len(row.answers) for row in data):,} answers; {max_steps:,} steps of "
        f"{cfg.global_bsz} prompts = {max_steps * cfg.global_bsz / len(data):.2f} epochs"
    )

    # ---- a new run, or on from last.pt
    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        data_order=dict(ctx_len=cfg.ctx_len, prompts=len(data)),
        kept=dict(best=math.inf),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, out),
        about=about,
        plot=("loss", "val_loss", "accuracy", "val_accuracy"),
    )

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        model.eval()
        values = evaluate(model, val, cfg, run, out / "rewards.png") if val else {}
        if cfg.eval_fn is not None:
            values.update(cfg.eval_fn(model, tokenizer))
        if values.get("val_loss", math.inf) < kept["best"]:
            kept["best"] = values["val_loss"]
            write("best")
        return values

    # ---- the loop
    metrics.begin(validate() if metrics.from_step == 0 else {})
    wrapped, no_sync = common.wrap(model, run)
    with common.catch_signals() as signals:
        for step in range(metrics.from_step, max_steps):
            lr = common.set_lr(opt, cfg, step, max_steps)
            batch = [data[i] for i in common.samples_of(step, len(data), cfg, run)]
            loss = right = margin = 0.0
            model.train()
            for i, rows in enumerate(common.chunks(batch, cfg.micro_bsz)):
                with nullcontext() if i == accumulation - 1 else no_sync():
                    rewards = rewards_of(wrapped, rows, run.device)
                    # the mean over the whole batch's prompts; x world because DDP averages gradients
                    now = (
                        sum(row_loss(r, row, cfg) for r, row in zip(rewards, rows)) / cfg.global_bsz
                    )
                    (now * run.world).backward()
                gaps = torch.stack(
                    [r[a] - r[b] for r, row in zip(rewards, rows) for a, b in [pair_of(row)]]
                ).detach()
                loss, right, margin = (
                    loss + now.detach(),
                    right + (gaps > 0).sum(),
                    margin + gaps.sum(),
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, right, margin, stop, n_tokens = common.all_sum(
                loss,
                right,
                margin,
                len(signals),
                sum(len(row.prompt) + sum(map(len, row.answers)) for row in batch),
            )
            common.check_finite(cfg, step, loss, grad_norm)
            opt.step()
            opt.zero_grad()
            done, values = step + 1, {}
            metrics.tokens += n_tokens

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                metrics.progress(
                    done,
                    max_steps,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm,
                    accuracy=right / cfg.global_bsz,
                    margin=margin / cfg.global_bsz,
                    **values,
                )
            common.end_step(cfg, save, done, max_steps, stop)
    common.end_run(cfg, metrics, max_steps, "*-final.*", *["rewards.png"] * bool(val))


if __name__ == "__main__":
    main(load_config(Config))
