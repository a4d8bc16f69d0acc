// Fibres: stacks, and the switch from one to another in 16 instructions of x86-64.
#include <sys/mman.h>

#include "block.h"

#ifndef __x86_64__
#error "fibres are written for x86-64"
#endif

void thread_main();  // scheduler.cpp

// Saves the registers that the System V ABI lets a callee keep, then continues on the other stack.
extern "C" void emu_switch_stack(void** save, void* load);
asm(R"(
.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack, .-emu_switch_stack
)");

static Fibre* allocate_fibre() {
  Fibre* fibre = new Fibre;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  fibre->stack = (char*)mmap(nullptr, STACK_SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
  mprotect(fibre->stack, 4096, PROT_NONE);  // a stack overflow ends in a segmentation fault
  return fibre;
}

// A fibre that begins in thread_main at its first switch.
Fibre* new_fibre(Worker* worker) {
  if (worker->free_fibres.empty()) {
    worker->fibres.push_back(allocate_fibre());
    worker->free_fibres.push_back(worker->fibres.back());
  }
  Fibre* fibre = worker->free_fibres.back();
  worker->free_fibres.pop_back();
  // Staggered: the tops of all stacks would otherwise share one set of the L1 cache.
  size_t stagger = (size_t)fibre->stack / STACK_SIZE % 64 * 448;
  void** top = (void**)(fibre->stack + STACK_SIZE - 64 - stagger);
  *--top = nullptr;  // a return address that keeps the stack aligned as after a call
  *--top = (void*)thread_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fibre->stack_pointer = top;
  return fibre;
}

void switch_to(Worker* worker, Fibre* fibre) {
  Fibre* from = worker->running;
  worker->running = fibre;
  emu_switch_stack(&from->stack_pointer, fibre->stack_pointer);
}

// After a failed launch, whose fibres stopped in the middle.
void free_fibres(Worker* worker) {
  for (Fibre* fibre : worker->fibres) {
    munmap(fibre->stack, STACK_SIZE);
    delete fibre;
  }
  worker->fibres.clear();
  worker->free_fibres.clear();
}
