/* Feed-forward networks of one layer, each on the rows that it was given: gather, two products, scatter.
 *
 * Legend: T tokens, k choices per token, C = T k choices, N slots (an expert's weights), D hidden, F inner width.
 * `order` int32 [C] lists choices slot by slot (token * k + choice), the dropped ones last; slot s has those from
 * offsets[s] to offsets[s + 1]. A dense layer is one slot with all rows. A slot's tensors are, by their number, 4: up,
 * its bias, down, its bias; 2: up and down; 3: gate, up and down, where activation(x gate) * (x up) goes down and rows of
 * inner values hold both, 2 F wide.
 */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#define ROWS 256
#define WEIGHT_ROWS 128 /* rows of an up-projection's gradient in a task; of a down-projection's, F / D times as many */
#define MANY_SLOTS 32   /* so many are tasks enough: an expert's gradient is not cut, and its rows are packed once */

enum { FAST_GELU = 0, GELU = 1, SILU = 2 };

typedef struct {
    const float *x, *dy, *kept;
    const int32_t *order, *offsets;
    float *y, *inner, *dx, *activated, *dinner, *rows_in, *dy_rows, *dx_choices;
    float **weights, **gradients; /* the tensors of each slot */
    int64_t *busiest; /* slots by falling number of rows: the longest tasks begin first, the last ones are short */
    int64_t tokens, choices, chosen, slots, hidden, ffn, block, blocks, up_parts, down_parts, down_rows, up_rows, width;
    int activation, exact, failed, each, gated, biased;
} network;

#define GELU_SLOPE 1.5957691216f
#define GELU_CUBIC 0.044715f

/* What sigmoid takes: the activation is u * sigmoid(steep(u)). */
static inline __attribute__((always_inline)) float steep(float u, int kind) {
    return kind == FAST_GELU ? 1.702f * u : kind == SILU ? u : GELU_SLOPE * (u + GELU_CUBIC * u * u * u);
}

/* The derivative of u * gate, gate = sigmoid(steep(u)). */
static inline __attribute__((always_inline)) float slope(float u, float gate, int kind) {
    float inner = kind == FAST_GELU ? 1.702f : kind == SILU ? 1.0f : GELU_SLOPE * (1.0f + 3.0f * GELU_CUBIC * u * u);
    return gate + u * gate * (1.0f - gate) * inner;
}

#define FOR_EACH_KIND(body)                \
    if (kind == FAST_GELU) body(FAST_GELU) \
    else if (kind == SILU) body(SILU)      \
    else body(GELU)

MULTIVERSION static void activate(float *out, float *u, const float *bias, int64_t rows, int64_t n, int kind) {
#define BODY(KIND)                                                     \
    for (int64_t r = 0; r < rows; r++, u += n, out += n) {             \
        if (bias)                                                      \
            for (int64_t i = 0; i < n; i++) u[i] += bias[i];           \
        for (int64_t i = 0; i < n; i++)                                \
            out[i] = u[i] / (1.0f + fast_exp(-steep(u[i], KIND)));     \
    }
    FOR_EACH_KIND(BODY)
#undef BODY
}

/* u -> activation in `out`; d (gradient of the activation) -> gradient of u, in place. */
MULTIVERSION static void deactivate(float *out, float *d, const float *u, int64_t count, int kind) {
#define BODY(KIND)                                                     \
    for (int64_t i = 0; i < count; i++) {                              \
        float gate = 1.0f / (1.0f + fast_exp(-steep(u[i], KIND)));     \
        out[i] = u[i] * gate;                                          \
        d[i] *= slope(u[i], gate, KIND);                               \
    }
    FOR_EACH_KIND(BODY)
#undef BODY
}

/* rows of (gate, up), each n wide -> activation(gate) * up */
MULTIVERSION static void activate_gated(float *out, const float *u, int64_t rows, int64_t n, int kind) {
#define BODY(KIND)                                                                   \
    for (int64_t r = 0; r < rows; r++, u += 2 * n, out += n)                         \
        for (int64_t i = 0; i < n; i++)                                              \
            out[i] = u[i] / (1.0f + fast_exp(-steep(u[i], KIND))) * u[n + i];
    FOR_EACH_KIND(BODY)
#undef BODY
}

