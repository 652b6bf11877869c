"""State tuning: every weight frozen, only the state that the recurrence starts from is learned, for one task or for many.

    loss = - (1 / N) sum_t m_t log p(x_{t+1} | S_0, x_1 .. x_t)       S_0 [H, N, N] of each layer is all that trains

A prompt writes a state; here the optimiser writes it, a few MB that turn one frozen model into another. The reference is
the same model with the state off, many states share one model in memory and in a batch, and every RWKV engine reads the
file. It carries a format, a style or a skill that the model half knows; it does not hold many facts, and it fades over
long texts as the decay forgets it. Idea and practice: RWKV-StateTuning, RWKV-PEFT; no paper of its own.

A folder of JSONL files trains one state per file over the same frozen model: each row starts from its own task's state,
loss, token count and clipping are per task, and a task that a batch has no row of is not stepped.

Usual mistakes: learning rates of weights (a state wants 1e-2 and more, it starts from zero); rows and columns swapped
(rows = value); validating inside the training loop's variables, which trains on validation data; weight decay.

    python train_state.py config/state_tiny.py                          a laptop: 0.45 -> 0.99 on a skill SFT never saw
    python train_state.py config/state_1b5.py --data=tasks/             one GPU, a state for each file of the folder
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import prepare
import sample
from common import UserError, load_config, print0
from model import RWKV, backward, evaluate, pack, read_state


@dataclass
class Config(common.RunConfig):
    data: str = "data/sft.jsonl"  # JSONL as for SFT, or a folder of them: a state for each; prepare.py show FILE looks
    val_data: str = ""  # the same for validation, a folder with the same names; empty = none
    template: Callable | None = (
        None  # of your own: (row, tokenizer) -> (ids, mask); a function in the config file
    )
    last_reply_only: bool = False  # train on each conversation's last reply alone
    init_from: str = ""  # weights, which stay as they are (.pth, .safetensors)
    init_state: str = ""  # state file to start from; empty = zero
    init_prompt: str = ""  # or start from the state that this text leaves
    layers: tuple[int, ...] = ()  # train the states of these layers alone, from 0; none = of all
    shift: bool = False  # also train both token-shift vectors; other engines do not read them
    encoder: int = 0  # hidden width of RWKV-StateTuning's encoder (512 there); 0 = the plain state
    out_dir: str = "out/state"  # folder for states, last.pt, config.json, metrics; a subfolder for each of many tasks
    micro_bsz: int = 8  # documents per process and backward pass: lower it when memory runs out
    global_bsz: int = 32  # documents per optimiser step, over all processes and tasks
    ctx_len: int = 4096  # longest document in tokens; longer ones are cut, and counted
    chunk_len: int = (
        0  # tokens whose activations are kept at a time, with exact gradient; 0 = whole documents
    )
    lr: float = 1e-2  # peak learning rate
    lr_final: float = 1e-4  # learning rate at the end of the cosine
    weight_decay: float = 0.0  # on an encoder's matrices alone
    grad_clip: float = 1.0  # largest gradient norm of a task; 0 = no clipping
    eval_samples: int = 3  # held-out prompts whose generated answers are printed at each validation
    eval_off: bool = (
        False  # the same rows with the state off beside, so that the base stays in view
    )
    eval_fn: Callable | None = (
        None  # of your own: (model, tokenizer) -> {name: number}; a function in the config file
    )


# ---------------------------------------------------------------------------------------------------------------------
# the method: many tasks in a batch, and the encoder


def read_tasks(path):
    """A JSONL file, or a folder of them -> {task: file}; a single file's task is ""."""
    if not Path(path).is_dir():
        return {"": path}
    files = {file.stem: str(file) for file in sorted(Path(path).glob("*.jsonl"))}
    if not files:
        raise UserError(
            f"{path} is a folder without .jsonl files; state tuning wants one file for each task"
        )
    return files


def task_weights(weight, borders, tasks, counts):
    """weight [1, T] of packed documents, of the tasks [D] -> (weight / trained tokens of the token's task in the whole
    batch, task of each token [T]); counts [number of tasks], 0 for one that is absent."""
    of_token = tasks.repeat_interleave(borders.diff().to(tasks.device))
    return weight / counts.clamp(min=1)[of_token], of_token


