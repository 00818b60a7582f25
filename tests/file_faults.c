/* Faults of files, for tests: preloaded into a process, it counts what the process does to files below a folder, and at
 * the n-th operation kills it (a write in the middle) or lets the operation fail with an error number.
 *
 * Armed by `faults_arm`, or at the start by FILE_FAULTS="n:error number:folder" (0: kill). What counts: making, emptying,
 * writing, syncing, renaming, linking and removing files and folders; with a negative error number opening and reading.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[4096];
static long counted, target = -1;
static int number, reading;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void faults_arm(const char *folder, long operation, int error) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    counted = 0, target = operation, reading = error < 0, number = error < 0 ? -error : error;
}

long faults_counted(void) { return counted; }

__attribute__((constructor)) static void from_environment(void) {
    const char *text = getenv("FILE_FAULTS");
    long operation;
    int error, end;
    if (text && sscanf(text, "%ld:%d:%n", &operation, &error, &end) == 2) faults_arm(text + end, operation, error);
}

static int hit(int reads, const char *path) {
    if (!prefix[0] || reads != reading || strncmp(path, prefix, strlen(prefix))) return 0;
    return __atomic_fetch_add(&counted, 1, __ATOMIC_SEQ_CST) == target;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int hit_fd(int reads, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return hit(reads, path);
}

static int hit_at(int reads, int dir, const char *path) {
    char whole[8192], link[64];
    if (path[0] == '/') return hit(reads, path);
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t size = readlink(link, whole, 4000);
    if (size < 0) return 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return hit(reads, whole);
}

/* Before an operation: nothing, death, or its failure. */
#define FAIL_IF(is_hit)          \
    if (is_hit) {                \
        if (!number) die();      \
        errno = number;          \
        return -1;               \
    }

#define MODE(flags, last)                                        \
    mode_t mode = 0;                                             \
    if (flags & (O_CREAT | O_TMPFILE)) {                         \
        va_list rest;                                            \
        va_start(rest, last);                                    \
        mode = va_arg(rest, mode_t);                             \
        va_end(rest);                                            \
    }
#define MAKES(flags) ((flags & (O_CREAT | O_TRUNC)) != 0)

int open(const char *path, int flags, ...) {
    MODE(flags, flags)
    FAIL_IF(hit_at(!MAKES(flags), AT_FDCWD, path))
    return REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, flags)
    FAIL_IF(hit_at(!MAKES(flags), AT_FDCWD, path))
    return REAL(open64)(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    MODE(flags, flags)
    FAIL_IF(hit_at(!MAKES(flags), dir, path))
    return REAL(openat)(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
    MODE(flags, flags)
    FAIL_IF(hit_at(!MAKES(flags), dir, path))
    return REAL(openat64)(dir, path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t size) {
    if (hit_fd(0, fd)) {
        if (!number) {
            REAL(write)(fd, data, size / 2);
            die();
        }
        errno = number;
        return -1;
    }
    return REAL(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (hit_fd(0, fd)) {
        if (!number) {
            REAL(pwrite64)(fd, data, size / 2, offset);
            die();
        }
        errno = number;
        return -1;
    }
    return REAL(pwrite64)(fd, data, size, offset);
}
ssize_t read(int fd, void *data, size_t size) {
    FAIL_IF(hit_fd(1, fd))
    return REAL(read)(fd, data, size);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    FAIL_IF(hit_fd(1, fd))
    return REAL(pread64)(fd, data, size, offset);
}
int fsync(int fd) {
    FAIL_IF(hit_fd(0, fd))
    return REAL(fsync)(fd);
}
int ftruncate64(int fd, off64_t size) {
    FAIL_IF(hit_fd(0, fd))
    return REAL(ftruncate64)(fd, size);
}
int truncate64(const char *path, off64_t size) {
    FAIL_IF(hit_at(0, AT_FDCWD, path))
    return REAL(truncate64)(path, size);
}
int rename(const char *from, const char *to) {
    FAIL_IF(hit_at(0, AT_FDCWD, to))
    return REAL(rename)(from, to);
}
int link(const char *from, const char *to) {
    FAIL_IF(hit_at(0, AT_FDCWD, to))
    return REAL(link)(from, to);
}
int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    FAIL_IF(hit_at(0, to_dir, to))
    return REAL(linkat)(from_dir, from, to_dir, to, flags);
}
int unlink(const char *path) {
    FAIL_IF(hit_at(0, AT_FDCWD, path))
    return REAL(unlink)(path);
}
int unlinkat(int dir, const char *path, int flags) {
    FAIL_IF(hit_at(0, dir, path))
    return REAL(unlinkat)(dir, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    FAIL_IF(hit_at(0, AT_FDCWD, path))
    return REAL(mkdir)(path, mode);
}
int rmdir(const char *path) {
    FAIL_IF(hit_at(0, AT_FDCWD, path))
    return REAL(rmdir)(path);
}
