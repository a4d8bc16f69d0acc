/* Threads that run one list of tasks after another. */
#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>

typedef struct ThreadPool ThreadPool;

/* What the pool runs: tasks 0 .. num_tasks - 1, each after the one before, each in units.  Units of
 * a queue begin in order, first by the thread of that number, then by whoever is free. */
typedef struct {
    int num_tasks;
    void *context;
    /* Whether the task is so small that whoever is there should do all of it at once. */
    int (*is_small)(void *context, int task);
    int (*units)(void *context, int task, int queue);
    /* Units first .. end - 1 of a queue. */
    void (*run)(void *context, int task, int queue, int first, int end, int thread);
    uint64_t *heartbeat; /* grows with each task that ends; may be null */
} Job;

/* num_threads counts the one that calls pool_run; null when threads cannot be started. */
ThreadPool *pool_start(int num_threads);
void pool_stop(ThreadPool *pool);
int pool_size(const ThreadPool *pool);
void pool_run(ThreadPool *pool, const Job *job);

#endif
