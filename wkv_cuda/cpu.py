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
NAMES = ("wkv_cpu.cpp", "step_cpu.cpp", "train_cpu.cpp", "cpu.h")
SOURCES = [Path(__file__).parent / name for name in NAMES]
# Contraction to fused multiply-adds is the only licence with the arithmetic: nothing is reordered.
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
    *["-fopenmp"] * (sys.platform == "linux"),  # PyTorch's wheels bring their libgomp
]


def wkv(version, inputs, state, cu_seqlens):
    return native.run(_ops[version], inputs, state, cu_seqlens)


def pointers(tensors):
    """Tensors, or None, as a C array of addresses."""
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


def integers(numbers):
    return (ctypes.c_int * len(numbers))(*numbers)


def launch(function, *args):
    """Call wkv_cpu: the tensors as pointers; sizes, threads and N as ints."""
    library, missing = _load(build=True)
    if missing:
        raise RuntimeError(f"wkv_cuda.cpu: {missing}")
    tensors = [x for x in args if not isinstance(x, int)]
    numbers = [x for x in args if isinstance(x, int)]
    numbers += [torch.get_num_threads(), args[0].shape[2]]
    # Kept in a list, so that they are alive until the call returns.
    tensors = [None if x is None else x.contiguous() for x in tensors]
    version, is_backward = function[3], function.endswith("backward")
    if library.wkv_cpu(int(version), is_backward, pointers(tensors), integers(numbers)):
        raise RuntimeError(f"wkv{version}: cu_seqlens must rise from 0 to {args[0].shape[0]}")


def stepper(version, weights, sizes):
    """step(ids [M] int64, state, written in place) -> logits [M, V] in float32.

    None if there is no library yet. weights: all of the network's parameters in their order, of one
    dtype of DTYPES; sizes: those of a model's config.
    """
    c, dtype = sizes, weights[0].dtype
    library, _ = _load(build=False)
    ranks = (c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank, c.mix_rank)
    fits_vectors = not any(n % 16 for n in (c.n_embd, c.dim_ffn, *ranks))
    fits_weights = all(w.dtype == dtype in DTYPES and w.is_contiguous() for w in weights)
    if library is None or c.head_size not in HEAD_SIZES or not (fits_vectors and fits_weights):
        return None
    weight_pointers = pointers(weights)

    def step(ids, state):
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}, expected int64 [M]")
        M, N = len(ids), c.head_size
        wkv, shifts = state["wkv"], [state["att_shift"], state["ffn_shift"]]
        if (
            wkv.shape != (c.n_layer, M, c.n_embd // N, N, N)
            or wkv.dtype != torch.float32
            or any(x.shape != (c.n_layer, M, c.n_embd) or x.dtype != dtype for x in shifts)
            or not all(x.is_contiguous() for x in (wkv, *shifts))
        ):
            raise ValueError(f"the state is not one of {M} sequences in {dtype}, contiguous")
        dims = (M, c.n_layer, c.n_embd, N, c.dim_ffn, c.vocab_size, torch.get_num_threads())
        numbers = integers((version, dtype == torch.bfloat16, *dims, *ranks))
        ids, logits = ids.contiguous(), torch.empty(M, c.vocab_size)
        io = pointers((ids, wkv, *shifts, logits))
        if library.rwkv_step(numbers, weight_pointers, io):
            raise ValueError(f"ids must be from 0 to {c.vocab_size - 1}")
        return logits

    return step


def fits(x):
    """Whether the library is there, and score_rows and mix take this tensor.

    It must be float32 on a CPU, with content (bench/memory.py's have none).
    """
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


def mix(x, x_prev, weights, grads=()):
    """x, x_prev [.., C], weights [C] each -> [x + (x_prev - x) m for m in weights].

    With `grads`, those of these results: -> the gradients of x, x_prev and each m.
    """
    check_like(x, (x_prev, *grads), x.shape)
    check_like(x, [m.flatten() for m in weights], x.shape[-1:])
    out = native.empty_like((x, x_prev, *weights) if grads else [x] * len(weights))
    io = [t.contiguous() for t in (x, x_prev, *weights, *grads)] + out
    C, threads = x.shape[-1], torch.get_num_threads()
    sizes = integers((x.numel() // C, C, len(weights), threads))
    _load(build=False)[0].mix(bool(grads), sizes, pointers(io))
    return out


def score_rows(z, targets, temperature, scores=None, grads=None, l2wrap=0.0):
    """Rows of logits z [M, V] -> (logps, entropy, hits, lse) of the targets [M], each [M].

    Given these `scores` and `grads` (d loss / d logps, and / d entropy or None): z becomes d loss /
    d z. None, and z as it was, if that is not to be had.
    """
    if not fits(z):
        return None
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, expected int64")
    per_row = [targets, *(scores or ()), *(grads or ())]
    if any(x is not None and x.shape != z.shape[:1] for x in per_row):
        shapes = [None if x is None else tuple(x.shape) for x in per_row]
        raise ValueError(f"{len(z)} rows of logits, but targets and scores of {shapes}")
    if scores is None:
        logps, entropy, lse = (z.new_empty(len(z)) for _ in range(3))
        hits = z.new_empty(len(z), dtype=torch.bool)
        scores = (logps, entropy, hits, lse)
    io = (z, targets, *scores, *(grads or (None, None)))
    io = [x if x is None else x.contiguous() for x in io]
    sizes = integers((*z.shape, torch.get_num_threads()))
    floats = ctypes.c_float(temperature), ctypes.c_float(l2wrap)
    if _load(build=False)[0].score_rows(grads is not None, sizes, *floats, pointers(io)):
        raise IndexError(f"targets must be from 0 to {z.shape[1] - 1}")
    return scores


_ops = {version: native.register(f"wkv{version}_cpu", version, launch) for version in (6, 7)}


@torch.compiler.assume_constant_result
def unavailable(build=True):
    """None if the op can be used now, else what is missing; without `build` nothing is compiled."""
    return _load(build)[1]


@functools.cache
def _place():
    """(Where the library is or will be, the command that builds it); (None, what is missing)."""
    cxx = (os.environ.get("CXX") or "c++").split()
    if shutil.which(cxx[0]) is None:
        remedy = "apt install g++, xcode-select --install, or set CXX"
        return None, f"no C++ compiler: {cxx[0]} is not on PATH ({remedy})"
    command = [*cxx, *FLAGS]
    # The compiler's own macros tell its version and every instruction set of this processor.
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
