// Runs a kernel on the host. Every thread of a block is a fiber; a fiber runs until it comes to a barrier or to an operation
// of its warp, and the last one to come there does the work for all. Blocks follow one another.
//
//   - Warps and lanes take their turns in rising or in falling order: what lacks a barrier differs between the two.
//   - Shared memory begins as 0xff, which is NaN: what is read before it is written shows.
//   - A fault, lanes that part at an operation of all, and lanes that wait for ever end the launch with a message.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

// Of the running thread. Kernels see them under CUDA's names.
inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;
constexpr uint32_t ALL = 0xffffffff;
constexpr size_t STACK_BYTES = 128 << 10, MAX_DYNAMIC_BYTES = 1 << 20, PAGE_BYTES = 64 << 10;
constexpr uint8_t POISON = 0xff;

// What tests/shim/host.rs asks for.
struct Launch {
    const char *kernel;
    void **parameters;
    uint32_t blocks_x, blocks_y, threads, is_falling;
    size_t shared_bytes;
    char *message;
    size_t message_bytes;
};

struct Copy {
    uint32_t to;
    const void *from;
    uint32_t bytes;
    int batch;
};

struct Machine;

struct Fiber {
    jmp_buf context;
    Machine *machine;
    const char *waits_at;  // null while it runs
    bool has_ended;
    std::vector<Copy> copies;  // begun and not yet arrived
    int batch;
};

struct Warp {
    uint32_t ready;
    // Of the operation that its lanes come together for.
    const char *operation;
    uint32_t wanted, arrived;
    void *operands[WARP];
};

struct Range {
    uint8_t *begin;
    size_t bytes;
};

// What one launch at a time needs.
struct Machine {
    jmp_buf scheduler;
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_WARPS];
    uint8_t *stacks, *dynamic_room;
    Range statics, dynamic;
    const Launch *launch;
    void (*kernel)(void **);
    int running;  // a thread's index, or -1
    int threads, live, at_barrier;
    bool has_failed;

    Machine();
    ~Machine();
    void run_block(uint32_t x, uint32_t y);
    void schedule();
    void resume(int index);
    void report_deadlock();
};

// Of this thread's launch.
inline thread_local Machine *machine;

// The one place where stacks change. Whatever memory is shared has changed when it returns.
[[gnu::noinline]] inline void change_to(jmp_buf from, jmp_buf to) {
    asm volatile("" ::: "memory");
    if (_setjmp(from) == 0) _longjmp(to, 1);
    asm volatile("" ::: "memory");
}

inline void write_message(const char *format, ...) {
    const Launch &launch = *machine->launch;
    if (machine->has_failed) return;
    machine->has_failed = true;
    int used = snprintf(launch.message, launch.message_bytes, "%s, block (%u, %u): ", launch.kernel, blockIdx.x, blockIdx.y);
    va_list values;
    va_start(values, format);
    vsnprintf(launch.message + used, launch.message_bytes - used, format, values);
    va_end(values);
}

// Ends the launch from within a thread of its kernel.
template <class... Values>
[[noreturn]] void fail(const char *format, Values... values) {
    char text[256];
    snprintf(text, sizeof text, format, values...);
    int index = machine->running;
    write_message("thread %d (warp %d, lane %d): %s", index, index / WARP, index % WARP, text);
    _longjmp(machine->scheduler, 1);
}

inline void wait_at(const char *what) {
    Machine &m = *machine;
    Fiber &fiber = m.fibers[m.running];
    fiber.waits_at = what;
    change_to(fiber.context, m.scheduler);
}

// Waits for all lanes of `lanes`, each of which brings an operand; `join` reads and writes all of them at once.
template <class Operand, class Join>
void together(const char *operation, uint32_t lanes, Operand &own, Join join) {
    Machine &m = *machine;
    Warp &warp = m.warps[m.running / WARP];
    uint32_t self = 1u << m.running % WARP;
    if (!(lanes & self)) fail("at %s for lanes %08x, not its own", operation, lanes);
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.wanted = lanes;
    } else if ((warp.operation != operation && strcmp(warp.operation, operation) != 0) || warp.wanted != lanes) {
        fail("at %s for lanes %08x, while lanes %08x of its warp are at %s for %08x", operation, lanes, warp.arrived,
             warp.operation, warp.wanted);
    }
    warp.operands[m.running % WARP] = &own;
    warp.arrived |= self;
    if (warp.arrived != lanes) return wait_at(operation);
    join((Operand **)warp.operands);
    warp.arrived = 0;
    warp.ready |= lanes & ~self;
}

