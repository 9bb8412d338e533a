/* A clock that a test turns, for one process: FOR TESTS ONLY, preloaded by LD_PRELOAD (see clock.py, which says more).
 *
 * JF_CLOCK names the control file, which the test maps and writes. All clocks of the process are computed from the real
 * CLOCK_MONOTONIC, and every wait of CPython 3.11 and libcurl that has a time-out ends when *that* time is reached: it
 * is made of short real waits, so that what the test changes holds for waits in progress as well.
 *
 * Two kinds of wait are not sped up as they are told. Waits on a condition for some milliseconds stay as long as they
 * are, since CPython's threads hand the interpreter to each other by them. And poll() on a unix socket takes a second of
 * real time before it gives up, since the container engine behind it answers in real time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { SECOND = 1000000000, SLICE = 20000000, SHORT = 5000000, MILLISECOND = 1000000 };

/* The layout is clock.py's, too. Times in nanoseconds: CLOCK_MONOTONIC here is
 * mono + (real CLOCK_MONOTONIC - base) * rate, and the other two clocks are that far ahead of it. */
typedef struct {
    _Atomic uint64_t version; /* odd while the test writes */
    _Atomic int64_t sleeping; /* threads that are asleep; written here, read by the test */
    int64_t base, mono, boot_ahead, wall_ahead;
    double rate;
} control_t;

static control_t *control;
static _Atomic int64_t latest; /* what CLOCK_MONOTONIC said last: it never goes back, whatever the test does */

static int (*real_gettime)(clockid_t, struct timespec *);
static int (*real_sem_clockwait)(sem_t *, clockid_t, const struct timespec *);
static int (*real_cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_cond_clockwait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
static int (*real_ppoll)(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);
static int (*real_pselect)(int, fd_set *, fd_set *, fd_set *, const struct timespec *, const sigset_t *);
static int (*real_epoll_wait)(int, struct epoll_event *, int, int);
static int (*real_nanosleep)(clockid_t, int, const struct timespec *, struct timespec *);

static void *find(const char *name) {
    /* pthread_cond_* have an old version on some machines, which dlsym may find first. */
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    if (found == NULL) found = dlsym(RTLD_NEXT, name);
    if (found == NULL) {
        fprintf(stderr, "clock shim: this C library has no %s\n", name);
        abort();
    }
    return found;
}

__attribute__((constructor)) static void setup(void) {
    if (control != NULL) return;
    const char *path = getenv("JF_CLOCK");
    int file = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    void *map = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(control_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) {
        fprintf(stderr, "clock shim: JF_CLOCK is no control file\n");
        abort();
    }
    close(file);
    *(void **)&real_gettime = find("clock_gettime");
    *(void **)&real_sem_clockwait = find("sem_clockwait");
    *(void **)&real_cond_timedwait = find("pthread_cond_timedwait");
    *(void **)&real_cond_clockwait = find("pthread_cond_clockwait");
    *(void **)&real_ppoll = find("ppoll");
    *(void **)&real_pselect = find("pselect");
    *(void **)&real_epoll_wait = find("epoll_wait");
    *(void **)&real_nanosleep = find("clock_nanosleep");
    control = map;
}

static int64_t ns(const struct timespec *time) { return (int64_t)time->tv_sec * SECOND + time->tv_nsec; }

static struct timespec timespec(int64_t ns) {
    return (struct timespec){.tv_sec = ns / SECOND, .tv_nsec = ns % SECOND};
}

static int64_t real_now(clockid_t clock) {
    struct timespec time;
    real_gettime(clock, &time);
    return ns(&time);
}

/* The control file as it was at one moment. */
static control_t snapshot(void) {
    control_t seen;
    uint64_t version;
    setup(); /* another library's constructor may ask for the time before ours has run */
    do {
        while ((version = atomic_load_explicit(&control->version, memory_order_acquire)) & 1) sched_yield();
        memcpy(&seen, control, sizeof seen);
        atomic_thread_fence(memory_order_acquire);
    } while (atomic_load_explicit(&control->version, memory_order_relaxed) != version);
    return seen;
}

static int ours(clockid_t clock) {
    switch (clock) {
    case CLOCK_MONOTONIC: case CLOCK_MONOTONIC_RAW: case CLOCK_MONOTONIC_COARSE:
    case CLOCK_BOOTTIME: case CLOCK_REALTIME: case CLOCK_REALTIME_COARSE:
        return 1;
    default:
        return 0; /* CPU time, which is not the test's to change */
    }
}

static int64_t now(clockid_t clock) {
    control_t seen = snapshot();
    int64_t mono = seen.mono + (int64_t)((double)(real_now(CLOCK_MONOTONIC) - seen.base) * seen.rate);
    int64_t last = atomic_load(&latest);
    while (last < mono && !atomic_compare_exchange_weak(&latest, &last, mono)) {}
    if (mono < last) mono = last;
    if (clock == CLOCK_BOOTTIME) return mono + seen.boot_ahead;
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) return mono + seen.wall_ahead;
    return mono;
}

