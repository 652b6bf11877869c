"""wkv_cuda/cuda_seq.py, cuda_token.py and their .cu files. Without a GPU the same .cu sources are
compiled by g++ (cuda_on_cpu.h) and go through the whole Python path on CPU tensors; where there is
a GPU every comparison runs there as well."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import wkv_cuda
from wkv_cuda import cuda_seq, cuda_token, native

import pytest
import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
N, H = 64, 2
OPS = {
    "wkv6": functools.partial(wkv_cuda.wkv6, backend="cuda_seq"),
    "wkv7": functools.partial(wkv_cuda.wkv7, backend="cuda_seq"),
}
NAMES = {
    "wkv6": ["r", "logw", "k", "v", "u", "state"],
    "wkv7": ["r", "logw", "k", "v", "a", "b", "state"],
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        assert cuda_seq.unavailable() is None
        yield "cuda"
    else:
        request.getfixturevalue("emulated")
        yield "cpu"


# ----------------------------------------------------------------------------------------------
# the oracle: one token at a time, float64, gradients by autograd


def oracle(op, r, logw, k, v, *rest):
    *ab_or_u, S = rest
    y, w = [], logw.exp()

    def row(x, t):
        return x[:, t, :, None, :]  # [B, H, 1, N]: spreads over the columns of S

    def col(x, t):
        return x[:, t, :, :, None]  # [B, H, N, 1]: spreads over the rows

    for t in range(r.shape[1]):
        vk = col(v, t) * row(k, t)
        if op == "wkv7":
            a, b = ab_or_u
            S = S * row(w, t) + (S @ col(a, t)) * row(b, t) + vk
            y.append((S @ col(r, t))[..., 0])
        else:
            u = ab_or_u[0][:, None, :]
            y.append(((S + u * vk) @ col(r, t))[..., 0])
            S = S * row(w, t) + vk
    return torch.stack(y, 1), S


def make(op, T, B=2, kind="random", dtype=torch.float32, seed=0):
    """Inputs in the order of NAMES[op], and gradients for y and for the final state."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    x = {name: rand(B, T, H, N) * N**-0.25 for name in "rkv"}
    kappa = torch.nn.functional.normalize(rand(B, T, H, N), dim=-1)
    if kind == "stress":  # one key again and again
        kappa = kappa[:, :1].expand(B, T, H, N)
        x["k"] = x["k"][:, :1].expand(B, T, H, N)
    if op == "wkv7":
        x["a"], x["b"] = -kappa, kappa * torch.rand(B, T, H, N, generator=g)
        x["logw"] = -0.6065 * (
            torch.sigmoid(rand(B, T, H, N)) if kind == "random" else torch.ones(B, T, H, N)
        )
    else:
        x["u"] = rand(H, N) * 0.5
        # stress: -exp(5) underflows exp(logw) to 0; -exp(-6) hardly decays
        x["logw"] = (
            rand(B, T, H, N) if kind == "random" else torch.rand(B, T, H, N, generator=g) * 11 - 6
        )
        if kind == "stress":
            x["logw"][..., 0] = 5.0
        x["logw"] = -x["logw"].exp()
    x["state"] = rand(B, H, N, N) * 0.1
    keep = ("logw", "state", "u")
    inputs = [x[n] if n in keep else x[n].to(dtype) for n in NAMES[op]]
    return inputs, rand(B, T, H, N).to(dtype), rand(B, H, N, N) * 0.3


def run(op, inputs, dy, dstate, device, cu_seqlens=None, fn=None):
    """y, final state, and the gradient of every input, by name."""
    x = [i.to(device, copy=True).requires_grad_() for i in inputs]
    y, state = (fn or OPS[op])(*x, cu_seqlens=cu_seqlens)
    ((y * dy.to(device)).sum() + (state * dstate.to(device)).sum()).backward()
    out = {"y": y, "state": state, **{"d" + n: i.grad for n, i in zip(NAMES[op], x, strict=False)}}
    return {n: t.detach().cpu() for n, t in out.items()}


