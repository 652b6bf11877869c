// WKV-6 (RWKV-6 "Finch", arXiv:2404.05892) on tensor cores, 16 tokens at a time, head size 64, bf16, any decay in [0, 1].
//   y_t = (S_{t-1} + v_t (u*k_t)') r_t;   S_t = S_{t-1} diag(w_t) + v_t k_t'
//
// In a chunk, per channel: R_t = r_t exp(log w of the tokens before), K_t = k_t exp(log w of those after), P = exp(all)
//   Y = R S' + A V,   S <- S diag(P) + V' K
// A[i][j], i > j, is sum_n r_i k_j exp(log w between them): the decay has no lower bound, so there is no one reference
// that keeps the factors in range. For n = 8, 4, 2, 1 the pairs whose numbers i and j first differ in bit n are separated
// by a middle: i in the upper half of a block of 2 n tokens, j in the lower. X_n[t] = r_t or k_t times the decay
// between t and that middle, r in upper halves and k in lower: X_n X_n' has these pairs' scores, and no factor passes 1.
#include "chunk.cuh"

namespace {

constexpr float LOG2_E = 1.44269504f;

template <typename W> struct Inputs {
    const bf16* r;
    const W* logw;
    const bf16 *k, *v, *dy;
};

template <typename W> struct Chunk {  // in shared memory
    W logw[L][N];
    bf16 r[L][N], k[L][N], v[L][N];     // a block of tokens as it comes
    __half X[4][L * N];                 // n = 8, 4, 2, 1
    __half R[L * N], K[L * N], V[L * N], A[L * L];
    float P[N], sums[4][N];             // sums: of log w over each warp's tokens
    float largest[LARGEST][4];
    bf16 dy[L][N];                      // from here the backward pass only
    __half DY[L * N], S[N * N], D[N * N];
    __half decay[3][L * N], before[L * N], after[L * N];  // exp of log w between t and the middle (n = 8, 4, 2), before t, after t
};

static_assert(4 * (sizeof(Chunk<float>) + 1024) <= 228 * 1024, "four blocks share a multiprocessor's memory");
template <typename W> constexpr int FORWARD_BYTES = offsetof(Chunk<W>, dy);

template <typename W> __device__ __forceinline__ void fetch(Chunk<W>& m, const Inputs<W>& in, int first, int n, int H, int h) {
    const Source x = source(first, n, H, h);
    copy(m.logw, in.logw, x, x.valid);
    copy(m.r, in.r, x, x.valid), copy(m.k, in.k, x, x.valid);
    copy(m.v, in.v ? in.v : in.r, x, in.v && x.valid);
    if (in.dy) copy(m.dy, in.dy, x, x.valid);
}

// X R K V P and A's diagonal; what fetch() made zero stays so. r and k are scaled wherever they stand, so A has both scales.
// Warp w makes tokens 4 w .. 4 w + 3, which it has copied itself; lane i channels 2 i and 2 i + 1, and u of these two.
template <bool BACKWARD, typename W>
__device__ __forceinline__ void prepare(Chunk<W>& m, float2 u, Scales& scale) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane * 2;
    auto exp2 = [](float2 x) { return make_float2(power_of_2(x.x), power_of_2(x.y)); };
    auto add = [](float2 x, float2 y) { return make_float2(x.x + y.x, x.y + y.y); };
    auto times = [](float2 x, float2 y) { return make_float2(x.x * y.x, x.y * y.y); };
    float2 own[4];
    uint32_t raw_v[4], raw_k[4], raw_r[4], raw_dy[4], most_v = 0, most_k = 0, most_r = 0, most_dy = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = 4 * warp + i;
        own[i] = times(f32x2(&m.logw[t][c]), {LOG2_E, LOG2_E});  // from here to base 2
        raw_v[i] = two(&m.v[t][c]), raw_k[i] = two(&m.k[t][c]), raw_r[i] = two(&m.r[t][c]);
        most_v = larger_of_each(most_v, raw_v[i]), most_k = larger_of_each(most_k, raw_k[i]);
        most_r = larger_of_each(most_r, raw_r[i]);
        if (BACKWARD) raw_dy[i] = two(&m.dy[t][c]), most_dy = larger_of_each(most_dy, raw_dy[i]);
    }
    const float2 sum = add(add(own[0], own[1]), add(own[2], own[3]));
    *reinterpret_cast<float2*>(&m.sums[warp][c]) = sum;
    m.largest[OF_V][warp] = largest(most_v), m.largest[OF_K][warp] = largest(most_k);
    m.largest[OF_R][warp] = largest(most_r);
    if (BACKWARD) m.largest[OF_DY][warp] = largest(most_dy);
    __syncthreads();
    float2 before = {0, 0}, after = {0, 0}, near = {0, 0};  // sums of the other warps' log w
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float2 x = f32x2(&m.sums[w][c]);
        if (w < warp) before = add(before, x);
        if (w > warp) after = add(after, x);
        if (w == (warp ^ 1)) near = x;
    }
    scale = scales<BACKWARD>(m.largest);
    const float v_scale = scale.value * inverse(scale.k), dy_scale = scale.grad * inverse(scale.r);
    const float2 one = {1, 1};
    if (warp == 0) *reinterpret_cast<float2*>(m.P + place()) = exp2(add(sum, after));
    before = exp2(before), after = exp2(after), near = warp % 3 ? one : exp2(near);
    const float2 up[4] = {one, exp2(own[0]), exp2(add(own[0], own[1])), exp2(add(add(own[0], own[1]), own[2]))};
    const float2 down[4] = {exp2(add(own[1], add(own[2], own[3]))), exp2(add(own[2], own[3])), exp2(own[3]), one};
    const float2 within[4] = {exp2(own[1]), one, one, exp2(own[2])};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = 4 * warp + i;
        const float2 v = f32x2(raw_v[i]), r = times(f32x2(raw_r[i]), {scale.r, scale.r}),
                     k = times(f32x2(raw_k[i]), {scale.k, scale.k});
        auto put = [&](__half* tile, float2 x) { put_pair(tile, t, x.x, x.y); };
        const float2 e8 = times(near, warp / 2 ? up[i] : down[i]), e4 = warp % 2 ? up[i] : down[i];
        put(m.X[0], times(warp / 2 ? r : k, e8));
        put(m.X[1], times(warp % 2 ? r : k, e4));
        put(m.X[2], times(i / 2 ? r : k, within[i]));
        put(m.X[3], i % 2 ? r : k);
        put(m.R, times(r, times(before, up[i])));
        put(m.K, times(k, times(after, down[i])));
        put_pair(m.V, t, v.x * v_scale, v.y * v_scale);
        if (BACKWARD) {
            const float2 dy = f32x2(raw_dy[i]);
            put_pair(m.DY, t, dy.x * dy_scale, dy.y * dy_scale);
            put(m.decay[0], e8), put(m.decay[1], e4), put(m.decay[2], within[i]);
            put(m.before, times(before, up[i])), put(m.after, times(after, down[i]));
        }
        float sum = r.x * u.x * k.x + r.y * u.y * k.y;
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
        if (lane == 0) at<16>(m.A, t, t / 8)[t % 8] = __float2half(sum);
    }
}

