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
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CHUNK = 32  # tokens between two saved states, as in wkv.cuh and wkv_cpu.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_traced():
    """Whether torch.compile or torch.export records what is called.

    Both see through PyTorch's operators, and those registered with it, and not into ctypes.
    """
    return torch.compiler.is_compiling()


def is_exported():
    """Whether torch.export does: what it writes is to run without this code."""
    # What is_exporting() gives, too; but torch.compile of torch 2.11 takes that for always true.
    return torch.compiler._is_exporting_flag


def say(line):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def place(name, command, sources, about):
    """Where the library is or will be.

    Its name holds a hash of the sources, the command and what the command `about` prints of the
    compiler and the machine: an old build is never taken for a new one. OSError where the compiler
    does not start, or there is neither a home nor a temporary folder.
    """
    compiler = subprocess.run(about, capture_output=True).stdout
    files = [path.read_bytes() for path in sources]
    content = b"\0".join([*files, compiler, *map(str.encode, command)])
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        try:
            folder = Path(cache, "gosling").expanduser()
        except RuntimeError:  # no HOME, and a user without a name
            folder = spare_folder()
    name = f"gosling_{name}_{hashlib.sha256(content).hexdigest()[:12]}.so"
    return Path(folder, name).absolute()  # the loader looks elsewhere for a name without a folder


