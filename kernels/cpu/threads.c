/* Threads that run one list of tasks after another.
 *
 * A task ends when all its units are done, not when all threads have arrived.  So a thread that
 * lost its core delays the others only if it lost it within a unit.  The thread that finishes the
 * last unit opens the next task, and runs small tasks on the way alone.
 *
 * Each thread has a queue: one word [task + 1 : 16][units : 24][next : 24].  A thread that replaces
 * `next` has claimed the units it skipped.  The word names its task, so they belong to the task
 * that is open.  Opening a task sets `remaining` before any queue.  A claim takes half of what is
 * left: units run faster in sequence than with a claim before each, and the rest stays free for
 * others.
 *
 * A thread with an empty queue first gives the others a moment to empty theirs: taking a unit from
 * a thread that is running costs both of them more than it saves.
 *
 * A thread without work watches `epoch` for some microseconds, then sleeps, so an idle server uses
 * no CPU.  A sleeper counts itself before its last look at `epoch`, and whoever raises `epoch`
 * looks at the count afterwards.  Both are sequentially consistent, so no wake-up is lost. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "simd.h"

/* Spins are cpu_pause: IDLE_SPINS take some 30 to 80 us, STEAL_SPINS 1 us. */
enum { UNITS_BITS = 24, IDLE_SPINS = 2000, STEAL_SPINS = 20 };

#define UNITS_MASK ((1u << UNITS_BITS) - 1)

typedef struct {
    _Alignas(128) _Atomic uint64_t word;
} Queue;

typedef struct {
    struct ThreadPool *pool;
    int number;
    pthread_t thread;
} Worker;

struct ThreadPool {
    int num_threads;
    const Job *job;
    Queue *queues;
    Worker *workers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    _Alignas(128) _Atomic uint32_t epoch; /* raised when a task opens or a job or the pool ends */
    _Alignas(128) _Atomic int64_t remaining;
    _Alignas(128) _Atomic int is_running;
    _Atomic int is_stopping;
    _Atomic int num_sleepers;
};

static void raise_epoch(ThreadPool *pool)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->num_sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static int epoch_changes_within(ThreadPool *pool, uint32_t seen, int pauses)
{
    for (int i = 0; i < pauses; i++) {
        if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen)
            return 1;
        cpu_pause();
    }
    return 0;
}

