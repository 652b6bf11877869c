// WKV-6 and WKV-7 on a CPU, token by token, forward and backward. One task per (sequence, head); no task sees another's
// numbers, so the number of threads changes no bit.
//
// Tokens are flat, [total, H, N]: sequence s owns tokens cu[s] .. cu[s+1]. States are [S, H, N, N] fp32, rows = value,
// columns = key. All arithmetic is fp32; r k v a b, y and their gradients are fp32 or bf16 (half).
//
// Nothing is ever summed across the lanes of a vector register. A sum over the columns of S (y, sa, dv, dsa) is done
// with the lanes on rows, a sum over the rows (dr, dk, da, db, dw) with the lanes on columns: the backward walks G =
// dL/dS once in each layout. "Tile" below: R registers of lanes, all rows or columns of S for them: [N][R]. Nothing
// divides by the decay, so exp(logw) may underflow to 0.
#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu.h"

constexpr int CH = 32;   // tokens between two saved states, as in cuda_seq.py

// ---------------------------------------------------------------------------------------------------------------------
// memory <-> rows of fp32

static void load(float* to, const void* from, bool half, int N) {
    if (!half) memcpy(to, from, 4 * N);
    else for (int j = 0; j < N; j++) to[j] = as_float((uint32_t)((const uint16_t*)from)[j] << 16);
}

static void store(void* to, const float* from, bool half, int N) {
    if (!half) memcpy(to, from, 4 * N);
    else for (int j = 0; j < N; j++) ((uint16_t*)to)[j] = as_bf16(from[j]);
}

struct Stream { const void* memory; float* rows; bool half; };  // an operand [total, H, N], and a chunk of it [CH, N]

struct Scratch {  // of one thread
    float *r, *w, *k, *v, *a, *b, *sa, *dy, *y, *dr, *dw, *dk, *dv, *da, *db, *dsa, *u, *du, *ones, *zeros;  // [CH, N]
    float *St, *Gt, *G;  // S and G in tiles: lanes = rows, rows, columns
    float *S;            // the tile of S before each token: columns
    std::vector<Stream> in, out;
    int N, H, head;
    ptrdiff_t ahead;     // first token of the chunk that comes next, or -1
    std::unique_ptr<float[]> memory;