def run_oracle(op, inputs, dy, dstate):
    x = [i.double().requires_grad_() for i in inputs]
    y, state = oracle(op, *x)
    torch.autograd.backward([y, state], [dy.double(), dstate.double()])
    return {
        "y": y.detach(),
        "state": state.detach(),
        **{"d" + n: i.grad for n, i in zip(NAMES[op], x, strict=False)},
    }


def errors(out, ref):
    assert out.keys() == ref.keys()
    return {n: ((out[n].double() - ref[n]).norm() / ref[n].norm()).item() for n in ref}


# ----------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("kind", ["random", "stress"])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("op", OPS)
def test_fp32_against_float64(op, T, kind, device):
    case = make(op, T, kind=kind)
    for name, error in errors(run(op, *case, device), run_oracle(op, *case)).items():
        assert error <= (2e-6 if name in ("y", "state") else 2e-5), (name, error)


# inputs are rounded before both sides see them and all arithmetic is fp32, so what is left is the
# rounding of the output: at most half a unit in the last place, 2^-9 (bf16) or 2^-12 (fp16) of the
# value. What stays fp32 (state, dlogw, du, dstate) has the fp32 bounds
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype, tolerance, device):
    case = make(op, 70, dtype=dtype)
    out = run(op, *case, device)
    for name, error in errors(out, run_oracle(op, *case)).items():
        fp32 = name in ("state", "dstate", "dlogw", "du")
        assert out[name].dtype == (torch.float32 if fp32 else dtype), name
        assert error <= (2e-5 if fp32 else tolerance), (name, error)


@pytest.mark.parametrize("op", OPS)
def test_documents_equal_each_alone(op, device):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    inputs, dy, _ = make(op, sum(lengths), B=1)
    g = torch.Generator().manual_seed(1)
    inputs[-1], dstate = torch.randn(2, len(lengths), H, N, N, generator=g)
    packed = run(op, inputs, dy, dstate, device, cu_seqlens=cu.to(device))
    du = torch.zeros(H, N)
    for d, (p, q) in enumerate(zip(cu[:-1], cu[1:], strict=False)):
        alone = run(
            op,
            [
                x[:, p:q] if x.dim() == 4 and n != "state" else x
                for n, x in zip(NAMES[op], inputs[:-1], strict=False)
            ]
            + [inputs[-1][d : d + 1]],
            dy[:, p:q],
            dstate[d : d + 1],
            device,
        )
        du += alone.pop("du", 0)
        for (
            name,
            x,
        ) in alone.items():  # the same arithmetic in the same order: equal to the last bit
            assert torch.equal(
                packed[name][d : d + 1] if "state" in name else packed[name][:, p:q], x
            ), (name, d)
        if p == q:
            assert torch.equal(alone["state"], inputs[-1][d : d + 1]) and torch.equal(
                alone["dstate"], dstate[d : d + 1]
            )
    assert op == "wkv7" or errors({"du": packed["du"]}, {"du": du.double()})["du"] < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_pieces_equal_the_whole(op, device):
    inputs, *_ = make(op, 70)
    x = [i.to(device) for i in inputs]
    y, state = OPS[op](*x)
    pieces, S = [], x[-1]
    for p, q in [(0, 1), (1, 33), (33, 70)]:
        piece, S = OPS[op](*[i[:, p:q] if i.dim() == 4 else i for i in x[:-1]], S)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), y) and torch.equal(S, state)


