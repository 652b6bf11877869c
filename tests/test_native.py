"""The library that is built once (wkv_cuda/native.py): what can be wrong with it, where it cannot
lie, builds that are killed; and no native code takes a tensor that it would read as another."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model import RWKV, RWKVConfig
from wkv_cuda import cpu, cuda, cuda_seq, fused, native

import pytest
import torch
from helpers import ROOT

FORMS = {"_cpu": cpu, "": cuda_seq, "_chunk": cuda}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """(path, command, sources) of a library that compiles at once, and nowhere else to put it."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    path = tmp_path / "cache" / "gosling_small.so"
    return path, ["c++", "-shared", "-fPIC"], [source]


def seven(path):
    """What the library at `path` answers, in a process of its own."""
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).seven())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def cut(content):
    return content[: len(content) // 2]


def flip_one_bit(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def nothing(content):
    return b""


def garbage(content):
    return b"garbage" * 1000


# ----------------------------------------------------------------------------------------------
# the library


@pytest.mark.parametrize("damage", [cut, flip_one_bit, nothing, garbage])
def test_a_damaged_library_is_built_again(small, capfd, damage):
    path, *_ = small
    assert native.load(*small)[1] is None and seven(path) == "7\n"
    good = path.read_bytes()
    copy = path.with_name("damaged")  # another file: this process has mapped the first
    copy.write_bytes(damage(good))
    copy.replace(path)
    assert native.load(*small, build=False) == (
        None,
        "not built yet: the first call that needs a gradient builds it",
    )
    assert native.load(*small)[1] is None
    assert path.read_bytes() == good and seven(path) == "7\n"
    assert capfd.readouterr().err.count("compiling") == 2
    native.note_of(path).write_text("8 0123\n")  # the note does not fit: it may be either of them
    assert native.load(*small)[1] is None
    assert capfd.readouterr().err.count("compiling") == 1


def test_what_is_whole_is_taken_and_read_once(small, monkeypatch):
    native.load(*small)
    read = []
    describe = native.size_and_digest
    monkeypatch.setattr(native, "size_and_digest", lambda path: read.append(path) or describe(path))
    monkeypatch.setattr(native, "build_library", None)
    native.open_checked.cache_clear()
    for _ in range(3):
        assert native.load(*small, build=False)[0].seven() == 7
    assert len(read) == 1


def test_a_library_is_on_the_disk_before_it_has_its_name(small, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    def recorded_replace(old, new):
        events.append(f"renamed {Path(new).suffix}")
        replace(old, new)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    native.load(*small)
    assert events == [".so", ".sum", "renamed .sum", "renamed .so"]


def test_a_cache_that_cannot_be_written(small, monkeypatch):
    """A file where the folder should be; a library in a folder that is read, but not written."""
    path, command, sources = small
    (path.parent.parent / "file").write_text("")
    for folder in (path.parent.parent / "file", path.parent.parent / "file" / "below"):
        library, missing = native.load(folder / path.name, command, sources)
        assert missing is None and library.seven() == 7
    kept = native.spare_folder()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert {file.suffix for file in kept.iterdir()} == {".so", ".sum", ".lock"}
    native.load(*small)
    shutil.rmtree(kept)
    monkeypatch.setattr(native, "can_write", lambda folder: False)
    monkeypatch.setattr(native, "build_library", None)
    assert native.load(*small)[0].seven() == 7 and not list(kept.parent.iterdir())


def test_can_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert native.can_write(tmp_path) and native.can_write(tmp_path / "a" / "b")
    assert not native.can_write(tmp_path / "file") and not native.can_write(tmp_path / "file" / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert not native.can_write(tmp_path) and not native.can_write(tmp_path / "a")


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_temporary_folder_of_somebody_else_is_not_used(small, kind):
    """Code is loaded from it, so nobody else may have put it there."""
    path, command, sources = small
    spare = Path(tempfile.gettempdir(), f"gosling-{os.getuid()}")
    if kind == "link":
        (path.parent.parent / "elsewhere").mkdir()
        spare.symlink_to(path.parent.parent / "elsewhere")
    elif kind == "open to all":
        spare.mkdir()
        spare.chmod(0o777)
    else:
        spare.write_text("")
    (path.parent.parent / "file").write_text("")
    library, missing = native.load(path.parent.parent / "file" / path.name, command, sources)
    assert library is None and str(spare) in missing and "\n" not in missing


def test_without_a_home(small, monkeypatch):
    """No HOME, and a user whom the system has no name for, as in a container."""

    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    _, command, sources = small
    path = native.place("small", command, sources, ["true"])
    assert path.parent == native.spare_folder()
    assert native.load(path, command, sources)[0].seven() == 7
    monkeypatch.setenv("HOME", str(path.parent.parent / "home"))  # not there: it is made
    assert native.place("small", command, sources, ["true"]).parent.parent.name == ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if it were not set, says its specification
    assert native.place("small", command, sources, ["true"]).parent.parent.name == ".cache"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", ".")
    assert native.place("small", command, sources, ["true"]).is_absolute()


def test_without_any_folder_the_pytorch_form_takes_over(monkeypatch):
    def full():
        raise FileNotFoundError("no temporary folder")

    monkeypatch.setattr(native, "place", lambda *args: full())
    assert cpu._place.__wrapped__() == (None, "no temporary folder") or shutil.which("c++") is None


def test_a_blank_compiler_is_none(monkeypatch):
    monkeypatch.setenv("CXX", "  ")
    _, command = cpu._place.__wrapped__()
    assert "no C++ compiler" in command or command[0] == "c++"


def is_alive(pid):
    """Whether a process runs; one that has ended, and waits for its parent, does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_leaves_nothing(small, by):
    path, command, sources = small
    compiler, pids = path.parent.parent / "slow-compiler", path.parent.parent / "pids"
    compiler.write_text(
        f"#!/bin/sh\nsleep 100 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n"
    )
    compiler.chmod(0o755)
    code = (
        f"import pathlib; from wkv_cuda import native; path = pathlib.Path({str(path)!r}); "
        f"native.load(path, [{str(compiler)!r}], [])"
    )
    build = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not pids.exists() and time.time() < deadline:
        time.sleep(0.05)
    compilers = [int(pid) for pid in pids.read_text().split()]
    assert all(map(is_alive, compilers))
    build.send_signal(by)
    build.wait()
    deadline = time.time() + 20
    while any(map(is_alive, compilers)) and time.time() < deadline:
        time.sleep(0.05)
    alive = [pid for pid in compilers if is_alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive and len(list(path.parent.glob("*.build"))) == 1
    assert native.load(*small)[1] is None
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".sum", ".lock"}


def test_a_build_that_goes_on_is_left_alone(small):
    import fcntl

    path, *_ = small
    path.parent.mkdir()
    build = path.with_suffix(".4194304.build")
    build.mkdir()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        native.remove_leftovers(path.parent)
        assert build.exists()
    native.remove_leftovers(path.parent)
    assert not build.exists()


# ----------------------------------------------------------------------------------------------
# what native code is given


def wrong_ones(x):
    """A tensor in other dtypes, in other shapes, on another device."""
    yield from (x.to(dtype) for dtype in (torch.float64, torch.int64) if dtype != x.dtype)
    yield x.to("meta")
    yield x[None]
    yield torch.cat([x, x])
    yield x[:-1]
    if x.dim() > 1:
        yield x[..., :-1]


def flat_inputs(version, dtype=torch.float32, T=40, H=2, N=64):
    """(names, tensors) of the op gosling::wkv<version>…: two sequences of 17 and 23 tokens."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return 0.1 * torch.randn(*shape, generator=g)

    names = ["r", "logw", "k", "v", *(["a", "b"] if version == 7 else ["u"]), "state", "cu_seqlens"]
    tensors = [randn(T, H, N).to(dtype) for _ in names]
    tensors[1] = -tensors[1].float().abs()
    if version == 6:
        tensors[4] = randn(H, N)
    tensors[-2:] = [randn(2, H, N, N), torch.tensor([0, 17, T], dtype=torch.int32)]
    return names, tensors


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("suffix", FORMS)
def test_an_op_takes_no_wrong_tensor(version, suffix, monkeypatch):
    """The CUDA forms too: nothing is launched before the tensors have been looked at."""
    form = FORMS[suffix]
    launched = []
    monkeypatch.setattr(form, "DEVICE", "cpu")
    if form is not cpu or cpu.unavailable():
        monkeypatch.setattr(form, "launch", lambda function, *args: launched.append(function))
    op = getattr(torch.ops.gosling, f"wkv{version}{suffix}")
    backward = getattr(torch.ops.gosling, f"wkv{version}{suffix}_backward")
    dtype = torch.bfloat16 if form is cuda else torch.float32
    names, tensors = flat_inputs(version, dtype)
    y, state, *kept = op(*tensors, True)
    launched.clear()
    for i, name in enumerate(names):
        for wrong in wrong_ones(tensors[i]):
            args = [*tensors[:i], wrong, *tensors[i + 1 :]]
            with pytest.raises(ValueError, match="expected") as refused:
                op(*args, True)
            assert "\n" not in str(refused.value), name
            with pytest.raises(ValueError, match="expected"):
                backward(*args, *kept, y, state)
    rest = [*kept, y, state]
    for i in range(len(rest)):
        for wrong in wrong_ones(rest[i]):
            if wrong.shape == rest[i].shape == torch.Size([0]):
                continue
            if wrong.numel() == rest[i].numel() == 0 and wrong.dtype == rest[i].dtype:
                continue  # nothing passes from span to span here: what is twice nothing is nothing
            with pytest.raises(ValueError, match="expected"):
                backward(*tensors, *rest[:i], wrong, *rest[i + 1 :])
    with pytest.raises(
        ValueError, match="kept0 is .*expected"
    ):  # as a forward without `save` returns
        backward(*tensors, *[x[:0] for x in kept], y, state)
    assert not launched
    backward(*tensors, *kept, y, None)  # a state that nobody used


@pytest.mark.parametrize("borders", [[0, 17, 41], [0, 50, 40], [1, 17, 40], [-5, 17, 40]])
def test_an_op_takes_no_wrong_borders(borders):
    if missing := cpu.unavailable():
        pytest.skip(missing)
    _, tensors = flat_inputs(7)
    tensors[-1] = torch.tensor(borders, dtype=torch.int32)
    with pytest.raises(ValueError, match="must rise from 0 to 40"):
        torch.ops.gosling.wkv7_cpu(*tensors, True)


@pytest.fixture
def built():
    if missing := cpu.unavailable():
        pytest.skip(missing)


def test_mix_takes_no_wrong_tensor(built):
    x, before, m = (torch.randn(*shape) for shape in ((2, 5, 48), (2, 5, 48), (1, 1, 48)))
    doubled = [t.double() for t in (x, before, m)]
    for a, b, w in (
        (x, before[:1], m),
        (x, before, m[..., :1]),
        (*doubled[:2], doubled[2][..., :1]),
    ):
        with pytest.raises(ValueError, match="mix: "):  # PyTorch would repeat them
            fused.mix(a, b, w)


@pytest.mark.parametrize(
    "name, number, n_vectors, n_parameters, n_results",
    [("mix", 2, 4, 2, 2), ("gates7", 16, 6, 5, 5), ("readout", 16, 5, 3, 1)],
)
def test_fused_parts_take_no_wrong_tensor(built, name, number, n_vectors, n_parameters, n_results):
    vectors = [torch.randn(2, 5, 48) for _ in range(n_vectors)]
    parameters = [torch.randn(1, 1, 48) for _ in range(n_parameters)]
    grads = [torch.randn(2, 5, 48) for _ in range(n_results)]

    def run(grads=None):
        return cpu.fused(name, number, vectors, parameters, n_results, grads)

    assert len(run()) == n_results and len(run(grads)) == n_vectors + n_parameters
    for group in (vectors, parameters, grads):
        for i, right in enumerate(group):
            for wrong in wrong_ones(right):
                if group is parameters and (wrong.numel(), wrong.dtype) == (48, torch.float32):
                    continue  # a parameter may be [C], too
                group[i] = wrong
                with pytest.raises(ValueError, match=f"{name}: "):
                    run(grads)
            group[i] = right
    for wrong in (grads[1:], [*grads, grads[0]]):
        if wrong:
            with pytest.raises(ValueError, match=f"{name}: "):
                run(wrong)
    if name != "mix":
        for wrong in (0, 17, 32, 256):
            with pytest.raises(ValueError, match=f"{name}: "):
                cpu.fused(name, wrong, vectors, parameters, n_results)
    for wrong in (torch.randn(3).double(), torch.randn(3).to("meta")):
        with pytest.raises(ValueError, match="relu_squared: "):
            cpu.relu_squared(wrong)


def test_score_rows_takes_no_wrong_tensor(built):
    z, targets, dlogps, dentropy = (
        torch.randn(7, 50),
        torch.arange(7),
        torch.randn(7),
        torch.randn(7),
    )
    scores = cpu.score_rows(z, targets, 1.0)
    right = {"entropy": scores[1], "lse": scores[3], "dlogps": dlogps, "dentropy": dentropy}

    def backward(entropy, lse, dlogps, dentropy):
        return cpu.score_rows(
            z.clone(), targets, 1.0, (None, entropy, None, lse), (dlogps, dentropy)
        )

    assert backward(**right) is not None and backward(**{**right, "dentropy": None}) is not None
    for name, x in right.items():
        for wrong in wrong_ones(x):
            with pytest.raises(ValueError, match=f"{name} is .*expected"):
                backward(**{**right, name: wrong})
        if name != "dentropy":
            with pytest.raises(ValueError, match=f"{name} is None"):
                backward(**{**right, name: None})
    for wrong in wrong_ones(targets):
        if not wrong.is_meta or wrong.shape != targets.shape:
            with pytest.raises(ValueError, match="targets"):
                cpu.score_rows(z, wrong, 1.0)
    for wrong in (z[0], z[None]):
        with pytest.raises(ValueError, match=r"expected \[M, V\]"):
            cpu.score_rows(wrong, targets, 1.0)
    for halves in ((scores, None), (None, (dlogps, None))):
        with pytest.raises(ValueError, match="scores and grads"):
            cpu.score_rows(z, targets, 1.0, *halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # C++, PyTorch
def test_score_tokens_takes_no_wrong_tensor(dtype):
    h, weight, targets = (
        torch.randn(7, 48).to(dtype),
        torch.randn(50, 48).to(dtype),
        torch.arange(7),
    )
    for wrong in (h.long(), h[0], h[:, 1:], h[None], h.to("meta")):
        with pytest.raises(ValueError, match="expected"):
            fused.score_tokens(wrong, weight, targets)
    for wrong in (weight[0], weight[:, 1:], weight[:0], weight.to("meta")):
        with pytest.raises(ValueError, match="expected"):
            fused.score_tokens(h, wrong, targets)
    for wrong in (targets.int(), targets[:1], targets[:0], targets[:, None], targets.to("meta")):
        with pytest.raises(ValueError, match="targets"):
            fused.score_tokens(h, weight, wrong)


def test_a_large_product_takes_no_wrong_tensor():
    x, w = torch.randn(600, 256), torch.randn(256, 256)
    for wrong in (torch.randn(400, 200), torch.randn(2**17), w.to("meta")):
        with pytest.raises((ValueError, RuntimeError)):
            fused.linear(x, wrong)


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_wrong_tensor(built, version, dtype):
    model = RWKV(RWKVConfig(version, 2, 64, 50, head_size=32)).to(dtype).eval()
    state, ids = model.zero_state(3), torch.tensor([4, 5, 6])
    step = fused.decoder(model)
    want = step(ids, {key: x.clone() for key, x in state.items()})
    for wrong in wrong_ones(ids):
        with pytest.raises(ValueError, match="ids are|state is not one of"):
            step(wrong, state)
    for key, x in state.items():
        transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
        for wrong in (*wrong_ones(x), transposed):
            with pytest.raises(ValueError, match="the state is not one of 3"):
                step(ids, {**state, key: wrong})
    model.emb.weight.data = torch.zeros_like(model.emb.weight.data)  # `step` has the old memory
    assert torch.equal(step(ids, model.zero_state(3)), want)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_stepper_takes_no_wrong_weight(built, version):
    model = RWKV(RWKVConfig(version, 2, 64, 50, head_size=32))
    number, weights = int(version[2]), [p.detach() for p in model.parameters()]
    assert cpu.stepper(number, weights, model.config) is not None
    for i, w in enumerate(weights):
        for wrong in wrong_ones(w):
            others = [*weights[:i], wrong, *weights[i + 1 :]]
            if wrong.shape == w.shape:  # a dtype or a device that the C++ has no form for
                assert cpu.stepper(number, others, model.config) is None
                continue
            with pytest.raises(ValueError, match=rf"weight {i} is .*expected"):
                cpu.stepper(number, others, model.config)
    for others in (weights[:-1], [*weights, weights[0]], []):
        with pytest.raises(ValueError, match="weight .*expected"):
            cpu.stepper(number, others, model.config)
    for other in (13 - number, 5):
        with pytest.raises(ValueError, match=r"RWKV-"):
            cpu.stepper(other, weights, model.config)
