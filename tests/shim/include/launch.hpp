// Runs the blocks of a launch: one after the other, or all by turns where they may wait for each other.
#pragma once

#include <link.h>
#include <signal.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <mutex>

#include "block.hpp"

namespace shim {

constexpr uint32_t MAX_CONCURRENT = 64;
// Rounds over all blocks in which no thread ended or changed what others may poll; after so many, none is expected to. In no
// kernel do as many waits follow each other that have ended already, or that end by a write that the shim does not see.
constexpr int PATIENCE_ROUNDS = 1000;

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

inline std::vector<std::unique_ptr<Machine>> take_machines(uint32_t count) {
    std::vector<std::unique_ptr<Machine>> machines;
    std::lock_guard guard(idle_lock);
    for (; machines.size() < count && !idle.empty(); idle.pop_back()) machines.push_back(std::move(idle.back()));
    while (machines.size() < count) machines.push_back(std::make_unique<Machine>());
    return machines;
}

// Gives blocks turns until all have ended; false after a failure.
inline bool finish(const std::vector<std::unique_ptr<Machine>> &blocks) {
    auto is_live = [](const auto &block) { return block->live > 0; };
    for (int idle_rounds = 0; idle_rounds < PATIENCE_ROUNDS;) {
        bool has_progressed = false;
        for (const auto &block : blocks) {
            if (!is_live(block)) continue;
            block->take_turn();
            if (block->has_failed) return false;
            has_progressed |= block->has_progressed;
        }
        if (std::none_of(blocks.begin(), blocks.end(), is_live)) return true;
        idle_rounds = has_progressed ? 0 : idle_rounds + 1;
    }
    const auto &waiting = *std::find_if(blocks.begin(), blocks.end(), is_live);
    waiting->enter();
    waiting->report_wait();
    return false;
}

// Whether the launch has ended well; the message says why it has not.
inline bool run(const Launch &launch, void (*kernel)(void **)) {
    static std::once_flag once;
    std::call_once(once, catch_faults);
    uint32_t blocks = launch.blocks_x * launch.blocks_y, at_once = launch.is_concurrent ? blocks : 1;
    if (at_once > MAX_CONCURRENT) {
        snprintf(launch.message, launch.message_bytes, "%s: %u blocks at once, allowed are %u", launch.kernel, at_once,
                 MAX_CONCURRENT);
        return false;
    }
    auto machines = take_machines(at_once);
    Range statics = find_statics();
    for (const auto &own : machines) {
        own->launch = &launch;
        own->kernel = kernel;
        own->statics = statics;
        own->has_failed = false;
    }
    bool is_well = true;
    for (uint32_t turn = 0; turn < blocks && is_well;) {
        for (const auto &own : machines) {
            uint32_t block = launch.is_falling ? blocks - 1 - turn : turn;
            own->begin(block % launch.blocks_x, block / launch.blocks_x);
            turn++;
        }
        is_well = finish(machines);
    }
    machine = nullptr;
    // After a failure fibers are in the middle of something.
    if (!is_well) return false;
    std::lock_guard guard(idle_lock);
    std::move(machines.begin(), machines.end(), std::back_inserter(idle));
    return true;
}

}  // namespace shim
