"""Backend "cuda", wkv_cuda/wkv*_chunk.cu, against the naive loop in float64 on the same bf16
inputs.

Without a GPU the kernels' own source runs on the CPU (cuda_on_cpu.h): the same indexing, fragments
and rounding to fp16. Where there is a GPU every comparison runs there as well.
"""

import functools
import json
import random
import shutil
import subprocess
import sys

import wkv_cuda
from wkv_cuda import cuda, cuda_seq

import pytest
import torch
from helpers import ROOT
from torch.utils.checkpoint import checkpoint

N = 64
NAMES = {
    6: ["y", "state", "dr", "dlogw", "dk", "dv", "du", "dstate"],
    7: ["y", "state", "dr", "dlogw", "dk", "dv", "da", "db", "dstate"],
}
OPS = {
    6: functools.partial(wkv_cuda.wkv6, backend="cuda"),
    7: functools.partial(wkv_cuda.wkv7, backend="cuda"),
}
KINDS = ["plain", "repeated", "fastest", "slowest"]
both = pytest.mark.parametrize("version", [6, 7])


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        assert cuda.unavailable() is None
    else:
        request.getfixturevalue("emulated")
    return request.param


def make(
    version,
    T,
    kind="plain",
    B=1,
    H=2,
    seed=0,
    logw_dtype=torch.float32,
    values=1.0,
    grads=1.0,
    sequences=None,
):
    """Inputs with the state last, dy, dstate. As the networks feed them, and as badly as they
    could."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    r, k, v = randn(B, T, H, N), randn(B, T, H, N) * 0.3, randn(B, T, H, N) * values
    if version == 6:
        logw = -torch.exp(randn(B, T, H, N) - 1)
        if kind != "plain":  # from exp(-e^5) to almost none, side by side
            logw = -torch.exp((randn(B, T, H, N) * 4).clamp(-8, 5))
        if kind == "fastest":
            logw = torch.full_like(logw, -torch.tensor(5.0).exp().item())
        rest = [randn(H, N)]
    else:
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
        rest = [-kappa.bfloat16(), (kappa * iclr).bfloat16()]
        if kind == "fastest":
            logw = torch.full_like(logw, -0.6065306597)
    if kind == "slowest":
        logw = torch.full_like(logw, -1e-4)
    S = sequences or B
    state, dstate = randn(S, H, N, N) * 0.3 * values, randn(S, H, N, N) * 0.3 * grads
    half = [x.bfloat16() for x in (r, k, v)]
    return (
        [half[0], logw.to(logw_dtype), *half[1:], *rest, state],
        (randn(B, T, H, N) * grads).bfloat16(),
        dstate,
    )


def run(version, inputs, dy, dstate, device="cpu", fn=None, **kw):
    x = [i.to(device, copy=True).requires_grad_() for i in inputs]
    y, state = (fn or OPS[version])(*x, **kw)
    grads = torch.autograd.grad([y, state], x, [dy.to(device), dstate.to(device)])
    return dict(zip(NAMES[version], [t.detach().cpu() for t in (y, state, *grads)], strict=False))


def exact(version, inputs, dy, dstate, cu_seqlens=None):
    def naive(*x, cu_seqlens):
        return wkv_cuda.naive(version, x[:-1], x[-1], cu_seqlens)

    return run(
        version,
        [x.double() for x in inputs],
        dy.double(),
        dstate.double(),
        fn=naive,
        cu_seqlens=cu_seqlens,
    )


def error(got, want):
    assert torch.isfinite(got).all()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-38)).item()


def check(version, case, kind, device, **kw):
    """The bars of relative RMS: bf16's own rounding is 1.7e-3, over few numbers a little more."""
    got = run(version, *case, device, **{n: x.to(device) for n, x in kw.items()})
    few = case[1].numel() < 2000
    for name, want in exact(version, *case, **kw).items():
        bar = 2e-3 if name in ("y", "state", "dstate") else 3e-3
        if kind == "slowest" and version == 7:
            # The gradients are small differences, of size 0.01 of what is subtracted.
            bar *= 1.2
        assert error(got[name], want) <= bar * (1.3 if few else 1), name
        dtype = torch.float32 if "state" in name or name == "du" else torch.bfloat16
        assert got[name].dtype == (case[0][1].dtype if name == "dlogw" else dtype)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 32, 33, 70])
def test_equals_naive(version, kind, T, device):
    check(version, make(version, T, kind), kind, device)


@both
def test_rows_and_a_bf16_decay(version, device):
    check(version, make(version, 40, B=2, logw_dtype=torch.bfloat16), "plain", device)


