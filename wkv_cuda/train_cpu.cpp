// What training does on a CPU beside matrix products and the recurrence, in as few passes over memory as there can be:
// the end of the loss, mixing each token with the one before, what lies between the products and the recurrence, and the
// channel mix's activation. The formulas are those of fused.py. The number of threads changes no bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"

static float largest(const float* z, int V) {
    float part[16], top = -std::numeric_limits<float>::infinity();
    std::fill_n(part, 16, top);
    int i = 0;
    for (; i + 16 <= V; i += 16)
        for (int q = 0; q < 16; q++) part[q] = z[i + q] > part[q] ? z[i + q] : part[q];
    for (; i < V; i++) top = std::max(top, z[i]);
    return std::max(top, *std::max_element(part, part + 16));
}

// Log-probability, entropy and hit of each target from rows of logits [rows, V], and the gradient in place of the logits.
// The formulas are those of ScoreTokens in fused.py.
struct Scores {
    int rows, V, threads;
    float temperature, l2wrap;
    float *z, *logp, *entropy, *lse, *dlogp, *dentropy;  // the last two: backward; dentropy may be null
    const int64_t* target;
    bool* hit;

    void forward(int row) const {
        const float *x = z + (size_t)row * V, top = largest(x, V), scale = 1 / temperature;
        float part[16] = {}, weighted[16] = {}, sum = 0, mean = 0;  // of e^(z - top), and of that times z - top
        int i = 0;
        for (; i + 16 <= V; i += 16)
            for (int q = 0; q < 16; q++) {
                const float d = (x[i + q] - top) * scale, e = exp_(d);
                part[q] += e, weighted[q] += e * d;
            }
        for (; i < V; i++) {
            const float d = (x[i] - top) * scale, e = exp_(d);
            part[0] += e, weighted[0] += e * d;
        }
        for (int q = 0; q < 16; q++) sum += part[q], mean += weighted[q];
        lse[row] = top * scale + logf(sum);
        logp[row] = (x[target[row]] - top) * scale - logf(sum);
        entropy[row] = logf(sum) - mean / sum;
        hit[row] = x[target[row]] == top;
    }

    void backward(int row) const {
        float* x = z + (size_t)row * V;
        const float scale = 1 / temperature, shift = lse[row], d = dlogp[row] * scale;
        const float e = dentropy ? dentropy[row] * scale : 0, c = dentropy ? e * entropy[row] : 0;
        const int at = l2wrap ? std::max_element(x, x + V) - x : 0;
        const float top = l2wrap * x[at];
        for (int i = 0; i < V; i++) {
            const float logp = x[i] * scale - shift;
            x[i] = -exp_(logp) * (d + c + e * logp);
        }
        x[target[row]] += d;
        if (l2wrap) x[at] -= top * dlogp[row];
    }
};

