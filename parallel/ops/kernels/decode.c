/* One token for each of B texts through a transformer layer, and through the head: decoding is reading weights, so every
 * phase streams its matrices once, in rows as they lie, for all texts together.
 *
 * A row's result depends on that row alone, to the bit: sums run over the inner width in one order, whatever B is and
 * whoever else uses the same weights. Legend: B rows, D hidden, F inner width, H heads, W = D/H, L cache positions.
 */
#include "kernels.h"

#include <math.h>
#include <string.h>

#define FEWEST_COLUMNS 128 /* columns of a matrix in a task: long stretches are read fast, but every thread wants one */
#define MOST_COLUMNS 512
#define STEPS 8     /* rows of a matrix that one pass over a row of sums takes */
#define LANES 16    /* partial sums of a scalar product */
#define WORDS 256   /* vocabulary rows in a task */

enum { FAST_GELU = 0, GELU = 1 };

typedef struct {
    const float *g1, *b1, *wq, *bq, *wk, *bk, *wv, *bv, *wo, *bo, *g2, *b2;
} layer_weights;

typedef struct {
    layer_weights w;
    const float *h, *queries, *keys, *values;
    const int32_t *positions;
    float **ffn; /* up, up bias, down, down bias: of all rows, or of each */
    float *out, *new_keys, *new_values, *x, *q, *y, *inner, *scores, epsilon;
    int32_t *group; /* rows in order of their network */
    int32_t *starts;
    int64_t rows, hidden, heads, width, length, f, networks, groups, columns, column_parts, inner_columns, inner_parts;
    int activation, from_queries;
} decoding;

/* y[n] += sum of x[k] w[k, n] over k, for `columns` columns */
MULTIVERSION static void add_product(float *restrict y, const float *restrict x, const float *restrict w,
                                     int64_t stride, int64_t from, int64_t to, int64_t columns) {
    int64_t k = from;
    for (; k + STEPS <= to; k += STEPS) {
        const float *p = w + k * stride;
        float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
        float x4 = x[k + 4], x5 = x[k + 5], x6 = x[k + 6], x7 = x[k + 7];
        for (int64_t n = 0; n < columns; n++)
            y[n] += ((x0 * p[n] + x1 * p[n + stride]) + (x2 * p[n + 2 * stride] + x3 * p[n + 3 * stride])) +
                    ((x4 * p[n + 4 * stride] + x5 * p[n + 5 * stride]) +
                     (x6 * p[n + 6 * stride] + x7 * p[n + 7 * stride]));
    }
    for (; k < to; k++)
        for (int64_t n = 0; n < columns; n++) y[n] += x[k] * w[k * stride + n];
}

/* How many columns a task takes. It changes no result: every column is a sum of its own. */
static int64_t task_columns(int64_t outer) {
    int64_t share = parts(parts(outer, worker_count()), 64) * 64;
    return share < FEWEST_COLUMNS ? FEWEST_COLUMNS : smaller(share, MOST_COLUMNS);
}

/* Columns of y = x w + b (+ residual) for the listed rows; a stretch of w is used by all of them while it is at hand. */
static void columns_of(float *y, const float *x, const float *w, const float *b, const float *residual,
                       const int32_t *rows, int64_t count, int64_t inner, int64_t outer, int64_t first, int64_t last) {
    for (int64_t r = 0; r < count; r++) {
        int64_t row = rows ? rows[r] : r;
        float *to = y + row * outer;
        for (int64_t n = first; n < last; n++) to[n] = b[n] + (residual ? residual[row * outer + n] : 0.0f);
    }
    /* So few rows of w at once, because rows a power of two apart compete for the same places in the cache. */
    for (int64_t k = 0; k < inner; k += STEPS)
        for (int64_t r = 0; r < count; r++) {
            int64_t row = rows ? rows[r] : r;
            add_product(y + row * outer + first, x + row * inner, w + first, outer, k, smaller(k + STEPS, inner),
                        last - first);
        }
}

MULTIVERSION static void normalise(float *y, const float *x, const float *gamma, const float *beta, int64_t d,
                                   float epsilon) {
    float sum = 0.0f, squares = 0.0f;
    for (int64_t i = 0; i < d; i++) sum += x[i];
    float mean = sum / (float)d;
    for (int64_t i = 0; i < d; i++) squares += (x[i] - mean) * (x[i] - mean);
    float rstd = 1.0f / sqrtf(squares / (float)d + epsilon);
    for (int64_t i = 0; i < d; i++) y[i] = (x[i] - mean) * rstd * gamma[i] + beta[i];
}

