// Log-probability, entropy and hit of each target from rows of logits [rows, V], and the gradient in place of the logits:
// two passes over memory and one, where PyTorch takes a dozen. The formulas are those of ScoreTokens in model.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
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
    auto work = [&](int me) {
        for (int row = me; row < s.rows; row += s.threads) back ? s.backward(row) : s.forward(row);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < s.threads; i++) others.emplace_back(work, i);
    work(0);
    for (auto& thread : others) thread.join();
    return 0;
}