// io: z, targets, logps, entropy, hits, lse; backward (z becomes its gradient): and dlogps, dentropy
extern "C" int score_rows(int back, const int* sizes, float temperature, float l2wrap, void** io) {
    const Scores s = {sizes[0], sizes[1], sizes[2], temperature, l2wrap, (float*)io[0], (float*)io[2], (float*)io[3],
                      (float*)io[5], (float*)io[6], (float*)io[7], (int64_t*)io[1], (bool*)io[4]};
    for (int row = 0; row < s.rows; row++)
        if (s.target[row] < 0 || s.target[row] >= s.V) return 1;
    on_threads(s.threads, [&](int me) {
        for (int row = me; row < s.rows; row += s.threads) back ? s.backward(row) : s.forward(row);
    });
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors [rows, C] of the tokens. A thread owns channels, whole heads of them, of all rows.

// Sums over the rows, for parameters [C] of one value a channel: sums of the sums of 64 rows, for less rounding.
struct Sums {
    int n, from;
    std::vector<float> part, total;
    Sums(int parameters, int n, int from) : n(n), from(from), part(parameters * n), total(parameters * n) {}
    float* of(int parameter, int channel) { return part.data() + parameter * n + channel - from; }
    void end_row(int row, int rows) {
        if (row % 64 != 63 && row + 1 != rows) return;
        for (size_t i = 0; i < part.size(); i++) total[i] += part[i], part[i] = 0;
    }
    void copy_to(float** out) {
        for (size_t i = 0; i * n < total.size(); i++) std::copy_n(total.data() + i * n, n, out[i] + from);
    }
};

// work(from, to) on each thread, with its part of C channels in blocks that belong together.
template <class F> static void on_channels(int C, int block, int threads, F work) {
    const int blocks = C / block;
    on_threads(threads, [&](int me) {
        const int from = blocks * me / threads * block;
        const int to = me + 1 == threads ? C : blocks * (me + 1) / threads * block;
        if (from < to) work(from, to);
    });
}

static float sum(const float* x, int N) {  // N a multiple of 16
    float part[16] = {}, all = 0;
    for (int j = 0; j < N; j += 16)
        for (int q = 0; q < 16; q++) part[q] += x[j + q];
    for (int q = 0; q < 16; q++) all += part[q];
    return all;
}

static inline float sigmoid(float x) {
    const float e = exp_(-fabsf(x));
    return (x < 0 ? e : 1.f) / (1 + e);
}

// out_i = x + (before - x) (m_i + h_i) of x, before and, if there is one, h_i [rows, C], and J vectors m [C]; and from
// d out_i the gradients of all.
// io: x, before, h [J], m [J], out [J];  backward, with d out in its place: and the gradients of x, before, h [J], m [J]
extern "C" void mix(int back, const int* sizes, void** io) {
    const int rows = sizes[0], C = sizes[1], J = sizes[2], threads = sizes[3];
    const float *x = (float*)io[0], *before = (float*)io[1];
    float **h = (float**)io + 2, **m = h + J, **out = m + J, **dx = out + J, **dh = dx + 2, **dm = dh + J;
    on_channels(C, C % 16 ? 1 : 16, threads, [&](int from, int to) {
        const int n = to - from;
        std::vector<float> differences(n);
        float* delta = differences.data();
        Sums sums(back ? J : 0, n, from);
        for (int row = 0; row < rows; row++) {
            const size_t at = (size_t)row * C + from;
            for (int c = 0; c < n; c++) delta[c] = before[at + c] - x[at + c];
            float *dxs = back ? dx[0] + at : 0, *dbs = back ? dx[1] + at : 0;
            if (back) std::fill_n(dxs, n, 0.f), std::fill_n(dbs, n, 0.f);
            for (int i = 0; i < J; i++) {
                float *o = out[i] + at, *mi = m[i] + from, *hi = h[i] ? h[i] + at : 0;
                if (!back && !hi) INDEPENDENT for (int c = 0; c < n; c++) o[c] = x[at + c] + delta[c] * mi[c];
                if (!back && hi) INDEPENDENT for (int c = 0; c < n; c++) o[c] = x[at + c] + delta[c] * (mi[c] + hi[c]);
                if (!back) continue;
                float *p = sums.of(i, from), *dhi = hi ? dh[i] + at : 0;
                if (!hi) INDEPENDENT for (int c = 0; c < n; c++) {
                    p[c] += o[c] * delta[c], dbs[c] += o[c] * mi[c], dxs[c] += o[c];
                }
                else INDEPENDENT for (int c = 0; c < n; c++) {
                    dhi[c] = o[c] * delta[c], p[c] += dhi[c], dbs[c] += o[c] * (mi[c] + hi[c]), dxs[c] += o[c];
                }
            }
            if (!back) continue;
            for (int c = 0; c < n; c++) dxs[c] -= dbs[c];
            sums.end_row(row, rows);
        }
        if (back) sums.copy_to(dm);
    });
}

// Between RWKV-7's products and its recurrence: gates7 of fused.py. v, v_first, v_raw and v0 may be null: there is then no
// value residual.
struct Gates7 {
    int rows, C, N, threads;
    const float *k, *v, *v_first, *w_raw, *a_raw, *v_raw;    // [rows, C]
    const float *w0, *a0, *k_k, *k_a, *v0;                   // [C]
    float *logw, *k_out, *v_out, *minus_kappa, *kappa_a;     // [rows, C], what comes out, or in backward its gradient
    float *dk, *dv, *dv_first, *dw_raw, *da_raw, *dv_raw, **dparameters;  // these: w0, a0, k_k, k_a, v0

    float removal_key(size_t at, int c, float* kappa) const {  // -> 1 / its length before
        float squares[128];
        INDEPENDENT for (int j = 0; j < N; j++) kappa[j] = k[at + j] * k_k[c + j], squares[j] = kappa[j] * kappa[j];
        const float scale = 1 / std::max(sqrtf(sum(squares, N)), 1e-12f);
        INDEPENDENT for (int j = 0; j < N; j++) kappa[j] *= scale;
        return scale;
    }

    void forward(int row, int c) const {  // one head, from channel c
        const size_t at = (size_t)row * C + c;
        float kappa[128];
        removal_key(at, c, kappa);
        INDEPENDENT for (int j = 0; j < N; j++) {
            const size_t i = at + j;
            const float a = sigmoid(a0[c + j] + a_raw[i]);
            logw[i] = -0.60653066f * sigmoid(w0[c + j] + w_raw[i]);  // e^(-1/2)
            minus_kappa[i] = -kappa[j];
            kappa_a[i] = kappa[j] * a;
            k_out[i] = k[i] * (1 + (a - 1) * k_a[c + j]);
        }
        if (v_first) INDEPENDENT for (int j = 0; j < N; j++) {
            const size_t i = at + j;
            v_out[i] = v[i] + (v_first[i] - v[i]) * sigmoid(v0[c + j] + v_raw[i]);
        }
    }

    void backward(int row, int c, Sums& sums) const {
        const size_t at = (size_t)row * C + c;
        float kappa[128], dkappa[128], along[128], dk_sum[128];
        float *dw0 = sums.of(0, c), *da0 = sums.of(1, c), *dk_k = sums.of(2, c), *dk_a = sums.of(3, c);
        const float scale = removal_key(at, c, kappa);
        INDEPENDENT for (int j = 0; j < N; j++) {
            const size_t i = at + j;
            const float a = sigmoid(a0[c + j] + a_raw[i]), w = sigmoid(w0[c + j] + w_raw[i]);
            const float dkj = k_out[i];
            dkappa[j] = kappa_a[i] * a - minus_kappa[i], along[j] = dkappa[j] * kappa[j];
            dk_sum[j] = dkj * (1 + (a - 1) * k_a[c + j]);
            dk_a[j] += dkj * k[i] * (a - 1);
            da_raw[i] = (kappa_a[i] * kappa[j] + dkj * k[i] * k_a[c + j]) * a * (1 - a);
            dw_raw[i] = logw[i] * -0.60653066f * w * (1 - w);
            da0[j] += da_raw[i], dw0[j] += dw_raw[i];
        }
        const float inside = scale < 1e12f ? sum(along, N) : 0;  // a length of 1e-12 and less is taken as that
        INDEPENDENT for (int j = 0; j < N; j++) {
            const float d = scale * (dkappa[j] - kappa[j] * inside);
            dk[at + j] = dk_sum[j] + d * k_k[c + j], dk_k[j] += d * k[at + j];
        }
        float* dv0 = v_first ? sums.of(4, c) : 0;
        if (v_first) INDEPENDENT for (int j = 0; j < N; j++) {
            const size_t i = at + j;
            const float s = sigmoid(v0[c + j] + v_raw[i]), d = v_out[i];
            dv[i] = d * (1 - s), dv_first[i] = d * s;
            dv_raw[i] = d * (v_first[i] - v[i]) * s * (1 - s);
            dv0[j] += dv_raw[i];
        }
    }
};

// io: k, v, v_first, w_raw, a_raw, v_raw, w0, a0, k_k, k_a, v0, then what comes out: logw, k, v, -kappa, kappa a
// backward, with the gradients of these in their place: and those of what goes in
extern "C" void gates7(int back, const int* sizes, void** io) {
    float** p = (float**)io;
    const Gates7 g = {sizes[0], sizes[1], sizes[2], sizes[3], p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10],
                      p[11], p[12], p[13], p[14], p[15], back ? p[16] : 0, back ? p[17] : 0, back ? p[18] : 0,
                      back ? p[19] : 0, back ? p[20] : 0, back ? p[21] : 0, p + 22};
    on_channels(g.C, g.N, g.threads, [&](int from, int to) {
        Sums sums(back ? 4 + !!g.v_first : 0, to - from, from);
        for (int row = 0; row < g.rows; row++) {
            for (int c = from; c < to; c += g.N) back ? g.backward(row, c, sums) : g.forward(row, c);
            if (back) sums.end_row(row, g.rows);
        }
        if (back) sums.copy_to(g.dparameters);
    });
}

