/* Token losses of logits_TV = h_TD table_VD^T against labels_T, and the gradient p - onehot without the one-hot. */
#include "kernels.h"

#include <math.h>

#define PRODUCT_ROWS 512
#define PRODUCT_COLUMNS 2048
#define ROWS 256
#define SOFTMAX_ROWS 16
#define VOCABULARY_ROWS 512

typedef struct {
    const float *h, *table, *probabilities_in, *dloss;
    const int32_t *labels;
    float *loss, *probabilities, *dh, *dtable, *weighted;
    int64_t tokens, hidden, vocab, column_parts, row_parts;
} entropy;

static void logits(void *context, int64_t index, int worker) {
    entropy *a = context;
    int64_t t = index / a->column_parts * PRODUCT_ROWS, v = index % a->column_parts * PRODUCT_COLUMNS;
    gemm(0, 1, smaller(PRODUCT_ROWS, a->tokens - t), smaller(PRODUCT_COLUMNS, a->vocab - v), a->hidden,
         a->h + t * a->hidden, a->hidden, a->table + v * a->hidden, a->hidden, 0.0f,
         a->probabilities + t * a->vocab + v, a->vocab);
}

MULTIVERSION static void softmax_row(float *p, int64_t n) {
    float most = largest(p, n), sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        p[i] = fast_exp(p[i] - most);
        sum += p[i];
    }
    sum = 1.0f / sum;
    for (int64_t i = 0; i < n; i++) p[i] *= sum;
}

static void softmax(void *context, int64_t index, int worker) {
    entropy *a = context;
    int64_t last = smaller((index + 1) * SOFTMAX_ROWS, a->tokens);
    for (int64_t t = index * SOFTMAX_ROWS; t < last; t++) {
        float *p = a->probabilities + t * a->vocab;
        softmax_row(p, a->vocab);
        /* An addition that changes no probability above 1e-30 keeps the logarithm finite and lets NaN through. */
        a->loss[t] = -logf(p[a->labels[t]] + 1e-37f);
    }
}

/* h [T, D], table [V, D], labels int32 [T] -> losses [T], probabilities [T, V] */
KERNEL(cross_entropy) {
    if (count != 5) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    entropy a = {.h = tensors[0], .table = tensors[1], .labels = tensors[2]};
    a.loss = tensors[3], a.probabilities = tensors[4];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1], a.vocab = shapes[1][0];
    a.column_parts = parts(a.vocab, PRODUCT_COLUMNS);
    for (int64_t t = 0; t < a.tokens; t++)
        if (a.labels[t] < 0 || a.labels[t] >= a.vocab) return WRONG_INPUT;
    run_tasks(logits, &a, parts(a.tokens, PRODUCT_ROWS) * a.column_parts);
    run_tasks(softmax, &a, parts(a.tokens, SOFTMAX_ROWS));
    return OK;
}

MULTIVERSION static void weigh(float *out, const float *row, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = row[i] * weight;
}

MULTIVERSION static void subtract_and_weigh(float *row, const float *other, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] = (row[i] - other[i]) * weight;
}

MULTIVERSION static void subtract(float *row, const float *other, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] -= other[i];
}

static void weighted_rows(void *context, int64_t index, int worker) {
    entropy *a = context;
    int64_t d = a->hidden, last = smaller((index + 1) * ROWS, a->tokens);
    for (int64_t t = index * ROWS; t < last; t++) weigh(a->weighted + t * d, a->h + t * d, a->dloss[t], d);
}

static void backward(void *context, int64_t index, int worker) {
    entropy *a = context;
    int64_t d = a->hidden;
    if (index < a->row_parts) {
        int64_t first = index * ROWS, last = smaller(first + ROWS, a->tokens);
        gemm(0, 0, last - first, d, a->vocab, a->probabilities_in + first * a->vocab, a->vocab, a->table, d, 0.0f,
             a->dh + first * d, d);
        for (int64_t t = first; t < last; t++)
            subtract_and_weigh(a->dh + t * d, a->table + a->labels[t] * d, a->dloss[t], d);
        return;
    }
    int64_t first = (index - a->row_parts) * VOCABULARY_ROWS, last = smaller(first + VOCABULARY_ROWS, a->vocab);
    gemm(1, 0, last - first, d, a->tokens, a->probabilities_in + first, a->vocab, a->weighted, d, 0.0f,
         a->dtable + first * d, d);
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->labels[t] >= first && a->labels[t] < last)
            subtract(a->dtable + a->labels[t] * d, a->weighted + t * d, d);
}

/* h, table, labels, probabilities, dloss [T] -> dh [T, D], dtable [V, D], a space to work in [T, D] */
KERNEL(cross_entropy_gradient) {
    if (count != 8) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    entropy a = {.h = tensors[0], .table = tensors[1], .labels = tensors[2], .probabilities_in = tensors[3]};
    a.dloss = tensors[4], a.dh = tensors[5], a.dtable = tensors[6], a.weighted = tensors[7];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1], a.vocab = shapes[1][0];
    a.row_parts = parts(a.tokens, ROWS);
    run_tasks(weighted_rows, &a, a.row_parts);
    run_tasks(backward, &a, a.row_parts + parts(a.vocab, VOCABULARY_ROWS));
    return OK;
}
