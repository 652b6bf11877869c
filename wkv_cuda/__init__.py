"""WKV-6 and WKV-7, the recurrences of RWKV-6 (x060) and RWKV-7 (x070).

Shapes: B rows, T time, H heads, N head size; r k v a b [B, T, H, N]; logw = log of the decay, <= 0,
same shape; u [H, N]; state [B, H, N, N], rows = value, columns = key. Packed: B = 1, `cu_seqlens`
[D + 1] gives the borders of D documents laid end to end, state [D, H, N, N]; a document of length 0
passes its state through. Who calls once per layer gives packed.CuSeqlens, made and checked once.

`naive` below is the specification. The other forms agree with it to rounding:
  "chunked"   PyTorch matrix products over chunks of tokens, any device (chunked.py)
  "cpu"       C++, a task per sequence and head, built by the first call that needs a gradient
              (cpu.py)
  "cuda_seq"  a CUDA thread block per sequence and head, token by token, built at first use
              (cuda_seq.py)
  "cuda"      the same on tensor cores, 16 tokens at a time, for bf16 (cuda.py)
Within cuda_token.in_place(), one token of every row on CUDA writes to the
state that it is given (cuda_token.py).
torch.export and torch.onnx get one of standard operators instead (exported.py).
"""

import warnings
from itertools import pairwise

import torch

from . import chunked, cpu, cuda, cuda_seq, cuda_token, exported, native, packed

COMPILED = {"cpu": cpu, "cuda_seq": cuda_seq, "cuda": cuda}
BACKENDS = ("naive", "chunked", *COMPILED)


def wkv7(r, logw, k, v, a, b, state=None, *, cu_seqlens=None, backend=None):
    """RWKV-7 (arXiv 2503.14456, section 3), read after the update:

      S <- S diag(w) + (S a) b' + v k';  y = S r

    Returns (y [B, T, H, N] in r's dtype, state [B or D, H, N, N] in float32, or float64 for float64
    inputs); both carry gradients, also to the initial state. `backend`: one of BACKENDS, or None
    for the fastest that fits. ValueError on shapes that do not fit together.
    """
    return _run(7, backend, dict(r=r, logw=logw, k=k, v=v, a=a, b=b), state, cu_seqlens)


def wkv6(r, logw, k, v, u, state=None, *, cu_seqlens=None, backend=None):
    """RWKV-6 (arXiv 2404.05892, section 4), read before the update:

      y = (S + v (u * k)') r;  S <- S diag(w) + v k'

    u [H, N]; the rest as in wkv7. The decay has no lower bound.
    """
    return _run(6, backend, dict(r=r, logw=logw, k=k, v=v, u=u), state, cu_seqlens)


def _check(inputs, state, cu_seqlens):
    """ValueError for shapes or devices that do not fit; -> (state, cu_seqlens).

    The state, zeros for None, is in the dtype to compute in: float32, or float64 for float64
    inputs. cu_seqlens is packed.CuSeqlens, or None.
    """
    r = inputs["r"]
    if r.dim() != 4 or not r.is_floating_point():
        raise ValueError(f"r is {r.dtype} {tuple(r.shape)}, expected floats [B, T, H, N]")
    B, T, H, N = r.shape
    for name, x in inputs.items():
        shape, axes = ((H, N), "[H, N]") if name == "u" else (r.shape, "[B, T, H, N]")
        if x.shape != shape or x.device != r.device or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected floats {axes} = "
                f"{tuple(shape)} on {r.device} like r"
            )
    cu_seqlens = packed.cu_seqlens_of(cu_seqlens, B, T, r.device)
    if cu_seqlens is not None:
        B = len(cu_seqlens.host) - 1
    dtype = torch.promote_types(r.dtype, torch.float32)
    if state is None:
        return r.new_zeros(B, H, N, N, dtype=dtype), cu_seqlens
    shape = (B, H, N, N)
    if state.shape != shape or state.device != r.device or not state.is_floating_point():
        raise ValueError(
            f"state is {state.dtype} {tuple(state.shape)} on {state.device}, expected floats "
            f"[sequences, H, N, N] = {shape} on {r.device}"
        )
    return state.to(dtype), cu_seqlens


