"""C++ for the CPU. wkv_cpu.cpp: the recurrence token by token. step_cpu.cpp: one token through a
whole network, for generation. train_cpu.cpp: the end of the loss, and token mixing.

Compiled in a few seconds by the first call that needs a gradient; sampling does not wait for it.
Head sizes 16, 32, … 128, fp32 and bf16. State and arithmetic are fp32. The number of threads
(torch.set_num_threads) changes no bit of a result.
"""

import ctypes
import functools
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from . import native

DEVICE, HEAD_SIZES, DTYPES = "cpu", tuple(range(16, 129, 16)), (torch.float32, torch.bfloat16)
SOURCES = [
    Path(__file__).parent / name
    for name in ("wkv_cpu.cpp", "step_cpu.cpp", "train_cpu.cpp", "cpu.h")
]
# contraction to fused multiply-adds is the only licence with the arithmetic; nothing here is
# reordered
FLAGS = [
    "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",
    "-O3",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
    *["-fopenmp"] * (sys.platform == "linux"),
]  # PyTorch's wheels bring their libgomp


def wkv(version, inputs, state, cu_seqlens):
    return native.run(_ops[version], inputs, state, cu_seqlens)


def launch(function, *args):
    """Call wkv_cpu: the tensors as pointers; sizes, threads and N as ints."""
    library, missing = _load(build=True)
    if missing:
        raise RuntimeError(f"wkv_cuda.cpu: {missing}")
    args = [
        x.contiguous() if isinstance(x, torch.Tensor) else x for x in args
    ]  # alive until the call returns
    sizes = (ctypes.c_int * 6)(
        *[x for x in args if isinstance(x, int)], torch.get_num_threads(), args[0].shape[2]
    )
    raw = [None if x is None else x.data_ptr() for x in args if not isinstance(x, int)]
    version, direction = function[3], function.endswith("backward")
    if library.wkv_cpu(int(version), direction, (ctypes.c_void_p * len(raw))(*raw), sizes):
        raise RuntimeError(f"wkv{version}: cu_seqlens must rise from 0 to {args[0].shape[0]}")


def stepper(version, weights, sizes):
    """step(ids [M] int64, state, written in place) -> logits [M, V] in float32; None if there is no
    library yet. weights: all of the network's parameters in their order, of one dtype of DTYPES;
    sizes: those of a model's config."""
    c, dtype = sizes, weights[0].dtype
    library, _ = _load(build=False)
    dims = (c.n_embd, c.dim_ffn, c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank, c.mix_rank)
    if (
        library is None
        or c.head_size not in HEAD_SIZES
        or any(n % 16 for n in dims)
        or not all(w.dtype == dtype in DTYPES and w.is_contiguous() for w in weights)
    ):
        return None
    pointers = (ctypes.c_void_p * len(weights))(*[w.data_ptr() for w in weights])

    def step(ids, state):
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}, expected int64 [M]")
        logits, shape = torch.empty(len(ids), c.vocab_size), (c.n_layer, len(ids), c.n_embd)
        ids, shifts = ids.contiguous(), [state["att_shift"], state["ffn_shift"]]
        heads = (*shape[:2], c.n_embd // c.head_size, c.head_size, c.head_size)
        if (
            state["wkv"].shape != heads
            or state["wkv"].dtype != torch.float32
            or any(x.shape != shape or x.dtype != dtype for x in shifts)
            or not all(x.is_contiguous() for x in (state["wkv"], *shifts))
        ):
            raise ValueError(f"the state is not one of {len(ids)} sequences in {dtype}, contiguous")
        io = [ids, state["wkv"], *shifts, logits]
        numbers = (
            version,
            dtype == torch.bfloat16,
            len(ids),
            c.n_layer,
            c.n_embd,
            c.head_size,
            c.dim_ffn,
            c.vocab_size,
            torch.get_num_threads(),
            *dims[2:],
        )
        io = (ctypes.c_void_p * 5)(*[x.data_ptr() for x in io])
        if library.rwkv_step((ctypes.c_int * len(numbers))(*numbers), pointers, io):
            raise ValueError(f"ids must be from 0 to {c.vocab_size - 1}")
        return logits

    return step


def fits(x):
    """Whether score_rows and mix take this tensor: float32 on a CPU, with content
    (bench/memory.py's have none), and the library is there."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
        and _load(build=False)[0] is not None
    )


def check_like(x, others, shape):
    """ValueError for the first that is not of this shape, or not of x's dtype and device."""
    for other in others:
        if other.shape != shape or other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"mix: {other.dtype} {tuple(other.shape)} on {other.device}, expected {x.dtype} "
                f"{tuple(shape)} on {x.device}"
            )


