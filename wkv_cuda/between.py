"""What lies between the products on CUDA, in Triton: one kernel each way, as train_cpu.cpp has it.

The functions are those of fused.py, whose PyTorch forms are the specification; the backward passes
are written out in train_cpu.cpp. A program takes a tile of rows x channels, the channels of a head
where there are heads. It computes in float32, and reads and writes every tensor in its own dtype,
parameters too, so that none is cast before. Of a parameter's gradient each program writes the sum
over its rows, and PyTorch adds these up: no atomics, the same inputs give the same bits.
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
BLOCK = 2048  # numbers that a program of relu_squared takes


def fused(name, number, vectors, parameters, n_results, grads=None):
    """mix, gates7 or readout, as cpu.fused: results, or with `grads` the gradients of all inputs.

    Of parameters there are gradients only if one of them wants its. ValueError for what does not
    fit.
    """
    x, is_back = vectors[0], grads is not None
    check(name, vectors, parameters, grads or [])
    C = x.shape[-1]
    M, width, rows = x.numel() // C, COLUMNS, ROWS_BACK if is_back else ROWS
    if name != "mix":
        width = number
    kernel, grid = KERNELS[name][is_back], (triton.cdiv(M, rows), triton.cdiv(C, width))
    inputs = (in_one_piece(vectors), tuple(parameters))
    options = dict(C=C, WIDTH=width, ROWS=rows, num_warps=4)
    if not is_back:
        results = native.empty_like([x] * n_results)
        if name == "gates7":  # log w
            results[0] = x.new_empty(x.shape, dtype=torch.float32)
        launch(x, kernel, grid, (*inputs, tuple(results)), M, **options)
        return results
    sums = None
    if any(p is not None and p.requires_grad for p in parameters):
        sums = x.new_empty(grid[0], len(parameters), C, dtype=torch.float32)
    out = [None if t is None else t.new_empty(t.shape) for t in vectors]
    io = (*inputs, in_one_piece(grads), tuple(out), sums)
    launch(x, kernel, grid, io, M, **options)
    return out + of_parameters(sums, parameters)


def check(name, vectors, parameters, grads):
    """ValueError, unless vectors and gradients are alike, and each parameter is of C numbers."""
    x = vectors[0]
    for t in (*vectors, *grads):
        if t is not None:
            native.check(f"{name}: a vector", t, x.shape, DTYPES, x.device)
    for p in parameters:
        if p is not None:
            native.check(f"{name}: a parameter", p.flatten(), x.shape[-1:], DTYPES, x.device)


def in_one_piece(tensors):
    return tuple(None if t is None else t.contiguous() for t in tensors)


def of_parameters(sums, parameters):
    """sums [programs, parameters, C] -> the gradient of each parameter, in its shape and dtype."""
    if sums is None:
        return [None] * len(parameters)
    sums = sums.sum(0)
    dtypes = {p.dtype for p in parameters if p is not None}
    if len(dtypes) == 1:
        sums = sums.to(dtypes.pop())  # all at once
    pairs = zip(sums, parameters, strict=True)
    return [None if p is None else g.to(p.dtype).view(p.shape) for g, p in pairs]


def relu_squared(x, dout=None):
    """max(x, 0)^2; with dout, that of the result: its gradient."""
    native.check("relu_squared: x", x, x.shape, DTYPES, x.device)
    x, out = x.contiguous(), x.new_empty(x.shape)
    if dout is not None:
        native.check("relu_squared: dout", dout, x.shape, DTYPES, x.device)
        dout = dout.contiguous()
    grid = (triton.cdiv(x.numel(), BLOCK),)
    launch(x, relu_squared_kernel, grid, x, dout, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out


class TokenShift(torch.autograd.Function):
    """x [B, T, C], shift [B or D, C], the documents' borders [D + 1] or None for rows of one length
    -> (x_prev, the new shift), as model.token_shift.

    Each row of C that goes in comes out once. Backward takes the same ways back: it is the same
    function with the tokens in the other order.
    """

    @staticmethod
    def forward(ctx, x, shift, borders):
        ctx.borders, ctx.documents = borders, len(shift)
        ctx.set_materialize_grads(False)
        return shift_rows(x, shift, borders, len(shift), is_back=False)

    @staticmethod
    def backward(ctx, dx_prev, dlast):
        if dx_prev is None:  # nobody used what was shifted
            return None, None, None
        return *shift_rows(dx_prev, dlast, ctx.borders, ctx.documents, is_back=True), None


def shift_rows(x, edges, borders, D, is_back):
    """x [B, T, C], one token later or, back, earlier; what has no neighbour comes of edges [D, C],
    or is 0 -> that, and [D, C], what leaves each document, or its edge, if it has no token."""
    (_, T, C), out, left = x.shape, x.new_empty(x.shape), x.new_empty(D, x.shape[-1])
    for t in (x, edges):
        if t is not None:
            native.check("token_shift", t, (*t.shape[:-1], C), DTYPES, x.device)
    M, edges = x.numel() // C, None if edges is None else edges.contiguous()
    grid = (triton.cdiv(M, ROWS) + triton.cdiv(D, ROWS), triton.cdiv(C, COLUMNS))
    sizes = dict(C=C, WIDTH=COLUMNS, ROWS=ROWS, BACK=is_back, num_warps=4)
    io = (x.contiguous(), edges, borders, out, left)
    launch(x, shift_kernel, grid, io, M, T, D, **sizes)
    return out, left


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
    """The sum over the tile's rows, of the gradient of parameter i of n, if one wants its."""
    if sums_ptr is not None:
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
# gates7


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