class Encoder(nn.Module):
    """RWKV-StateTuning's way to a state: a learned code per head -> linear -> norm -> tanh -> linear -> norm, for each
    layer its own. The last norm's gain starts at zero, so that training starts from the state without it."""

    def __init__(self, c, hidden, layers, code=64):
        super().__init__()
        self.layers, L, H, size = list(layers), len(layers), c.n_embd // c.head_size, c.head_size**2
        self.shape = c.n_layer, H, c.head_size, c.head_size
        self.code = nn.Parameter(torch.randn(L, H, code) * 0.02)
        self.down = nn.Parameter(torch.randn(L, code, hidden) / code**0.5)
        self.up = nn.Parameter(torch.randn(L, hidden, size) / hidden**0.5)
        self.gain1, self.bias1 = (
            nn.Parameter(torch.ones(L, 1, hidden)),
            nn.Parameter(torch.zeros(L, 1, hidden)),
        )
        self.gain2, self.bias2 = (
            nn.Parameter(torch.zeros(L, 1, size)),
            nn.Parameter(torch.zeros(L, 1, size)),
        )

    def forward(self):
        """-> [n_layer, H, N, N], zero in layers that are not trained"""
        h = torch.tanh(
            F.layer_norm(self.code @ self.down, self.down.shape[-1:]) * self.gain1 + self.bias1
        )
        h = F.layer_norm(h @ self.up, self.up.shape[-1:]) * self.gain2 + self.bias2
        out = h.new_zeros(self.shape)
        return out.index_copy(
            0, torch.tensor(self.layers, device=h.device), h.view(-1, *self.shape[1:])
        )


# ---------------------------------------------------------------------------------------------------------------------


