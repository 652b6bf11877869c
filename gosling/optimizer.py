"""AdamW: its groups, 8-bit moments for a small card, and the step inside the backward pass.

The step inside backward moves each weight as soon as its gradient is whole, and lets the gradient
go, so that one gradient is in memory at a time: https://arxiv.org/abs/2306.09782 (LOMO). 8-bit
moments, https://arxiv.org/abs/2110.02861, are torchao's, a package of its own.
"""

import functools
import math

from gosling.config import UserError, print0
from gosling.shard import is_sharded

import torch

SMALLEST_EPS = 1e-8  # for 8-bit moments
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether there are negative ones


def make_optimizer(model, cfg, run):
    """AdamW over model.param_groups, printed with counts; lr_scale: a group's share of the rate."""
    # train_state.py has neither setting: what it trains is small.
    is_8bit = getattr(cfg, "optim", "adamw") == "adamw8bit"
    in_backward = getattr(cfg, "step_in_backward", False)
    if is_8bit:
        check_8bit(cfg, model)
    if in_backward:
        check_in_backward(cfg, run)
    groups = model.param_groups(cfg.lr, cfg.weight_decay)
    c, n_all = model.config, sum(p.numel() for p in model.parameters())
    print0(
        f"model: {c.version}, {c.n_layer} layers x {c.n_embd}, vocabulary {c.vocab_size}, "
        f"{n_all:,} parameters; trained:"
    )
    for group in groups:
        group["lr_scale"] = group["lr"] / cfg.lr
        n_parameters = sum(p.numel() for p in group["params"])
        print0(
            f"  {group['name']}: {len(group['params'])} tensors, {n_parameters:,} parameters, "
            f"lr {group['lr']:g}, weight decay {group['weight_decay']:g}"
        )
    options = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    if is_8bit:
        opt = torchao().AdamW8bit(groups, **options, block_size=block_size(c.n_embd))
    else:
        fused = run.device.type in ("cpu", "cuda")
        opt = torch.optim.AdamW(groups, **options, fused=fused)
    if in_backward:
        step_in_backward(model, opt)
    return opt


def check_8bit(cfg, model):
    """UserError for what does not go with 8-bit moments."""
    torchao()
    if cfg.adam_eps < SMALLEST_EPS:
        raise UserError(
            f"adam_eps={cfg.adam_eps:g} is too small for optim=adamw8bit: small moments are "
            f"rounded to 0 there, and a step divides by them; give --adam_eps={SMALLEST_EPS:g}"
        )
    if is_sharded(model):
        raise UserError("optim=adamw8bit is not for shares; leave it out, or shard")


def check_in_backward(cfg, run):
    """UserError for what does not go with the step inside backward."""
    if run.world > 1 or cfg.global_bsz != cfg.micro_bsz:
        raise UserError(
            "step_in_backward wants one process and one backward pass a step, so that no gradient "
            f"waits; give --global_bsz={cfg.micro_bsz}, as micro_bsz is, or leave it out"
        )
    if cfg.grad_clip > 0:
        raise UserError(
            f"grad_clip={cfg.grad_clip:g}: step_in_backward moves weights before the norm of all "
            "gradients is known; give --grad_clip=0, or leave it out"
        )
    if getattr(cfg, "bptt", "full") == "truncated":
        raise UserError("bptt=truncated runs several backward passes; leave step_in_backward out")


def block_size(n_embd):
    """How many numbers of an 8-bit moment share a scale: 256, or so many that no two rows of the
    embedding share one. Beside a row of tokens that are often read, all of another rounds to 0."""
    return math.gcd(n_embd, 256)


def torchao():
    try:
        import torchao.optim
    except ImportError as e:
        raise UserError(f"optim=adamw8bit: {e}; pip install torchao, or --optim=adamw") from None
    return torchao.optim


def set_lr(opt, lr):
    """Give each group its share of the learning rate."""
    for group in opt.param_groups:
        share = lr * group["lr_scale"]
        if isinstance(group["lr"], torch.Tensor):  # torchao's, which a compiled step reads
            group["lr"].fill_(share)
        else:
            group["lr"] = share


# ----------------------------------------------------------------------------------------------
# the step inside the backward pass


def step_in_backward(model, opt):
    """From now on, whenever a backward pass has a gradient whole, the optimiser takes its step for
    that parameter and the gradient goes. model.norms: the gradients' norms, until they are read.

    opt.step() and opt.zero_grad() then find nothing left to do.
    """
    model.norms = []
    for number, group in enumerate(opt.param_groups):
        for p in group["params"]:
            step = functools.partial(step_of_one, model, opt, number)
            p.register_post_accumulate_grad_hook(step)


def step_of_one(model, opt, number, p):
    """opt.step() for the parameter p of group `number` alone."""
    if not model.training:  # a backward pass of eval_fn trains nothing
        return
    model.norms.append(p.grad.norm())
    groups = opt.param_groups
    opt.param_groups = [{**groups[number], "params": [p]}]
    try:
        opt.step()
    finally:
        opt.param_groups = groups
    p.grad = None


# ----------------------------------------------------------------------------------------------
# 8-bit moments in files: plain tensors, without torchao's class


def to_plain(optimizer):
    """opt.state_dict() -> the same, with an 8-bit moment as its codes and their scales."""
    state = {}
    for number, values in optimizer["state"].items():
        state[number] = {}
        for key, value in values.items():
            if hasattr(value, "codes"):
                state[number] |= {f"{key}.codes": value.codes, f"{key}.scale": value.scale}
            else:
                state[number][key] = value
    groups = [{**group, "lr": float(group["lr"])} for group in optimizer["param_groups"]]
    return {**optimizer, "state": state, "param_groups": groups}


def from_plain(optimizer):
    """The inverse of to_plain."""
    state = {}
    for number, values in optimizer["state"].items():
        state[number] = dict(values)
        for key, is_signed in MOMENTS.items():
            if f"{key}.codes" in values:
                codes = state[number].pop(f"{key}.codes")
                scale = state[number].pop(f"{key}.scale")
                state[number][key] = eight_bit(codes, scale, is_signed)
    return {**optimizer, "state": state}


def eight_bit(codes, scale, is_signed):
    from torchao.optim.subclass_8bit import OptimState8bit

    size = codes.numel() // scale.numel()
    moment = OptimState8bit.zeros(codes.shape, is_signed, size, codes.device, torch.float32)
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    return moment
