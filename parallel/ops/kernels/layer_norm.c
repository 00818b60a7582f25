/* Layer normalisation over the last axis of x_TD (arXiv 1607.06450) and its gradient. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define ROWS 64

typedef struct {
    const float *x, *gamma, *beta, *dy, *mean_in, *rstd_in;
    float *y, *mean, *rstd, *dx, *sums, epsilon;
    int64_t tokens, hidden;
} norm;

MULTIVERSION static void normalise(const norm *a, int64_t first, int64_t last) {
    int64_t d = a->hidden;
    for (int64_t t = first; t < last; t++) {
        const float *x = a->x + t * d;
        float *y = a->y + t * d, sum = 0.0f, squares = 0.0f;
        for (int64_t i = 0; i < d; i++) sum += x[i];
        float mean = sum / (float)d;
        for (int64_t i = 0; i < d; i++) squares += (x[i] - mean) * (x[i] - mean);
        float rstd = 1.0f / sqrtf(squares / (float)d + a->epsilon);
        for (int64_t i = 0; i < d; i++) y[i] = (x[i] - mean) * rstd * a->gamma[i] + a->beta[i];
        a->mean[t] = mean;
        a->rstd[t] = rstd;
    }
}

static void forward(void *context, int64_t index, int worker) {
    norm *a = context;
    normalise(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

/* x [T, D], gamma, beta [D], epsilon [1] -> y [T, D], mean [T], 1/std [T] */
KERNEL(layer_norm) {
    if (count != 7) return WRONG_INPUT;
    norm a = {.x = tensors[0], .gamma = tensors[1], .beta = tensors[2], .epsilon = *(float *)tensors[3]};
    a.y = tensors[4], a.mean = tensors[5], a.rstd = tensors[6];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1];
    run_tasks(forward, &a, parts(a.tokens, ROWS));
    return OK;
}

/* dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma; sums of dy xhat and dy over these rows into `sums`. */
MULTIVERSION static void unnormalise(const norm *a, int64_t first, int64_t last, float *sums) {
    int64_t d = a->hidden;
    float *dgamma = sums, *dbeta = sums + d;
    for (int64_t i = 0; i < 2 * d; i++) sums[i] = 0.0f;
    for (int64_t t = first; t < last; t++) {
        const float *x = a->x + t * d, *dy = a->dy + t * d;
        float *dx = a->dx + t * d, mean = a->mean_in[t], rstd = a->rstd_in[t], sum = 0.0f, along = 0.0f;
        for (int64_t i = 0; i < d; i++) {
            float xhat = (x[i] - mean) * rstd, g = dy[i] * a->gamma[i];
            sum += g;
            along += g * xhat;
            dgamma[i] += dy[i] * xhat;
            dbeta[i] += dy[i];
        }
        sum /= (float)d, along /= (float)d;
        for (int64_t i = 0; i < d; i++)
            dx[i] = rstd * (dy[i] * a->gamma[i] - sum - (x[i] - mean) * rstd * along);
    }
}

static void backward(void *context, int64_t index, int worker) {
    norm *a = context;
    unnormalise(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens), a->sums + index * 2 * a->hidden);
}

/* x, gamma, mean, 1/std, dy -> dx [T, D], dgamma, dbeta [D] */
KERNEL(layer_norm_gradient) {
    if (count != 8) return WRONG_INPUT;
    norm a = {.x = tensors[0], .gamma = tensors[1], .mean_in = tensors[2], .rstd_in = tensors[3], .dy = tensors[4]};
    float *dgamma = tensors[6], *dbeta = tensors[7];
    a.dx = tensors[5];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1];
    int64_t chunks = parts(a.tokens, ROWS);
    a.sums = workspace((size_t)(chunks * 2 * a.hidden));
    if (!a.sums) return OUT_OF_MEMORY;
    run_tasks(backward, &a, chunks);
    for (int64_t i = 0; i < a.hidden; i++) dgamma[i] = dbeta[i] = 0.0f;
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t i = 0; i < a.hidden; i++) {
            dgamma[i] += a.sums[c * 2 * a.hidden + i];
            dbeta[i] += a.sums[(c * 2 + 1) * a.hidden + i];
        }
    free(a.sums);
    return OK;
}
