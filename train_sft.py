"""Supervised fine-tuning on conversations, full or LoRA: the loss is on the assistant's words and on what ends them.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | x_1 .. x_t)       m = 1 where x_{t+1} is trained, N = sum of m over the batch

N counts the whole optimiser batch, over micro-batches and processes, so the loss is the same however it is split. Documents
lie end to end (cu_seqlens) and each starts from a zero state: no padding, and no document feels another. A document longer
than memory is trained exactly: with chunk_len its activations are kept for one chunk at a time, and the state's gradient
is carried backwards from chunk to chunk (bptt = "full"), or cut there ("truncated").

Usual mistakes: training on the prompt; a mean of micro-batch means over ragged masks; the end token left out of the loss,
after which the model never stops; padding, which a recurrence feels. LoRA: arXiv 2106.09685.

    python train_sft.py config/sft_tiny.py                                      a laptop, no GPU
    python train_sft.py config/sft_1b5.py --tune=lora                           one GPU
"""
import dataclasses
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import common
import prepare
import sample
from common import UserError, load_config, print0
from model import RWKV


@dataclass
class Config:
    # data
    data: str = "data/sft.jsonl"     # JSONL of conversations; prepare.py show FILE prints what is trained
    val_data: str = ""               # the same for validation; empty = none
    template: Callable | None = None  # of your own: (row, tokenizer) -> (ids, mask); a function in the config file
    last_reply_only: bool = False    # train on each conversation's last reply alone
    tokenizer: str = ""              # name or file; empty = what the model's folder says, or World if it has 65536 ids
    # model
    init_from: str = ""              # weights to start from (.pth, .safetensors)
    tune: Literal["full", "lora"] = "full"  # every weight, or an adapter beside the large matrices
    lora_r: int = 32                 # LoRA rank
    lora_alpha: float = 64.0         # LoRA scale: alpha / r
    lora_dropout: float = 0.0        # LoRA dropout
    lora_rslora: bool = False        # scale alpha / sqrt(r)
    lora_targets: tuple[str, ...] = ()  # matrices: key, att.key, ffn, head …; none = all of att and ffn
    lora_extra: tuple[str, ...] = ()  # further parameters to train, by parts of their names: ln, x_ …
    adapter: str = ""                # saved adapter to go on from
    # run
    out_dir: str = "out/sft"         # folder for weights or adapters, last.pt, config.json, metrics
    resume: bool = False             # go on from out_dir/last.pt
    seed: int = 42                   # of the data order and of a fresh adapter
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto = bfloat16 on CUDA, else float32
    # batch
    micro_bsz: int = 8               # documents per process and backward pass: lower it when memory runs out
    global_bsz: int = 32             # documents per optimiser step, over all processes; accumulation follows from it
    ctx_len: int = 4096              # longest document in tokens; longer ones are cut, and counted
    packing: bool = True             # documents end to end; false = right padding (slower, the same loss)
    chunk_len: int = 0               # tokens whose activations are kept at a time; 0 = whole documents
    bptt: Literal["full", "truncated"] = "full"  # the gradient across chunks: exact, or cut
    # optimiser
    lr: float = 2e-5                 # peak learning rate; LoRA wants about ten times more
    lr_final: float = 2e-6           # learning rate at the end of the cosine
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
    eval_samples: int = 3            # held-out prompts whose generated answers are printed at each validation
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}; a function in the config file
    save_every: int = 500            # steps between checkpoints; 0 = at the end only
    log_every: int = 10              # steps between progress lines
    keep_last: int = 2               # rwkv-<step>.pth or lora-<step>.safetensors to keep; 0 = all
    log: Literal["none", "wandb", "tensorboard", "swanlab"] = "none"  # besides metrics.jsonl and metrics.png


# ---------------------------------------------------------------------------------------------------------------------
# the method: batches of documents, and the gradient in chunks of time

def pack(documents, device="cpu"):
    """[(ids, mask), …] -> x, y [1, T], weight [1, T] float32, cu_seqlens [D + 1]: the next-token pairs of each document,
    end to end; a position's weight is the mask of its target."""
    x, y, w = [], [], []
    for ids, mask in documents:
        x += ids[:-1]
        y += ids[1:]
        w += mask[1:]
    borders = torch.tensor([0, *(len(ids) - 1 for ids, _ in documents)]).cumsum(0)
    return *(torch.tensor([part], device=device) for part in (x, y)), torch.tensor([w], dtype=torch.float32, device=device), borders


