// One token of each of M sequences through a whole RWKV-6 or RWKV-7, for generation on a CPU. At few rows everything waits
// for the weights, so each is read once, in the order it lies in memory, by threads that meet at a barrier between layers'
// parts. Weights and shifts are fp32 or bf16 (T), everything else fp32. A row's numbers do not depend on the number of threads,
// nor on the other rows where there are any: one row alone sums in another order. The formulas are model.py's, names too.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>
#define PAIRS
constexpr bool HAS_PAIRS = true;  // an instruction for bf16: sum += a[1] b[1], then sum += a[0] b[0], in every 32-bit lane
#else
constexpr bool HAS_PAIRS = false;
#endif
template <class T> constexpr bool in_pairs = sizeof(T) == 2 && HAS_PAIRS;
// What a product takes: with such an instruction bf16. One row alone is rounded too, so that it agrees with itself among others.
template <class T> static float narrow(float x) { return in_pairs<T> ? as_float((uint32_t)as_bf16(x) << 16) : x; }

static float f32(float x) { return x; }
static float f32(uint16_t x) { return as_float((uint32_t)x << 16); }
#define UNROLL _Pragma("GCC unroll 8")
static void set(float& to, float x) { to = x; }
static void set(uint16_t& to, float x) { to = as_bf16(x); }
static uint32_t pair(const float* x) { return as_int(x[0]) >> 16 | (as_int(x[1]) & 0xffff0000); }  // of narrow ones

typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));  // at any address
typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * W)));
static vec load(const float* p) { return *(const loose*)p; }
static vec load(const uint16_t* p) { return (vec)(__builtin_convertvector(*(const halves*)p, words) << 16); }

template <int n> struct Lanes { typedef float type __attribute__((vector_size(4 * n), aligned(4), may_alias)); };
template <int n, class X> static float total(X x) {
    if constexpr (n == 2) return x[0] + x[1];
    else {
        typename Lanes<n / 2>::type half[2];
        memcpy(half, &x, sizeof half);
        return total<n / 2>(half[0] + half[1]);
    }
}
static float dot(const float* x, const float* y, int n) {  // four sums at a time: one waits for the last
    vec sum[4] = {};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        UNROLL for (int q = 0; q < 4; q++) sum[q] += load(x + i + q * W) * load(y + i + q * W);
    for (; i < n; i += W) sum[0] += load(x + i) * load(y + i);
    return total<W>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
// two products with y, for memory gives two rows that are far from each other sooner than one after the other
template <class T> [[gnu::noinline]] static void two_dots(const T* x1, const T* x2, const float* y, int n, float* to1, float* to2) {
    vec sum[2][4] = {};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        UNROLL for (int q = 0; q < 4; q++) {
            const vec yq = load(y + i + q * W);
            sum[0][q] += load(x1 + i + q * W) * yq, sum[1][q] += load(x2 + i + q * W) * yq;
        }
    }
    for (; i < n; i += W) sum[0][0] += load(x1 + i) * load(y + i), sum[1][0] += load(x2 + i) * load(y + i);
    *to1 = total<W>((sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3]));
    *to2 = total<W>((sum[1][0] + sum[1][1]) + (sum[1][2] + sum[1][3]));
}
#ifdef PAIRS  // the same, of y in bf16 too
[[gnu::noinline]] static void two_dots(const uint16_t* x1, const uint16_t* x2, const uint16_t* y, int n, float* to1, float* to2) {
    auto at = [](const uint16_t* p, int rest) { return (__m512bh)_mm512_maskz_loadu_epi16(rest < 32 ? 0xffff : 0xffffffff, p); };
    __m512 sum[2][4] = {};
    int i = 0;
    for (; i + 128 <= n; i += 128)
        UNROLL for (int q = 0; q < 4; q++) {
            const __m512bh yq = at(y + i + q * 32, 32);
            sum[0][q] = _mm512_dpbf16_ps(sum[0][q], at(x1 + i + q * 32, 32), yq);
            sum[1][q] = _mm512_dpbf16_ps(sum[1][q], at(x2 + i + q * 32, 32), yq);
        }
    for (; i < n; i += 32) {  // n is whole 16s
        sum[0][0] = _mm512_dpbf16_ps(sum[0][0], at(x1 + i, n - i), at(y + i, n - i));
        sum[1][0] = _mm512_dpbf16_ps(sum[1][0], at(x2 + i, n - i), at(y + i, n - i));
    }
    *to1 = total<16>((vec)((sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3])));
    *to2 = total<16>((vec)((sum[1][0] + sum[1][1]) + (sum[1][2] + sum[1][3])));
}
#endif
static float sigmoid(float x) {
    const float e = exp_(-fabsf(x));
    return (x < 0 ? e : 1.f) / (1.f + e);
}

