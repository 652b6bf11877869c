// WKV-6 (RWKV-6 "Finch", arXiv:2404.05892), token by token, head size 64, any decay exp(logw) in [0, 1].
//   y_t = (S_{t-1} + v_t (u*k_t)') r_t;   S_t = S_{t-1} diag(w_t) + v_t k_t'
#include "wkv.cuh"

template <typename T>
__global__ void __launch_bounds__(N) forward6(
        int S, int H, int total, const int* cu, const T* __restrict__ r, const float* __restrict__ logw,
        const T* __restrict__ k, const T* __restrict__ v, const float* __restrict__ u,
        const float* __restrict__ state, T* y, float* state_out, float* ends) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], suk[TILE][N], sv[TILE][N];
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
            sr[t][i] = f32(r[p]), sw[t][i] = expf(logw[p]), sv[t][i] = f32(v[p]);
            sk[t][i] = f32(k[p]), suk[t][i] = u[h * N + i] * sk[t][i];
        }
        __syncthreads();
        for (int t = 0; t < min(TILE, last - t0); t++) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + i;
            put(y + p, dot(row, sr[t]) + sv[t][i] * dot(suk[t], sr[t]));
#pragma unroll
            for (int j = 0; j < N; j++) row[j] = row[j] * sw[t][j] + sv[t][i] * sk[t][j];
        }
        if (ends && ((t0 - first + TILE) % CH == 0 || t0 + TILE >= last))
            store(ends + (((size_t)(first_slot(cu, s) + (t0 - first) / CH) * H + h) * N + i) * N, row);
    }
    store(state_out + ((size_t)blockIdx.x * N + i) * N, row);
}

// G_t = dL/dS_t;   dv = G k + (r.(u*k)) dy;   G_{t-1} = G diag(w) + dy r'
template <typename T>
__global__ void __launch_bounds__(N) scan6(
        int H, const int* cu, const T* __restrict__ r, const float* __restrict__ logw, const T* __restrict__ k,
        const float* __restrict__ u, const T* __restrict__ dy, const float* __restrict__ dstate_out,
        T* dv, float* dstate, float* carry) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], suk[TILE][N], sdy[TILE][N];
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
            sr[t][i] = f32(r[p]), sw[t][i] = expf(logw[p]), sdy[t][i] = f32(dy[p]);
            sk[t][i] = f32(k[p]), suk[t][i] = u[h * N + i] * sk[t][i];
        }
        __syncthreads();
        for (int t = min(TILE, last - t0) - 1; t >= 0; t--) {
            put(dv + ((size_t)(t0 + t) * H + h) * N + i, dot(G, sk[t]) + sdy[t][i] * dot(suk[t], sr[t]));
#pragma unroll
            for (int j = 0; j < N; j++) G[j] = G[j] * sw[t][j] + sdy[t][i] * sr[t][j];
        }
    }
    store(dstate + ((size_t)blockIdx.x * N + i) * N, G);
}

