// WKV-7 (RWKV-7 "Goose", arXiv:2503.14456) on tensor cores, 16 tokens at a time, head size 64, bf16.
//   sa_t = S_{t-1} a_t;   S_t = S_{t-1} diag(w_t) + sa_t b_t' + v_t k_t';   y_t = S_t r_t
//
// Inside a chunk, with c_t the sum of log w up to token t and m half of the chunk's whole sum, per channel:
//   A_t = a_t exp(c_{t-1} - m),  R_t = r_t exp(c_t - m),  B_t = b_t exp(m - c_t),  K_t = k_t exp(m - c_t),  Z = S0 exp(m)
//   AB, AK = tril(A B', A K'; -1),   RB, RK = tril(R B', R K'),   M = (1 - AB)^-1
//   U = M (A Z' + AK V)   (row t is sa_t),   Y = R Z' + RK V + RB U,   S <- (Z + U' B + V' K) exp(m)
// A chunk ends early where a channel's sum would pass -14, so the factors are never large: RWKV-7 itself reaches -9.7
// in 16 tokens. A single log w below -14 counts as -14, a factor of 1e-6.
#include "chunk.cuh"

namespace {

constexpr float LOG2_E = 1.44269504f, LIMIT = 14 * LOG2_E;  // in the kernels the logs are to base 2

constexpr int HALF = L / 2;

template <typename W> struct Inputs {
    const bf16* r;
    const W* logw;
    const bf16 *k, *v, *a, *b, *dy;
};

template <typename W> struct Chunk {  // in shared memory
    W logw[L][N];
    bf16 r[L][N], k[L][N], v[L][N], a[L][N], b[L][N];     // a block of tokens as it comes
    __half A[L * N], R[L * N], B[L * N], K[L * N], V[L * N];
    __half M_low[L * L], AK[L * L], RB[L * L], RK[L * L], M[L * L];  // the inverse: M + M_low
    float largest[LARGEST][4];
    union {                       // each is read before the next is written, the last before the next chunk's first
        float sums[4][N];         // of log w over each warp's tokens
        float solve[2][HALF][HALF + 4], inverted[2][HALF][HALF + 2];
    };
    union {
        float exp_m[N];                                   // the forward pass only
        struct {                                          // the backward pass only
            __half U[N * L], dZ[N * L];                   // transposed
            bf16 dy[L][N];
            __half DY[L * N], S[N * N], D[N * N];
            float exp_c[L + 1][N];                        // exp(c - m), before the first token and after each
        };
    };
};
static_assert(4 * (sizeof(Chunk<float>) + 1024) <= 228 * 1024, "four blocks share a multiprocessor's memory");
template <typename W> constexpr int FORWARD_BYTES = offsetof(Chunk<W>, exp_m) + sizeof(Chunk<W>::exp_m);

// start copying the n tokens at `first` of head h
template <typename W> __device__ __forceinline__ void fetch(Chunk<W>& m, const Inputs<W>& in, int first, int n, int H, int h) {
    const Source x = source(first, n, H, h);
    copy(m.logw, in.logw, x, x.valid);
    copy(m.r, in.r, x, x.valid), copy(m.k, in.k, x, x.valid);
    copy(m.v, in.v ? in.v : in.r, x, in.v && x.valid);
    copy(m.a, in.a, x, x.valid), copy(m.b, in.b, x, x.valid);
    if (in.dy) copy(m.dy, in.dy, x, x.valid);
}

// In the forward pass a state is multiplied by exp(m) at a chunk's end and by the next one's at its start, of which each
// lane of a warp knows two channels: both are done at once.
struct Pending { float x, y; };
__device__ __forceinline__ void put_exp(float* exp_m, float x, float y) {
    *reinterpret_cast<float2*>(exp_m + place()) = make_float2(power_of_2(x), power_of_2(y));
}
__device__ __forceinline__ float most(const Pending& m) {  // of exp(m)
    return warp_max(power_of_2(fmaxf(m.x, m.y)));
}
template <typename W> __device__ __forceinline__ void no_longer(Chunk<W>& m, const Pending& pending) {
    __syncthreads();
    if (threadIdx.x < 32) put_exp(m.exp_m, pending.x, pending.y);
    __syncthreads();
}

// A R B K V (DY) for the chunk that begins at token lo of a block and ends at token n or before; zeros for other tokens.
// Returns the chunk's end; m is the middle. Warp w makes tokens 4 w .. 4 w + 3, which it has copied itself; lane i channels 2 i and 2 i + 1.
template <bool BACKWARD, typename W>
__device__ __forceinline__ int prepare(Chunk<W>& m, int lo, int n, Scales& scale, Pending* pending = nullptr) {
    const int warp = threadIdx.x / 32, first = warp * 4, j = threadIdx.x % 32 * 2;
    auto logw = [&](int t) {
        const float2 f = f32x2(&m.logw[t][j]), x = {f.x * LOG2_E, f.y * LOG2_E};
        return make_float2(x.x < -LIMIT ? -LIMIT : x.x, x.y < -LIMIT ? -LIMIT : x.y);  // NaN stays NaN
    };
    float2 own[4];
    uint32_t raw_v[4], raw_k[4], raw_r[4], raw_dy[4], most_v = 0, most_k = 0, most_r = 0, most_dy = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = first + i;
        const float2 x = logw(t);
        own[i] = t >= lo && t < n ? x : make_float2(0, 0);
        raw_v[i] = two(&m.v[t][j]), raw_k[i] = two(&m.k[t][j]), raw_r[i] = two(&m.r[t][j]);
        most_v = larger_of_each(most_v, raw_v[i]), most_k = larger_of_each(most_k, raw_k[i]);
        most_r = larger_of_each(most_r, raw_r[i]);
        if (BACKWARD) raw_dy[i] = two(&m.dy[t][j]), most_dy = larger_of_each(most_dy, raw_dy[i]);
    }
    *reinterpret_cast<float2*>(&m.sums[warp][j]) = make_float2((own[0].x + own[1].x) + (own[2].x + own[3].x),
                                                               (own[0].y + own[1].y) + (own[2].y + own[3].y));
    m.largest[OF_V][warp] = largest(most_v), m.largest[OF_K][warp] = largest(most_k);
    m.largest[OF_R][warp] = largest(most_r);
    if (BACKWARD) m.largest[OF_DY][warp] = largest(most_dy);
    __syncthreads();
    float2 c = {0, 0}, before = {0, 0};  // sums over the chunk, over its tokens before `first`
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float2 x = f32x2(&m.sums[w][j]);
        if (w == warp) before = c;
        c.x += x.x, c.y += x.y;
    }
    int hi = n;
    if (!every(c.x >= -LIMIT && c.y >= -LIMIT)) {
        c = before = {0, 0};
        for (hi = lo; hi < n; hi++) {
            const float2 x = logw(hi);
            if (hi > lo && !every(c.x + x.x >= -LIMIT && c.y + x.y >= -LIMIT)) break;
            if (hi == first) before = c;
            c.x += x.x, c.y += x.y;
        }
        if (hi <= first) before = c;
    }
    scale = scales<BACKWARD>(m.largest);
    const float v_scale = scale.value * inverse(scale.k), dy_scale = scale.grad * inverse(scale.r);
    const float2 mid = {c.x / 2, c.y / 2};
    c = before;
    float2 e = {power_of_2(c.x - mid.x), power_of_2(c.y - mid.y)};
    if (BACKWARD && warp == 0) *reinterpret_cast<float2*>(m.exp_c[0] + place()) = e;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = first + i;
        const uint32_t mask = t >= lo && t < hi ? ~0u : 0;
        const float2 a = f32x2(&m.a[t][j]), r = f32x2(raw_r[i]), b = f32x2(&m.b[t][j]), k = f32x2(raw_k[i]);
        put_pair(m.A, t, a.x * e.x, a.y * e.y, mask);
        if (t < hi) c.x += own[i].x, c.y += own[i].y;
        e = {power_of_2(c.x - mid.x), power_of_2(c.y - mid.y)};
        const float2 f = {power_of_2(mid.x - c.x), power_of_2(mid.y - c.y)};
        put_pair(m.R, t, r.x * (e.x * scale.r), r.y * (e.y * scale.r), mask);
        put_pair(m.B, t, b.x * f.x, b.y * f.y, mask);
        put_pair(m.K, t, k.x * (f.x * scale.k), k.y * (f.y * scale.k), mask);
        const float2 v = f32x2(raw_v[i]);
        put_pair(m.V, t, v.x * v_scale, v.y * v_scale);
        if (BACKWARD) {
            const float2 dy = f32x2(raw_dy[i]);
            put_pair(m.DY, t, dy.x * dy_scale, dy.y * dy_scale);
            *reinterpret_cast<float2*>(m.exp_c[t + 1] + (place() ^ swapped(t + 1))) = e;
        }
    }
    if (!BACKWARD) {
        if (warp == 0) put_exp(m.exp_m, mid.x + pending->x, mid.y + pending->y);
        pending->x = mid.x, pending->y = mid.y;
    }
    return hi;
}

