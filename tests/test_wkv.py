"""The recurrences: the naive loop in float64 is the specification; it is itself checked against a
loop of scalars."""

import functools
import re
import subprocess
import sys

import wkv_cuda
from wkv_cuda import cpu, wkv6, wkv7
from wkv_cuda.chunked import unit_lower_inverse

import pytest
import torch
from helpers import ROOT

KINDS = ["plain", "repeated", "fastest", "slowest"]


@pytest.fixture
def built():
    if missing := cpu.unavailable():
        pytest.skip(missing)


def inputs(version, B, T, H, kind="plain", N=64, dtype=torch.float64, seed=0):
    """Leaf tensors (r, logw, k, v, a, b) or (r, logw, k, v, u) as the networks feed them, and as
    badly as they could."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=g)

    r, k, v = randn(B, T, H, N), randn(B, T, H, N) * 0.3, randn(B, T, H, N)
    if version == 6:
        logw = -torch.exp(randn(B, T, H, N) - 1)
        if kind != "plain":  # from exp(-e^5) to almost none, side by side
            logw = -torch.exp((randn(B, T, H, N) * 4).clamp(-8, 5))
        if kind == "fastest":
            logw = torch.full_like(logw, -torch.tensor(5.0).exp().item())
        return [x.requires_grad_() for x in (r, logw, k, v, randn(H, N))]
    kappa, iclr = (
        torch.nn.functional.normalize(randn(B, T, H, N), dim=-1),
        torch.sigmoid(randn(B, T, H, N)),
    )
    logw = -0.6065306597 * torch.sigmoid(randn(B, T, H, N) * 3)
    if kind != "plain":
        kappa, iclr = (
            kappa[:, :1].expand_as(kappa),
            0.99 + 0.01 * iclr,
        )  # one key, removed again and again
        k = kappa * 0.5 + 0.01 * k
    if kind == "fastest":
        logw = torch.full_like(logw, -0.6065306597)
    if kind == "slowest":
        logw = torch.full_like(logw, -1e-4)
    return [x.clone().requires_grad_() for x in (r, logw, k, v, -kappa, kappa * iclr)]


def run(version, xs, state, backend, cu_seqlens=None):
    """-> y, final state, and the gradients of a loss that uses both, for every input and the
    initial state."""
    y, end = (wkv7 if version == 7 else wkv6)(*xs, state, cu_seqlens=cu_seqlens, backend=backend)
    g = torch.Generator().manual_seed(9)
    loss = (y * torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype)).sum() + (
        end * torch.randn(end.shape, dtype=torch.float64, generator=g).to(end.dtype)
    ).sum()
    return [y, end, *torch.autograd.grad(loss, [*xs, state])]


def start_state(sequences, H, N=64):
    return torch.randn(
        sequences, H, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    ).requires_grad_()


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def test_naive_equals_a_loop_of_scalars():
    """S <- S diag(w) + (S a) b' + v k', y = S r; and RWKV-6's; written out index by index."""
    N, T = 3, 4
    for version in (6, 7):
        xs = inputs(version, 1, T, 1, N=N)
        y, end = (wkv7 if version == 7 else wkv6)(*xs, backend="naive")
        r, logw, k, v = (x.detach()[0, :, 0].tolist() for x in xs[:4])
        w = torch.tensor(logw, dtype=torch.float64).exp().tolist()
        S = [[0.0] * N for _ in range(N)]  # S[value][key]
        for t in range(T):
            if version == 7:
                a, b = (x.detach()[0, t, 0].tolist() for x in xs[4:])
                Sa = [sum(S[i][j] * a[j] for j in range(N)) for i in range(N)]
                S = [
                    [S[i][j] * w[t][j] + Sa[i] * b[j] + v[t][i] * k[t][j] for j in range(N)]
                    for i in range(N)
                ]
                out = [sum(S[i][j] * r[t][j] for j in range(N)) for i in range(N)]
            else:
                u = xs[4].detach()[0].tolist()
                out = [
                    sum((S[i][j] + u[j] * v[t][i] * k[t][j]) * r[t][j] for j in range(N))
                    for i in range(N)
                ]
                S = [[S[i][j] * w[t][j] + v[t][i] * k[t][j] for j in range(N)] for i in range(N)]
            torch.testing.assert_close(
                y[0, t, 0], torch.tensor(out, dtype=torch.float64), atol=1e-12, rtol=1e-10
            )
        torch.testing.assert_close(
            end[0, 0], torch.tensor(S, dtype=torch.float64), atol=1e-12, rtol=1e-10
        )


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 31, 32, 33, 64, 100, 300])
def test_chunked_equals_naive(version, kind, T):
    xs, state = inputs(version, 2, T, 2, kind), start_state(2, 2)
    want = run(version, xs, state, "naive")
    for i, (got, w) in enumerate(zip(run(version, xs, state, "chunked"), want, strict=False)):
        assert error(got, w) <= 1e-9, i
    single = [x.detach().float().requires_grad_() for x in (*xs, state)]
    got = run(version, single[:-1], single[-1], "chunked")
    for i, (g, w) in enumerate(zip(got, want, strict=False)):
        if w.norm() < 1e-38:  # decays of exp(-148): below the smallest float32
            assert g.norm() == 0
        elif kind == "plain":
            assert error(g, w) <= (2e-6 if i < 2 else 2e-5), i
        else:
            assert error(g, w) <= (2e-5 if i < 2 else 5e-5), i


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_packed_documents_equal_each_alone(version, backend):
    borders = [0, 5, 5, 38, 39, 103, 103]
    xs, state = inputs(version, 1, 103, 2), start_state(6, 2)
    packed = run(version, xs, state, backend, torch.tensor(borders))
    g = torch.Generator().manual_seed(9)
    wy = torch.randn(packed[0].shape, dtype=torch.float64, generator=g)
    ws = torch.randn(packed[1].shape, dtype=torch.float64, generator=g)
    loss = 0
    for d, (i, j) in enumerate(zip(borders, borders[1:], strict=False)):
        if i == j:
            assert torch.equal(packed[1][d], state[d])  # handed through
            loss = loss + (state[d] * ws[d]).sum()
            continue
        y, end = (wkv7 if version == 7 else wkv6)(
            *[x if x.dim() == 2 else x[:, i:j] for x in xs], state[d : d + 1], backend="naive"
        )
        assert error(packed[0][:, i:j], y) <= 1e-9 and error(packed[1][d : d + 1], end) <= 1e-9
        loss = loss + (y * wy[:, i:j]).sum() + (end * ws[d : d + 1]).sum()
    for got, want in zip(packed[2:], torch.autograd.grad(loss, [*xs, state]), strict=False):
        assert error(got, want) <= 1e-9


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 70])
def test_cpp_equals_naive(version, kind, T, built):
    xs, state = inputs(version, 2, T, 2, kind), start_state(2, 2)
    single = [x.detach().float().requires_grad_() for x in (*xs, state)]
    got = run(version, single[:-1], single[-1], "cpu")
    for i, (g, w) in enumerate(zip(got, run(version, xs, state, "naive"), strict=False)):
        assert g.dtype == torch.float32
        if w.norm() < 1e-38:  # decays of exp(-148)
            assert g.norm() == 0
        else:
            assert error(g, w) <= (2e-6 if kind == "plain" else 2e-5), i


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("N", [16, 32, 48, 80, 96, 112, 128])
def test_cpp_takes_other_head_sizes(version, N, built):
    xs, state = inputs(version, 1, 40, 2, N=N), start_state(1, 2, N)
    single = [x.detach().float().requires_grad_() for x in (*xs, state)]
    for g, w in zip(
        run(version, single[:-1], single[-1], "cpu"), run(version, xs, state, "naive"), strict=False
    ):
        assert error(g, w) <= 2e-6
    with pytest.raises(ValueError, match="16 or 32"):
        run(version, *single_and_state(version, N=24), "cpu")


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("logw", [-20.0, -100.0, -148.0, -1e4, -float("inf")])
def test_cpp_takes_any_decay(version, logw, built):
    """Everywhere, and on every third token; no term is divided by the decay."""
    for step in (1, 3):
        xs, state = inputs(version, 1, 40, 1, "repeated"), start_state(1, 1)
        with torch.no_grad():
            xs[1][:, ::step] = logw
        single = [x.detach().float().requires_grad_() for x in (*xs, state)]
        for i, (g, w) in enumerate(
            zip(
                run(version, single[:-1], single[-1], "cpu"),
                run(version, xs, state, "naive"),
                strict=False,
            )
        ):
            assert error(g, w) <= 2e-6 or (i == 3 and w.norm() < 1e-30), (
                i
            )  # dlogw itself leaves float32


