"""What lies between the recurrence and the products (wkv_cuda/fused.py): its parts as functions of
tensors, for the tests of their native forms."""

from types import SimpleNamespace

from wkv_cuda import fused

import torch

ROWS, C = (2, 37), 96


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
        factors = torch.randn(y.shape, generator=g).bfloat16()  # the same in every dtype
        loss = loss + (y * factors.to(y)).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [x.detach() for x in (*results, *(g for g in grads if g is not None))]


def check_edges(inputs):
    """gates7 at a key of zeros, at gates that are shut and open, and with numbers that are none.

    inputs: of gates7, float32, of a native form; in float64 the plain form takes them.
    """
    k, v, v_first, w, a, v_gate, *_ = inputs
    with torch.no_grad():
        k[0, 0], w[0, 1], a[0, 1], v_gate[0, 1] = 0, 200, -200, 200
        w[0, 2], a[0, 2], v_gate[0, 2] = -200, 200, -200
    ours = results_and_gradients(gates7, inputs)
    plain = results_and_gradients(gates7, [x.detach().double().requires_grad_() for x in inputs])
    for i, (x, y) in enumerate(zip(ours, plain, strict=True)):
        near = slice(1, None) if i == 5 else slice(None)  # at a length of 0 the slope is 1e12
        torch.testing.assert_close(x[:, near].double(), y[:, near], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for x in inputs[:6]:
            x[1, 3, 5] = float("nan")
    results = gates7(*inputs)
    assert all(x[1, 3, 5].isnan() and x[1, 4].isfinite().all() for x in results)
    for x in results[3:]:
        assert x[1, 3, :32].isnan().all()  # of a head without a length
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("inf"), -float("inf")], device=k.device)
    torch.testing.assert_close(fused.relu_squared(x), torch.relu(x) ** 2, equal_nan=True)