// do i and j first differ in bit n?
__device__ __forceinline__ bool meet(int i, int j, int n) { return (i ^ j) / n == 1; }

// each warp the pairs of one n; together all of A but its diagonal
template <typename W> __device__ __forceinline__ void scores(Chunk<W>& m) {
    const int warp = threadIdx.x / 32;
    float c[2][4];
    zero(c);
#pragma unroll
    for (int x = 0; x < 4; x++) {
        uint32_t p[4], q[4];
        left<64>(p, m.X[warp], 0, 2 * x);
        right_t<64>(q, m.X[warp], 0, 2 * x);
        multiply(c, p, q);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = row_of(i % 4), column = column_of(i / 4, i % 4);
        if (meet(row, column, 8 >> warp))
            at<16>(m.A, row, i / 4)[column % 8] = __float2half(row > column ? c[i / 4][i % 4] : 0);
    }
}

// One block per (sequence or span, head). With `starts`, the state at the start of every CH tokens is kept. Without
// state_out, two blocks per (span, head) look for T and D.
template <typename W, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) forward(
        int S_, int H, int total, const int* cu, int span, Inputs<W> in, const float* __restrict__ u, const float* __restrict__ state, bf16* y,
        float* state_out, __half* starts, float* spans) {
    Chunk<W>& m = *reinterpret_cast<Chunk<W>*>(shared_memory());
    const bool probe = !state_out;
    const int index = probe ? blockIdx.x / 2 : blockIdx.x, h = index % H, warp = threadIdx.x / 32;
    Part part;
    if (!find(part, cu, S_, span, index / H) || (probe && !is_wanted(part))) return;
    check(cu, part.s, S_, total);
    const int first = part.first, last = part.last;
    if (probe && looks_for_T()) in.v = nullptr;  // counts as 0
    const float2 own_u = f32x2(u + h * N + threadIdx.x % 32 * 2);
    float S[4][2][4];
    begin(S, part, H, h, state, spans, probe);
    m.largest[OF_S][warp] = largest(S);
    if (first < last) fetch(m, in, first, min(L, last - first), H, h);
    for (int t = first; t < last; t += L) {
        Scales scale;
        wait_for_copies();
        __syncwarp();
        prepare<false>(m, own_u, scale);
        if (starts && (t - first) % CH == 0)
            save(starts + ((size_t)(part.chunk + (t - first) / CH) * H + h) * STATE, S, scale.value);
        __syncthreads();
        if (t + L < last) fetch(m, in, t + L, min(L, last - t - L), H, h);
        scores(m);
        float Y[2][4];
        zero(Y);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            uint32_t p[4], q[4];
            round(p, S[x], scale.value);
            left<64>(q, m.R, 0, 2 * x);
            multiply_t(Y, q, p);
        }
        uint32_t V[4], A[4];
        left_t<64>(V, m.V, 0, 2 * warp);
        scale_columns(S, m.P, scale.value);
        add_outer(S, V, m.K);
        scale_all(S, inverse(scale.value));
        __syncthreads();
        left<16>(A, m.A, 0, 0);
        multiply_t(Y, A, V);
        if (!probe) put_rows(y + ((size_t)t * H + h) * N, H, Y, inverse(scale.value) * inverse(scale.r), 0, last - t);
        m.largest[OF_S][warp] = largest(S);
    }
    end(S, part, H, h, state_out, spans, probe);
}