@pytest.mark.parametrize("op", OPS)
def test_layout_dtype_and_missing_parts(op, device):
    inputs, dy, dstate = make(op, 40)
    whole = run(op, inputs, dy, dstate, device)
    strided = [i.transpose(0, 1).contiguous().transpose(0, 1) for i in inputs]
    assert all(torch.equal(whole[n], x) for n, x in run(op, strided, dy, dstate, device).items())
    # mixed dtypes meet in fp32; y is as r, every gradient as its input
    mixed = [
        i.bfloat16() if n in ("k", "logw", "u") else i
        for n, i in zip(NAMES[op], inputs, strict=False)
    ]
    out = run(op, mixed, dy, dstate, device)
    assert out["y"].dtype == torch.float32 and all(
        out["d" + n].dtype == i.dtype for n, i in zip(NAMES[op], mixed, strict=False)
    )
    ref = run_oracle(op, mixed, dy, dstate)
    assert all(
        e < (3e-3 if out[n].dtype == torch.bfloat16 else 2e-5) for n, e in errors(out, ref).items()
    )
    # no state; a loss that uses only y, or only the state; only one input that wants a gradient
    x = [i.to(device) for i in inputs]
    zero = torch.zeros_like(x[-1])
    assert all(
        torch.equal(p, q) for p, q in zip(OPS[op](*x[:-1]), OPS[op](*x[:-1], zero), strict=False)
    )
    for used, cotangents in ((0, (dy, dstate * 0)), (1, (dy * 0, dstate))):
        k = x[2].clone().requires_grad_()
        out = OPS[op](*x[:2], k, *x[3:])[used]
        out.backward(cotangents[used].to(device))
        assert torch.equal(k.grad.cpu(), run(op, inputs, *cotangents, device)["dk"])


# ----------------------------------------------------------------------------------------------
# a good citizen of PyTorch


def flat_case(op, device):
    """Arguments of the op itself, but for `save`: two sequences of 40 tokens (no chunk slot stays
    unused)."""
    inputs, dy, dstate = make(op, 40)
    flat = [
        x.flatten(0, 1) if x.dim() == 4 and n != "state" else x
        for n, x in zip(NAMES[op], inputs, strict=False)
    ]
    return (
        [x.to(device) for x in (*flat, torch.tensor([0, 40, 80], dtype=torch.int32))],
        dy.flatten(0, 1),
        dstate,
    )


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    flat, dy, dstate = flat_case(op, device)
    forward, backward = getattr(torch.ops.gosling, op), getattr(torch.ops.gosling, op + "_backward")
    torch.library.opcheck(forward.default, (*flat, False))
    kept = forward(*flat, True)[2:]
    for final in (dstate.to(device), None):
        torch.library.opcheck(backward.default, (*flat, *kept, dy.to(device), final))
    torch.library.opcheck(
        forward.default, (*[x.requires_grad_(x.is_floating_point()) for x in flat], True)
    )


@pytest.mark.parametrize("op", OPS)
def test_compile_and_checkpoint(op, device):
    case = make(op, 40)
    eager = run(op, *case, device)
    compiled = torch.compile(
        OPS[op], fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    for fn in (compiled, lambda *x, **kw: checkpoint(OPS[op], *x, use_reentrant=False, **kw)):
        for name, x in run(op, *case, device, fn=fn).items():
            assert torch.equal(x, eager[name]), name


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_saved_without_gradients(op, device):
    inputs, *_ = make(op, 40)
    flat, *_ = flat_case(op, device)
    assert all(x.numel() == 0 for x in getattr(torch.ops.gosling, op)(*flat, False)[2:])
    with torch.no_grad():
        y, _ = OPS[op](*[x.to(device).requires_grad_() for x in inputs])
    assert not y.requires_grad


def test_wrong_arguments(device):
    inputs, *_ = make("wkv7", 3)
    r, logw, k, v, a, b, state = [x.to(device) for x in inputs]
    call = OPS["wkv7"]
    for message, args in {
        "backend 'cuda_seq': head size 32, not 64": [x[..., :32] for x in (r, logw, k, v, a, b)],
        r"k is torch.float32 \(2, 2, 2, 64\) on .*, expected .* \(2, 3, 2, 64\)": [
            r,
            logw,
            k[:, 1:],
            v,
            a,
            b,
        ],
        "torch.float64, not torch.float32 or torch.bfloat16": [r, logw, k, v.double(), a, b],
        r"state is \S+ \(1, 2, 64, 64\) on .*expected .* \(2, 2, 64, 64\)": [
            r,
            logw,
            k,
            v,
            a,
            b,
            state[:1],
        ],
    }.items():
        with pytest.raises(ValueError, match=message):
            call(*args)
    with pytest.raises(ValueError, match="cu_seqlens wants B = 1"):
        call(r, logw, k, v, a, b, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="u is .*expected floats"):
        OPS["wkv6"](r, logw, k, v, state)
    half = state.bfloat16()  # a state is used in fp32 whatever it comes in
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            call(r, logw, k, v, a, b, half), call(r, logw, k, v, a, b, half.float()), strict=False
        )
    )


