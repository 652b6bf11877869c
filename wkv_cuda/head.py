"""The end of the loss on CUDA, in Triton: what fused.ScoreTokens computes, in fewer passes.

Logits stay in the dtype of h, a chunk of rows at a time in one buffer. One kernel reads them once
for all scores of a row; in backward another turns them, where they lie, into the gradient of the
loss. fused.ScoreTokens is the specification. No atomics: the same inputs give the same bits.

Bytes that a token moves, forward and backward, for bfloat16, V = 65,536, C = 768 and many tokens:
seven times its logits of 131 KB (written, read; written again, read, written, and read by both
products of the backward), and its share of what each chunk of 8,192 rows reads and writes of the
weight [V, C]: 3 x 101 MB of bfloat16 and 2 x 201 MB of the gradient in float32. Together 1.0 MB;
tests/test_head.py counts it, and 9 MB of the PyTorch form.
"""

import functools

import torch
import triton
import triton.language as tl

from . import fused

DEVICE, DTYPES = "cuda", (torch.bfloat16, torch.float16, torch.float32)
LOGITS = 2**30  # bytes of a chunk
BLOCK = 4096  # logits that a thread block reads at a time


class ScoreTokens(torch.autograd.Function):
    """fused.ScoreTokens, with its arguments and results."""

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, l2wrap, copy=None):
        (M, _), V = h.shape, len(weight)
        logps, entropy, lse = (h.new_empty(M, dtype=torch.float32) for _ in range(3))
        top = targets.new_empty(M, dtype=torch.int32)
        w = weight.to(h.dtype) if copy is None else copy
        targets = targets.contiguous()
        for q, z in chunks(h, V):
            torch.mm(h[q], w.mT, out=z)
            score_rows(z, targets[q], temperature, (logps[q], entropy[q], lse[q], top[q]))
        hits = top == targets
        ctx.save_for_backward(h, weight, targets, lse, entropy, top, copy)
        ctx.temperature, ctx.l2wrap = temperature, l2wrap
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, dlogps, dentropy, _):
        h, weight, targets, lse, entropy, top, copy = ctx.saved_tensors
        dlogps = torch.zeros_like(lse) if dlogps is None else dlogps.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        w = weight.to(h.dtype) if copy is None else copy
        for q, z in chunks(h, len(weight)):
            torch.mm(h[q], w.mT, out=z)  # the same product as in the forward: the same logits
            scores = (entropy[q], lse[q], top[q])
            grads = (dlogps[q], None if dentropy is None else dentropy[q])
            differentiate_rows(z, targets[q], scores, grads, ctx.temperature, ctx.l2wrap)
            if dh is not None:
                torch.mm(z, w, out=dh[q])
            if dw is not None:
                add_product(dw, z, h[q])
        return dh, dw, None, None, None, None