    Scratch(int N, int H) : N(N), H(H), memory(new float[21 * (CH * N + 16) + 3 * N * N + (CH + 1) * N * 2 * W]) {
        float* next = (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        for (auto x : {&r, &w, &k, &v, &a, &b, &sa, &dy, &y, &dr, &dw, &dk, &dv, &da, &db, &dsa, &u, &du, &ones,
                       &zeros})
            *x = next, next += CH * N + 16;  // 16: not all in the same sets of the cache
        St = next, Gt = St + N * N, G = Gt + N * N, S = G + N * N;
        std::fill_n(ones, N, 1.f), std::fill_n(zeros, N, 0.f);
    }

    void* of(const Stream& x, ptrdiff_t token) const {
        return (char*)x.memory + (token * H + head) * N * (x.half ? 2 : 4);
    }

    void load_chunk(ptrdiff_t t0, int n) {
        for (auto& x : in)
            for (int t = 0; t < n; t++) load(x.rows + t * N, of(x, t0 + t), x.half, N);
        for (int i = 0; i < n * N; i++) w[i] = exp_(w[i]);
    }

    void store_chunk(ptrdiff_t t0, int n) const {
        for (auto& x : out)
            for (int t = 0; t < n; t++) store(of(x, t0 + t), x.rows + t * N, x.half, N);
    }

    [[gnu::noinline]] void prefetch(int t) const {  // token t of the next chunk, while this one is worked on
        asm volatile("");  // else GCC takes this for a function without effect
        if (ahead < 0) return;
        for (auto& x : in) {
            const char* p = (char*)of(x, ahead + t);
            for (int i = 0; i < N * (x.half ? 2 : 4); i += 64) __builtin_prefetch(p + i, 0, 2);
        }
    }
};

static float dot(const float* x, const float* y, const float* z, int N) {  // sum_j x y z, in 16 parts
    float p[16] = {}, sum = 0;
    for (int j = 0; j < N; j += 16)
        for (int q = 0; q < 16; q++) p[q] += x[j + q] * y[j + q] * z[j + q];
    for (int q = 0; q < 16; q++) sum += p[q];
    return sum;
}

#define KERNEL template <int R> [[gnu::noinline]] static void  // inlined into one function they run out of registers
#define LANES _Pragma("GCC unroll 4") for (int q = 0; q < R; q++)
#define AT(x, i) at(c.x + t * N + i)  // lanes i .. of token t

// ---------------------------------------------------------------------------------------------------------------------
// WKV-7:  sa_t = S_{t-1} a_t;   S_t = S_{t-1} diag(w_t) + sa_t b_t' + v_t k_t';   y_t = S_t r_t
// and with G_t = dL/dS_t:   G_t = G_{t+1} diag(w_{t+1}) + dsa_{t+1} a_{t+1}' + dy_t r_t';   dv = G k;   dsa = G b;
//   dr = S_t' dy;   dk = G' v;   db = G' sa;   da = S_{t-1}' dsa;   dw = colsum(G * S_{t-1}),  dlogw = w dw

KERNEL forward7(Scratch& c, int i, int n, int N) {  // rows i .. i + R W of S, n tokens
    vec *S = at(c.St + i * N), sa[R] = {};
    for (int j = 0; j < N; j++) LANES sa[q] += S[j * R + q] * c.a[j];
    for (int t = 0; t < n; t++) {
        if (i == 0) c.prefetch(t);
        const float *r = c.r + t * N, *w = c.w + t * N, *k = c.k + t * N, *b = c.b + t * N;
        const float *next = t + 1 < n ? c.a + (t + 1) * N : c.zeros;
        vec v[R], y[R] = {}, sa_next[R] = {};
        LANES v[q] = AT(v, i)[q], AT(sa, i)[q] = sa[q];
        for (int j = 0; j < N; j++) {
            const float wj = w[j], bj = b[j], kj = k[j], rj = r[j], aj = next[j];
            LANES {
                const vec x = S[j * R + q] * wj + (sa[q] * bj + v[q] * kj);
                S[j * R + q] = x, y[q] += x * rj, sa_next[q] += x * aj;
            }
        }
        LANES AT(y, i)[q] = y[q], sa[q] = sa_next[q];
    }
}

KERNEL scan7(Scratch& c, int i, int n, int N) {  // dv and dsa: rows i ..
    vec *G = at(c.Gt + i * N), dsa[R] = {};
    for (int t = n - 1; t >= 0; t--) {
        if (i == 0) c.prefetch(t);
        const float *r = c.r + t * N, *k = c.k + t * N, *b = c.b + t * N;
        const float *w = t + 1 < n ? c.w + (t + 1) * N : c.ones, *a = t + 1 < n ? c.a + (t + 1) * N : c.zeros;
        vec dy[R], dv[R] = {}, sum[R] = {};
        LANES dy[q] = AT(dy, i)[q];
        for (int j = 0; j < N; j++) {
            const float wj = w[j], aj = a[j], rj = r[j], kj = k[j], bj = b[j];
            LANES {
                const vec x = G[j * R + q] * wj + (dsa[q] * aj + dy[q] * rj);
                G[j * R + q] = x, dv[q] += x * kj, sum[q] += x * bj;
            }
        }
        LANES AT(dv, i)[q] = dv[q], AT(dsa, i)[q] = dsa[q] = sum[q];
    }
    for (int j = 0; j < N; j++) LANES G[j * R + q] = G[j * R + q] * c.w[j] + dsa[q] * c.a[j];
}

KERNEL backward7(Scratch& c, int j, int n, int N) {  // the rest: columns j ..
    for (int t = 0; t < n; t++) {
        const float *v = c.v + t * N, *sa = c.sa + t * N, *dy = c.dy + t * N, *dsa = c.dsa + t * N;
        const vec *S = at(c.S) + t * N * R;
        vec *next = at(c.S) + (t + 1) * N * R, w[R], k[R], b[R], dr[R] = {}, da[R] = {};
        LANES w[q] = AT(w, j)[q], k[q] = AT(k, j)[q], b[q] = AT(b, j)[q];
        for (int i = 0; i < N; i++) {
            const float si = sa[i], vi = v[i], di = dy[i], gi = dsa[i];
            LANES {
                const vec x = S[i * R + q] * w[q] + (b[q] * si + k[q] * vi);
                da[q] += S[i * R + q] * gi, next[i * R + q] = x, dr[q] += x * di;
            }
        }
        LANES AT(dr, j)[q] = dr[q], AT(da, j)[q] = da[q];
    }
    vec* G = at(c.G + j * N);
    for (int t = n - 1; t >= 0; t--) {
        const float *v = c.v + t * N, *sa = c.sa + t * N, *dy = c.dy + t * N, *dsa = c.dsa + t * N;
        const vec* S = at(c.S) + t * N * R;
        vec r[R], w[R], a[R], dk[R] = {}, db[R] = {}, dw[R] = {};
        LANES r[q] = AT(r, j)[q], w[q] = AT(w, j)[q], a[q] = AT(a, j)[q];
        for (int i = 0; i < N; i++) {
            const float si = sa[i], vi = v[i], di = dy[i], gi = dsa[i];
            LANES {
                const vec x = G[i * R + q] + r[q] * di;
                dk[q] += x * vi, db[q] += x * si, dw[q] += x * S[i * R + q], G[i * R + q] = x * w[q] + a[q] * gi;
            }
        }
        LANES AT(dk, j)[q] = dk[q], AT(db, j)[q] = db[q], AT(dw, j)[q] = dw[q] * w[q];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// WKV-6:  y_t = (S_{t-1} + v_t (u * k_t)') r_t;   S_t = S_{t-1} diag(w_t) + v_t k_t'
// and with G_t = dL/dS_t, delta = dy . v:   G_{t-1} = G_t diag(w_t) + dy_t r_t';   dv = G k + dy (u * k . r);
//   dk = G' v + delta u r;   dr = S_{t-1}' dy + delta u k;   du = sum delta r k;   dw = colsum(G * S_{t-1})

KERNEL forward6(Scratch& c, int i, int n, int N) {
    vec* S = at(c.St + i * N);
    for (int t = 0; t < n; t++) {
        if (i == 0) c.prefetch(t);
        const float *r = c.r + t * N, *w = c.w + t * N, *k = c.k + t * N, bonus = dot(c.u, k, r, N);
        vec v[R], y[R];
        LANES v[q] = AT(v, i)[q], y[q] = v[q] * bonus;
        for (int j = 0; j < N; j++) {
            const float wj = w[j], kj = k[j], rj = r[j];
            LANES y[q] += S[j * R + q] * rj, S[j * R + q] = S[j * R + q] * wj + v[q] * kj;
        }
        LANES AT(y, i)[q] = y[q];
    }
}

KERNEL scan6(Scratch& c, int i, int n, int N) {
    vec* G = at(c.Gt + i * N);
    for (int t = n - 1; t >= 0; t--) {
        if (i == 0) c.prefetch(t);
        const float *r = c.r + t * N, *w = c.w + t * N, *k = c.k + t * N, bonus = dot(c.u, k, r, N);
        vec dy[R], dv[R];
        LANES dy[q] = AT(dy, i)[q], dv[q] = dy[q] * bonus;
        for (int j = 0; j < N; j++) {
            const float wj = w[j], kj = k[j], rj = r[j];
            LANES dv[q] += G[j * R + q] * kj, G[j * R + q] = G[j * R + q] * wj + dy[q] * rj;
        }
        LANES AT(dv, i)[q] = dv[q];
    }
}

KERNEL backward6(Scratch& c, int j, int n, int N) {
    vec *G = at(c.G + j * N), u[R], du[R] = {};
    for (int t = 0; t < n; t++) {
        vec *S = at(c.S) + t * N * R, *next = S + N * R, w[R], k[R];
        LANES w[q] = AT(w, j)[q], k[q] = AT(k, j)[q];
        for (int i = 0; i < N; i++) {
            const float vi = c.v[t * N + i];
            LANES next[i * R + q] = S[i * R + q] * w[q] + k[q] * vi;
        }
    }
    LANES u[q] = at(c.u + j)[q];
    for (int t = n - 1; t >= 0; t--) {
        const float *v = c.v + t * N, *dy = c.dy + t * N, delta = dot(dy, v, c.ones, N);
        const vec* S = at(c.S) + t * N * R;
        vec r[R], w[R], k[R], dr[R], dk[R], dw[R] = {};
        LANES r[q] = AT(r, j)[q], w[q] = AT(w, j)[q], k[q] = AT(k, j)[q];
        LANES dr[q] = u[q] * k[q] * delta, dk[q] = u[q] * r[q] * delta, du[q] += r[q] * k[q] * delta;
        for (int i = 0; i < N; i++) {
            const float vi = v[i], di = dy[i];
            LANES {
                const vec x = G[i * R + q], s = S[i * R + q];
                dr[q] += s * di, dk[q] += x * vi, dw[q] += x * s, G[i * R + q] = x * w[q] + r[q] * di;
            }
        }
        LANES AT(dr, j)[q] = dr[q], AT(dk, j)[q] = dk[q], AT(dw, j)[q] = dw[q] * w[q];
    }
    LANES at(c.du + j)[q] = du[q];
}

// ---------------------------------------------------------------------------------------------------------------------
// whole sequences

struct Call {  // what cpu.py hands over, in its order; what a version or a direction does not have is null
    int S, H, total, half, threads, N;
    float *r, *logw, *k, *v, *a = 0, *b = 0, *u = 0, *state, *y = 0, *state_out = 0, *sa = 0, *ends;
    float *dy = 0, *dstate_out = 0, *dr = 0, *dlogw = 0, *dk = 0, *dv = 0, *da = 0, *db = 0, *du = 0, *dstate = 0;
    int* cu;

    Call(bool seven, bool backward, void** p, const int* z)
        : S(z[0]), H(z[1]), total(z[2]), half(z[3]), threads(z[4]), N(z[5]) {
        auto take = [&](auto&... x) { ((x = (std::remove_reference_t<decltype(x)>)*p++), ...); };
        take(r, logw, k, v);
        seven ? take(a, b) : take(u);
        take(state, cu);
        if (!backward) take(y, state_out);
        if (seven) take(sa);
        take(ends);
        if (!backward) return;
        take(dy, dstate_out, dr, dlogw, dk, dv);
        seven ? take(da, db) : take(du);
        take(dstate);
    }

    size_t slot(int s, int chunk) const { return cu[s] / CH + s + chunk; }  // of the state after a chunk
    size_t matrix(size_t s, int h) const { return (s * H + h) * N * N; }    // where a state [N, N] begins
};

// a state [N, N] as tiles with L rows of it in the lanes; `turned`, L columns
static size_t place(int i, int j, int N, int L) { return (i / L * N + j) * L + i % L; }

static void to_tiles(float* tiles, const float* state, int N, int L, bool turned) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) tiles[turned ? place(j, i, N, L) : place(i, j, N, L)] = state[i * N + j];
}

static void from_tiles(float* state, const float* tiles, int N, int L, bool turned) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) state[i * N + j] = tiles[turned ? place(j, i, N, L) : place(i, j, N, L)];
}