// two numbers as halves, and what the halves leave
__device__ __forceinline__ void halves(uint32_t* x, float a, float b) {
    x[0] = pack(a, b);
    const float2 f = unpack(x[0]);
    x[1] = pack(a - f.x, b - f.y);
}
// C = X Y of 8 x 8 blocks, each lane with its two numbers of a row of X, of a column of Y and of a row of C. One product
// of 16 x 16: X's halves above what they leave, twice beside each other, times Y's halves above what they leave
__device__ __forceinline__ void product(float* c, const uint32_t* x, const uint32_t* y) {
    float sum[4] = {0, 0, 0, 0};
    const uint32_t twice[4] = {x[0], x[1], x[0], x[1]};
    mma(sum, twice, y[0], y[1]);
    c[0] = sum[0] + sum[2], c[1] = sum[1] + sum[3];
}

// The inverse of 1 - AB, AB = [P 0; Q R] of 8 x 8 blocks: [P* 0; R* Q P*  R*], P* = (1 - P)^-1, R* = (1 - R)^-1. P* and R*
// column by column, x = e + P x in fp32, each lane its own column: bounded also where one key comes again and again,
// which the sum 1 + AB + AB^2 + ... is not. The two products on tensor cores with factors of 22 bits. One warp; AB in its
// registers.
template <typename W> __device__ __forceinline__ void invert(Chunk<W>& m, float (*c)[4]) {
    const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;  // where this lane has two numbers of a block
    const int block = threadIdx.x / HALF % 2, column = threadIdx.x % HALF;
#pragma unroll
    for (int i = 0; i < 2; i++) m.solve[0][pair + i][row] = c[0][i], m.solve[1][pair + i][row] = c[1][2 + i];
    __syncwarp();
    float x[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++) x[i] = i == column;
#pragma unroll
    for (int j = 0; j < HALF - 1; j++)
#pragma unroll
        for (int i = (j + 1) / 4 * 4; i < HALF; i += 4) {
            const float4 f = *reinterpret_cast<const float4*>(&m.solve[block][j][i]);  // zeros down to row j
            x[i] += f.x * x[j], x[i + 1] += f.y * x[j], x[i + 2] += f.z * x[j], x[i + 3] += f.w * x[j];
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < HALF; i++) m.inverted[block][i][column] = x[i];
    __syncwarp();
    const float2 P = f32x2(&m.inverted[0][row][pair]), R = f32x2(&m.inverted[1][row][pair]);
    float low[2];
    uint32_t high[4], rest[4], Pt[2], Rs[2], q[2];
    halves(Pt, m.inverted[0][pair][row], m.inverted[0][pair + 1][row]), halves(q, c[0][2], c[0][3]);
    product(low, Pt, q);  // (Q P*)', of which a lane has two numbers of a row: of a column of Q P*
    halves(Rs, R.x, R.y), halves(q, low[0], low[1]);
    product(low, Rs, q);
    const float2 all[4] = {P, make_float2(low[0], low[1]), make_float2(0, 0), R};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t x[2];
        halves(x, all[i].x, all[i].y);
        high[i] = x[0], rest[i] = x[1];
    }
    store<16>(m.M, 0, 0, high), store<16>(m.M_low, 0, 0, rest);
    __syncwarp();
}