# ----------------------------------------------------------------------------------------------
# one token, the state in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "stress"])
@pytest.mark.parametrize("op", OPS)
def test_a_token_in_place_against_float64(op, kind, dtype, device, request):
    """Token after token, in the state that is given; emulated lanes in either order."""
    inputs, _, _ = make(op, 5, B=3, kind=kind, dtype=dtype)
    want_y, want_state = oracle(op, *[x.double() for x in inputs])
    for reverse in (0, 1):
        if device == "cpu":
            request.getfixturevalue("emulated").cuda_on_cpu_reverse(reverse)
        *vectors, state = [x.to(device, copy=True) for x in inputs]
        ys, place = [], state.data_ptr()
        with torch.no_grad(), cuda_token.in_place():
            for t in range(5):
                now = [x if x.dim() == 2 else x[:, t : t + 1] for x in vectors]
                y, after = getattr(wkv_cuda, op)(*now, state)
                assert after.data_ptr() == place
                ys.append(y)
        if device == "cpu":
            request.getfixturevalue("emulated").cuda_on_cpu_reverse(0)
        rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12}.get(dtype, 2e-6)
        pairs = ((torch.cat(ys, 1), want_y, rounding), (state, want_state, 2e-6))
        for got, want, tolerance in pairs:
            assert (got.cpu().double() - want).norm() <= tolerance * want.norm()


def test_in_place_is_for_one_token_without_gradients_and_for_a_state_that_fits(emulated):
    inputs, _, _ = make("wkv7", 2)
    *vectors, state = inputs
    one = [x[:, :1] for x in vectors]
    with torch.no_grad():
        assert not cuda_token.takes(one, state)
        with cuda_token.in_place():
            assert cuda_token.takes(one, state) and not cuda_token.takes(vectors, state)
            assert not cuda_token.takes(one, state.double())
            assert not cuda_token.takes(one, state.mT)
            assert not cuda_token.takes([x[..., :32] for x in one], state)
            with torch.enable_grad():
                assert not cuda_token.takes(one, state)
        assert not cuda_token.is_in_place()
    flat = [x[:, 0] for x in one]
    with pytest.raises(ValueError, match="in one piece"):
        cuda_token._ops[7](*flat, state.mT)
    with pytest.raises(ValueError, match="k is torch.float32"):
        cuda_token._ops[7](*flat[:2], flat[2][:1], *flat[3:], state)
    torch.library.opcheck(
        cuda_token._ops[7], (*flat, state.clone()), test_utils=("test_schema", "test_faketensor")
    )


# ----------------------------------------------------------------------------------------------
# building


