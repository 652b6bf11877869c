// Just enough CUDA for g++ to compile and run wkv_cuda/*.cu on a CPU: g++ -x c++ -include tests/cuda_on_cpu.h.
// Blocks run one after another. The threads of a block are fibers that take turns at barriers and at what a warp does
// together, so a missing barrier is seen as wrong numbers, and one that only some threads reach aborts. Shared memory is
// NaN at the start of a block; an asynchronous copy lands when it is waited for, not before. cuda_on_cpu_reverse(1) turns
// round the order in which warps and lanes run: what depends on that order is a race.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp wants one stack
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static
#define LAUNCH(kernel, blocks, stream, ...) cuda_on_cpu::launch(blocks, 64, [=] { kernel(__VA_ARGS__); })
#define WITH_BLOCKS(blocks, ...) { constexpr int AT_ONCE = 4; __VA_ARGS__; }  // they differ in registers alone

using std::max;
using std::min;
using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaFree(void*) { return cudaSuccess; }

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
inline float __expf(float x) { return expf(x); }

struct __half { _Float16 x; };
inline float __half2float(__half h) { return (float)h.x; }
inline __half __float2half(float f) { return {(_Float16)f}; }

struct __nv_bfloat16 { uint16_t x; };  // the upper half of a float
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((uint32_t)b.x << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest, ties to even
    uint32_t bits = __float_as_uint(f);
    if (f != f) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct uint3 { unsigned x; };
inline uint3 threadIdx, blockIdx;

namespace cuda_on_cpu {
constexpr int THREADS = 128, STACK = 64 * 1024;
enum Status { BARRIER, WARP, END };
struct Slot { float a[8], b[4]; uint32_t u; const void* p; };
struct Copy { void* to; const void* from; bool valid; };
inline ucontext_t start[THREADS];
inline jmp_buf scheduler, at[THREADS];
inline bool started[THREADS];
inline char stack[THREADS][STACK];
inline Status status;
inline Slot slots[2][THREADS];
inline unsigned turn[THREADS];
inline std::vector<Copy> copies[THREADS];
inline std::function<void()> body;
inline __attribute__((aligned(128))) unsigned char shared[100 * 1024];
inline bool reverse;

inline void pause(Status why) {  // lets the others run
    status = why;
    if (!_setjmp(at[threadIdx.x])) _longjmp(scheduler, 1);
}
inline void run_thread() {
    body();
    status = END;
    _longjmp(scheduler, 1);
}
inline Status resume(int thread) {
    threadIdx.x = thread;
    if (!_setjmp(scheduler)) {
        if (started[thread]) _longjmp(at[thread], 1);
        started[thread] = true;
        setcontext(&start[thread]);
    }
    return status;
}
inline Slot* exchange(const Slot& mine) {  // what every lane of this warp gave
    const int i = threadIdx.x;
    Slot* bank = slots[turn[i]++ & 1];
    bank[i] = mine;
    pause(WARP);
    return bank + i / 32 * 32;
}

inline void launch(unsigned blocks, int threads, std::function<void()> kernel, size_t bytes = 0) {
    if (bytes > sizeof shared) fprintf(stderr, "%zu bytes of shared memory\n", bytes), abort();
    body = kernel;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(shared, 0xff, sizeof shared);
        for (int i = 0; i < threads; i++) {
            getcontext(&start[i]);
            start[i].uc_stack.ss_sp = stack[i];
            start[i].uc_stack.ss_size = STACK;
            start[i].uc_link = nullptr;
            makecontext(&start[i], run_thread, 0);
            started[i] = false, turn[i] = 0;
        }
        for (Status block = BARRIER; block != END;)
            for (int w = 0; w < threads / 32; w++) {  // every warp to its next barrier, or to its end
                const int warp = reverse ? threads / 32 - 1 - w : w;
                Status before = block, now = WARP;
                while (now == WARP)
                    for (int l = 0; l < 32; l++) {
                        Status s = resume(warp * 32 + (reverse ? 31 - l : l));
                        if (l && s != now) fprintf(stderr, "the threads of a warp part ways\n"), abort();
                        now = s;
                    }
                if (w && now != before) fprintf(stderr, "only some threads reached __syncthreads()\n"), abort();
                block = now;
            }
    }
}
}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int bytes, cudaStream_t, Arguments... arguments) {
    cuda_on_cpu::launch(blocks, 128, [=] { kernel(static_cast<Parameters>(arguments)...); }, bytes);
    return cudaSuccess;
}

extern "C" inline __attribute__((used)) void cuda_on_cpu_reverse(int reverse) { cuda_on_cpu::reverse = reverse; }
inline void __syncthreads() { cuda_on_cpu::pause(cuda_on_cpu::BARRIER); }

// ---------------------------------------------------------------------------------------------------------------------
// what wkv_cuda/chunk.cuh says in PTX

