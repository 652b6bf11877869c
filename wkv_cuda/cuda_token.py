"""One token of every row on CUDA, the state written in place: wkv_token.cu, for generation.

Head size 64, fp32, bf16 or fp16; state and arithmetic are fp32. Built together with the kernels of
cuda_seq.py, which read a state and write another one.
"""

import contextlib
import threading

import torch

from . import cuda_seq, native

_here = threading.local()  # whether the thread is within in_place()


@contextlib.contextmanager
def in_place():
    """Within this, a call of wkv6 or wkv7 may write to the state that it is given, and return it.

    It does where there is one token of every row, on CUDA, and no gradient is needed.
    """
    before = is_in_place()
    _here.in_place = True
    try:
        yield
    finally:
        _here.in_place = before


def is_in_place():
    return getattr(_here, "in_place", False)


def takes(inputs, state):
    """Whether r, logw, k, v … [B, 1, H, N] and this state can go through the kernel, as of now."""
    r = inputs[0]
    if not is_in_place() or r.shape[1] != 1 or torch.is_grad_enabled() or native.is_traced():
        return False
    if r.device.type != cuda_seq.DEVICE or r.shape[-1] not in cuda_seq.HEAD_SIZES:
        return False
    if any(x.dtype not in native.DTYPES for x in inputs) or cuda_seq.unavailable():
        return False
    return state.dtype == torch.float32 and state.is_contiguous() and state.data_ptr() % 16 == 0


def wkv(version, inputs, state):
    """-> y [B, 1, H, N] and the state that was given"""
    r, dtype = inputs[0], inputs[0].dtype
    if any(x.dtype != dtype for i, x in enumerate(inputs) if i != 1 and x.dim() == 4):
        dtype = torch.float32  # as under autocast
    flat = [x.float() if x.dim() == 2 else x.to(dtype).flatten(0, 1) for x in inputs]
    flat[1] = inputs[1].float().flatten(0, 1)
    return _ops[version](*flat, state).view(r.shape).to(r.dtype), state


def register(version, names):
    """Make gosling::wkv<version>_token: vectors [B, H, N], state [B, H, N, N] -> y [B, H, N]"""

    def token(*args):
        native.check_inputs(cuda_seq, names, (*args, args[0].new_empty(len(args[0]) + 1).int()))
        state, y = args[-1], args[0].new_empty(args[0].shape)
        if not state.is_contiguous() or state.data_ptr() % 16:
            raise ValueError("the state is to lie in one piece, at a multiple of 16 bytes")
        B, H, _ = y.shape
        cuda_seq.launch(f"wkv{version}_token", *args, y, B, H, native.DTYPES[y.dtype])
        return y

    def fake(*args):
        native.check_one_device(args)
        return args[0].new_empty(args[0].shape)

    tensors = ", ".join(f"Tensor {name}" for name in names[:-1])
    op = torch.library.custom_op(
        f"gosling::wkv{version}_token",
        token,
        mutates_args=("state",),
        schema=f"({tensors}, Tensor(a!) state) -> Tensor",
    )
    op.register_fake(fake)
    return op


_ops = {
    6: register(6, ("r", "logw", "k", "v", "u", "state")),
    7: register(7, ("r", "logw", "k", "v", "a", "b", "state")),
}