@needs_nvcc
@pytest.mark.parametrize("source", ["wkv6.cu", "wkv7.cu", "wkv_token.cu"])
def test_nvcc_compiles_without_spills(source, tmp_path):
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (75, 80, 90)]
    done = subprocess.run(
        [
            "nvcc",
            "-O3",
            "-std=c++17",
            "-Xptxas",
            "-v",
            *archs,
            "-c",
            "-o",
            str(tmp_path / "x.o"),
            str(ROOT / "wkv_cuda" / source),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}, done.stderr


def test_on_a_machine_without_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "no CUDA device" in cuda_seq.unavailable()
    asks = torch.compile(
        lambda x: x + 1 if cuda_seq.unavailable() else x, fullgraph=True, backend="eager"
    )
    assert asks(torch.zeros(1)) == 1  # a constant to torch.compile, not a build to trace
    inputs, *_ = make("wkv7", 1)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        OPS["wkv7"](*inputs)
    assert wkv_cuda._unsupported(cuda_seq, inputs) == "r is on cpu, not cuda"


@pytest.fixture
def looks_like_a_gpu(monkeypatch, tmp_path):
    """A machine that is made to look as if it had a GPU, and an empty toolkit in tmp_path ->
    (build, nvcc's path)"""
    from torch.utils import cpp_extension

    for target, name, value in [
        (torch.cuda, "is_available", lambda: True),
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_capability", lambda i=0: (9, 0)),
        (cpp_extension, "CUDA_HOME", str(tmp_path)),
    ]:
        monkeypatch.setattr(target, name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    (tmp_path / "bin").mkdir()
    return cuda_seq.library.__wrapped__, tmp_path / "bin/nvcc"  # without its cache


def write_nvcc(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_what_is_missing(looks_like_a_gpu):
    build, nvcc = looks_like_a_gpu
    assert "no nvcc: install the CUDA toolkit" in build()[1]
    write_nvcc(
        nvcc,
        "echo nothing\necho 'wkv6.cu(7): error: nothing compiles today' >&2\n"
        "echo the end >&2; exit 1",
    )
    assert build() == (None, "wkv6.cu(7): error: nothing compiles today")
    (lock,) = nvcc.parent.parent.glob(
        "built/*"
    )  # a lock that a killed build leaves behind stops nobody
    assert lock.suffix == ".lock" and build() == (None, "wkv6.cu(7): error: nothing compiles today")


def test_what_is_built_is_kept(looks_like_a_gpu, library_on_cpu, capfd):
    """nvcc's place taken by a script that copies a library. Half a library is built anew, another
    compiler's is another."""
    build, nvcc = looks_like_a_gpu
    write_nvcc(nvcc, "exit 1")
    assert build() == (None, f"{nvcc} failed")
    (lock,) = nvcc.parent.parent.glob("built/*")
    lock.with_suffix(".so").write_bytes(b"\x7fELF")  # cut short
    write_nvcc(
        nvcc, f'for out; do true; done; test "$out" = --version || cp {library_on_cpu._name} $out'
    )
    capfd.readouterr()
    found, missing = build()
    assert (
        missing is None
        and found.wkv_probe() == 0
        and "compiling the recurrence, once" in capfd.readouterr().err
    )
    write_nvcc(nvcc, "exit 1")
    assert build()[1] is None and capfd.readouterr().err == ""
    write_nvcc(nvcc, 'echo release 14; test "$1" = --version')
    assert build()[1] == f"{nvcc} failed" and len(list(lock.parent.glob("*.lock"))) == 2


@needs_nvcc
def test_nvcc_builds_a_library_that_loads(tmp_path):
    """With the real compiler's own command; its probe says that there is no card, where there is
    none."""
    home = Path(os.path.realpath(shutil.which("nvcc"))).parent.parent
    home = home if (home / "include").exists() else Path("/usr/local/cuda")
    if not (home / "bin/nvcc").exists():
        pytest.skip("nvcc is not in a toolkit's folder")
    command = [str(home / "bin/nvcc"), *cuda_seq.FLAGS, "-gencode=arch=compute_75,code=sm_75"]
    found, missing = native.load(
        tmp_path / "x.so", command, cuda_seq.SOURCES[:2] + cuda_seq.SOURCES[4:]
    )
    assert missing is None and (found.wkv_probe() == 0) == torch.cuda.is_available()
    assert all(hasattr(found, f"wkv{v}_{d}") for v in (6, 7) for d in ("forward", "backward"))
