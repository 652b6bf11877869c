"""The recurrences in chunks of L tokens: a few batched matrix products, not T dependent steps.

Plain PyTorch, any device, float32 inside (float64 for float64 inputs). Forward and backward are
written out, so that memory is the inputs plus one state per chunk; nothing grows with T x N x N.

Shapes: Q chunk-heads (chunks of all sequences times heads), L tokens, N head size. A chunk step i
of every sequence stands together, longest sequence first, so that the state pass is a loop over
contiguous slices; a padded token has logw = 0 and r = k = v = a = b = 0, which leaves the state as
it is.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

# Of WKV-7's factors inside a chunk: the product of two, exp(80), still is a float32.
MAX_EXPONENT = 40.0


# ----------------------------------------------------------------------------------------------
# tokens <-> chunks


class Chunks:
    """Where the tokens of B rows, or of the D documents of one packed row, lie in chunks.

    order [D]: the sequences, longest first; rank [D]: the place of each in that order.
    index [chunks * L]: the token at each place, of all B T laid end to end, or B T for padding;
    back [B T]: the place of each token. segments: see `segments_of`.
    """

    def __init__(self, shape, cu_seqlens, L, device):
        B, T, H, _ = shape
        self.shape, self.L = shape, L
        self.whole = cu_seqlens is None  # rows of one length: their chunks are a view, no gather
        borders = torch.arange(B + 1) * T if self.whole else cu_seqlens
        lengths = borders.diff()
        order = lengths.argsort(descending=True, stable=True)
        n_chunks = -(-lengths[order] // L)
        steps = torch.arange(max(n_chunks.tolist(), default=0))
        exists = steps[:, None] < n_chunks  # [steps, D], in this order
        step, slot = exists.nonzero(as_tuple=True)  # of each chunk
        first, end = borders[:-1][order][slot] + step * L, borders[1:][order][slot]
        index = first[:, None] + torch.arange(L)
        index = index.masked_fill(index >= end[:, None], B * T).flatten()
        back = torch.empty(B * T + 1, dtype=torch.int64)
        back[index] = torch.arange(len(index))
        self.order, self.rank = order.to(device), order.argsort().to(device)
        self.index, self.back = index.to(device), back[:-1].to(device)
        enough = 48 if device.type == "cpu" else 4096  # chunk-heads
        self.segments = segments_of(exists.sum(1) * H, enough)

    def split(self, x):
        """[B, T, H, N] -> [Q, L, N]"""
        B, T, H, N = x.shape
        if self.whole:
            padded = F.pad(x, (0, 0, 0, 0, 0, -T % self.L))
            x = padded.view(B, -1, self.L, H, N).permute(1, 0, 3, 2, 4)
        else:
            padded = torch.cat([x[0], x.new_zeros(1, H, N)])
            x = padded[self.index].view(-1, self.L, H, N).transpose(1, 2)
        return x.reshape(-1, self.L, N).contiguous()

    def join(self, x):
        """[Q, L, N] -> [B, T, H, N]"""
        B, T, H, N = self.shape
        if self.whole:
            return x.view(-1, B, H, self.L, N).permute(1, 0, 3, 2, 4).reshape(B, -1, H, N)[:, :T]
        return x.view(-1, H, self.L, N).transpose(1, 2).reshape(-1, H, N)[self.back][None]


def segments_of(sizes, enough):
    """Chunk-heads of each chunk step, [steps] -> the steps in segments, [(q, [(alive, p), …]), …].

    q: a segment's slice of all chunk-heads; alive: how many a step has; p: their slice of the
    segment. A segment is long enough for good matrix products and short enough that its temporaries
    stay in the cache (measured: twice as fast as all chunks at once).
    """
    groups = []
    for first, end in pairwise([0, *sizes.cumsum(0).tolist()]):
        if not groups or end - groups[-1][0][0] > enough:
            groups.append([])
        groups[-1].append((first, end))
    segments = []
    for group in groups:
        start, stop = group[0][0], group[-1][1]
        steps = [(end - first, slice(first - start, end - start)) for first, end in group]
        segments.append((slice(start, stop), steps))
    return segments


def suffix_sum(x):
    """x_t + x_{t+1} + … along the tokens of a chunk: [Q, L, N]"""
    return x.flip(1).cumsum(1).flip(1)


def sum_before(x):
    """x_0 + … + x_{t-1}: [Q, L, N]"""
    return F.pad(x[:, :-1], (0, 0, 1, 0)).cumsum(1)


def sum_after(x):
    """x_{t+1} + … + x_{L-1}: [Q, L, N]"""
    return suffix_sum(F.pad(x[:, 1:], (0, 0, 0, 1)))


def diagonal_blocks(A, n):
    """[Q, L, L] -> view [Q, L / n, n, n] of its diagonal n x n blocks."""
    Q, L = A.shape[:2]
    return A.view(Q, L // n, n, L // n, n).diagonal(0, 1, 3).movedim(-1, 1)


def unit_lower_inverse(A):
    """(I - A)^-1 of strictly lower triangular A [Q, L, L], L a power of two.

    By doubling blocks of true inverses: [[M1, 0], [M2 A21 M1, M2]]. Bounded where the Neumann
    product I + A + A^2 … is not (repeated keys).
    """
    # The diagonal 2 x 2 blocks are inverses already; below them stands A until it is replaced.
    M = A + torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    n = 2
    while n < A.shape[1]:
        blocks = diagonal_blocks(M, 2 * n)
        M1, A21, M2 = blocks[..., :n, :n], blocks[..., n:, :n], blocks[..., n:, n:]
        blocks[..., n:, :n] = M2 @ (A21 @ M1)
        n *= 2
    return M


# ----------------------------------------------------------------------------------------------
# WKV-7


def _intra7(r, logw, k, a, b):
    """What a chunk can know without its incoming state, decays referred to the chunk's middle.

    With c the cumulative log decay and m its value in the middle:
    AR = [a exp(c_prev - m); r exp(c - m)] and BK = [b; k] exp(m - c), both [Q, 2L, N];
    G = their scores, causal, [Q, 2L, 2L]; M = (I - A_ab)^-1.
    """
    L = r.shape[1]
    c = logw.cumsum(1)
    mid = c[:, (L - 1) // 2, None]
    Ec, En = (c - mid).exp(), (mid - c).exp()
    Ep = (c - logw - mid).exp()
    AR, BK = torch.cat([a * Ep, r * Ec], 1), torch.cat([b * En, k * En], 1)
    G = AR @ BK.mT
    causal = torch.ones(L, L, dtype=G.dtype, device=G.device).tril()
    # a reads the state before its token is written, r after.
    mask = torch.cat([causal.tril(-1), causal]).repeat(1, 2)
    G *= mask
    M = unit_lower_inverse(G[:, :L, :L])
    return Ec, En, Ep, mid.exp(), (c[:, -1:] - mid).exp(), AR, BK, G, mask, M


class Chunked7(torch.autograd.Function):
    """r logw k v a b [Q, L, N], state [D, H, N, N] sorted, segments -> y [Q, L, N], state.

    In a chunk, with Sc = S exp(m):  U = M (A Sc' + A_ak V),  Y = R Sc' + A_rb U + A_rk V,
    S <- (Sc + U'B + V'K) exp(c_L - m).
    """

    @staticmethod
    def forward(ctx, r, logw, k, v, a, b, state, segments):
        L, N = r.shape[1:]
        y, U, Sc = torch.empty_like(r), torch.empty_like(r), r.new_empty(len(r), N, N)
        S = state.flatten(0, 1).clone()
        for q, steps in segments:
            Ec, En, Ep, e_mid, e_end, AR, BK, G, mask, M = _intra7(r[q], logw[q], k[q], a[q], b[q])
            WA = M @ AR[:, :L]
            UV = torch.cat([M @ (G[:, :L, L:] @ v[q]), v[q]], 1)
            Sc_q = Sc[q]
            for alive, p in steps:
                torch.mul(S[:alive], e_mid[p], out=Sc_q[p])
                UV[p, :L].baddbmm_(WA[p], Sc_q[p].mT)
                torch.baddbmm(Sc_q[p], UV[p].mT, BK[p], out=S[:alive]).mul_(e_end[p])
            U[q] = UV[:, :L]
            torch.baddbmm(G[:, L:] @ UV, AR[:, L:], Sc_q.mT, out=y[q])
        ctx.save_for_backward(r, logw, k, v, a, b, U, Sc)
        ctx.segments = segments
        return y, S.view_as(state)

    @staticmethod
    def backward(ctx, dy, dstate):
        r, logw, k, v, a, b, U, Sc = ctx.saved_tensors
        L = r.shape[1]
        dr, dlogw, dk, dv, da, db = [torch.empty_like(r) for _ in range(6)]
        dS = dstate.flatten(0, 1).clone()
        for q, steps in reversed(ctx.segments):
            Ec, En, Ep, e_mid, e_end, AR, BK, G, mask, M = _intra7(r[q], logw[q], k[q], a[q], b[q])
            WAR = torch.cat([M @ AR[:, :L], AR[:, L:]], 1)
            UV, D = torch.cat([U[q], v[q]], 1), torch.empty_like(Sc[q])
            # rows: dU (dZ = M'dU after the loop), dY
            dZY = torch.cat([G[:, L:, :L].mT @ dy[q], dy[q]], 1)
            for alive, p in reversed(steps):
                torch.mul(dS[:alive], e_end[p], out=D[p])
                dZY[p, :L].baddbmm_(BK[p, :L], D[p].mT)
                torch.baddbmm(D[p], dZY[p].mT, WAR[p], out=dS[:alive]).mul_(e_mid[p])
            dZY[:, :L] = M.mT @ dZY[:, :L]
            torch.baddbmm(G[:, :, L:].mT @ dZY, BK[:, L:], D.mT, out=dv[q])
            dG = (dZY @ UV.mT).mul_(mask)
            dAR = torch.baddbmm(dZY @ Sc[q], dG, BK)
            UVD = UV @ D
            dBK = torch.baddbmm(UVD, dG.mT, AR)
            torch.mul(dAR[:, :L], Ep, out=da[q])
            torch.mul(dAR[:, L:], Ec, out=dr[q])
            torch.mul(dBK[:, :L], En, out=db[q])
            torch.mul(dBK[:, L:], En, out=dk[q])
            # Every factor depends on c through its exponent; the chunk's end carries what all later
            # tokens need.
            dAR *= AR
            dc = dAR[:, L:] - (BK * dBK).view(-1, 2, L, BK.shape[-1]).sum(1)
            dc[:, :-1] += dAR[:, 1:L]
            dc[:, -1] += (Sc[q] * D).sum(1) + (BK * UVD).sum(1)
            dlogw[q] = suffix_sum(dc)
        return dr, dlogw, dk, dv, da, db, dS.view_as(dstate), None


# ----------------------------------------------------------------------------------------------
# WKV-6: no inverse, but a decay without a lower bound, so no single reference point keeps the
# factors in range


def _levels6(r, logw, k):
    """Scores r_i k_j exp(decay from j to i) of all pairs i > j in a chunk, by midpoints of blocks.

    For n = L/2 … 1 the lower left n x n quadrant of every 2n block refers its decays to the block's
    middle. Both factors are then <= 1 however fast the decay, and each exponent is a sum over its
    own tokens, never a difference of two large sums.

    Yields (n, R', K', exponential of R', of K'), each [Q L / 2n, n, N].
    """
    Q, L, N = r.shape
    n = L // 2
    while n:
        R, W, K = (x.view(-1, 2 * n, N) for x in (r, logw, k))
        before = sum_before(W[:, n:]).exp()  # the decay of tokens n .. i-1
        after = sum_after(W[:, :n]).exp()  # and of tokens j+1 .. n-1
        yield n, R[:, n:] * before, K[:, :n] * after, before, after
        n //= 2


class Chunked6(torch.autograd.Function):
    """r logw k v [Q, L, N], u [Q, 1, N], state [D, H, N, N] sorted, segments -> y, state.

    With c the cumulative log decay, A the scores and d = r . (u k):
    Y = (R exp(c_prev)) S' + (A + diag d) V,  S <- S exp(c_L) + V' K exp(c_L - c).
    """

    @staticmethod
    def forward(ctx, r, logw, k, v, u, state, segments):
        N = r.shape[-1]
        y, S0 = torch.empty_like(r), r.new_empty(len(r), N, N)
        S = state.flatten(0, 1).clone()
        for q, steps in segments:
            from_start, to_end = sum_before(logw[q]).exp(), sum_after(logw[q]).exp()
            A = torch.diag_embed((r[q] * u[q] * k[q]).sum(-1))
            for n, R, K, _, _ in _levels6(r[q], logw[q], k[q]):
                diagonal_blocks(A, 2 * n)[..., n:, :n] = (R @ K.mT).view(len(A), -1, n, n)
            P, new = logw[q].sum(1, keepdim=True).exp(), v[q].mT @ (k[q] * to_end)
            S0_q = S0[q]
            for alive, p in steps:
                S0_q[p] = S[:alive]
                torch.addcmul(new[p], S0_q[p], P[p], out=S[:alive])
            torch.baddbmm(A @ v[q], r[q] * from_start, S0_q.mT, out=y[q])
        ctx.save_for_backward(r, logw, k, v, u, S0)
        ctx.segments = segments
        return y, S.view_as(state)

    @staticmethod
    def backward(ctx, dy, dstate):
        r, logw, k, v, u, S0 = ctx.saved_tensors
        dr, dlogw, dk, dv, du = (torch.empty_like(x) for x in (r, r, r, r, u))
        dS = dstate.flatten(0, 1).clone()
        for q, steps in reversed(ctx.segments):
            from_start, to_end = sum_before(logw[q]).exp(), sum_after(logw[q]).exp()
            P, D = logw[q].sum(1, keepdim=True).exp(), torch.empty_like(S0[q])
            new = dy[q].mT @ (r[q] * from_start)
            for alive, p in reversed(steps):
                D[p] = dS[:alive]
                torch.addcmul(new[p], D[p], P[p], out=dS[:alive])
            # rho, kappa: gradients of r and k without the bonus. The decay's gradient is summed
            # where each decay acts, never as a difference of large terms, so that it stays exact
            # where the decay is fast and the gradient small.
            rho, kappa = (dy[q] @ S0[q]).mul_(from_start), (v[q] @ D).mul_(to_end)
            dW = sum_after(r[q] * rho) + sum_before(k[q] * kappa)
            dW += ((D * S0[q]).sum(1) * P[:, 0])[:, None]
            A, dA = torch.diag_embed((r[q] * u[q] * k[q]).sum(-1)), dy[q] @ v[q].mT
            for n, R, K, before, after in _levels6(r[q], logw[q], k[q]):
                diagonal_blocks(A, 2 * n)[..., n:, :n] = (R @ K.mT).view(len(A), -1, n, n)
                dA21 = diagonal_blocks(dA, 2 * n)[..., n:, :n].reshape(-1, n, n)
                dR, dK = dA21 @ K, dA21.mT @ R
                rho6, kappa6, dW6 = (x.view(-1, 2 * n, x.shape[-1]) for x in (rho, kappa, dW))
                rho6[:, n:] += dR * before
                kappa6[:, :n] += dK * after
                dW6[:, n:] += sum_after(dR * R)
                dW6[:, :n] += sum_before(dK * K)
            torch.baddbmm(A.mT @ dy[q], k[q] * to_end, D.mT, out=dv[q])
            delta = dA.diagonal(0, 1, 2)[..., None]  # dy_t . v_t  [Q, L, 1]
            torch.addcmul(rho, delta, u[q] * k[q], out=dr[q])
            torch.addcmul(kappa, delta, u[q] * r[q], out=dk[q])
            du[q] = (delta * r[q] * k[q]).sum(1, keepdim=True)
            dlogw[q] = dW
        return dr, dlogw, dk, dv, du, dS.view_as(dstate), None


# ----------------------------------------------------------------------------------------------


@torch.compiler.disable  # chunks are laid out in Python, for each length anew
def wkv(version, inputs, state, cu_seqlens):
    """Inputs as wkv_cuda.wkv7's or wkv6's, state in the dtype to compute in -> (y, state).

    cu_seqlens is None or an int64 tensor on the CPU.
    """
    r, inputs = inputs[0], [x.to(state.dtype) for x in inputs]
    L = 32  # fewer for short rows, and for a fast decay
    while L > 1 and r.shape[1] <= L // 2:
        L //= 2
    if version == 7:
        inputs[1] = logw = inputs[1].clamp(min=-MAX_EXPONENT)
        # Centred factors reach exp(L/2 * fastest decay); RWKV-7's own bound, 0.6065, allows chunks
        # of 128.
        fastest = -logw.detach().amin().item() if logw.numel() else 0.0
        while L > 1 and fastest * L > 2 * MAX_EXPONENT:
            L //= 2
    chunks = Chunks(r.shape, cu_seqlens, L, r.device)
    vectors = [chunks.split(x) for x in inputs if x.dim() == 4]
    if version == 6:
        u = inputs[4]  # [H, N] -> [Q, 1, N]
        vectors.append(u.repeat(len(vectors[0]) // len(u), 1)[:, None])
    form = Chunked7 if version == 7 else Chunked6
    y, state = form.apply(*vectors, state.index_select(0, chunks.order), chunks.segments)
    return chunks.join(y).to(r.dtype), state.index_select(0, chunks.rank)