/* rows of (gate, up) and of (anything, gradient of the product) -> the product in `out`, (gradients of both) in `d` */
MULTIVERSION static void deactivate_gated(float *out, float *d, const float *u, int64_t rows, int64_t n, int kind) {
#define BODY(KIND)                                                                   \
    for (int64_t r = 0; r < rows; r++, u += 2 * n, d += 2 * n, out += n)             \
        for (int64_t i = 0; i < n; i++) {                                            \
            float gate = 1.0f / (1.0f + fast_exp(-steep(u[i], KIND))), dy = d[n + i]; \
            float activated = u[i] * gate;                                           \
            out[i] = activated * u[n + i];                                           \
            d[i] = dy * u[n + i] * slope(u[i], gate, KIND);                          \
            d[n + i] = dy * activated;                                               \
        }
    FOR_EACH_KIND(BODY)
#undef BODY
}

MULTIVERSION static void add_bias(float *y, const float *bias, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += bias[i];
}

MULTIVERSION static void sum_rows(float *sum, const float *y, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] = 0.0f;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) sum[i] += y[r * n + i];
}

/* Rows of a slot's blocks: a whole block if all must be alike, else the slot's rows in equal parts. */
static int64_t block_rows(const network *a, int64_t own) {
    return a->exact || own == 0 ? a->block : parts(own, parts(own, a->block));
}

/* The slot of a row block, and its first row: blocks are numbered slot by slot. Returns 0 behind the last. */
static int find_block(const network *a, int64_t index, int64_t *slot, int64_t *first, int64_t *rows) {
    for (int64_t n = 0; n < a->slots; n++) {
        int64_t s = a->busiest[n], own = a->offsets[s + 1] - a->offsets[s], size = block_rows(a, own);
        int64_t blocks = parts(own, size);
        if (index < blocks) {
            *slot = s;
            *first = a->offsets[s] + index * size;
            *rows = smaller(size, a->offsets[s + 1] - *first);
            return 1;
        }
        index -= blocks;
    }
    return 0;
}

static int64_t count_blocks(const network *a) {
    int64_t blocks = 0;
    for (int64_t s = 0; s < a->slots; s++) blocks += parts(a->offsets[s + 1] - a->offsets[s], a->block);
    return blocks;
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* `busiest` of this plan; NULL without memory. The caller frees it. */
static int64_t *sort_slots(const network *a) {
    int64_t *keys = malloc((a->slots + 1) * sizeof(int64_t));
    if (!keys) return NULL;
    for (int64_t s = 0; s < a->slots; s++) keys[s] = (int64_t)(a->offsets[s] - a->offsets[s + 1]) * (1LL << 31) + s;
    qsort(keys, a->slots, sizeof(int64_t), compare);
    for (int64_t s = 0; s < a->slots; s++) keys[s] &= (1LL << 31) - 1;
    return keys;
}

/* Rows past the slot's are zero, so that an exact block has the same shape whatever is in it. */
static void gather(float *out, const float *from, const network *a, int64_t first, int64_t rows, int64_t filled,
                   int64_t divisor) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * a->hidden, from + a->order[first + r] / divisor * a->hidden, a->hidden * sizeof(float));
    memset(out + rows * a->hidden, 0, (filled - rows) * a->hidden * sizeof(float));
}

static void forward(void *context, int64_t index, int worker) {
    network *a = context;
    int64_t slot, first, rows, d = a->hidden, f = a->ffn;
    if (index >= a->blocks) { /* the dropped choices take no part: their result is zero */
        for (int64_t c = a->offsets[a->slots]; c < a->choices; c++)
            memset(a->y + a->order[c] * d, 0, d * sizeof(float));
        return;
    }
    if (!find_block(a, index, &slot, &first, &rows)) return;
    int64_t filled = a->exact ? a->block : rows;
    float *x = scratch(worker, (size_t)(a->block * (2 * d + f + a->width)));
    if (!x) {
        a->failed = 1;
        return;
    }
    float *y = x + a->block * d, *activated = y + a->block * d, *inner = activated + a->block * f;
    float **w = a->weights + a->each * slot, *down = w[a->biased ? 2 : a->each - 1];
    gather(x, a->x, a, first, rows, filled, a->chosen);
    gemm(0, 0, filled, f, d, x, d, w[0], f, 0.0f, inner, a->width);
    if (a->gated) {
        gemm(0, 0, filled, f, d, x, d, w[1], f, 0.0f, inner + f, a->width);
        activate_gated(activated, inner, filled, f, a->activation);
    } else
        activate(activated, inner, a->biased ? w[1] : NULL, filled, f, a->activation);
    if (a->inner) memcpy(a->inner + first * a->width, inner, rows * a->width * sizeof(float));
    gemm(0, 0, filled, d, f, activated, f, down, d, 0.0f, y, d);
    for (int64_t r = 0; r < rows; r++) {
        if (a->biased) add_bias(y + r * d, w[3], d);
        memcpy(a->y + a->order[first + r] * d, y + r * d, d * sizeof(float));
    }
}