def pad(documents, device="cpu"):
    """The same as rows, right padded: x, y, weight [D, T], and None for cu_seqlens. A causal network never sees what
    lies to the right, and the padding weighs 0."""
    x, y, w = ([torch.tensor(part) for part in parts] for parts in
               zip(*((ids[:-1], ids[1:], mask[1:]) for ids, mask in documents)))
    rows = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device) for part in (x, y, w)]
    return rows[0], rows[1], rows[2].float(), None


def pieces(T, cu_seqlens, chunk_len):
    """[(a, b, cu_seqlens of tokens a..b), …]: a packed row in chunks. A document that a chunk holds nothing of has length
    0 there and hands its state through; chunk_len = 0 is one chunk."""
    step = chunk_len or T
    return [(a, min(a + step, T), cu_seqlens if cu_seqlens is None else cu_seqlens.clamp(a, min(a + step, T)) - a)
            for a in range(0, T, step)]


def backward(model, x, y, weight, cu_seqlens, chunk_len=0, bptt="full", sync=nullcontext, no_sync=nullcontext):
    """Add the gradient of  loss = -(weight * log p(y | x)).sum()  to the parameters' .grad; -> (loss, weighted hits).

    In chunks of chunk_len tokens, memory is one chunk's activations and one state per chunk. "full": run forward keeping
    the state at each border, then from the last chunk to the first run again with that state as a leaf, backward with the
    gradient of the state that goes out, and keep the gradient of the state that came in. Equal to the whole to rounding.
    "truncated": the state goes on, its gradient does not. model: may be a DDP wrapper; its last backward is in `sync`.
    """
    parts = pieces(x.shape[1], cu_seqlens, chunk_len)
    states = [None] * len(parts)
    if bptt == "full":
        with torch.no_grad():
            for i, (a, b, cu) in enumerate(parts[:-1]):
                states[i + 1] = getattr(model, "module", model)(x[:, a:b], states[i], cu_seqlens=cu, last_only=True)[1]
    loss_sum, hits, grads, out = 0.0, 0.0, None, None
    order = list(range(len(parts)))
    for i in reversed(order) if bptt == "full" else order:
        a, b, cu = parts[i]
        came_in = states[i] if bptt == "full" else out
        if came_in is not None:
            came_in = {k: v.detach().requires_grad_(bptt == "full") for k, v in came_in.items()}
        states[i] = None
        with sync() if i == (0 if bptt == "full" else order[-1]) else no_sync():
            scores, out = model(x[:, a:b], came_in, cu_seqlens=cu, targets=y[:, a:b])
            loss = -(weight[:, a:b] * scores.logps).sum()
            extra = list(out.values()) if grads else []
            torch.autograd.backward([loss, *extra], [None, *(grads or [])])
        grads = [v.grad for v in came_in.values()] if came_in and bptt == "full" else None
        loss_sum, hits = loss_sum + loss.detach(), hits + (weight[:, a:b] * scores.hits).sum()
    return loss_sum, hits


@torch.no_grad()
def evaluate(model, documents, cfg, run):
    """{"val_loss": nats per trained token, "val_accuracy": share of them that are the likeliest}, over all processes."""
    mine, nll, hits, n = documents[run.rank::run.world], 0.0, 0.0, 0.0
    for i in range(0, len(mine), cfg.micro_bsz):
        x, y, weight, borders = pack(mine[i:i + cfg.micro_bsz], run.device)
        state = None
        for a, b, cu in pieces(x.shape[1], borders, cfg.chunk_len):
            scores, state = model(x[:, a:b], state, cu_seqlens=cu, targets=y[:, a:b])
            nll -= (weight[:, a:b] * scores.logps).sum().item()
            hits += (weight[:, a:b] * scores.hits).sum().item()
        n += weight.sum().item()
    nll, hits, n = common.all_sum(nll, hits, n)
    return {"val_loss": nll / n, "val_accuracy": hits / n}


