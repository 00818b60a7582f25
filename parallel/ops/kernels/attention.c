/* Causal attention inside documents, block by block, without a score matrix in memory (Dao 2023, arXiv 2307.08691).
 *
 * q, k, v [B*S, D] hold H heads side by side; a query sees the keys of its own segment up to itself. Kept for the
 * gradient: y and the logarithm of each row's sum of exponentials.
 */
#include "kernels.h"

#include <math.h>

#define QUERIES 128

typedef struct {
    const float *q, *k, *v, *y_in, *dy, *log_sum_in;
    const int32_t *segments;
    float *y, *log_sum, *dq, *dk, *dv, scale;
    int64_t batch, length, heads, width, hidden, blocks;
    int failed;
} attention;

/* The first key that query i of a sample sees: documents lie one after another. */
static int64_t first_key(const int32_t *segments, int64_t i) {
    while (i > 0 && segments[i - 1] == segments[i]) i--;
    return i;
}

/* scores [n] of visible keys -> exp(scale * score - max) in place, 0 elsewhere; returns the sum, max in *top. */
MULTIVERSION static float exponentials(float *s, int64_t n, int64_t from, int64_t to, float scale, float *top) {
    float most = largest(s + from, to - from) * scale, sum = 0.0f;
    for (int64_t j = 0; j < from; j++) s[j] = 0.0f;
    for (int64_t j = from; j < to; j++) {
        s[j] = fast_exp(s[j] * scale - most);
        sum += s[j];
    }
    for (int64_t j = to; j < n; j++) s[j] = 0.0f;
    *top = most;
    return sum;
}

MULTIVERSION static void scale_row(float *row, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) row[i] *= factor;
}

static void forward(void *context, int64_t index, int worker) {
    attention *a = context;
    /* Long blocks first, so that the last task of a thread is a short one. */
    int64_t block = a->blocks - 1 - index / (a->batch * a->heads);
    int64_t pair = index % (a->batch * a->heads), b = pair / a->heads, h = pair % a->heads;
    int64_t start = block * QUERIES, end = smaller(start + QUERIES, a->length), rows = end - start;
    const int32_t *segments = a->segments + b * a->length;
    int64_t base = first_key(segments, start), keys = end - base, d = a->hidden, w = a->width;
    float *s = scratch(worker, (size_t)(QUERIES * a->length));
    if (!s) {
        a->failed = 1;
        return;
    }
    int64_t at = b * a->length * d + h * w;
    gemm(0, 1, rows, keys, w, a->q + at + start * d, d, a->k + at + base * d, d, 0.0f, s, keys);
    float sums[QUERIES];
    for (int64_t i = 0, from = base; i < rows; i++) {
        int64_t query = start + i;
        if (query > 0 && segments[query] != segments[query - 1] && query > from) from = query;
        float top;
        sums[i] = exponentials(s + i * keys, keys, from - base, query + 1 - base, a->scale, &top);
        a->log_sum[pair * a->length + query] = top + logf(sums[i]);
    }
    float *y = a->y + at + start * d;
    gemm(0, 0, rows, w, keys, s, keys, a->v + at + base * d, d, 0.0f, y, d);
    for (int64_t i = 0; i < rows; i++) scale_row(y + i * d, w, 1.0f / sums[i]);
}

static int shape_of(attention *a, int64_t **shapes, int segments_at, int heads) {
    a->batch = shapes[segments_at][0], a->length = shapes[segments_at][1];
    a->hidden = shapes[0][1], a->heads = heads;
    if (heads < 1 || a->hidden % heads) return 0;
    a->width = a->hidden / heads;
    a->blocks = parts(a->length, QUERIES);
    a->scale = 1.0f / sqrtf((float)a->width);
    return 1;
}