/* False where the settings name no form of network. */
static int describe(network *a, void **tensors, int64_t **shapes, const int32_t *settings) {
    a->x = tensors[0], a->order = tensors[1], a->offsets = tensors[2];
    a->tokens = shapes[0][0], a->hidden = shapes[0][1], a->choices = shapes[1][0], a->slots = shapes[2][0] - 1;
    a->chosen = a->choices / a->tokens;
    a->activation = settings[0], a->exact = settings[1] > 0;
    a->block = a->exact ? settings[1] : ROWS;
    a->each = settings[2], a->gated = a->each == 3, a->biased = a->each == 4;
    a->ffn = a->slots ? shapes[4][1] : 0;
    a->width = a->gated ? 2 * a->ffn : a->ffn;
    a->blocks = count_blocks(a);
    return a->each >= 2 && a->each <= 4;
}

/* x [T, D], order [C], offsets [N + 1], settings int32 [3] (activation; rows of an exact block or 0; tensors of a slot),
 * the tensors -> y [C, D] by choice, u [C, F or 2 F] before the activation, in order */
KERNEL(feed_forward) {
    network a = {0};
    if (count < 8) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    if (!describe(&a, tensors, shapes, tensors[3]) || count != 6 + a.each * a.slots) return WRONG_INPUT;
    a.weights = (float **)tensors + 4;
    a.y = tensors[count - 2], a.inner = tensors[count - 1];
    a.busiest = sort_slots(&a);
    if (!a.busiest) return OUT_OF_MEMORY;
    run_tasks(forward, &a, a.blocks + 1);
    free(a.busiest);
    return a.failed ? OUT_OF_MEMORY : OK;
}

static void backward_rows(void *context, int64_t index, int worker) {
    network *a = context;
    int64_t slot, first, rows, d = a->hidden, f = a->ffn;
    if (index >= a->blocks) {
        for (int64_t c = a->offsets[a->slots]; c < a->choices; c++)
            memset(a->dx_choices + a->order[c] * d, 0, d * sizeof(float));
        return;
    }
    if (!find_block(a, index, &slot, &first, &rows)) return;
    float **w = a->weights + a->each * slot, *down = w[a->biased ? 2 : a->each - 1], *dx = scratch(worker, (size_t)(a->block * d));
    if (!dx) {
        a->failed = 1;
        return;
    }
    float *x = a->rows_in + first * d, *dy = a->dy_rows + first * d, *dinner = a->dinner + first * a->width;
    const float *kept = a->kept + first * a->width;
    gather(x, a->x, a, first, rows, rows, a->chosen);
    gather(dy, a->dy, a, first, rows, rows, 1);
    gemm(0, 1, rows, f, d, dy, d, down, d, 0.0f, dinner + (a->gated ? f : 0), a->width);
    if (a->gated)
        deactivate_gated(a->activated + first * f, dinner, kept, rows, f, a->activation);
    else
        deactivate(a->activated + first * f, dinner, kept, rows * f, a->activation);
    gemm(0, 1, rows, d, f, dinner, a->width, w[0], f, 0.0f, dx, d);
    if (a->gated) gemm(0, 1, rows, d, f, dinner + f, a->width, w[1], f, 1.0f, dx, d);
    for (int64_t r = 0; r < rows; r++)
        memcpy(a->dx_choices + a->order[first + r] * d, dx + r * d, d * sizeof(float));
}

