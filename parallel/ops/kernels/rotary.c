/* Rotary positions (arXiv 2104.09864), halved form: values i and i + W/2 of a head are turned by the row's angle i. */
#include "kernels.h"

#define ROWS 64

typedef struct {
    const float *x, *cosines, *sines;
    float *y, way;
    int64_t tokens, hidden, half;
} rotation;

MULTIVERSION static void turn(const rotation *a, int64_t first, int64_t last) {
    int64_t half = a->half;
    for (int64_t t = first; t < last; t++) {
        const float *c = a->cosines + t * half, *s = a->sines + t * half;
        for (int64_t at = t * a->hidden; at < (t + 1) * a->hidden; at += 2 * half) {
            const float *low = a->x + at, *high = low + half;
            float *y_low = a->y + at, *y_high = y_low + half;
            for (int64_t i = 0; i < half; i++) {
                float sine = a->way * s[i];
                y_low[i] = low[i] * c[i] - high[i] * sine;
                y_high[i] = high[i] * c[i] + low[i] * sine;
            }
        }
    }
}

static void rows(void *context, int64_t index, int worker) {
    rotation *a = context;
    turn(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

/* x [T, D], cosines, sines [T, W/2], way int32 [1] (1, or -1: back, which is the gradient) -> y [T, D] */
KERNEL(rotate) {
    if (count != 5) return WRONG_INPUT;
    rotation a = {.x = tensors[0], .cosines = tensors[1], .sines = tensors[2], .y = tensors[4]};
    a.way = (float)*(int32_t *)tensors[3];
    a.tokens = shapes[0][0], a.hidden = shapes[0][1], a.half = shapes[1][1];
    if (a.half <= 0 || a.hidden % (2 * a.half)) return WRONG_INPUT;
    run_tasks(rows, &a, parts(a.tokens, ROWS));
    return OK;
}
