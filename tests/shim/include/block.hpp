// Runs a kernel on the host. Every thread of a block is a fiber; a fiber runs until it comes to a barrier or to an operation
// of its warp, and the last one to come there does the work for all. Blocks follow one another, or take turns (launch.hpp).
//
//   - Blocks, warps and lanes take their turns in rising or in falling order: what lacks a barrier differs between the two.
//   - Shared memory begins as 0xff, which is NaN: what is read before it is written shows.
//   - A fault, lanes that part at an operation of all, and lanes that wait for ever end the launch with a message.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

// Of the running thread. Kernels see them under CUDA's names.
inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;
constexpr uint32_t ALL = 0xffffffff;
// Not a power of two: the ends of the stacks, which are all in use, would share few places of the caches.
constexpr size_t STACK_BYTES = (128 << 10) + 1088;
constexpr size_t MAX_DYNAMIC_BYTES = 1 << 20, PAGE_BYTES = 64 << 10;
constexpr uint8_t POISON = 0xff;

// What tests/shim/host.rs asks for.
struct Launch {
    const char *kernel;
    void **parameters;
    uint32_t blocks_x, blocks_y, threads, is_falling, is_concurrent;
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

// A copy that a barrier in shared memory counts.
struct Due {
    uint32_t barrier;
    Copy copy;
};

struct Machine;

struct Fiber {
    jmp_buf context;
    Machine *machine;
    const char *waits_at;  // null while it runs
    bool mbarrier_has_completed;
    std::vector<Copy> copies;  // begun and not yet arrived
    int batch;
};

struct Warp {
    uint32_t ready, paused;
    // Of the operation that its lanes come together for.
    const char *operation;
    uint32_t wanted, arrived;
    void *operands[WARP];
};

struct Range {
    uint8_t *begin;
    size_t bytes;
};

// What one block at a time needs.
struct Machine {
    jmp_buf scheduler;
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_WARPS];
    std::vector<Due> due;  // begun and not yet arrived
    uint8_t *stacks, *dynamic_room;
    Range statics, dynamic;
    const Launch *launch;
    void (*kernel)(void **);
    int running;  // a thread's index, or -1
    int threads, made, live, at_barrier, syncing;
    bool has_failed;
    bool has_progressed;         // in its turn: a thread has ended, or changed what others may poll
    std::vector<uint8_t> aside;  // its statics while another block runs

    Machine();
    ~Machine();
    void begin(uint32_t x, uint32_t y);
    void enter();
    void put_aside();
    void take_turn();
    void schedule();
    void resume(int index);
    void make_fiber(int index);
    bool is_pausing() const;
    void report_wait();
    void check_room();
};

// Of the block that runs in this thread.
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

// A barrier of the first `count` threads of the block.
inline void barrier(int count) {
    Machine &m = *machine;
    if (m.running >= count) fail("syncs with the first %d threads", count);
    if (m.at_barrier > 0 && m.syncing != count) fail("meets %d threads, while others barrier_sync %d", count, m.syncing);
    m.syncing = count;
    if (++m.at_barrier < count) return wait_at("__syncthreads");
    m.at_barrier = 0;
    m.has_progressed = true;
    for (int warp = 0; warp * WARP < count; warp++) m.warps[warp].ready = lanes_of_warp(count, warp);
    m.warps[m.running / WARP].ready &= ~(1u << m.running % WARP);
}

// Lets the block's other threads and all other blocks have their turn.
inline void give_way() {
    Machine &m = *machine;
    m.warps[m.running / WARP].paused |= 1u << m.running % WARP;
    wait_at("backoff");
}

// Writes what others may poll.
template <class T>
void change(T *at, T value) {
    if (memcmp(at, &value, sizeof value) != 0) machine->has_progressed = true;
    *at = value;
}

// A fiber's life: a thread of one block after the other. It may move between the system's threads in between, so that
// nothing here is thread-local.
inline void run_threads(uint32_t high, uint32_t low) {
    Fiber *fiber = (Fiber *)((uintptr_t)high << 32 | low);
    for (;;) {
        change_to(fiber->context, fiber->machine->scheduler);
        fiber->machine->kernel(fiber->machine->launch->parameters);
        fiber->mbarrier_has_completed = fiber->machine->has_progressed = true;
        fiber->machine->live--;
    }
}

