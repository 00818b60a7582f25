/* Compiled CPU kernels: what they share. Matrices are row-major float32; every kernel's result depends on its inputs
 * alone, not on the number of threads: work is cut into tasks by shape, and sums are taken in the order of tasks. */
#ifndef PANGU_SIGMA_KERNELS_H
#define PANGU_SIGMA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* One body for several instruction sets, chosen when the library is loaded: a wheel runs on any x86-64. Features, not
 * processors, are named: a name would match that one processor alone. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MULTIVERSION
#endif

#define EXPORT __attribute__((visibility("default")))

/* What MindSpore calls: tensors (inputs, then outputs), their ranks, shapes and type names. Its time is added up under
 * the kernel's name, for whoever asks where a step's time goes. */
#define KERNEL(name)                                                                                           \
    static int run_##name(int count, void **tensors, int64_t **shapes);                                        \
    EXPORT int pangu_sigma_##name(int count, void **tensors, int *ranks, int64_t **shapes, const char **types, \
                                  void *stream, void *extra) {                                                 \
        static clock_entry entry = {.label = #name};                                                           \
        int64_t began = nanoseconds();                                                                         \
        int answer = run_##name(count, tensors, shapes);                                                       \
        count_time(&entry, nanoseconds() - began);                                                             \
        return answer;                                                                                         \
    }                                                                                                          \
    static int run_##name(int count, void **tensors, int64_t **shapes)

enum { OK = 0, OUT_OF_MEMORY = 1, NO_MATRIX_PRODUCT = 2, WRONG_INPUT = 3 };

typedef struct clock_entry {
    const char *label;
    _Atomic int64_t calls, spent;
    struct clock_entry *next;
    _Atomic int listed;
} clock_entry;

int64_t nanoseconds(void);
void count_time(clock_entry *entry, int64_t spent);

typedef void (*task)(void *context, int64_t index, int worker);

/* Run task 0 … count-1 on all threads of the pool; returns when all are done. */
void run_tasks(task body, void *context, int64_t count);

/* Threads of the pool. */
int worker_count(void);

/* A worker's own memory of at least `floats`, kept for the next call; NULL if there is none. */
float *scratch(int worker, size_t floats);

/* Memory shared by all tasks of one kernel, freed by `free`; NULL if there is none. */
float *workspace(size_t floats);

/* c[m, n] = a[m, k] b[k, n] + beta c; a and b may lie transposed (then lda, ldb are the strides as they lie). */
void gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
          const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

/* True once a matrix product was found among the libraries of this process. */
int gemm_ready(void);

/* How many parts of at most `size` make `whole`. */
static inline int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The largest of x_N, n > 0, NaN passed over; in lanes, because the compiler does not reorder a maximum by itself. */
static inline __attribute__((always_inline)) float largest(const float *x, int64_t n) {
    enum { LANES = 32 };
    float lane[LANES], most = x[0];
    if (n >= LANES) {
        int64_t i = 0;
        for (int j = 0; j < LANES; j++) lane[j] = x[j];
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
        most = lane[0];
        for (int j = 1; j < LANES; j++) most = lane[j] > most ? lane[j] : most;
        x += i, n -= i;
    }
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* exp(x), relative error below 2e-7, 0 under -87; branch-free, so that loops over it become vector code. */
static inline __attribute__((always_inline)) float fast_exp(float x) {
    union { int32_t i; float f; } power;
    float clipped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(clipped * 1.44269504f);
    float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    power.i = ((int32_t)n + 127) << 23;
    return x < -87.0f ? 0.0f : p * power.f;
}

#endif