def _run(version, backend, named, state, cu_seqlens):
    state, cu_seqlens = _check(named, state, cu_seqlens)
    inputs = tuple(named.values())
    if backend is None and cu_seqlens is None and native.is_exported():
        return exported.wkv(version, inputs, state)
    if backend is None and cu_seqlens is None and cuda_token.takes(inputs, state):
        return cuda_token.wkv(version, inputs, state)
    backend = backend or _fastest(inputs, state)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("naive", "chunked"):
        form = naive if backend == "naive" else chunked.wkv
        return form(version, inputs, state, cu_seqlens and cu_seqlens.host)
    form = COMPILED[backend]
    if missing := form.unavailable():
        raise RuntimeError(f"backend {backend!r}: {missing}")
    if wrong := _unsupported(form, inputs):
        raise ValueError(f"backend {backend!r}: {wrong}")
    return form.wkv(version, inputs, state, cu_seqlens)


def _unsupported(form, inputs):
    """What these inputs, r logw k v and the rest, have that a compiled form does not take; None."""
    device, N = inputs[0].device, inputs[0].shape[-1]
    if device.type != form.DEVICE:
        return f"r is on {device}, not {form.DEVICE}"
    if N not in form.HEAD_SIZES:
        return f"head size {N}, not {' or '.join(map(str, form.HEAD_SIZES))}"
    for i, x in enumerate(inputs):
        # logw and u are used in float32, whatever they are.
        if i != 1 and x.dim() == 4 and x.dtype not in form.DTYPES:
            return f"{x.dtype}, not {' or '.join(map(str, form.DTYPES))}"
    return None


def _fastest(inputs, state):
    """The backend for None. On a CPU only a call that needs a gradient, or that torch.compile
    records, builds the C++."""
    r = inputs[0]
    if r.is_cuda and r.dtype != torch.float64:
        sequential = not (_unsupported(cuda_seq, inputs) or cuda_seq.unavailable())
        if sequential and r.shape[1] == 1:
            return "cuda_seq"  # one token: nothing to gain
        if not (missing := _unsupported(cuda, inputs) or cuda.unavailable()):
            return "cuda"
        other = "sequential kernel" if sequential else "PyTorch form"
        warnings.warn(  # shown once
            f"no WKV kernel on tensor cores ({missing}); the slower {other} takes over",
            stacklevel=2,
        )
        if sequential:
            return "cuda_seq"
    if not _unsupported(cpu, inputs):
        train = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
        if (train or r.shape[1] > 1) and not cpu.unavailable(train or native.is_traced()):
            return "cpu"
    return "naive" if r.shape[1] == 1 else "chunked"


def naive(version, inputs, state, cu_seqlens):
    """The specification: one loop over T, over all rows and heads. Autograd keeps every state.

    r' S.T for S r, and sums in place: the same numbers, and on a CPU several times faster for one
    token of many rows.
    """
    if cu_seqlens is not None:
        documents = []
        for d, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            of_document = [x if x.dim() == 2 else x[:, start:end] for x in inputs]
            documents.append(naive(version, of_document, state[d : d + 1], None))
        ys, states = zip(*documents, strict=True)
        return torch.cat(ys, 1), torch.cat(states)
    S, ys = state, []
    if version == 7:
        r, logw, k, v, a, b = [x.to(S.dtype) for x in inputs]
        for t in range(r.shape[1]):
            Sa = a[:, t, :, None] @ S.mT  # [B, H, 1, N]
            S = S * logw[:, t].exp()[:, :, None]
            S = S.addcmul_(Sa.mT, b[:, t, :, None])  # S + (S a) b', in place, in the new S
            S = S.addcmul_(v[:, t, ..., None], k[:, t, :, None])  # S + v k'
            ys.append((r[:, t, :, None] @ S.mT)[:, :, 0])  # [B, H, N]
    else:
        r, logw, k, v, u = [x.to(S.dtype) for x in inputs]
        for t in range(r.shape[1]):
            vk = v[:, t, ..., None] * k[:, t, :, None]  # [B, H, N, N]
            ys.append(((S + u[:, None] * vk) @ r[:, t, :, :, None])[..., 0])
            S = S * logw[:, t].exp()[:, :, None] + vk
    y = torch.stack(ys, 1) if ys else torch.zeros_like(r)
    return y.to(inputs[0].dtype), S
