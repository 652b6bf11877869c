"""What lies between the recurrence and the products (wkv_cuda/fused.py): in C++ the numbers of the
plain form in float64, whose gradients finite differences confirm; products in pieces."""

from wkv_cuda import cpu, fused

import pytest
import torch
from parts import PARTS, ROWS, check_edges, results_and_gradients, tensors


@pytest.fixture(autouse=True)
def built():
    if missing := cpu.unavailable():
        pytest.skip(missing)


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
    check_edges(tensors(6, 5, torch.float32))


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
