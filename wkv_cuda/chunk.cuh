// What wkv6_chunk.cu and wkv7_chunk.cu share: 16 x 16 tiles on tensor cores, rows of shared memory, blocks of tokens.
//
// A block of 128 threads, 4 warps, works on one sequence and head, L = 16 tokens at a time. Everything that is multiplied
// is rounded to fp16 and summed in fp32. Warp w holds rows 16 w .. 16 w + 15 of the state in registers.
//
// A tile C [16, 16] of sums in registers is two fragments of mma.m16n8k16: lane i has, for j = 0, 1, columns 8 j + 2 (i % 4)
// and one more, of rows i / 4 (first two numbers) and i / 4 + 8 (last two). Rounded to halves it is, as it stands, the left
// operand C and also, in another order, the right operand C' of a next product: so nothing that stays with its warp goes
// through shared memory.
//
// Channels are kept in an order in which a lane's four columns 8 j + 2 q + e (q = i % 4) are four neighbours in memory:
// place 8 j + 2 q + e of every 16 holds channel 4 q + 2 j + e. The same for keys and values, rows and columns; sums over
// channels do not mind.
#pragma once
#include <cstddef>
#include <cstdint>
#include "wkv.cuh"

constexpr int L = 16;         // tokens at a time
constexpr int THREADS = 128;
constexpr int STATE = N * N + 8;  // halves of a saved state: its scale (a float, in the first 16 bytes) and the fragments
using bf16 = __nv_bfloat16;