def show_answers(model, documents, tokenizer, n):
    """Print what the model answers, greedily, where the last reply of the first n held-out documents begins."""
    cuts = []
    for ids, mask in documents[:n]:
        end = len(mask) - mask[::-1].index(1)
        start = end - (mask[:end][::-1].index(0) if 0 in mask[:end] else end)
        cuts.append((ids[:start], ids[start:end]))
    answers = sample.generate(model, [prompt for prompt, _ in cuts], max_new_tokens=128, temperature=0, tokenizer=tokenizer,
                              stop=("\n\nUser:",)) if all(prompt for prompt, _ in cuts) else []
    for (prompt, want), got in zip(cuts, answers):
        print0(f"  {tokenizer.decode(prompt)[-200:]!r}\n    model: {got.text!r}\n    data:  {tokenizer.decode(want)!r}")


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    run = common.start(cfg)
    try:
        train(cfg, run)
    finally:
        common.finish(run)


def train(cfg, run):
    # ---- model and tokenizer
    if not cfg.init_from:
        raise UserError("which model? --init_from=FILE, a .pth or .safetensors to fine-tune")
    full = cfg.tune == "full"
    model = RWKV.from_pretrained(cfg.init_from, dtype=torch.float32 if full else run.dtype)  # what trains is float32
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    torch.manual_seed(cfg.seed)
    model.set_tune(cfg.tune, **({} if full else dict(
        r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout, rslora=cfg.lora_rslora, targets=cfg.lora_targets,
        extra=cfg.lora_extra)))
    if cfg.adapter:
        if full:
            raise UserError("adapter is for --tune=lora; merge it first (export.py) to go on with full tuning")
        model.load_adapter(cfg.adapter)
    model.to(run.device)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    arch = dataclasses.asdict(model.config)

    # ---- data
    if cfg.chunk_len < 0:
        raise UserError(f"chunk_len={cfg.chunk_len}: expected 0 (whole documents) or a number of tokens")
    if cfg.chunk_len and not cfg.packing:
        raise UserError("chunk_len needs packing")
    if cfg.chunk_len and cfg.lora_dropout and cfg.bptt == "full":
        raise UserError("chunk_len with bptt=full runs every chunk twice, which lora_dropout would make different; "
                        "give one of them up")
    read = lambda path: prepare.read_examples(path, tokenizer, cfg.ctx_len, cfg.template, cfg.last_reply_only)  # noqa: E731
    data, val = read(cfg.data), read(cfg.val_data) if cfg.val_data else None
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- optimiser: upstream's groups, printed
    groups = model.param_groups(cfg.lr, cfg.weight_decay)
    base_lrs = [g["lr"] for g in groups]
    opt = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=run.device.type in ("cpu", "cuda"))
    print0(f"model: {arch['version']}, {arch['n_layer']} layers x {arch['n_embd']}, vocabulary {arch['vocab_size']}, "
           f"{sum(p.numel() for p in model.parameters()):,} parameters; groups: {common.describe_groups(groups)}")
    print0(f"data: {len(data):,} documents, {sum(len(ids) for ids, _ in data):,} tokens, {sum(sum(m) for _, m in data):,} "
           f"trained; {max_steps:,} steps of {cfg.global_bsz} documents = {max_steps * cfg.global_bsz / len(data):.2f} epochs")

    # ---- a new run, or on from last.pt
    out, step0, best = Path(cfg.out_dir), 0, math.inf
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    data_order = dict(seed=cfg.seed, ctx_len=cfg.ctx_len, global_bsz=cfg.global_bsz, documents=len(data))
    if cfg.resume:
        last = common.load_torch(out / "last.pt")
        common.check_same("architecture", last["arch"], arch, out / "last.pt")
        common.check_same("data order", last["data_order"], data_order, out / "last.pt")
        common.check_same("set of trained parameters", {n: list(p.shape) for n, p in last["model"].items()},
                          {n: list(p.shape) for n, p in trained.items()}, out / "last.pt")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(last["model"][name])
        opt.load_state_dict(last["optimizer"])
        torch.set_rng_state(last["rng"])
        step0, best = last["step"], last["best"]
        print0(f"resumed {out / 'last.pt'} at step {step0}")
        del last
    common.open_out_dir(cfg, run, arch=arch, tokenizer=lambda: prepare.save_tokenizer(tokenizer, out), max_steps=max_steps)
    metrics = common.Metrics(cfg, run, from_step=step0)

    def save_weights(stem):
        if full:
            model.save_pretrained(out / f"{stem}.pth", dtype=run.dtype)
        else:
            model.save_adapter(out / f"{stem}.safetensors")

    def save(step, name=None):
        if run.main:
            if name:
                save_weights(("rwkv-" if full else "lora-") + name)
                common.prune(out, "rwkv-*.pth" if full else "lora-*.safetensors", cfg.keep_last)
            common.save_torch(dict(model={n: p.detach() for n, p in trained.items()}, optimizer=opt.state_dict(), step=step,
                                   best=best, arch=arch, data_order=data_order, rng=torch.get_rng_state()), out / "last.pt")

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        nonlocal best
        model.eval()
        values = {}
        if val is not None:
            values = evaluate(model, val, cfg, run)
            show_answers(model, val, tokenizer, cfg.eval_samples if run.main else 0)
        if cfg.eval_fn is not None:
            values.update(cfg.eval_fn(model, tokenizer))
        if values.get("val_loss", math.inf) < best:
            best = values["val_loss"]
            if run.main:
                save_weights("best")
        return values

    # ---- the loop
    if step0 == 0 and (values := validate()):
        metrics.log(0, **values)
        print0("before: " + " | ".join(f"{k} {v:.4f}" for k, v in values.items()))
    wrapped = model
    if run.world > 1:
        wrapped = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None)
    no_sync = wrapped.no_sync if run.world > 1 else nullcontext
    t0, steps_timed, tokens_seen = time.time(), 0, 0
    with common.catch_signals() as signals:
        for step in range(step0, max_steps):
            lr = common.lr_at(step, cfg.lr, cfg.lr_final, cfg.warmup_steps, max_steps)
            for group, base in zip(opt.param_groups, base_lrs):
                group["lr"] = base * lr / cfg.lr

            samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)[run.rank::run.world]
            batch = [data[i] for i in common.shuffled(samples, len(data), cfg.seed)]
            # the sum over the whole batch's trained tokens, not a mean of means; x world because DDP averages gradients
            n, n_tokens = common.all_sum(sum(sum(mask[1:]) for _, mask in batch), sum(len(ids) for ids, _ in batch))
            nll = hits = 0.0
            model.train()
            for i in range(accumulation):
                documents = batch[i * cfg.micro_bsz:(i + 1) * cfg.micro_bsz]
                x, y, weight, borders = (pack if cfg.packing else pad)(documents, run.device)
                loss, right = backward(wrapped, x, y, weight * (run.world / n), borders, cfg.chunk_len, cfg.bptt,
                                       nullcontext if i == accumulation - 1 else no_sync, no_sync)
                nll, hits = nll + loss / run.world, hits + right / run.world
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, accuracy, stop = common.all_sum(nll, hits, len(signals))
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise UserError(f"step {step + 1}: loss {loss}, gradient norm {float(grad_norm)}; stopped before this step "
                                f"touched the weights. The last checkpoint in {out} stands; try a lower --lr or --dtype=float32")
            opt.step()
            opt.zero_grad()
            done, steps_timed, tokens_seen, values = step + 1, steps_timed + 1, tokens_seen + n_tokens, {}

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                seconds = (time.time() - t0) / steps_timed
                values = dict(loss=loss, accuracy=accuracy, lr=lr, grad_norm=float(grad_norm),
                              tokens_per_s=tokens_seen / steps_timed / seconds, **values)
                metrics.log(done, **values)
                print0(f"step {done}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {float(grad_norm):.2f} | "
                       f"{values['tokens_per_s']:,.0f} tokens/s | {common.duration(seconds * (max_steps - done))} left"
                       + "".join(f" | {k} {v:.4f}" for k, v in values.items() if k not in (
                           "loss", "lr", "grad_norm", "tokens_per_s")))
            if done == max_steps:
                save(done, "final")
            elif cfg.save_every and done % cfg.save_every == 0:
                save(done, str(done))
                metrics.plot("loss", "val_loss")
            if stop and done < max_steps:
                save(done)
                metrics.plot("loss", "val_loss")
                print0(f"saved {out / 'last.pt'} at step {done}/{max_steps}; go on with the same command and --resume")
                sys.exit(130)
    metrics.plot("loss", "val_loss")
    if step0 >= max_steps:
        print0(f"{out} is already at step {step0} of {max_steps}; give a larger --max_steps to go on")
        return
    print0(f"done in {common.duration(time.time() - t0)}: "
           f"{out / ('rwkv-final.pth' if full else 'lora-final.safetensors')}, {out / 'metrics.png'}")


if __name__ == "__main__":
    main(load_config(Config))