// sum of x over the rows of a tile after this one, or before it, in blocks of `size` <= 8 rows; x becomes its block's sum
__device__ __forceinline__ float others(float& x, int size, bool after) {
    float sum = 0;
#pragma unroll
    for (int b = 1; b < size; b *= 2) {
        const float y = shuffle_xor(x, 4 * b);
        if ((threadIdx.x % 32 / 4 / b % 2 == 1) != after) sum += y;
        x += y;
    }
    return sum;
}

// dlog += for every token the sum of x c over the tokens after it, or before it, in its block of SIZE = 16, or on its way
// to the middle of 2 SIZE tokens
template <int SIZE>
__device__ __forceinline__ void spread(float (*dlog)[4], const uint32_t* x, float (*c)[4], bool after = false) {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float *d = dlog[i / 2] + i % 2, low = c[i / 2][i % 2] * element(x, i / 2, i % 2),
              high = c[i / 2][i % 2 + 2] * element(x, i / 2, i % 2 + 2);
        if (SIZE < 8) after = row / SIZE % 2;
        d[0] += others(low, min(SIZE, 8), SIZE == 8 ? false : after);
        d[2] += others(high, min(SIZE, 8), SIZE == 8 ? true : after);
        if (SIZE == 16) d[after ? 0 : 2] += after ? high : low;
    }
}