#ifndef CUDA_ON_CPU  // tests/cuda_on_cpu.h has all this for g++
// cudaSuccess, or why a kernel cannot start
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int bytes, cudaStream_t stream, Arguments... arguments) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, THREADS, bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}
// run a statement with AT_ONCE = how many blocks of a kernel one multiprocessor is to hold: the fewer, the more registers
// each has, and the shorter it takes alone. For 132 processors, but not from the card at hand: the same inputs give the
// same bits everywhere.
#define WITH_BLOCKS(blocks, ...)                                                                             \
    if (blocks <= 2 * 132) { constexpr int AT_ONCE = 2; __VA_ARGS__; }                                     \
    else if (blocks <= 3 * 132) { constexpr int AT_ONCE = 3; __VA_ARGS__; }                                \
    else { constexpr int AT_ONCE = 4; __VA_ARGS__; }

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
    __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&x);
}
__device__ __forceinline__ float2 unpack(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
// what is computed from x later is computed anew, and not kept in registers until then
__device__ __forceinline__ void forget(uint4* x) {
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(x[i].x), "+r"(x[i].y), "+r"(x[i].z), "+r"(x[i].w));
}
// nvcc splits a plain store of 8 or 16 bytes into several
__device__ __forceinline__ void store8(void* p, uint32_t x, uint32_t y) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store16(void* p, float x, float y, float z, float w) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&x);
}
__device__ __forceinline__ float power_of_2(float x) {  // no extra steps for results below 2^-126: they become 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ __forceinline__ bool every(bool x) { return __all_sync(~0u, x); }
__device__ __forceinline__ uint32_t address(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

// four 8 x 8 matrices of halves, lane i gives the address of row i % 8 of matrix i / 8
__device__ __forceinline__ void load_matrices(uint32_t* r, const __half* row, bool transposed) {
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // compiles, for the sequential kernels' sake; never launched
__device__ inline void mma(float*, const uint32_t*, uint32_t, uint32_t) { __trap(); }
__device__ inline void copy16(void*, const void*, bool) {}
__device__ inline void wait_for_copies() {}
__device__ inline float warp_max(float x) { return x; }
__device__ inline uint32_t larger_of_each(uint32_t x, uint32_t) { return x; }
#else
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {  // c += a b
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 16 bytes to shared memory, zeros if not valid; they are there after wait_for_copies() and a barrier
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ float warp_max(float x) {  // x >= 0
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}
__device__ __forceinline__ uint32_t larger_of_each(uint32_t x, uint32_t y) {  // two bf16 >= 0 and the sizes of two others
    asm("max.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y & 0x7fff7fffu));
    return x;
}
#endif
#endif

// ---------------------------------------------------------------------------------------------------------------------
// tiles of halves in shared memory, [rows, WIDTH], groups of 8 columns swapped around so that neither rows nor columns of
// 8 x 8 matrices meet in a bank

template <int WIDTH> __device__ __forceinline__ __half* at(__half* tile, int row, int group) {
    return tile + row * WIDTH + (WIDTH == 64 ? group ^ (row & 7) : group ^ (row >> 2 & 1)) * 8;
}

// a 16 x 16 tile of `tile` as the left operand (x = rows) or the right one; `t`: the operand is its transpose
template <int WIDTH> __device__ __forceinline__ void left(uint32_t* x, __half* tile, int row, int group) {
    const int i = threadIdx.x % 32;
    load_matrices(x, at<WIDTH>(tile, row + i % 16, group + i / 16), false);
}
template <int WIDTH> __device__ __forceinline__ void left_t(uint32_t* x, __half* tile, int row, int group) {
    const int i = threadIdx.x % 32;
    load_matrices(x, at<WIDTH>(tile, row + i % 8 + i / 16 * 8, group + i / 8 % 2), true);
}
template <int WIDTH> __device__ __forceinline__ void right(uint32_t* x, __half* tile, int row, int group) {
    const int i = threadIdx.x % 32;
    load_matrices(x, at<WIDTH>(tile, row + i % 16, group + i / 16), true);
}
template <int WIDTH> __device__ __forceinline__ void right_t(uint32_t* x, __half* tile, int row, int group) {
    const int i = threadIdx.x % 32;
    load_matrices(x, at<WIDTH>(tile, row + i % 8 + i / 16 * 8, group + i / 8 % 2), false);
}

__device__ __forceinline__ void multiply(float (*c)[4], const uint32_t* x, const uint32_t* y) {  // C += X Y
    mma(c[0], x, y[0], y[1]);
    mma(c[1], x, y[2], y[3]);
}
__device__ __forceinline__ void multiply_t(float (*c)[4], const uint32_t* x, const uint32_t* y) {  // C += X Y', Y as a left
    mma(c[0], x, y[0], y[2]);
    mma(c[1], x, y[1], y[3]);
}
__device__ __forceinline__ void round(uint32_t* x, float (*c)[4]) {  // sums -> left operand
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}
__device__ __forceinline__ void round(uint32_t* x, float (*c)[4], float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = pack(c[i / 2][i % 2 * 2] * scale, c[i / 2][i % 2 * 2 + 1] * scale);
}
template <int WIDTH> __device__ __forceinline__ void store(__half* tile, int row, int group, const uint32_t* x) {
    const int i = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
        reinterpret_cast<uint32_t*>(at<WIDTH>(tile, row + i / 4 + m % 2 * 8, group + m / 2))[i % 4] = x[m];
}
__device__ __forceinline__ void store(__half* tile, float (*c)[4]) {
    uint32_t x[4];
    round(x, c);
    store<16>(tile, 0, 0, x);
}
__device__ __forceinline__ void zero(float (*c)[4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0;
}
__device__ __forceinline__ int row_of(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }          // of c[j][i]
__device__ __forceinline__ int column_of(int j, int i) { return 8 * j + threadIdx.x % 4 * 2 + i % 2; }

// ---------------------------------------------------------------------------------------------------------------------
// the state, [4][2][4] floats a lane: four tiles beside each other

__device__ __forceinline__ size_t state_at(int half, int tile) {  // of the four neighbours (S[tile][0][2 half], ...)
    const int warp = threadIdx.x / 32, i = threadIdx.x % 32;
    return (16 * warp + i / 8 * 4 + half * 2 + i / 4 % 2) * N + 16 * tile + i % 4 * 4;
}
__device__ inline void load(float (*S)[2][4], const float* from) {
#pragma unroll
    for (int x = 0; x < 8; x++) {
        const float4 f = *reinterpret_cast<const float4*>(from + state_at(x % 2, x / 2));
        float(*s)[4] = S[x / 2];
        const int i = x % 2 * 2;
        s[0][i] = f.x, s[0][i + 1] = f.y, s[1][i] = f.z, s[1][i + 1] = f.w;
    }
}
__device__ inline void store(float* to, float (*S)[2][4]) {
#pragma unroll
    for (int x = 0; x < 8; x++) {
        float(*s)[4] = S[x / 2];
        const int i = x % 2 * 2;
        *reinterpret_cast<float4*>(to + state_at(x % 2, x / 2)) = make_float4(s[0][i], s[0][i + 1], s[1][i], s[1][i + 1]);
    }
}
// x: as it was kept. Its scale is wanted first, and read a chunk ahead
__device__ inline void restore(uint4* x, const __half* from) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = reinterpret_cast<const uint4*>(from + 8)[i * THREADS + threadIdx.x];
}
__device__ inline float scale_of(const __half* from) { return *reinterpret_cast<const float*>(from); }
__device__ __forceinline__ void unpack(float (*c)[4], uint4 x, float factor) {
    const uint32_t p[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const float2 f = unpack(p[m]);
        c[m / 2][m % 2 * 2] = f.x * factor, c[m / 2][m % 2 * 2 + 1] = f.y * factor;
    }
}
__device__ __forceinline__ void unpack(float (*S)[2][4], const uint4* x, float factor) {
#pragma unroll
    for (int i = 0; i < 4; i++) unpack(S[i], x[i], factor);
}
__device__ __forceinline__ void pack(uint4* x, float (*S)[2][4], float factor) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t p[4];
        round(p, S[i], factor);
        x[i] = {p[0], p[1], p[2], p[3]};
    }
}
// in halves, for the backward pass alone: fragment after fragment, times a power of two
__device__ __forceinline__ void keep_scale(__half* to, float scale) {
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(to) = make_float4(scale, 0, 0, 0);
}
__device__ __forceinline__ void keep_tile(__half* to, int i, const uint32_t* x) {
    reinterpret_cast<uint4*>(to + 8)[i * THREADS + threadIdx.x] = {x[0], x[1], x[2], x[3]};
}
__device__ inline void save(__half* to, float (*S)[2][4], float scale) {
    keep_scale(to, scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t x[4];
        round(x, S[i], scale);
        keep_tile(to, i, x);
    }
}
__device__ __forceinline__ float largest(float (*S)[2][4]) {  // of this warp
    float x = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) x = fmaxf(x, fabsf(S[i / 8][i / 4 % 2][i % 4]));
    return warp_max(x);
}
// a tile or the state, times a number per column, in the order of the places
__device__ __forceinline__ void scale_columns(float (*c)[4], const float* column, float factor) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float2 f = *reinterpret_cast<const float2*>(column + j * 8 + threadIdx.x % 4 * 2);
        c[j][0] *= f.x * factor, c[j][1] *= f.y * factor, c[j][2] *= f.x * factor, c[j][3] *= f.y * factor;
    }
}
__device__ __forceinline__ void scale_columns(float (*S)[2][4], const float* column, float factor) {
#pragma unroll
    for (int x = 0; x < 4; x++) scale_columns(S[x], column + 16 * x, factor);
}
__device__ __forceinline__ void scale_all(float (*S)[2][4], float factor) {
#pragma unroll
    for (int i = 0; i < 32; i++) S[i / 8][i / 4 % 2][i % 4] *= factor;
}