def mix(x, before, weights, grads=()):
    """[x + (before - x) m for m in weights], x and before [.., C]; or with their gradients, those
    of x, before and each m."""
    check_like(x, (before, *grads), x.shape)
    check_like(x, [m.flatten() for m in weights], x.shape[-1:])
    outs = (
        [torch.empty_like(x) for x in (x, before, *weights)]
        if grads
        else [torch.empty_like(x) for _ in weights]
    )
    io = [t.contiguous() for t in (x, before, *weights, *grads)] + outs
    sizes = (ctypes.c_int * 4)(
        x.numel() // x.shape[-1], x.shape[-1], len(weights), torch.get_num_threads()
    )
    _load(build=False)[0].mix(
        bool(grads), sizes, (ctypes.c_void_p * len(io))(*[t.data_ptr() for t in io])
    )
    return outs


def score_rows(z, targets, temperature, scores=None, grads=None, l2wrap=0.0):
    """Rows of logits z [M, V] -> (logps, entropy, hits, lse) of the targets [M], each [M]; given
    these `scores` and `grads` (d loss / d logps, and / d entropy or None): z becomes d loss / d z.
    None, and z as it was, if that is not to be had."""
    if not fits(z):
        return None
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, expected int64")
    per_row = [targets, *(scores or ()), *(grads or ())]
    if any(x is not None and x.shape != z.shape[:1] for x in per_row):
        shapes = [None if x is None else tuple(x.shape) for x in per_row]
        raise ValueError(f"{len(z)} rows of logits, but targets and scores of {shapes}")
    out = scores or [
        torch.empty(len(z), dtype=torch.bool if i == 2 else torch.float32) for i in range(4)
    ]
    io = [x if x is None else x.contiguous() for x in (z, targets, *out, *(grads or (None, None)))]
    pointers = (ctypes.c_void_p * 8)(*[None if x is None else x.data_ptr() for x in io])
    sizes = (ctypes.c_int * 3)(*z.shape, torch.get_num_threads())
    if _load(build=False)[0].score_rows(
        grads is not None, sizes, ctypes.c_float(temperature), ctypes.c_float(l2wrap), pointers
    ):
        raise IndexError(f"targets must be from 0 to {z.shape[1] - 1}")
    return out


_ops = {version: native.register(f"wkv{version}_cpu", version, launch) for version in (6, 7)}


@torch.compiler.assume_constant_result
def unavailable(build=True):
    """None if the op can be used now, else one line that says what is missing. Without `build`
    nothing is compiled."""
    return _load(build)[1]


@functools.cache
def _place():
    """Where the library is or will be, and the command that builds it; (None, what is missing)
    without a compiler."""
    cxx = (os.environ.get("CXX") or "c++").split()
    if shutil.which(cxx[0]) is None:
        remedy = "apt install g++, xcode-select --install, or set CXX"
        return None, f"no C++ compiler: {cxx[0]} is not on PATH ({remedy})"
    command = [*cxx, *FLAGS]
    # the compiler's own macros tell its version and every instruction set of this processor
    macros = [*cxx, FLAGS[0], "-dM", "-E", "-x", "c++", os.devnull]
    return native.place("cpu", command, SOURCES, macros), command


_answer = []  # of _load, once it is final


def _load(build):
    """(the library, None) or (None, what is missing)."""
    if _answer:
        return _answer[0]
    path, command = _place()
    library, missing = native.load(path, command, SOURCES, build) if path else (None, command)
    if build or library:
        _answer.append((library, missing))
        if missing:
            native.say(
                "the C++ recurrence for the CPU cannot be built, training uses the slower "
                f"PyTorch form: {missing}"
            )
    return library, missing