// Thread j holds column j, first of S (forward in time), then of G (backward). With c = dy.v and without the bonus
//   dr' = S_{t-1}' dy;   dk' = G' v;      and with it   dr = dr' + c u k;   dk = dk' + c u r;   du = sum_t c r k
// and, per channel, with colsum(G_t * S_t) = dlogw_{t+1} + (r dr')_{t+1} inside the chunk,
//   dlogw_t = colsum(G_t * S_t) - (k dk')_t
// Every chunk starts afresh from its own colsum, which keeps the cancellation in fp32 small.
template <typename T>
__global__ void __launch_bounds__(N) chunk6(
        int S, int H, const int* cu, const T* __restrict__ r, const float* __restrict__ logw,
        const T* __restrict__ k, const T* __restrict__ v, const float* __restrict__ u,
        const float* __restrict__ state, const float* __restrict__ ends, const T* __restrict__ dy,
        const float* __restrict__ carry, T* dr, float* dlogw, T* dk, float* du) {
    __shared__ __align__(16) float sr[TILE][N], sw[TILE][N], sk[TILE][N], sv[TILE][N], sdy[TILE][N];
    __shared__ float term[CH][N];  // (r dr')_{t+1}; every thread uses its own column only
    const int slot = blockIdx.x / H, h = blockIdx.x % H, j = threadIdx.x, s = sequence_of(cu, S, slot);
    const int start = cu[s] + (slot - first_slot(cu, s)) * CH, end = min(start + CH, cu[s + 1]);
    du += ((size_t)slot * H + h) * N + j;
    if (start >= end) {  // an unused slot
        *du = 0;
        return;
    }
    auto load_tile = [&](int t0) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const size_t p = ((size_t)min(t0 + t, end - 1) * H + h) * N + j;
            sr[t][j] = f32(r[p]), sw[t][j] = expf(logw[p]), sk[t][j] = f32(k[p]);
            sv[t][j] = f32(v[p]), sdy[t][j] = f32(dy[p]);
        }
        __syncthreads();
    };
    float X[N], du_j = 0;
    const float u_j = u[h * N + j];
    const bool opens = start == cu[s];  // the sequence begins here
    load(X, (opens ? state : ends) + ((size_t)(opens ? s : slot - 1) * H + h) * N * N + j, N);
    for (int t0 = start; t0 < end; t0 += TILE) {
        load_tile(t0);
        for (int t = 0; t < min(TILE, end - t0); t++) {
            const float c = dot(sdy[t], sv[t]), dr_j = dot(X, sdy[t]), r_j = sr[t][j], k_j = sk[t][j], w = sw[t][j];
            put(dr + ((size_t)(t0 + t) * H + h) * N + j, dr_j + c * u_j * k_j);
            du_j += c * r_j * k_j;
            if (t0 + t > start) term[t0 + t - start - 1][j] = r_j * dr_j;
#pragma unroll
            for (int i = 0; i < N; i++) X[i] = X[i] * w + sv[t][i] * k_j;
        }
    }
    *du = du_j;
    term[end - start - 1][j] = 0;  // what comes after the chunk is in its colsum
    float G[N];
    load(G, carry + ((size_t)slot * H + h) * N * N + j, N);
    float sum = dot(G, X);  // colsum(G_t * S_t) at the last token
    for (int t0 = start + (end - start - 1) / TILE * TILE; t0 >= start; t0 -= TILE) {
        load_tile(t0);
        for (int t = min(TILE, end - t0) - 1; t >= 0; t--) {
            const size_t p = ((size_t)(t0 + t) * H + h) * N + j;
            const float c = dot(sdy[t], sv[t]), dk_j = dot(G, sv[t]), r_j = sr[t][j], w = sw[t][j];
            put(dk + p, dk_j + c * u_j * r_j);
            sum += term[t0 + t - start][j] - sk[t][j] * dk_j;
            dlogw[p] = sum;
#pragma unroll
            for (int i = 0; i < N; i++) G[i] = G[i] * w + sdy[t][i] * r_j;
        }
    }
}

extern "C" int wkv6_forward(
        const void* r, const float* logw, const void* k, const void* v, const float* u, const float* state,
        const int* cu, void* y, float* state_out, float* ends, int S, int H, int total, int dtype,
        cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    DISPATCH(dtype, LAUNCH(forward6<T>, S * H, stream, S, H, total, cu, (const T*)r, logw, (const T*)k, (const T*)v,
                           u, state, (T*)y, state_out, ends));
    return cudaGetLastError();
}

extern "C" int wkv6_backward(
        const void* r, const float* logw, const void* k, const void* v, const float* u, const float* state,
        const int* cu, const float* ends, const void* dy, const float* dstate_out,
        void* dr, float* dlogw, void* dk, void* dv, float* du, float* dstate, float* carry,
        int S, int H, int total, int dtype, cudaStream_t stream) {
    if (S * H == 0) return cudaSuccess;
    DISPATCH(dtype,
        LAUNCH(scan6<T>, S * H, stream, H, cu, (const T*)r, logw, (const T*)k, u, (const T*)dy, dstate_out, (T*)dv,
               dstate, carry);
        LAUNCH(chunk6<T>, (total / CH + S) * H, stream, S, H, cu, (const T*)r, logw, (const T*)k, (const T*)v, u,
               state, ends, (const T*)dy, carry, (T*)dr, dlogw, (T*)dk, du));
    return cudaGetLastError();
}

// 0 if this library's CUDA runtime works with the driver here, and its kernels with the card
extern "C" int wkv_probe() {
#ifndef CUDA_ON_CPU
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, forward6<float>);
#else
    return 0;
#endif
}