// ---------------------------------------------------------------------------------------------------------------------
// products with few rows x

// y [O, R] = w [O, K] x [K, R], with the lanes on the rows of the batch; `next` is what will be wanted after w
template <int O, int R, class T> [[gnu::noinline]] static void block(const float* w, const float* x, int K, float* y, const T* next) {
    typedef typename Lanes<R>::type lanes;
    lanes sum[O] = {};
    for (int i = 0; i < K; i += 16) {
        UNROLL for (int o = 0; o < O; o++) __builtin_prefetch(next + (size_t)o * K + i);
        for (int j = i; j < i + 16; j++) {
            const lanes xj = *(lanes*)(x + (size_t)j * R);
            UNROLL for (int o = 0; o < O; o++) sum[o] += w[(size_t)o * K + j] * xj;
        }
    }
    for (int o = 0; o < O; o++) *(lanes*)(y + o * R) = sum[o];
}

#ifdef PAIRS
static Lanes<4>::type add_pair(Lanes<4>::type sum, uint32_t w, Lanes<4>::type x) {
    return _mm_dpbf16_ps(sum, (__m128bh)_mm_set1_epi32(w), (__m128bh)x);
}
static Lanes<8>::type add_pair(Lanes<8>::type sum, uint32_t w, Lanes<8>::type x) {
    return _mm256_dpbf16_ps(sum, (__m256bh)_mm256_set1_epi32(w), (__m256bh)x);
}
static Lanes<16>::type add_pair(Lanes<16>::type sum, uint32_t w, Lanes<16>::type x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(w), (__m512bh)x);
}
// the same in bf16, x as pairs [K / 2, R]
template <int O, int R> [[gnu::noinline]] static void block(const uint16_t* w, const uint32_t* x, int K, float* y, const uint16_t* next) {
    typedef typename Lanes<R>::type lanes;
    lanes sum[O] = {};
    for (int i = 0; i < K; i += 16) {
        UNROLL for (int o = 0; o < O; o++) __builtin_prefetch(next + (size_t)o * K + i);
        for (int j = i; j < i + 16; j += 2) {
            const lanes xj = *(lanes*)(x + (size_t)j / 2 * R);
            UNROLL for (int o = 0; o < O; o++) {
                uint32_t pair;
                memcpy(&pair, w + (size_t)o * K + j, 4);
                sum[o] = add_pair(sum[o], pair, xj);
            }
        }
    }
    for (int o = 0; o < O; o++) *(lanes*)(y + o * R) = sum[o];
}
#endif

template <int R, class T, class F> static void batch(const T* w, const float* x, int M, int K, int from, int to, float* scratch, F done) {
    constexpr int O = 8;
    float *turned = scratch, *wide = scratch + (size_t)R * K;
    uint32_t* pairs = (uint32_t*)turned;
    alignas(64) float y[O * R];
    for (int m = 0; m < M; m += R) {
        const int rows = M - m < R ? M - m : R;
        if constexpr (in_pairs<T>)
            for (int j = 0; j < K; j += 2)
                for (int i = 0; i < R; i++) pairs[(size_t)j / 2 * R + i] = i < rows ? pair(x + (size_t)(m + i) * K + j) : 0;
        else
            for (int j = 0; j < K; j++)
                for (int i = 0; i < R; i++) turned[(size_t)j * R + i] = i < rows ? x[(size_t)(m + i) * K + j] : 0;
        for (int o = from, n; o < to; o += n) {
            n = std::min(O, to - o);  // the last block is one of 8 too: one of another size may round otherwise
            const T* p = w + (size_t)o * K;
            if constexpr (in_pairs<T>) {
                if (n < O) memcpy(wide, p, sizeof(T) * n * K);
                block<O, R>(n < O ? (const T*)wide : p, pairs, K, y, p + O * K);
            } else if (sizeof(T) == 4 && n == O) block<O, R>((const float*)p, turned, K, y, p + O * K);
            else {
                for (int i = 0; i < n * K; i += W) *(loose*)(wide + i) = load(p + i);
                block<O, R>(wide, turned, K, y, p + O * K);
            }
            for (int i = 0; i < n; i++)
                for (int k = 0; k < rows; k++) done(m + k, o + i, y[i * R + k]);
        }
    }
}

