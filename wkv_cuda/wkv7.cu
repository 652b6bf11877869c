// WKV-7 (RWKV-7 "Goose", arXiv:2503.14456), token by token, head size 64, any decay exp(logw) in [0, 1].
//   sa_t = S_{t-1} a_t;   S_t = S_{t-1} diag(w_t) + sa_t b_t' + v_t k_t';   y_t = S_t r_t
#include "wkv.cuh"

template <typename T>
__global__ void __launch_bounds__(N) forward7(
        int S, int H, int total, const int* cu, const T* __restrict__ r, const float* __restrict__ logw,
        const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ a, const T* __restrict__ b,
        const float* __restrict__ state, T* y, float* state_out, float* sa, float* ends) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], sv[TILE][N], sA[TILE][N], sb[TILE][N];
    const int s = blockIdx.x / H, h = blockIdx.x % H, i = threadIdx.x;
    check(cu, s, S, total);
    const int first = cu[s], last = cu[s + 1];
    float row[N];
    load(row, state + ((size_t)blockIdx.x * N + i) * N, 1);
    for (int t0 = first; t0 < last; t0 += TILE) {
        __syncthreads();  // the tile before is no longer needed
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const size_t p = ((size_t)min(t0 + t, last - 1) * H + h) * N + i;  // past the end: the last token again
            sr[t][i] = f32(r[p]), sw[t][i] = expf(logw[p]), sk[t][i] = f32(k[p]);
            sv[t][i] = f32(v[p]), sA[t][i] = f32(a[p]), sb[t][i] = f32(b[p]);
        }
        __syncthreads();
        for (int t = 0; t < min(TILE, last - t0); t++) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + i;
            const float sa_i = dot(row, sA[t]);
#pragma unroll
            for (int j = 0; j < N; j++) row[j] = row[j] * sw[t][j] + sa_i * sb[t][j] + sv[t][i] * sk[t][j];
            put(y + p, dot(row, sr[t]));
            if (sa) sa[p] = sa_i;
        }
        if (ends && ((t0 - first + TILE) % CH == 0 || t0 + TILE >= last))
            store(ends + (((size_t)(first_slot(cu, s) + (t0 - first) / CH) * H + h) * N + i) * N, row);
    }
    store(state_out + ((size_t)blockIdx.x * N + i) * N, row);
}

// G_t = dL/dS_t = carry_t + dy_t r_t';   dv = G k;   dsa = G b;   carry_{t-1} = G diag(w) + dsa a'
template <typename T>
__global__ void __launch_bounds__(N) scan7(
        int H, const int* cu, const T* __restrict__ r, const float* __restrict__ logw, const T* __restrict__ k,
        const T* __restrict__ a, const T* __restrict__ b, const T* __restrict__ dy,
        const float* __restrict__ dstate_out, T* dv, float* dsa, float* dstate, float* carry) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], sA[TILE][N], sb[TILE][N], sdy[TILE][N];
    const int s = blockIdx.x / H, h = blockIdx.x % H, i = threadIdx.x, first = cu[s], last = cu[s + 1];
    float G[N] = {};
    if (dstate_out) load(G, dstate_out + ((size_t)blockIdx.x * N + i) * N, 1);
    for (int t0 = first + (last - first - 1) / TILE * TILE; t0 >= first && first < last; t0 -= TILE) {
        if ((t0 - first + TILE) % CH == 0 || t0 + TILE >= last)
            store(carry + (((size_t)(first_slot(cu, s) + (t0 - first) / CH) * H + h) * N + i) * N, G);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const size_t p = ((size_t)min(t0 + t, last - 1) * H + h) * N + i;
            sr[t][i] = f32(r[p]), sw[t][i] = expf(logw[p]), sk[t][i] = f32(k[p]);
            sA[t][i] = f32(a[p]), sb[t][i] = f32(b[p]), sdy[t][i] = f32(dy[p]);
        }
        __syncthreads();
        for (int t = min(TILE, last - t0) - 1; t >= 0; t--) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + i;
#pragma unroll
            for (int j = 0; j < N; j++) G[j] += sdy[t][i] * sr[t][j];
            const float dsa_i = dot(G, sb[t]);
            put(dv + p, dot(G, sk[t]));
            dsa[p] = dsa_i;
#pragma unroll
            for (int j = 0; j < N; j++) G[j] = G[j] * sw[t][j] + dsa_i * sA[t][j];
        }
    }
    store(dstate + ((size_t)blockIdx.x * N + i) * N, G);
}

