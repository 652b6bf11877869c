"""compile = True: the blocks of a network through torch.compile, for what trains.

Every block is one graph, forward and backward, with the recurrence inside it as an operator; one
graph serves all layers but the first. A block takes rows of any length, and packed documents: where
they begin is worked out before (wkv_cuda/packed.py), so that no size in a block depends on the
data. Embedding, head and loss stay as they are, and so does what runs without gradients:
validation, references, sampling.
"""

import functools

from gosling.config import UserError, print0
from gosling.shard import is_sharded
from wkv_cuda import cpu, cuda_seq

import torch

# Graphs of one block: with one token or one document its sizes are constants, and so on.
MOST_GRAPHS = 64


def compile_blocks(model, cfg, backend="inductor"):
    """If cfg.compile: the blocks' training pass through torch.compile, made at the first steps.

    UserError where the recurrence has no operator to be one graph with.
    """
    if not getattr(cfg, "compile", False):
        return
    if is_sharded(model):
        raise UserError("compile is not for shares; leave it out, or --shard")
    device, head_size = model.emb.weight.device.type, model.config.head_size
    form = {"cpu": cpu, "cuda": cuda_seq}.get(device)
    if form is None:
        raise UserError(f"compile is for cpu and cuda, not {device}; leave it out")
    if head_size not in form.HEAD_SIZES:
        sizes = ", ".join(map(str, form.HEAD_SIZES))
        raise UserError(f"compile wants head_size {sizes} on {device}, not {head_size}")
    if missing := form.unavailable():
        raise UserError(f"compile needs the compiled recurrence: {missing}; leave it out")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    model.keep_casts = False  # a graph has casts of its own, fused with what reads them
    for block in model.blocks:
        # Of the forward alone, so that hooks and checkpointing stay outside of the graph.
        compiled = torch.compile(block.forward, dynamic=True, fullgraph=True, backend=backend)
        block.forward = functools.partial(train_compiled, compiled, block.forward)
    print0("compile: the first steps wait for torch.compile, a minute or more")


def train_compiled(compiled, plain, *args):
    """A block's forward: compiled where a gradient is wanted, else as it is."""
    return (compiled if torch.is_grad_enabled() else plain)(*args)
