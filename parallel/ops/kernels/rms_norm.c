/* Normalisation by the root of the mean square over the last axis of x_TD (arXiv 1910.07467) and its gradient. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define ROWS 64

typedef struct {
    const float *x, *gamma, *dy, *inverse_in;
    float *y, *inverse, *dx, *sums, epsilon;
    int64_t tokens, hidden;
} norm;

MULTIVERSION static void normalise(const norm *a, int64_t first, int64_t last) {
    int64_t d = a->hidden;
    for (int64_t t = first; t < last; t++) {
        const float *x = a->x + t * d;
        float *y = a->y + t * d, squares = 0.0f;
        for (int64_t i = 0; i < d; i++) squares += x[i] * x[i];
        float inverse = 1.0f / sqrtf(squares / (float)d + a->epsilon);
        for (int64_t i = 0; i < d; i++) y[i] = x[i] * inverse * a->gamma[i];
        a->inverse[t] = inverse;
    }
}

static void forward(void *context, int64_t index, int worker) {
    norm *a = context;
    normalise(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

/* x [T, D], gamma [D], epsilon [1] -> y [T, D], 1/rms [T] */
KERNEL(rms_norm) {
    if (count != 5) return WRONG_INPUT;
    norm a = {.x = tensors[0], .gamma = tensors[1], .epsilon = *(float *)tensors[2]};
    a.y = tensors[3], a.inverse = tensors[4];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1];
    run_tasks(forward, &a, parts(a.tokens, ROWS));
    return OK;
}

/* dx = r (g - x r^2 mean(g x)), r = 1/rms, g = dy gamma; the sum of dy x r over these rows into `dgamma`. */
MULTIVERSION static void unnormalise(const norm *a, int64_t first, int64_t last, float *dgamma) {
    int64_t d = a->hidden;
    for (int64_t i = 0; i < d; i++) dgamma[i] = 0.0f;
    for (int64_t t = first; t < last; t++) {
        const float *x = a->x + t * d, *dy = a->dy + t * d;
        float *dx = a->dx + t * d, inverse = a->inverse_in[t], along = 0.0f;
        for (int64_t i = 0; i < d; i++) {
            along += dy[i] * a->gamma[i] * x[i];
            dgamma[i] += dy[i] * x[i] * inverse;
        }
        along *= inverse * inverse / (float)d;
        for (int64_t i = 0; i < d; i++) dx[i] = inverse * (dy[i] * a->gamma[i] - x[i] * along);
    }
}

static void backward(void *context, int64_t index, int worker) {
    norm *a = context;
    unnormalise(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens), a->sums + index * a->hidden);
}

/* x, gamma, 1/rms, dy -> dx [T, D], dgamma [D] */
KERNEL(rms_norm_gradient) {
    if (count != 6) return WRONG_INPUT;
    norm a = {.x = tensors[0], .gamma = tensors[1], .inverse_in = tensors[2], .dy = tensors[3]};
    float *dgamma = tensors[5];
    a.dx = tensors[4];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1];
    int64_t chunks = parts(a.tokens, ROWS);
    a.sums = workspace((size_t)(chunks * a.hidden));
    if (!a.sums) return OUT_OF_MEMORY;
    run_tasks(backward, &a, chunks);
    for (int64_t i = 0; i < a.hidden; i++) dgamma[i] = 0.0f;
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t i = 0; i < a.hidden; i++) dgamma[i] += a.sums[c * a.hidden + i];
    free(a.sums);
    return OK;
}
