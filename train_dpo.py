"""Preference optimisation, DPO and its relatives, from pairs of a chosen and a rejected answer; full, LoRA or state.

    c, q = log p(chosen) - log ref(chosen), log p(rejected) - log ref(rejected), sums over the answer; h = beta (c - q)
    sigmoid   - log s(h)                                    DPO, arXiv 2305.18290;  s = sigmoid
              - (1 - e) log s(h) - e log s(-h)              with label_smoothing e: cDPO
    robust    (- (1 - e) log s(h) + e log s(-h)) / (1 - 2 e)                       arXiv 2403.00409
    hinge     max(0, 1 - h)                                                        SLiC, arXiv 2305.10425
    ipo       (c / n_c - q / n_q - 1 / (2 beta))^2, means per token, as in TRL      arXiv 2310.12036
    simpo     - log s(beta (mean log p(chosen) - mean log p(rejected)) - gamma)     arXiv 2405.14734, no reference
    + nll_coef x (- sum of log p(chosen) / chosen tokens of the batch)             RPO, arXiv 2404.19733

A prompt runs once: both answers start from its state, and the gradient flows back through it. The reference is a number
per answer. It is computed before the first step, by the policy itself, in the layout of the first epoch, so that the loss
starts at ln 2 exactly, and kept in <data>.ref.pt under a fingerprint of data, tokenizer and weights. SPIN
(arXiv 2401.01335) is this script with the model's own earlier answers as the rejected ones.

Usual mistakes: a mean of log-probabilities on one side and a sum on the other; a learning rate of SFT (take a tenth);
watching margins alone: plain DPO lowers both log-probabilities, and a small model gets worse while its margins grow
(README). With the NLL term the chosen one rises. Label smoothing: TRL ignores it for sigmoid, here it is cDPO.

    python train_dpo.py config/dpo_tiny.py                                   a laptop: exact match 0.75 -> 0.86
    python train_dpo.py config/dpo_1b5.py --tune=lora --lr=2e-5              one GPU
"""

import hashlib
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import common
import prepare
from common import UserError, load_config, print0
from model import fork, forked, forked_backward, load_model, load_to_tune


@dataclass
class Config(common.TuneConfig):
    data: str = (
        "data/pairs.jsonl"  # JSONL of prompt, chosen, rejected; prepare.py pairs FILE sums it up
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "simpo"] = "sigmoid"  # formulas above
    beta: float = 0.1  # how strongly the policy is held to the reference; simpo: 2 to 2.5
    label_smoothing: float = 0.0  # share of wrong labels to expect: sigmoid, robust
    gamma: float = 0.5  # simpo: the margin to reach
    nll_coef: float = 0.0  # weight of the chosen answer's NLL; 1 for small models
    reference: str = (
        ""  # empty = the policy as it starts, off = adapter or state off, none, or a model's file
    )
    tune: Literal["full", "lora", "state"] = "full"  # every weight, an adapter, or the start state
    lora_dropout: float = 0.0  # LoRA dropout; makes policy and reference differ
    out_dir: str = "out/dpo"  # folder for weights or adapters, last.pt, config.json, metrics
    micro_bsz: int = 4  # pairs per process and backward pass: lower it when memory runs out
    global_bsz: int = (
        32  # pairs per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 4096  # longest prompt and answer in tokens; longer rows are dropped, and counted
    chunk_len: int = (
        0  # tokens whose activations are kept at a time, with exact gradient; 0 = whole answers
    )
    lr: float = 1e-6  # peak learning rate; LoRA wants about ten times more
    lr_final: float = 1e-7  # learning rate at the end of the cosine
    watch: str = "val_rewards/accuracies"  # the number, of validation or eval_fn, whose highest value names best.*
    patience: int = (
        0  # stop after so many validations without a higher one, and go back to it; 0 = never
    )


# ---------------------------------------------------------------------------------------------------------------------
# the method


def dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps=None,
    ref_rejected_logps=None,
    *,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
    chosen_len=None,
    rejected_len=None,
    gamma=0.5,
):
    """Log-probabilities [B], each the sum over one answer -> (losses, chosen_rewards, rejected_rewards), each [B].

    Rewards are beta times the log-ratio to the reference, detached, whatever the loss (without a reference, simpo: beta
    times the mean log-probability). chosen_len, rejected_len [B]: tokens of the answers; simpo needs them, ipo without
    them is in sums, as in its paper. ValueError for what does not go together.
    """
    if (
        label_smoothing
        and loss_type not in ("sigmoid", "robust")
        or not 0 <= label_smoothing < (0.5 if loss_type == "robust" else 1)
    ):
        raise ValueError(
            f"label_smoothing={label_smoothing} with loss_type={loss_type}: it is for sigmoid (below 1) and "
            "robust (below 0.5)"
        )
    if loss_type == "simpo":
        if chosen_len is None or rejected_len is None:
            raise ValueError("simpo needs chosen_len and rejected_len")
        chosen, rejected = beta * chosen_logps / chosen_len, beta * rejected_logps / rejected_len
        return -F.logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach()
    if ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError(f"{loss_type} needs the reference's log-probabilities")
    c, q = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    h = beta * (c - q)
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss_type == "robust":
        losses = (-(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)) / (
            1 - 2 * label_smoothing
        )
    elif loss_type == "hinge":
        losses = torch.relu(1 - h)
    elif loss_type == "ipo":
        per_c, per_q = (1 if n is None else n for n in (chosen_len, rejected_len))
        losses = (c / per_c - q / per_q - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"loss_type={loss_type}: expected sigmoid, hinge, ipo, robust or simpo")
    return losses, beta * c.detach(), beta * q.detach()


METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
    "mean_token_accuracy",
)


def batch_loss(scores, forks, ref, cfg, n_pairs, n_chosen):
    """TokenScores of pairs, chosen before rejected -> (loss, {metric: sum over the pairs}). n_pairs, n_chosen: pairs and
    chosen tokens of the whole optimiser batch. ref [2, B] or None."""
    logps, lengths = (
        forks.per_answer(scores.logps).view(-1, 2).T,
        forks.borders2.diff().to(forks.row.device).view(-1, 2).T,
    )
    losses, chosen, rejected = dpo_loss(
        *logps,
        *(ref if ref is not None else (None, None)),
        beta=cfg.beta,
        loss_type=cfg.loss_type,
        label_smoothing=cfg.label_smoothing,
        chosen_len=lengths[0],
        rejected_len=lengths[1],
        gamma=cfg.gamma,
    )
    nll, hits = -logps[0].sum(), forks.per_answer(scores.hits.float()).view(-1, 2).T
    per_pair = chosen, rejected, chosen - rejected, chosen > rejected, logps[0], logps[1]
    sums = [v.sum().item() / n_pairs for v in per_pair] + [
        nll.item() / n_chosen,
        hits[0].sum().item() / n_chosen,
    ]
    return losses.sum() / n_pairs + cfg.nll_coef * nll / n_chosen, dict(zip(METRICS, sums))


@torch.no_grad()
def reference_logps(model, pairs, batches, cfg, run):
    """[N, 2] float32: each answer's summed log-probability, over all processes. batches: which pairs this process runs
    together; a number that was computed in other company differs in its last digits."""
    out = torch.zeros(len(pairs), 3)
    for batch in batches:
        forks = fork([(pairs[i].prompt, pairs[i].answers) for i in batch], run.device)
        logps = (
            forks.per_answer(forked(model, forks, cfg.chunk_len).logps).view(-1, 2).float().cpu()
        )
        for i, row in zip(batch, logps):
            if not out[
                i, 2
            ]:  # a short epoch's last step begins the next one: the first company counts
                out[i] = torch.tensor([*row, 1.0])
    out = common.all_reduce(out).cpu()
    return out[:, :2] / out[:, 2:]