@pytest.mark.slow
@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_length(version, kind, device):
    """T from 1 to 200, as one sequence or as documents of random lengths."""
    cut = random.Random(0)
    for T in range(1, 201):
        if T % 2:
            borders = sorted([0, T] + [cut.randint(0, T) for _ in range(T % 5)])
            check(
                version,
                make(version, T, kind, H=1, seed=T, sequences=len(borders) - 1),
                kind,
                device,
                cu_seqlens=torch.tensor(borders),
            )
        else:
            check(version, make(version, T, kind, H=1, seed=T), kind, device)


@both
@pytest.mark.parametrize("values, grads", [(1e-6, 1e-8), (3e4, 1e6), (1, 1e-20)])
def test_size_of_values_and_gradients_does_not_matter(version, values, grads, device):
    check(version, make(version, 40, values=values, grads=grads), "plain", device)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r, k", [(1000, 1000), (1000, 1), (1, 1000)])
def test_size_of_r_and_k_does_not_matter(version, kind, r, k, device):
    """A thousand times the usual leaves fp16's range unless it is scaled."""
    inputs, *grads = make(version, 70, kind, H=1)
    inputs[0], inputs[2] = inputs[0] * r, inputs[2] * k
    check(version, (inputs, *grads), kind, device)


@both
def test_one_large_token(version, device):
    """It shares a scale with its neighbours; and zeros give a gradient."""
    inputs, *grads = make(version, 50, H=1)
    for x in (inputs[0], inputs[2]):
        x[:, :16] = 0
        x[:, 20] *= 1000
    check(version, (inputs, *grads), "plain", device)


@both
def test_size_may_change_on_the_way(version, device):
    """Each chunk has its own scale; the loss of some tokens is masked."""
    inputs, dy, dstate = make(version, 80)
    inputs[3][:, 32:] *= 1e4
    dy[:, :40], dstate = 0, dstate * 0
    check(version, (inputs, dy, dstate), "plain", device)


@both
@pytest.mark.parametrize("logw", [-5.0, -30.0, -float("inf")])
def test_any_decay(version, logw, device):
    inputs, *grads = make(version, 40, H=1)
    inputs[1][:, ::3] = logw  # RWKV-7 itself stays above -0.6065; the chunks end early
    check(version, (inputs, *grads), "plain", device)


def test_every_token_forgets(device):
    """A log w below -14 is taken as -14 by wkv7, so its own gradient, 1e-13 and less, is not that
    small."""
    inputs, *grads = make(7, 20, H=1)
    inputs[1][:] = -30
    got, want = run(7, inputs, *grads, device), exact(7, inputs, *grads)
    for name in want:
        assert name == "dlogw" or error(got[name], want[name]) < 3e-3, name
    assert got["dlogw"].abs().max() < 1e-4


@both
def test_documents_equal_each_alone(version, device):
    borders = [0, 5, 5, 38, 39, 103, 103]
    inputs, dy, dstate = make(version, 103, sequences=6)
    packed = run(
        version, inputs, dy, dstate, device, cu_seqlens=torch.tensor(borders, device=device)
    )
    du = 0
    for d, (p, q) in enumerate(zip(borders, borders[1:], strict=False)):
        alone = run(
            version,
            [*(x[:, p:q] if x.dim() == 4 else x for x in inputs[:-1]), inputs[-1][d : d + 1]],
            dy[:, p:q],
            dstate[d : d + 1],
            device,
        )
        du += alone.pop("du", 0)
        for name, x in alone.items():  # to the last bit
            assert torch.equal(
                packed[name][d : d + 1] if "state" in name else packed[name][:, p:q], x
            ), (name, d)
        if p == q:
            assert torch.equal(alone["state"], inputs[-1][d : d + 1]) and torch.equal(
                alone["dstate"], dstate[d : d + 1]
            )
    if version == 6:
        torch.testing.assert_close(packed["du"], du, rtol=1e-5, atol=1e-4)


