// What wkv6.cu and wkv7.cu share: sizes, dtypes, rows in registers, chunk slots.
//
// Tokens are flat, [total, H, N]: sequence s owns tokens cu[s] .. cu[s+1]. States are [S, H, N, N] fp32, rows = value,
// columns = key. All arithmetic is fp32; T is the dtype of r k v a b, of y and of their gradients.
//
// Three kernels per version, all with 64 threads and no reduction across threads:
//   forward  one block per (sequence, head), thread = row of S.     Saves S at the end of every chunk of CH tokens.
//   scan     one block per (sequence, head), thread = row of G = dL/dS, last token first. Saves G at the same places.
//   chunk    one block per (chunk, head),    thread = column.       All the other gradients, from those two.
// No kernel ever divides by the decay, so exp(logw) may underflow to 0.
#pragma once
#include <cassert>
#ifndef CUDA_ON_CPU  // tests/cuda_on_cpu.h stands in for all this
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, blocks, stream, ...) kernel<<<blocks, N, 0, stream>>>(__VA_ARGS__)
#endif

constexpr int N = 64;    // head size, threads per block
constexpr int CH = 32;   // tokens per chunk; cuda_seq.py has the same number
constexpr int TILE = 8;  // tokens in shared memory at a time: one round trip to memory and two barriers per tile
static_assert(CH % TILE == 0, "a chunk must end where a tile ends");

__device__ inline float f32(float x) { return x; }
__device__ inline float f32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float f32(__half x) { return __half2float(x); }
__device__ inline void put(float* p, float x) { *p = x; }
__device__ inline void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ inline void put(__half* p, float x) { *p = __float2half(x); }

// sum_j x[j] y[j]; four partial sums, so that an addition need not wait for the one before it
__device__ inline float dot(const float* x, const float* y) {
    float p[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < N; j++) p[j % 4] += x[j] * y[j];
    return (p[0] + p[1]) + (p[2] + p[3]);
}

// x[j] = from[j * stride]: stride 1 reads a row of a state, stride N a column
__device__ inline void load(float* x, const float* from, int stride) {
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = from[j * stride];
}

__device__ inline void store(float* to, const float* row) {  // `to` is 16-byte aligned
#pragma unroll
    for (int j = 0; j < N; j += 4)
        *reinterpret_cast<float4*>(to + j) = make_float4(row[j], row[j + 1], row[j + 2], row[j + 3]);
}

// The chunks of sequence s lie in slots first_slot(s), first_slot(s) + 1, ...; they never reach first_slot(s + 1).
// In all there are total / CH + S slots, a few of them unused. So also for chunks of another length.
__device__ inline int first_slot(const int* cu, int s, int length = CH) { return cu[s] / length + s; }

__device__ inline int sequence_of(const int* cu, int S, int slot, int length = CH) {  // the last s with first_slot(s) <= slot
    int low = 0, high = S - 1;
    while (low < high) {
        int mid = (low + high + 1) / 2;
        if (first_slot(cu, mid, length) <= slot) low = mid; else high = mid - 1;
    }
    return low;
}

// a bad cu_seqlens stops here with a device-side assert, before it reads or writes memory that is not ours
__device__ inline void check(const int* cu, int s, int S, int total) {
    assert(cu[0] == 0 && cu[S] == total && 0 <= cu[s] && cu[s] <= cu[s + 1] && cu[s + 1] <= total);
}

// run a statement with T = the dtype of that code (cuda_seq.DTYPES)
#define DISPATCH(dtype, ...)                                        \
    switch (dtype) {                                                \
        case 0: { using T = float; __VA_ARGS__; break; }            \
        case 1: { using T = __nv_bfloat16; __VA_ARGS__; break; }    \
        case 2: { using T = __half; __VA_ARGS__; break; }           \
        default: return cudaErrorInvalidValue;                      \
    }
