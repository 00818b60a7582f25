/* AdamW of one tensor on the host, in one pass over memory, and the sum of squares for the gradient's norm. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define LINE 16  /* floats of a cache line */
#define AHEAD 512 /* floats between what is computed and what is asked for: the processor alone follows too few streams */

static inline __attribute__((always_inline)) void update(float *w, float *m, float *v, const float *g, int64_t count,
                                                         float beta1, float beta2, float first, float second,
                                                         float rate, float epsilon, float kept) {
    for (int64_t i = 0; i < count; i++) {
        float t = second * g[i];
        m[i] = beta1 * m[i] + first * g[i];
        v[i] = beta2 * v[i] + t * t;
        w[i] = kept * w[i] - rate * m[i] / (sqrtf(v[i]) + epsilon);
    }
}

/* m = beta1 m + first g; v = beta2 v + (second g)^2; w = kept w - rate m / (sqrt(v) + epsilon); `first` and `second`
 * hold the gradient's scale, `kept` the decoupled decay. */
MULTIVERSION EXPORT void pangu_sigma_adamw(float *w, float *m, float *v, const float *g, int64_t count, float beta1,
                                           float beta2, float first, float second, float rate, float epsilon,
                                           float kept) {
    enum { STRETCH = 4 * LINE };
    int64_t i = 0;
    for (; i + STRETCH <= count; i += STRETCH) {
        for (int64_t j = i + AHEAD; j < i + AHEAD + STRETCH && j < count; j += LINE) {
            __builtin_prefetch(w + j, 1);
            __builtin_prefetch(m + j, 1);
            __builtin_prefetch(v + j, 1);
            __builtin_prefetch(g + j, 0);
        }
        update(w + i, m + i, v + i, g + i, STRETCH, beta1, beta2, first, second, rate, epsilon, kept);
    }
    update(w + i, m + i, v + i, g + i, count - i, beta1, beta2, first, second, rate, epsilon, kept);
}

#define BLOCK 8192

/* Four streams, because one alone does not keep a core's memory channel busy. */
MULTIVERSION static float block_sum(const float *x, int64_t count) {
    int64_t part = count / 4;
    const float *y = x + part, *z = y + part, *w = z + part;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
    for (int64_t i = 0; i < part; i++) a += x[i] * x[i], b += y[i] * y[i], c += z[i] * z[i], d += w[i] * w[i];
    for (int64_t i = 4 * part; i < count; i++) a += x[i] * x[i];
    return (a + b) + (c + d);
}

/* Float32 inside blocks of 8,192 numbers, float64 over the blocks. */
EXPORT double pangu_sigma_square_sum(const float *x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i += BLOCK) sum += block_sum(x + i, smaller(BLOCK, count - i));
    return sum;
}

#define TASK (32 * BLOCK)

typedef struct {
    float *const *tensors;
    const int64_t *sizes, *first; /* first[i]: the task with which tensor i begins */
    double *sums;
    int64_t count;
} squares;

static void square_part(void *context, int64_t index, int worker) {
    squares *a = context;
    int64_t i = 0;
    while (i + 1 < a->count && a->first[i + 1] <= index) i++;
    int64_t start = (index - a->first[i]) * TASK;
    a->sums[index] = pangu_sigma_square_sum(a->tensors[i] + start, smaller(TASK, a->sizes[i] - start));
}

/* n tensors, their sizes in int64 [n] -> the square sum of each, float32 [n] */
KERNEL(square_sums) {
    int64_t given = count - 2, tasks = 0;
    if (given < 1 || shapes[given][0] != given) return WRONG_INPUT;
    const int64_t *sizes = tensors[given];
    int64_t *first = malloc(given * sizeof(int64_t));
    for (int64_t i = 0; first && i < given; i++) {
        first[i] = tasks;
        tasks += parts(sizes[i], TASK);
    }
    double *sums = calloc(tasks, sizeof(double));
    if (!first || !sums) {
        free(first);
        free(sums);
        return OUT_OF_MEMORY;
    }
    squares a = {(float *const *)tensors, sizes, first, sums, given};
    run_tasks(square_part, &a, tasks);
    float *out = tensors[count - 1];
    for (int64_t i = 0; i < given; i++) {
        double sum = 0.0;
        for (int64_t t = first[i]; t < (i + 1 < given ? first[i + 1] : tasks); t++) sum += sums[t];
        out[i] = (float)sum;
    }
    free(first);
    free(sums);
    return OK;
}