// From the recurrence to the last product: (norm of each head of y, weight and bias, + (r . (r_k * k)) v) * g. r, k, v and
// r_k may be null, as in RWKV-6: there is then no sum.
struct Readout {
    int rows, C, N, threads;
    const float *y, *g, *r, *k, *v;         // [rows, C]
    const float *weight, *bias, *r_k;       // [C]
    float* out;                             // [rows, C], or in backward its gradient
    float *dy, *dg, *dr, *dk, *dv, **dparameters;  // these: weight, bias, r_k

    float norm(size_t at, float* x) const {  // -> 1 / the standard deviation
        float squares[128];
        const float mean = sum(y + at, N) / N;
        INDEPENDENT for (int j = 0; j < N; j++) x[j] = y[at + j] - mean, squares[j] = x[j] * x[j];
        const float scale = 1 / sqrtf(sum(squares, N) / N + 64e-5f);
        INDEPENDENT for (int j = 0; j < N; j++) x[j] *= scale;
        return scale;
    }

    float bonus(size_t at, int c) const {
        float products[128];
        INDEPENDENT for (int j = 0; j < N; j++) products[j] = r[at + j] * k[at + j] * r_k[c + j];
        return sum(products, N);
    }

    void forward(int row, int c) const {
        const size_t at = (size_t)row * C + c;
        float x[128];
        norm(at, x);
        INDEPENDENT for (int j = 0; j < N; j++) x[j] = bias[c + j] + x[j] * weight[c + j];
        if (r) {
            const float b = bonus(at, c);
            INDEPENDENT for (int j = 0; j < N; j++) x[j] += b * v[at + j];
        }
        INDEPENDENT for (int j = 0; j < N; j++) out[at + j] = x[j] * g[at + j];
    }

