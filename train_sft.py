"""Supervised fine-tuning on conversations, full or LoRA: the loss is on the assistant's words and on what ends them.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | x_1 .. x_t)       m = 1 where x_{t+1} is trained, N = sum of m over the batch

N counts the whole optimiser batch, over micro-batches and processes, so the loss is the same however it is split. Documents
lie end to end (cu_seqlens) and each starts from a zero state: no padding, and no document feels another. A document longer
than memory is trained exactly: with chunk_len its activations are kept for one chunk at a time, and the state's gradient
is carried backwards from chunk to chunk (bptt = "full"), or cut there ("truncated").

Usual mistakes: training on the prompt; a mean of micro-batch means over ragged masks; the end token left out of the loss,
after which the model never stops; padding, which a recurrence feels. LoRA: arXiv 2106.09685.

    python train_sft.py config/sft_tiny.py                                      a laptop: exact match 0.00 -> 0.75
    python train_sft.py config/sft_1b5.py --tune=lora                           one GPU
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable, Literal

import torch

import common
import prepare
import sample
from common import UserError, load_config, print0
from model import backward, evaluate, load_to_tune, pack, pad


@dataclass
class Config(common.TuneConfig):
    data: str = (
        "data/sft.jsonl"  # JSONL of conversations; prepare.py show FILE prints what is trained
    )
    template: Callable | None = (
        None  # of your own: (row, tokenizer) -> (ids, mask); a function in the config file
    )
    last_reply_only: bool = False  # train on each conversation's last reply alone
    tune: Literal["full", "lora"] = "full"  # every weight, or an adapter beside the large matrices
    out_dir: str = "out/sft"  # folder for weights or adapters, last.pt, config.json, metrics
    micro_bsz: int = 8  # documents per process and backward pass: lower it when memory runs out
    global_bsz: int = (
        32  # documents per optimiser step, over all processes; accumulation follows from it
    )
    ctx_len: int = 4096  # longest document in tokens; longer ones are cut, and counted
    packing: bool = True  # documents end to end; false = right padding (slower, the same loss)
    chunk_len: int = 0  # tokens whose activations are kept at a time; 0 = whole documents
    bptt: Literal["full", "truncated"] = "full"  # the gradient across chunks: exact, or cut
    lr: float = 2e-5  # peak learning rate; LoRA wants about ten times more
    lr_final: float = 2e-6  # learning rate at the end of the cosine
    eval_samples: int = 3  # held-out prompts whose generated answers are printed at each validation


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    # ---- model and tokenizer
    model = load_to_tune(cfg, run)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    about = common.origin(cfg, model, tokenizer)

    # ---- data
    if cfg.chunk_len and not cfg.packing:
        raise UserError("chunk_len needs packing")
    read = lambda path: prepare.read_examples(
        path, tokenizer, cfg.ctx_len, cfg.template, cfg.last_reply_only
    )  # noqa: E731
    data, val = read(cfg.data), read(cfg.val_data) if cfg.val_data else None
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- optimiser: upstream's groups, printed
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(data):,} documents, {sum(len(ids) for ids, _ in data):,} tokens, {sum(sum(m) for _, m in data):,} "
        f"trained; {max_steps:,} steps of {cfg.global_bsz} documents = {max_steps * cfg.global_bsz / len(data):.2f} epochs"
    )

    # ---- a new run, or on from last.pt
    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        data_order=dict(ctx_len=cfg.ctx_len, documents=len(data)),
        kept=dict(best=math.inf),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, cfg.out_dir),
        about=about,
        plot=("loss", "val_loss"),
    )

    def validate():
        """{name: number} on held-out data, and the best checkpoint"""
        model.eval()
        values = {}
        if val is not None:
            values = evaluate(model, val, cfg, run)
            sample.show_answers(model, val, tokenizer, cfg.eval_samples if run.main else 0)
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
            # the sum over the whole batch's trained tokens, not a mean of means; x world because DDP averages gradients
            n, n_tokens = common.all_sum(
                sum(sum(mask[1:]) for _, mask in batch), sum(len(ids) for ids, _ in batch)
            )
            nll = hits = 0.0
            model.train()
            for i, documents in enumerate(common.chunks(batch, cfg.micro_bsz)):
                x, y, weight, borders = (pack if cfg.packing else pad)(documents, run.device)
                loss, right = backward(
                    wrapped,
                    x,
                    y,
                    weight * (run.world / n),
                    borders,
                    cfg.chunk_len,
                    cfg.bptt,
                    nullcontext if i == accumulation - 1 else no_sync,
                    no_sync,
                )
                nll, hits = nll + loss.sum() / run.world, hits + right.sum() / run.world
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
            loss, accuracy, stop = common.all_sum(nll, hits, len(signals))
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
                    accuracy=accuracy,
                    **values,
                )
            common.end_step(cfg, save, done, max_steps, stop)
    common.end_run(cfg, metrics, max_steps, "*-final.*")


if __name__ == "__main__":
    main(load_config(Config))
