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