// each warp one of AB, AK, RB, RK; of AB only the inverse is kept
template <typename W> __device__ __forceinline__ void scores(Chunk<W>& m) {
    const int warp = threadIdx.x / 32;
    float c[2][4];
    zero(c);
#pragma unroll
    for (int x = 0; x < 4; x++) {
        uint32_t p[4], q[4];
        left<64>(p, warp < 2 ? m.A : m.R, 0, 2 * x);
        right_t<64>(q, warp % 2 ? m.K : m.B, 0, 2 * x);
        multiply(c, p, q);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (column_of(i / 4, i % 4) > row_of(i % 4) - (warp < 2)) c[i / 4][i % 4] = 0;
    if (warp == 0) invert(m, c);
    else store(m.M_low + warp * L * L, c);
}

// X <- X M' or, T, X M. With one key again and again most of X cancels: both factors are kept to 22 bits
template <bool T, typename W> __device__ __forceinline__ void by_inverse(Chunk<W>& m, float (*X)[4]) {
    uint32_t high[4], low[4], M[4], M_low[4];
    round(high, X);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = unpack(high[i]);
        float* x = X[i / 2] + i % 2 * 2;
        low[i] = pack(x[0] - f.x, x[1] - f.y);
    }
    if (T) right<16>(M, m.M, 0, 0), right<16>(M_low, m.M_low, 0, 0);
    else right_t<16>(M, m.M, 0, 0), right_t<16>(M_low, m.M_low, 0, 0);
    zero(X);
    multiply(X, high, M_low);
    multiply(X, low, M);
    multiply(X, high, M);
}