// The power of two that takes numbers up to m to 8 at most: fp16 has the range for sums of 64 products of two such
// numbers, and keeps its full precision down to 1e-5 of the largest.
__device__ __forceinline__ float scale_for(float m) {
    return __uint_as_float((uint32_t)min(max(256 - (int)(__float_as_uint(m) >> 23), 67), 187) << 23);
}
__device__ __forceinline__ float inverse(float power_of_two) {
    return __uint_as_float((254u << 23) - __float_as_uint(power_of_two));
}

// ---------------------------------------------------------------------------------------------------------------------
// tokens

__device__ __forceinline__ float2 f32x2(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ uint32_t two(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ __forceinline__ float2 f32x2(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
__device__ __forceinline__ float2 f32x2(const bf16* p) { return f32x2(two(p)); }
__device__ __forceinline__ void get4(float* x, const bf16* p) {
    const uint2 u = *reinterpret_cast<const uint2*>(p);
    x[0] = __uint_as_float(u.x << 16), x[1] = __uint_as_float(u.x & 0xffff0000u);
    x[2] = __uint_as_float(u.y << 16), x[3] = __uint_as_float(u.y & 0xffff0000u);
}
__device__ __forceinline__ void put4(float* p, float a, float b, float c, float d) { store16(p, a, b, c, d); }
__device__ __forceinline__ void put4(bf16* p, float a, float b, float c, float d) {
    store8(p, pack_bf16(a, b), pack_bf16(c, d));
}
// rows lo .. hi - 1 of a tile, columns 16 w .. of the head, times a factor; `to`: the head of the block's first token
template <typename T>
__device__ __forceinline__ void put_rows(T* to, int H, float (*c)[4], float factor, int lo, int hi) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const int t = row_of(i);
        if (t >= lo && t < hi)
            put4(to + (size_t)t * H * N + threadIdx.x / 32 * 16 + threadIdx.x % 4 * 4,
                 c[0][i] * factor, c[0][i + 1] * factor, c[1][i] * factor, c[1][i + 1] * factor);
    }
}
// Copying a block of n tokens of head h that begins with token `first`, zeros after them. Warp w copies tokens
// 4 w .. 4 w + 3, whole sectors at a time; one offset for all inputs.
struct Source { size_t at; int token, channel; bool valid; };
__device__ __forceinline__ Source source(int first, int n, int H, int h) {
    const int t = threadIdx.x / 8;
    return {t < n ? ((size_t)(first + t) * H + h) * N : 0, t, int(threadIdx.x % 8), t < n};
}
template <typename T> __device__ __forceinline__ void copy(T (*to)[N], const T* from, const Source& x, bool valid) {
    constexpr int EACH = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < N; i += 8 * EACH) {
        const int c = i + x.channel * EACH;
        copy16(&to[x.token][c], from + x.at + c, valid);
    }
}
// Lane i prepares channels 2 i and 2 i + 1; where these two go in a row of a tile
__device__ __forceinline__ void put_pair(__half* tile, int t, float x, float y, uint32_t mask = ~0u) {
    const int i = threadIdx.x % 32;
    reinterpret_cast<uint32_t*>(at<64>(tile, t, i / 8 * 2 + i % 2))[i / 2 % 4] = pack(x, y) & mask;
}
__device__ __forceinline__ int place() {  // the same as a number, 0 .. 62
    const int i = threadIdx.x % 32;
    return i / 8 * 16 + i % 2 * 8 + i / 2 % 4 * 2;
}
__device__ __forceinline__ int swapped(int row) { return row % 4 * 8; }  // of a tile of floats
__device__ __forceinline__ float largest(uint32_t x) {  // of this warp, of two numbers a lane
    return warp_max(fmaxf(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)));
}

