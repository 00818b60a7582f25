/* How often each kernel ran and how long it took, summed over the life of the process. */
#include "kernels.h"

#include <stdatomic.h>
#include <time.h>

static _Atomic(clock_entry *) first;

int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

void count_time(clock_entry *entry, int64_t spent) {
    if (!atomic_exchange(&entry->listed, 1)) {
        entry->next = atomic_load(&first);
        while (!atomic_compare_exchange_weak(&first, &entry->next, entry)) {
        }
    }
    atomic_fetch_add(&entry->calls, 1);
    atomic_fetch_add(&entry->spent, spent);
}

/* The `index`-th kernel that has run: its name, calls and nanoseconds; 0 behind the last. */
EXPORT int pangu_sigma_kernel_time(int index, const char **label, int64_t *calls, int64_t *spent) {
    clock_entry *entry = atomic_load(&first);
    while (entry && index-- > 0) entry = entry->next;
    if (!entry) return 0;
    *label = entry->label;
    *calls = atomic_load(&entry->calls);
    *spent = atomic_load(&entry->spent);
    return 1;
}