/* q, k, v [B*S, D], segments int32 [B, S], heads int32 [1] -> y [B*S, D], log sums [B, H, S] */
KERNEL(attention) {
    if (count != 7) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    attention a = {.q = tensors[0], .k = tensors[1], .v = tensors[2], .segments = tensors[3]};
    a.y = tensors[5], a.log_sum = tensors[6];
    if (!shape_of(&a, shapes, 3, *(int32_t *)tensors[4])) return WRONG_INPUT;
    run_tasks(forward, &a, a.blocks * a.batch * a.heads);
    return a.failed ? OUT_OF_MEMORY : OK;
}

/* Turn scores into probabilities and dP into dS = P (dP - delta) scale, for one query. */
MULTIVERSION static void softmax_gradient(float *p, float *dp, int64_t n, int64_t from, int64_t to, float scale,
                                          float log_sum, float delta) {
    for (int64_t j = 0; j < from; j++) p[j] = dp[j] = 0.0f;
    for (int64_t j = from; j < to; j++) {
        p[j] = fast_exp(p[j] * scale - log_sum);
        dp[j] = p[j] * (dp[j] - delta) * scale;
    }
    for (int64_t j = to; j < n; j++) p[j] = dp[j] = 0.0f;
}

MULTIVERSION static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void backward(void *context, int64_t pair, int worker) {
    attention *a = context;
    int64_t b = pair / a->heads, h = pair % a->heads, d = a->hidden, w = a->width;
    const int32_t *segments = a->segments + b * a->length;
    float *p = scratch(worker, (size_t)(2 * QUERIES * a->length));
    if (!p) {
        a->failed = 1;
        return;
    }
    float *dp = p + QUERIES * a->length;
    int64_t at = b * a->length * d + h * w;
    for (int64_t t = 0; t < a->length; t++)
        for (int64_t i = 0; i < w; i++) a->dk[at + t * d + i] = a->dv[at + t * d + i] = 0.0f;
    for (int64_t block = 0; block < a->blocks; block++) {
        int64_t start = block * QUERIES, end = smaller(start + QUERIES, a->length), rows = end - start;
        int64_t base = first_key(segments, start), keys = end - base;
        int64_t queries_at = at + start * d, keys_at = at + base * d;
        gemm(0, 1, rows, keys, w, a->q + queries_at, d, a->k + keys_at, d, 0.0f, p, keys);
        gemm(0, 1, rows, keys, w, a->dy + queries_at, d, a->v + keys_at, d, 0.0f, dp, keys);
        for (int64_t i = 0, from = base; i < rows; i++) {
            int64_t query = start + i;
            if (query > 0 && segments[query] != segments[query - 1] && query > from) from = query;
            float delta = dot(a->dy + queries_at + i * d, a->y_in + queries_at + i * d, w);
            softmax_gradient(p + i * keys, dp + i * keys, keys, from - base, query + 1 - base, a->scale,
                             a->log_sum_in[pair * a->length + query], delta);
        }
        gemm(0, 0, rows, w, keys, dp, keys, a->k + keys_at, d, 0.0f, a->dq + queries_at, d);
        gemm(1, 0, keys, w, rows, dp, keys, a->q + queries_at, d, 1.0f, a->dk + keys_at, d);
        gemm(1, 0, keys, w, rows, p, keys, a->dy + queries_at, d, 1.0f, a->dv + keys_at, d);
    }
}

/* q, k, v, segments, heads, y, log sums, dy -> dq, dk, dv */
KERNEL(attention_gradient) {
    if (count != 11) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    attention a = {.q = tensors[0], .k = tensors[1], .v = tensors[2], .segments = tensors[3]};
    a.y_in = tensors[5], a.log_sum_in = tensors[6], a.dy = tensors[7];
    a.dq = tensors[8], a.dk = tensors[9], a.dv = tensors[10];
    if (!shape_of(&a, shapes, 3, *(int32_t *)tensors[4])) return WRONG_INPUT;
    run_tasks(backward, &a, a.batch * a.heads);
    return a.failed ? OUT_OF_MEMORY : OK;
}