// What each warp found the largest of, [LARGEST][4 warps] in shared memory, and what is made of it: the powers of two by
// which a chunk's r, its k, what has the size of values (S, U) and of their gradients (G, dZ) are multiplied before they
// are rounded to halves. v is then multiplied by value / k and dy by grad / r, so that V' K and DY' R have the size of S
// and G, and one product may be summed with another. r and k are only ever made smaller: where all of them are zero,
// v and dy must keep their size for the sake of dk and dr.
enum { OF_S, OF_V, OF_K, OF_R, OF_G, OF_DY, LARGEST, OF_T = OF_G };
struct Scales { float r, k, value, grad; };

__device__ __forceinline__ float largest4(const float* x) {
    const float4 f = *reinterpret_cast<const float4*>(x);
    return fmaxf(fmaxf(f.x, f.y), fmaxf(f.z, f.w));
}
template <bool BACKWARD> __device__ __forceinline__ Scales scales(const float (*largest)[4]) {
    Scales s;
    const float k = fmaxf(largest4(largest[OF_K]), 1), r = fmaxf(largest4(largest[OF_R]), 1);
    s.k = fminf(scale_for(k), 1), s.r = fminf(scale_for(r), 1);
    s.value = scale_for(fmaxf(largest4(largest[OF_S]), largest4(largest[OF_V]) * k));
    s.grad = BACKWARD ? scale_for(fmaxf(largest4(largest[OF_G]), largest4(largest[OF_DY]) * r)) : 1;
    return s;
}

