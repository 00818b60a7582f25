/* y_TN = x_TK w_KN + b_N and its gradient. */
#include "kernels.h"

#define ROWS 256    /* rows of x in a task: w is packed anew for each, which so many rows pay for */
#define COLUMNS 512

typedef struct {
    const float *x, *w, *b, *dy;
    float *y, *dx, *dw, *db;
    int64_t tokens, inner, outer, row_size, column_parts, row_parts;
} affine;

MULTIVERSION static void add_rows(float *y, int64_t stride, const float *b, int64_t rows, int64_t columns) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t n = 0; n < columns; n++) y[t * stride + n] += b[n];
}

MULTIVERSION static void sum_rows(float *sum, const float *y, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t n = 0; n < columns; n++) sum[n] = 0.0f;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t n = 0; n < columns; n++) sum[n] += y[t * stride + n];
}

static void forward(void *context, int64_t index, int worker) {
    affine *a = context;
    int64_t t = index / a->column_parts * ROWS, n = index % a->column_parts * COLUMNS;
    int64_t rows = smaller(ROWS, a->tokens - t), columns = smaller(COLUMNS, a->outer - n);
    float *y = a->y + t * a->outer + n;
    gemm(0, 0, rows, columns, a->inner, a->x + t * a->inner, a->inner, a->w + n, a->outer, 0.0f, y, a->outer);
    if (a->b) add_rows(y, a->outer, a->b + n, rows, columns);
}

/* x [T, K], w [K, N], and b [N] where there is one -> y [T, N] */
KERNEL(affine) {
    if (count != 3 && count != 4) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    affine a = {.x = tensors[0], .w = tensors[1], .b = count == 4 ? tensors[2] : NULL, .y = tensors[count - 1]};
    a.tokens = shapes[0][0], a.inner = shapes[1][0], a.outer = shapes[1][1];
    a.column_parts = parts(a.outer, COLUMNS);
    run_tasks(forward, &a, parts(a.tokens, ROWS) * a.column_parts);
    return OK;
}

static void backward(void *context, int64_t index, int worker) {
    affine *a = context;
    if (index < a->row_parts) {
        int64_t t = index * ROWS, rows = smaller(ROWS, a->tokens - t);
        gemm(0, 1, rows, a->inner, a->outer, a->dy + t * a->outer, a->outer, a->w, a->outer, 0.0f,
             a->dx + t * a->inner, a->inner);
        return;
    }
    int64_t k = (index - a->row_parts) * ROWS, inner = smaller(ROWS, a->inner - k);
    gemm(1, 0, inner, a->outer, a->tokens, a->x + k, a->inner, a->dy, a->outer, 0.0f, a->dw + k * a->outer, a->outer);
    if (k == 0 && a->db) sum_rows(a->db, a->dy, a->outer, a->tokens, a->outer);
}

/* x, w, dy -> dx, dw, and db where there is a bias */
KERNEL(affine_gradient) {
    if (count != 5 && count != 6) return WRONG_INPUT;
    if (!gemm_ready()) return NO_MATRIX_PRODUCT;
    affine a = {.x = tensors[0], .w = tensors[1], .dy = tensors[2]};
    a.dx = tensors[3], a.dw = tensors[4], a.db = count == 6 ? tensors[5] : NULL;
    a.tokens = shapes[0][0], a.inner = shapes[1][0], a.outer = shapes[1][1];
    a.row_parts = parts(a.tokens, ROWS);
    run_tasks(backward, &a, a.row_parts + parts(a.inner, ROWS));
    return OK;
}
