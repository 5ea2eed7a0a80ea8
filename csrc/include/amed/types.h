// Plain data shared by every entry point: no framework, no allocation, no ownership.
#pragma once

#if defined(__CUDACC_RTC__)  // compiled at run time: no host headers
namespace std {
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
}  // namespace std
#else
#include <cstdint>
#endif

namespace amed {

enum class DType : std::int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

constexpr int kMaxSources = 16;
constexpr int kMaxOutputs = 8;

// A batch of dense samples: sample b starts at data + b * batch_stride (in elements) and has `size` elements.
struct View {
    void* data;
    std::int64_t batch_stride;
    DType dtype;
};

}  // namespace amed