// Thread j holds column j, first of S (forward in time), then of G (backward):
//   dr = S_t' dy;   da = S_{t-1}' dsa;   dk = G' v;   db = G' sa
// and, per channel, with colsum(carry_t * S_t) = dlogw_{t+1} + (a da)_{t+1} inside the chunk,
//   dlogw_t = colsum(carry_t * S_t) + (r dr)_t - (k dk)_t - (b db)_t
// Every chunk starts afresh from its own colsum, which keeps the cancellation in fp32 small.
template <typename T>
__global__ void __launch_bounds__(N) chunk7(
        int S, int H, const int* cu, const T* __restrict__ r, const float* __restrict__ logw,
        const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ a, const T* __restrict__ b,
        const float* __restrict__ state, const float* __restrict__ sa, const float* __restrict__ ends,
        const T* __restrict__ dy, const float* __restrict__ dsa, const float* __restrict__ carry,
        T* dr, float* dlogw, T* dk, T* da, T* db) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], sv[TILE][N], sA[TILE][N], sb[TILE][N];
    __shared__ __align__(16) float sdy[TILE][N], ssa[TILE][N], sdsa[TILE][N];
    __shared__ float term[CH][N];  // (r dr)_t + (a da)_{t+1}; every thread uses its own column only
    const int slot = blockIdx.x / H, h = blockIdx.x % H, j = threadIdx.x, s = sequence_of(cu, S, slot);
    const int start = cu[s] + (slot - first_slot(cu, s)) * CH, end = min(start + CH, cu[s + 1]);
    if (start >= end) return;  // an unused slot
    auto load_tile = [&](int t0) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const size_t p = ((size_t)min(t0 + t, end - 1) * H + h) * N + j;
            sr[t][j] = f32(r[p]), sw[t][j] = expf(logw[p]), sk[t][j] = f32(k[p]);
            sv[t][j] = f32(v[p]), sA[t][j] = f32(a[p]), sb[t][j] = f32(b[p]);
            sdy[t][j] = f32(dy[p]), ssa[t][j] = sa[p], sdsa[t][j] = dsa[p];
        }
        __syncthreads();
    };
    float X[N];
    const bool opens = start == cu[s];  // the sequence begins here
    load(X, (opens ? state : ends) + ((size_t)(opens ? s : slot - 1) * H + h) * N * N + j, N);
    for (int t0 = start; t0 < end; t0 += TILE) {
        load_tile(t0);
        for (int t = 0; t < min(TILE, end - t0); t++) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + j;
            const float w = sw[t][j], da_j = dot(X, sdsa[t]);
#pragma unroll
            for (int i = 0; i < N; i++) X[i] = X[i] * w + ssa[t][i] * sb[t][j] + sv[t][i] * sk[t][j];
            const float dr_j = dot(X, sdy[t]);
            put(da + p, da_j), put(dr + p, dr_j);
            term[t0 + t - start][j] = sr[t][j] * dr_j;
            if (t0 + t > start) term[t0 + t - start - 1][j] += sA[t][j] * da_j;
        }
    }
    float G[N];
    load(G, carry + ((size_t)slot * H + h) * N * N + j, N);
    float sum = dot(G, X);  // colsum(carry_t * S_t) at the last token
    for (int t0 = start + (end - start - 1) / TILE * TILE; t0 >= start; t0 -= TILE) {
        load_tile(t0);
        for (int t = min(TILE, end - t0) - 1; t >= 0; t--) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + j;
            const float w = sw[t][j];
#pragma unroll
            for (int i = 0; i < N; i++) G[i] += sdy[t][i] * sr[t][j];
            const float dk_j = dot(G, sv[t]), db_j = dot(G, ssa[t]);
            sum += term[t0 + t - start][j] - (sk[t][j] * dk_j + sb[t][j] * db_j);
            put(dk + p, dk_j), put(db + p, db_j);
            dlogw[p] = sum;
#pragma unroll
            for (int i = 0; i < N; i++) G[i] = G[i] * w + sdsa[t][i] * sA[t][j];
        }
    }
}

extern "C" int wkv7_forward(
        const void* r, const float* logw, const void* k, const void* v, const void* a, const void* b,
        const float* state, const int* cu, void* y, float* state_out, float* sa, float* ends,
        int S, int H, int total, int dtype, cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    DISPATCH(dtype, LAUNCH(forward7<T>, S * H, stream, S, H, total, cu, (const T*)r, logw, (const T*)k, (const T*)v,
                           (const T*)a, (const T*)b, state, (T*)y, state_out, sa, ends));
    return cudaGetLastError();
}

extern "C" int wkv7_backward(
        const void* r, const float* logw, const void* k, const void* v, const void* a, const void* b,
        const float* state, const int* cu, const float* sa, const float* ends, const void* dy,
        const float* dstate_out, void* dr, float* dlogw, void* dk, void* dv, void* da, void* db, float* dstate,
        float* dsa, float* carry, int S, int H, int total, int dtype, cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    DISPATCH(dtype,
        LAUNCH(scan7<T>, S * H, stream, H, cu, (const T*)r, logw, (const T*)k, (const T*)a, (const T*)b, (const T*)dy,
               dstate_out, (T*)dv, dsa, dstate, carry);
        LAUNCH(chunk7<T>, (total / CH + S) * H, stream, S, H, cu, (const T*)r, logw, (const T*)k, (const T*)v,
               (const T*)a, (const T*)b, state, sa, ends, (const T*)dy, dsa, carry, (T*)dr, dlogw, (T*)dk, (T*)da,
               (T*)db));
    return cudaGetLastError();
}
