"""wkv_cuda/between.py and shift.py, what lies between the products in Triton, against the PyTorch
forms in float64, whose gradients finite differences confirm (test_fused.py).

On a GPU the kernels run there. Without one they run in Triton's interpreter, where Triton is
installed: in a process of its own, since it must be told before anything imports Triton.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import model
from wkv_cuda import cpu, fused, native

import pytest
import torch
from helpers import IN_INTERPRETER, ROOT, random_model, run_in_tritons_interpreter
from parts import PARTS, check_edges, mix, results_and_gradients, tensors

sys.path.append(str(ROOT / "bench"))  # for what they import of each other
from bench import compile as counting

ROUNDING = 2.0**-7 if IN_INTERPRETER else 2.0**-8  # of bfloat16: the interpreter cuts off
parts = pytest.mark.parametrize("part, n_vectors, n_parameters", PARTS)


def test_in_tritons_interpreter():
    run_in_tritons_interpreter(__file__, at_least=40)


@pytest.fixture
def between(device, monkeypatch):
    """wkv_cuda/between.py, and fused.py sends there what is not float64."""
    from wkv_cuda import between

    monkeypatch.setattr(cpu, "fits", lambda x: False)
    monkeypatch.setattr(fused, "takes_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(fused, "_between", {device: between})
    return between


def leaves(inputs, device, dtype, parameters=None):
    """Copies, the parameters [1, 1, C] in a dtype of their own if it is given."""
    found = []
    for x in inputs:
        is_parameter = parameters and x.shape[:2] == (1, 1)
        x = x.detach().to(device, parameters if is_parameter else dtype)
        found.append(x.requires_grad_())
    return found


# ----------------------------------------------------------------------------------------------
# the parts


@parts
def test_triton_gives_the_numbers_of_the_plain_form(between, device, part, n_vectors, n_parameters):
    """Widths that are no power of two, and rows that fill no tile."""
    for rows, width in (((1, 37), 96), ((2, 1), 160), ((1, 16), 128)):
        inputs = tensors(n_vectors, n_parameters, torch.float64, rows, width)
        got = results_and_gradients(part, leaves(inputs, device, torch.float32))
        want = results_and_gradients(part, leaves(inputs, device, torch.float64))
        assert len(got) == len(want) > 1
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32 and b.dtype == torch.float64
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
            assert error < 5e-6, (part.__name__, error)


@parts
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_results_alone(
    between, device, part, n_vectors, n_parameters, parameters, monkeypatch
):
    """Each result and gradient comes in its dtype, within its own rounding of float64."""
    inputs = tensors(n_vectors, n_parameters, torch.float64, (1, 40), 160)
    inputs = [x.detach().bfloat16() for x in inputs]
    ours = leaves(inputs, device, torch.bfloat16, parameters)
    got = results_and_gradients(part, ours)
    want = results_and_gradients(part, leaves(inputs, device, torch.float64))
    monkeypatch.setattr(fused, "one_pass", lambda x, head_size=64: None)
    plain = results_and_gradients(part, leaves(inputs, device, torch.bfloat16, parameters))
    for a, b, c in zip(got, want, plain, strict=True):
        assert a.dtype == c.dtype and a.shape == b.shape
        rounding = ROUNDING if a.dtype == torch.bfloat16 else 0
        assert (a.double() - b).abs().sub(rounding * b.abs()).max() < 5e-6 * b.abs().max()


def test_at_the_edges(between, device):
    check_edges(leaves(tensors(6, 5, torch.float64), device, torch.float32))


@parts
def test_two_runs_give_the_same_bits(between, device, part, n_vectors, n_parameters):
    rows = (2, 20) if IN_INTERPRETER else (2, 3000)
    inputs = tensors(n_vectors, n_parameters, torch.float64, rows)
    runs = [results_and_gradients(part, leaves(inputs, device, torch.bfloat16)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_vectors_that_do_not_lie_in_one_piece(between, device):
    inputs = leaves(tensors(2, 2, torch.float64), device, torch.float32)
    want = results_and_gradients(mix, inputs)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs[:2]]
    got = results_and_gradients(mix, [*turned, *inputs[2:]])
    assert not turned[0].is_contiguous()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_no_wrong_tensor_is_taken(between, device):
    x, before, m = leaves(tensors(2, 1, torch.float64), device, torch.float32)
    for wrong in ((x, before[:1], m), (x, before, m[..., :1]), (x, before.double(), m)):
        with pytest.raises(ValueError, match="mix: a tensor is"):
            fused.mix(*wrong)
    with pytest.raises(ValueError, match="token_shift: a tensor is"):
        fused.token_shift(x, x[:1, 0], None)
    assert fused.one_pass(x, 64) is between
    assert fused.one_pass(x, 48) is None  # the heads of a tile are powers of two


# ----------------------------------------------------------------------------------------------
# token_shift, and a whole network


def packing(borders, T, device):
    return model.packing_of(borders, torch.zeros(1, T, device=device))


MANY = [0, 0, *range(1, 150, 2), 149, 149, 170]


@pytest.mark.parametrize(
    "B, T, borders",
    [(3, 7, None), (2, 1, None), (1, 40, None), (1, 9, [0, 0, 4, 5, 5, 9, 9]), (1, 170, MANY)],
)
@pytest.mark.parametrize("used", ["x_prev", "last", "both"])
def test_token_shift_copies_the_same_rows(between, device, monkeypatch, B, T, borders, used):
    """Documents without a token, more documents than are looked at together, a result unused."""
    D, C = B if borders is None else len(borders) - 1, 136
    x, shift = torch.randn(B, T, C, device=device), torch.randn(D, C, device=device)
    factors = torch.randn(B, T, C, device=device), torch.randn(D, C, device=device)
    chosen = {"x_prev": [0], "last": [1], "both": [0, 1]}[used]

    def run():
        inputs = [t.clone().requires_grad_() for t in (x, shift)]
        results = model.token_shift(*inputs, packing(borders, T, device))
        loss = sum((results[i] * factors[i]).sum() for i in chosen)
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        grads = [0 * t if g is None else g for g, t in zip(grads, inputs, strict=True)]
        return [*results, *grads]

    got = run()
    monkeypatch.setattr(fused, "one_pass", lambda x, head_size=64: None)
    for a, b in zip(got, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("borders", [None, [0, 5, 5, 17]])
def test_gradients_of_a_network_are_those_of_float64(between, device, version, borders):
    """Recomputed in backward, too: what checkpointing hands back is not what was saved."""
    network = random_model(version, n_layer=2).to(device)
    exact = random_model(version, n_layer=2).to(device).double()
    ids = torch.randint(320, (1, 18), generator=torch.Generator().manual_seed(0)).to(device)
    want = None
    for one, grad_cp in ((exact, False), (network, False), (network, True)):
        one.grad_cp = grad_cp
        one.zero_grad()
        scores, state = one(ids[:, :-1], targets=ids[:, 1:], cu_seqlens=borders)
        loss = -scores.logps.mean() + sum(x.double().square().mean() for x in state.values())
        loss.backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        want = want or grads
        assert grads.keys() == want.keys() and len(grads) > 40
        for name, g in grads.items():
            assert (g - want[name]).norm() < 5e-5 * want[name].norm(), name


# ----------------------------------------------------------------------------------------------
# which form runs


def test_the_trial_sees_a_kernel_that_is_wrong_or_fails(between, device, monkeypatch):
    assert between.trial(device) is None
    for name, ours in between.KERNELS.items():
        for i in (0, 1):
            wrong = list(ours)
            wrong[i] = between.KERNELS["readout" if name == "mix" else "mix"][i]
            monkeypatch.setitem(between.KERNELS, name, wrong)
            assert between.trial(device)
            monkeypatch.setitem(between.KERNELS, name, ours)
    monkeypatch.setattr(between, "launch", lambda *args, **options: None)
    assert "off by" in between.trial(device)
    monkeypatch.setattr(between, "launch", lambda *args, **options: 1 / 0)
    assert between.trial(device) == "ZeroDivisionError: division by zero"


def test_without_triton_the_pytorch_form_takes_over(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wkv_cuda.between", None)  # its import fails
    monkeypatch.delattr("wkv_cuda.between", raising=False)
    monkeypatch.setattr(fused, "_between", {})
    monkeypatch.setattr(cpu, "fits", lambda x: False)
    monkeypatch.setattr(fused, "takes_triton", lambda x: True)
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        assert torch.equal(fused.relu_squared(x), torch.relu(x) ** 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "PyTorch" in said


def test_triton_is_left_out_while_something_is_recorded(monkeypatch):
    """torch.compile fuses by itself, and does not see into a launch."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = torch.zeros(2, 3, 4)
    assert fused.takes_triton(x) and not fused.takes_triton(x.double())
    monkeypatch.setattr(native, "is_traced", lambda: True)
    assert not fused.takes_triton(x)