// done(m, o, sum_j w[o, j] x[m, j]) for rows from <= o < to of w [*, K] and x [M, K]; scratch for 24 K numbers
template <class T, class F> static void rows(const T* w, const float* x, int M, int K, int from, int to, float* scratch, F done) {
    if (M == 1) {
        typedef std::conditional_t<in_pairs<T>, uint16_t, float> number;
        uint32_t* pairs = (uint32_t*)scratch;
        if (in_pairs<T>)
            for (int j = 0; j < K; j += 2) pairs[j / 2] = pair(x + j);
        const number* xs = in_pairs<T> ? (const number*)pairs : (const number*)x;
        const int half = (to - from + 1) / 2;
        for (int o = from; o < from + half; o++) {
            const int far = std::min(o + half, to - 1);  // of an odd number the last one is far from itself
            float y1, y2;
            two_dots(w + (size_t)o * K, w + (size_t)far * K, xs, K, &y1, &y2);
            done(0, o, y1);
            if (o + half < to) done(0, far, y2);
        }
    } else if (M <= 4 || W == 4) batch<4>(w, x, M, K, from, to, scratch, done);
    else if (M <= 8 || W == 8) batch<8>(w, x, M, K, from, to, scratch, done);
    else batch<16>(w, x, M, K, from, to, scratch, done);
}

// y[m, c] = sum_j x[m, j] w[j, c] for `rows` m and as many vectors of columns c of w [K, n]; so many numbers in a row of x and y
template <int rows, int vectors, class T> static void columns(const T* w, const float* x, int K, int n, float* y, int x_row, int y_row) {
    vec sum[rows][vectors] = {};
    for (int j = 0; j < K; j++)
        UNROLL for (int q = 0; q < vectors; q++) {
            const vec wq = load(w + (size_t)j * n + q * W);
            UNROLL for (int m = 0; m < rows; m++) sum[m][q] += wq * x[(size_t)m * x_row + j];
        }
    for (int m = 0; m < rows; m++)
        for (int q = 0; q < vectors; q++) *(loose*)(y + (size_t)m * y_row + q * W) = sum[m][q];
}

// the same for all M rows, and columns from <= c < to
template <class T> static void columns(const T* w, const float* x, int M, int K, int n, int from, int to, float* y,
                                       int x_row, int y_row) {
    constexpr int R = 4;
    for (int c = from; c < to;) {
        const bool four = to - c >= 4 * W;
        for (int m = 0; m < M;) {
            const float* xm = x + (size_t)m * x_row;
            float* ym = y + (size_t)m * y_row + c;
            const bool some = M - m >= R;
            if (four && some) columns<R, 4>(w + c, xm, K, n, ym, x_row, y_row);
            else if (four) columns<1, 4>(w + c, xm, K, n, ym, x_row, y_row);
            else if (some) columns<R, 1>(w + c, xm, K, n, ym, x_row, y_row);
            else columns<1, 1>(w + c, xm, K, n, ym, x_row, y_row);
            m += some ? R : 1;
        }
        c += four ? 4 * W : W;
    }
}

// sum[c] += x[0] w[0][c] + .. one after the other for c < n; `next` is what will be wanted after w
template <int rows, class T> static void add_rows(const T* const* w, const T* const* next, const float* x, float* sum, int n) {
    for (int c = 0; c < n; c += W) {
        UNROLL for (int i = 0; i < rows; i++) __builtin_prefetch(next[i] + c);
        vec s = load(sum + c);
        UNROLL for (int i = 0; i < rows; i++) s += load(w[i] + c) * x[i];
        *(loose*)(sum + c) = s;
    }
}