inline unsigned char* shared_memory() { return cuda_on_cpu::shared; }

inline uint32_t pack(float low, float high) {  // two halves
    _Float16 x[2] = {(_Float16)low, (_Float16)high};
    uint32_t bits;
    memcpy(&bits, x, 4);
    return bits;
}
inline float2 unpack(uint32_t bits) {
    _Float16 x[2];
    memcpy(x, &bits, 4);
    return {(float)x[0], (float)x[1]};
}

inline void forget(uint4*) {}
inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline uint32_t pack_bf16(float low, float high) {
    return __float2bfloat16(low).x | (uint32_t)__float2bfloat16(high).x << 16;
}
inline void store_global(void* p, const void* from, size_t bytes) {
    if ((uintptr_t)p % bytes) fprintf(stderr, "a store of %zu bytes must be aligned to as many\n", bytes), abort();
    memcpy(p, from, bytes);
}
inline void store8(void* p, uint32_t x, uint32_t y) {
    const uint32_t both[2] = {x, y};
    store_global(p, both, 8);
}
inline void store16(void* p, float x, float y, float z, float w) {
    const float all[4] = {x, y, z, w};
    store_global(p, all, 16);
}

inline float shuffle(float x, int lane) {
    cuda_on_cpu::Slot s;
    s.u = __float_as_uint(x);
    return __uint_as_float(cuda_on_cpu::exchange(s)[lane].u);
}
inline float warp_max(float x) {
    cuda_on_cpu::Slot s, *warp;
    s.u = __float_as_uint(x);
    warp = cuda_on_cpu::exchange(s);
    uint32_t most = 0;
    for (int i = 0; i < 32; i++) most = max(most, warp[i].u);
    return __uint_as_float(most);
}
inline uint32_t larger_of_each(uint32_t x, uint32_t y) {  // two bf16 >= 0 and the sizes of two others; no NaN wins
    const float low = fmaxf(__uint_as_float(x << 16), fabsf(__uint_as_float(y << 16)));
    const float high = fmaxf(__uint_as_float(x & 0xffff0000u), fabsf(__uint_as_float(y & 0xffff0000u)));
    return __float_as_uint(low) >> 16 | __float_as_uint(high);
}
inline void __syncwarp() { cuda_on_cpu::pause(cuda_on_cpu::WARP); }
inline float shuffle_xor(float x, int mask) { return shuffle(x, (threadIdx.x & 31) ^ mask); }
inline bool every(bool x) {
    cuda_on_cpu::Slot s, *warp;
    s.u = x;
    warp = cuda_on_cpu::exchange(s);
    for (int i = 0; i < 32; i++) x = x && warp[i].u;
    return x;
}

// four 8 x 8 matrices of halves, lane i has the address of row i % 8 of matrix i / 8
inline void load_matrices(uint32_t* r, const __half* row, bool transposed) {
    cuda_on_cpu::Slot s, *warp;
    if ((uintptr_t)row % 16) fprintf(stderr, "a row of a matrix must be aligned to 16 bytes\n"), abort();
    s.p = row;
    warp = cuda_on_cpu::exchange(s);
    const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4 * 2;
    for (int m = 0; m < 4; m++) {
        uint16_t x[2];
        for (int e = 0; e < 2; e++) {
            const char* from = (const char*)warp[8 * m + (transposed ? j + e : i)].p;
            memcpy(x + e, from + 2 * (transposed ? i : j + e), 2);
        }
        r[m] = x[0] | (uint32_t)x[1] << 16;
    }
}

// c += a b: mma.sync.m16n8k16, halves in, float sums
inline void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    cuda_on_cpu::Slot s, *warp;
    for (int m = 0; m < 4; m++) {
        const float2 x = unpack(a[m]);
        s.a[2 * m] = x.x, s.a[2 * m + 1] = x.y;
    }
    const float2 x = unpack(b0), y = unpack(b1);
    s.b[0] = x.x, s.b[1] = x.y, s.b[2] = y.x, s.b[3] = y.y;
    warp = cuda_on_cpu::exchange(s);
    const int i = threadIdx.x % 32 / 4 * 4, j = threadIdx.x % 4 * 2;
    for (int q = 0; q < 4; q++)
        for (int e = 0; e < 2; e++)
            for (int n = 0; n < 2; n++) {
                const float *A = warp[i + q].a, *B = warp[(j + n) * 4 + q].b;
                c[n] += A[e] * B[e] + A[4 + e] * B[2 + e];
                c[2 + n] += A[2 + e] * B[e] + A[6 + e] * B[2 + e];
            }
}

inline void copy16(void* to, const void* from, bool valid) { cuda_on_cpu::copies[threadIdx.x].push_back({to, from, valid}); }
inline void wait_for_copies() {
    for (auto& c : cuda_on_cpu::copies[threadIdx.x]) c.valid ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16);
    cuda_on_cpu::copies[threadIdx.x].clear();
}