inline uint32_t lanes_of_warp(int threads, int warp) {
    int lanes = threads - warp * WARP;
    return lanes >= WARP ? ALL : (1u << lanes) - 1;
}

inline void barrier() {
    Machine &m = *machine;
    if (++m.at_barrier < m.threads) return wait_at("__syncthreads");
    m.at_barrier = 0;
    for (int warp = 0; warp * WARP < m.threads; warp++) m.warps[warp].ready = lanes_of_warp(m.threads, warp);
    m.warps[m.running / WARP].ready &= ~(1u << m.running % WARP);
}

// This module's thread-local memory, which is the kernels' static shared memory.
inline Range find_statics() {
    blockIdx = {};  // The system makes it when it is first touched.
    Range found = {};
    auto look = [](dl_phdr_info *info, size_t, void *out) {
        bool is_ours = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto &part = info->dlpi_phdr[i];
            if (part.p_type == PT_LOAD) is_ours |= (uintptr_t)&find_statics - (info->dlpi_addr + part.p_vaddr) < part.p_memsz;
            if (part.p_type == PT_TLS) bytes = part.p_memsz;
        }
        if (is_ours) *(Range *)out = {(uint8_t *)info->dlpi_tls_data, bytes};
        return (int)is_ours;
    };
    dl_iterate_phdr(look, &found);
    return found;
}

// A fiber's life: a thread of one block after the other. It may move between the system's threads in between, so that
// nothing here is thread-local.
inline void run_threads(uint32_t high, uint32_t low) {
    Fiber *fiber = (Fiber *)((uintptr_t)high << 32 | low);
    for (;;) {
        change_to(fiber->context, fiber->machine->scheduler);
        fiber->machine->kernel(fiber->machine->launch->parameters);
        fiber->has_ended = true;
        fiber->machine->live--;
    }
}

inline uint8_t *map_memory(size_t bytes) {
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : (uint8_t *)at;
}

inline Machine::Machine() {
    stacks = map_memory(MAX_THREADS * STACK_BYTES);
    dynamic_room = map_memory(MAX_DYNAMIC_BYTES + PAGE_BYTES);
    if (!stacks || !dynamic_room || mprotect(dynamic_room + MAX_DYNAMIC_BYTES, PAGE_BYTES, PROT_NONE) != 0) abort();
    for (int index = 0; index < MAX_THREADS; index++) {
        Fiber &fiber = fibers[index];
        fiber.machine = this;
        ucontext_t context, here;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + index * STACK_BYTES;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, (void (*)())run_threads, 2, (uint32_t)((uintptr_t)&fiber >> 32), (uint32_t)(uintptr_t)&fiber);
        if (_setjmp(scheduler) == 0) swapcontext(&here, &context);
    }
}

inline Machine::~Machine() {
    munmap(stacks, MAX_THREADS * STACK_BYTES);
    munmap(dynamic_room, MAX_DYNAMIC_BYTES + PAGE_BYTES);
}

inline void Machine::resume(int index) {
    running = index;
    fibers[index].waits_at = nullptr;
    threadIdx = {(unsigned)index, 0, 0};
    change_to(scheduler, fibers[index].context);
    running = -1;
}

inline void Machine::schedule() {
    int warp_count = (threads + WARP - 1) / WARP;
    while (live > 0) {
        bool has_moved = false;
        for (int turn = 0; turn < warp_count; turn++) {
            int index = launch->is_falling ? warp_count - 1 - turn : turn;
            while (uint32_t ready = warps[index].ready) {
                int lane = launch->is_falling ? 31 - std::countl_zero(ready) : std::countr_zero(ready);
                warps[index].ready &= ~(1u << lane);
                resume(index * WARP + lane);
                if (has_failed) return;
                has_moved = true;
            }
        }
        if (!has_moved) return report_deadlock();
    }
}