template <int R> static void forward(const Call& p, int s, int h, Scratch& x) {
    const int N = p.N, L = R * W, start = p.cu[s], end = p.cu[s + 1];
    to_tiles(x.St, p.state + p.matrix(s, h), N, L, false);
    for (int t0 = start; t0 < end; t0 += CH) {
        const int n = std::min(CH, end - t0);
        x.ahead = t0 + 2 * CH <= end ? t0 + CH : -1;
        x.load_chunk(t0, n);
        for (int i = 0; i < N; i += L) p.u ? forward6<R>(x, i, n, N) : forward7<R>(x, i, n, N);
        x.store_chunk(t0, n);
        if (p.ends) from_tiles(p.ends + p.matrix(p.slot(s, (t0 - start) / CH), h), x.St, N, L, false);
    }
    from_tiles(p.state_out + p.matrix(s, h), x.St, N, L, false);
}

template <int R> static void backward(const Call& p, int s, int h, Scratch& x) {
    const int N = p.N, L = R * W, start = p.cu[s], end = p.cu[s + 1], chunks = (end - start + CH - 1) / CH;
    std::fill_n(x.Gt, 2 * N * N, 0.f);  // and G, which lies behind it
    if (p.dstate_out)
        for (bool turned : {false, true}) to_tiles(turned ? x.G : x.Gt, p.dstate_out + p.matrix(s, h), N, L, turned);
    for (int c = chunks - 1; c >= 0; c--) {
        const int t0 = start + c * CH, n = std::min(CH, end - t0);
        const float* S = c ? p.ends + p.matrix(p.slot(s, c - 1), h) : p.state + p.matrix(s, h);
        x.ahead = c ? t0 - CH : -1;
        x.load_chunk(t0, n);
        for (int i = 0; i < N; i += L) p.u ? scan6<R>(x, i, n, N) : scan7<R>(x, i, n, N);
        for (int j = 0; j < N; j += L) {
            for (int i = 0; i < N; i++) memcpy(x.S + i * L, S + i * N + j, 4 * L);
            p.u ? backward6<R>(x, j, n, N) : backward7<R>(x, j, n, N);
        }
        x.store_chunk(t0, n);
        if (p.u) memcpy(p.du + (p.slot(s, c) * p.H + h) * N, x.du, 4 * N);
    }
    from_tiles(p.dstate + p.matrix(s, h), x.G, N, L, true);
}