// One block per (sequence or span, head), last token first; G = dL/dS. SCAN: only G is looked for, from zero. In a chunk, with dA = dY V' (its diagonal: delta):
//   dV = A' dY + K G',   G <- G diag(P) + dY' R;   rho = dY S,  kappa = V G,  Q_n = (dA + dA')_n X_n, only pairs of n
//   dr = rho exp(before) + (upper) sum_n Q_n exp(..) + delta u k;   dk = kappa exp(after) + (lower) sum_n Q_n exp(..) + delta u r
// and dlogw sums each product where its decay acts, never as a difference: R rho before t, K kappa after t, X_n Q_n
// between t and the middle, P colsum(S G) everywhere. S comes from the saved state.
template <typename W, bool SCAN, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) backward(
        int S_, int H, const int* cu, int span, Inputs<W> in, const float* __restrict__ u, const __half* starts, const float* dstate_out,
        bf16* dr, W* dlogw, bf16* dk, bf16* dv, float* du, float* dstate, float* spans) {
    Chunk<W>& m = *reinterpret_cast<Chunk<W>*>(shared_memory());
    const int h = blockIdx.x % H, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Part part;
    if (!find(part, cu, S_, span, blockIdx.x / H) || (SCAN && part.opens)) return;
    const int s = part.s, first = part.first, last = part.last, channel = 16 * warp + lane % 4 * 4;
    const float2 own_u = f32x2(u + h * N + lane * 2);
    uint4 kept[4];  // S in halves, where its registers are needed
    float G[4][2][4], four_u[4], du_sum[4] = {};  // u of channel, ... channel + 3
#pragma unroll
    for (int x = 0; x < 4; x++) zero(G[x]);
    if (!SCAN && !part.closes) load(G, spans + ((size_t)part.border * H + h) * N * N);
    else if (!SCAN && dstate_out) load(G, dstate_out + ((size_t)s * H + h) * N * N);
    for (int i = 0; i < 4; i++) four_u[i] = u[h * N + channel + i];
    m.largest[OF_G][warp] = largest(G);
    int loaded = -1;  // the block of tokens in m, or on its way there
    auto need = [&](int block) {
        if (block >= first && block != loaded) fetch(m, in, loaded = block, min(L, last - block), H, h);
    };
    const int blocks = (last - first + L - 1) / L;
    if (blocks) need(first + (blocks - 1) * L / (SCAN ? L : CH) * (SCAN ? L : CH));
    auto kept_at = [&](int block) { return starts + ((size_t)(part.chunk + block * L / CH) * H + h) * STATE; };
    float next_scale = SCAN || !blocks ? 1 : scale_of(kept_at(blocks - 1));
    for (int block = blocks - 1; block >= 0; block--) {
        const int t0 = first + block * L, begin = SCAN ? t0 : first + block * L / CH * CH;
        const float start_scale = next_scale;
        if (!SCAN && block) next_scale = scale_of(kept_at(block - 1));
        Scales scale;
        float kept_scale = start_scale;
        if (!SCAN) restore(kept, kept_at(block));
        uint32_t V[4];
        for (int t = begin;; t += L) {
            m.largest[OF_S][warp] = SCAN ? 0 : 7.99f * inverse(kept_scale);
            wait_for_copies();
            __syncwarp();
            prepare<true>(m, own_u, scale);
            __syncthreads();
            need(t < t0 ? t + L : t0 > begin ? begin : begin - (SCAN ? L : CH));
            left_t<64>(V, m.V, 0, 2 * warp);
            if (t == t0) break;
            float S[4][2][4];
            unpack(S, kept, scale.value * inverse(kept_scale));
            scale_columns(S, m.P, 1);
            add_outer(S, V, m.K);
            scale_all(S, inverse(scale.value));
            kept_scale = scale_for(largest(S));
            pack(kept, S, kept_scale);
        }
        uint32_t DY[4], A[4], q[4];
        left_t<64>(DY, m.DY, 0, 2 * warp);
        if (SCAN) {
            scale_columns(G, m.P, scale.grad);
            add_outer(G, DY, m.R);
            scale_all(G, inverse(scale.grad));
            m.largest[OF_G][warp] = largest(G);
            continue;
        }
        const size_t p = ((size_t)t0 * H + h) * N;
        float r[2][4] = {}, k[2][4] = {};  // of this lane's rows and channels
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const size_t token = p + (size_t)row_of(2 * i) * H * N + channel;
            if (t0 + row_of(2 * i) < last) get4(r[i], in.r + token), get4(k[i], in.k + token);
        }
        scores(m);
        float dV[2][4];
        zero(dV);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            uint32_t D[4];
            float S[2][4];
            unpack(S, kept[x], scale.value * inverse(kept_scale));
            round(D, S);
            store<64>(m.S, 16 * warp, 2 * x, D);
            round(D, G[x], scale.grad);
            store<64>(m.D, 16 * warp, 2 * x, D);
            left<64>(q, m.K, 0, 2 * x);
            multiply_t(dV, q, D);
        }
        scale_columns(G, m.P, scale.grad);
        add_outer(G, DY, m.R);
        scale_all(G, inverse(scale.grad));
        m.largest[OF_G][warp] = largest(G);
        __syncthreads();
        left_t<16>(A, m.A, 0, 0);
        multiply_t(dV, A, DY);
        put_rows(dv + p, H, dV, inverse(scale.grad) * inverse(scale.k), 0, last - t0);
        // the other gradients, each warp 16 channels; dA and dA' made by every warp
        float dA[2][4], dAt[2][4], rho[2][4], kappa[2][4], SD[2][4];
        zero(dA), zero(dAt), zero(rho), zero(kappa), zero(SD);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            uint32_t z[4], y[4];
            left<64>(y, m.DY, 0, 2 * x);
            right_t<64>(z, m.V, 0, 2 * x);
            multiply(dA, y, z);
            right<64>(z, m.S, 16 * x, 2 * warp);
            multiply(rho, y, z);
            const uint32_t St[4] = {z[0], z[2], z[1], z[3]};  // as a left operand: S'
            left<64>(y, m.V, 0, 2 * x);
            right<64>(z, m.D, 16 * x, 2 * warp);
            multiply(kappa, y, z);
            multiply(SD, St, z);
            right_t<64>(z, m.DY, 0, 2 * x);
            multiply(dAt, y, z);
        }
        const int row = lane / 4;
        const float delta[2] = {shuffle(row % 2 ? dA[0][1] : dA[0][0], row * 4 + row / 2),
                                shuffle(row % 2 ? dA[1][3] : dA[1][2], row * 4 + row / 2)};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (row_of(i % 4) < column_of(i / 4, i % 4)) dA[i / 4][i % 4] = dAt[i / 4][i % 4];
        round(A, dA);
        const float factor = inverse(scale.value) * inverse(scale.grad);
        float sum[2][2], dlog[2][4], dR[2][4], dK[2][4];
        uint32_t x[4], e[4];
        diagonal(sum, SD);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int j = i / 4, c = i % 4, at = 2 * j + c % 2;
            const float d = delta[c / 2] * factor, rt = r[c / 2][at] * scale.r, kt = k[c / 2][at] * scale.k;
            dR[j][c] = delta[c / 2] * four_u[at] * kt, dK[j][c] = delta[c / 2] * four_u[at] * rt;
            du_sum[at] += d * rt * kt;  // delta is of v / k and dy / r
            dlog[j][c] = m.P[16 * warp + column_of(j, c)] * sum[j][c % 2];
        }
        auto add = [&](float (*to)[4], float (*c)[4], int i) { to[i / 4][i % 4] += c[i / 4][i % 4] * element(e, i / 4, i % 4); };
        mine(x, m.R), mine(e, m.before);
        spread<16>(dlog, x, rho, true);
