/* Threads that run one list of tasks after another. */
#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>

typedef struct ThreadPool ThreadPool;

/* A job: tasks 0 .. num_tasks - 1, each started when the one before has ended, each split into
 * units.  The units of a queue start in order, run first by the thread of that number, then by any
 * thread that is free. */
typedef struct {
    int num_tasks;
    void *context;
    /* True if the task is so small that the thread that opens it should run all of it. */
    int (*is_small)(void *context, int task);
    int (*units)(void *context, int task, int queue);
    /* Runs units first .. end - 1 of a queue. */
    void (*run)(void *context, int task, int queue, int first, int end, int thread);
    uint64_t *heartbeat; /* incremented when a task ends; may be null */
} Job;

/* num_threads includes the caller of pool_run.  Returns null if threads cannot be started. */
ThreadPool *pool_start(int num_threads);
void pool_stop(ThreadPool *pool);
int pool_size(const ThreadPool *pool);
void pool_run(ThreadPool *pool, const Job *job);

#endif
