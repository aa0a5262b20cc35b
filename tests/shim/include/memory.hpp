// Memory as a kernel reaches it: checked addresses, shared memory by 32 bits, copies that arrive later.
#pragma once

#include "block.hpp"

namespace shim {

// Where the two kinds of shared memory begin, as 32-bit addresses.
constexpr uint32_t STATIC_BASE = 0x01000000, DYNAMIC_BASE = 0x02000000;

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

// An asynchronous copy arrives as late as it may: at the wait. Until then its place holds poison.
template <class T>
void begin_copy(uint32_t to, const void *from) {
    Fiber &fiber = machine->fibers[machine->running];
    memset(at_shared<T>(to), POISON, sizeof(T));
    fiber.copies.push_back({to, at_global<T>(from), sizeof(T), fiber.batch});
}

inline void end_batch() { machine->fibers[machine->running].batch++; }

inline void await_batches(int left) {
    Fiber &fiber = machine->fibers[machine->running];
    auto copy = fiber.copies.begin();
    for (; copy != fiber.copies.end() && copy->batch < fiber.batch - left; copy++)
        memcpy(at_shared<uint8_t>(copy->to), copy->from, copy->bytes);
    fiber.copies.erase(fiber.copies.begin(), copy);
}

}  // namespace shim