def rows_at_a_time(h, V):
    return max(256, LOGITS // (V * h.element_size()))


def chunks(h, V):
    """Yield (a slice of the rows of h, a buffer for their logits [rows, V]), always the same."""
    n = rows_at_a_time(h, V)
    buffer = h.new_empty(min(n, len(h)), V)
    for start in range(0, len(h), n):
        rows = min(n, len(h) - start)
        yield slice(start, start + rows), buffer[:rows]


def add_product(dw, dz, h):
    """dw [V, C] += dz' h. Half precision is summed in float32, in one pass over dw."""
    if dw.dtype == dz.dtype:
        dw.addmm_(dz.mT, h)
    elif dz.is_cuda and dw.dtype == torch.float32:
        torch.addmm(dw, dz.mT, h, out_dtype=dw.dtype, out=dw)
    else:
        dw += dz.mT @ h


# ----------------------------------------------------------------------------------------------
# the kernels


def score_rows(z, targets, temperature, scores):
    """Logits z [M, V] -> scores, (logps, entropy, lse, the column of the largest), each [M]."""
    M, V = z.shape
    options = dict(V=V, BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=8)
    with torch.cuda.device_of(z):
        score_kernel[(M,)](z, targets, *scores, float(temperature), **options)


def differentiate_rows(z, targets, scores, grads, temperature, l2wrap):
    """Logits z [M, V] become d loss / d z, as fused.score_rows_backward gives it.

    scores: (entropy, lse, column of the largest); grads: d loss / d logps, and, or None, / d
    entropy, each [M].
    """
    M, V = z.shape
    block = min(BLOCK, triton.next_power_of_2(V))
    options = dict(HAS_ENTROPY=grads[1] is not None, V=V, BLOCK=block, num_warps=8)
    if grads[1] is None:
        grads = (grads[0], grads[0])  # the second is not read
    factors = (float(temperature), float(l2wrap))
    with torch.cuda.device_of(z):
        gradient_kernel[(M, triton.cdiv(V, block))](
            z, targets, *scores, *grads, *factors, **options
        )


@triton.jit
def score_kernel(
    z_ptr,
    targets_ptr,
    logps_ptr,
    entropy_ptr,
    lse_ptr,
    top_ptr,
    temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each row, which keeps the largest logit so far and, relative to it, the sums of
    exp(x) and of x exp(x)."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * V
    y = tl.load(targets_ptr + row)
    largest = float("-inf")
    top = 0
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32) / temperature
        x = tl.where(inside, z, float("-inf"))
        here, at = tl.max(x, 0, return_indices=True)
        top = tl.where(here > largest, start + at, top)
        new = tl.maximum(largest, here)
        p = tl.exp(x - new)
        rescale = tl.exp(largest - new)
        total = total * rescale + tl.sum(p, 0)
        weighted = weighted * rescale + tl.sum(p * z, 0)
        largest = new
    lse = largest + tl.log(total)
    # A target that is none of V gets NaN, which stops a run before it touches the weights.
    z = tl.load(z_ptr + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32) / temperature
    tl.store(logps_ptr + row, z - lse)
    tl.store(entropy_ptr + row, lse - weighted / total)
    tl.store(lse_ptr + row, lse)
    tl.store(top_ptr + row, top)


@triton.jit
def gradient_kernel(
    z_ptr,
    targets_ptr,
    entropy_ptr,
    lse_ptr,
    top_ptr,
    dlogps_ptr,
    dentropy_ptr,
    temperature,
    l2wrap,
    V: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each block of a row."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * V
    y = tl.load(targets_ptr + row)
    top = tl.load(top_ptr + row)
    lse = tl.load(lse_ptr + row)
    dlogp = tl.load(dlogps_ptr + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    logp = z / temperature - lse
    p = tl.exp(logp)
    dz = tl.where(columns == y, dlogp, 0.0) - p * dlogp
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        dz -= p * (logp + entropy) * tl.load(dentropy_ptr + row)
    dz = dz / temperature
    dz = tl.where(columns == top, dz - l2wrap * z * dlogp, dz)
    tl.store(z_ptr + columns, dz.to(z_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------
# whether they can be used


@functools.cache
def trial(device):
    """None if scores and gradients of a small case are those of the PyTorch form, else a line."""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(20, 64, generator=g), torch.randn(5000, 64, generator=g) * 0.3
    h, weight = h.to(device, torch.bfloat16), weight.to(device)
    targets = torch.randint(0, 5000, (20,), generator=g).to(device)
    factors = torch.randn(2, 20, generator=g).to(device)
    results = []
    try:
        for form in (ScoreTokens, fused.ScoreTokens):
            with torch.enable_grad():
                leaves = [x.detach().clone().requires_grad_() for x in (h, weight)]
                logps, entropy, hits = form.apply(*leaves, targets, 0.7, 1e-2)
                loss = (logps * factors[0] + entropy * factors[1]).sum()
                grads = torch.autograd.grad(loss, leaves)
            results.append([x.detach().float() for x in (logps, entropy, hits, *grads)])
    except Exception as error:  # Triton wants a C compiler, and knows the card or not
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        return f"{type(error).__name__}: {first_line[:200]}"
    pairs = zip(*results, strict=True)
    worst = max(float((ours - plain).norm() / (plain.norm() + 1e-6)) for ours, plain in pairs)
    if not worst < 2e-2:
        return f"it is off by {worst:.1e} on this card; please report it, with its name and driver"
    return None