static void backward_weights(void *context, int64_t index, int worker) {
    network *a = context;
    int64_t each = a->up_parts + a->down_parts, slot = a->busiest[index / each], part = index % each;
    int64_t first = a->offsets[slot], rows = a->offsets[slot + 1] - first, d = a->hidden, f = a->ffn;
    if (rows == 0) return; /* nobody reads the gradient of an expert that took no part */
    float **g = a->gradients + a->each * slot;
    const float *dinner = a->dinner + first * a->width, *dy = a->dy_rows + first * d;
    if (part < a->up_parts) {
        int64_t start = part * a->up_rows, size = smaller(a->up_rows, d - start);
        const float *x = a->rows_in + first * d + start;
        gemm(1, 0, size, f, rows, x, d, dinner, a->width, 0.0f, g[0] + start * f, f);
        if (a->gated) gemm(1, 0, size, f, rows, x, d, dinner + f, a->width, 0.0f, g[1] + start * f, f);
        if (a->biased && part == 0) sum_rows(g[1], dinner, rows, f);
    } else {
        int64_t start = (part - a->up_parts) * a->down_rows, size = smaller(a->down_rows, f - start);
        float *down = g[a->biased ? 2 : a->each - 1];
        gemm(1, 0, size, d, rows, a->activated + first * f + start, f, dy, d, 0.0f, down + start * d, d);
        if (a->biased && start == 0) sum_rows(g[3], dy, rows, d);
    }
}

/* The gradient of a token is the sum over its choices. */
MULTIVERSION static void add_choices(const network *a, int64_t first, int64_t last) {
    int64_t d = a->hidden, k = a->chosen;
    for (int64_t t = first; t < last; t++) {
        const float *from = a->dx_choices + t * k * d;
        float *dx = a->dx + t * d;
        memcpy(dx, from, d * sizeof(float));
        for (int64_t j = 1; j < k; j++)
            for (int64_t i = 0; i < d; i++) dx[i] += from[j * d + i];
    }
}

static void backward_choices(void *context, int64_t index, int worker) {
    network *a = context;
    add_choices(a, index * ROWS, smaller((index + 1) * ROWS, a->tokens));
}

/* x, order, offsets, settings, the tensors of N slots, u [C, F or 2 F], dy [C, D]
 * -> dx [T, D], their gradients, then five spaces to work in: [C, F], as u, [C, D], [C, D], [C, D] */
KERNEL(feed_forward_gradient) {
    network a = {0};
    if (count < 16) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    if (!describe(&a, tensors, shapes, tensors[3]) || count != 12 + 2 * a.each * a.slots) return WRONG_INPUT;
    int64_t at = 4 + a.each * a.slots;
    a.weights = (float **)tensors + 4;
    a.kept = tensors[at], a.dy = tensors[at + 1], a.dx = tensors[at + 2];
    a.gradients = (float **)tensors + at + 3;
    a.activated = tensors[count - 5], a.dinner = tensors[count - 4];
    a.rows_in = tensors[count - 3], a.dy_rows = tensors[count - 2], a.dx_choices = tensors[count - 1];
    /* One choice each: what they give is the tokens' own. */
    if (a.chosen == 1) a.dx_choices = a.dx;
    a.block = ROWS, a.blocks = count_blocks(&a);
    a.up_rows = a.slots < MANY_SLOTS ? WEIGHT_ROWS : a.hidden;
    a.down_rows = parts(a.up_rows * a.ffn, a.hidden);
    a.up_parts = parts(a.hidden, a.up_rows), a.down_parts = parts(a.ffn, a.down_rows);
    a.busiest = sort_slots(&a);
    if (!a.busiest) return OUT_OF_MEMORY;
    run_tasks(backward_rows, &a, a.blocks + 1);
    run_tasks(backward_weights, &a, a.slots * (a.up_parts + a.down_parts));
    free(a.busiest);
    if (a.chosen > 1) run_tasks(backward_choices, &a, parts(a.tokens, ROWS));
    return a.failed ? OUT_OF_MEMORY : OK;
}

/* expert ids int32 [C], E for a dropped choice -> order [C], offsets [E + 1]: a stable sort by expert */
KERNEL(plan) {
    if (count != 3) return WRONG_INPUT;
    const int32_t *ids = tensors[0];
    int32_t *order = tensors[1], *offsets = tensors[2];
    int64_t choices = shapes[0][0], experts = shapes[2][0] - 1;
    int64_t *next = calloc((size_t)experts + 2, sizeof(int64_t)); /* where the next choice of an expert goes */
    if (!next) return OUT_OF_MEMORY;
    for (int64_t c = 0; c < choices; c++) {
        if (ids[c] < 0 || ids[c] > experts) {
            free(next);
            return WRONG_INPUT;
        }
        next[ids[c] + 1]++;
    }
    for (int64_t e = 0; e <= experts; e++) {
        next[e + 1] += next[e];
        offsets[e] = (int32_t)next[e];
    }
    for (int64_t c = 0; c < choices; c++) order[next[ids[c]]++] = (int32_t)c;
    free(next);
    return OK;
}