// U' = (Z A' + V' AK') M' for this warp's rows; on entry Zt = Z A'
template <typename W> __device__ __forceinline__ void solve(Chunk<W>& m, uint32_t* U, float (*Zt)[4], const uint32_t* V) {
    uint32_t q[4];
    right_t<16>(q, m.AK, 0, 0);
    multiply(Zt, V, q);
    by_inverse<false>(m, Zt);
    round(U, Zt);
}

#include "wkv7_spans.cuh"

// One block per (sequence or span, head). With `starts`, Z is kept every `every` tokens.
template <typename W, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) forward(
        int S_, int H, int total, const int* cu, int span, int every, Inputs<W> in, const float* __restrict__ state, bf16* y,
        float* state_out, __half* starts, float* spans) {
    Chunk<W>& m = *reinterpret_cast<Chunk<W>*>(shared_memory());
    const int h = blockIdx.x % H, warp = threadIdx.x / 32;
    Part part;
    if (!find(part, cu, S_, span, blockIdx.x / H, every)) return;
    check(cu, part.s, S_, total);
    const int first = part.first, last = part.last;
    if (starts) starts += ((size_t)part.chunk * H + h) * STATE;
    float S[4][2][4], S_scale = 1;
    Pending pending = {0, 0};
    begin(S, part, H, h, state, spans, false);
    m.largest[OF_S][warp] = largest(S);
    if (first < last) fetch(m, in, first, min(L, last - first), H, h);
    for (int t = first; t < last; t += L) {
        const int n = min(L, last - t);
        bf16* out = y + ((size_t)t * H + h) * N;
        for (int lo = 0, hi; lo < n; lo = hi) {
            Scales scale;
            if (lo == 0) wait_for_copies();
            __syncwarp();
            hi = prepare<false>(m, lo, n, scale, &pending);
            __half* const keep = lo == 0 && ((t - first) & (every - 1)) == 0 ? starts : nullptr;
            if (keep) keep_scale(keep, scale.value), starts += (size_t)H * STATE;
            __syncthreads();
            if (hi == n && t + L < last) fetch(m, in, t + L, min(L, last - t - L), H, h);
            scores(m);
            scale_columns(S, m.exp_m, scale.value * inverse(S_scale));  // Z
            S_scale = scale.value;
            float Zt[2][4], Y[2][4];
            zero(Zt), zero(Y);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                uint32_t p[4], q[4];
                round(p, S[x]);
                if (keep) keep_tile(keep, x, p);
                right_t<64>(q, m.A, 0, 2 * x);
                multiply(Zt, p, q);
                left<64>(q, m.R, 0, 2 * x);
                multiply_t(Y, q, p);
            }
            __syncthreads();
            uint32_t V[4], U[4], q[4];
            left_t<64>(V, m.V, 0, 2 * warp);
            solve(m, U, Zt, V);
            left<16>(q, m.RK, 0, 0);
            multiply_t(Y, q, V);
            left<16>(q, m.RB, 0, 0);
            multiply_t(Y, q, U);
            put_rows(out, H, Y, inverse(scale.value) * inverse(scale.r), lo, hi);
            add_outer(S, U, m.B), add_outer(S, V, m.K);
            m.largest[OF_S][warp] = largest(S) * most(pending) * inverse(S_scale);
        }
    }
    no_longer(m, pending);
    scale_columns(S, m.exp_m, inverse(S_scale));
    end(S, part, H, h, state_out, spans, false);
}