// done(m, c, sum_j x[m, j] w[j, c]) for columns from <= c < to of w [K, n], x [M, K]. Each sum goes over the j in the
// order of batch(), and a w[j] for which all x[m, j] are 0 is not read. False, and nothing done, if these are so few
// that it does not pay. Scratch for K + M (to - from) numbers.
template <class T, class F> static bool nonzero_rows(const T* w, const float* x, int M, int K, int n, int from, int to,
                                                     float* scratch, F done) {
    constexpr int G = 8;
    int *at = (int*)scratch, count = 0, width = to - from;
    float* sum = scratch + K;
    for (int i = 0; i < K; i++) {
        const int j = in_pairs<T> ? i ^ 1 : i;
        bool counts = false;
        for (int m = 0; m < M; m++) counts |= x[(size_t)m * K + j] != 0;  // true of what is not a number
        at[count] = j, count += counts;
    }
    if (count > K - K / (in_pairs<T> ? 4 : 8)) return false;
    memset(sum, 0, sizeof(float) * M * width);
    const T *row[G], *next[G];
    float xs[G];
    for (int i = 0; i < count; i += G) {
        const int some = std::min(G, count - i);
        for (int k = 0; k < some; k++) {
            row[k] = w + (size_t)at[i + k] * n + from;
            next[k] = w + (size_t)at[std::min(i + k + G, count - 1)] * n + from;
        }
        for (int m = 0; m < M; m++) {
            for (int k = 0; k < some; k++) xs[k] = x[(size_t)m * K + at[i + k]];
            if (some == G) add_rows<G>(row, next, xs, sum + m * width, width);
            else for (int k = 0; k < some; k++) add_rows<1>(row + k, next + k, xs + k, sum + m * width, width);
        }
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < width; c++) done(m, from + c, sum[m * width + c]);
    return true;
}