# ----------------------------------------------------------------------------------------------
# compiled for a card that is not here


def signature(x, path, constants):
    """What Triton wants to know of an argument; what is no tensor or number goes to constants."""
    if isinstance(x, tuple):
        return tuple(signature(y, (*path, i), constants) for i, y in enumerate(x))
    if isinstance(x, torch.Tensor):
        return {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}[x.dtype]
    if x is None:
        constants[path] = None
    return "constexpr" if x is None else "i32"


def compiled(sm, kernel, args, num_warps, **constants):
    """What cuobjdump says of a kernel for sm_80 and so on: registers, stack and shared memory."""
    import triton

    values = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
    types = {
        n: signature(x, (i,), values)
        for i, (n, x) in enumerate(zip(kernel.arg_names, args, strict=False))
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature=types, constexprs=values)
    target = triton.backends.compiler.GPUTarget("cuda", sm, 32)
    made = triton.compile(source, target=target, options=dict(num_warps=num_warps))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
def test_kernels_compile_without_spills(monkeypatch, sm):
    """Each with the arguments that a network of bfloat16 activations gives it."""
    pytest.importorskip("triton")
    if IN_INTERPRETER:
        pytest.skip("outside of the interpreter")
    from wkv_cuda import between

    seen = {}

    def launch(x, kernel, grid, *args, **options):
        seen[kernel.__name__, str(args)] = compiled(sm, kernel, args, **options)

    monkeypatch.setattr(between, "launch", launch)
    monkeypatch.setattr(fused, "one_pass", lambda x, head_size=64: between)
    for part, n_vectors, n_parameters in PARTS:
        inputs = [x.detach() for x in tensors(n_vectors, n_parameters, torch.float64)]
        inputs = leaves(inputs, "meta", torch.bfloat16, torch.float32)
        results = part(*inputs)
        torch.autograd.backward(results, [torch.empty_like(y) for y in results])
    x = inputs[0]
    for borders in (None, torch.empty(4, dtype=torch.int32, device="meta")):
        D = len(x) if borders is None else len(borders) - 1
        of_documents = None if borders is None else SimpleNamespace(device=borders)
        results = fused.token_shift(x, x.new_empty(D, x.shape[-1]), of_documents)
        torch.autograd.backward(results, [torch.empty_like(y) for y in results])
    assert len(seen) >= 16
    for name, usage in seen.items():
        assert "STACK:0 " in usage, (name, usage)


# ----------------------------------------------------------------------------------------------
# what a layer calls


@pytest.mark.parametrize("version, most", [("x070", 100), ("x060", 120)])
@pytest.mark.parametrize("borders", [None, [0, 20, 20, 64]])
def test_operators_of_a_layer(version, most, borders):
    """Forward and backward, a kernel counting as one: x070 was 322 of them in November 2026."""
    cfg = counting.Config(version=version, n_embd=128)
    ids = torch.randint(cfg.vocab, (1, 65))
    options = {} if borders is None else {"cu_seqlens": borders}
    plain = sum(counting.of_a_layer(cfg, ids, **options).values())
    ours = sum(counting.of_a_layer(cfg, ids, in_triton=True, **options).values())
    assert 40 < ours <= most < plain, (ours, plain)