inline uint8_t *map_memory(size_t bytes) {
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : (uint8_t *)at;
}

inline Machine::Machine() : made(0) {
    stacks = map_memory(MAX_THREADS * STACK_BYTES);
    dynamic_room = map_memory(MAX_DYNAMIC_BYTES + PAGE_BYTES);
    if (!stacks || !dynamic_room || mprotect(dynamic_room + MAX_DYNAMIC_BYTES, PAGE_BYTES, PROT_NONE) != 0) abort();
    // Of a stack little more than its first page is touched. Systems without huge pages refuse, which is as good.
    madvise(stacks, MAX_THREADS * STACK_BYTES, MADV_NOHUGEPAGE);
}

inline Machine::~Machine() {
    munmap(stacks, MAX_THREADS * STACK_BYTES);
    munmap(dynamic_room, MAX_DYNAMIC_BYTES + PAGE_BYTES);
}

inline void Machine::make_fiber(int index) {
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

inline void Machine::resume(int index) {
    running = index;
    fibers[index].waits_at = nullptr;
    threadIdx = {(unsigned)index, 0, 0};
    change_to(scheduler, fibers[index].context);
    running = -1;
}

// Runs until no thread can move on.
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
        if (!has_moved) return;
    }
}

inline bool Machine::is_pausing() const {
    uint32_t paused = 0;
    for (int warp = 0; warp * WARP < threads; warp++) paused |= warps[warp].paused;
    return paused != 0;
}

// Names the first warp that waits, at a pause if there is one, and where its lanes are.
inline void Machine::report_wait() {
    int ended = threads - live;
    bool is_at_pause = is_pausing();
    for (int index = 0; index < threads; index++) {
        if (!fibers[index].waits_at || (warps[index / WARP].paused >> index % WARP & 1) != is_at_pause) continue;
        int first = index / WARP * WARP;
        uint32_t same = 0, mbarrier_has_completed = 0;
        for (int lane = 0; lane < WARP && first + lane < threads; lane++) {
            const Fiber &other = fibers[first + lane];
            same |= (uint32_t)(other.waits_at == fibers[index].waits_at) << lane;
            mbarrier_has_completed |= (uint32_t)other.mbarrier_has_completed << lane;
        }
        return write_message("warp %d waits for ever: lanes %08x at %s, lanes %08x have ended; %d of %d threads of the block "
                             "have ended, %d are at __syncthreads",
                             index / WARP, same, fibers[index].waits_at, mbarrier_has_completed, ended, threads, at_barrier);
    }
}

// Dynamic shared memory is asked for by the byte and aligned to 16: none of what is left over may be written.
inline void Machine::check_room() {
    for (size_t at = launch->shared_bytes; at % 16 != 0 && !has_failed; at++)
        if (dynamic.begin[at] != POISON) write_message("byte %zu of %zu of shared memory was written", at, launch->shared_bytes);
}

// Static shared memory and the indices, `machine` among them, have the same place for all blocks.
inline void Machine::put_aside() { aside.assign(statics.begin, statics.begin + statics.bytes); }

inline void Machine::enter() {
    if (machine == this) return;
    machine->put_aside();
    memcpy(statics.begin, aside.data(), statics.bytes);
    asm volatile("" ::: "memory");
}

inline void Machine::begin(uint32_t x, uint32_t y) {
    if (machine && machine != this) machine->put_aside();
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
    due.clear();
    running = -1;
    for (; made < threads; made++) make_fiber(made);
    for (int index = 0; index < threads; index++) {
        Fiber &fiber = fibers[index];
        fiber.waits_at = nullptr;
        fiber.mbarrier_has_completed = false;
        fiber.copies.clear();
        fiber.batch = 0;
    }
    for (int warp = 0; warp * WARP < threads; warp++) {
        warps[warp] = {lanes_of_warp(threads, warp), 0, nullptr, 0, 0, {}};
    }
}

// Those that paused try again, and all go on until they wait, or pause anew.
inline void Machine::take_turn() {
    enter();
    has_progressed = false;
    for (int warp = 0; warp * WARP < threads; warp++) warps[warp].ready |= std::exchange(warps[warp].paused, 0);
    schedule();
    if (has_failed) return;
    if (live == 0) return check_room();
    if (!is_pausing()) report_wait();
}

}  // namespace shim
