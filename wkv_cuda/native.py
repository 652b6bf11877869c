"""What the compiled forms share: a library that is built once, and PyTorch ops around it.

The sources are plain C++ or CUDA, called through ctypes: no PyTorch header is involved. Nothing is
built at import. The ops gosling::<name> and gosling::<name>_backward work under torch.compile, DDP
and checkpointing.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

CHUNK = 32  # tokens between two saved states, as in wkv.cuh and wkv_cpu.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def say(line):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def place(name, command, sources, about):
    """Where the library is or will be.

    Its name holds a hash of the sources, the command and what the command `about` prints of the
    compiler and the machine: an old build is never taken for a new one.
    """
    compiler = subprocess.run(about, capture_output=True).stdout
    files = [path.read_bytes() for path in sources]
    content = b"\0".join([*files, compiler, *map(str.encode, command)])
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "gosling").expanduser()
    return Path(folder, f"gosling_{name}_{hashlib.sha256(content).hexdigest()[:12]}.so")


def open_library(path):
    """The library, or None: there is no file, or a broken one, from a full disk or a cut copy."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def load(path, command, sources, build=True):
    """(the library at `path`, None), built by `command` if need be; or (None, what is missing).

    Of many processes one builds. The others wait at a lock, which the system takes back however its
    holder ends; where the file system has none, each builds, and moves a whole file in place.
    """
    if library := open_library(path):
        return library, None
    if not build:
        return None, "not built yet: the first call that needs a gradient builds it"
    new = f"{path}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            if library := open_library(path):
                return library, None
            say("compiling the recurrence, once")
            start = time.time()
            files = [str(source) for source in sources if source.suffix in (".cpp", ".cu")]
            done = subprocess.run([*command, *files, "-o", new], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"{command[0]} failed"]
                return None, next((line for line in lines if "error" in line), lines[-1])[:300]
            os.replace(new, path)
            say(f"compiled in {time.time() - start:.0f} s; kept as {path}")
            return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, str(error)
    finally:
        Path(new).unlink(missing_ok=True)


def run(op, inputs, state, cu_seqlens, logw_dtypes=(torch.float32,)):
    """What wkv_cuda._check let through, through an op -> y in r's shape and dtype, state.

    The op wants tokens flat: vectors [B * T, H, N] in one dtype, logw and u in fp32, cu_seqlens
    int32 on the device.
    """
    r, logw = inputs[:2]
    vectors = [x for i, x in enumerate(inputs) if i != 1 and x.dim() == 4]
    is_mixed = any(x.dtype != r.dtype for x in vectors)  # as under autocast
    dtype = torch.float32 if is_mixed else r.dtype
    flat = [x.float() if x.dim() == 2 else x.to(dtype).flatten(0, 1) for x in inputs]
    flat[1] = (logw if logw.dtype in logw_dtypes else logw.float()).flatten(0, 1)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(len(r) + 1) * r.shape[1]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    y, state, *_ = op(*flat, state, cu_seqlens.to(r.device, torch.int32), save)
    return y.view(r.shape).to(r.dtype), state


def keep_states(r, state, save):
    """What the sequential forms keep for the backward, empty without `save`.

    sa [total, H, N] and the state at every chunk's end [total // CHUNK + S, H, N, N].
    """
    total, slots = (len(r), len(r) // CHUNK + len(state)) if save else (0, 0)
    return state.new_empty(total, *r.shape[1:]), state.new_empty(slots, *state.shape[1:])


def empty_like(tensors):
    return [x.new_empty(x.shape) for x in tensors]  # contiguous, whatever the strides of `tensors`


def no_scratch(state, kept):
    return []


def register(name, version, launch, keep=keep_states, scratch=no_scratch):
    """Make gosling::<name> and gosling::<name>_backward -> the first.

    Tokens are flat: vectors [total, H, N], cu_seqlens [S + 1] of S sequences, state [S, H, N, N].
    launch(function, *tensors, S, H, total, dtype of r as in DTYPES): run a function of the library.
    keep(r, state, save): empty tensors for what the forward also returns, for the backward; WKV-6
    has no sa. scratch(state, kept): memory for the backward.
    """
    names = ("r", "logw", "k", "v", *(("a", "b") if version == 7 else ("u",)), "state")
    n, n_kept = len(names), 1 if version == 6 and keep is keep_states else 2
    tensors = ", ".join(f"Tensor {x}" for x in names) + ", Tensor cu_seqlens"

    def outputs(count):
        return "(" + ", ".join(["Tensor"] * count) + ")"

    def sizes(r, state):
        return len(state), *r.shape[1::-1], DTYPES[r.dtype]

    def forward_outputs(*args):
        r, state, save = args[0], args[n - 1], args[-1]
        return *empty_like((r, state)), *keep(r, state, save)[-n_kept:]

    def forward(*args):
        out = forward_outputs(*args)  # without save the kept ones are empty, and null to the kernel
        launch(f"{name}_forward", *args[:-1], *out, *sizes(args[0], args[n - 1]))
        return out

    def backward(*args):  # the inputs, cu_seqlens, kept, dy, dstate
        state, kept, grads = args[n - 1], args[n + 1 : -2], empty_like(args[:n])
        if version == 6:  # du: a part per chunk, span or sequence, summed here in a fixed order
            grads[4] = state.new_zeros(len(kept[-1]) or len(state), *state.shape[1:3])
        launch(f"{name}_backward", *args, *grads, *scratch(state, kept), *sizes(args[0], state))
        if version == 6:
            grads[4] = grads[4].sum(0)
        return tuple(grads)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1], *output[2:])
        # No zeros for what was saved, nor for a state that nobody used.
        ctx.set_materialize_grads(False)

    def autograd(ctx, dy, dstate, *_):
        saved = ctx.saved_tensors  # read once: under checkpointing this is what recomputes
        grads = backward_op(*saved, torch.zeros_like(saved[0]) if dy is None else dy, dstate)
        return *grads, None, None  # none for cu_seqlens and save

    custom_op = functools.partial(torch.library.custom_op, mutates_args=())
    op = custom_op(
        f"gosling::{name}", forward, schema=f"({tensors}, bool save) -> {outputs(2 + n_kept)}"
    )
    op.register_fake(forward_outputs)
    op.register_autograd(autograd, setup_context=setup_context)
    kept = "".join(f", Tensor kept{i}" for i in range(n_kept))
    backward_op = custom_op(
        f"gosling::{name}_backward",
        backward,
        schema=f"({tensors}{kept}, Tensor dy, Tensor? dstate) -> {outputs(n)}",
    )
    backward_op.register_fake(lambda *args: tuple(empty_like(args[:n])))
    return op