// X += P' Y, four tiles: P' this warp's rows of a left operand, Y [L, N] in shared memory
__device__ __forceinline__ void add_outer(float (*X)[2][4], const uint32_t* P, __half* Y) {
#pragma unroll
    for (int x = 0; x < 4; x++) {
        uint32_t y[4];
        right<64>(y, Y, 0, 2 * x);
        multiply(X[x], P, y);
    }
}
// this warp's 16 channels of a [L, N] tile, where the lane has its sums: element i of c[j] is half i % 2 of x[2 j + i / 2]
__device__ __forceinline__ void mine(uint32_t* x, __half* tile) {
    const int i = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
        x[m] = reinterpret_cast<uint32_t*>(at<64>(tile, i / 4 + m % 2 * 8, 2 * warp + m / 2))[i % 4];
}
// the same of rows first .. first + 15 of a tile of floats, whose groups of 8 are swapped around by row
__device__ __forceinline__ void mine(float (*x)[4], const float (*rows)[N], int first) {
    const int i = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int row = first + i / 4 + m % 2 * 8;
        const float2 f = f32x2(&rows[row][(16 * warp + m / 2 * 8 + i % 4 * 2) ^ swapped(row)]);
        x[m / 2][m % 2 * 2] = f.x, x[m / 2][m % 2 * 2 + 1] = f.y;
    }
}
__device__ __forceinline__ float element(const uint32_t* x, int j, int i) {
    const float2 f = unpack(x[2 * j + i / 2]);
    return i % 2 ? f.y : f.x;
}
// colsum(X Y) of this warp's 16 channels, from C = X' Y: its diagonal
__device__ __forceinline__ void diagonal(float (*sum)[2], float (*c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int q = threadIdx.x % 4;
        sum[i / 2][i % 2] = shuffle(c[i / 2][i / 2 * 2 + i % 2], (2 * q + i % 2) * 4 + q);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Few sequences and heads, or one long sequence among short ones, leave most of the card idle. Then sequences longer than
// `span` are cut into spans: the state at a span's end is S T + D, S the one at its start, and one more pass finds T (from
// the unit matrix, with v = 0) and D (from zero) of all spans at once; the first span of a sequence has its true end at
// once, and of the last one only T is wanted, for the backward pass. combine() goes from span to span, and all run again
// at once from the right states. Backward: G <- G T' + E.
//
// Span i > 0 of sequence s begins at border cu[s] / span + i - 1: no two spans share one, and there are total / span.
// What belongs to a border: T of the span that begins there, D of the one that ends there, later the state; and E, later G.

struct Part {  // what a block works on: tokens first .. last - 1 of sequence s
    int s, first, last, border;  // border: where it ends; the one before is where it begins
    int chunk;                   // the slot of the state kept before `first`; the next ones follow after `every` tokens each
    bool opens, closes;          // the sequence begins, ends here
};
// The part of block `slot`: first those that open a sequence, then one for each border. False: nothing begins there
__device__ __forceinline__ bool find(Part& p, const int* cu, int S, int span, int slot, int every = CH) {
    int low = slot, i = 0;
    if (slot >= S) {  // the last sequence with a start before the end of border's span
        int high = S - 1;
        for (low = 0; low < high;) {
            const int mid = (low + high + 1) / 2;
            if (cu[mid] / span <= slot - S) low = mid; else high = mid - 1;
        }
        i = slot - S - cu[low] / span + 1;
    }
    const int start = cu[low], end = cu[low + 1];
    p.s = low, p.first = start + i * span, p.chunk = start / every + low + i * (span / every);
    p.last = span ? min(p.first + span, end) : end, p.border = span ? start / span + i : 0;
    p.opens = i == 0, p.closes = p.last == end;
    return p.opens || p.first < end;
}
inline int slots(int S, int total, int span) { return span ? total / span + S : S; }
// how many of them begin anywhere, if all sequences are equally long
inline int parts(int S, int total, int span) { return span ? (total + S * span - 1) / (S * span) * S : S; }

namespace {
constexpr int ROWS = 16, COMBINE_BYTES = (N + ROWS) * (N + 4) * sizeof(float);

// N / ROWS blocks per (sequence, head), in fp32, from border to border: x <- x T + d, which takes d's place
template <bool REVERSE>  // last border first, T transposed; x begins as `from`, else as what the first border has
__global__ void __launch_bounds__(THREADS) combine(
        int H, const int* cu, int span, const float* from, float* d, int d_stride, const float* T, int T_stride) {
    float *M = reinterpret_cast<float*>(shared_memory()), *X = M + N * (N + 4);
    const int index = blockIdx.x / (N / ROWS), s = index / H, h = index % H, i = threadIdx.x;
    const int row = i / 8, at_row = (blockIdx.x % (N / ROWS) * ROWS + row) * N, column = i % 8 * 4;  // and 32 columns on
    const int borders = (cu[s + 1] - cu[s] - 1) / span;
    if (borders <= 0) return;
    auto at = [&](int border) { return (size_t)(cu[s] / span + border) * H + h; };
    if (!REVERSE) from = d + at(0) * d_stride;
    else if (from) from += (size_t)index * N * N;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = from ? from[at_row + j / 4 * 32 + column + j % 4] : 0;
    for (int n = REVERSE ? 0 : 1; n < borders; n++) {
        const int to = REVERSE ? borders - 1 - n : n;
        float* place = d + at(to) * d_stride + at_row + column;
        const float* t = T + at(REVERSE ? to : to - 1) * T_stride;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; j++) X[row * (N + 4) + j / 4 * 32 + column + j % 4] = x[j];
#pragma unroll
        for (int j = 0; j < N * N / THREADS; j++) {
            const int k = j * (THREADS / N) + i / N;
            M[REVERSE ? i % N * (N + 4) + k : k * (N + 4) + i % N] = t[j * THREADS + i];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = place[j / 4 * 32 + j % 4];
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < N; k++) {
            const float f = X[row * (N + 4) + k];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] += f * M[k * (N + 4) + j / 4 * 32 + column + j % 4];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) place[j / 4 * 32 + j % 4] = x[j];
    }
}

// A forward pass that looks for T and D has two blocks for each part, the second for T.
__device__ __forceinline__ bool looks_for_T() { return blockIdx.x % 2; }
__device__ __forceinline__ bool is_wanted(const Part& p) { return looks_for_T() ? !p.opens : !p.closes; }
__device__ __forceinline__ float* state_at_border(float* spans, int border, int H, int h) {
    return spans + ((size_t)border * H + h) * 2 * N * N;
}
}  // namespace

