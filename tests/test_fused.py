"""What lies between the recurrence and the products (wkv_cuda/fused.py): in C++ the numbers of the
plain form in float64, whose gradients finite differences confirm; products in pieces."""

from types import SimpleNamespace

from wkv_cuda import cpu, fused

import pytest
import torch

ROWS, C = (2, 37), 96


@pytest.fixture(autouse=True)
def built():
    if missing := cpu.unavailable():
        pytest.skip(missing)


def mix(x, x_prev, m1, m2):
    return fused.mix(x, x_prev, m1, m2)


def mix_with_offsets(x, x_prev, h1, h2, m1, m2):
    return fused.mix(x, x_prev, m1, m2, offsets=[h1, h2])


def gates7(k, v, v_first, w, a, v_gate, w0, a0, v0, k_k, k_a):
    return fused.gates7(k, v, v_first, w, a, v_gate, w0, a0, v0, k_k, k_a, 32)


def gates7_of_the_first_layer(k, v, w, a, w0, a0, v0, k_k, k_a):
    return fused.gates7(k, v, None, w, a, None, w0, a0, v0, k_k, k_a, 32)


def by_head(x):
    return x.unflatten(-1, (-1, 32))


def readout7(y, g, r, k, v, weight, bias, r_k):
    norm, r_k = SimpleNamespace(weight=weight.flatten(), bias=bias.flatten()), by_head(r_k)[0, 0]
    return [fused.readout(by_head(y), g, norm, by_head(r), by_head(k), by_head(v), r_k)]


def readout6(y, g, weight, bias):
    norm = SimpleNamespace(weight=weight.flatten(), bias=bias.flatten())
    return [fused.readout(by_head(y), g, norm)]


def relu_squared(x):
    return [fused.relu_squared(x)]


PARTS = [  # a part, how many vectors [B, T, C] it takes, and how many parameters [1, 1, C]
    (mix, 2, 2),
    (mix_with_offsets, 4, 2),
    (gates7, 6, 5),
    (gates7_of_the_first_layer, 4, 5),
    (readout7, 5, 3),
    (readout6, 2, 2),
    (relu_squared, 1, 0),
]


def tensors(n_vectors, n_parameters, dtype, rows=ROWS, width=C):
    g = torch.Generator().manual_seed(0)
    shapes = [(*rows, width)] * n_vectors + [(1, 1, width)] * n_parameters
    drawn = [torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes]
    return [x.float().to(dtype).requires_grad_() for x in drawn]


def results_and_gradients(part, inputs):
    results = part(*inputs)
    g = torch.Generator().manual_seed(1)
    loss = 0.0
    for y in results:
        loss = loss + (y * torch.randn(y.shape, generator=g).to(y.dtype)).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [x.detach() for x in (*results, *(g for g in grads if g is not None))]


@pytest.mark.parametrize("part, n_vectors, n_parameters", PARTS)
def test_cpp_gives_the_numbers_of_the_plain_form(part, n_vectors, n_parameters):
    for rows in (ROWS, (1, 1), (1, 200)):
        one = results_and_gradients(part, tensors(n_vectors, n_parameters, torch.float32, rows))
        other = results_and_gradients(part, tensors(n_vectors, n_parameters, torch.float64, rows))
        assert len(one) == len(other) > 1
        for a, b in zip(one, other, strict=True):
            assert b.dtype == torch.float64
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
            assert error < 5e-6, (part.__name__, error)


@pytest.mark.parametrize("part, n_vectors, n_parameters", PARTS)
def test_finite_differences_confirm_the_plain_form(part, n_vectors, n_parameters):
    inputs = tensors(n_vectors, n_parameters, torch.float64, (1, 2), 64)
    assert torch.autograd.gradcheck(lambda *x: tuple(part(*x)), inputs, fast_mode=True)


@pytest.mark.parametrize("part, n_vectors, n_parameters", PARTS)
def test_the_number_of_threads_changes_no_bit(part, n_vectors, n_parameters):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(
                results_and_gradients(part, tensors(n_vectors, n_parameters, torch.float32))
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_at_the_edges():
    """A key of zeros, gates that are shut and open, and numbers that are none."""
    k, v, v_first, w, a, v_gate, *parameters = tensors(6, 5, torch.float32)
    with torch.no_grad():
        k[0, 0], w[0, 1], a[0, 1], v_gate[0, 1] = 0, 200, -200, 200
        w[0, 2], a[0, 2], v_gate[0, 2] = -200, 200, -200
    inputs = [k, v, v_first, w, a, v_gate, *parameters]
    one = results_and_gradients(gates7, inputs)
    other = results_and_gradients(gates7, [x.detach().double().requires_grad_() for x in inputs])
    for i, (x, y) in enumerate(zip(one, other, strict=True)):
        near = slice(1, None) if i == 5 else slice(None)  # at a length of 0 the slope is 1e12
        torch.testing.assert_close(x[:, near].double(), y[:, near], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for x in inputs[:6]:
            x[1, 3, 5] = float("nan")
    results = gates7(*inputs)
    assert all(x[1, 3, 5].isnan() and x[1, 4].isfinite().all() for x in results)
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("inf"), -float("inf")])
    torch.testing.assert_close(fused.relu_squared(x), torch.relu(x) ** 2, equal_nan=True)


# ----------------------------------------------------------------------------------------------
# products


@pytest.mark.parametrize("n_in, n_out", [(96, 160), (160, 96), (512, 16), (256, 288)])
@pytest.mark.parametrize("rows", [1, 3, 255, 256, 257, 1400, 4096, 5600])
def test_products_in_pieces(rows, n_in, n_out):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, rows, n_in, generator=g), torch.randn(n_out, n_in, generator=g)
    dy = torch.randn(1, rows, n_out, generator=g)
    x.requires_grad_(), w.requires_grad_()
    y = fused.linear(x, w)
    y.backward(dy)
    exact = [t.detach().double() for t in (x, w, dy)]
    for got, want in (
        (y, exact[0] @ exact[1].mT),
        (x.grad, exact[2] @ exact[1]),
        (w.grad, exact[2][0].mT @ exact[0][0]),
    ):
        assert got.shape == want.shape and (got - want).abs().max() < 2e-6 * want.abs().max()
    assert w.grad.is_contiguous()


def test_onednn_sees_few_shapes(monkeypatch):
    """It keeps code and memory for each: a packed batch has another number of rows each time."""
    if not fused.ONEDNN:
        pytest.skip("products go through MKL here")
    seen, onednn = set(), fused.onednn
    monkeypatch.setattr(fused, "onednn", lambda x, w: seen.add((x.shape, w.shape)) or onednn(x, w))
    w = torch.randn(256, 256, requires_grad=True)
    for rows in range(1, 9000, 171):
        fused.linear(torch.randn(rows, 256, requires_grad=True), w).sum().backward()
    sizes = {2**i for i in range(9)} | {1024, 4096}
    assert {shape[0] for shape, _ in seen if shape[1] == 256} <= sizes | {256}
    assert len(seen) <= 2 * len(sizes)  # a product of each size, and the gradient of the weight
