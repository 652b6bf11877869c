"""What lies between the products on CUDA, in Triton: one kernel each way, as train_cpu.cpp has it.

The functions are those of fused.py, whose PyTorch forms are the specification (token_shift is in
shift.py); the backward passes are written out in train_cpu.cpp. A program takes a tile of rows x
channels, the channels of a head where there are heads. It computes in float32, and reads and writes
every tensor in its own dtype, parameters too, so that none is cast before. Of a parameter's
gradient each program writes the sum over its rows, and PyTorch adds these up: no atomics, the same
inputs give the same bits.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from . import fused as parts
from . import native

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 128  # of a tile where there are no heads
ROWS, ROWS_BACK = 16, 32  # of a tile


def fused(name, number, vectors, parameters, n_results, grads=None):
    """mix, gates7 or readout, as cpu.fused: results, or with `grads` the gradients of all inputs.

    ValueError for what does not fit.
    """
    x, is_back = vectors[0], grads is not None
    C, rows, width = x.shape[-1], ROWS_BACK if is_back else ROWS, COLUMNS
    if name != "mix":
        width = number  # a head
    check(name, x.shape, x.device, (*vectors, *(grads or [])))
    check(name, (C,), x.device, [p if p is None else p.flatten() for p in parameters])
    M = x.numel() // C
    kernel, grid = KERNELS[name][is_back], (triton.cdiv(M, rows), triton.cdiv(C, width))
    sizes = dict(C=C, WIDTH=width, ROWS=rows, num_warps=8 if is_back else 4)
    inputs = (in_one_piece(vectors), tuple(parameters))
    if not is_back:
        results = native.empty_like([x] * n_results)
        if name == "gates7":  # log w
            results[0] = x.new_empty(x.shape, dtype=torch.float32)
        launch(x, kernel, grid, (*inputs, tuple(results)), M, **sizes)
        return results
    out = [None if t is None else t.new_empty(t.shape) for t in vectors]
    sums = x.new_empty(grid[0], len(parameters), C, dtype=torch.float32)
    launch(x, kernel, grid, (*inputs, in_one_piece(grads), tuple(out), sums), M, **sizes)
    return out + of_parameters(sums.sum(0), parameters)


def check(name, shape, device, tensors):
    for t in tensors:
        if t is not None:
            native.check(f"{name}: a tensor", t, shape, DTYPES, device)


def in_one_piece(tensors):
    return tuple(None if t is None else t.contiguous() for t in tensors)


def of_parameters(sums, parameters):
    """sums [parameters, C] -> the gradient of each parameter, in its shape and dtype."""
    dtypes = {p.dtype for p in parameters if p is not None}
    if len(dtypes) == 1:
        sums = sums.to(dtypes.pop())  # all at once
    pairs = zip(sums, parameters, strict=True)
    return [None if p is None else g.to(p.dtype).view(p.shape) for g, p in pairs]


def relu_squared(x, dout=None):
    """max(x, 0)^2; with dout, that of the result: its gradient."""
    check("relu_squared", x.shape, x.device, (x, dout))
    C, out = x.shape[-1], x.new_empty(x.shape)
    M = x.numel() // C
    grid = (triton.cdiv(M, ROWS), triton.cdiv(C, COLUMNS))
    io = (*in_one_piece((x, dout)), out)
    launch(x, relu_squared_kernel, grid, io, M, C=C, WIDTH=COLUMNS, ROWS=ROWS, num_warps=4)
    return out


def launch(x, kernel, grid, *args, **options):
    with torch.cuda.device_of(x):
        kernel[grid](*args, **options)


# ----------------------------------------------------------------------------------------------
# what the kernels share


@triton.jit
def tile(M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """-> where this program's tile [ROWS, WIDTH] lies, what of it exists, its columns"""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = rows[:, None] * C + columns[None, :]
    return at, (rows < M)[:, None] & (columns < C)[None, :], columns