def spare_folder():
    """A folder of this user's own among the temporary ones, made if it is not there.

    Everybody can make such a folder, and what is loaded from it runs: OSError if it is another
    user's, or others may write to it.
    """
    if os.name != "posix":  # each user has temporary folders of their own
        return Path(tempfile.gettempdir(), "gosling")
    folder = Path(tempfile.gettempdir(), f"gosling-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    can_others_write = found.st_uid != os.getuid() or found.st_mode & 0o022
    if can_others_write or not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not a folder that only this user can write")
    return folder


def can_write(folder):
    """Whether a folder takes new files, or can be made."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def note_of(path):
    """The file beside a library that holds its size and digest."""
    return path.with_suffix(".sum")


def size_and_digest(path):
    content = path.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def open_library(path):
    """The library, or None: there is no file, or not the one that was built.

    A full disk, a cut copy or a bad disk leaves such files, and the loader takes them: the process
    then dies of a bus error, or computes something else.
    """
    try:
        found = [os.stat(file) for file in (path, note_of(path))]
        return open_checked(path, *[(x.st_ino, x.st_size, x.st_mtime_ns) for x in found])
    except OSError:
        return None


@functools.lru_cache(maxsize=16)
def open_checked(path, *identities):
    """open_library for files of these identities, so that each is read once.

    Sampling asks at every token whether there is a library.
    """
    if note_of(path).read_text(errors="replace") != size_and_digest(path):
        return None
    return ctypes.CDLL(str(path))


def load(path, command, sources, build=True):
    """(the library at `path`, None), built by `command` if need be; or (None, what is missing).

    A folder that cannot be written is read all the same; what has to be built is then built in
    `spare_folder`.
    """
    try:
        library = open_library(path)
        if library is None and not can_write(path.parent):
            path = spare_folder() / path.name
            library = open_library(path)
        if build:
            remove_leftovers(path.parent)
        if library:
            return library, None
        if build:
            return build_library(path, command, sources)
    except OSError as error:
        return None, str(error)
    return None, "not built yet: the first call that needs a gradient builds it"


def build_library(path, command, sources):
    """(the library, None), or (None, what the compiler says); OSError if it cannot be kept.

    Of many processes one builds. The others wait at a lock, which the system takes back however its
    holder ends; where the file system has none, each builds, and moves a whole file in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if library := open_library(path):
            return library, None
        say("compiling the recurrence, once")
        start = time.time()
        folder = path.with_suffix(f".{os.getpid()}.build")
        folder.mkdir(exist_ok=True)
        try:
            files = [str(source) for source in sources if source.suffix in (".cpp", ".cu")]
            new = folder / path.name
            if wrong := run_compiler([*command, *files, "-o", str(new)], folder):
                return None, wrong
            put_in_place(new, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        say(f"compiled in {time.time() - start:.0f} s; kept as {path}")
        return ctypes.CDLL(str(path)), None


# Runs a command in a process group that ends when standard input does: when the process that wants
# the library closes it, or has died, of SIGKILL too. A compiler is several processes, and some of
# them would go on.
GUARD = """
import os, subprocess, sys, threading

def end_with_the_parent():
    os.read(0, 1)
    os.kill(0, 9)

threading.Thread(target=end_with_the_parent, daemon=True).start()
failed = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
os._exit(1 if failed else 0)
"""


def run_compiler(command, folder):
    """Run a compiler, its temporary files in this folder -> None, or what is wrong in one line."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    ) as compiler:
        said = compiler.stderr.read()
        failed = compiler.wait()
    if not failed:
        return None
    lines = said.strip().splitlines() or [f"{command[0]} failed"]
    return next((line for line in lines if "error" in line), lines[-1])[:300]


def put_in_place(new, path):
    """Rename a library that was built, its size and digest beside it, both on the disk before.

    A crash in between leaves a pair that does not fit, and the next start builds again.
    """
    note = note_of(new)
    note.write_text(size_and_digest(new))
    for file in (new, note):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    os.replace(note, note_of(path))
    os.replace(new, path)


def remove_leftovers(folder):
    """Remove the folders in which builds were killed: those whose library nobody is building."""
    for left in folder.glob("*.build"):  # <name>.<process>.build
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            with open(left.with_suffix("").with_suffix(".lock")) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)


def check(what, x, shape, dtypes, device):
    """ValueError, in one line, if a tensor is not of this shape, of one of the dtypes, and there.

    The native code trusts what it is given: another dtype would be read as this one.
    """
    if x.shape != shape or x.dtype not in dtypes or x.device != device:
        raise ValueError(
            f"{what} is {x.dtype} {tuple(x.shape)} on {x.device}, expected "
            f"{' or '.join(map(str, dtypes))} {tuple(shape)} on {device}"
        )


def run(op, inputs, state, cu_seqlens, logw_dtypes=(torch.float32,)):
    """What wkv_cuda._check let through, through an op -> y in r's shape and dtype, state.

    cu_seqlens: packed.CuSeqlens, or None for rows of one length.

    The op wants tokens flat: vectors [B * T, H, N] in one dtype, logw and u in fp32, cu_seqlens
    int32 on the device.
    """
    r, logw = inputs[:2]
    vectors = [x for i, x in enumerate(inputs) if i != 1 and x.dim() == 4]
    is_mixed = any(x.dtype != r.dtype for x in vectors)  # as under autocast
    dtype = torch.float32 if is_mixed else r.dtype
    logw = logw if logw.dtype in logw_dtypes else logw.float()
    flat = [x.float() if x.dim() == 2 else x.to(dtype).flatten(0, 1) for x in (r, *inputs[2:])]
    flat.insert(1, logw.flatten(0, 1))
    if cu_seqlens is None:  # made on the device: nothing is copied, so nobody waits
        borders = torch.arange(len(r) + 1, dtype=torch.int32, device=r.device) * r.shape[1]
    else:
        borders = cu_seqlens.device
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    y, state, *_ = op(*flat, state, borders, save)
    return y.view(r.shape).to(r.dtype), state


def keep_states(r, state, save):
    """(shape, dtype) of what the sequential forms keep for the backward, empty without `save`.

    sa [total, H, N] and the state at every chunk's end [total // CHUNK + S, H, N, N].
    """
    # state.shape[0] and not len(state): of a length that torch.compile leaves open, len makes a
    # constant.
    total, H, N = r.shape
    tokens, slots = (total, total // CHUNK + state.shape[0]) if save else (0, 0)
    return [((tokens, H, N), state.dtype), ((slots, H, N, N), state.dtype)]


def empty_like(tensors):
    return [x.new_empty(x.shape) for x in tensors]  # contiguous, whatever the strides of `tensors`


def no_scratch(state, kept):
    return []


def check_inputs(form, names, tensors):
    """ValueError for the first of an op's tensors that the library of this form does not take.

    r, logw … state, as `names` has them, and cu_seqlens. Its numbers are not read here: on a GPU
    they would have to be waited for.
    """
    r, state, cu_seqlens = tensors[0], tensors[-2], tensors[-1]
    is_right = r.dim() == 3 and r.shape[2] in form.HEAD_SIZES
    if not is_right or r.dtype not in form.DTYPES or r.device.type != form.DEVICE:
        raise ValueError(
            f"r is {r.dtype} {tuple(r.shape)} on {r.device}, expected "
            f"{' or '.join(map(str, form.DTYPES))} [total, H, N] on {form.DEVICE}, "
            f"N {' or '.join(map(str, form.HEAD_SIZES))}"
        )
    shape, device, vector, floats = r.shape, r.device, (r.dtype,), (torch.float32,)
    _, H, N = shape
    for name, x in zip(names, tensors[:-2], strict=False):
        if name == "u":
            check(name, x, (H, N), floats, device)
        else:
            check(name, x, shape, form.LOGW_DTYPES if name == "logw" else vector, device)
    check("state", state, (*state.shape[:1], H, N, N), floats, device)
    check("cu_seqlens", cu_seqlens, (len(state) + 1,), (torch.int32,), device)


def check_one_device(tensors):
    """ValueError for tensors on several devices.

    PyTorch asks no kernel where one of them is on "meta", but takes the result's shape.
    """
    devices = {str(x.device) for x in tensors if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {' and '.join(sorted(devices))}, expected one device")


def check_kept(kept, expected, dy, dstate, r, state):
    """ValueError for what a backward gets beside the inputs: as the forward kept it, and as y."""
    for i, (x, (shape, dtype)) in enumerate(zip(kept, expected, strict=True)):
        check(f"kept{i}", x, shape, (dtype,), r.device)
    check("dy", dy, r.shape, (r.dtype,), r.device)
    if dstate is not None:
        check("dstate", dstate, state.shape, (state.dtype,), r.device)


def save_for_backward(ctx, inputs, output):
    """All inputs but `save`, and of the outputs what is kept."""
    ctx.save_for_backward(*inputs[:-1], *output[2:])
    # No zeros for what was saved, nor for a state that nobody used.
    ctx.set_materialize_grads(False)


def outputs(count):
    """So many tensors, as an op's schema says it."""
    return "(" + ", ".join(["Tensor"] * count) + ")"


def chunk_slots(state, kept):
    """How many parts of WKV-6's du a sequential backward makes."""
    return len(kept[-1])


def register(
    name, version, form, keep=keep_states, scratch=no_scratch, parts=chunk_slots, n_kept=None
):
    """Make gosling::<name> and gosling::<name>_backward -> the first.

    Tokens are flat: vectors [total, H, N], cu_seqlens [S + 1] of S sequences, state [S, H, N, N].
    form: the module, with what its library takes (DEVICE, HEAD_SIZES, DTYPES, LOGW_DTYPES) and
    launch(function, *tensors, S, H, total, dtype of r as in DTYPES), which runs a function of it.
    keep(r, state, save): (shape, dtype) of the n_kept tensors that the forward also returns for the
    backward; WKV-6 has no sa. scratch(state, kept): memory for the backward. parts(state, kept):
    how many there are of WKV-6's du. Tensors that do not fit are a ValueError.
    """
    names = ("r", "logw", "k", "v", *(("a", "b") if version == 7 else ("u",)), "state")
    n, n_kept = len(names), n_kept or {6: 1, 7: 2}[version]
    tensors = ", ".join(f"Tensor {x}" for x in names) + ", Tensor cu_seqlens"

    def sizes(r, state):
        return len(state), *r.shape[1::-1], DTYPES[r.dtype]

    def forward_outputs(*args):
        r, state, save = args[0], args[n - 1], args[-1]
        out = empty_like((r, state))
        for shape, dtype in keep(r, state, save)[-n_kept:]:
            out.append(state.new_empty(shape, dtype=dtype))
        return tuple(out)

    def forward(*args):
        check_inputs(form, names, args[:-1])
        out = forward_outputs(*args)  # without save the kept ones are empty, and null to the kernel
        form.launch(f"{name}_forward", *args[:-1], *out, *sizes(args[0], args[n - 1]))
        return out

    def backward(*args):  # the inputs, cu_seqlens, kept, dy, dstate
        check_inputs(form, names, args[: n + 1])
        r, state, kept, grads = args[0], args[n - 1], args[n + 1 : -2], empty_like(args[:n])
        check_kept(kept, keep(r, state, True)[-n_kept:], *args[-2:], r, state)
        if version == 6:  # du: a part per chunk, span or sequence, summed here in a fixed order
            grads[4] = state.new_zeros(parts(state, kept), *state.shape[1:3])
        form.launch(f"{name}_backward", *args, *grads, *scratch(state, kept), *sizes(r, state))
        if version == 6:
            grads[4] = grads[4].sum(0)
        return tuple(grads)

    def fake_forward(*args):
        check_one_device(args)
        return forward_outputs(*args)

    def fake_backward(*args):
        check_one_device(args)
        return tuple(empty_like(args[:n]))

    def autograd(ctx, dy, dstate, *_):
        saved = ctx.saved_tensors  # read once: under checkpointing this is what recomputes
        grads = backward_op(*saved, torch.zeros_like(saved[0]) if dy is None else dy, dstate)
        return *grads, None, None  # none for cu_seqlens and save

    custom_op = functools.partial(torch.library.custom_op, mutates_args=())
    op = custom_op(
        f"gosling::{name}", forward, schema=f"({tensors}, bool save) -> {outputs(2 + n_kept)}"
    )
    op.register_fake(fake_forward)
    op.register_autograd(autograd, setup_context=save_for_backward)
    kept = "".join(f", Tensor kept{i}" for i in range(n_kept))
    backward_op = custom_op(
        f"gosling::{name}_backward",
        backward,
        schema=f"({tensors}{kept}, Tensor dy, Tensor? dstate) -> {outputs(n)}",
    )
    backward_op.register_fake(fake_backward)
    return op