static void wait_for_change(ThreadPool *pool, uint32_t seen)
{
    if (epoch_changes_within(pool, seen, IDLE_SPINS))
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->num_sleepers, 1);
    while (atomic_load(&pool->epoch) == seen)
        pthread_cond_wait(&pool->changed, &pool->mutex);
    atomic_fetch_sub(&pool->num_sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void run_alone(ThreadPool *pool, int task, int thread)
{
    const Job *job = pool->job;
    for (int queue = 0; queue < pool->num_threads; queue++) {
        int units = job->units(job->context, task, queue);
        if (units)
            job->run(job->context, task, queue, 0, units, thread);
    }
}

/* Gives the units of a task to the queues.  Returns true if any are left afterwards. */
static int open_task(ThreadPool *pool, int task)
{
    const Job *job = pool->job;
    int64_t total = 0;
    for (int queue = 0; queue < pool->num_threads; queue++)
        total += job->units(job->context, task, queue);
    atomic_store(&pool->remaining, total + 1); /* one more is ours until all queues are set */
    for (int queue = 0; queue < pool->num_threads; queue++) {
        uint64_t units = (uint64_t)job->units(job->context, task, queue);
        uint64_t word = (uint64_t)(task + 1) << 2 * UNITS_BITS | units << UNITS_BITS;
        atomic_store_explicit(&pool->queues[queue].word, word, memory_order_release);
    }
    raise_epoch(pool);
    return atomic_fetch_sub(&pool->remaining, 1) > 1;
}

/* Opens the first task from `task` on that is worth sharing, or ends the job. */
static void open_next_task(ThreadPool *pool, int task, int thread)
{
    const Job *job = pool->job;
    for (; task < job->num_tasks; task++) {
        if (job->heartbeat)
            ++*job->heartbeat;
        if (pool->num_threads == 1 || job->is_small(job->context, task))
            run_alone(pool, task, thread);
        else if (open_task(pool, task))
            return;
    }
    atomic_store(&pool->is_running, 0);
    raise_epoch(pool);
}

/* Runs what can be claimed of one queue.  Returns true if that was anything. */
static int run_queue(ThreadPool *pool, int queue, int thread)
{
    _Atomic uint64_t *word = &pool->queues[queue].word;
    int64_t done = 0;
    int task = 0;
    for (uint64_t seen = atomic_load(word);;) {
        uint32_t first = seen & UNITS_MASK, units = seen >> UNITS_BITS & UNITS_MASK;
        if (first >= units)
            break;
        uint32_t count = (units - first + 1) / 2;
        if (!atomic_compare_exchange_weak(word, &seen, seen + count))
            continue;
        task = (int)(seen >> 2 * UNITS_BITS) - 1;
        const Job *job = pool->job;
        job->run(job->context, task, queue, (int)first, (int)(first + count), thread);
        done += count;
        seen = atomic_load(word);
    }
    /* Units not yet subtracted keep their task open, so all of `done` belongs to one task. */
    if (done && atomic_fetch_sub(&pool->remaining, done) == done)
        open_next_task(pool, task + 1, thread);
    return done > 0;
}

/* Returns true if there was work, or may be now. */
static int run_queues(ThreadPool *pool, int thread)
{
    uint32_t seen = atomic_load(&pool->epoch);
    int any = run_queue(pool, thread, thread);
    if (epoch_changes_within(pool, seen, STEAL_SPINS))
        return 1;
    for (int i = 1; i < pool->num_threads; i++)
        any |= run_queue(pool, (thread + i) % pool->num_threads, thread);
    return any;
}

static void *work(void *argument)
{
    Worker *worker = argument;
    ThreadPool *pool = worker->pool;
    while (!atomic_load(&pool->is_stopping)) {
        uint32_t seen = atomic_load(&pool->epoch);
        if (!run_queues(pool, worker->number) && !atomic_load(&pool->is_stopping))
            wait_for_change(pool, seen);
    }
    return 0;
}

void pool_run(ThreadPool *pool, const Job *job)
{
    pool->job = job;
    atomic_store(&pool->is_running, 1);
    open_next_task(pool, 0, 0);
    for (;;) {
        uint32_t seen = atomic_load(&pool->epoch);
        if (!atomic_load(&pool->is_running))
            break;
        if (!run_queues(pool, 0) && atomic_load(&pool->is_running))
            wait_for_change(pool, seen);
    }
}

int pool_size(const ThreadPool *pool) { return pool->num_threads; }

ThreadPool *pool_start(int num_threads)
{
    ThreadPool *pool = aligned_alloc(128, (sizeof *pool + 127) / 128 * 128);
    Queue *queues = aligned_alloc(128, sizeof *queues * (size_t)num_threads);
    Worker *workers = calloc((size_t)num_threads, sizeof *workers);
    if (!pool || !queues || !workers) {
        free(pool);
        free(queues);
        free(workers);
        return 0;
    }
    memset(pool, 0, sizeof *pool);
    memset(queues, 0, sizeof *queues * (size_t)num_threads);
    pool->queues = queues;
    pool->workers = workers;
    pthread_mutex_init(&pool->mutex, 0);
    pthread_cond_init(&pool->changed, 0);
    pool->num_threads = num_threads;
    for (int i = 1; i < num_threads; i++) {
        workers[i].pool = pool;
        workers[i].number = i;
        if (pthread_create(&workers[i].thread, 0, work, &workers[i])) {
            pool->num_threads = i; /* the threads that run see only empty queues */
            pool_stop(pool);
            return 0;
        }
    }
    return pool;
}

void pool_stop(ThreadPool *pool)
{
    atomic_store(&pool->is_stopping, 1);
    raise_epoch(pool);
    for (int i = 1; i < pool->num_threads; i++)
        pthread_join(pool->workers[i].thread, 0);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->queues);
    free(pool->workers);
    free(pool);
}
