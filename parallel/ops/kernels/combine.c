/* The weighted sum of a token's choices and its gradient. Legend: T tokens, k choices per token, C = T k, D hidden. */
#include "kernels.h"

#define ROWS 64

typedef struct {
    const float *y, *weights, *dout;
    float *out, *dy, *dweights;
    int64_t tokens, chosen, hidden;
} combination;

MULTIVERSION static void add_up(const combination *a, int64_t first, int64_t last) {
    int64_t d = a->hidden, k = a->chosen;
    for (int64_t t = first; t < last; t++) {
        float *out = a->out + t * d;
        for (int64_t j = 0; j < k; j++) {
            const float *y = a->y + (t * k + j) * d, weight = a->weights[t * k + j];
            if (j == 0)
                for (int64_t i = 0; i < d; i++) out[i] = weight * y[i];
            else
                for (int64_t i = 0; i < d; i++) out[i] += weight * y[i];
        }
    }
}

MULTIVERSION static void spread(const combination *a, int64_t first, int64_t last) {
    int64_t d = a->hidden, k = a->chosen;
    for (int64_t t = first; t < last; t++) {
        const float *dout = a->dout + t * d;
        for (int64_t c = t * k; c < (t + 1) * k; c++) {
            const float *y = a->y + c * d, weight = a->weights[c];
            float *dy = a->dy + c * d, sum = 0.0f;
            for (int64_t i = 0; i < d; i++) {
                sum += y[i] * dout[i];
                dy[i] = weight * dout[i];
            }
            a->dweights[c] = sum;
        }
    }
}

static void forward(void *context, int64_t index, int worker) {
    combination *a = context;
    add_up(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

static void backward(void *context, int64_t index, int worker) {
    combination *a = context;
    spread(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

/* y [C, D] by choice, weights [T, k] -> [T, D] */
KERNEL(combine) {
    if (count != 3) return WRONG_INPUT;
    combination a = {.y = tensors[0], .weights = tensors[1], .out = tensors[2]};
    a.tokens = shapes[1][0], a.chosen = shapes[1][1], a.hidden = shapes[0][1];
    run_tasks(forward, &a, parts(a.tokens, ROWS));
    return OK;
}

/* y, weights, gradient [T, D] -> dy [C, D], dweights [T, k] */
KERNEL(combine_gradient) {
    if (count != 5) return WRONG_INPUT;
    combination a = {.y = tensors[0], .weights = tensors[1], .dout = tensors[2], .dy = tensors[3]};
    a.dweights = tensors[4];
    a.tokens = shapes[1][0], a.chosen = shapes[1][1], a.hidden = shapes[0][1];
    run_tasks(backward, &a, parts(a.tokens, ROWS));
    return OK;
}