def test_what_is_cut_into_spans():
    """Few sequences into as many spans as a card holds blocks; else what is much longer than the
    rest, wherever it stands."""
    rows = [(1, 32, 65536), (8, 12, 32768), (1, 12, 4096)]
    assert [cuda.span(*row) for row in rows] == [5472, 1024, 512]
    assert all(-(-T // S // cuda.span(S, H, T)) * S * H <= 396 for S, H, T in rows)
    for S, H, T in [(8, 32, 4096), (8, 64, 4096), (64, 12, 512), (8, 96, 4096)]:
        assert cuda.span(S, H, S * T) > 2 * T  # rows of one length stay whole
    for S, H in [(32, 12), (60, 32), (16, 96)]:
        assert 0 < cuda.span(S, H, 65536) < 60000  # one document that is nearly all, cut
    assert cuda.span(4, 12, 2048) == cuda.span(1, 12, 400) == 0  # not worth it


@both
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_spans(version, kind, few, device, monkeypatch):
    """Sequences cut into spans that run at once: rows, and documents that end at a border or
    not."""
    monkeypatch.setattr(cuda, "span", lambda *sizes: 32)
    monkeypatch.setattr(cuda, "are_few", lambda *sizes: few)  # WKV-7: whether more is kept
    check(version, make(version, 100, kind, B=2, H=1), kind, device)
    for borders in ([0, 5, 5, 69, 133, 140], [0, 32, 96, 97, 97, 200]):
        case = make(version, borders[-1], kind, H=1, sequences=5)
        check(version, case, kind, device, cu_seqlens=torch.tensor(borders))


@both
def test_spans_where_chunks_end_early(version, device, monkeypatch):
    """A token's part of the gradient at a border has a scale of its own then."""
    monkeypatch.setattr(cuda, "span", lambda *sizes: 64)
    monkeypatch.setattr(cuda, "are_few", lambda *sizes: True)
    inputs, dy, dstate = make(version, 200, H=1)
    inputs[1][:, 64:80:5] = -9.0
    dy[:, :69] = 0  # the initial state's gradient is then the one at the border, carried on
    check(version, (inputs, dy, dstate * 0), "plain", device)


@both
def test_spans_of_any_documents(version, device, monkeypatch, request):
    monkeypatch.setattr(cuda, "span", lambda *sizes: 64)
    cut = random.Random(version)
    for seed in range(3):
        borders = torch.tensor(sorted([0, 330] + [cut.randint(0, 330) for _ in range(4)]))
        case = make(version, 330, H=2, seed=seed, sequences=5)
        check(version, case, "plain", device, cu_seqlens=borders)
    case = make(version, 330, H=2, sequences=5)  # and the same bits twice, as everywhere
    first, again = (run(version, *case, device, cu_seqlens=borders) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    if device == "cpu":  # and in any order of warps
        library = request.getfixturevalue("library_on_cpu")
        library.cuda_on_cpu_reverse(1)
        again = run(version, *case, device, cu_seqlens=borders)
        library.cuda_on_cpu_reverse(0)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@both
def test_two_runs_and_any_order_of_warps_give_the_same_bits(version, device, request):
    borders = torch.tensor([0, 33, 40, 70], device=device)
    case = make(version, 70, "plain", sequences=3)
    case[0][1][:, 50::3] = -9.0  # chunks that end early too
    first, again = (run(version, *case, device, cu_seqlens=borders) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    if device == "cpu":
        library = request.getfixturevalue("library_on_cpu")
        library.cuda_on_cpu_reverse(1)
        again = run(version, *case, device, cu_seqlens=borders)
        library.cuda_on_cpu_reverse(0)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@both
def test_what_is_not_a_number_stays_so(version, device):
    for at in range(4):
        inputs, dy, dstate = make(version, 20, H=1)
        inputs[at][0, 10, 0, 7] = float("nan")
        got = run(version, inputs, dy, dstate, device)
        assert torch.isnan(got["state"]).any() if at else torch.isnan(got["y"][0, 10]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@both
def test_long(version):
    inputs, dy, dstate = make(version, 8192, B=2, H=4)
    got, again = (run(version, inputs, dy, dstate, "cuda") for _ in range(2))
    want = run(
        version,
        inputs,
        dy,
        dstate,
        "cuda",
        fn=functools.partial(wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6, backend="cuda_seq"),
    )
    for name, x in got.items():
        assert torch.equal(x, again[name]) and error(x, want[name].double()) < 3e-3, name


# ----------------------------------------------------------------------------------------------
# a good citizen of PyTorch


@both
def test_op(version, device):
    inputs, dy, dstate = make(version, 40, B=2)
    flat = [x.flatten(0, 1) if x.dim() == 4 else x for x in inputs[:-1]] + [inputs[-1]]
    flat = [x.to(device) for x in (*flat, torch.tensor([0, 40, 80], dtype=torch.int32))]
    name = f"wkv{version}_chunk"
    forward, backward = (
        getattr(torch.ops.gosling, name),
        getattr(torch.ops.gosling, name + "_backward"),
    )
    assert all(x.numel() == 0 for x in forward(*flat, False)[2:])  # nothing is kept
    torch.library.opcheck(forward.default, (*flat, False))
    torch.library.opcheck(
        backward.default, (*flat, *forward(*flat, True)[2:], dy.flatten(0, 1).to(device), None)
    )
    torch.library.opcheck(
        forward.default, (*[x.requires_grad_(x.is_floating_point()) for x in flat], True)
    )


@both
def test_compile_checkpoint_and_layout(version, device):
    case = make(version, 20, B=2)
    eager = run(version, *case, device)
    compiled = torch.compile(
        OPS[version], fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in case[0]]
    for again in (
        run(version, *case, device, fn=compiled),
        run(version, strided, *case[1:], device),
        run(
            version, *case, device, fn=lambda *x: checkpoint(OPS[version], *x, use_reentrant=False)
        ),
    ):
        assert all(torch.equal(x, again[name]) for name, x in eager.items())


@both
@pytest.mark.parametrize("H, gigabytes", [(64, 0.55), (12, 0.27)])
def test_what_is_saved(version, H, gigabytes):
    """Of one layer at C 4096 or 768, B 8, T 4096, beside the inputs."""
    total = 8 * 4096
    x = [torch.empty(total, H, N, dtype=torch.bfloat16, device="meta") for _ in range(6)]
    x[1] = x[1].float()
    if version == 6:
        x[4:] = [torch.empty(H, N, device="meta")]
    op = getattr(torch.ops.gosling, f"wkv{version}_chunk")
    cu = torch.empty(9, dtype=torch.int32, device="meta")
    saved = op(*x, torch.empty(8, H, N, N, device="meta"), cu, True)[2:]
    assert sum(t.numel() * t.element_size() for t in saved) <= gigabytes * 1e9


def test_a_card_that_computes_wrong_is_not_used(emulated, monkeypatch):
    assert cuda.trial.__wrapped__("cpu") is None
    right = cuda.wkv
    monkeypatch.setattr(
        cuda,
        "wkv",
        lambda version, x, state, cu_seqlens: right(
            version, [x[0], x[1], x[3], x[2], *x[4:]] if version == 6 else x, state, cu_seqlens
        ),
    )
    assert "wkv6 is off by" in cuda.trial.__wrapped__("cpu")


def test_wrong_arguments(emulated):
    inputs, *_ = make(7, 3)
    r, logw, k, v, a, b, state = inputs
    for message, args in {
        "backend 'cuda': head size 32, not 64": [x[..., :32] for x in inputs[:-1]],
        "torch.float32, not torch.bfloat16": [r, logw, k.float(), v, a, b],
        r"state is \S+ \(1, 1, 64, 64\)": [r, logw, k, v, a, b, state[:, :1]],
    }.items():
        with pytest.raises(ValueError, match=message):
            OPS[7](*args)
    with pytest.raises(ValueError, match="u is .*expected floats"):
        OPS[6](r, logw, k, v, state)
    half = state.bfloat16()  # a state is used in fp32 whatever it comes in
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            OPS[7](*inputs[:-1], half), OPS[7](*inputs[:-1], half.float()), strict=False
        )
    )


def test_what_takes_over(monkeypatch):
    """The choice of backend None, with tensors that say they are on a GPU."""

    class OnCuda:
        is_cuda = True

        def __init__(self, x):
            self.shape, self.dtype, self.dim, self.device = (
                x.shape,
                x.dtype,
                x.dim,
                torch.device("cuda"),
            )

    inputs = make(7, 3)[0][:-1]

    def fastest(xs):
        return wkv_cuda._fastest([OnCuda(x) for x in xs], None)

    monkeypatch.setattr(cuda_seq, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(cuda, "trial", lambda device: None)
    assert fastest(inputs) == "cuda" and fastest([x[:, :1] for x in inputs]) == "cuda_seq"
    with pytest.warns(
        UserWarning, match="float32, not torch.bfloat16.*sequential kernel takes over"
    ):
        assert fastest([x.float() for x in inputs]) == "cuda_seq"
    with pytest.warns(UserWarning, match="head size 32.*PyTorch form takes over"):
        assert fastest([x[..., :32] for x in inputs]) == "chunked"
    monkeypatch.setattr(cuda, "trial", lambda device: "wkv7 is off by 1")
    with pytest.warns(UserWarning, match="off by 1.*sequential kernel takes over"):
        assert fastest(inputs) == "cuda_seq"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.warns(
        UserWarning, match="Card has compute capability 7.5.*sequential kernel takes over"
    ):
        assert fastest(inputs) == "cuda_seq"
    monkeypatch.setattr(cuda_seq, "unavailable", lambda: "no nvcc")
    with pytest.warns(UserWarning, match="no nvcc.*PyTorch form takes over"):
        assert fastest(inputs) == "chunked"


# ----------------------------------------------------------------------------------------------
# nvcc


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@both
def test_nvcc_compiles(version):
    """For sm_80 and sm_90: as many blocks of 128 threads as it is compiled for fit a
    multiprocessor's registers, and four its 228 KB of shared memory, 1 KB of them the system's."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/kernels.py"), "--compile", f"--version={version}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == {6: 32, 7: 34}[version], done.stdout
    for row in rows:
        at_once = row["at_once"] or 4
        most_spilled = {2: 0, 3: 100, 4: 600}[at_once]
        assert -(-row["registers"] // 8) * 8 * 128 * at_once <= 65536, row
        assert row["spill_store_bytes"] <= most_spilled, row
        assert 4 * (row["shared_bytes"] + 1024) <= 228 * 1024, row
