"""C++ for the CPU. wkv_cpu.cpp: the recurrence token by token. step_cpu.cpp: one token through a
whole network, for generation. train_cpu.cpp: the end of the loss, token mixing, and what lies
between products and recurrence.

Compiled in a few seconds by the first call that needs a gradient; sampling does not wait for it.
Head sizes 16, 32, … 128, fp32 and bf16. State and arithmetic are fp32. The number of threads
(torch.set_num_threads) changes no bit of a result.
"""

import ctypes
import functools
import itertools
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from . import native

DEVICE, HEAD_SIZES, DTYPES = "cpu", tuple(range(16, 129, 16)), (torch.float32, torch.bfloat16)
LOGW_DTYPES, FLOATS = (torch.float32,), (torch.float32,)
CPU = torch.device("cpu")
MOST_FEW = 4  # sequences for which it pays to look for what no unit of the channel mix wants
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
        raise ValueError(f"wkv{version}: cu_seqlens must rise from 0 to {args[0].shape[0]}")


def weight_shapes(version, sizes):
    """The shapes of a network's parameters, in the order in which step_cpu.cpp takes them."""
    c = sizes
    C, F, V = c.n_embd, c.dim_ffn, c.vocab_size
    vector, square, norm, heads = (1, 1, C), (C, C), [(C,)] * 2, (C // c.head_size, c.head_size)
    if version == 7:
        attention = [vector] * 6
        for rank in (c.decay_rank, c.iclr_rank, c.value_rank):
            attention += [vector, (C, rank), (rank, C)]
        attention += [(C, c.gate_rank), (c.gate_rank, C), vector, vector, heads, *[square] * 4]
        ffn = [vector, (F, C), (C, F)]
    else:
        attention = [vector] * 6
        attention += [(C, 5 * c.mix_rank), (5, c.mix_rank, C)]
        attention += [vector, (C, c.decay_rank), (c.decay_rank, C), heads, *[square] * 5]
        ffn = [vector, vector, (F, C), (C, F), square]
    layers = [*norm, *norm, *attention, *norm, *ffn] * c.n_layer
    return [(V, C), *norm, *layers, *norm, (V, C)]


def channel_values(version, weights, n_layer):
    """ffn.value.weight of each layer, from the list of which weight_shapes has the order."""
    per_layer = (len(weights) - 6) // n_layer  # beside embedding, head, and the norms at both ends
    at = per_layer + 2 - (version == 6)  # RWKV-6 has ffn.receptance after it
    return weights[at : len(weights) - 3 : per_layer]


def stepper(version, weights, sizes):
    """step(ids [M] int64, state, written in place) -> logits [M, V] in float32.

    None if there is no library yet, or it does not take weights like these. weights: all of the
    network's parameters in their order, of one dtype of DTYPES; sizes: those of a model's config.
    ValueError for weights of other shapes; step raises it for ids or a state that do not fit.
    The first step of at most MOST_FEW sequences keeps each ffn.value.weight once more, transposed.
    """
    if version not in (6, 7):
        raise ValueError(f"there is no RWKV-{version} in C++, but 6 and 7")
    # The memory of these lives as long as `step` does, also when the model gets other weights.
    c, weights = sizes, [w.detach() for w in weights]
    pairs = itertools.zip_longest((tuple(w.shape) for w in weights), weight_shapes(version, c))
    for i, (shape, expected) in enumerate(pairs):
        if shape != expected:
            raise ValueError(f"weight {i} is {shape}, expected {expected} in an RWKV-{version}")
    dtype = weights[0].dtype
    library, _ = _load(build=False)
    ranks = (c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank, c.mix_rank)
    fits_vectors = not any(n % 16 for n in (c.n_embd, c.dim_ffn, *ranks))
    fits_weights = all(is_plain(w) and w.dtype == dtype in DTYPES for w in weights)
    if library is None or c.head_size not in HEAD_SIZES or not (fits_vectors and fits_weights):
        return None
    weight_pointers, turned = pointers(weights), []
    L, C, N, V = c.n_layer, c.n_embd, c.head_size, c.vocab_size
    dims, is_half = (L, C, N, c.dim_ffn, V), dtype == torch.bfloat16

    def step(ids, state):
        if ids.dim() != 1 or ids.dtype != torch.int64 or not ids.is_cpu:
            raise ValueError(
                f"ids are {ids.dtype} {tuple(ids.shape)} on {ids.device}, expected int64 [M]"
            )
        M = len(ids)
        wkv, att_shift, ffn_shift = state["wkv"], state["att_shift"], state["ffn_shift"]
        if wkv.shape != (L, M, C // N, N, N) or wkv.dtype != torch.float32 or not is_plain(wkv):
            raise ValueError(f"the state is not one of {M} sequences in float32, contiguous")
        for x in (att_shift, ffn_shift):
            if x.shape != (L, M, C) or x.dtype != dtype or not is_plain(x):
                raise ValueError(f"the state is not one of {M} sequences in {dtype}, contiguous")
        numbers = integers((version, is_half, M, *dims, torch.get_num_threads(), *ranks))
        ids, logits = ids.contiguous(), torch.empty(M, V)
        io = pointers((ids, wkv, att_shift, ffn_shift, logits))
        is_few = M <= MOST_FEW
        if is_few and not turned:
            turned.extend(w.t().contiguous() for w in channel_values(version, weights, L))
        turned_pointers = pointers(turned) if is_few else None
        if library.rwkv_step(numbers, weight_pointers, turned_pointers, io):
            raise ValueError(f"ids must be from 0 to {V - 1}")
        return logits

    step.weights = weights
    return step


def is_plain(x):
    """Whether a tensor's numbers lie on a CPU, one after the other, as PyTorch's own class."""
    return type(x) is torch.Tensor and x.is_cpu and x.is_contiguous()


def fits(x):
    """Whether the library is there, and what is in train_cpu.cpp takes this tensor.

    It must be float32 on a CPU, with content (bench/memory.py's have none).
    """
    if native.is_traced():  # PyTorch's operators are fused with their neighbours
        return False
    return is_plain(x) and x.dtype == torch.float32 and _load(build=False)[0] is not None


def fused(name, number, vectors, parameters, n_results, grads=None):
    """Run mix, gates7 or readout of train_cpu.cpp -> its results, each like the first vector.

    vectors [.., C] of one shape and parameters of C numbers are what goes in, float32 on a CPU, or
    None where the function allows it; number: the results of mix, the head size of the others.
    With `grads`, those of the results: -> the gradients of vectors and parameters, None for None.
    ValueError for what does not fit.
    """
    library, x = _load(build=False)[0], vectors[0]
    if library is None:
        raise ValueError(f"{name}: the C++ is not built; ask fits(x) first")
    C = x.shape[-1] if x.dim() else 0
    is_whole = name == "mix" or (number in HEAD_SIZES and C % number == 0)
    if C == 0 or x.numel() // C >= 2**31 or not is_whole or len(grads or []) not in (0, n_results):
        raise ValueError(f"{name}: a vector is {tuple(x.shape)}, expected [.., C], of {number}")
    for vector in (*vectors, *(grads or [])):
        if vector is not None:
            native.check(f"{name}: a vector", vector, x.shape, FLOATS, CPU)
    for parameter in parameters:
        if parameter is not None:
            native.check(f"{name}: a parameter", parameter.flatten(), (C,), FLOATS, CPU)
    inputs = [*vectors, *parameters]
    if grads is None:
        results, out = native.empty_like([x] * n_results), []
    else:
        results, out = grads, [None if t is None else t.new_empty(t.shape) for t in inputs]
    # Kept in a list, so that they are alive until the call returns.
    io = [None if t is None else t.contiguous() for t in (*inputs, *results)] + out
    sizes = integers((x.numel() // C, C, number, torch.get_num_threads()))
    getattr(library, name)(grads is not None, sizes, pointers(io))
    return results if grads is None else out


def relu_squared(x, dout=None):
    """max(x, 0)^2, float32 on a CPU; with dout, that of the result: its gradient."""
    native.check("relu_squared: x", x, x.shape, FLOATS, CPU)
    x = x.contiguous()
    out, io = torch.empty_like(x), [x]
    if dout is not None:
        native.check("relu_squared: dout", dout, x.shape, FLOATS, CPU)
        io.append(dout.contiguous())
    count = ctypes.c_int64(x.numel())
    library = _load(build=False)[0]
    library.relu_squared(dout is not None, count, torch.get_num_threads(), pointers([*io, out]))
    return out


def score_rows(z, targets, temperature, scores=None, grads=None, l2wrap=0.0):
    """Rows of logits z [M, V] -> (logps, entropy, hits, lse) of the targets [M], each [M].

    Given these `scores` and `grads` (d loss / d logps, and / d entropy or None): z becomes d loss /
    d z; that needs lse of the scores, and entropy for a d entropy. None, and z as it was, if that
    is not to be had. ValueError for what does not fit, IndexError for a target that is none of V.
    """
    if not fits(z):
        return None
    if z.dim() != 2 or (scores is None) != (grads is None):
        raise ValueError(f"z is {tuple(z.shape)}, expected [M, V]; scores and grads go together")
    rows = z.shape[:1]
    native.check("targets", targets, rows, (torch.int64,), CPU)
    if scores is None:
        logps, entropy, lse = (z.new_empty(len(z)) for _ in range(3))
        hits = z.new_empty(len(z), dtype=torch.bool)
        scores, grads, is_backward = (logps, entropy, hits, lse), (None, None), False
    else:
        check_scores(scores, grads, rows)
        is_backward = True
    io = [x if x is None else x.contiguous() for x in (z, targets, *scores, *grads)]
    sizes = integers((*z.shape, torch.get_num_threads()))
    floats = ctypes.c_float(temperature), ctypes.c_float(l2wrap)
    if _load(build=False)[0].score_rows(is_backward, sizes, *floats, pointers(io)):
        raise IndexError(f"targets must be from 0 to {z.shape[1] - 1}")
    return scores


def check_scores(scores, grads, rows):
    """ValueError for what the backward of score_rows cannot read, `rows` (M,)."""
    _, entropy, _, lse = scores
    dlogps, dentropy = grads
    needed = {"lse": lse, "dlogps": dlogps}
    if dentropy is not None:
        needed |= {"entropy": entropy, "dentropy": dentropy}
    for name, x in needed.items():
        if x is None:
            raise ValueError(f"{name} is None, expected torch.float32 {tuple(rows)}")
        native.check(name, x, rows, FLOATS, CPU)


_ops = {
    version: native.register(f"wkv{version}_cpu", version, sys.modules[__name__])
    for version in (6, 7)
}


@torch.compiler.assume_constant_result
def unavailable(build=True):
    """None if the op can be used now, else what is missing; without `build` nothing is compiled."""
    return _load(build)[1]


@functools.cache
def _place():
    """(Where the library is or will be, the command that builds it); (None, what is missing)."""
    cxx = os.environ.get("CXX", "").split() or ["c++"]
    if shutil.which(cxx[0]) is None:
        remedy = "apt install g++, xcode-select --install, or set CXX"
        return None, f"no C++ compiler: {cxx[0]} is not on PATH ({remedy})"
    command = [*cxx, *FLAGS]
    # The compiler's own macros tell its version and every instruction set of this processor.
    macros = [*cxx, FLAGS[0], "-dM", "-E", "-x", "c++", os.devnull]
    try:
        return native.place("cpu", command, SOURCES, macros), command
    except OSError as error:
        return None, str(error)


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
