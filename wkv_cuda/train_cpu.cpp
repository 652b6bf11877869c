// What training does on a CPU beside matrix products and the recurrence, in as few passes over memory as there can be:
// the end of the loss, and mixing each token with the one before. The number of threads changes no bit.
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

// out_i = x + (before - x) m_i of x, before [rows, C] and J vectors m; and from d out_i those of x, before and every m.
// io: x, before, m [J], out [J];  backward: x, before, m [J], dout [J], dx, dbefore, dm [J]
extern "C" void mix(int back, const int* sizes, void** io) {
    const int rows = sizes[0], C = sizes[1], J = sizes[2], threads = sizes[3];
    float *x = (float*)io[0], *before = (float*)io[1], **m = (float**)io + 2, **out = m + J, **dx = out + J, **dm = dx + 2;
    on_threads(threads, [&](int me) {
        const int from = C / 16 * me / threads * 16, to = me + 1 == threads ? C : C / 16 * (me + 1) / threads * 16, n = to - from;
        std::vector<float> delta(n), part(J * n), sum(J * n);
        for (int row = 0; row < rows; row++) {
            const size_t at = (size_t)row * C + from;
            for (int c = 0; c < n; c++) delta[c] = before[at + c] - x[at + c];
            float *__restrict dxs = back ? dx[0] + at : 0, *__restrict dbs = back ? dx[1] + at : 0;
            if (back) std::fill_n(dxs, n, 0.f), std::fill_n(dbs, n, 0.f);
            for (int i = 0; i < J; i++) {
                float *__restrict o = out[i] + at, *__restrict p = part.data() + i * n;
                const float *__restrict mi = m[i] + from, *__restrict d = delta.data(), *__restrict xs = x + at;
                if (!back) for (int c = 0; c < n; c++) o[c] = xs[c] + d[c] * mi[c];
                else for (int c = 0; c < n; c++) p[c] += o[c] * d[c], dbs[c] += o[c] * mi[c], dxs[c] += o[c];
            }
            if (!back) continue;
            for (int c = 0; c < n; c++) dxs[c] -= dbs[c];
            if (row % 64 == 63 || row + 1 == rows)  // sums of sums: less rounding
                for (int i = 0; i < J * n; i++) sum[i] += part[i], part[i] = 0;
        }
        if (back) for (int i = 0; i < J; i++) std::copy_n(sum.data() + i * n, n, dm[i] + from);
    });
}