def cached_reference(name, model, pairs, batches, cfg, run):
    """reference_logps, kept as <name>.ref.pt and taken from there while data, tokenizer, weights and company are the same."""
    layout = f"{batches} {cfg.chunk_len} {run.world} {run.dtype}"
    mark = hashlib.blake2b(f"{pairs} {layout} {model.fingerprint()}".encode(), digest_size=16)
    for key, p in model.named_parameters():
        if (".lora_" in key or key.startswith("tuned.")) and cfg.reference != "off":
            mark.update(p.detach().float().cpu().numpy().tobytes())
    path, mark = Path(f"{name}.ref.pt"), mark.hexdigest()
    if name.startswith("hf:"):
        path = Path(cfg.out_dir) / f"{re.sub('[:/]', '-', name)}.ref.pt"
    kept = common.load_torch(path) if run.main and path.exists() else {}
    if common.all_sum(kept.get("fingerprint") == mark)[0]:  # rank 0's file decides for all
        print0(f"reference: {path}")
        return common.all_reduce(kept["logps"] if run.main else torch.zeros(len(pairs), 2)).cpu()
    print0(
        f"reference: {path} is of other data, weights or batches; computing it again"
        if kept
        else f"reference: computing {path}"
    )
    logps = reference_logps(model, pairs, batches, cfg, run)
    if run.main:
        try:
            common.save_torch(dict(fingerprint=mark, logps=logps), path)
        except UserError as e:
            print0(f"reference: not kept, {e}")
    return logps


def batches_of(step, pairs, cfg, run):
    """Numbers of this process's pairs in a step, micro_bsz at a time."""
    return common.chunks(common.samples_of(step, len(pairs), cfg, run), cfg.micro_bsz)


def in_turn(pairs, cfg, run):
    """Numbers of this process's pairs in file order, micro_bsz at a time."""
    return common.chunks(list(range(len(pairs)))[run.rank :: run.world], cfg.micro_bsz)


