"""The recurrence on tensor cores, 16 tokens at a time: wkv6_chunk.cu and wkv7_chunk.cu as PyTorch ops with gradients.

bf16 in and out, head size 64, compute capability 8.0 and newer. Products are of fp16 numbers, scaled by powers of two and
summed in fp32; the carried state is fp32. For the backward pass one fp16 state per 32 tokens is kept. No atomics, so the
same inputs give the same bits. Built together with the sequential kernels (cuda_seq.py), which take everything else.
"""
import functools

import torch
import torch.nn.functional as F

from . import chunked, cuda_seq
from .cuda_seq import _flatten, _launch, _register, _wants_grad


def wkv7(r, logw, k, v, a, b, state=None, cu_seqlens=None):
    """As cuda_seq.wkv7, r k v a b in bf16, logw in fp32 or bf16. A log w below -14 counts as -14, a factor of 1e-6."""
    inputs, state, cu = _flatten("wkv7", dict(r=r, logw=logw, k=k, v=v, a=a, b=b), state, cu_seqlens, chunked=True)
    y, state, *_ = _wkv7(*inputs, state, cu, _wants_grad(*inputs, state))
    return y.view(r.shape), state


def wkv6(r, logw, k, v, u, state=None, cu_seqlens=None):
    """As cuda_seq.wkv6, r k v in bf16, logw in fp32 or bf16, of any size."""
    inputs, state, cu = _flatten("wkv6", dict(r=r, logw=logw, k=k, v=v), state, cu_seqlens, chunked=True)
    inputs.append(cuda_seq._check_u(u, r))
    y, state, *_ = _wkv6(*inputs, state, cu, _wants_grad(*inputs, state))
    return y.view(r.shape), state


@torch.compiler.assume_constant_result
def unavailable():
    """None if the kernels can be used here, else one line that says what is missing. Builds them on the first call."""
    if missing := cuda_seq.unavailable():
        return missing
    if torch.cuda.get_device_capability() < (8, 0):
        return "{} has compute capability {}.{}, the tensor-core kernels need 8.0".format(
            torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    return trial("cuda")


@functools.cache
def trial(device):
    """None if outputs and gradients of a small case are the PyTorch form's, else one line. A card proves itself once a process."""
    g = torch.Generator().manual_seed(0)
    r, k, v, x, z = (torch.randn(1, 70, 1, 64, generator=g) for _ in range(5))
    kappa, logw, state = F.normalize(x, dim=-1), -0.6 * z.sigmoid(), torch.randn(1, 1, 64, 64, generator=g)
    for version, rest in ((7, (-kappa, kappa * x.sigmoid())), (6, (x[0, 0],))):
        results = []
        for form in (wkv7 if version == 7 else wkv6, chunked.wkv7 if version == 7 else chunked.wkv6):
            with torch.enable_grad():
                inputs = [t.to(device, torch.bfloat16, copy=True).requires_grad_() for t in (r, logw, k, v, *rest)]
                inputs += [state.to(device, copy=True).requires_grad_()]
                if form.__module__ == chunked.__name__:
                    inputs = [t.detach().float().requires_grad_() for t in inputs]
                y, last = form(*inputs, cu_seqlens=None)
                grads = torch.autograd.grad(y.float().square().sum() + last.square().sum(), inputs)
            results.append([t.detach().float() for t in (y, last, *grads)])
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results))
        if not worst < 2e-2:
            return f"wkv{version} is off by {worst:.1e} on this card; please report it, with its name and driver"


def unsupported(inputs):
    """None, or what these inputs have that the kernels do not take: r, logw, k, v, then a b or u."""
    vectors = [x for x in (inputs[0], *inputs[2:]) if x.dim() == 4]
    if inputs[0].shape[-1] != 64:
        return f"head size {inputs[0].shape[-1]}, not 64"
    if other := [x.dtype for x in vectors if x.dtype != torch.bfloat16]:
        return f"{other[0]}, not torch.bfloat16"


_wkv7 = _register("wkv7_chunk", _launch, "r", "logw", "k", "v", "a", "b", "state", chunked=True)
_wkv6 = _register("wkv6_chunk", _launch, "r", "logw", "k", "v", "u", "state", chunked=True)