__device__ inline void zero(float (*S)[2][4]) {
#pragma unroll
    for (int x = 0; x < 4; x++) zero(S[x]);
}
__device__ inline void unit(float (*S)[2][4]) {
#pragma unroll
    for (int x = 0; x < 32; x++) {
        const int i = x % 4, j = x / 4 % 2;
        const int value = 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 8 * 4 + i / 2 * 2 + threadIdx.x / 4 % 2;
        const int key = 16 * (x / 8) + threadIdx.x % 4 * 4 + 2 * j + i % 2;
        S[x / 8][j][i] = value == key;
    }
}
// the state a forward block begins with: the sequence's, the border's or, where T and D are looked for, one or zero
__device__ inline void begin(float (*S)[2][4], const Part& p, int H, int h, const float* state, float* spans, bool probe) {
    if (p.opens) return load(S, state + ((size_t)p.s * H + h) * N * N);
    if (!probe) return load(S, state_at_border(spans, p.border - 1, H, h));
    return looks_for_T() ? unit(S) : zero(S);
}
__device__ inline void end(float (*S)[2][4], const Part& p, int H, int h, float* state_out, float* spans, bool probe) {
    if (!probe && p.closes) return store(state_out + ((size_t)p.s * H + h) * N * N, S);
    if (probe && looks_for_T()) return store(state_at_border(spans, p.border - 1, H, h) + N * N, S);
    if (probe) store(state_at_border(spans, p.border, H, h), S);
}

#define WITH_LOGW(dtype, ...)                                      \
    switch (dtype) {                                               \
        case 0: { using W = float; __VA_ARGS__; break; }           \
        case 1: { using W = bf16; __VA_ARGS__; break; }            \
        default: return cudaErrorInvalidValue;                     \
    }