    void backward(int row, int c, Sums& sums) const {
        const size_t at = (size_t)row * C + c;
        float x[128], dx[128], along[128], z[128];
        float *dweight = sums.of(0, c), *dbias = sums.of(1, c);
        const float scale = norm(at, x), b = r ? bonus(at, c) : 0;
        INDEPENDENT for (int j = 0; j < N; j++) {
            const float d = out[at + j] * g[at + j];
            z[j] = bias[c + j] + x[j] * weight[c + j];
            dx[j] = d * weight[c + j], along[j] = dx[j] * x[j];
            dweight[j] += d * x[j], dbias[j] += d;
        }
        if (r) {
            float* dr_k = sums.of(2, c);
            float products[128];
            INDEPENDENT for (int j = 0; j < N; j++) {
                const float d = out[at + j] * g[at + j];
                products[j] = d * v[at + j], dv[at + j] = d * b, z[j] += b * v[at + j];
            }
            const float db = sum(products, N);
            INDEPENDENT for (int j = 0; j < N; j++) {
                dr[at + j] = db * k[at + j] * r_k[c + j], dk[at + j] = db * r[at + j] * r_k[c + j];
                dr_k[j] += db * r[at + j] * k[at + j];
            }
        }
        const float mean = sum(dx, N) / N, inside = sum(along, N) / N;
        INDEPENDENT for (int j = 0; j < N; j++) {
            dy[at + j] = scale * (dx[j] - mean - x[j] * inside), dg[at + j] = out[at + j] * z[j];
        }
    }
};

// io: y, g, r, k, v, weight, bias, r_k, out;  backward, with d out in its place: and the gradients of y, g, r, k, v, weight,
// bias, r_k
extern "C" void readout(int back, const int* sizes, void** io) {
    float** p = (float**)io;
    const Readout x = {sizes[0], sizes[1], sizes[2], sizes[3], p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8],
                       back ? p[9] : 0, back ? p[10] : 0, back ? p[11] : 0, back ? p[12] : 0, back ? p[13] : 0, p + 14};
    on_channels(x.C, x.N, x.threads, [&](int from, int to) {
        Sums sums(back ? 2 + !!x.r : 0, to - from, from);
        for (int row = 0; row < x.rows; row++) {
            for (int c = from; c < to; c += x.N) back ? x.backward(row, c, sums) : x.forward(row, c);
            if (back) sums.end_row(row, x.rows);
        }
        if (back) sums.copy_to(x.dparameters);
    });
}

// out = max(x, 0)^2 of n numbers, or from dout dx = 2 max(x, 0) dout.  io: x, out;  backward: x, dout, dx
extern "C" void relu_squared(int back, int64_t n, int threads, void** io) {
    const float *x = (float*)io[0], *dout = (float*)io[1];
    float *out = (float*)io[1], *dx = back ? (float*)io[2] : 0;
    on_threads(threads, [&](int me) {
        const int64_t from = n / 16 * me / threads * 16, to = me + 1 == threads ? n : n / 16 * (me + 1) / threads * 16;
        if (back) {
            INDEPENDENT for (int64_t i = from; i < to; i++) dx[i] = 2 * std::max(x[i], 0.f) * dout[i];
        } else {
            INDEPENDENT for (int64_t i = from; i < to; i++) out[i] = std::max(x[i], 0.f) * std::max(x[i], 0.f);
        }
    });
}