// Names the first warp that waits, and where its lanes are.
inline void Machine::report_deadlock() {
    int ended = threads - live;
    for (int index = 0; index < threads; index++) {
        if (!fibers[index].waits_at) continue;
        int first = index / WARP * WARP;
        uint32_t same = 0, has_ended = 0;
        for (int lane = 0; lane < WARP && first + lane < threads; lane++) {
            const Fiber &other = fibers[first + lane];
            same |= (uint32_t)(other.waits_at == fibers[index].waits_at) << lane;
            has_ended |= (uint32_t)other.has_ended << lane;
        }
        return write_message("warp %d waits for ever: lanes %08x at %s, lanes %08x have ended; %d of %d threads of the block "
                             "have ended, %d are at __syncthreads",
                             index / WARP, same, fibers[index].waits_at, has_ended, ended, threads, at_barrier);
    }
}

inline void Machine::run_block(uint32_t x, uint32_t y) {
    memset(statics.begin, POISON, statics.bytes);
    asm volatile("" ::: "memory");
    machine = this;
    blockIdx = {x, y, 0};
    blockDim = {launch->threads, 1, 1};
    gridDim = {launch->blocks_x, launch->blocks_y, 1};
    // The last byte lies before a page that nobody may touch.
    size_t room = (launch->shared_bytes + 15) / 16 * 16;
    dynamic = {dynamic_room + MAX_DYNAMIC_BYTES - room, launch->shared_bytes};
    memset(dynamic.begin, POISON, room);

    threads = live = (int)launch->threads;
    at_barrier = 0;
    running = -1;
    for (int index = 0; index < threads; index++) {
        Fiber &fiber = fibers[index];
        fiber.waits_at = nullptr;
        fiber.has_ended = false;
        fiber.copies.clear();
        fiber.batch = 0;
    }
    for (int warp = 0; warp * WARP < threads; warp++) warps[warp] = {lanes_of_warp(threads, warp), nullptr, 0, 0, {}};
    schedule();
    for (size_t at = launch->shared_bytes; at < room && !has_failed; at++)
        if (dynamic.begin[at] != POISON) write_message("byte %zu of %zu of shared memory was written", at, launch->shared_bytes);
}

inline struct sigaction faults_before[NSIG];

// A fault of a kernel ends its launch; others are not ours.
inline void on_fault(int signal, siginfo_t *info, void *context) {
    if (machine && machine->running >= 0) {
        if (signal == SIGSEGV || signal == SIGBUS) fail("touches %p, which is in no buffer or not aligned", info->si_addr);
        fail("undefined behaviour at %p: a shift, an overflow, an index or an alignment", info->si_addr);
    }
    const struct sigaction &before = faults_before[signal];
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
    sigaction(signal, &before, nullptr);
}

inline void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) sigaction(signal, &action, &faults_before[signal]);
}

inline std::mutex idle_lock;
inline std::vector<std::unique_ptr<Machine>> idle;

// Whether the launch has ended well; the message says why it has not.
inline bool run(const Launch &launch, void (*kernel)(void **)) {
    static std::once_flag once;
    std::call_once(once, catch_faults);
    std::unique_ptr<Machine> own;
    {
        std::lock_guard guard(idle_lock);
        if (!idle.empty()) {
            own = std::move(idle.back());
            idle.pop_back();
        }
    }
    if (!own) own = std::make_unique<Machine>();
    own->launch = &launch;
    own->kernel = kernel;
    own->statics = find_statics();
    own->has_failed = false;
    uint32_t blocks = launch.blocks_x * launch.blocks_y;
    for (uint32_t turn = 0; turn < blocks && !own->has_failed; turn++) {
        uint32_t block = launch.is_falling ? blocks - 1 - turn : turn;
        own->run_block(block % launch.blocks_x, block / launch.blocks_x);
    }
    machine = nullptr;
    // After a failure its fibers are in the middle of something.
    if (own->has_failed) return false;
    std::lock_guard guard(idle_lock);
    idle.push_back(std::move(own));
    return true;
}

}  // namespace shim