@common.launch
def main(cfg, run):
    # ---- model and tokenizer
    if not cfg.init_from:
        raise UserError(
            "which model? --init_from=FILE, the .pth or .safetensors that the state is for"
        )
    if cfg.init_state and cfg.init_prompt:
        raise UserError(
            "init_state and init_prompt are both given; a state starts from one of them"
        )
    model = RWKV.from_pretrained(cfg.init_from, dtype=run.dtype)
    tokenizer = prepare.tokenizer_of(cfg.init_from, model.config.vocab_size, cfg.tokenizer)
    fingerprint = model.fingerprint()
    model.to(run.device)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    model.prepare_recurrence()

    # ---- data
    read = lambda path: prepare.read_examples(
        path, tokenizer, cfg.ctx_len, cfg.template, cfg.last_reply_only
    )  # noqa: E731
    files = read_tasks(cfg.data)
    names, data = (
        list(files),
        [(*row, k) for k, file in enumerate(files.values()) for row in read(file)],
    )
    val = (
        {name: read(file) for name, file in read_tasks(cfg.val_data).items()}
        if cfg.val_data
        else {}
    )
    if stray := set(val) - set(names):
        raise UserError(
            f"{cfg.val_data}: {sorted(stray)[0] or 'one file'} is no task of {cfg.data}; give a folder with the "
            "same names, or one file for each"
        )
    max_steps, accumulation = common.plan_steps(cfg, run, len(data))

    # ---- the state
    start = read_state(cfg.init_state, model.config)[0] if cfg.init_state else None
    if cfg.init_prompt:
        _, start = sample.prefill(model, [tokenizer.encode(cfg.init_prompt)])
    torch.manual_seed(cfg.seed)
    model.set_tune("state", tasks=len(names), shift=cfg.shift, layers=cfg.layers)
    for tuned in model.tuned:
        if start:
            tuned.load(start)
        if cfg.encoder:
            tuned.wkv.requires_grad_(False)
            tuned.encoder = Encoder(
                model.config, cfg.encoder, cfg.layers or range(model.config.n_layer)
            ).to(run.device)

    # ---- optimiser
    opt = common.make_optimizer(model, cfg, run)
    print0(
        f"data: {len(data):,} documents of {len(names)} tasks, {sum(len(ids) for ids, *_ in data):,} tokens, "
        f"{sum(sum(m) for _, m, _ in data):,} trained; {max_steps:,} steps of {cfg.global_bsz} documents = "
        f"{max_steps * cfg.global_bsz / len(data):.2f} epochs"
    )

    # ---- a new run, or on from last.pt
    out, ends = (
        Path(cfg.out_dir),
        [f"/{name}" if name else "" for name in names],
    )  # of the metrics' names

    def write(name, task=None):
        """The state of one task or of each, under that name; the older numbered ones go."""
        for k in range(len(names)) if task is None else [task]:
            path = out / names[k] / ("best.pth" if name == "best" else f"state-{name}.pth")
            if run.main:
                model.save_state(
                    path,
                    k,
                    **common.origin(cfg, model, tokenizer, path.parent, fingerprint),
                    template=cfg.template.__name__ if cfg.template else "User: …\n\nAssistant: …",
                )
                common.prune(path, cfg.keep_last)

    trained, kept, metrics, write, save = common.open_run(
        cfg,
        run,
        model,
        opt,
        max_steps,
        data_order=dict(ctx_len=cfg.ctx_len, documents=len(data), tasks=names, base=fingerprint),
        kept=dict(best={}),
        tokenizer=lambda: prepare.save_tokenizer(tokenizer, out),
        write=write,
        plot=[f"{what}{end}" for what in ("loss", "val_loss") for end in ends],
    )

    def validate():
        """{name: number} on held-out data, and each task's best checkpoint"""
        values = {}
        for k, (name, end) in enumerate(zip(names, ends)):
            model.task = k
            if name in val:
                now = evaluate(model, val[name], cfg, run)
                if cfg.eval_off:
                    with model.reference():
                        now["val_loss_off"] = evaluate(model, val[name], cfg, run)["val_loss"]
                sample.show_answers(
                    model, val[name], tokenizer, cfg.eval_samples if run.main else 0, cfg.eval_off
                )
                values.update({key + end: value for key, value in now.items()})
                if now["val_loss"] < kept["best"].get(name, math.inf):
                    kept["best"][name] = now["val_loss"]
                    write("best", k)
            if cfg.eval_fn is not None:
                values.update(
                    {key + end: value for key, value in cfg.eval_fn(model, tokenizer).items()}
                )
        return values

    # ---- the loop
    metrics.begin(validate() if metrics.from_step == 0 else {})
    wrapped, no_sync = common.wrap(model, run)
    with common.catch_signals() as signals:
        for step in range(metrics.from_step, max_steps):
            lr = common.set_lr(opt, cfg, step, max_steps)
            batch = [data[i] for i in common.samples_of(step, len(data), cfg, run)]
            # each task's own count over the whole batch; x world because DDP averages gradients
            counts = common.all_sum(
                *(sum(sum(m[1:]) for _, m, task in batch if task == k) for k in range(len(names)))
            )
            counts, n_tokens = (
                torch.tensor(counts, device=run.device),
                common.all_sum(sum(len(ids) for ids, *_ in batch))[0],
            )
            losses = torch.zeros(len(names), device=run.device)
            for i, documents in enumerate(common.chunks(batch, cfg.micro_bsz)):
                x, y, weight, borders = pack([row[:2] for row in documents], run.device)
                tasks = torch.tensor([task for *_, task in documents], device=run.device)
                weight, of_token = task_weights(weight * run.world, borders, tasks, counts)
                loss, *_ = backward(
                    wrapped,
                    x,
                    y,
                    weight,
                    borders,
                    cfg.chunk_len,
                    "full",
                    nullcontext if i == accumulation - 1 else no_sync,
                    no_sync,
                    tasks,
                )
                losses.index_add_(0, of_token, loss[0] / run.world)
            present = [k for k, count in enumerate(counts) if count > 0]
            norms = torch.tensor(
                [
                    float(
                        nn.utils.clip_grad_norm_(
                            model.tuned[k].parameters(), cfg.grad_clip or math.inf
                        )
                    )
                    for k in present
                ]
            )
            *losses, stop = common.all_sum(*losses, len(signals))
            loss, grad_norm = sum(losses[k] for k in present) / len(present), norms.norm()
            common.check_finite(cfg, step, loss, grad_norm)
            for k in set(range(len(names))) - set(
                present
            ):  # Adam would move them on by their momentum
                for p in model.tuned[k].parameters():
                    p.grad = None
            opt.step()
            opt.zero_grad()
            done, values = step + 1, {}
            metrics.tokens += n_tokens

            if done == max_steps or (cfg.eval_every and done % cfg.eval_every == 0):
                values = validate()
            if values or done % cfg.log_every == 0 or done in (1, max_steps):
                if len(names) > 1:
                    values.update({f"loss{ends[k]}": losses[k] for k in present})
                metrics.progress(done, max_steps, loss=loss, lr=lr, grad_norm=grad_norm, **values)
            common.end_step(cfg, save, done, max_steps, stop)
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    common.end_run(cfg, metrics, max_steps, f"{Path(names[0]) / 'state-final.pth'}{more}")


if __name__ == "__main__":
    main(load_config(Config))
