"""The recurrence token by token on CUDA: wkv6.cu and wkv7.cu as PyTorch ops with gradients.

The kernels are plain CUDA, compiled once by nvcc at first use (never at import) and called through ctypes: no PyTorch
header is involved. The ops gosling::wkv6, gosling::wkv7 and their _backward work under torch.compile, DDP and
checkpointing. State and arithmetic are fp32; no atomics, so the same inputs give the same bits.
"""
import ctypes
import functools
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

N, CHUNK = 64, 32  # head size; tokens between two saved states. Both as in wkv.cuh
SAVED_STATE = N * N + 8  # halves: STATE in chunk.cuh
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DEVICE = "cuda"  # the tests run the same sources on "cpu"
SOURCES = [Path(__file__).parent / name for name in ("wkv6.cu", "wkv7.cu", "wkv6_chunk.cu", "wkv7_chunk.cu", "wkv.cuh",
                                                     "chunk.cuh")]


def wkv7(r, logw, k, v, a, b, state=None, cu_seqlens=None):
    """S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t' + v_t k_t';  y_t = S_t r_t;  w = exp(logw)   (arXiv:2503.14456).

    r k v a b [B, T, H, 64] in fp32, bf16 or fp16; logw of the same shape, any values <= 0, used in fp32; state
    [B, H, 64, 64] fp32, rows = value, or None for zeros. cu_seqlens int [D + 1], from 0 to T: B = 1, D documents end to
    end, state [D, H, 64, 64]; its values are checked on the device. Returns y in r's dtype and the new state.
    ValueError for a wrong shape, dtype or device; RuntimeError with unavailable()'s line if there are no kernels.
    """
    inputs, state, cu = _flatten("wkv7", dict(r=r, logw=logw, k=k, v=v, a=a, b=b), state, cu_seqlens)
    y, state, *_ = _wkv7(*inputs, state, cu, _wants_grad(*inputs, state))
    return y.view(r.shape).to(r.dtype), state


def wkv6(r, logw, k, v, u, state=None, cu_seqlens=None):
    """y_t = (S_{t-1} + v_t (u*k_t)') r_t;  S_t = S_{t-1} diag(w_t) + v_t k_t';  w = exp(logw)   (arXiv:2404.05892).

    u [H, 64], used in fp32; everything else as in wkv7. exp(logw) may underflow to 0.
    """
    inputs, state, cu = _flatten("wkv6", dict(r=r, logw=logw, k=k, v=v), state, cu_seqlens)
    inputs.append(_check_u(u, r))
    y, state, *_ = _wkv6(*inputs, state, cu, _wants_grad(*inputs, state))
    return y.view(r.shape).to(r.dtype), state


@torch.compiler.assume_constant_result  # so torch.compile may meet it on the way to the op
def unavailable():
    """None if the kernels can be used here, else one line that says what is missing. Builds them on the first call."""
    return _build()[1]


def _wants_grad(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_u(u, r):
    if u.shape != r.shape[2:] or u.device != r.device:
        raise ValueError(f"wkv6: u must be {list(r.shape[2:])} on {r.device}, got {list(u.shape)} on {u.device}")
    return u.float()


def _flatten(op, vectors, state, cu_seqlens, device=None, head_sizes=(64,), dtypes=tuple(DTYPES), chunked=False):
    """Check, then: vectors as [B * T, H, N] in one dtype (logw in fp32), the state, cu_seqlens int32 on the device.
    chunked: in bf16, and logw may be."""
    r, device = vectors["r"], device or DEVICE
    if r.dim() != 4 or r.shape[3] not in head_sizes:
        raise ValueError(f"{op}: r must be [B, T, H, {' or '.join(map(str, head_sizes))}], got {list(r.shape)}")
    if r.device.type != device:
        raise ValueError(f"{op}: r is on {r.device}; this backend needs a {device} tensor")
    (B, T, H, N), cu = r.shape, cu_seqlens
    if cu is None:
        cu = torch.arange(B + 1, device=r.device, dtype=torch.int32) * T
    elif B != 1 or (cu := torch.as_tensor(cu)).dim() != 1 or cu.shape[0] < 2 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens must be int32 or int64 [D + 1] with B = 1, "
                         f"got {cu.dtype} {list(cu.shape)} with B = {B}")
    if state is None:
        state = torch.zeros(cu.shape[0] - 1, H, N, N, device=r.device)
    bf16 = (torch.bfloat16,)
    for name, x, shape, allowed in [
            *((name, x, r.shape, bf16 if chunked and name != "logw" else dtypes) for name, x in vectors.items()),
            ("state", state, (cu.shape[0] - 1, H, N, N), [torch.float32])]:
        if x.shape != shape or x.device != r.device or x.dtype not in allowed:
            raise ValueError(f"{op}: {name} must be {' or '.join(map(str, allowed))} {list(shape)} on {r.device}, got "
                             f"{x.dtype} {list(x.shape)} on {x.device}")
    one = all(x.dtype == r.dtype for name, x in vectors.items() if name != "logw")  # else (autocast) they meet in fp32
    kept = lambda name, x: x.dtype in bf16 if chunked and name == "logw" else one and name != "logw"
    return [x.to(r.dtype if kept(name, x) else torch.float32).reshape(B * T, H, N)
            for name, x in vectors.items()], state, cu.to(r.device, torch.int32)


