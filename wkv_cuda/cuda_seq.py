"""The recurrence token by token on CUDA: wkv6.cu and wkv7.cu.

Head size 64, fp32, bf16 or fp16; logw any values <= 0, exp(logw) may underflow to 0. State and
arithmetic are fp32; no atomics, so the same inputs give the same bits. nvcc builds these kernels
and those of cuda.py in one library.
"""

import ctypes
import functools
import shutil
import sys
from pathlib import Path

import torch

from . import native

DEVICE, HEAD_SIZES, DTYPES = "cuda", (64,), tuple(native.DTYPES)
LOGW_DTYPES = (torch.float32,)
NAMES = ("wkv6.cu", "wkv7.cu", "wkv6_chunk.cu", "wkv7_chunk.cu", "wkv.cuh", "chunk.cuh")
NAMES += ("wkv7_spans.cuh",)
NAMES += ("wkv_token.cu",)  # of cuda_token.py
SOURCES = [Path(__file__).parent / name for name in NAMES]
# --threads=0: as many as there are cores
FLAGS = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "--threads=0"]


def wkv(version, inputs, state, cu_seqlens):
    return native.run(_ops[version], inputs, state, cu_seqlens)


@torch.compiler.assume_constant_result  # so torch.compile may meet it on the way to the op
def unavailable():
    """None if the kernels can be used here, else what is missing; the first call builds them."""
    return library()[1]


@functools.cache
def library():
    """(the library, None) or (None, what is missing)."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None, f"no CUDA device (PyTorch {torch.__version__})"
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if nvcc is None:
        return None, f"no nvcc: install the CUDA toolkit, or set CUDA_HOME to it (now {CUDA_HOME})"
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    cards = sorted({f"{major}{minor}" for major, minor in capabilities})
    command = [nvcc, *FLAGS, *(f"-gencode=arch=compute_{card},code=sm_{card}" for card in cards)]
    try:
        path = native.place("cuda", command, SOURCES, [nvcc, "--version"])
    except OSError as error:
        return None, str(error)
    found, missing = native.load(path, command, SOURCES)
    if found and (error := found.wkv_probe()):
        return None, (
            f"{torch.cuda.CudaError(error)}; the card is sm_{cards}, {nvcc}, PyTorch's CUDA "
            f"{torch.version.cuda}"
        )
    return found, missing


def aligned(x):
    """x contiguous, its data at a multiple of 16 bytes."""
    if x.data_ptr() % 16 == 0:
        return x.contiguous()
    return x.clone(memory_format=torch.contiguous_format)


def launch(function, *args):
    """Call a function of the library on the tensors' device and PyTorch's stream there.

    It gets tensors as pointers, then numbers, then the stream.
    """
    # Kept in a list, so that they are alive until the launch.
    args = [aligned(x) if isinstance(x, torch.Tensor) else x for x in args]
    raw = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in args]
    stream = torch.cuda.current_stream(args[0].device).cuda_stream if args[0].is_cuda else None
    with torch.cuda.device_of(args[0]):
        error = getattr(library()[0], function)(*raw, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function}: {torch.cuda.CudaError(error)}")


def scratch(state, kept):
    """Memory for the backward: the size of what the forward kept."""
    return native.empty_like(kept)


_ops = {
    version: native.register(f"wkv{version}", version, sys.modules[__name__], scratch=scratch)
    for version in (6, 7)
}
