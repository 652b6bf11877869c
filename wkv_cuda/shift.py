"""Of each token the one before, on CUDA, in Triton: model.token_shift in one kernel each way."""

import torch
import triton
import triton.language as tl

from . import between
from .between import COLUMNS, ROWS, read, write


class TokenShift(torch.autograd.Function):
    """x [B, T, C], shift [B or D, C], the documents' borders [D + 1] or None for rows of one length
    -> (x_prev, the new shift), as model.token_shift.

    Each row of C that goes in comes out once. The gradient goes the same ways back: it is the same
    function, the tokens in the other order.
    """

    @staticmethod
    def forward(ctx, x, shift, borders):
        ctx.borders, ctx.shape = borders, x.shape
        ctx.set_materialize_grads(False)
        D = len(x) if borders is None else len(borders) - 1
        between.check("token_shift", (D, x.shape[-1]), x.device, [shift])
        return shift_rows(x, shift, borders, is_back=False)

    @staticmethod
    def backward(ctx, dx_prev, dlast):
        if dx_prev is None:  # nobody used what was shifted
            dx_prev = dlast.new_zeros(ctx.shape)
        return *shift_rows(dx_prev, dlast, ctx.borders, is_back=True), None


def shift_rows(x, edges, borders, is_back):
    """x [B, T, C], one token later or, back, earlier; what has no neighbour comes from edges
    [D, C], or is 0 -> that, and [D, C]: what leaves each document, or its edge if it is empty."""
    B, T, C = x.shape
    D = B if borders is None else len(borders) - 1
    out, left = x.new_empty(x.shape), x.new_empty(D, C)
    grid = (triton.cdiv(B * T, ROWS) + triton.cdiv(D, ROWS), triton.cdiv(C, COLUMNS))
    io = (*between.in_one_piece((x, edges)), borders, out, left)
    sizes = dict(C=C, WIDTH=COLUMNS, ROWS=ROWS, BACK=is_back, num_warps=4)
    between.launch(x, shift_kernel, grid, io, B * T, T, D, **sizes)
    return out, left


# ----------------------------------------------------------------------------------------------
# the kernel


@triton.jit
def document_of(rows, borders_ptr, T, D):
    """The document or row of the batch that each of rows [ROWS] is in."""
    document = rows // T
    if borders_ptr is not None:  # as many as begin there or before, but one
        document = tl.full(rows.shape, -1, rows.dtype)
        seen = 0
        while seen < D:
            d = seen + tl.arange(0, 64)
            first = tl.load(borders_ptr + d, mask=d < D, other=2147483647)
            document += tl.sum((first[None, :] <= rows[:, None]).to(rows.dtype), 1)
            seen += 64
    return document


@triton.jit
def bounds_of(document, borders_ptr, T, D):
    """-> the first token of each document, the one after its last"""
    first, end = document * T, (document + 1) * T
    if borders_ptr is not None:
        first = tl.load(borders_ptr + document, mask=document < D, other=0)
        end = tl.load(borders_ptr + document + 1, mask=document < D, other=0)
    return first, end


@triton.jit
def copy_rows(x_ptr, rows, edges_ptr, edges, is_edge, out_ptr, to, exists, C, WIDTH: tl.constexpr):
    """Rows of x, or, where is_edge, of edges or zeros, to the rows `to` of out."""
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside, is_edge = exists[:, None] & (columns < C), is_edge[:, None]
    y = read(x_ptr, rows[:, None].to(tl.int64) * C + columns, inside & (is_edge == 0))
    if edges_ptr is not None:
        edge = read(edges_ptr, edges[:, None].to(tl.int64) * C + columns, inside & is_edge)
        y = tl.where(is_edge, edge, y)
    write(out_ptr, to[:, None].to(tl.int64) * C + columns, inside, y)


@triton.jit(do_not_specialize=["M", "T", "D"])
def shift_kernel(
    io, M, T, D, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr
):
    """The first programs are for rows of out, the others for those of left."""
    x_ptr, edges_ptr, borders_ptr, out_ptr, left_ptr = io
    blocks = tl.cdiv(M, ROWS)
    line = tl.program_id(0)
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