/* How long to wait really before looking again, when `left` is left of a wait here. */
static int64_t slice(int64_t left) {
    double rate = snapshot().rate;
    double wait = rate > 0 ? (double)left / rate : SLICE;
    return wait < 1000 ? 1000 : wait < SLICE ? (int64_t)wait : SLICE;
}

/* -- the clocks ---------------------------------------------------------------------------------------------------- */

int clock_gettime(clockid_t clock, struct timespec *time) {
    setup();
    if (!ours(clock)) return real_gettime(clock, time);
    *time = timespec(now(clock));
    return 0;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    int64_t wall = now(CLOCK_REALTIME);
    *time = (struct timeval){.tv_sec = wall / SECOND, .tv_usec = wall % SECOND / 1000};
    return 0;
}

time_t time(time_t *out) {
    time_t seconds = now(CLOCK_REALTIME) / SECOND;
    if (out != NULL) *out = seconds;
    return seconds;
}

/* -- locks --------------------------------------------------------------------------------------------------------- */

int sem_clockwait(sem_t *restrict sem, clockid_t clock, const struct timespec *restrict until) {
    for (;;) {
        int64_t left = ns(until) - now(clock);
        if (left <= 0) {
            if (sem_trywait(sem) == 0) return 0;
            errno = ETIMEDOUT;
            return -1;
        }
        struct timespec part = timespec(real_now(CLOCK_MONOTONIC) + slice(left));
        if (real_sem_clockwait(sem, CLOCK_MONOTONIC, &part) == 0) return 0;
        if (errno != ETIMEDOUT) return -1;
    }
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
    return sem_clockwait(sem, CLOCK_REALTIME, until);
}

/* `timed`: the condition has its own clock, which is `clock`, too. */
static int cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, int64_t until, int timed) {
    for (;;) {
        int64_t left = until - now(clock);
        int64_t wait = left <= SHORT ? SHORT : slice(left);
        struct timespec part = timespec(real_now(clock) + wait);
        int failed = timed ? real_cond_timedwait(cond, mutex, &part) : real_cond_clockwait(cond, mutex, clock, &part);
        if (failed != ETIMEDOUT || left <= SHORT) return failed;
    }
}

int pthread_cond_timedwait(
    pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    /* Which clock a condition was made with cannot be asked of it; the two are years apart. */
    int64_t to_mono = llabs(ns(until) - now(CLOCK_MONOTONIC)), to_wall = llabs(ns(until) - now(CLOCK_REALTIME));
    return cond_wait(cond, mutex, to_mono < to_wall ? CLOCK_MONOTONIC : CLOCK_REALTIME, ns(until), 1);
}

int pthread_cond_clockwait(
    pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, clockid_t clock,
    const struct timespec *restrict until) {
    return cond_wait(cond, mutex, clock, ns(until), 0);
}

/* -- descriptors --------------------------------------------------------------------------------------------------- */

static int has_unix_socket(const struct pollfd *fds, nfds_t count) {
    for (nfds_t i = 0; i < count; i++) {
        int family;
        socklen_t size = sizeof family;
        if (getsockopt(fds[i].fd, SOL_SOCKET, SO_DOMAIN, &family, &size) == 0 && family == AF_UNIX) return 1;
    }
    return 0;
}

