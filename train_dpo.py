"""Preference optimisation, DPO and its relatives, from pairs of a chosen and a rejected answer.

    c, q = log p(chosen) - log ref(chosen), log p(rejected) - log ref(rejected)
           each a sum over the answer's tokens;  h = beta (c - q),  s = sigmoid,  e =
           label_smoothing
    sigmoid   - log s(h)                                          DPO, arXiv 2305.18290
              - (1 - e) log s(h) - e log s(-h)                    with label_smoothing: cDPO
    robust    (- (1 - e) log s(h) + e log s(-h)) / (1 - 2 e)      arXiv 2403.00409
    hinge     max(0, 1 - h)                                       SLiC, arXiv 2305.10425
    ipo       (c / n_c - q / n_q - 1 / (2 beta))^2                means per token, as in TRL;
                                                                  arXiv 2310.12036
    simpo     - log s(beta (mean log p(chosen) - mean log p(rejected)) - gamma)
                                                                  no reference; beta 2 to 2.5;
                                                                  arXiv 2405.14734
    + nll_coef x (- sum of log p(chosen) / chosen tokens of the batch)     RPO, arXiv 2404.19733

A sample is a pair. Its prompt runs once: both answers start from its state, and the gradient flows
back through it. The reference is a number per answer. It is computed before the first step, by the
policy itself, in the layout of the first epoch, so that the loss starts at ln 2 exactly, and kept
in <data>.ref.pt under a fingerprint of data, tokenizer and weights. `reference`: empty = the policy
as it starts, "off" = its adapter or tuned state switched off, "none" for simpo, or a model's file.
SPIN (arXiv 2401.01335) is this script with the model's own earlier answers as the rejected ones.

Data: JSONL of prompt, chosen, rejected; `python prepare.py pairs FILE` sums it up. Pairs longer
than ctx_len are dropped, and counted.

Usual mistakes: a mean of log-probabilities on one side and a sum on the other; a learning rate of
SFT (take a tenth; LoRA about ten times more than full); LoRA dropout, which makes policy and
reference differ; watching margins alone: plain DPO lowers both log-probabilities, and a small model
gets worse while its margins grow. With the NLL term (1 for small models) the chosen one rises. TRL
ignores label smoothing for sigmoid; here it is cDPO.

    python train_dpo.py config/dpo_tiny.py                              exact match 0.75 -> 0.86
    python train_dpo.py config/dpo_1b5.py --tune=lora --lr=2e-5         one GPU
"""

import hashlib
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gosling import files, last, runs, tune, weights
from gosling.batch import fork, score_forks
from gosling.compiled import compile_blocks
from gosling.config import Decay, Seed, UserError, load_config, print0
from gosling.data import read_preferences
from gosling.engine import load_second
from gosling.shard import full
from gosling.tokenizer import tokenizer_of
from wkv_cuda.packed import to_device

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class Config:
    # data and model
    data: str = "data/pairs.jsonl"  # training data, of the kind that the docstring says
    val_data: str = ""  # the same, held out, to validate on; empty = none
    skip_bad: bool = False  # leave out and count rows that cannot be read
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    # loss
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "simpo"] = "sigmoid"  # formulas above
    beta: PositiveFloat = 0.1  # how strongly the policy is held to the reference
    label_smoothing: Decay = 0.0  # share of wrong labels to expect: sigmoid, robust
    gamma: NonNegativeFloat = 0.5  # simpo: the margin to reach
    nll_coef: NonNegativeFloat = 0.0  # weight of the chosen answer's NLL
    reference: str = ""  # model to stay near: a file, or a word as the docstring says
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
    out_dir: str = "out/dpo"  # folder for checkpoints, last.pt, config.json and metrics
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
    eval_every: NonNegativeInt = 100  # steps between validations; 0 = at the end only
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    watch: str = "val_rewards/accuracies"  # the measured number whose highest value names best.*
    patience: NonNegativeInt = 0  # stop after so many validations without a higher one; 0 = never
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 = at the end only
    save_minutes: PositiveFloat | None = None  # also save last.pt after so many; none = not
    keep_last: NonNegativeInt = 2  # numbered checkpoints to keep; 0 = all
    log_every: PositiveInt = 10  # steps between progress lines
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl


# ----------------------------------------------------------------------------------------------
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
    """Log-probabilities [B], each the sum over one answer -> (losses, chosen_rewards,
    rejected_rewards), each [B].

    Rewards are beta times the log-ratio to the reference, detached, whatever the loss (without a
    reference, simpo: beta times the mean log-probability). chosen_len, rejected_len [B]: tokens of
    the answers; simpo needs them, ipo without them is in sums, as in its paper. ValueError for what
    does not go together.
    """
    check_smoothing(label_smoothing, loss_type)
    if loss_type == "simpo":
        if chosen_len is None or rejected_len is None:
            raise ValueError("simpo needs chosen_len and rejected_len")
        chosen = beta * chosen_logps / chosen_len
        rejected = beta * rejected_logps / rejected_len
        return -F.logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach()

    if ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError(f"{loss_type} needs the reference's log-probabilities")
    c = chosen_logps - ref_chosen_logps
    q = rejected_logps - ref_rejected_logps
    h, e = beta * (c - q), label_smoothing
    if loss_type == "sigmoid":
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    elif loss_type == "robust":
        losses = (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    elif loss_type == "hinge":
        losses = torch.relu(1 - h)
    elif loss_type == "ipo":
        mean_c = c if chosen_len is None else c / chosen_len
        mean_q = q if rejected_len is None else q / rejected_len
        losses = (mean_c - mean_q - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"loss_type={loss_type}: expected sigmoid, hinge, ipo, robust or simpo")
    return losses, beta * c.detach(), beta * q.detach()


def check_smoothing(label_smoothing, loss_type):
    """ValueError for a smoothing that the loss does not take."""
    limit = {"sigmoid": 1.0, "robust": 0.5}.get(loss_type, 0.0)
    if label_smoothing and not 0 <= label_smoothing < limit:
        raise ValueError(
            f"label_smoothing={label_smoothing} with loss_type={loss_type}: it is for sigmoid "
            "(below 1) and robust (below 0.5)"
        )


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
NOT_SHOWN = {"rewards/chosen", "rewards/rejected", "logps/rejected", "nll_loss"}  # on the screen


def pair_loss(scores, forks, ref_logps, cfg, n_pairs, n_chosen):
    """TokenScores of pairs, chosen before rejected -> (loss, METRICS as a tensor).

    n_pairs, n_chosen: pairs and chosen tokens of the whole optimiser batch; losses and metrics of
    its parts add up to the whole's. ref_logps [B, 2], or None for simpo.
    """
    logps = forks.per_answer(scores.logps).view(-1, 2)  # [B, 2]
    lengths = to_device(forks.cu_seqlens.diff(), logps.device).view(-1, 2)
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.unbind(1)
    losses, chosen, rejected = dpo_loss(
        logps[:, 0],
        logps[:, 1],
        ref_chosen,
        ref_rejected,
        beta=cfg.beta,
        loss_type=cfg.loss_type,
        label_smoothing=cfg.label_smoothing,
        chosen_len=lengths[:, 0],
        rejected_len=lengths[:, 1],
        gamma=cfg.gamma,
    )
    nll = -logps[:, 0].sum() / n_chosen
    hits = forks.per_answer(scores.hits.float()).view(-1, 2)[:, 0].sum() / n_chosen
    margins = chosen - rejected
    per_pair = torch.stack([chosen, rejected, margins, (margins > 0).float(), *logps.detach().T])
    metrics = torch.cat([per_pair.sum(1) / n_pairs, torch.stack([nll.detach(), hits])])
    return losses.sum() / n_pairs + cfg.nll_coef * nll, metrics


def fork_pairs(pairs, numbers, run):
    """The pairs of these numbers -> Forks: two answers to each prompt."""
    return fork([(pairs[i].prompt, pairs[i].answers) for i in numbers], run.device)


@torch.no_grad()
def evaluate(model, pairs, ref_logps, cfg, run):
    """{"val_<metric>": mean over held-out pairs}, over all processes."""
    n_chosen = sum(len(pair.answers[0]) for pair in pairs)
    loss, metrics = 0.0, torch.zeros(len(METRICS), device=run.device)
    for numbers in batches_in_file_order(pairs, cfg, run):
        forks = fork_pairs(pairs, numbers, run)
        ref = None if ref_logps is None else to_device(ref_logps[numbers], run.device)
        scores = score_forks(model, forks, cfg.chunk_len)
        batch_loss, batch_metrics = pair_loss(scores, forks, ref, cfg, len(pairs), n_chosen)
        loss, metrics = loss + batch_loss, metrics + batch_metrics
    val_loss, *values = runs.all_sum(loss, *metrics)
    names = [f"val_{name}" for name in METRICS]
    return {"val_loss": val_loss, **dict(zip(names, values, strict=True))}


def batches_of(step, pairs, cfg, run):
    """Numbers of this process's pairs in a step, micro_bsz at a time."""
    return runs.chunks(runs.samples_of(step, len(pairs), cfg, run), cfg.micro_bsz)


def batches_in_file_order(pairs, cfg, run):
    """Numbers of this process's pairs in file order, micro_bsz at a time."""
    return runs.chunks(list(range(len(pairs)))[run.rank :: run.world], cfg.micro_bsz)


# ----------------------------------------------------------------------------------------------
# the reference: one number per answer


@torch.no_grad()
def reference_logps(model, pairs, batches, cfg, run):
    """[N, 2] float32: each answer's summed log-probability, over all processes.

    batches: which pairs this process runs together; a number that was computed in other company
    differs in its last digits.
    """
    logps, counted = torch.zeros(len(pairs), 2), torch.zeros(len(pairs), 1)
    with runs.whole(model):
        for numbers in batches:
            forks = fork_pairs(pairs, numbers, run)
            scores = score_forks(model, forks, cfg.chunk_len)
            sums = forks.per_answer(scores.logps).view(-1, 2).float().cpu()
            for number, of_pair in zip(numbers, sums, strict=True):
                # A short epoch's last step begins the next one: the first company counts.
                if not counted[number]:
                    logps[number], counted[number] = of_pair, 1.0
    return runs.all_reduce(logps).cpu() / runs.all_reduce(counted).cpu()


def cached_reference(name, model, pairs, batches, cfg, run):
    """reference_logps, kept as <name>.ref.pt while data, weights and company are the same."""
    layout = f"{batches} {cfg.chunk_len} {run.world} {run.dtype}"
    described = f"{pairs} {layout} {weights.fingerprint(model)}"
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    if cfg.reference != "off":
        for key, p in model.named_parameters():
            if ".lora_" in key or key.startswith("tuned."):
                digest.update(full(p.detach()).float().cpu().numpy().tobytes())
    fingerprint = digest.hexdigest()
    path = Path(f"{name}.ref.pt")
    if name.startswith("hf:"):
        path = Path(cfg.out_dir) / f"{re.sub('[:/]', '-', name)}.ref.pt"
    kept = read_reference(path, fingerprint, len(pairs)) if run.main and path.exists() else None
    if runs.all_sum(kept is not None)[0]:  # rank 0's file decides
        print0(f"reference: {path}")
        return runs.all_reduce(torch.zeros(len(pairs), 2) if kept is None else kept).cpu()
    again = " again: it is of other data, weights or batches" if path.exists() else ""
    print0(f"reference: computing {path}{again}")
    logps = reference_logps(model, pairs, batches, cfg, run)
    if run.main:
        try:
            files.save_torch({"fingerprint": fingerprint, "logps": logps}, path)
        except UserError as e:
            print0(f"reference: not kept, {e}")
    return logps


def read_reference(path, fingerprint, n_pairs):
    """[N, 2] of <name>.ref.pt; None of other data or weights. UserError for other files."""
    saved = files.load_torch(path)
    logps = saved.get("logps") if isinstance(saved, dict) else None
    if not last.are_numbers(logps) or logps.dim() != 2 or logps.shape[1] != 2:
        raise UserError(f"{path} does not hold a number per answer; remove it: it is made again")
    is_ours = saved.get("fingerprint") == fingerprint and len(logps) == n_pairs
    return logps if is_ours else None


def make_references(model, tokenizer, pairs, val_pairs, cfg, run):
    """-> ([N, 2] of the training pairs, the same of val_pairs or None); both None for simpo.

    They come from the policy before any step, in the batches of its first epoch, or from another
    model, which is gone afterwards.
    """
    if cfg.loss_type == "simpo":
        return None, None
    other = model
    if cfg.reference not in ("", "off"):
        other = load_second("reference", cfg.reference, model, tokenizer, cfg, run)
    other.eval()
    epoch = []
    for step in range(math.ceil(len(pairs) / cfg.global_bsz)):
        epoch += batches_of(step, pairs, cfg, run)
    ref_val = None
    with other.reference() if cfg.reference == "off" else nullcontext():
        ref_train = cached_reference(cfg.data, other, pairs, epoch, cfg, run)
        if val_pairs:
            in_order = batches_in_file_order(val_pairs, cfg, run)
            ref_val = cached_reference(cfg.val_data, other, val_pairs, in_order, cfg, run)
    return ref_train, ref_val


# ----------------------------------------------------------------------------------------------


def check_settings(cfg):
    """UserError for settings that do not go together."""
    if cfg.loss_type != "simpo" and cfg.reference == "none":
        raise UserError(f"reference=none is for --loss_type=simpo; {cfg.loss_type} needs one")
    if cfg.reference == "off" and cfg.tune == "full":
        raise UserError(
            "reference=off switches an adapter or a tuned state off, and tune=full has neither; "
            "leave it empty"
        )
    try:
        check_smoothing(cfg.label_smoothing, cfg.loss_type)
    except ValueError as e:
        raise UserError(str(e)) from None


def validate(model, val_pairs, ref_val, tokenizer, cfg, run):
    """-> {name: number} on held-out pairs and of cfg.eval_fn."""
    model.eval()
    with runs.whole(model):
        values = {}
        if val_pairs:
            values = evaluate(model, val_pairs, ref_val, cfg, run)
        values.update(runs.call_eval_fn(cfg, model, tokenizer))
    asked_for = cfg.patience or cfg.watch != Config.watch
    if cfg.watch not in values and asked_for:
        measured = ", ".join(values) or "nothing; give --val_data"
        raise UserError(f"watch={cfg.watch} is not among what is measured: {measured}")
    return values


def main(cfg):
    with runs.processes(cfg) as run:
        # ---- model and tokenizer
        check_settings(cfg)
        model = tune.load_to_tune(cfg, run)
        tokenizer = tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
        about = tune.origin(cfg, model, tokenizer)

        # ---- data, and the reference's log-probabilities
        pairs = read_preferences(cfg.data, tokenizer, cfg.ctx_len, cfg.skip_bad)
        val_pairs = []
        if cfg.val_data:
            val_pairs = read_preferences(cfg.val_data, tokenizer, cfg.ctx_len, cfg.skip_bad)
        if any(pair.scores for pair in pairs + val_pairs):
            raise UserError(f"{cfg.data} has rows of scored answers; DPO wants chosen and rejected")
        max_steps, accumulation = runs.plan_steps(cfg, run, len(pairs))
        epochs = max_steps * cfg.global_bsz / len(pairs)
        print0(f"data: {len(pairs):,} pairs; {max_steps:,} steps = {epochs:.2f} epochs")
        ref_train, ref_val = make_references(model, tokenizer, pairs, val_pairs, cfg, run)

        # ---- optimiser; a new run, or on from last.pt
        opt = runs.make_optimizer(model, cfg, run)
        same = runs.identity(cfg, model, pairs=len(pairs))
        resumed = runs.resume(cfg, model, opt, same)
        first_step, best_loss = resumed.get("step", 0), resumed.get("best_loss", math.inf)
        waited = resumed.get("waited", 0)  # validations since the best one
        metrics = runs.open_run(cfg, run, model, tokenizer, first_step, max_steps)
        if cfg.patience and waited >= cfg.patience:
            print0(f"stopped before: {waited} validations without a higher {cfg.watch}")
            return

        # ---- before the first step
        values = {}
        if first_step == 0:
            values = validate(model, val_pairs, ref_val, tokenizer, cfg, run)
            # The watched number is better when higher, so its negative is the loss.
            watched = -values.get(cfg.watch, -math.inf)
            best_loss = tune.save_best(model, cfg, run, watched, best_loss, about)
        metrics.begin(values)

        # ---- the loop
        compile_blocks(model, cfg)
        wrapped, no_sync = runs.wrap(model, run)
        with runs.catch_signals() as signals:
            for step in range(first_step, max_steps):
                lr = runs.set_lr(opt, cfg, step, max_steps)
                batches = batches_of(step, pairs, cfg, run)
                samples = [pairs[i] for numbers in batches for i in numbers]
                n_chosen, n_tokens = runs.all_sum(
                    sum(len(pair.answers[0]) for pair in samples),
                    sum(len(pair.prompt) + sum(map(len, pair.answers)) for pair in samples),
                )
                model.train()
                loss, totals = 0.0, torch.zeros(len(METRICS), device=run.device)
                for i, numbers in enumerate(batches):
                    forks = fork_pairs(pairs, numbers, run)
                    ref = None if ref_train is None else to_device(ref_train[numbers], run.device)
                    with nullcontext() if i == accumulation - 1 else no_sync():
                        scores = score_forks(wrapped, forks, cfg.chunk_len)
                        batch_loss, batch_metrics = pair_loss(
                            scores, forks, ref, cfg, cfg.global_bsz, n_chosen
                        )
                        (batch_loss * run.world).backward()  # DDP averages over processes: x world
                    loss, totals = loss + batch_loss.detach(), totals + batch_metrics
                grad_norm = runs.clip_gradients(model, cfg.grad_clip or math.inf)
                overdue = runs.overdue(cfg, run)
                sums = runs.sum_on(run.device, loss, len(signals), overdue, *totals)
                runs.step_if_finite(opt, sums[0], grad_norm)
                opt.zero_grad()
                # Once a step the host waits for the device, here.
                loss, stop, overdue, *totals = sums.tolist()
                runs.check_finite(cfg, step, loss, grad_norm, model)
                done, values = step + 1, {}
                metrics.tokens += n_tokens

                # ---- evaluate, log, save
                if done == max_steps or runs.due(done, cfg.eval_every):
                    at = dict(step=done, best_loss=best_loss, waited=waited)
                    with runs.saving_first(cfg, run, model, opt, same, **at):
                        values = validate(model, val_pairs, ref_val, tokenizer, cfg, run)
                    watched = -values.get(cfg.watch, -math.inf)
                    waited = 0 if watched < best_loss else waited + 1
                    best_loss = tune.save_best(model, cfg, run, watched, best_loss, about)
                if values or done in (1, max_steps) or runs.due(done, cfg.log_every):
                    values = {**dict(zip(METRICS, totals, strict=True)), **values}
                    metrics.progress(done, max_steps, loss, lr, grad_norm, NOT_SHOWN, **values)
                out_of_patience = cfg.patience > 0 and waited >= cfg.patience
                last_step = done if out_of_patience else max_steps
                if best_loss < math.inf and waited and cfg.patience and done == last_step:
                    tune.load_best(model, cfg)
                    print0(
                        f"back to the best {cfg.watch}, {-best_loss:.4f}, {waited} validations ago"
                    )
                checkpoint = runs.checkpoint_name(cfg, done, last_step)
                if checkpoint:
                    tune.save_tuned(model, cfg, run, checkpoint, about)
                if checkpoint or stop or overdue:
                    at = dict(step=done, best_loss=best_loss, waited=waited)
                    runs.save_last(cfg, run, model, opt, same, **at)
                    metrics.plot("loss", "val_loss", "rewards/accuracies", "val_rewards/accuracies")
                if out_of_patience:
                    print0(f"stopped early: {waited} validations without a higher {cfg.watch}")
                    break
                if stop and done < max_steps:
                    runs.stopped(cfg, done, max_steps)
                    sys.exit(130)
        runs.finished(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
