// What the C++ sources share: vectors of floats for the compiler, bf16, exp.
#pragma once
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16;    // floats in a vector register
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(4 * W), may_alias));
static inline vec* at(float* x) { return (vec*)x; }

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")  // no turn of the loop reads what another writes
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

static inline float as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint32_t as_int(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline uint16_t as_bf16(float y) {  // the nearest, ties to even
    const uint32_t x = as_int(y);
    return y != y ? 0x7fc0 : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

static inline float exp_(float x) {  // for x <= 0: 2^n e^f, |f| <= ln 2 / 2; 2^n in two halves, so that it may underflow to 0
    x = x < -140.f ? -140.f : x;
    const int n = (int)(x * 1.44269504f - 0.5f), half = n / 2;
    const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.f / 720 + f * (1.f / 5040);
    p = 1.f / 120 + f * p, p = 1.f / 24 + f * p, p = 1.f / 6 + f * p, p = 0.5f + f * p, p = 1 + f * p, p = 1 + f * p;
    return p * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(n - half + 127) << 23);
}

// work(0) .. work(threads - 1), in no order. By OpenMP where there is one: PyTorch's own threads, which wait spinning after
// its operations, and would keep others from their cores.
template <class F> static void on_threads(int threads, F work) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++) work(i);
#else
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(work, i);
    work(0);
    for (auto& thread : others) thread.join();
#endif
}
