/* Threads, their memory, and the matrix product of the oneDNN that MindSpore brings. */
#define _GNU_SOURCE
#include "kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#define MOST_WORKERS 256
#define SPINS 2000

typedef struct {
    float *memory;
    size_t floats;
    char padding[48];
} store;

static pthread_mutex_t one_kernel = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_once_t started = PTHREAD_ONCE_INIT;
static int workers = 1;
static store stores[MOST_WORKERS];

static task job_body;
static void *job_context;
static int64_t job_count;
static atomic_llong job_next;
static atomic_int job_running;
static atomic_uint job_number;

/* What a waiting thread does between two looks. */
static inline void breathe(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_tasks(int worker) {
    for (;;) {
        int64_t index = atomic_fetch_add(&job_next, 1);
        if (index >= job_count) return;
        job_body(job_context, index, worker);
    }
}

static void *work(void *argument) {
    int worker = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&job_number) == seen; i++) breathe();
        if (atomic_load(&job_number) == seen) {
            pthread_mutex_lock(&gate);
            while (atomic_load(&job_number) == seen) pthread_cond_wait(&wake, &gate);
            pthread_mutex_unlock(&gate);
        }
        seen = atomic_load(&job_number);
        take_tasks(worker);
        atomic_fetch_sub(&job_running, 1);
    }
    return NULL;
}

/* No signal may come to a thread that computes: for long sums oneDNN's product keeps its stack pointer in memory of the
 * heap, and the system would write the signal's frame over what lies there. Returns the signals held before. */
static sigset_t hold_signals(void) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL}; /* held, they would end the process without a trace */
    sigset_t all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    return before;
}

static void let_signals(sigset_t before) { pthread_sigmask(SIG_SETMASK, &before, NULL); }

static void start(void) {
    cpu_set_t cpus;
    sigset_t before = hold_signals(); /* the new threads begin with these held, and keep them so */
    int wanted = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
    wanted = wanted > MOST_WORKERS ? MOST_WORKERS : wanted;
    for (int i = 1; i < wanted; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)workers) != 0) break;
        pthread_detach(thread);
        workers++;
    }
    let_signals(before);
}

int worker_count(void) {
    pthread_once(&started, start);
    return workers;
}

void run_tasks(task body, void *context, int64_t count) {
    pthread_once(&started, start);
    pthread_mutex_lock(&one_kernel);
    sigset_t before = hold_signals();
    if (workers == 1 || count < 2) {
        for (int64_t i = 0; i < count; i++) body(context, i, 0);
        let_signals(before);
        pthread_mutex_unlock(&one_kernel);
        return;
    }
    job_body = body;
    job_context = context;
    job_count = count;
    atomic_store(&job_next, 0);
    atomic_store(&job_running, workers - 1);
    pthread_mutex_lock(&gate);
    atomic_fetch_add(&job_number, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&gate);
    take_tasks(0);
    while (atomic_load(&job_running) > 0) breathe();
    let_signals(before);
    pthread_mutex_unlock(&one_kernel);
}

float *scratch(int worker, size_t floats) {
    store *mine = &stores[worker];
    if (mine->floats < floats) {
        free(mine->memory);
        mine->memory = workspace(floats);
        mine->floats = mine->memory ? floats : 0;
    }
    return mine->memory;
}

float *workspace(size_t floats) {
    size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    return aligned_alloc(64, bytes ? bytes : 64);
}

typedef int (*sgemm)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                     float, float *, int64_t);
static sgemm product;
static pthread_once_t looked = PTHREAD_ONCE_INIT;

static void look(void) {
    void *library = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);
    if (library) product = (sgemm)dlsym(library, "dnnl_sgemm");
}

int gemm_ready(void) {
    pthread_once(&looked, look);
    return product != NULL;
}

/* A long sum over rows of a transposed `a` is cut: oneDNN packs such an operand column by column, and beyond this depth
 * its lines fall on each other in the cache (a fifth to a quarter slower at strides of 2,048 and 8,192). */
#define TRANSPOSED_DEPTH 512

void gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
          const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    int64_t depth = transpose_a ? TRANSPOSED_DEPTH : k, done = 0;
    do {
        product(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, smaller(depth, k - done), 1.0f, a, lda, b, ldb,
                done ? 1.0f : beta, c, ldc);
        a += depth * lda, b += depth * (transpose_b ? 1 : ldb), done += depth;
    } while (done < k);
}

/* Whether the kernels can run here: 1 yes, 0 no oneDNN in this process. */
EXPORT int pangu_sigma_kernels_ready(void) { return gemm_ready(); }