# ----------------------------------------------------------------------------------------------
# readout


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


# ----------------------------------------------------------------------------------------------
# relu_squared and token_shift


@triton.jit(do_not_specialize=["n"])
def relu_squared_kernel(x_ptr, dout_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = read(x_ptr, at, at < n)
    x = tl.where(x < 0, 0.0, x)  # NaN stays
    y = x * x
    if dout_ptr is not None:
        y = 2 * x * read(dout_ptr, at, at < n)
    write(out_ptr, at, at < n, y)


@triton.jit
def document_of(rows, borders_ptr, T, D):
    """The document or row of the batch that each of rows [ROWS] is in."""
    if borders_ptr is None:
        return rows // T
    else:  # as many as begin there or before, but one
        begun = tl.zeros_like(rows)
        for start in range(0, D, 64):
            d = start + tl.arange(0, 64)
            first = tl.load(borders_ptr + d, mask=d < D, other=2147483647)
            begun += tl.sum((first[None, :] <= rows[:, None]).to(rows.dtype), 1)
        return begun - 1


@triton.jit
def bounds_of(document, borders_ptr, T, D):
    """-> the first token of each document, the one after its last"""
    if borders_ptr is None:
        return document * T, (document + 1) * T
    else:
        first = tl.load(borders_ptr + document, mask=document < D, other=0)
        end = tl.load(borders_ptr + document + 1, mask=document < D, other=0)
        return first.to(tl.int64), end.to(tl.int64)


@triton.jit
def copy_rows(x_ptr, rows, edges_ptr, edges, is_edge, out_ptr, to, exists, C, WIDTH: tl.constexpr):
    """Rows of x, or, where is_edge, of edges or zeros, to the rows `to` of out."""
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside, is_edge = exists[:, None] & (columns < C), is_edge[:, None]
    y = read(x_ptr, rows[:, None] * C + columns, inside & (is_edge == 0))
    if edges_ptr is not None:
        edge = read(edges_ptr, edges[:, None] * C + columns, inside & is_edge)
        y = tl.where(is_edge, edge, y)
    write(out_ptr, to[:, None] * C + columns, inside, y)


@triton.jit(do_not_specialize=["M", "T", "D"])
def shift_kernel(
    io, M, T, D, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr
):
    """The first programs are for rows of out, the others for those of left."""
    x_ptr, edges_ptr, borders_ptr, out_ptr, left_ptr = io
    blocks = tl.cdiv(M, ROWS)
    line = tl.program_id(0).to(tl.int64)
    if line < blocks:
        row = line * ROWS + tl.arange(0, ROWS)
        d = document_of(row, borders_ptr, T, D)
        first, end = bounds_of(d, borders_ptr, T, D)
        source, is_edge = row - 1, row == first
        if BACK:
            source, is_edge = row + 1, row + 1 == end
        copy_rows(x_ptr, source, edges_ptr, d, is_edge, out_ptr, row, row < M, C, WIDTH)
    else:
        d = (line - blocks) * ROWS + tl.arange(0, ROWS)
        first, end = bounds_of(d, borders_ptr, T, D)
        source = end - 1
        if BACK:
            source = first
        copy_rows(x_ptr, source, edges_ptr, d, first == end, left_ptr, d, d < D, C, WIDTH)


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


def ramp(y):
    """Numbers from -1 to 1, as many as y has."""
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)


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
                loss = sum((y.flatten().double() * ramp(y)).sum() for y in results)
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