@triton.jit
def read(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(ptr, at, inside, x):
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def parameter(ptr, columns, C: tl.constexpr):
    return read(ptr, columns, columns < C)[None, :]


@triton.jit
def write_sum(sums_ptr, i, n, x, columns, C: tl.constexpr):
    """The sum over the tile's rows of the gradient x of parameter i of n."""
    line = tl.program_id(0).to(tl.int64) * n + i
    tl.store(sums_ptr + line * C + columns, tl.sum(x, 0), mask=columns < C)


# ----------------------------------------------------------------------------------------------
# mix: vectors x, before and, or not, an offset of each of J weights


@triton.jit(do_not_specialize=["M"])
def mix_forward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, weights, results = io
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    x = read(vectors[0], at, inside)
    delta = read(vectors[1], at, inside) - x
    for i in tl.static_range(len(weights)):
        m = parameter(weights[i], columns, C)
        if vectors[2 + i] is not None:
            m += read(vectors[2 + i], at, inside)
        write(results[i], at, inside, x + delta * m)


@triton.jit(do_not_specialize=["M"])
def mix_backward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, weights, grads, out, sums_ptr = io
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    delta = read(vectors[1], at, inside) - read(vectors[0], at, inside)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    before = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(len(weights)):
        m = parameter(weights[i], columns, C)
        if vectors[2 + i] is not None:
            m += read(vectors[2 + i], at, inside)
        d = read(grads[i], at, inside)
        total += d
        before += d * m
        if vectors[2 + i] is not None:
            write(out[2 + i], at, inside, d * delta)
        write_sum(sums_ptr, i, len(weights), d * delta, columns, C)
    write(out[0], at, inside, total - before)
    write(out[1], at, inside, before)


# ----------------------------------------------------------------------------------------------
# gates7, readout, relu_squared


@triton.jit
def removal_key(k, k_k):
    """k and k_k of a head -> kappa, 1 / its length before, whether that is of k"""
    kappa = k * k_k
    length = tl.sqrt(tl.sum(kappa * kappa, 1))[:, None]
    scale = 1 / tl.where(length < 1e-12, 1e-12, length)  # NaN stays
    return kappa * scale, scale, length > 1e-12


@triton.jit(do_not_specialize=["M"])
def gates7_forward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, parameters, results = io
    k_ptr, v_ptr, v_first_ptr, w_ptr, a_ptr, gate_ptr = vectors
    w0_ptr, a0_ptr, k_k_ptr, k_a_ptr, v0_ptr = parameters
    logw_ptr, k_out_ptr, v_out_ptr, minus_kappa_ptr, kappa_a_ptr = results
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    w = tl.sigmoid(parameter(w0_ptr, columns, C) + read(w_ptr, at, inside))
    write(logw_ptr, at, inside, w * -0.6065306597)  # exp(-1/2)
    a = tl.sigmoid(parameter(a0_ptr, columns, C) + read(a_ptr, at, inside))
    k = read(k_ptr, at, inside)
    kappa, _, _ = removal_key(k, parameter(k_k_ptr, columns, C))
    write(minus_kappa_ptr, at, inside, -kappa)
    write(kappa_a_ptr, at, inside, kappa * a)
    write(k_out_ptr, at, inside, k * (1 + (a - 1) * parameter(k_a_ptr, columns, C)))
    if v_first_ptr is not None:
        v = read(v_ptr, at, inside)
        gate = tl.sigmoid(parameter(v0_ptr, columns, C) + read(gate_ptr, at, inside))
        write(v_out_ptr, at, inside, v + (read(v_first_ptr, at, inside) - v) * gate)


@triton.jit(do_not_specialize=["M"])
def gates7_backward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, parameters, grads, out, sums_ptr = io
    k_ptr, v_ptr, v_first_ptr, w_ptr, a_ptr, gate_ptr = vectors
    w0_ptr, a0_ptr, k_k_ptr, k_a_ptr, v0_ptr = parameters
    dlogw_ptr, dk_out_ptr, dv_out_ptr, dminus_ptr, dkappa_a_ptr = grads
    dk_ptr, dv_ptr, dv_first_ptr, dw_ptr, da_ptr, dgate_ptr = out
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    w = tl.sigmoid(parameter(w0_ptr, columns, C) + read(w_ptr, at, inside))
    dw = read(dlogw_ptr, at, inside) * -0.6065306597 * w * (1 - w)
    write(dw_ptr, at, inside, dw)
    write_sum(sums_ptr, 0, 5, dw, columns, C)

    a = tl.sigmoid(parameter(a0_ptr, columns, C) + read(a_ptr, at, inside))
    k, k_k = read(k_ptr, at, inside), parameter(k_k_ptr, columns, C)
    k_a, dk = parameter(k_a_ptr, columns, C), read(dk_out_ptr, at, inside)
    kappa, scale, has_length = removal_key(k, k_k)
    dkappa_a = read(dkappa_a_ptr, at, inside)
    da = (dkappa_a * kappa + dk * k * k_a) * a * (1 - a)
    write(da_ptr, at, inside, da)
    write_sum(sums_ptr, 1, 5, da, columns, C)
    write_sum(sums_ptr, 3, 5, dk * k * (a - 1), columns, C)
    dkappa = dkappa_a * a - read(dminus_ptr, at, inside)
    along = tl.where(has_length, tl.sum(dkappa * kappa, 1)[:, None], 0.0)
    dkappa = scale * (dkappa - kappa * along)  # of k * k_k
    write(dk_ptr, at, inside, dk * (1 + (a - 1) * k_a) + dkappa * k_k)
    write_sum(sums_ptr, 2, 5, dkappa * k, columns, C)

    if v_first_ptr is not None:
        gate = tl.sigmoid(parameter(v0_ptr, columns, C) + read(gate_ptr, at, inside))
        delta = read(v_first_ptr, at, inside) - read(v_ptr, at, inside)
        dv = read(dv_out_ptr, at, inside)
        write(dv_ptr, at, inside, dv * (1 - gate))
        write(dv_first_ptr, at, inside, dv * gate)
        dgate = dv * delta * gate * (1 - gate)
        write(dgate_ptr, at, inside, dgate)
        write_sum(sums_ptr, 4, 5, dgate, columns, C)


@triton.jit
def normed(y, N: tl.constexpr):
    """A head of y -> its layer norm, 1 / the standard deviation"""
    y -= tl.sum(y, 1)[:, None] / N
    scale = 1 / tl.sqrt(tl.sum(y * y, 1) / N + 64e-5)[:, None]
    return y * scale, scale


@triton.jit(do_not_specialize=["M"])
def readout_forward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, parameters, results = io
    y_ptr, g_ptr, r_ptr, k_ptr, v_ptr = vectors
    weight_ptr, bias_ptr, r_k_ptr = parameters
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    x, _ = normed(read(y_ptr, at, inside), WIDTH)
    z = parameter(bias_ptr, columns, C) + x * parameter(weight_ptr, columns, C)
    if r_ptr is not None:
        products = read(r_ptr, at, inside) * read(k_ptr, at, inside)
        bonus = tl.sum(products * parameter(r_k_ptr, columns, C), 1)[:, None]
        z += bonus * read(v_ptr, at, inside)
    write(results[0], at, inside, z * read(g_ptr, at, inside))


@triton.jit(do_not_specialize=["M"])
def readout_backward(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    vectors, parameters, grads, out, sums_ptr = io
    y_ptr, g_ptr, r_ptr, k_ptr, v_ptr = vectors
    weight_ptr, bias_ptr, r_k_ptr = parameters
    dy_ptr, dg_ptr, dr_ptr, dk_ptr, dv_ptr = out
    at, inside, columns = tile(M, C, WIDTH, ROWS)
    x, scale = normed(read(y_ptr, at, inside), WIDTH)
    weight, dout = parameter(weight_ptr, columns, C), read(grads[0], at, inside)
    z = parameter(bias_ptr, columns, C) + x * weight
    d = dout * read(g_ptr, at, inside)
    write_sum(sums_ptr, 0, 3, d * x, columns, C)
    write_sum(sums_ptr, 1, 3, d, columns, C)
    if r_ptr is not None:
        r, k, v = read(r_ptr, at, inside), read(k_ptr, at, inside), read(v_ptr, at, inside)
        r_k = parameter(r_k_ptr, columns, C)
        bonus = tl.sum(r * k * r_k, 1)[:, None]
        z += bonus * v
        write(dv_ptr, at, inside, d * bonus)
        dbonus = tl.sum(d * v, 1)[:, None]
        write(dr_ptr, at, inside, dbonus * k * r_k)
        write(dk_ptr, at, inside, dbonus * r * r_k)
        write_sum(sums_ptr, 2, 3, dbonus * r * k, columns, C)
    write(dg_ptr, at, inside, dout * z)
    dx = d * weight
    mean, along = tl.sum(dx, 1)[:, None] / WIDTH, tl.sum(dx * x, 1)[:, None] / WIDTH
    write(dy_ptr, at, inside, scale * (dx - mean - x * along))


@triton.jit(do_not_specialize=["M"])
def relu_squared_kernel(io, M, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    x_ptr, dout_ptr, out_ptr = io
    at, inside, _ = tile(M, C, WIDTH, ROWS)
    x = read(x_ptr, at, inside)
    x = tl.where(x < 0, 0.0, x)  # NaN stays
    y = x * x
    if dout_ptr is not None:
        y = 2 * x * read(dout_ptr, at, inside)
    write(out_ptr, at, inside, y)


KERNELS = {  # forward, backward
    "mix": (mix_forward, mix_backward),
    "gates7": (gates7_forward, gates7_backward),
    "readout": (readout_forward, readout_backward),
}


# ----------------------------------------------------------------------------------------------
# whether they can be used


def every_part(x, weights, shift):
    """Results of all parts of fused.py, of vectors x [6, B, T, 128], weights [5, 128], shift
    [B, 128]; token_shift apart, which copies."""
    norm = SimpleNamespace(weight=weights[0], bias=weights[1])
    heads = x.unflatten(-1, (2, 64))
    y, r, k, v = heads[:4]
    mixed = parts.mix(x[0], x[1], *weights[:2], offsets=[x[2], x[3]])
    gates = parts.gates7(*x, *weights, 64)
    out = parts.readout(y, x[5], norm, r, k, v, weights[2].view(2, 64))
    shifted = parts.token_shift(x[0], shift, None)
    if shifted is None:
        shifted = torch.cat([shift[:, None], x[0, :, :-1]], 1), x[0, :, -1]
    return [*mixed, *gates, out, parts.relu_squared(x[4]), *shifted]


def trial(device):
    """None if a small case has the results and gradients of the PyTorch forms, else a line.

    fused.py must already send what is on this device here.
    """
    g = torch.Generator().manual_seed(0)
    shapes = (6, 2, 19, 128), (5, 128), (2, 128)
    drawn = [torch.randn(shape, generator=g).bfloat16() for shape in shapes]
    found = []
    try:
        for place, dtype in ((device, torch.bfloat16), ("cpu", torch.float64)):
            with torch.enable_grad():
                leaves = [x.to(place, dtype).requires_grad_() for x in drawn]
                results = every_part(*leaves)
                loss = sum((y.double() - 1).square().sum() for y in results)
                grads = torch.autograd.grad(loss, leaves)
            found.append([x.detach().double().cpu() for x in (*results, *grads)])
    except Exception as error:  # Triton wants a C compiler, and knows the card or not
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        return f"{type(error).__name__}: {first_line[:200]}"
    pairs = zip(*found, strict=True)
    worst = max(float((ours - plain).norm() / plain.norm()) for ours, plain in pairs)
    if not worst < 2e-2:
        return f"it is off by {worst:.1e} on this card; please report it, with its name and driver"
    return None