// One block per (sequence or span, head), last token first; G = dL/dS. In a chunk, with D = G exp(m):
//   dU = RB' dY + B D',  dZ = M' dU,  dV = RK' dY + AK' dZ + K D',  G <- (D + dZ' A + dY' R) exp(m)
//   dAB, dAK = tril(dZ U', dZ V'; -1),  dRB, dRK = tril(dY U', dY V')
//   dR = dY Z + dRK K + dRB B,  dA = dZ Z + dAB B + dAK K,  dK = V D + dRK' R + dAK' A,  dB = U D + dRB' R + dAB' A
//   dlogw_t = colsum(Z D) + sum_all (B (U D) + K (V D)) + sum_{i >= t} (R dR - B dB - K dK)_i + sum_{i > t} (A dA)_i
// No chunk's sum reaches into another. Z is as it was kept, or from there run forward again through the chunks in between.
template <typename W, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) backward(
        int S_, int H, const int* cu, int span, int every, Inputs<W> in, const __half* starts, const float* dstate_out,
        bf16* dr, W* dlogw, bf16* dk, bf16* dv, bf16* da, bf16* db, float* dstate, const float* spans) {
    Chunk<W>& m = *reinterpret_cast<Chunk<W>*>(shared_memory());
    const int h = blockIdx.x % H, warp = threadIdx.x / 32;
    Part part;
    if (!find(part, cu, S_, span, blockIdx.x / H, every)) return;
    const int s = part.s, first = part.first, last = part.last;
    float G[4][2][4];
    uint4 kept[4];  // Z in halves or, from one chunk to the next, S
    float* const exp_m = m.exp_c[L];  // after the last token c - m is m
#pragma unroll
    for (int x = 0; x < 4; x++) zero(G[x]);
    if (!part.closes) load(G, spans + ((size_t)part.border * H + h) * N * N);
    else if (dstate_out) load(G, dstate_out + ((size_t)s * H + h) * N * N);
    m.largest[OF_G][warp] = largest(G);
    int loaded = -1;  // the block of tokens in m, or on its way there
    auto need = [&](int block) {
        if (block >= first && block != loaded) fetch(m, in, loaded = block, min(L, last - block), H, h);
    };
    const int segments = (last - first + every - 1) / every;
    auto kept_at = [&](int segment) { return starts + ((size_t)(part.chunk + segment) * H + h) * STATE; };
    float next_scale = !segments ? 1 : scale_of(kept_at(segments - 1));
    for (int segment = segments - 1; segment >= 0; segment--) {
        const int begin = first + segment * every;
        const float segment_scale = next_scale;
        need(begin);
        for (int stop = min(every, last - begin), lo; stop > 0; stop = lo) {  // the chunk that ends at `stop`
            Scales scale;
            float kept_scale = segment_scale;
            restore(kept, kept_at(segment));
            if (segment) next_scale = scale_of(kept_at(segment - 1));
            uint32_t U[4], V[4];
            int hi;
            for (lo = 0;; lo = hi) {
                const int block = lo / L * L;
                m.largest[OF_S][warp] = 7.99f * inverse(kept_scale);
                wait_for_copies();
                __syncwarp();
                hi = block + prepare<true>(m, lo - block, min(stop - block, L), scale);
                __syncthreads();
                // the block after this one: on the way to `stop`, back at the start, the segment before
                if (hi < stop) need(begin + hi / L * L);
                else need(lo == 0 ? begin - every : begin);
                scores(m);
                float Zt[2][4];
                zero(Zt);
                if (lo > 0) {
                    float S[4][2][4];
                    unpack(S, kept, 1);
                    scale_columns(S, exp_m, scale.value * inverse(kept_scale));
                    pack(kept, S, 1);
                }
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const uint32_t p[4] = {kept[x].x, kept[x].y, kept[x].z, kept[x].w};
                    uint32_t q[4];
                    right_t<64>(q, m.A, 0, 2 * x);
                    multiply(Zt, p, q);
                    if (hi == stop) store<64>(m.S, 16 * warp, 2 * x, p);
                }
                __syncthreads();
                left_t<64>(V, m.V, 0, 2 * warp);
                solve(m, U, Zt, V);
                if (hi == stop) break;
                float S[4][2][4];
                forget(kept);
                unpack(S, kept, 1);
                add_outer(S, U, m.B), add_outer(S, V, m.K);
                scale_columns(S, exp_m, inverse(scale.value));
                kept_scale = scale_for(largest(S));
                pack(kept, S, kept_scale);
            }
            const int from = lo % L, to = hi - lo / L * L;
            const size_t p = ((size_t)(begin + lo / L * L) * H + h) * N;
            {
                uint32_t DY[4], dZ[4], q[4];
                float dV[2][4], dU[2][4];
                zero(dV), zero(dU);
                scale_columns(G, exp_m, scale.grad);  // D
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    uint32_t D[4];
                    round(D, G[x]);
                    store<64>(m.D, 16 * warp, 2 * x, D);
                    right_t<64>(q, m.B, 0, 2 * x);
                    multiply(dU, D, q);
                    left<64>(q, m.K, 0, 2 * x);
                    multiply_t(dV, q, D);
                }
                left_t<64>(DY, m.DY, 0, 2 * warp);
                right<16>(q, m.RB, 0, 0);
                multiply(dU, DY, q);
                by_inverse<true>(m, dU);
                round(dZ, dU);
                left_t<16>(q, m.RK, 0, 0);
                multiply_t(dV, q, DY);
                left_t<16>(q, m.AK, 0, 0);
                multiply_t(dV, q, dZ);
                put_rows(dv + p, H, dV, inverse(scale.grad) * inverse(scale.k), from, to);
                add_outer(G, dZ, m.A), add_outer(G, DY, m.R);
                scale_columns(G, exp_m, inverse(scale.grad));
                m.largest[OF_G][warp] = largest(G);
                store<16>(m.U, 16 * warp, 0, U);
                store<16>(m.dZ, 16 * warp, 0, dZ);
            }
            __syncthreads();
            __half *const dAB = m.M_low, *const dAK = m.AK, *const dRB = m.RB, *const dRK = m.RK;  // their places are free
            {   // each warp one of dAB dAK dRB dRK
                float c[2][4];
                zero(c);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    uint32_t y[4], z[4];
                    if (warp < 2) left_t<16>(y, m.dZ, 16 * x, 0);
                    else left<64>(y, m.DY, 0, 2 * x);
                    if (warp % 2) right_t<64>(z, m.V, 0, 2 * x);
                    else right<16>(z, m.U, 16 * x, 0);
                    multiply(c, y, z);
                }
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (column_of(i / 4, i % 4) > row_of(i % 4) - (warp < 2)) c[i / 4][i % 4] = 0;
                store(dAB + warp * L * L, c);
            }
            __syncthreads();
            // the other gradients, each warp 16 channels; first of what reads the state, then of what writes it
            const float factor = inverse(scale.value) * inverse(scale.grad);
            float dlog[2][4], own[2][4], common[2][2] = {}, sum[2][2];  // own: A dA;  dlog: R dR + A dA - B dB - K dK
            {
                float dR[2][4], dA[2][4], ZD[2][4];
                uint32_t y[4], z[4];
                zero(dR), zero(dA), zero(ZD);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    right<64>(z, m.S, 16 * x, 2 * warp);
                    const uint32_t Zt[4] = {z[0], z[2], z[1], z[3]};  // as a left operand: Z'
                    left<64>(y, m.DY, 0, 2 * x), multiply(dR, y, z);
                    left_t<16>(y, m.dZ, 16 * x, 0), multiply(dA, y, z);
                    right<64>(z, m.D, 16 * x, 2 * warp), multiply(ZD, Zt, z);
                }
                diagonal(sum, ZD);  // colsum(Z D)
                right<64>(z, m.K, 0, 2 * warp);
                left<16>(y, dRK, 0, 0), multiply(dR, y, z);
                left<16>(y, dAK, 0, 0), multiply(dA, y, z);
                right<64>(z, m.B, 0, 2 * warp);
                left<16>(y, dRB, 0, 0), multiply(dR, y, z);
                left<16>(y, dAB, 0, 0), multiply(dA, y, z);
                mine(y, m.A), mine(z, m.R);
                float e[2][4], before[2][4];
                mine(e, m.exp_c, 1), mine(before, m.exp_c, 0);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int j = i / 4, c = i % 4;
                    own[j][c] = element(y, j, c) * dA[j][c];
                    dlog[j][c] = own[j][c] + element(z, j, c) * dR[j][c];
                    dR[j][c] *= e[j][c], dA[j][c] *= before[j][c];
                }
                put_rows(dr + p, H, dR, factor * scale.r, from, to);
                put_rows(da + p, H, dA, factor, from, to);
            }
            {
                float dK[2][4], dB[2][4];
                uint32_t B[4], K[4], y[4], z[4];
                zero(dK), zero(dB);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    right<64>(z, m.D, 16 * x, 2 * warp);
                    left<64>(y, m.V, 0, 2 * x), multiply(dK, y, z);
                    left_t<16>(y, m.U, 16 * x, 0), multiply(dB, y, z);
                }
                mine(B, m.B), mine(K, m.K);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    common[i / 4][i % 2] += element(B, i / 4, i % 4) * dB[i / 4][i % 4] + element(K, i / 4, i % 4) * dK[i / 4][i % 4];
                right<64>(z, m.R, 0, 2 * warp);
                left_t<16>(y, dRK, 0, 0), multiply(dK, y, z);
                left_t<16>(y, dRB, 0, 0), multiply(dB, y, z);
                right<64>(z, m.A, 0, 2 * warp);
                left_t<16>(y, dAK, 0, 0), multiply(dK, y, z);
                left_t<16>(y, dAB, 0, 0), multiply(dB, y, z);
                float e[2][4];
                mine(e, m.exp_c, 1);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int j = i / 4, c = i % 4;
                    const float f = reciprocal(e[j][c]);
                    dlog[j][c] -= element(B, j, c) * dB[j][c] + element(K, j, c) * dK[j][c];
                    dK[j][c] *= f, dB[j][c] *= f;
                }
                put_rows(dk + p, H, dK, factor * scale.k, from, to);
                put_rows(db + p, H, dB, factor, from, to);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = i / 2, e = i % 2;
                float later = 0;
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) common[j][e] += shuffle_xor(common[j][e], lanes);
#pragma unroll
                for (int c = 2 + e; c >= 0; c -= 2) {  // rows 8 .. 15, then 0 .. 7
                    float x = dlog[j][c];
#pragma unroll
                    for (int rows = 1; rows < 8; rows *= 2) {  // sum over this and later rows
                        const float y = shuffle(x, (threadIdx.x + 4 * rows) % 32);
                        if (threadIdx.x % 32 / 4 + rows < 8) x += y;
                    }
                    dlog[j][c] = sum[j][e] + common[j][e] + later + x - own[j][c];
                    later = shuffle(x, threadIdx.x % 4);
                }
            }
            put_rows(dlogw + p, H, dlog, factor, from, to);
        }
    }
    if (part.opens) store(dstate + ((size_t)s * H + h) * N * N, G);
}

}  // namespace