MULTIVERSION static void activate(float *u, int64_t n, int kind) {
    if (kind == FAST_GELU)
        for (int64_t i = 0; i < n; i++) u[i] = u[i] / (1.0f + fast_exp(-1.702f * u[i]));
    else
        for (int64_t i = 0; i < n; i++)
            u[i] = u[i] / (1.0f + fast_exp(-1.5957691216f * (u[i] + 0.044715f * u[i] * u[i] * u[i])));
}

MULTIVERSION static float dot(const float *a, const float *b, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) lanes[j] += a[i + j] * b[i + j];
    float sum = 0.0f;
    for (int64_t j = 0; j < LANES; j++) sum += lanes[j];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* One head of one row: scores of the `held` cached keys and of the row's own, softmax, mix of values. */
MULTIVERSION static void attend(float *y, float *s, const float *q, const float *keys, const float *values,
                                const float *own_key, const float *own_value, int64_t held, int64_t width) {
    float scale = 1.0f / sqrtf((float)width), most, sum = 0.0f;
    most = s[held] = dot(q, own_key, width) * scale;
    for (int64_t j = 0; j < held; j++) {
        s[j] = dot(q, keys + j * width, width) * scale;
        most = s[j] > most ? s[j] : most;
    }
    for (int64_t j = 0; j <= held; j++) {
        s[j] = fast_exp(s[j] - most);
        sum += s[j];
    }
    for (int64_t i = 0; i < width; i++) y[i] = s[held] * own_value[i];
    for (int64_t j = 0; j < held; j++)
        for (int64_t i = 0; i < width; i++) y[i] += s[j] * values[j * width + i];
    for (int64_t i = 0; i < width; i++) y[i] /= sum;
}

static void project(void *context, int64_t index, int worker) {
    decoding *a = context;
    int64_t part = index % a->column_parts, which = index / a->column_parts, d = a->hidden;
    int64_t first = part * a->columns, last = smaller(first + a->columns, d);
    const float *from = which == 0 && a->from_queries ? a->queries : a->x;
    const float *w = which == 0 ? a->w.wq : which == 1 ? a->w.wk : a->w.wv;
    const float *b = which == 0 ? a->w.bq : which == 1 ? a->w.bk : a->w.bv;
    columns_of(which == 0 ? a->q : which == 1 ? a->new_keys : a->new_values, from, w, b, NULL, NULL, a->rows, d, d,
               first, last);
}

static void head_of_row(void *context, int64_t index, int worker) {
    decoding *a = context;
    int64_t cache = index * a->length * a->width, at = index * a->width; /* rows lie head by head: B*H, W */
    attend(a->y + at, a->scores + index * (a->length + 1), a->q + at, a->keys + cache, a->values + cache,
           a->new_keys + at, a->new_values + at, a->positions[index / a->heads], a->width);
}

static void output(void *context, int64_t index, int worker) {
    decoding *a = context;
    int64_t first = index * a->columns, d = a->hidden;
    columns_of(a->out, a->y, a->w.wo, a->w.bo, a->h, NULL, a->rows, d, d, first, smaller(first + a->columns, d));
}

/* The network of a group: its first row's, or the one of all rows. */
static int64_t network_of(const decoding *a, int64_t g) { return a->networks == 1 ? 0 : a->group[a->starts[g]]; }

static void up(void *context, int64_t index, int worker) {
    decoding *a = context;
    int64_t g = index / a->inner_parts, first = index % a->inner_parts * a->inner_columns;
    int64_t last = smaller(first + a->inner_columns, a->f), count = a->starts[g + 1] - a->starts[g];
    const int32_t *rows = a->group + a->starts[g];
    float **w = a->ffn + 4 * network_of(a, g);
    columns_of(a->inner, a->x, w[0], w[1], NULL, rows, count, a->hidden, a->f, first, last);
    for (int64_t r = 0; r < count; r++) activate(a->inner + rows[r] * a->f + first, last - first, a->activation);
}

static void down(void *context, int64_t index, int worker) {
    decoding *a = context;
    int64_t g = index / a->column_parts, first = index % a->column_parts * a->columns;
    int64_t count = a->starts[g + 1] - a->starts[g], last = smaller(first + a->columns, a->hidden);
    float **w = a->ffn + 4 * network_of(a, g);
    columns_of(a->y, a->inner, w[2], w[3], a->out, a->group + a->starts[g], count, a->f, a->hidden, first, last);
}