@pytest.mark.parametrize("version", [6, 7])
def test_cpp_documents_pieces_and_threads_change_no_bit(version, built):
    borders = [0, 5, 5, 38, 39, 103, 103]
    single, state = single_and_state(version, B=1, T=103, sequences=6)
    want = run(version, single, state, "cpu", torch.tensor(borders))
    torch.use_deterministic_algorithms(
        True
    )  # torch.empty is then full of NaN: what the op forgot to write shows
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = run(version, single, state, "cpu", torch.tensor(borders))
            assert all(torch.equal(x, y) for x, y in zip(again, want, strict=False))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    op = wkv7 if version == 7 else wkv6
    for d, (i, j) in enumerate(zip(borders, borders[1:], strict=False)):
        S, ys = state[d : d + 1], []
        for p, q in ((i, min(i + 7, j)), (min(i + 7, j), j)):
            y, S = op(*[x if x.dim() == 2 else x[:, p:q] for x in single], S, backend="cpu")
            ys.append(y)
        assert torch.equal(torch.cat(ys, 1), want[0][:, i:j]) and torch.equal(S, want[1][d : d + 1])
    double = [x.detach().double().requires_grad_() for x in (*single, state)]
    for g, w in zip(
        want, run(version, double[:-1], double[-1], "naive", torch.tensor(borders)), strict=False
    ):
        assert error(g, w) <= 2e-6