template <class T> static void layer_norm(const float* x, const T* w, const T* b, float* y, int n, float eps) {
    vec sum = {}, square = {};
    for (int i = 0; i < n; i += W) sum += load(x + i);
    const float mean = total<W>(sum) / n;
    for (int i = 0; i < n; i += W) { const vec d = load(x + i) - mean; square += d * d; }
    const float scale = 1.f / sqrtf(total<W>(square) / n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * f32(w[i]) + f32(b[i]);
}

// ---------------------------------------------------------------------------------------------------------------------

struct Sizes { int version, half, M, L, C, N, F, V, threads, decay, iclr, value, gate, mix; };  // as cpu.py has them

template <class T> struct Step : Sizes {
    T **weights, **turned, *att_shift, *ffn_shift;  // weights in the order of the model's parameters, the embedding first;
                                          // turned: each layer's ffn.value again, as [F, C]; null for many rows
    const int64_t* ids;
    float *wkv, *logits;                  // wkv [L, M, H, N, N]; shifts [L, M, C]
    std::unique_ptr<float[]> memory;
    float *x, *h, *delta, *y, *r, *k, *v, *v_first, *w, *a, *g, *mixed[6], *ffn, *low[4], *scratch;
    size_t scratch_size;
    std::atomic<int> waiting{0}, round{0};

    Step(const Sizes& z, void** p, void** turned, void** io) : Sizes(z), weights((T**)p), turned((T**)turned),
            att_shift((T*)io[2]), ffn_shift((T*)io[3]), ids((int64_t*)io[0]), wkv((float*)io[1]), logits((float*)io[4]) {
        const size_t MC = (size_t)M * C, ranks[4] = {(size_t)decay, (size_t)(mix ? 5 * mix : iclr), (size_t)value, (size_t)gate};
        scratch_size = (size_t)24 * (C > F ? C : F);
        memory.reset(new float[17 * MC + (size_t)M * (F + ranks[0] + ranks[1] + ranks[2] + ranks[3]) + threads * scratch_size + 16]);
        float* next = (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        for (auto p : {&x, &h, &delta, &y, &r, &k, &v, &v_first, &w, &a, &g}) *p = next, next += MC;
        for (auto& p : mixed) p = next, next += MC;
        ffn = next, next += (size_t)M * F;
        for (int i = 0; i < 4; i++) low[i] = next, next += M * ranks[i];
        scratch = next;
    }

    void meet() {  // every thread has come this far
        const int now = round;
        if (++waiting == threads) waiting = 0, round = now + 1;
        else for (int spins = 0; round == now; spins++)
            if (spins > 4000) std::this_thread::yield();
    }

    // the part of thread `me` of n things, in whole `unit`s
    struct Part { int from, to; };
    Part part(int me, int n, int unit = 1) const {
        const int units = (n + unit - 1) / unit, end = (int)((int64_t)units * (me + 1) / threads) * unit;
        return {(int)((int64_t)units * me / threads) * unit, end < n ? end : n};
    }

    // `to` = w x of my share of the rows, each y handed through f(m, o, y)
    template <class F> void product(int me, const T* w, const float* x, int K, int n, float* to, F f) {
        const Part p = part(me, n, 8);
        rows(w, x, M, K, p.from, p.to, scratch + me * scratch_size, [&](int m, int o, float y) { to[(size_t)m * n + o] = f(m, o, y); });
    }
    void product(int me, const T* w, const float* x, int K, int n, float* to) {
        product(me, w, x, K, n, to, [](int, int, float y) { return y; });
    }
    template <class F> void down(int me, const T* w, const float* x, int n, float* to, F f) {  // to = f(x w), w [C, n]
        const Part p = part(me, n, W);
        columns(w, x, M, C, n, p.from, p.to, to, C, n);
        for (int m = 0; m < M; m++)
            for (int i = p.from; i < p.to; i++) to[m * n + i] = f(to[m * n + i]);
    }

    // x = f(w ffn): relu^2 leaves most of ffn at 0, and transposed weights can leave out what that multiplies
    template <class Add> void channels(int me, const T* w, int layer, Add f) {
        const Part p = part(me, C, W);
        auto done = [&](int m, int o, float y) { x[(size_t)m * C + o] = f(m, o, y); };
        float* own = scratch + me * scratch_size;
        if (!turned || !nonzero_rows(turned[layer], ffn, M, F, C, p.from, p.to, own, done)) product(me, w, ffn, F, C, x, f);
    }

    // h = norm(x); delta = the row before - h; its place is taken
    void norm_and_shift(int m, const T* weight, const T* bias, T* shift) {
        float *hm = h + (size_t)m * C, *d = delta + (size_t)m * C;
        layer_norm(x + (size_t)m * C, weight, bias, hm, C, 1e-5f);
        for (int i = 0; i < C; i++) d[i] = f32(shift[i]) - hm[i];
        for (int i = 0; i < C; i++) set(shift[i], hm[i]);
    }
    void mix_in(int m, const T* weight, float* to) const {
        const size_t at = (size_t)m * C;
        for (int i = 0; i < C; i++) to[at + i] = narrow<T>(h[at + i] + delta[at + i] * f32(weight[i]));
    }

    void run(int me) {
        T** next = weights;
        auto take = [&](auto&... p) { ((p = *next++), ...); };
        T *emb, *ln0w, *ln0b, *ln1w, *ln1b, *ln2w, *ln2b, *lnxw, *lnxb, *receptance, *key, *value_, *gate_, *output;
        T *maa[6], *w0, *w1, *w2, *a0, *a1, *a2, *v0, *v1, *v2, *g1, *g2, *k_k, *k_a, *r_k, *maa_w1, *maa_w2;
        T *ffn_x_k, *ffn_x_r, *ffn_key, *ffn_value, *ffn_receptance;
        const bool seven = version == 7;
        const Part my_rows = part(me, M), my_heads = part(me, C / N);
        const int from = my_heads.from * N, to = my_heads.to * N;
        take(emb);
        for (int layer = 0; layer < L; layer++) {
            if (layer == 0) take(ln0w, ln0b);
            take(ln1w, ln1b, ln2w, ln2b, maa[0], maa[1], maa[2], maa[3], maa[4], maa[5]);
            if (seven) take(w0, w1, w2, a0, a1, a2, v0, v1, v2, g1, g2, k_k, k_a, r_k, receptance, key, value_, output);
            else take(maa_w1, maa_w2, w0, w1, w2, r_k, receptance, key, value_, gate_, output);
            take(lnxw, lnxb, ffn_x_k);
            if (!seven) take(ffn_x_r);
            take(ffn_key, ffn_value);
            if (!seven) take(ffn_receptance);

            for (int m = my_rows.from; m < my_rows.to; m++) {
                float* xm = x + (size_t)m * C;
                if (layer == 0) {
                    for (int i = 0; i < C; i++) h[(size_t)m * C + i] = f32(emb[(size_t)ids[m] * C + i]);
                    layer_norm(h + (size_t)m * C, ln0w, ln0b, xm, C, 1e-5f);
                }
                norm_and_shift(m, ln1w, ln1b, att_shift + ((size_t)layer * M + m) * C);
                for (int i = 0; i < (seven ? 6 : 1); i++) mix_in(m, maa[i], mixed[i]);
            }
            meet();
            const float *xr = mixed[0], *xw = mixed[1], *xk = mixed[2], *xv = mixed[3], *xa = mixed[4], *xg = mixed[5];
            auto tanh_ = [](float x) { return tanhf(x); };
            auto same = [](float x) { return x; };
            if (seven) {
                down(me, w1, xw, decay, low[0], tanh_);
                down(me, a1, xa, iclr, low[1], same);
                if (layer) down(me, v1, xv, value, low[2], same);
                down(me, g1, xg, gate, low[3], sigmoid);
            } else {  // what is mixed depends on the token: maa[i] + the i-th part of tanh(x_x w1) w2
                down(me, maa_w1, mixed[0], 5 * mix, low[1], tanh_);
                meet();
                for (int i = 0; i < 5; i++) {  // w k v r g
                    columns(maa_w2 + (size_t)i * mix * C, low[1] + i * mix, M, mix, C, from, to, mixed[i + 1], 5 * mix, C);
                    for (int m = 0; m < M; m++)
                        for (size_t j = (size_t)m * C + from; j < (size_t)m * C + to; j++)
                            mixed[i + 1][j] = narrow<T>(h[j] + delta[j] * (mixed[i + 1][j] + f32(maa[i + 1][j - (size_t)m * C])));
                }
                meet();
                xw = mixed[1], xk = mixed[2], xv = mixed[3], xr = mixed[4];
                down(me, w1, xw, decay, low[0], tanh_);
                product(me, gate_, xg, C, C, g, [](int, int, float x) { return x * sigmoid(x); });
            }
            product(me, receptance, xr, C, C, r);
            product(me, key, xk, C, C, k);
            product(me, value_, xv, C, C, v);
            meet();
            columns(w2, low[0], M, decay, C, from, to, w, decay, C);
            if (seven) {
                columns(a2, low[1], M, iclr, C, from, to, a, iclr, C);
                columns(g2, low[3], M, gate, C, from, to, g, gate, C);
                if (layer) columns(v2, low[2], M, value, C, from, to, delta, value, C);
            }
            for (int m = 0; m < M; m++)
                for (int head = my_heads.from; head < my_heads.to; head++) {
                    const size_t j = (size_t)m * C + head * N;
                    float* S = wkv + (((size_t)layer * M + m) * C + head * N) * N;
                    float bonus;
                    if (seven) bonus = recur7(S, j, head * N, layer, w0, a0, v0, k_k, k_a, r_k);
                    else bonus = recur6(S, j, head * N, w0, r_k), bonus = 0;
                    layer_norm(y + j, lnxw + head * N, lnxb + head * N, y + j, N, 64e-5f);
                    for (int i = 0; i < N; i++) y[j + i] = narrow<T>((y[j + i] + bonus * v[j + i]) * g[j + i]);
                }
            meet();
            auto add = [&](int m, int o, float y) { return x[(size_t)m * C + o] + y; };
            product(me, output, y, C, C, x, add);
            meet();
            for (int m = my_rows.from; m < my_rows.to; m++) {
                norm_and_shift(m, ln2w, ln2b, ffn_shift + ((size_t)layer * M + m) * C);
                mix_in(m, ffn_x_k, mixed[0]);
                if (!seven) mix_in(m, ffn_x_r, mixed[1]);
            }
            meet();
            product(me, ffn_key, mixed[0], C, F, ffn, [](int, int, float k) { return k > 0 ? narrow<T>(k * k) : k == k ? 0 : k; });
            if (!seven) product(me, ffn_receptance, mixed[1], C, C, r, [](int, int, float r) { return sigmoid(r); });
            meet();
            auto add_gated = [&](int m, int o, float y) { return x[(size_t)m * C + o] + r[(size_t)m * C + o] * y; };
            if (seven) channels(me, ffn_value, layer, add);
            else channels(me, ffn_value, layer, add_gated);
            meet();
        }
        T *ln_out_w, *ln_out_b, *head;
        take(ln_out_w, ln_out_b, head);
        for (int m = my_rows.from; m < my_rows.to; m++) {
            float* hm = h + (size_t)m * C;
            layer_norm(x + (size_t)m * C, ln_out_w, ln_out_b, hm, C, 1e-5f);
            for (int i = 0; i < C; i++) hm[i] = narrow<T>(hm[i]);
        }
        meet();
        product(me, head, h, C, V, logits);
    }

    // the head whose numbers begin at j of a row of all [M, C], at c of [C]; y is written; -> r k' r_k, what is v's share in y
    float recur7(float* S, size_t j, int c, int layer, T* w0, T* a0, T* v0, T* k_k, T* k_a, T* r_k) {
        float kappa[128], b[128], length = 0, bonus = 0, *r = this->r + j, *k = this->k + j, *v = this->v + j;
        for (int i = 0; i < N; i++) {
            w[j + i] = exp_(-0.60653066f * sigmoid(f32(w0[c + i]) + w[j + i]));
            a[j + i] = sigmoid(f32(a0[c + i]) + a[j + i]);
            kappa[i] = k[i] * f32(k_k[c + i]);
            k[i] *= 1 + (a[j + i] - 1) * f32(k_a[c + i]);
        }
        if (layer == 0) memcpy(v_first + j, v, 4 * N);
        else for (int i = 0; i < N; i++) v[i] += (v_first[j + i] - v[i]) * sigmoid(f32(v0[c + i]) + delta[j + i]);
        length = fmaxf(sqrtf(dot(kappa, kappa, N)), 1e-12f);
        for (int i = 0; i < N; i++) kappa[i] /= length, b[i] = kappa[i] * a[j + i], bonus += r[i] * k[i] * f32(r_k[c + i]);
        for (int i = 0; i < N; i++, S += N) {
            const float sa = -dot(S, kappa, N);
            vec sum = {};
            for (int q = 0; q < N; q += W) {
                const vec s = load(S + q) * load(w + j + q) + (load(b + q) * sa + load(k + q) * v[i]);
                *(loose*)(S + q) = s, sum += s * load(r + q);
            }
            y[j + i] = total<W>(sum);
        }
        return bonus;
    }

    float recur6(float* S, size_t j, int c, T* w0, T* u) {
        const float *r = this->r + j, *k = this->k + j, *v = this->v + j;
        float bonus = 0;
        for (int i = 0; i < N; i++) {
            w[j + i] = expf(-expf(f32(w0[c + i]) + w[j + i]));
            bonus += r[i] * k[i] * f32(u[c + i]);
        }
        for (int i = 0; i < N; i++, S += N) {
            y[j + i] = dot(S, r, N) + bonus * v[i];
            for (int q = 0; q < N; q += W) *(loose*)(S + q) = load(S + q) * load(w + j + q) + load(k + q) * v[i];
        }
        return bonus;
    }
};

template <class T> static void run(const Sizes& z, void** weights, void** turned, void** io) {
    Step<T> step(z, weights, turned, io);
    std::vector<std::thread> others;
    for (int i = 1; i < z.threads; i++) others.emplace_back([&, i] { step.run(i); });
    step.run(0);
    for (auto& thread : others) thread.join();
}

// weights, turned: see Step. io: ids [M] int64, wkv, att_shift, ffn_shift (all three written), logits [M, V]; 0, or 1 if an id is none of V
extern "C" int rwkv_step(const int* sizes, void** weights, void** turned, void** io) {
    Sizes z;
    memcpy(&z, sizes, sizeof z);
    for (int m = 0; m < z.M; m++)
        if (((int64_t*)io[0])[m] < 0 || ((int64_t*)io[0])[m] >= z.V) return 1;
    z.half ? run<uint16_t>(z, weights, turned, io) : run<float>(z, weights, turned, io);
    return 0;
}
