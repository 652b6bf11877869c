"""Weights in the dtype to compute in: cast where they are used, or copies that are kept.

Weights that train are float32 while the network may compute in bfloat16, and `cast` stands wherever
one is used. By itself it rounds the weight there and then: 32 kernels for a layer of RWKV-7, in
each pass over a micro-batch, and as many to take the gradients back to float32. Inside of `keep` it
hands out copies that are made once for an optimiser step, those of a block together, and the
gradients of a block go back together. The rounding is the same, and so is every bit.

model.py keeps copies of its blocks and its head in passes with gradients, but not with grad_cp,
which is there to save memory: a copy takes 2 bytes for each weight, and stays. Without grad_cp
autograd would hold as much from forward to backward. A decode step (gosling/graph.py) has copies
that are refreshed when it is told to.
"""

import contextlib
import contextvars
import operator
import types
import weakref

import torch
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import native

# {(id of a weight, dtype): its copy}
in_use = contextvars.ContextVar("in_use", default=types.MappingProxyType({}))
of_modules = weakref.WeakKeyDictionary()  # module -> its Copies
steps_taken = 0  # by all optimisers


def cast(weight, dtype):
    """A weight in this dtype: the copy that is in use, else cast now."""
    copy = copy_in_use(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def copy_in_use(weight, dtype):
    """The copy of a weight that `cast` gives, or None. torch.compile and torch.export, which would
    make it a constant of their graph, see none."""
    if native.is_traced():
        return None
    return in_use.get().get((id(weight), dtype))


def count_step(*_):
    global steps_taken
    steps_taken += 1


# A fused optimiser changes weights and not their `_version`; many others write into `.data`.
register_optimizer_step_post_hook(count_step)


def keep(module, dtype, is_wanted=True):
    """`with keep(block, x.dtype):` in a pass with gradients `cast` gives kept copies of the
    module's float32 weights.

    They are brought up to date first if an optimiser has taken a step, or a weight was written in
    place or lies elsewhere. One thing goes unnoticed: numbers that are written into a weight's
    `.data` between two passes with gradients of the same step. Write them under torch.no_grad().
    """
    nothing = contextlib.nullcontext()
    is_cast = is_wanted and dtype != torch.float32
    if native.is_traced() or not is_cast or not torch.is_grad_enabled():
        return nothing
    # As module.parameters(), in less than half of its time.
    weights = [p for part in module.modules() for p in part._parameters.values()]
    weights = [p for p in weights if is_master(p)]
    if not weights:
        return nothing
    copies = of_modules.get(module)
    if copies is None or not copies.are_of(weights, dtype):
        copies = of_modules[module] = Copies(weights, dtype)
    copies.refresh_if_stale()
    # A node for every pass: one for several would add up their gradients in low precision.
    return use(table_of(weights, Kept.apply(copies.copies, *weights)))


def table_of(weights, copies):
    """-> what `use` takes"""
    return {(id(p), copy.dtype): copy for p, copy in zip(weights, copies, strict=True)}


@contextlib.contextmanager
def use(table):
    """Inside, `cast` gives the copies of this {(id of a weight, dtype): its copy}."""
    token = in_use.set(table)
    try:
        yield
    finally:
        in_use.reset(token)


def is_master(p):
    """Whether a parameter is float32, with memory of its own: no DTensor."""
    return p is not None and p.dtype == torch.float32 and not is_traceable_wrapper_subclass(p)


class Copies:
    """Copies of weights in a lower precision, at addresses that stay."""

    def __init__(self, weights, dtype):
        self.weights, self.dtype = weights, dtype
        self.places = [place_of(p) for p in weights]
        self.copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in weights]
        self.table = table_of(weights, self.copies)
        self.made_at = None  # the moment of which the copies are

    def are_of(self, weights, dtype):
        """Whether they are copies of these weights, where they lie now."""
        same = len(weights) == len(self.weights) and all(map(operator.is_, weights, self.weights))
        return same and dtype == self.dtype and [place_of(p) for p in weights] == self.places

    def moment(self):
        """A value that is another one whenever a weight may have changed."""
        return steps_taken, [p._version for p in self.weights]

    def refresh_if_stale(self):
        if self.made_at != self.moment():
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Round the weights of now, to the addresses that the copies have."""
        if self.weights:
            torch._foreach_copy_(self.copies, self.weights)
        self.made_at = self.moment()

    def in_use(self):
        """Inside, `cast` gives these copies, without a gradient, whether they are stale or not."""
        return use(self.table)


def place_of(p):
    """Where a tensor's memory is; of fake tensors, too, which have no data_ptr."""
    return p.untyped_storage()._cdata, p.device


class Kept(torch.autograd.Function):
    """Weights -> their copies, as they are; the gradients of all go back to float32 together."""

    @staticmethod
    def forward(ctx, copies, *weights):
        # Aliases, whose version is that of the copies: backward fails if they are written before.
        out = [copy.detach() for copy in copies]
        trains = ctx.needs_input_grad[1:]
        frozen = [copy for copy, trains in zip(out, trains, strict=True) if not trains]
        ctx.mark_non_differentiable(*frozen)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        low = [g for g in grads if g is not None]
        whole = [torch.empty_like(g, dtype=torch.float32) for g in low]
        torch._foreach_copy_(whole, low)
        in_order = iter(whole)
        return None, *(None if g is None else next(in_order) for g in grads)
