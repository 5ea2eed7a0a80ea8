// A loop over independent items, in threads only where there is work for them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace amed::cpu {

// Elements read and written that are worth one thread: below it, waking the thread costs more than it saves.
constexpr std::int64_t kElementsPerThread = 1 << 17;

template <typename Body>
void parallel_for(std::int64_t items, std::int64_t elements, int threads, const Body& body) {
    const std::int64_t useful = std::min<std::int64_t>({threads, items, elements / kElementsPerThread});
    if (useful <= 1) {
        for (std::int64_t item = 0; item < items; ++item) body(item);
        return;
    }
    const int count = static_cast<int>(useful);
#ifdef _OPENMP
#pragma omp parallel for num_threads(count) schedule(static)
#endif
    for (std::int64_t item = 0; item < items; ++item) body(item);
    static_cast<void>(count);
}

}  // namespace amed::cpu