// pointers and sizes in the order of Call; 0, or 1 if the borders in cu are none
extern "C" int wkv_cpu(int version, int back, void** pointers, const int* sizes) {
    const Call p(version == 7, back, pointers, sizes);
    if (p.cu[0] != 0 || p.cu[p.S] != p.total || !std::is_sorted(p.cu, p.cu + p.S + 1)) return 1;
    std::atomic<int> next{0};
    on_threads(std::min(p.threads, p.S * p.H), [&](int) {
        Scratch x(p.N, p.H);
        const bool half = p.half;
        x.in = {{p.r, x.r, half}, {p.logw, x.w, false}, {p.k, x.k, half}, {p.v, x.v, half}};
        if (version == 7) x.in.insert(x.in.end(), {{p.a, x.a, half}, {p.b, x.b, half}});
        x.out = {{p.y, x.y, half}};
        if (back) {
            x.in.push_back({p.dy, x.dy, half});
            x.out = {{p.dr, x.dr, half}, {p.dlogw, x.dw, false}, {p.dk, x.dk, half}, {p.dv, x.dv, half}};
            if (version == 7) x.out.insert(x.out.end(), {{p.da, x.da, half}, {p.db, x.db, half}});
        }
        if (p.sa) (back ? x.in : x.out).push_back({p.sa, x.sa, false});
        for (int i; (i = next++) < p.S * p.H;) {
            const int s = i / p.H, h = x.head = i % p.H;
            if (p.u) memcpy(x.u, p.u + h * p.N, 4 * p.N);
            if (p.N % (2 * W) == 0) back ? backward<2>(p, s, h, x) : forward<2>(p, s, h, x);
            else back ? backward<1>(p, s, h, x) : forward<1>(p, s, h, x);
        }
    });
    return 0;
}