// Q is kept where a backward pass is to come and sequences and heads are few, and then more of the states too: what a
// multiprocessor does counts. Else that pass makes Q again, and every second state.
extern "C" int wkv7_chunk_forward(
        const bf16* r, const void* logw, const bf16* k, const bf16* v, const bf16* a, const bf16* b, const float* state,
        const int* cu, bf16* y, float* state_out, __half* starts, float* spans, float* Q, int S, int H, int total, int dtype,
        int span, cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    const int blocks = slots(S, total, span) * H, every = Q ? L : CH;
    cudaError_t error = cudaSuccess;
    WITH_LOGW(dtype, const Inputs<W> in = {r, (const W*)logw, k, v, a, b, nullptr};
        if (span) {
            error = launch(find_T_and_D<W, 3>, blocks, FORWARD_BYTES<W>, stream, S, H, total, cu, span, in, state, spans, Q,
                           starts != nullptr);
            if (error != cudaSuccess) return error;
            error = launch(combine<false>, S * H * N / ROWS, COMBINE_BYTES, stream, H, cu, span, nullptr, spans, 2 * N * N, spans + N * N,
                           2 * N * N);
            if (error != cudaSuccess) return error;
        }
        WITH_BLOCKS(parts(S, total, span) * H,
            error = launch(forward<W, AT_ONCE>, blocks, FORWARD_BYTES<W>, stream, S, H, total, cu, span, every, in, state, y,
                           state_out, starts, spans)));
    return error;
}

