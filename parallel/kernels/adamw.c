/* AdamW of one tensor on the host, in one pass over memory, and the sum of squares for the gradient's norm. */
#include "kernels.h"

#include <math.h>

/* m = beta1 m + first g; v = beta2 v + (second g)^2; w = kept w - rate m / (sqrt(v) + epsilon); `first` and `second`
 * hold the gradient's scale, `kept` the decoupled decay. */
MULTIVERSION EXPORT void pangu_sigma_adamw(float *w, float *m, float *v, const float *g, int64_t count, float beta1,
                                           float beta2, float first, float second, float rate, float epsilon,
                                           float kept) {
    for (int64_t i = 0; i < count; i++) {
        float t = second * g[i];
        m[i] = beta1 * m[i] + first * g[i];
        v[i] = beta2 * v[i] + t * t;
        w[i] = kept * w[i] - rate * m[i] / (sqrtf(v[i]) + epsilon);
    }
}

MULTIVERSION static float block_sum(const float *x, int64_t count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    return sum;
}

/* Float32 inside blocks of 8,192 numbers, float64 over the blocks. */
EXPORT double pangu_sigma_square_sum(const float *x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i += 8192) sum += block_sum(x + i, smaller(8192, count - i));
    return sum;
}
