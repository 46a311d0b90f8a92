// SPDX-License-Identifier: Apache-2.0
// One fiber for each thread of a block: a stack and the place where it goes on. x86-64 saves six registers; elsewhere, or with
// -DSIMT_UCONTEXT, ucontext.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <new>
#include <stdexcept>
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* go_on);
#endif

class Fiber {
 public:
  // `entry` must end by switching away for good.
  Fiber() {
    stack_ = static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack_ == MAP_FAILED || mprotect(stack_, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ += kGuard;
  }
  ~Fiber() {
    unpoison();
    munmap(stack_ - kGuard, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)()) {
    unpoison();
#if !defined(SIMT_UCONTEXT)
    void** top = reinterpret_cast<void**>(stack_ + kStack) - 2;
    top[0] = reinterpret_cast<void*>(entry);  // where the first switch returns to; keeps the ABI's alignment
    top[1] = nullptr;
    place_ = top - 6;  // six registers of any value
#else
    getcontext(&place_);
    place_.uc_stack.ss_sp = stack_;
    place_.uc_stack.ss_size = kStack;
    makecontext(&place_, entry, 0);
#endif
  }

  // From the scheduler into the fiber, until it leaves.
  void enter() {
    announce(stack_, kStack, &scheduler_shadow());
    change(scheduler(), place_);
    arrived(scheduler_shadow());
  }
  // Called by the fiber's first function.
  static void entered() { arrived(nullptr, true); }
  // From the fiber back to the scheduler. `last`: it never comes back.
  void leave(bool last = false) {
    void* shadow = nullptr;
    announce(scheduler_stack().from, scheduler_stack().bytes, last ? nullptr : &shadow);
    change(place_, scheduler());
    arrived(shadow, true);
  }

 private:
  static constexpr size_t kStack = size_t{256} << 10, kGuard = 4096;
  struct Stack {
    const void* from;
    size_t bytes;
  };

#if !defined(SIMT_UCONTEXT)
  using Place = void*;
  static void change(Place& save, Place& go_on) { simt_switch(&save, go_on); }
#else
  using Place = ucontext_t;
  static void change(Place& save, Place& go_on) { swapcontext(&save, &go_on); }
#endif
  static Place& scheduler() {
    static Place place;
    return place;
  }
  static Stack& scheduler_stack() {
    static Stack stack{};
    return stack;
  }
  static void*& scheduler_shadow() {
    static void* shadow = nullptr;
    return shadow;
  }

  // AddressSanitizer keeps a shadow of "the" stack and must hear of each change.
#if defined(__SANITIZE_ADDRESS__)
  static void announce(const void* from, size_t bytes, void** save) {
    __sanitizer_start_switch_fiber(save, from, bytes);
  }
  static void arrived(void* shadow, bool in_fiber = false) {
    Stack came{};
    __sanitizer_finish_switch_fiber(shadow, &came.from, &came.bytes);
    if (in_fiber) scheduler_stack() = came;
  }
  void unpoison() { __asan_unpoison_memory_region(stack_, kStack); }
#else
  static void announce(const void*, size_t, void**) {}
  static void arrived(void*, bool = false) {}
  void unpoison() {}
#endif

  char* stack_;
  Place place_;
};

}  // namespace simt
