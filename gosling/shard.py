"""Models that do not fit one device: every process holds its share of each weight (fully_shard).

    shard=none   DDP: each process holds all weights, gradients and moments
    shard=fsdp   each holds a share of them. A block's weights are gathered for its forward, let go,
                 and gathered again for its backward, which leaves a share of each gradient

fully_shard is PyTorch's; it is put on each block, and on the whole for embedding and head. Whole on
every process stays what the network reads in float32, the decay's base, and what trains with
--tune=state or head, which is tiny; `average_gradients` is for these.

All processes must gather at the same moments. In a training step they do. To validate and to sample
they run the network each in its own time: for that, `whole` gathers all weights beforehand, or,
where memory does not take them, makes every process wait for the others at each forward.
"""

import contextlib
import functools
import os
import warnings

from gosling import processes
from gosling.config import UserError, print0
from model import TokenScores, init_parameter

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

LARGE = 2**20  # numbers of a parameter of which each process makes its part alone
STAY_WHOLE = ("att.w0", "att.time_decay")
# A block returns views of its activations; nothing here changes them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def shards(cfg, run):
    """Whether the model is to be in shares. One process has all, so that a run may shrink to it.

    A fork's settings may have no such field.
    """
    return getattr(cfg, "shard", "none") == "fsdp" and run.world > 1


def is_sharded(model):
    return isinstance(model, FSDPModule)


def local(tensor):
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole tensor, on every process; all of them must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


@torch.no_grad()
def fill(p, value):
    """p <- value, which is as large as the whole of p; this process takes its part."""
    if isinstance(p, DTensor):
        value = value.to(p.device, p.dtype)
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)


# ----------------------------------------------------------------------------------------------
# a network in shares


def place(model, cfg, run):
    """Put the network on the device: whole, or with shard=fsdp in shares. Once what trains is set.

    Weights on the meta device get upstream's initial values, with the random numbers that a whole
    network takes. With fsdp one block at a time is whole in memory, then embedding and head.
    """
    if not shards(cfg, run):
        if getattr(cfg, "shard", "none") == "fsdp":
            print0("shard=fsdp: there is one process, which holds all weights")
        model.to(run.device)
        return
    mesh = init_device_mesh(run.device.type, (run.world,))
    dtype = None if run.dtype == torch.float32 else run.dtype
    device = torch.device("cpu") if cfg.cpu_offload else run.device
    of_root = settle(model.emb, "emb", model, run)  # first, as a whole network draws its numbers
    for i, block in enumerate(model.blocks):
        parts = settle(block, f"blocks.{i}", model, run)
        to_shares(block, model, mesh, dtype, cfg)
        set_parts(model, parts, device)
    for name in ("ln_out", "head", "score", "tuned"):
        if getattr(model, name) is not None:
            of_root |= settle(getattr(model, name), name, model, run)
    if model.score is not None:
        to_shares(model.score, model, mesh, None, cfg)  # it is read in float32
    to_shares(model, model, mesh, dtype, cfg)
    set_parts(model, of_root, device)
    run.wrappers.append(model)
    model.register_forward_pre_hook(even_out, with_kwargs=True)
    model.register_forward_hook(cut_back)
    model.padding, model.alone, model.has_run = 0, False, False
    model.gathers_all = gathers_all(model, cfg, run)
    share = sum(local(p).nbytes for p in model.parameters()) / 1e6
    how = "gathered once" if model.gathers_all else "gathered block by block, in step"
    print0(
        f"shard=fsdp: {share:,.1f} MB of weights on rank 0 of {run.world}; to validate and to "
        f"sample, weights are {how}"
    )


