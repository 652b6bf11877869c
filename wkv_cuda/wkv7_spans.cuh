// WKV-7's first pass over the spans of long sequences (chunk.cuh): what each makes of the state that it begins with.
//
// With S0 that state, S T + D is the one at the span's end. In between y_t = S0 q_t + ..., q_t = T_t r_t, where T_t is T up
// to token t. So dL/dS0 = sum_t dy_t q_t' + G T', G the gradient at the end. Q is kept for that sum, which spares the
// backward pass a walk through the tokens: for every 16 of them Q' as left operands, warp after warp, then for each token
// what to multiply its q by.

constexpr int RECORD = L * N / 2 + L;  // in floats

__device__ __forceinline__ size_t record_at(const Part& part, int span, int H, int h) {  // of a span's first tokens
    return ((size_t)(part.border - 1) * H + h) * (span / L) * RECORD;
}

// One block per (span, head); of a sequence's last span only a backward pass wants T and Q. Without `spans` only Q is wanted.
template <typename W, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) find_T_and_D(
        int S_, int H, int total, const int* cu, int span, Inputs<W> in, const float* __restrict__ state, float* spans, float* Q, bool backward) {
    Chunk<W>& m = *reinterpret_cast<Chunk<W>*>(shared_memory());
    const int h = blockIdx.x % H, warp = threadIdx.x / 32;
    Part part;
    if (!find(part, cu, S_, span, blockIdx.x / H) || (part.closes && (part.opens || !backward))) return;
    check(cu, part.s, S_, total);
    const int first = part.first, last = part.last;
    float D[4][2][4], T[4][2][4], D_scale = 1, T_scale = 1;
    Pending pending = {0, 0};
    unit(T);
    if (part.opens) load(D, state + ((size_t)part.s * H + h) * N * N), Q = nullptr;
    else zero(D), Q += Q ? record_at(part, span, H, h) : 0;
    m.largest[OF_S][warp] = largest(D), m.largest[OF_T][warp] = largest(T);
    fetch(m, in, first, min(L, last - first), H, h);
    for (int t = first; t < last; t += L) {
        const int n = min(L, last - t);
        float Qt[2][4];  // Q', filled column by column where a chunk ends early: R is zero for other tokens
        zero(Qt);
        for (int lo = 0, hi; lo < n; lo = hi) {
            Scales scale;
            if (lo == 0) wait_for_copies();
            __syncwarp();
            hi = prepare<false>(m, lo, n, scale, &pending);
            const float T_scale_before = T_scale;
            T_scale = scale_for(largest4(m.largest[OF_T]));
            __syncthreads();
            if (hi == n && t + L < last) fetch(m, in, t + L, min(L, last - t - L), H, h);
            scores(m);
            scale_columns(D, m.exp_m, scale.value * inverse(D_scale)), scale_columns(T, m.exp_m, T_scale * inverse(T_scale_before));
            D_scale = scale.value;
            float DA[2][4], TA[2][4];
            zero(DA), zero(TA);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                uint32_t p[4], q[4];
                right_t<64>(q, m.A, 0, 2 * x);
                round(p, D[x]), multiply(DA, p, q);
                round(p, T[x]), multiply(TA, p, q);
                right_t<64>(q, m.R, 0, 2 * x), multiply(Qt, p, q);
            }
            __syncthreads();
            uint32_t V[4], U[4], UT[4], q[4];
            left_t<64>(V, m.V, 0, 2 * warp);
            solve(m, U, DA, V);
            by_inverse<false>(m, TA), round(UT, TA);
            right_t<16>(q, m.RB, 0, 0), multiply(Qt, UT, q);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                right<64>(q, m.B, 0, 2 * x), multiply(D[x], U, q), multiply(T[x], UT, q);
                right<64>(q, m.K, 0, 2 * x), multiply(D[x], V, q);
            }
            const float exp_m = most(pending);
            m.largest[OF_S][warp] = largest(D) * exp_m * inverse(D_scale);
            m.largest[OF_T][warp] = largest(T) * exp_m * inverse(T_scale);
            const int i = threadIdx.x;
            if (Q && i >= lo && i < hi) Q[L * N / 2 + i] = inverse(T_scale) * inverse(scale.r);
        }
        if (Q) {
            uint32_t x[4];
            round(x, Qt);
            reinterpret_cast<uint4*>(Q)[threadIdx.x] = {x[0], x[1], x[2], x[3]};
            Q += RECORD;
        }
    }
    if (!spans) return;
    no_longer(m, pending);
    scale_columns(D, m.exp_m, inverse(D_scale)), scale_columns(T, m.exp_m, inverse(T_scale));
    if (!part.opens) store(state_at_border(spans, part.border - 1, H, h) + N * N, T);
    if (!part.closes) store(state_at_border(spans, part.border, H, h), D);
}

// What a lane has of 16 tokens: dy of 2 channels and 8 of them, what those are multiplied by, and Q'
struct Tokens { bf16 dy[8]; float2 factor[2]; uint4 q[4]; };

// E = dY' Q of every span that another precedes. Each chunk of 16 tokens has a power of two of its own.
__global__ void __launch_bounds__(THREADS, 3) find_E(
        int S_, int H, const int* cu, int span, const bf16* dy, const float* Q, float* E) {
    const int h = blockIdx.x % H, warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane % 4 * 2;
    Part part;
    if (!find(part, cu, S_, span, blockIdx.x / H) || part.opens) return;
    const int n = part.last - part.first, row = H * N;
    dy += ((size_t)part.first * H + h) * N + 16 * warp + lane / 8 * 4 + lane / 4 % 2;
    Q += record_at(part, span, H, h);
    auto read = [&](Tokens& x, int t0) {
        const float* record = Q + t0 / L * RECORD;
        const bf16* from = dy + (size_t)t0 * row;
#pragma unroll
        for (int i = 0; i < 4; i++) x.q[i] = reinterpret_cast<const uint4*>(record)[i * 32 + lane];
        for (int i = 0; i < 2; i++) x.factor[i] = f32x2(record + L * N / 2 + token + 8 * i);
#pragma unroll
        for (int i = 0; i < 8; i++) {  // dY' as a left operand: channels 0 and 2, tokens 0, 1, 8, 9 of this lane's
            const int t = token + i % 2 + i / 4 * 8;
            x.dy[i] = from[min(t, n - 1 - t0) * row + i / 2 % 2 * 2];
        }
    };
    float sum[4][2][4];
    zero(sum);
    Tokens x, next;
    read(next, 0);
    for (int t0 = 0; t0 < n; t0 += L) {
        x = next;
        if (t0 + L < n) read(next, t0 + L);
        float f[8], most = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            f[i] = __bfloat162float(x.dy[i]) * (i % 2 ? x.factor[i / 4].y : x.factor[i / 4].x);
            if (t0 + token + i % 2 + i / 4 * 8 >= n) f[i] = 0;
            most = fmaxf(most, fabsf(f[i]));
        }
        const float scale = scale_for(warp_max(most));
        uint32_t p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = pack(f[2 * i] * scale, f[2 * i + 1] * scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t q[4] = {x.q[i].x, x.q[i].y, x.q[i].z, x.q[i].w};
            float c[2][4];
            zero(c);
            multiply_t(c, p, q);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[i][j / 4][j % 4] += c[j / 4][j % 4] * inverse(scale);
        }
    }
    store(E + ((size_t)(part.border - 1) * H + h) * N * N, sum);
}