#pragma unroll
        for (int i = 0; i < 8; i++) add(dR, rho, i);
        mine(x, m.K), mine(e, m.after);
        spread<16>(dlog, x, kappa, false);
#pragma unroll
        for (int i = 0; i < 8; i++) add(dK, kappa, i);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const int n = 8 >> l;
            float Q[2][4];
            zero(Q);
#pragma unroll
            for (int i = 0; i < 4; i++) {  // pairs of n only
                const int column = column_of(i / 2, 0);
                q[i] = A[i] & ((meet(row_of(i % 2 * 2), column, n) ? 0xffffu : 0) |
                               (meet(row_of(i % 2 * 2), column + 1, n) ? 0xffff0000u : 0));
            }
            right<64>(e, m.X[l], 0, 2 * warp);
            multiply(Q, q, e);
            mine(x, m.X[l]);
            if (n == 8) spread<8>(dlog, x, Q);
            if (n == 4) spread<4>(dlog, x, Q);
            if (n == 2) spread<2>(dlog, x, Q);
            if (n > 1) mine(e, m.decay[l]);
            else e[0] = e[1] = e[2] = e[3] = pack(1, 1);
#pragma unroll
            for (int i = 0; i < 8; i++) row_of(i % 4) / n % 2 ? add(dR, Q, i) : add(dK, Q, i);
        }
        put_rows(dr + p, H, dR, factor * scale.r, 0, last - t0);
        put_rows(dk + p, H, dK, factor * scale.k, 0, last - t0);
        put_rows(dlogw + p, H, dlog, factor, 0, last - t0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (int lanes = 4; lanes < 32; lanes *= 2) du_sum[i] += shuffle_xor(du_sum[i], lanes);
        if (lane < 4 && !SCAN) du[(size_t)blockIdx.x * N + channel + i] = du_sum[i];
    }
    if (SCAN) store(spans + ((size_t)(part.border - 1) * H + h) * N * N, G);
    else if (part.opens) store(dstate + ((size_t)s * H + h) * N * N, G);
}

}  // namespace

