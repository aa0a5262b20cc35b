// Memory as a kernel reaches it: checked addresses, shared memory by 32 bits, copies that arrive later.
#pragma once

#include <algorithm>

#include "block.hpp"

namespace shim {

// Where the two kinds of shared memory begin, as 32-bit addresses.
constexpr uint32_t STATIC_BASE = 0x01000000, DYNAMIC_BASE = 0x02000000;

struct alignas(16) Unit {
    uint8_t bytes[16];
};

inline void *dynamic_shared() { return machine->dynamic.begin; }

inline uint32_t shared_address(const void *at) {
    auto within = [&](Range range) { return (uintptr_t)at - (uintptr_t)range.begin <= range.bytes; };
    if (within(machine->dynamic)) return DYNAMIC_BASE + (uint32_t)((uint8_t *)at - machine->dynamic.begin);
    if (within(machine->statics)) return STATIC_BASE + (uint32_t)((uint8_t *)at - machine->statics.begin);
    fail("%p is not in shared memory", at);
}

template <class T>
T *at_shared(uint32_t address) {
    bool is_dynamic = address >= DYNAMIC_BASE;
    Range range = is_dynamic ? machine->dynamic : machine->statics;
    size_t offset = address - (is_dynamic ? DYNAMIC_BASE : STATIC_BASE);
    if (offset + sizeof(T) > range.bytes) fail("%zu bytes at %zu of %zu of shared memory", sizeof(T), offset, range.bytes);
    uint8_t *at = range.begin + offset;
    if ((uintptr_t)at % sizeof(T) != 0) fail("%zu bytes at %zu of shared memory are not aligned", sizeof(T), offset);
    return (T *)at;
}

template <class T>
T *at_global(const void *at) {
    if ((uintptr_t)at % sizeof(T) != 0) fail("%zu bytes at %p are not aligned", sizeof(T), at);
    return (T *)at;
}

// An asynchronous copy arrives as late as it may: at the wait. Until then its place holds poison. Zeros come from null.
template <class T>
void begin_copy(uint32_t to, const void *from) {
    Fiber &fiber = machine->fibers[machine->running];
    memset(at_shared<T>(to), POISON, sizeof(T));
    fiber.copies.push_back({to, from ? at_global<T>(from) : nullptr, sizeof(T), fiber.batch});
}

inline void deliver(const Copy &copy) {
    if (copy.from) memcpy(at_shared<uint8_t>(copy.to), copy.from, copy.bytes);
    else memset(at_shared<uint8_t>(copy.to), 0, copy.bytes);
}

inline void end_batch() { machine->fibers[machine->running].batch++; }

inline void wait_batches(int left) {
    Fiber &fiber = machine->fibers[machine->running];
    auto copy = fiber.copies.begin();
    for (; copy != fiber.copies.end() && copy->batch < fiber.batch - left; copy++) deliver(*copy);
    fiber.copies.erase(fiber.copies.begin(), copy);
}

// A barrier in shared memory that counts copies: what is missing in this phase.
struct Barrier {
    int32_t bytes;
    int16_t arrivals;
    uint8_t expected, is_odd;
};

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    *at_shared<Barrier>(barrier) = {0, (int16_t)arrivals, (uint8_t)arrivals, 0};
}

inline void count(uint32_t barrier, int arrivals, int bytes) {
    Barrier &counted = *at_shared<Barrier>(barrier);
    counted.arrivals -= arrivals;
    counted.bytes -= bytes;
    if (counted.arrivals < 0) fail("one arrival too many in a phase of %d", (int)counted.expected);
    if (counted.arrivals > 0 || counted.bytes != 0) return;
    counted.arrivals = counted.expected;
    counted.is_odd ^= 1;
    machine->has_progressed = true;
}

inline void begin_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    if (bytes == 0 || bytes % sizeof(Unit) != 0) fail("a bulk copy of %u bytes", bytes);
    memset(at_shared<Unit>(to), POISON, bytes);
    at_shared<Unit>(to + bytes - sizeof(Unit));
    machine->due.push_back({barrier, {to, at_global<Unit>(from), bytes, 0}});
}

// Whether the running phase is another one.
inline bool mbarrier_has_completed(uint32_t barrier, uint32_t is_odd) { return at_shared<Barrier>(barrier)->is_odd != is_odd; }

// All lanes of a warp at once: what the barrier counts arrives now, and others have their turn until nothing is missing.
inline void mbarrier_wait(uint32_t barrier, uint32_t is_odd) {
    struct Operand {
        uint32_t barrier;
    } own = {barrier};
    do {
        together("mbarrier_wait", ALL, own, [](Operand **lanes) {
            const uint32_t barrier = lanes[0]->barrier;
            std::vector<Due> &due = machine->due;
            auto is_other = [&](const Due &one) { return one.barrier != barrier; };
            auto arrives = std::stable_partition(due.begin(), due.end(), is_other);
            for (auto one = arrives; one != due.end(); one++) {
                deliver(one->copy);
                count(barrier, 0, (int)one->copy.bytes);
            }
            due.erase(arrives, due.end());
        });
        if (!mbarrier_has_completed(barrier, is_odd)) give_way();
    } while (!mbarrier_has_completed(barrier, is_odd));
}

}  // namespace shim