@torch.no_grad()
def evaluate(model, pairs, ref, cfg, run):
    """{"val_<metric>": mean over held-out pairs}, over all processes."""
    totals, loss = dict.fromkeys(METRICS, 0.0), 0.0
    n_chosen = sum(len(row.answers[0]) for row in pairs)
    for batch in in_turn(pairs, cfg, run):
        forks = fork([(pairs[i].prompt, pairs[i].answers) for i in batch], run.device)
        now, sums = batch_loss(
            forked(model, forks, cfg.chunk_len),
            forks,
            None if ref is None else ref[batch].T.to(run.device),
            cfg,
            len(pairs),
            n_chosen,
        )
        loss += now.item()
        totals = {k: totals[k] + v for k, v in sums.items()}
    loss, *values = common.all_sum(loss, *totals.values())
    return {"val_loss": loss, **{f"val_{k}": v for k, v in zip(METRICS, values)}}


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    # ---- model and tokenizer
    model = load_to_tune(cfg, run)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    out, about = Path(cfg.out_dir), common.origin(cfg, model, tokenizer)
    if cfg.loss_type != "simpo" and cfg.reference == "none":
        raise UserError(f"reference=none is for --loss_type=simpo; {cfg.loss_type} needs one")
    if cfg.reference == "off" and cfg.tune == "full":
        raise UserError(
            "reference=off switches an adapter or a tuned state off, and tune=full has neither; leave it empty"
        )
    try:
        dpo_loss(
            *torch.zeros(4, 1),
            beta=cfg.beta,
            loss_type=cfg.loss_type,
            label_smoothing=cfg.label_smoothing,
            chosen_len=torch.ones(1),
            rejected_len=torch.ones(1),
        )
    except ValueError as e:
        raise UserError(str(e)) from None

    # ---- data
    data, val = (
        prepare.read_preferences(path, tokenizer, cfg.ctx_len) if path else None
        for path in (cfg.data, cfg.val_data)
    )
    if any(row.scores for row in [*data, *(val or [])]):
        raise UserError(f"{cfg.data} has rows of scored answers; DPO wants chosen and rejected")
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- the reference's log-probabilities: of this policy before any step, or of another model, which then goes
    ref = ref_val = None
    if cfg.loss_type != "simpo":
        other = model
        if cfg.reference not in ("", "off"):
            other, _ = load_model(cfg.reference, run.device, run.dtype)
            if other.config.vocab_size != model.config.vocab_size:
                raise UserError(
                    f"reference {cfg.reference} has a vocabulary of {other.config.vocab_size}, {cfg.init_from} one "
                    f"of {model.config.vocab_size}; a reference reads the same tokens"
                )
        other.eval()
        with other.reference() if cfg.reference == "off" else nullcontext():
            steps = range(math.ceil(len(data) / cfg.global_bsz))
            epoch = [batch for step in steps for batch in batches_of(step, data, cfg, run)]
            ref = cached_reference(cfg.data, other, data, epoch, cfg, run)
            ref_val = (
                cached_reference(cfg.val_data, other, val, in_turn(val, cfg, run), cfg, run)
                if val
                else None
            )
        del other

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(data):,} pairs, {sum(len(r.prompt) + sum(map(len, r.answers)) for r in data):,} tokens; {max_steps:,} "
        f"steps of {cfg.global_bsz} pairs = {max_steps * cfg.global_bsz / len(data):.2f} epochs"
    )

    # ---- a new run, or on from last.pt
    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        data_order=dict(ctx_len=cfg.ctx_len, pairs=len(data)),
        kept=dict(best=-math.inf, waited=0),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, out),
        about=about,
        plot=("loss", "val_loss", "rewards/accuracies", "val_rewards/accuracies"),
    )
    impatient = lambda: cfg.patience and kept["waited"] >= cfg.patience  # noqa: E731
    if impatient():
        return print0(
            f"{out} was stopped at step {metrics.from_step}: {kept['waited']} validations without a higher {cfg.watch}"
        )

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        model.eval()
        values = evaluate(model, val, ref_val, cfg, run) if val else {}
        if cfg.eval_fn is not None:
            values.update(cfg.eval_fn(model, tokenizer))
        if cfg.watch not in values and (cfg.patience or values and cfg.watch != Config.watch):
            raise UserError(
                f"watch={cfg.watch} is not among what is measured: {', '.join(values) or 'nothing; give --val_data'}"
            )
        kept["waited"] += 1
        if values.get(cfg.watch, -math.inf) > kept["best"]:
            kept.update(best=values[cfg.watch], waited=0)
            write("best")
        return values

    # ---- the loop
    metrics.begin(validate() if metrics.from_step == 0 else {})
    wrapped, no_sync = common.wrap(model, run)
    with common.catch_signals() as signals:
        for step in range(metrics.from_step, max_steps):
            lr = common.set_lr(opt, cfg, step, max_steps)
            batches = batches_of(step, data, cfg, run)
            mine = [data[i] for batch in batches for i in batch]
            # sums over the whole batch's pairs and chosen tokens; x world because DDP averages gradients
            n_chosen, n_tokens = common.all_sum(
                sum(len(row.answers[0]) for row in mine),
                sum(len(row.prompt) + sum(map(len, row.answers)) for row in mine),
            )
            loss, totals = 0.0, {}
            model.train()
            for i, batch in enumerate(batches):
                forks = fork([(data[j].prompt, data[j].answers) for j in batch], run.device)
                loss_of = lambda scores: batch_loss(  # noqa: E731
                    scores,
                    forks,
                    None if ref is None else ref[batch].T.to(run.device),
                    cfg,
                    cfg.global_bsz / run.world,
                    n_chosen / run.world,
                )
                now, sums = forked_backward(
                    wrapped,
                    forks,
                    loss_of,
                    cfg.chunk_len,
                    sync=nullcontext if i == accumulation - 1 else no_sync,
                )
                loss, totals = (
                    loss + now / run.world,
                    {k: totals.get(k, 0.0) + v / run.world for k, v in sums.items()},
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, stop, *values = common.all_sum(loss, len(signals), *totals.values())
            common.check_finite(cfg, step, loss, grad_norm)
            opt.step()
            opt.zero_grad()
            done, now, values = step + 1, dict(zip(totals, values)), {}
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
                    quiet=now.keys() - {"rewards/margins", "rewards/accuracies", "logps/chosen"},
                    **now,
                    **values,
                )
            last = done == max_steps or values and impatient()
            if (
                last
                and cfg.patience
                and kept["waited"]
                and (file := next(out.glob("best.[ps]*"), None))
            ):
                model.load_tuned(file)
                print0(
                    f"back to the best: {cfg.watch} {kept['best']:.4f}, {kept['waited']} validations ago"
                )
            common.end_step(cfg, save, done, done if last else max_steps, stop)
            if last:
                break
    common.end_run(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
