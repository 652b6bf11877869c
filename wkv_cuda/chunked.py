"""The recurrences in chunks of L tokens: a few batched matrix products instead of T dependent
steps.

Plain PyTorch, any device, float32 inside (float64 for float64 inputs). Forward and backward are
written out, so that memory is the inputs plus one state per chunk, and nothing grows with T x N x
N.

Shapes: Q chunk-heads (chunks of all sequences times heads), L tokens, N head size. A chunk step i
of every sequence stands together, longest sequence first, so that the state pass is a loop over
contiguous slices; a padded token has logw = 0 and r = k = v = a = b = 0, which leaves the state as
it is.
"""

import torch
import torch.nn.functional as F

# Of WKV-7's factors inside a chunk: the product of two, exp(80), still is a float32.
MAX_EXPONENT = 40.0
SEGMENT = {"cpu": 48}  # chunk-heads worked on at a time, elsewhere 4096


# ----------------------------------------------------------------------------------------------
# tokens <-> chunks


class Chunks:
    """Where the tokens of B rows, or of the D documents of one packed row, lie in chunks.

    alive[i]: how many sequences have an i-th chunk. order: sequence of each slot, longest first.
    index [n_chunks * L]: token of each place, of all laid end to end, B T for padding. back [B T]:
    place of each token.
    """

    def __init__(self, shape, cu_seqlens, L, device):
        self.shape, self.L, self.device, n_tokens = shape, L, device, shape[0] * shape[1]
        self.whole = (
            cu_seqlens is None
        )  # rows of one length: their chunks are a view, and no gather
        starts = (
            torch.arange(shape[0] + 1) * shape[1]
            if self.whole
            else torch.as_tensor(cu_seqlens).to("cpu", torch.int64)
        )
        lengths = starts.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        n = -(-lengths[order] // L)
        self.alive = [int((n > i).sum()) for i in range(int(n.max()) if len(n) else 0)]
        first = torch.cat(
            [starts[order[:m]] + i * L for i, m in enumerate(self.alive)] or [starts[:0]]
        )
        end = torch.cat([starts[1:][order[:m]] for m in self.alive] or [starts[:0]])
        index = first[:, None] + torch.arange(L)
        index = index.masked_fill(index >= end[:, None], n_tokens)
        back = torch.empty(n_tokens + 1, dtype=torch.int64)
        back[index.flatten()] = torch.arange(index.numel())
        self.order, self.index, self.back = (
            x.to(device) for x in (order, index.flatten(), back[:-1])
        )

    def split(self, x):
        """[B, T, H, N] -> [Q, L, N]"""
        B, T, H, N = x.shape
        if self.whole:
            x = (
                F.pad(x, (0, 0, 0, 0, 0, -T % self.L))
                .view(B, -1, self.L, H, N)
                .permute(1, 0, 3, 2, 4)
            )
        else:
            x = (
                torch.cat([x[0], x.new_zeros(1, H, N)])[self.index]
                .view(-1, self.L, H, N)
                .transpose(1, 2)
            )
        return x.reshape(-1, self.L, N).contiguous()

    def join(self, x):
        """[Q, L, N] -> [B, T, H, N]"""
        B, T, H, N = self.shape
        if self.whole:
            return x.view(-1, B, H, self.L, N).permute(1, 0, 3, 2, 4).reshape(B, -1, H, N)[:, :T]
        return x.view(-1, H, self.L, N).transpose(1, 2).reshape(-1, H, N)[self.back][None]

    def segments(self, H):
        """Consecutive chunk steps, [[(first chunk-head, end), …], …], enough of them for a good
        matrix product and few enough that a segment's temporaries stay in the cache (measured:
        twice as fast as all chunks at once)."""
        ends = torch.tensor([0] + self.alive).cumsum(0) * H
        segments, enough = [[]], SEGMENT.get(self.device.type, 4096)
        for step in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if segments[-1] and step[1] - segments[-1][0][0] > enough:
                segments.append([])
            segments[-1].append(step)
        return [s for s in segments if s]


def suffix_sum(x):
    """x_t + x_{t+1} + … along the tokens of a chunk: [Q, L, N]"""
    return x.flip(1).cumsum(1).flip(1)


def sum_before(x):
    """x_0 + … + x_{t-1}: [Q, L, N]"""
    return F.pad(x[:, :-1], (0, 0, 1, 0)).cumsum(1)


def sum_after(x):
    """x_{t+1} + … + x_{L-1}: [Q, L, N]"""
    return suffix_sum(F.pad(x[:, 1:], (0, 0, 0, 1)))


def unit_lower_inverse(A):
    """(I - A)^-1 of strictly lower triangular A [Q, L, L], L a power of two, by doubling blocks of
    true inverses: [[M1, 0], [M2 A21 M1, M2]]. Bounded where the Neumann product I + A + A^2 … is
    not (repeated keys)."""
    Q, L = A.shape[:2]
    # L (L + 1) numbers a matrix, the last L unused: then the diagonal blocks of all matrices are
    # one evenly spaced batch
    M, A_ = A.new_zeros(Q, L * (L + 1)), A.new_empty(Q, L * (L + 1))
    M[:, : L * L : L + 1] = 1
    A_[:, : L * L].view(Q, L, L).copy_(A)
    n = 1
    while n < L:
        size, stride, below = (Q * L // (2 * n), n, n), (2 * n * (L + 1), L, 1), n * L
        M1, M2, M21 = (M.as_strided(size, stride, at) for at in (0, below + n, below))
        A21 = A_.as_strided(size, stride, below)
        M21.copy_(torch.bmm(M2, torch.bmm(A21, M1)) if n > 1 else A21)
        n *= 2
    return M[:, : L * L].view(Q, L, L)


# ----------------------------------------------------------------------------------------------
# WKV-7


def _intra7(r, logw, k, a, b):
    """What a chunk can know without its incoming state, decays referred to the chunk's middle.

    With c the cumulative log decay and m its value in the middle: AR = [a exp(c_prev - m); r exp(c
    - m)] and BK = [b; k] exp(m - c), both [Q, 2L, N]; G = their scores, causal, [Q, 2L, 2L]; M = (I
    - A_ab)^-1.
    """
    L = r.shape[1]
    c = logw.cumsum(1)
    mid = c[:, (L - 1) // 2, None]
    Ec, En = (c - mid).exp(), (mid - c).exp()
    Ep = (c - logw - mid).exp()
    AR, BK = torch.cat([a * Ep, r * Ec], 1), torch.cat([b * En, k * En], 1)
    G = AR @ BK.mT
    causal = torch.ones(L, L, dtype=G.dtype, device=G.device).tril()
    mask = torch.cat(
        [(causal - torch.eye(L, dtype=G.dtype, device=G.device)).repeat(1, 2), causal.repeat(1, 2)]
    )
    G *= mask
    M = unit_lower_inverse(G[:, :L, :L])
    return Ec, En, Ep, mid.exp(), (c[:, -1:] - mid).exp(), AR, BK, G, mask, M


class Chunked7(torch.autograd.Function):
    """r logw k v a b [Q, L, N], state [D, H, N, N] sorted, segments -> y [Q, L, N], state.
    Formulas: in a chunk, with Sc = S exp(m):  U = M (A Sc' + A_ak V),  Y = R Sc' + A_rb U + A_rk V,
    S <- (Sc + U'B + V'K) exp(c_L - m)."""

    @staticmethod
    def forward(ctx, r, logw, k, v, a, b, state, segments):
        L, N = r.shape[1:]
        y, U, Sc = torch.empty_like(r), torch.empty_like(r), r.new_empty(len(r), N, N)
        S = state.flatten(0, 1).clone()
        for steps in segments:
            q = slice(steps[0][0], steps[-1][1])
            Ec, En, Ep, e_mid, e_end, AR, BK, G, mask, M = _intra7(r[q], logw[q], k[q], a[q], b[q])
            WA = M @ AR[:, :L]
            UV = torch.cat([M @ (G[:, :L, L:] @ v[q]), v[q]], 1)
            for i, j in steps:
                n, p = j - i, slice(i - q.start, j - q.start)
                torch.mul(S[:n], e_mid[p], out=Sc[i:j])
                UV[p, :L].baddbmm_(WA[p], Sc[i:j].mT)
                torch.baddbmm(Sc[i:j], UV[p].mT, BK[p], out=S[:n]).mul_(e_end[p])
            U[q] = UV[:, :L]
            torch.baddbmm(G[:, L:] @ UV, AR[:, L:], Sc[q].mT, out=y[q])
        ctx.save_for_backward(r, logw, k, v, a, b, U, Sc)
        ctx.segments = segments
        return y, S.view_as(state)

    @staticmethod
    def backward(ctx, dy, dstate):
        r, logw, k, v, a, b, U, Sc = ctx.saved_tensors
        L = r.shape[1]
        dr, dlogw, dk, dv, da, db = [torch.empty_like(r) for _ in range(6)]
        dS = dstate.flatten(0, 1).clone()
        for steps in reversed(ctx.segments):
            q = slice(steps[0][0], steps[-1][1])
            Ec, En, Ep, e_mid, e_end, AR, BK, G, mask, M = _intra7(r[q], logw[q], k[q], a[q], b[q])
            WAR = torch.cat([M @ AR[:, :L], AR[:, L:]], 1)
            UV, D = torch.cat([U[q], v[q]], 1), torch.empty_like(Sc[q])
            dZY = torch.cat(
                [G[:, L:, :L].mT @ dy[q], dy[q]], 1
            )  # rows: dU (dZ = M'dU after the loop), dY
            for i, j in reversed(steps):
                n, p = j - i, slice(i - q.start, j - q.start)
                torch.mul(dS[:n], e_end[p], out=D[p])
                dZY[p, :L].baddbmm_(BK[p, :L], D[p].mT)
                torch.baddbmm(D[p], dZY[p].mT, WAR[p], out=dS[:n]).mul_(e_mid[p])
            dZY[:, :L] = M.mT @ dZY[:, :L]
            torch.baddbmm(G[:, :, L:].mT @ dZY, BK[:, L:], D.mT, out=dv[q])
            dG = (dZY @ UV.mT).mul_(mask)
            dAR = torch.baddbmm(dZY @ Sc[q], dG, BK)
            UVD = UV @ D
            dBK = torch.baddbmm(UVD, dG.mT, AR)
            for grad, d, e in (
                (da, dAR[:, :L], Ep),
                (dr, dAR[:, L:], Ec),
                (db, dBK[:, :L], En),
                (dk, dBK[:, L:], En),
            ):
                torch.mul(d, e, out=grad[q])
            # every factor depends on c through its exponent; the chunk's end carries what all later
            # tokens need
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
    """Scores r_i k_j exp(decay from j to i) of all pairs i > j in a chunk, by hierarchical
    midpoints: for n = L/2 … 1 the lower left n x n quadrant of every 2n block refers its decays to
    the block's middle. Both factors are then <= 1 however fast the decay, and each exponent is a
    sum over its own tokens, never a difference of two large sums.

    Yields (n, R', K', exponential of R', of K'), each [Q L / 2n, n, N]."""
    Q, L, N = r.shape
    n = L // 2
    while n:
        R, W, K = (x.view(-1, 2 * n, N) for x in (r, logw, k))
        before, after = (
            sum_before(W[:, n:]).exp(),
            sum_after(W[:, :n]).exp(),
        )  # tokens n .. i-1; j+1 .. n-1
        yield n, R[:, n:] * before, K[:, :n] * after, before, after
        n //= 2


def _quadrants(A, n):
    """[Q, L, L] -> view [Q, L / 2n, n, n] of the lower left quadrants of its diagonal 2n blocks."""
    Q, L = A.shape[:2]
    return (
        A.view(Q, L // (2 * n), 2 * n, L // (2 * n), 2 * n)
        .diagonal(0, 1, 3)
        .movedim(-1, 1)[..., n:, :n]
    )


class Chunked6(torch.autograd.Function):
    """r logw k v [Q, L, N], u [Q, 1, N], state [D, H, N, N] sorted, segments -> y, state. With c
    the cumulative log decay, A the scores and d = r . (u k):  Y = (R exp(c_prev)) S' + (A + diag d)
    V;  S <- S exp(c_L) + V' K exp(c_L - c)."""

    @staticmethod
    def forward(ctx, r, logw, k, v, u, state, segments):
        L, N = r.shape[1:]
        y, S0 = torch.empty_like(r), r.new_empty(len(r), N, N)
        S = state.flatten(0, 1).clone()
        for steps in segments:
            q = slice(steps[0][0], steps[-1][1])
            from_start, to_end = sum_before(logw[q]).exp(), sum_after(logw[q]).exp()
            A = torch.diag_embed((r[q] * u[q] * k[q]).sum(-1))
            for n, R, K, _, _ in _levels6(r[q], logw[q], k[q]):
                _quadrants(A, n).copy_((R @ K.mT).view(len(A), -1, n, n))
            P, new = logw[q].sum(1, keepdim=True).exp(), v[q].mT @ (k[q] * to_end)
            for i, j in steps:
                m, p = j - i, slice(i - q.start, j - q.start)
                S0[i:j] = S[:m]
                torch.addcmul(new[p], S0[i:j], P[p], out=S[:m])
            torch.baddbmm(A @ v[q], r[q] * from_start, S0[q].mT, out=y[q])
        ctx.save_for_backward(r, logw, k, v, u, S0)
        ctx.segments = segments
        return y, S.view_as(state)

    @staticmethod
    def backward(ctx, dy, dstate):
        r, logw, k, v, u, S0 = ctx.saved_tensors
        dr, dlogw, dk, dv, du = (torch.empty_like(x) for x in (r, r, r, r, u))
        dS = dstate.flatten(0, 1).clone()
        for steps in reversed(ctx.segments):
            q = slice(steps[0][0], steps[-1][1])
            from_start, to_end = sum_before(logw[q]).exp(), sum_after(logw[q]).exp()
            P, D = logw[q].sum(1, keepdim=True).exp(), torch.empty_like(S0[q])
            new = dy[q].mT @ (r[q] * from_start)
            for i, j in reversed(steps):
                m, p = j - i, slice(i - q.start, j - q.start)
                D[p] = dS[:m]
                torch.addcmul(new[p], D[p], P[p], out=dS[:m])
            # rho, kappa: gradients of r and k without the bonus. The decay's gradient is summed
            # where each decay acts, never as a difference of large terms, so that it stays exact
            # where the decay is fast and the gradient small
            rho, kappa = (dy[q] @ S0[q]).mul_(from_start), (v[q] @ D).mul_(to_end)
            dW = sum_after(r[q] * rho) + sum_before(k[q] * kappa)
            dW += ((D * S0[q]).sum(1) * P[:, 0])[:, None]
            A, dA = torch.diag_embed((r[q] * u[q] * k[q]).sum(-1)), dy[q] @ v[q].mT
            for n, R, K, before, after in _levels6(r[q], logw[q], k[q]):
                _quadrants(A, n).copy_((R @ K.mT).view(len(A), -1, n, n))
                dA21 = _quadrants(dA, n).reshape(-1, n, n)
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


def wkv(version, inputs, state, cu_seqlens, L=32):
    """Inputs as wkv_cuda.wkv7's or wkv6's, state given; -> (y in r's dtype, state)."""
    shape, dtype = inputs[0].shape, torch.promote_types(inputs[0].dtype, torch.float32)
    r, logw, k, v, *rest = [x.to(dtype) for x in inputs]
    fastest = 0.0
    if version == 7:
        logw = logw.clamp(min=-MAX_EXPONENT)
        # centred factors reach exp(L/2 * fastest decay); RWKV-7's own bound, 0.6065, allows chunks
        # of 128
        fastest = -logw.detach().amin().item() if logw.numel() else 0.0
    while L > 1 and (fastest * L > 2 * MAX_EXPONENT or shape[1] <= L // 2):
        L //= 2
    chunks = Chunks(shape, cu_seqlens, L, r.device)
    split = [chunks.split(x) for x in (r, logw, k, v, *rest) if x.dim() == 4]
    if version == 6:
        split.append(rest[0].repeat(len(split[0]) // shape[2], 1)[:, None])
    form = Chunked7 if version == 7 else Chunked6
    y, S = form.apply(*split, state[chunks.order].to(dtype), chunks.segments(shape[2]))
    last = torch.empty_like(S).index_copy(0, chunks.order, S).to(state.dtype)
    return chunks.join(y).to(inputs[0].dtype), last
