// What the engine says where a launch goes wrong, and where: block, thread, and the calls in the kernel's library.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>

#include "engine.h"

namespace simt {

static std::string text_of(const char* format, va_list list) {
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    return text;
}
__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...) {
    va_list list;
    va_start(list, format);
    const std::string out = text_of(format, list);
    va_end(list);
    return out;
}

// "block (1, 0, 0) thread 7 @1f3@2a0": the call chain as addresses in the kernel's library, for addr2line.
// `top`: where a function that may have no frame yet was called from is the first such address on the stack.
static std::string place(const Fiber& f, void** frame, void* pc = nullptr, void** top = nullptr) {
    const uint3 b = f.block->index;
    std::string out = text("block (%u, %u, %u) thread %u ", b.x, b.y, b.z, f.tid);
    Dl_info library, info;
    dladdr(reinterpret_cast<void*>(config->thread), &library);
    const auto add = [&](void* address, int back) {
        if (!dladdr(address, &info) || info.dli_fbase != library.dli_fbase) return false;
        out += text("@%lx", static_cast<long>(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase) - back));
        return true;
    };
    if (pc) add(pc, 0);
    const auto low = reinterpret_cast<void**>(f.stack + PAGE), high = reinterpret_cast<void**>(f.stack + STACK);
    for (void** word = top; word && word < top + 64 && word < high; ++word) {
        if (add(*word, 1)) break;
    }
    for (void** before = low; frame >= before && frame + 1 < high && frame[1];) {  // the chain goes up in this stack
        add(frame[1], 1);
        before = frame + 1, frame = static_cast<void**>(frame[0]);
    }
    return out;
}

[[noreturn]] void stop(const std::string& message) {
    snprintf(config->message, config->message_size, "%s", message.c_str());
    siglongjmp(escape, 1);
}

__attribute__((noinline)) void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string message = text_of(format, list);
    va_end(list);
    if (current) message += "; " + place(*current, static_cast<void**>(__builtin_frame_address(0)));
    stop(message);
}

void on_signal(int signal, siginfo_t* info, void* context) {
    if (!pthread_equal(owner, pthread_self())) {  // not ours: the timer goes to the right thread, the rest is fatal
        if (signal == SIGVTALRM)
            pthread_kill(owner, signal);
        else
            std::signal(signal, SIG_DFL);
        return;
    }
    std::string message = signal == SIGILL      ? "undefined behaviour: a misaligned access, or outside a local array"
                          : signal == SIGFPE    ? "integer division by zero or overflow"
                          : signal == SIGVTALRM ? "a thread ran for too long without waiting"
                                                : text("illegal address %p", info->si_addr);
    if (signal == SIGSEGV || signal == SIGBUS) config->fault = info->si_addr;
    for (const Block& b : blocks)
        if (info->si_addr >= b.end && info->si_addr < b.end + PAGE)
            message += text(" (%ld bytes past the end of shared memory)",
                            static_cast<long>(static_cast<unsigned char*>(info->si_addr) - b.shared - config->shared));
    void *pc = nullptr, **frame = nullptr, **top = nullptr;
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    pc = reinterpret_cast<void*>(registers[REG_RIP]), frame = reinterpret_cast<void**>(registers[REG_RBP]);
    if (signal == SIGVTALRM) top = reinterpret_cast<void**>(registers[REG_RSP]);
#elif defined(__aarch64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
    pc = reinterpret_cast<void*>(registers.pc), frame = reinterpret_cast<void**>(registers.regs[29]);
    if (signal == SIGVTALRM) top = reinterpret_cast<void**>(registers.sp);
#endif
    if (current) message += "; " + place(*current, frame, pc, top);
    stop(message);
}

// Nobody can go on: where each group of threads waits.
[[noreturn]] void report_stuck() {
    std::string message = "stuck:", before;
    for (Block& b : blocks)
        for (Fiber& f : b.fibers) {
            if (f.wait == EXITED) continue;
            const std::string at = place(f, f.frame), chain = at.substr(at.find('@')) + f.what;
            if (chain != before) message += "\n  from " + at + " on: waiting in " + f.what;
            before = chain;
        }
    current = nullptr;
    stop(message);
}

}  // namespace simt
