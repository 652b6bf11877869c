// One token of every row, for generation: head size 64, the state written in place.
//
// A block of 64 threads has the state of one sequence and head, 16 KB, in its registers, and so reads and writes it once,
// neighbouring threads at neighbouring addresses: 16 lanes share a row of S, four columns each, and four rows are taken at
// a time. A row's sums go over its 16 lanes in a fixed order, so the same inputs give the same bits.
//
// Vectors are [B, H, N], the state [B, H, N, N] fp32, rows = value, columns = key, aligned to 16 bytes.
#include "wkv.cuh"

#ifndef CUDA_ON_CPU
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
#endif

constexpr int LANES = 16;          // that share a row
constexpr int AT_A_TIME = N / LANES;  // rows
constexpr int STEPS = N / AT_A_TIME;

__device__ inline float over_row(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

template <typename T> __device__ inline void four(float* x, const T* from) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = f32(from[e]);
}

__device__ inline float dot4(const float* x, const float* y) { return (x[0] * y[0] + x[1] * y[1]) + (x[2] * y[2] + x[3] * y[3]); }

// S <- S diag(w) + (S a) b' + v k';  y = S r
template <typename T>
__global__ void __launch_bounds__(N) token7(
        const T* __restrict__ r, const float* __restrict__ logw, const T* __restrict__ k, const T* __restrict__ v,
        const T* __restrict__ a, const T* __restrict__ b, float* state, T* y) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, j = 4 * lane;
    const size_t p = (size_t)blockIdx.x * N;
    float4* S = reinterpret_cast<float4*>(state) + p * LANES;
    float4 s[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) s[i] = S[(i * AT_A_TIME + group) * LANES + lane];
    float R[4], w[4], K[4], A[4], B[4];
    four(R, r + p + j), four(w, logw + p + j), four(K, k + p + j), four(A, a + p + j), four(B, b + p + j);
#pragma unroll
    for (int e = 0; e < 4; e++) w[e] = expf(w[e]);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int row = i * AT_A_TIME + group;
        const float V = f32(v[p + row]);
        float x[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
        const float sa = over_row(dot4(x, A));
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = x[e] * w[e] + sa * B[e] + V * K[e];
        S[row * LANES + lane] = make_float4(x[0], x[1], x[2], x[3]);
        const float sum = over_row(dot4(x, R));
        if (lane == 0) put(y + p + row, sum);
    }
}

// y = (S + v (u * k)') r;  S <- S diag(w) + v k'
template <typename T>
__global__ void __launch_bounds__(N) token6(
        int H, const T* __restrict__ r, const float* __restrict__ logw, const T* __restrict__ k,
        const T* __restrict__ v, const float* __restrict__ u, float* state, T* y) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, j = 4 * lane;
    const size_t p = (size_t)blockIdx.x * N;
    float4* S = reinterpret_cast<float4*>(state) + p * LANES;
    float4 s[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) s[i] = S[(i * AT_A_TIME + group) * LANES + lane];
    float R[4], w[4], K[4], U[4];
    four(R, r + p + j), four(w, logw + p + j), four(K, k + p + j), four(U, u + blockIdx.x % H * N + j);
#pragma unroll
    for (int e = 0; e < 4; e++) w[e] = expf(w[e]), U[e] *= K[e];
    const float own = over_row(dot4(U, R));  // (u * k)' r, of the token itself
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int row = i * AT_A_TIME + group;
        const float V = f32(v[p + row]);
        float x[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
        const float sum = over_row(dot4(x, R)) + V * own;
        if (lane == 0) put(y + p + row, sum);
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = x[e] * w[e] + V * K[e];
        S[row * LANES + lane] = make_float4(x[0], x[1], x[2], x[3]);
    }
}

extern "C" int wkv7_token(
        const void* r, const float* logw, const void* k, const void* v, const void* a, const void* b, float* state,
        void* y, int B, int H, int dtype, cudaStream_t stream) {
    if (B * H == 0) return cudaSuccess;
    DISPATCH(dtype, LAUNCH(token7<T>, B * H, stream, (const T*)r, logw, (const T*)k, (const T*)v, (const T*)a,
                           (const T*)b, state, (T*)y));
    return cudaGetLastError();
}

extern "C" int wkv6_token(
        const void* r, const float* logw, const void* k, const void* v, const float* u, float* state, void* y, int B,
        int H, int dtype, cudaStream_t stream) {
    if (B * H == 0) return cudaSuccess;
    DISPATCH(dtype, LAUNCH(token6<T>, B * H, stream, H, (const T*)r, logw, (const T*)k, (const T*)v, u, state, (T*)y));
    return cudaGetLastError();
}
