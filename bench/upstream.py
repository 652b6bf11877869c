"""RWKV-LM's own kernel of WKV-7, for bench/kernels.py: compiled from its file, where it is laid
beside, and called through ctypes."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from gosling.config import UserError

import torch

SCALE = -0.6065306597  # log w = SCALE * sigmoid(what the kernel takes)
CHUNK = 16  # tokens between two states that it keeps; T must be a multiple
# Functions with plain names, which the file lacks. They launch on the legacy default stream, which
# is PyTorch's own.
WRAPPER = """
#include "{path}"
extern "C" void wkv_forward(int B, int T, int H, void **x) {{
  cuda_forward_v3(B, T, H, (bf *)x[0], (bf *)x[1], (bf *)x[2], (bf *)x[3], (bf *)x[4], (bf *)x[5],
                  (bf *)x[6], (float *)x[7], (float *)x[8]);
}}
extern "C" void wkv_backward(int B, int T, int H, void **x) {{
  cuda_backward_v3(B, T, H, (bf *)x[0], (bf *)x[1], (bf *)x[2], (bf *)x[3], (bf *)x[4], (bf *)x[5],
                   (bf *)x[6], (float *)x[7], (float *)x[8], (bf *)x[9], (bf *)x[10], (bf *)x[11],
                   (bf *)x[12], (bf *)x[13], (bf *)x[14]);
}}
"""


@functools.cache
def library(source, sm=""):
    """rwkv7_clampw_v3_for_h100.cu as a library, for the card at hand or an sm_ number like "90"."""
    source = Path(source).resolve()
    if not source.is_file():
        raise UserError(f"upstream={source}: no such file; it lies in RWKV-LM's train_temp/cuda")
    sm = sm or "{}{}".format(*torch.cuda.get_device_capability())
    folder = Path(tempfile.mkdtemp(prefix="upstream-"))
    wrapper, built = folder / "wkv.cu", folder / "wkv.so"
    wrapper.write_text(WRAPPER.format(path=source), encoding="utf-8")
    options = ["-O3", "--use_fast_math", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    options += [f"-gencode=arch=compute_{sm},code=sm_{sm}", "-D_N_=64", f"-D_CHUNK_LEN_={CHUNK}"]
    nvcc = ["nvcc", *options, "-o", str(built), str(wrapper)]
    done = subprocess.run(nvcc, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nvcc failed on {source}: {done.stderr.strip()[-500:]}")
    return ctypes.CDLL(str(built))


def inputs(xs):
    """r logw k v a b -> the same with what log w is made of, in bf16, in place of log w."""
    r, logw, *rest = xs
    logit = torch.logit((logw.detach() / SCALE).clamp(1e-6, 1 - 1e-6)).to(r.dtype)
    return [r, logit.requires_grad_(), *rest]


def logw_of(logit):
    return SCALE * torch.sigmoid(logit)


def wkv7(source, xs):
    """`inputs` -> y, by the kernel in this file."""
    return WKV7.apply(library(source), *xs)


def call(function, shape, tensors):
    pointers = [x.data_ptr() for x in tensors]
    function(*shape[:3], (ctypes.c_void_p * len(pointers))(*pointers))


class WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, built, *xs):
        B, T, H, N = xs[0].shape
        y = torch.empty_like(xs[0])
        states = y.new_empty(B, H, T // CHUNK, N, N, dtype=torch.float32)
        sa = torch.empty_like(y, dtype=torch.float32)
        call(built.wkv_forward, y.shape, (*xs, y, states, sa))
        ctx.save_for_backward(*xs, states, sa)
        ctx.built = built
        return y

    @staticmethod
    def backward(ctx, dy):
        *xs, states, sa = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in xs]
        call(ctx.built.wkv_backward, dy.shape, (*xs, dy.contiguous(), states, sa, *grads))
        return None, *grads