def settle(module, prefix, model, run):
    """Give each parameter of a module its numbers, if it has none, its dtype and its device.

    A large one is left on the meta device. -> {official name: this process's part of it}, for
    set_parts, so that it is not whole in memory, or, new, one at a time.
    """
    parts = {}
    for name, p in list(module.named_parameters()):
        official = f"{prefix}.{name}"
        value = p.detach()
        if p.is_meta:
            value = torch.empty(p.shape)
            init_parameter(official, value, model.config)
        dtype = run.dtype
        if model.tune == "full" or p.requires_grad and model.tune or official == "score.weight":
            dtype = torch.float32
        parent, _, leaf = name.rpartition(".")
        if value.dim() == 2 and value.shape[0] % run.world == 0 and value.numel() >= LARGE:
            part = value.chunk(run.world)[run.rank]
            parts[official] = part.clone() if p.is_meta else part  # from a file, it is not read yet
            value = torch.empty(value.shape, dtype=dtype, device="meta")
        else:
            value = value.to(run.device, dtype)
        setattr(module.get_submodule(parent), leaf, nn.Parameter(value, p.requires_grad))
    return parts


def set_parts(model, parts, device):
    """Give parameters that are in shares on the meta device this process's parts."""
    for name, part in parts.items():
        parent, _, leaf = name.rpartition(".")
        p = model.get_parameter(name)
        mine = torch.empty(part.shape, dtype=p.dtype, device=device).copy_(part)
        whole = DTensor.from_local(
            mine, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        setattr(model.get_submodule(parent), leaf, nn.Parameter(whole, p.requires_grad))


def to_shares(module, model, mesh, dtype, cfg):
    """fully_shard of what is in a module and not in shares yet. dtype: to compute in, or None."""
    is_tiny = model.tune in ("state", "head")
    stay_whole = {
        p
        for name, p in model.named_parameters()
        if name.endswith(STAY_WHOLE) or name.startswith("tuned.") or (is_tiny and p.requires_grad)
    }
    fully_shard(
        module,
        mesh=mesh,
        shard_placement_fn=axis_of,
        mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy(),
        ignored_params=stay_whole,
    )
    model.keep_casts = False  # what is gathered is in the dtype to compute in


def axis_of(p):
    """Where a parameter is divided: None = at its first axis; vectors are [1, 1, C]."""
    world = dist.get_world_size()
    if p.shape[0] < world and p.shape[-1] % world == 0:
        return Shard(p.dim() - 1)
    return None


# ----------------------------------------------------------------------------------------------
# a step


def wrap(model, run):
    """-> (the model to call while training, its no_sync): DDP when there are several processes."""
    if is_sharded(model):
        return model, functools.partial(without_reduction, model)
    if run.world == 1:
        return model, contextlib.nullcontext
    # Without device_ids: with them DDP takes cu_seqlens to the device, and it is read on the host.
    wrapped = nn.parallel.DistributedDataParallel(model)
    run.wrappers.append(wrapped)
    return wrapped, wrapped.no_sync


@contextlib.contextmanager
def without_reduction(model):
    """DDP's no_sync: gradients add up on each process, and the next backward shares them out."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def average_gradients(model):
    """Of what is whole on every process of a model in shares, as DDP does it with all."""
    if not is_sharded(model):
        return
    for p in model.parameters():
        if p.grad is not None and not isinstance(p, DTensor):
            p.grad.copy_(processes.all_reduce(p.grad.clone()) / dist.get_world_size())


@torch.no_grad()
def clip_gradients(model, largest):
    """Scale all gradients down if their norm, over all shares, is above `largest` -> the norm."""
    if getattr(model, "norms", None):  # the gradients have gone: optimizer.step_in_backward
        norm = torch.stack(model.norms).norm()
        model.norms.clear()
        return norm
    if not is_sharded(model):
        return clip_grad_norm_(model.parameters(), largest)
    average_gradients(model)
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    in_shares = [p.grad.to_local() for p in with_gradient if isinstance(p, DTensor)]
    in_whole = [p.grad for p in with_gradient if not isinstance(p, DTensor)]
    of_all = processes.all_reduce(get_total_norm(in_shares).square())
    norm = (of_all + get_total_norm(in_whole).square().to(of_all.device)).sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in in_shares + in_whole:
        gradient.mul_(scale.to(gradient.device))
    return norm


def even_out(model, args, kwargs):
    """Before a forward in chunks: the packed row gets a last document of zeros, so that it is as
    long as the longest one of all processes, and all gather a block equally often."""
    model.padding = 0
    idx, cu_seqlens = args[0], kwargs.get("cu_seqlens")
    if not kwargs.get("chunk_len") or cu_seqlens is None:
        return None
    if model.alone:  # no gradient: a row may run whole
        return args, {**kwargs, "chunk_len": 0}
    longest = torch.tensor(idx.shape[1], device=idx.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    model.padding = int(longest) - idx.shape[1]
    if model.padding == 0:
        return None
    state = args[1] if len(args) > 1 else kwargs.pop("state", None)
    if state is not None:
        state = {k: torch.cat([v, torch.zeros_like(v[:, :1])], 1) for k, v in state.items()}
    kwargs["cu_seqlens"] = F.pad(torch.as_tensor(cu_seqlens), (0, 1), value=int(longest))
    if kwargs.get("targets") is not None:
        kwargs["targets"] = F.pad(kwargs["targets"], (0, model.padding))
    return (F.pad(idx, (0, model.padding)), state), kwargs


def cut_back(model, args, output):
    """After it: what came of the zeros goes, and without a gradient embedding and head are let go,
    which else stay gathered, as they are now, until a backward."""
    model.has_run = True
    if not torch.is_grad_enabled() and not model.alone:
        model.reshard()
    if model.padding == 0:
        return output
    out, state = output
    state = {key: value[:, :-1] for key, value in state.items()}
    if isinstance(out, TokenScores):
        out = TokenScores(*(values[:, : -model.padding] for values in out))
    elif out is not None:  # of each document's last token
        out = out[:-1]
    return out, state


# ----------------------------------------------------------------------------------------------
# validation, sampling


def gathers_all(model, cfg, run):
    """Whether all weights, in the dtype that is computed in, are gathered to validate and sample.

    gather=auto: where they take at most half of the memory that is free on every process.
    """
    if cfg.gather == "block" and cfg.cpu_offload:
        raise UserError("gather=block does not go with cpu_offload; leave one of them out")
    if cfg.gather != "auto" or cfg.cpu_offload:
        return cfg.gather != "block"
    needed = sum(p.numel() for p in model.parameters()) * run.dtype.itemsize
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return all(processes.gather([needed < free / 2]))


@contextlib.contextmanager
def whole(*models):
    """`with whole(model):` each process may run these models in its own time, without gradients.

    Models that are not in shares, and None, are left as they are.
    """
    models = [model for model in models if model is not None and is_sharded(model)]
    models = [model for model in models if not model.alone]  # a caller has done it
    with contextlib.ExitStack() as stack:
        for model in models:
            model.alone = True
            stack.callback(setattr, model, "alone", False)
        for model in models:
            if model.gathers_all:
                stack.enter_context(gathered(model))
        in_turn = [model for model in models if not model.gathers_all]
        if in_turn:
            stack.enter_context(in_step(in_turn))
        yield


@contextlib.contextmanager
def gathered(model):
    """All weights on every process, until the end."""
    if not model.has_run:  # PyTorch sets itself up at a first forward of the whole
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.emb.weight.device))
    units = [module for module in model.modules() if is_sharded(module)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


@contextlib.contextmanager
def in_step(models):
    """Every forward of one process is one of all: who has nothing to run runs a single token.

    Before a forward, and before processes talk of other things, they agree on whose turn it is: the
    first model that any of them wants.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=models[0].emb.weight.device)
    standing_in = False

    def agree(wanted):
        """Run single tokens of what others want, until it is the turn of `wanted`, a model's
        number, or, for None, nobody wants anything."""
        nonlocal standing_in
        if standing_in:
            return
        while True:
            votes = torch.tensor([i == wanted for i in range(len(models))], device=token.device)
            votes = votes.long()
            dist.all_reduce(votes)
            if not votes.any():
                return
            turn = int(votes.nonzero()[0])
            if turn == wanted:
                return
            standing_in = True
            models[turn](token)
            standing_in = False

    def before_forward(model, args):
        agree(models.index(model))

    hooks = [model.register_forward_pre_hook(before_forward, prepend=True) for model in models]
    processes.before_talk.append(lambda: agree(None))
    try:
        with torch.no_grad():
            yield
    finally:
        agree(None)
        processes.before_talk.pop()
        for hook in hooks:
            hook.remove()
        for model in models:
            model.reshard()