extern "C" int wkv7_chunk_backward(
        const bf16* r, const void* logw, const bf16* k, const bf16* v, const bf16* a, const bf16* b, const float* state,
        const int* cu, const __half* starts, const float* spans, const float* Q, const bf16* dy, const float* dstate_out, bf16* dr,
        void* dlogw, bf16* dk, bf16* dv, bf16* da, bf16* db, float* dstate, float* E, float* own_Q, int S, int H, int total,
        int dtype, int span, cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    const int blocks = slots(S, total, span) * H, every = Q ? L : CH, bytes = dtype == 0 ? sizeof(Chunk<float>) : sizeof(Chunk<bf16>);
    cudaError_t error = cudaSuccess;
    WITH_LOGW(dtype, const Inputs<W> in = {r, (const W*)logw, k, v, a, b, dy};
        if (span) {
            if (!Q)
                error = launch(find_T_and_D<W, 3>, blocks, FORWARD_BYTES<W>, stream, S, H, total, cu, span, in, state, nullptr,
                               own_Q, true);
            if (error != cudaSuccess) return error;
            error = launch(find_E, blocks, 0, stream, S, H, cu, span, dy, Q ? Q : own_Q, E);
            if (error != cudaSuccess) return error;
            error = launch(combine<true>, S * H * N / ROWS, COMBINE_BYTES, stream, H, cu, span, dstate_out, E, N * N, spans + N * N,
                           2 * N * N);
            if (error != cudaSuccess) return error;
        }
        WITH_BLOCKS(parts(S, total, span) * H,
            error = launch(backward<W, AT_ONCE>, blocks, bytes, stream, S, H, cu, span, every, in, starts, dstate_out, dr,
                           (W*)dlogw, dk, dv, da, db, dstate, E)));
    return error;
}

// for bench/kernels.py: of forward and find_T_and_D, backward, combine, find_E
extern "C" int wkv7_chunk_shared_bytes(int kernel, int dtype) {
    WITH_LOGW(dtype, const int bytes[] = {FORWARD_BYTES<W>, sizeof(Chunk<W>), COMBINE_BYTES, 0}; return bytes[kernel]);
}
