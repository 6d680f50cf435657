// Fibers: each has a stack of its own, and runs until it parks.
#include <sys/mman.h>

#include "engine.h"

namespace simt {

char* stack_of(size_t i) {  // the lowest page of each stays without access
    static size_t usable = 0;
    static char* const all = static_cast<char*>(
        mmap(nullptr, MAX_THREADS * STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (; usable <= i; ++usable) mprotect(all + usable * STACK + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE);
    return all + i * STACK;
}

#if defined(__x86_64__)
static void* scheduler_sp;
// Saves the callee-saved registers on this stack and takes those of the other.
__attribute__((naked, noinline)) static void switch_stack(void** from, void* to) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
void prepare(Fiber& f) {
    void** const top = reinterpret_cast<void**>(f.stack + STACK) - 8;  // six registers, the entry, no return address
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(fiber_main);
    f.sp = top;
}
void enter(Fiber& f) { switch_stack(&scheduler_sp, f.sp); }
static void leave(Fiber& f) { switch_stack(&f.sp, scheduler_sp); }
#else
static ucontext_t scheduler_context;
void prepare(Fiber& f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
}
void enter(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
static void leave(Fiber& f) { swapcontext(&f.context, &scheduler_context); }
#endif

void wake(Fiber& f) {
    f.wait = READY;
    f.warp->ready |= 1u << f.lane;
}

// Lets others run; comes back when someone has woken this thread (READY: it is its own turn again some time).
__attribute__((noinline)) void park(Wait wait, const char* what) {
    Fiber& f = *current;
    f.wait = wait, f.what = what, f.frame = static_cast<void**>(__builtin_frame_address(0));
    if (wait != READY) f.warp->ready &= ~(1u << f.lane);
    leave(f);
}

}  // namespace simt