/* Rows that share a network, told by where its matrix lies, become one group. */
static void find_groups(decoding *a) {
    int64_t at = 0;
    a->groups = 0;
    for (int64_t r = 0; r < a->rows; r++) {
        int seen = 0;
        for (int64_t o = 0; o < r && !seen; o++) seen = a->networks == 1 || a->ffn[4 * o] == a->ffn[4 * r];
        if (seen) continue;
        a->starts[a->groups++] = (int32_t)at;
        for (int64_t o = r; o < a->rows; o++)
            if (a->networks == 1 || a->ffn[4 * o] == a->ffn[4 * r]) a->group[at++] = (int32_t)o;
    }
    a->starts[a->groups] = (int32_t)at;
}

/* h [B, D], queries [B, D], positions int32 [B], keys, values [B*H, L, W] (read before a row's position), settings int32
 * [3] (heads, activation, whether queries are given), epsilon [1], gamma, beta, then weight and bias of query, key,
 * value and projection, gamma, beta, and 4 or 4 B tensors of networks -> h [B, D], key, value [B*H, 1, W] of each row,
 * a space to work in [B, 3 D + F + H (L + 1) + 3] */
KERNEL(decode_layer) {
    if (count < 27 || (count - 23) % 4) return WRONG_INPUT;
    decoding a = {.h = tensors[0], .queries = tensors[1], .positions = tensors[2], .keys = tensors[3]};
    const int32_t *settings = tensors[5];
    a.values = tensors[4], a.epsilon = *(float *)tensors[6];
    memcpy(&a.w, tensors + 7, sizeof a.w);
    a.ffn = (float **)tensors + 19;
    a.networks = (count - 23) / 4;
    a.rows = shapes[0][0], a.hidden = shapes[0][1], a.length = shapes[3][1], a.f = shapes[19][1];
    a.heads = settings[0], a.activation = settings[1], a.from_queries = settings[2];
    if (a.networks != 1 && a.networks != a.rows) return WRONG_INPUT;
    a.width = a.hidden / a.heads;
    a.out = tensors[count - 4], a.new_keys = tensors[count - 3], a.new_values = tensors[count - 2];
    float *space = tensors[count - 1];
    int64_t whole = a.rows * a.hidden;
    a.x = space, a.q = a.x + whole, a.y = a.q + whole, a.inner = a.y + whole;
    a.scores = a.inner + a.rows * a.f;
    a.group = (int32_t *)(a.scores + a.rows * a.heads * (a.length + 1)), a.starts = a.group + a.rows;
    a.columns = task_columns(a.hidden), a.column_parts = parts(a.hidden, a.columns);
    a.inner_columns = task_columns(a.f), a.inner_parts = parts(a.f, a.inner_columns);
    for (int64_t r = 0; r < a.rows; r++) {
        if (a.positions[r] < 0 || a.positions[r] >= a.length) return WRONG_INPUT;
        normalise(a.x + r * a.hidden, a.h + r * a.hidden, a.w.g1, a.w.b1, a.hidden, a.epsilon);
    }
    run_tasks(project, &a, 3 * a.column_parts);
    run_tasks(head_of_row, &a, a.rows * a.heads);
    run_tasks(output, &a, a.column_parts);
    for (int64_t r = 0; r < a.rows; r++)
        normalise(a.x + r * a.hidden, a.out + r * a.hidden, a.w.g2, a.w.b2, a.hidden, a.epsilon);
    find_groups(&a);
    run_tasks(up, &a, a.groups * a.inner_parts);
    run_tasks(down, &a, a.groups * a.column_parts);
    memcpy(a.out, a.y, whole * sizeof(float));
    return OK;
}

typedef struct {
    const float *h;
    float **tables, *logits;
    int64_t rows, hidden, vocabulary, each;
} head;

static void words(void *context, int64_t index, int worker) {
    head *a = context;
    int64_t first = index * WORDS, last = smaller(first + WORDS, a->vocabulary), d = a->hidden;
    for (int64_t v = first; v < last; v++)
        for (int64_t r = 0; r < a->rows; r++)
            a->logits[r * a->vocabulary + v] = dot(a->h + r * d, a->tables[r * a->each] + v * d, d);
}

/* h [B, D], a table [V, D] of all rows or one of each -> logits [B, V] */
KERNEL(decode_head) {
    if (count < 3) return WRONG_INPUT;
    head a = {.h = tensors[0], .tables = (float **)tensors + 1, .logits = tensors[count - 1]};
    a.rows = shapes[0][0], a.hidden = shapes[0][1], a.vocabulary = shapes[1][0];
    if (count != 3 && count != 2 + a.rows) return WRONG_INPUT;
    a.each = count != 3;
    run_tasks(words, &a, parts(a.vocabulary, WORDS));
    return OK;
}