extern "C" int wkv6_chunk_forward(
        const bf16* r, const void* logw, const bf16* k, const bf16* v, const float* u, const float* state, const int* cu,
        bf16* y, float* state_out, __half* starts, float* spans, int S, int H, int total, int dtype, int span,
        cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    const int blocks = slots(S, total, span) * H;
    cudaError_t error = cudaSuccess;
    WITH_LOGW(dtype, const Inputs<W> in = {r, (const W*)logw, k, v, nullptr};
        if (span) {
            WITH_BLOCKS(2 * blocks, error = launch(forward<W, AT_ONCE>, 2 * blocks, FORWARD_BYTES<W>, stream, S, H, total, cu,
                                                   span, in, u, state, nullptr, nullptr, nullptr, spans));
            if (error != cudaSuccess) return error;
            error = launch(combine<false>, S * H * N / ROWS, COMBINE_BYTES, stream, H, cu, span, nullptr, spans, 2 * N * N, spans + N * N,
                           2 * N * N);
            if (error != cudaSuccess) return error;
        }
        WITH_BLOCKS(parts(S, total, span) * H, error = launch(forward<W, AT_ONCE>, blocks, FORWARD_BYTES<W>, stream, S, H, total, cu, span, in,
                                           u, state, y, state_out, starts, spans)));
    return error;
}

extern "C" int wkv6_chunk_backward(
        const bf16* r, const void* logw, const bf16* k, const bf16* v, const float* u, const float* state, const int* cu,
        const __half* starts, const float* spans, const bf16* dy, const float* dstate_out, bf16* dr, void* dlogw, bf16* dk,
        bf16* dv, float* du, float* dstate, float* scratch, int S, int H, int total, int dtype, int span,
        cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    const int blocks = slots(S, total, span) * H, bytes = dtype == 0 ? sizeof(Chunk<float>) : sizeof(Chunk<bf16>);
    cudaError_t error = cudaSuccess;
    WITH_LOGW(dtype, const Inputs<W> in = {r, (const W*)logw, k, v, dy};
        if (span) {
            error = launch(backward<W, true, 4>, blocks, bytes, stream, S, H, cu, span, in, u, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                           nullptr, scratch);
            if (error != cudaSuccess) return error;
            error = launch(combine<true>, S * H * N / ROWS, COMBINE_BYTES, stream, H, cu, span, dstate_out, scratch, N * N,
                           spans + N * N, 2 * N * N);
            if (error != cudaSuccess) return error;
        }
        WITH_BLOCKS(parts(S, total, span) * H, error = launch(backward<W, false, AT_ONCE>, blocks, bytes, stream, S, H, cu, span, in, u, starts,
                                           dstate_out, dr, (W*)dlogw, dk, dv, du, dstate, scratch)));
    return error;
}

// for bench/kernels.py: of forward, backward, combine
extern "C" int wkv6_chunk_shared_bytes(int kernel, int dtype) {
    WITH_LOGW(dtype, return kernel == 0 ? FORWARD_BYTES<W> : kernel == 1 ? sizeof(Chunk<W>) : COMBINE_BYTES);
}