def single_and_state(version, B=2, T=40, sequences=2, N=64):
    xs = [x.detach().float().requires_grad_() for x in inputs(version, B, T, 2, N=N)]
    return xs, start_state(sequences, 2, N).detach().float().requires_grad_()


@pytest.mark.parametrize("version", [6, 7])
def test_cpp_is_a_good_op(version, built):
    single, state = single_and_state(version)
    flat = [x.detach().flatten(0, 1) if x.dim() == 4 else x.detach() for x in single]
    args = [*flat, state.detach(), torch.tensor([0, 40, 80], dtype=torch.int32)]
    op = getattr(torch.ops.gosling, f"wkv{version}_cpu").default
    torch.library.opcheck(op, (*args, False))
    torch.library.opcheck(op, (*[x.requires_grad_(x.is_floating_point()) for x in args], True))
    with pytest.raises(ValueError, match="must rise from 0 to 80"):
        op(*args[:-1], torch.tensor([0, 90, 80], dtype=torch.int32), False)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """As in a new process on a machine that has not trained yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "_answer", [])
    cpu._place.cache_clear()
    yield tmp_path
    cpu._place.cache_clear()


def test_training_builds_and_sampling_does_not(nothing_built, monkeypatch, capfd):
    if cpu._place()[0] is None:
        pytest.skip(cpu._place()[1])
    xs, _ = single_and_state(7)
    frozen = [x.detach() for x in xs]
    with torch.no_grad():
        wkv7(*xs)
    wkv7(*frozen)
    assert not list(nothing_built.iterdir()) and wkv_cuda._fastest(frozen, frozen[0]) == "chunked"
    wkv7(*[x.double() for x in xs])
    assert not list(nothing_built.iterdir())
    # Two first runs at the same time.
    code = "import wkv_cuda; assert not wkv_cuda.cpu.unavailable(build=True)"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for out in (run.communicate()[1] for run in runs):
        assert out == "" or re.fullmatch(
            r"compiling the recurrence, once\ncompiled in \d+ s; kept as .*so\n", out
        ), out
    (path,) = nothing_built.glob("*.so")
    assert {file.suffix for file in nothing_built.iterdir()} == {".so", ".sum", ".lock"}
    # What is there is taken, by sampling too.
    monkeypatch.setattr(wkv_cuda.native.subprocess, "run", None)
    monkeypatch.setattr(wkv_cuda.native.subprocess, "Popen", None)
    assert wkv_cuda._fastest(frozen, frozen[0]) == wkv_cuda._fastest(xs, frozen[0]) == "cpu"
    assert wkv_cuda._fastest([x[:, :1] for x in frozen], frozen[0]) == "naive"
    with pytest.raises(ValueError, match="float64"):
        wkv7(*[x.double() for x in xs], backend="cpu")
    assert path == cpu._place()[0] and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "cxx, line",
    [("no-such-c++", "no-such-c++ is not on PATH (apt install g++"), ("false", "false failed")],
)
def test_without_a_compiler(nothing_built, monkeypatch, capfd, cxx, line):
    monkeypatch.setenv("CXX", cxx)
    xs, _ = single_and_state(7)
    for _ in range(2):
        wkv7(*[x.detach() for x in xs])  # says nothing
    assert capfd.readouterr().err == ""
    for _ in range(2):
        got = wkv7(*xs)[0]
    assert torch.equal(got, wkv7(*xs, backend="chunked")[0])
    err = capfd.readouterr().err
    *first, last = err.splitlines()  # tried once, and only where there is something to try
    assert len(first) == (cxx == "false") and all(x.startswith("compiling") for x in first), err
    assert line in last and "slower PyTorch form" in last, err
    with pytest.raises(RuntimeError, match="backend 'cpu': .*" + cxx.replace("+", r"\+")):
        wkv7(*xs, backend="cpu")
    assert all(path.suffix == ".lock" for path in nothing_built.iterdir())


@pytest.mark.parametrize("logw", [-5.0, -30.0, -300.0])
def test_wkv7_takes_any_decay(logw):
    """RWKV-7 itself never goes below -0.6065; chunks shrink until the factors fit."""
    xs = inputs(7, 1, 40, 1)
    with torch.no_grad():
        xs[1][:, ::3] = logw
    state = start_state(1, 1)
    wants = run(7, xs, state, "naive")
    for got, want in zip(run(7, xs, state, "chunked"), wants, strict=False):
        assert error(got, want) <= 1e-9
    single = [x.detach().float().requires_grad_() for x in (*xs, state)]
    for i, (got, want) in enumerate(
        zip(run(7, single[:-1], single[-1], "chunked"), wants, strict=False)
    ):
        assert error(got, want) <= (2e-6 if i < 2 else 2e-5), i


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_equal_finite_differences(version):
    xs, state = inputs(version, 1, 5, 1, N=4), start_state(1, 1, N=4)
    fn = wkv7 if version == 7 else wkv6
    for backend in ("naive", "chunked"):
        form = functools.partial(fn, backend=backend)
        assert torch.autograd.gradcheck(form, (*xs, state), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("version", [6, 7])
def test_chunked_equals_naive_at_every_length(version):
    for T in range(1, 301):
        xs, state = inputs(version, 1, T, 1, seed=T), start_state(1, 1)
        chunked, naive = (run(version, xs, state, backend) for backend in ("chunked", "naive"))
        for got, want in zip(chunked, naive, strict=True):
            assert error(got, want) <= 1e-9, T


@pytest.mark.parametrize("L", [1, 2, 8, 32])
def test_block_inverse(L):
    A = torch.randn(5, L, L, dtype=torch.float64).tril(-1)
    eye = torch.eye(L, dtype=torch.float64)
    torch.testing.assert_close(
        unit_lower_inverse(A) @ (eye - A), eye.expand(5, L, L), atol=1e-8, rtol=1e-8
    )
    # one key repeated, where the Neumann product loses every digit in float32
    repeated = -torch.ones(1, L, L).tril(-1)
    exact = torch.linalg.inv(torch.eye(L, dtype=torch.float64) - repeated.double())
    assert (unit_lower_inverse(repeated) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_half_precision_inputs_keep_a_float32_state(version, backend, request):
    if backend == "cpu":
        request.getfixturevalue("built")
    xs, state = inputs(version, 2, 50, 2), start_state(2, 2)
    want = run(version, xs, state, "naive")
    half = [
        x.detach().to(torch.bfloat16 if i != 1 else torch.float32).requires_grad_()
        for i, x in enumerate(xs)
    ]
    s = state.detach().float().requires_grad_()
    got = run(version, half, s, backend)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    for g, w in zip(got, want, strict=False):
        assert error(g, w) < 0.02  # bfloat16 has 8 bits: 0.4 % for each input
    if backend == "cpu":  # the same numbers as in float32, rounded once
        whole = run(version, [x.detach().float().requires_grad_() for x in half], s, backend)
        assert (
            torch.equal(got[0], whole[0].bfloat16())
            and got[2].dtype == torch.bfloat16
            and got[3].dtype == torch.float32
        )


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_memory_does_not_grow_with_t_n_n(version, backend, request):
    """What autograd keeps of a pass: the inputs and one state per 32 tokens, not one per token."""
    if backend == "cpu":
        request.getfixturevalue("built")
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    T, H, N = 1024, 2, 64
    xs = [x.detach().float().requires_grad_() for x in inputs(version, 1, T, H)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (wkv7 if version == 7 else wkv6)(*xs, backend=backend)
    assert sum(saved.values()) < 20 * T * H * N * 4 < 0.5 * T * H * N * N * 4


def test_errors_name_the_shape():
    xs = inputs(7, 2, 8, 2)
    with pytest.raises(
        ValueError, match=r"state is \S+ \(1, 2, 64, 64\) .*expected .*\(2, 2, 64, 64\)"
    ):
        wkv7(*xs, torch.zeros(1, 2, 64, 64))
    with pytest.raises(ValueError, match="not one of naive, chunked"):
        wkv7(*xs, backend="fast")
    with pytest.raises(ValueError, match="cu_seqlens wants B = 1"):
        wkv7(*xs, cu_seqlens=[0, 8])
    with pytest.raises(ValueError, match="like r"):
        wkv7(*xs[:5], xs[5][:, 1:])
    with pytest.raises(ValueError, match=r"expected floats \[H, N\]"):
        wkv6(*inputs(6, 1, 4, 2)[:4], torch.zeros(3, 64))
    if wkv_cuda.cuda_seq.unavailable():
        with pytest.raises(RuntimeError, match="cuda_seq"):
            wkv7(*xs, backend="cuda_seq")


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("backend", ["naive", "chunked", "cpu"])
def test_bad_input_names_the_argument(version, backend, request):
    """With the C++ form too ("cpp"), and odd input that is none: strides, no token, NaN."""
    if backend == "cpu":
        request.getfixturevalue("built")
    op, (xs, state) = wkv7 if version == 7 else wkv6, single_and_state(version)
    names = ("r", "logw", "k", "v", "a", "b") if version == 7 else ("r", "logw", "k", "v", "u")
    for i, name in enumerate(names):
        for wrong in (
            xs[i][:1] if i else xs[i][0],
            xs[i].detach().to("meta"),
            xs[i].detach().int(),
        ):
            if wrong.dtype == torch.int32 and name == "u" or wrong.is_meta and i == 0:
                continue
            with pytest.raises(ValueError, match=rf"\b{name} is "):
                op(*xs[:i], wrong, *xs[i + 1 :], state, backend=backend)
    with pytest.raises(ValueError, match="state is"):
        op(*xs, state[:, :1], backend=backend)
    one = [x if x.dim() == 2 else x[:1] for x in xs]
    for cu in ([0, 39], [1, 40], [0, 30, 20, 40], [0], [], [0, 50, 40]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            op(*one, cu_seqlens=torch.tensor(cu, dtype=torch.long), backend=backend)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in xs]
    for a, b in zip(
        run(version, strided, state.detach().mT.contiguous().mT.requires_grad_(), backend),
        run(version, xs, state, backend),
        strict=False,
    ):
        assert torch.equal(a, b) if backend == "cpu" else error(a, b.double()) < 1e-5
    none = [x.detach()[:, :0].requires_grad_() if x.dim() == 4 else x for x in xs]
    y, end = op(*none, state, backend=backend)
    assert y.shape == (2, 0, 2, 64) and torch.equal(end, state)
    if backend != "naive":  # there nothing leads from y to the inputs
        assert all(g.isfinite().all() for g in run(version, none, state, backend))
    with torch.no_grad():
        xs[3][0, 5] = xs[1][0, 3, 0, 0] = float("nan")
    out = run(version, xs, state, backend)
    assert out[0][0, 5:].isnan().any()
    if backend == "cpu":  # the others may hand it on to the whole chunk
        assert out[0][0, :3].isfinite().all() and out[0][1].isfinite().all()


def test_half_a_library_is_built_anew(nothing_built):
    if cpu._place()[0] is None:
        pytest.skip(cpu._place()[1])
    cpu._place()[0].parent.mkdir(exist_ok=True)
    cpu._place()[0].write_bytes(b"\x7fELF")
    assert cpu.unavailable(build=False) and cpu.unavailable() is None