static int poll_for(struct pollfd *fds, nfds_t count, int64_t timeout, const sigset_t *mask) {
    int error = errno; /* getsockopt fails for what is no socket */
    int64_t until = now(CLOCK_MONOTONIC) + timeout;
    int64_t at_least = real_now(CLOCK_MONOTONIC) + (timeout < SECOND ? timeout : SECOND);
    int really = timeout > 0 && has_unix_socket(fds, count);
    errno = error;
    for (;;) {
        int64_t left = until - now(CLOCK_MONOTONIC);
        int64_t wait = left > 0 ? slice(left) : 0;
        if (really) {
            int64_t more = at_least - real_now(CLOCK_MONOTONIC);
            if (wait < more) wait = more < SLICE ? more : SLICE;
        }
        struct timespec part = timespec(wait);
        int ready = real_ppoll(fds, count, &part, mask);
        if (ready != 0 || wait == 0) return ready;
    }
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask) {
    setup();
    return timeout == NULL ? real_ppoll(fds, count, NULL, mask) : poll_for(fds, count, ns(timeout), mask);
}

int poll(struct pollfd *fds, nfds_t count, int timeout_ms) {
    struct timespec timeout = timespec((int64_t)timeout_ms * MILLISECOND);
    return ppoll(fds, count, timeout_ms < 0 ? NULL : &timeout, NULL);
}

int pselect(
    int count, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
    const struct timespec *restrict timeout, const sigset_t *restrict mask) {
    setup();
    if (timeout == NULL) return real_pselect(count, in, out, except, NULL, mask);
    int64_t until = now(CLOCK_MONOTONIC) + ns(timeout);
    fd_set *sets[] = {in, out, except}, asked[3];
    for (int i = 0; i < 3; i++) if (sets[i] != NULL) asked[i] = *sets[i];
    for (;;) {
        int64_t left = until - now(CLOCK_MONOTONIC);
        int64_t wait = left > 0 ? slice(left) : 0;
        struct timespec part = timespec(wait);
        int ready = real_pselect(count, in, out, except, &part, mask);
        if (ready != 0 || wait == 0) return ready;
        for (int i = 0; i < 3; i++) if (sets[i] != NULL) *sets[i] = asked[i];
    }
}

int select(
    int count, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except, struct timeval *restrict timeout) {
    struct timespec time;
    if (timeout != NULL) time = timespec((int64_t)timeout->tv_sec * SECOND + (int64_t)timeout->tv_usec * 1000);
    return pselect(count, in, out, except, timeout == NULL ? NULL : &time, NULL);
}

int epoll_pwait(int epoll, struct epoll_event *events, int most, int timeout_ms, const sigset_t *mask) {
    setup();
    struct pollfd self = {.fd = epoll, .events = POLLIN}; /* an epoll is readable when it has something to tell */
    struct timespec timeout = timespec((int64_t)timeout_ms * MILLISECOND);
    int ready = ppoll(&self, 1, timeout_ms < 0 ? NULL : &timeout, mask);
    return ready < 0 ? ready : real_epoll_wait(epoll, events, most, 0);
}

int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout_ms) {
    return epoll_pwait(epoll, events, most, timeout_ms, NULL);
}

/* -- sleep --------------------------------------------------------------------------------------------------------- */

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *time, struct timespec *rest) {
    setup();
    if (!ours(clock)) return real_nanosleep(clock, flags, time, rest);
    int64_t until = flags & TIMER_ABSTIME ? ns(time) : now(clock) + ns(time);
    int64_t left;
    int failed = 0;
    atomic_fetch_add(&control->sleeping, 1);
    while (failed == 0 && (left = until - now(clock)) > 0) {
        struct timespec part = timespec(slice(left));
        failed = real_nanosleep(CLOCK_MONOTONIC, 0, &part, NULL);
    }
    atomic_fetch_sub(&control->sleeping, 1);
    if (failed != 0 && rest != NULL && !(flags & TIMER_ABSTIME)) {
        left = until - now(clock);
        *rest = timespec(left > 0 ? left : 0);
    }
    return failed;
}

int nanosleep(const struct timespec *time, struct timespec *rest) {
    int failed = clock_nanosleep(CLOCK_MONOTONIC, 0, time, rest);
    if (failed == 0) return 0;
    errno = failed;
    return -1;
}