def _register(name, launch, *names, chunked=False):
    """Make gosling::<name> and gosling::<name>_backward; `names`: the inputs with a gradient, r first and state last.

    launch(function, *tensors, *sizes) runs a function of the library, _launch with scratch memory.
    Tokens are flat here: vectors [total, H, N], cu [S + 1]. With save, the forward also returns what the backward
    needs, in fp32: sa [total, H, N] (version 7) and the state at every chunk's end [total // CHUNK + S, H, N, N]; or,
    `chunked`, the state at every chunk's start in fp16 and what passes from span to span.
    """
    n, n_kept = len(names), 2 if "a" in names or chunked else 1
    tensors = ", ".join(f"Tensor {x}" for x in names) + ", Tensor cu"
    outputs = lambda count: "(" + ", ".join(["Tensor"] * count) + ")"
    empty = lambda like: [x.new_empty(x.shape) for x in like]  # contiguous, whatever the strides of `like`

    def sizes(*args):
        r, S = args[0], args[n - 1].shape[0]
        return S, *r.shape[1::-1], DTYPES[args[chunked].dtype], *([_span(S, *r.shape[1::-1])] if chunked else [])

    def scratch(state, kept):
        return [] if launch is not _launch else [kept[1].new_empty(len(kept[1]), *state.shape[1:])] if chunked else empty(kept)

    def forward_outputs(*args):
        r, state, save = args[0], args[n - 1], args[-1]
        total, slots = (r.shape[0], r.shape[0] // CHUNK + state.shape[0]) if save else (0, 0)
        if chunked:
            span = _span(state.shape[0], *r.shape[1::-1])
            kept = (r.new_empty(slots, r.shape[1], SAVED_STATE, dtype=torch.float16),
                    state.new_empty(r.shape[0] // span + state.shape[0] if span else 0, r.shape[1], 2, N, N))
        else:
            kept = state.new_empty(total, *r.shape[1:]), state.new_empty(slots, *state.shape[1:])
        return *empty((r, state)), *kept[-n_kept:]

    def forward(*args):
        out = forward_outputs(*args)  # without save the kept ones are empty, and null to the kernel
        launch(f"{name}_forward", *args[:-1], *out, *sizes(*args))
        return out

    def backward(*args):  # the inputs, cu, kept, dy, dstate
        kept, grads = args[n + 1:-2], empty(args[:n])
        if "u" in names:
            # du: a part per chunk or, chunked, per sequence or span, summed here in a fixed order
            parts = (len(kept[1]) or len(args[n - 1])) if chunked else len(kept[0])
            grads[4] = args[n - 1].new_zeros(parts, *args[n - 1].shape[1:3])
        launch(f"{name}_backward", *args, *grads, *scratch(args[n - 1], kept), *sizes(*args))
        if "u" in names:
            grads[4] = grads[4].sum(0)
        return tuple(grads)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1], *output[2:])
        ctx.set_materialize_grads(False)  # no zeros for what was saved, nor for a state that nobody used

    def autograd(ctx, dy, dstate, *_):
        saved = ctx.saved_tensors  # read once: under checkpointing this is what recomputes
        grads = backward_op(*saved, torch.zeros_like(saved[0]) if dy is None else dy, dstate)
        return *grads, None, None  # none for cu and save

    custom_op = functools.partial(torch.library.custom_op, mutates_args=())
    op = custom_op(f"gosling::{name}", forward, schema=f"({tensors}, bool save) -> {outputs(2 + n_kept)}")
    op.register_fake(forward_outputs)
    op.register_autograd(autograd, setup_context=setup_context)
    kept = "".join(f", Tensor kept{i}" for i in range(n_kept))
    backward_op = custom_op(f"gosling::{name}_backward", backward,
                            schema=f"({tensors}{kept}, Tensor dy, Tensor? dstate) -> {outputs(n)}")
    backward_op.register_fake(lambda *args: tuple(empty(args[:n])))
    return op


def _span(S, H, total):
    """Tokens of a span where S sequences of H heads leave most of a card idle (chunk.cuh), else 0. For 2 blocks on each of
    132 processors, but not from the card at hand: the same inputs give the same bits everywhere."""
    spans = 264 // max(S * H, 1)
    return max(total // (S * spans) // CHUNK * CHUNK, 512) if spans >= 4 and total >= 1024 * S else 0


def _launch(function, r, *args):
    """Call a launcher on r's device and PyTorch's stream there: tensors as pointers, then sizes, then the stream."""
    library = _library()
    aligned = lambda x: x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    args = [aligned(x) if isinstance(x, torch.Tensor) else x for x in (r, *args)]  # alive until the launch
    stream = torch.cuda.current_stream(r.device).cuda_stream if r.is_cuda else None
    raw = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in args]
    with torch.cuda.device_of(r):
        error = getattr(library, function)(*raw, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function}: {torch.cuda.CudaError(error)}")


_wkv7 = _register("wkv7", _launch, "r", "logw", "k", "v", "a", "b", "state")
_wkv6 = _register("wkv6", _launch, "r", "logw", "k", "v", "u", "state")


def _library():
    library, missing = _build()
    if library is None:
        raise RuntimeError(f"wkv_cuda.cuda_seq: {missing}")
    return library


@functools.cache
def _build():
    """(the library, None) or (None, what is missing). Every rank may call it: one compiles, the others wait."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None, f"no CUDA device (PyTorch {torch.__version__})"
    try:
        from torch.utils import cpp_extension
        home, cxx = cpp_extension.CUDA_HOME, os.environ.get("CXX", "c++")
        if home is None or not Path(home, "bin", "nvcc").exists():
            return None, f"no nvcc: install the CUDA toolkit, or set CUDA_HOME to it (now {home})"
        if not cpp_extension.is_ninja_available():
            return None, "no ninja: pip install ninja"
        if shutil.which(cxx.split()[0]) is None:
            return None, f"no C++ compiler: {cxx} is not on PATH (set CXX)"
        # the name holds a hash of what is compiled: an old build is never taken for a new one
        content = b"".join(path.read_bytes() for path in SOURCES) + torch.version.cuda.encode()
        name = f"gosling_wkv_{hashlib.sha256(content).hexdigest()[:12]}"
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), name)
        folder.mkdir(parents=True, exist_ok=True)
        _wait_for(folder / "lock")
        if not list(folder.glob("*.so")) and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"compiling the CUDA recurrence, once, in {folder}", file=sys.stderr)
        # where libcudart is: nvcc on PATH may be a wrapper outside the toolkit, and its version another than PyTorch's
        flags = [f"{flag}{d}" for d in (f"{home}/lib64", "/usr/local/cuda/lib64") for flag in ("-L", "-Wl,-rpath,")]
        path = cpp_extension.load(name, [str(path) for path in SOURCES if path.suffix == ".cu"], with_cuda=True,
                                  extra_cuda_cflags=["-O3"], extra_ldflags=flags, build_directory=str(folder),
                                  is_python_module=False)
        # its documentation promises no path in return, so look if there is none
        library = ctypes.CDLL(path or str(max(folder.glob("*.so"), key=os.path.getmtime)))
        if error := library.wkv_probe():
            return None, (f"{torch.cuda.CudaError(error)}; the card is sm_{'%d%d' % torch.cuda.get_device_capability()}, "
                          f"TORCH_CUDA_ARCH_LIST is {os.environ.get('TORCH_CUDA_ARCH_LIST', 'not set')}, "
                          f"nvcc {home}/bin/nvcc, PyTorch's CUDA {torch.version.cuda}")
        return library, None
    except Exception as error:  # the caller can go on with another backend
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return None, next((line for line in lines if re.search(r"(error|fatal) *:|cannot find", line)), lines[-1])[:300]


def _wait_for(lock):
    """PyTorch waits for ever on the lock of a build that was killed; here a lock older than any build is an error."""
    told = False
    while lock.exists():
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > 10:
            raise RuntimeError(f"the build lock {lock} is {minutes:.0f} minutes old; delete it if nothing is compiling")
        if not told:
            told = print(f"waiting for another process to compile (its lock: {lock})", file=sys.stderr) is None
        time.sleep(1)
