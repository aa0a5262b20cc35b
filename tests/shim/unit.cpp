// The kernels of one .cu on the host: SOURCE is its path, KERNELS is KERNEL(name) for each.
#include "kernels/cuda/device.cuh"

#include <utility>

#include SOURCE

namespace {

template <class... Parameters>
void call(void (*kernel)(Parameters...), void **values) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        kernel(*(Parameters *)values[I]...);
    }(std::index_sequence_for<Parameters...>());
}

struct Entry {
    const char *name;
    void (*run)(void **);
};

#define KERNEL(NAME) {#NAME, [](void **values) { call(NAME, values); }},
const Entry ENTRIES[] = {KERNELS};

}  // namespace

// Whether a launch has ended well.
extern "C" [[gnu::visibility("default")]] int shim_run(const shim::Launch *launch) {
    for (const Entry &entry : ENTRIES)
        if (strcmp(entry.name, launch->kernel) == 0) return shim::run(*launch, entry.run);
    snprintf(launch->message, launch->message_bytes, "no kernel %s", launch->kernel);
    return 0;
}
