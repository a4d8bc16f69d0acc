/* Runs the operations of a plan, one call for each step. */
#include "plan.h"

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "activation.h"
#include "attention.h"
#include "experts.h"
#include "kv_cache.h"
#include "linear.h"
#include "linear_formats.h"
#include "linear_tiles.h"
#include "logit_rows.h"
#include "norm.h"
#include "rope.h"
#include "threads.h"

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* since Linux 5.14; older C libraries lack the name */
#endif

#ifdef TIER_AMX
#include "amx_tiles.h"
#endif

/* Rows times floats that one thread finishes before two could share them out. */
enum { SMALL_TASK = 4096, SMALL_ATTENTION = 32 << 10 };

static int rows_of(const Plan *plan, const Operation *operation)
{
    int rows = operation->logit_rows_only ? plan->batch.num_logit_rows : plan->batch.num_rows;
    return operation->kind == ACTIVATE && operation->num_chosen ? rows * operation->num_chosen
                                                                : rows;
}

/* Row-wise operations have rows as their units, or tiles if they write tiles.  Each queue gets an
 * equal share. */
static int units_of_all(const Plan *plan, const Operation *operation)
{
    if (operation->kind == ATTENTION)
        return attention_units(plan);
    if (operation->kind == ROUTE)
        return 1;
    if (operation->kind == COMBINE && !plan->is_kv_split)
        return 0;
    int rows = rows_of(plan, operation);
    return operation->tiles ? num_tiles(rows) : rows;
}

static int is_small(void *context, int task)
{
    const Plan *plan = context;
    const Operation *operation = &plan->operations[task];
    int64_t num_rows = rows_of(plan, operation);
    switch (operation->kind) {
    case LINEAR:
    case EXPERTS: return num_rows == 0;
    case ROUTE: return 1;
    case ATTENTION:
        return num_rows * plan->num_heads * plan->head_dim * plan->num_kv_chunks * KV_CHUNK / 8
               <= SMALL_ATTENTION;
    case COMBINE:
        return !plan->is_kv_split
               || num_rows * plan->num_kv_chunks * operation->width <= SMALL_TASK;
    default: return num_rows * operation->width <= SMALL_TASK || units_of_all(plan, operation) == 1;
    }
}

static int units_before(const Plan *plan, int units, int queue)
{
    return (int)((int64_t)units * queue / plan->num_threads);
}

static int units(void *context, int task, int queue)
{
    const Plan *plan = context;
    const Operation *operation = &plan->operations[task];
    if (operation->kind == LINEAR)
        return linear_units(operation, rows_of(plan, operation), queue);
    if (operation->kind == EXPERTS)
        return rows_of(plan, operation) ? experts_units(operation, queue) : 0;
    int all = units_of_all(plan, operation);
    return units_before(plan, all, queue + 1) - units_before(plan, all, queue);
}

static void run_rows(const Plan *plan, const Operation *operation, int first, int end)
{
    switch (operation->kind) {
    case COS_SIN: run_cos_sin(plan, operation, first, end); break;
    case NORM: run_norm(operation, first, end); break;
    case QUANTIZE: run_quantize(operation, first, end); break;
    case ROPE: run_rope(plan, operation, first, end); break;
    case COMBINE: run_combine(plan, operation, first, end); break;
    case ACTIVATE: run_activate(operation, first, end); break;
    case SELECT: run_select(plan, operation, first, end); break;
    case SOFTCAP: run_softcap(operation, first, end); break;
    case SUM_EXPERTS: run_sum_experts(operation, first, end); break;
    case POOL: run_pool(plan, operation, first, end); break;
    }
}

static void run(void *context, int task, int queue, int first, int end, int thread)
{
    const Plan *plan = context;
    const Operation *operation = &plan->operations[task];
    int num_rows = rows_of(plan, operation);
    if (operation->kind == LINEAR) {
        run_linear(operation, num_rows, queue, first, end);
        return;
    }
    if (operation->kind == EXPERTS) {
        run_experts(operation, queue, first, end);
        return;
    }
    if (operation->kind == ROUTE) {
        run_route(operation, num_rows);
        return;
    }
    int before = units_before(plan, units_of_all(plan, operation), queue);
    if (operation->kind == ATTENTION)
        run_attention(plan, operation, before + first, before + end, thread);
    else if (!operation->tiles)
        run_rows(plan, operation, before + first, before + end);
    else
        for (int tile = before + first; tile < before + end; tile++)
            run_rows(plan, operation, tile_start(num_rows, tile), tile_start(num_rows, tile + 1));
}

void llmsrv_forward(Plan *plan, const Batch *batch)
{
    plan->batch = *batch;
    attention_prepare(plan);
    Job job = {plan->num_operations, plan, is_small, units, run, plan->heartbeat};
    pool_run(plan->pool, &job);
}

/* ---- Laying out a plan */

/* Returns 0 if this process may run the kernels. */
int32_t llmsrv_prepare(void)
{
#ifdef TIER_AMX
    return request_amx();
#else
    return 0;
#endif
}

ThreadPool *llmsrv_start_threads(int32_t num_threads) { return pool_start(num_threads); }
void llmsrv_stop_threads(ThreadPool *pool) { pool_stop(pool); }

int32_t llmsrv_tile_words(int32_t width) { return tile_words(width); }

int64_t llmsrv_group_bytes(int32_t format, int32_t columns)
{
    return (int64_t)group_bytes(format, columns);
}

int64_t llmsrv_kv_head_bytes(int32_t padded_dim) { return kv_head_bytes(padded_dim); }

int64_t llmsrv_scratch_floats(int32_t num_heads, int32_t num_kv_heads, int32_t padded_dim)
{
    int64_t floats = attention_scratch(num_heads, num_kv_heads, padded_dim);
    return (floats + 31) / 32 * 32;
}

/* Zeroed memory whose pages the system provides as they are touched; huge pages if wanted.  Returns
 * null if there is none. */
void *llmsrv_allocate(int64_t size, int32_t wants_huge_pages)
{
    void *memory = mmap(0, (size_t)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                        0);
    if (memory == MAP_FAILED)
        return 0;
#ifdef MADV_HUGEPAGE
    if (wants_huge_pages)
        madvise(memory, (size_t)size, MADV_HUGEPAGE);
#endif
    return memory;
}

/* Pre-faults memory that was allocated for huge pages, without changing its contents; a no-op on
 * systems that cannot.  It takes small pages, which the system later merges into huge ones, and
 * rests in between: faulting in one huge page would hold the core until it is cleared. */
void llmsrv_prefault(uint8_t *memory, int64_t size)
{
#ifdef MADV_POPULATE_WRITE
    const size_t piece = 256 << 10;
    const struct timespec rest = {0, 1000 * 1000};
    uintptr_t before = (uintptr_t)memory % (uintptr_t)sysconf(_SC_PAGESIZE);
    uint8_t *start = memory - before, *end = memory + size;
    madvise(start, (size_t)(end - start), MADV_NOHUGEPAGE);
    for (uint8_t *at = start; at < end; at += piece) {
        size_t left = (size_t)(end - at);
        if (madvise(at, left < piece ? left : piece, MADV_POPULATE_WRITE))
            break;
        nanosleep(&rest, 0);
    }
    madvise(start, (size_t)(end - start), MADV_HUGEPAGE);
#else
    (void)memory;
    (void)size;
#endif
}

void llmsrv_free(void *memory, int64_t size) { munmap(memory, (size_t)size); }
