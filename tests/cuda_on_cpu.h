// Just enough CUDA for g++ to compile and run wkv_cuda/*.cu on a CPU: g++ -x c++ -include tests/cuda_on_cpu.h.
// Blocks run one after another. The threads of a block are fibers that take turns at __syncthreads(), so a missing
// barrier is seen as wrong numbers, and one that only some threads reach aborts.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static
#define LAUNCH(kernel, blocks, stream, ...) cuda_on_cpu::launch(blocks, [=] { kernel(__VA_ARGS__); })

using std::min;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaFree(void*) { return cudaSuccess; }

struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half { _Float16 x; };
inline float __half2float(__half h) { return (float)h.x; }
inline __half __float2half(float f) { return {(_Float16)f}; }

struct __nv_bfloat16 { uint16_t x; };  // the upper half of a float
inline float __bfloat162float(__nv_bfloat16 b) {
    uint32_t bits = (uint32_t)b.x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct uint3 { unsigned x; };
inline uint3 threadIdx, blockIdx;

namespace cuda_on_cpu {
constexpr int THREADS = 64, STACK = 64 * 1024;
inline ucontext_t scheduler, fiber[THREADS];
inline char stack[THREADS][STACK];
inline int finished;
inline std::function<void()> body;

inline void run_thread() { body(); finished++; }  // returning goes on in the scheduler (uc_link)

inline void launch(unsigned blocks, std::function<void()> kernel) {
    body = kernel;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (int i = 0; i < THREADS; i++) {
            getcontext(&fiber[i]);
            fiber[i].uc_stack.ss_sp = stack[i];
            fiber[i].uc_stack.ss_size = STACK;
            fiber[i].uc_link = &scheduler;
            makecontext(&fiber[i], run_thread, 0);
        }
        for (finished = 0; finished == 0;) {  // each round takes every thread to its next barrier, or to its end
            for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) swapcontext(&scheduler, &fiber[threadIdx.x]);
            if (finished % THREADS) fprintf(stderr, "only some threads reached __syncthreads()\n"), abort();
        }
    }
}
}  // namespace cuda_on_cpu

inline void __syncthreads() {
    using namespace cuda_on_cpu;
    swapcontext(&fiber[threadIdx.x], &scheduler);
}
