#include "vector.h"

#include <cstring>

#include "half.h"

// One binary serves every x86-64: the loader picks the clone that the processor can run.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(AMED_NO_CLONES)
#define AMED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define AMED_CLONES
#endif

namespace amed::cpu {
namespace {

// Plain loops, which every compiler turns into vector code for the clone at hand. The sum starts from 0 + c * s, so
// that each step can only become one fused multiply-add, in vector body and remainder alike.
template <int Count, typename T>
[[gnu::always_inline]] inline void accumulate(const T* const* s, const T* c, bool first, T* row, std::int64_t n) {
    const T* p[Count];
    T weight[Count];
    for (int j = 0; j < Count; ++j) p[j] = s[j], weight[j] = c[j];
    if (first) {
        for (std::int64_t i = 0; i < n; ++i) row[i] = T(0);
    }
#pragma GCC ivdep
    for (std::int64_t i = 0; i < n; ++i) {
        T total = row[i];
        for (int j = 0; j < Count; ++j) total += weight[j] * p[j][i];
        row[i] = total;
    }
}

template <typename T>
[[gnu::always_inline]] inline void weighted_sum_body(const T* const* s, const T* c, int count, T* row, std::int64_t n) {
    for (int j = 0; j < count; j += 4) {
        switch (count - j) {
            case 1: accumulate<1>(s + j, c + j, j == 0, row, n); break;
            case 2: accumulate<2>(s + j, c + j, j == 0, row, n); break;
            case 3: accumulate<3>(s + j, c + j, j == 0, row, n); break;
            default: accumulate<4>(s + j, c + j, j == 0, row, n);
        }
    }
}

template <typename T>
[[gnu::always_inline]] inline double dot_body(const T* a, const T* b, std::int64_t n) {
    constexpr int kLanes = 16;
    T lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
    }
    double total = 0;
    for (int k = 0; k < kLanes; ++k) total += static_cast<double>(lanes[k]);
    for (; i < n; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return total;
}

AMED_CLONES void widen_f16(const std::uint16_t* in, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}

AMED_CLONES void widen_bf16(const std::uint16_t* in, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
}

AMED_CLONES void narrow_f16(const float* in, std::uint16_t* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}

AMED_CLONES void narrow_bf16(const float* in, std::uint16_t* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat(in[i]);
}

AMED_CLONES void narrow_f64(const double* in, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

AMED_CLONES void widen_f32(const float* in, double* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(in[i]);
}

template <typename T>
T* at(const View& view, std::int64_t offset) {
    return static_cast<T*>(view.data) + offset;
}

}  // namespace

AMED_CLONES void weighted_sum(const float* const* s, const float* c, int count, float* row, std::int64_t n) {
    weighted_sum_body(s, c, count, row, n);
}

AMED_CLONES void weighted_sum(const double* const* s, const double* c, int count, double* row, std::int64_t n) {
    weighted_sum_body(s, c, count, row, n);
}

AMED_CLONES double dot(const float* a, const float* b, std::int64_t n) { return dot_body(a, b, n); }

AMED_CLONES double dot(const double* a, const double* b, std::int64_t n) { return dot_body(a, b, n); }

AMED_CLONES void add(const float* row, float* total, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += row[i];
}

AMED_CLONES void add(const double* row, double* total, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += row[i];
}

void load(const View& view, std::int64_t offset, float* row, std::int64_t n) {
    switch (view.dtype) {
        case DType::f16: return widen_f16(at<std::uint16_t>(view, offset), row, n);
        case DType::bf16: return widen_bf16(at<std::uint16_t>(view, offset), row, n);
        case DType::f64: return narrow_f64(at<double>(view, offset), row, n);
        default: std::memcpy(row, at<float>(view, offset), static_cast<std::size_t>(n) * sizeof(float));
    }
}

void load(const View& view, std::int64_t offset, double* row, std::int64_t n) {
    if (view.dtype == DType::f64) {
        std::memcpy(row, at<double>(view, offset), static_cast<std::size_t>(n) * sizeof(double));
        return;
    }
    float narrow[kBlock];
    for (std::int64_t i = 0; i < n; i += kBlock) {
        const std::int64_t count = n - i < kBlock ? n - i : kBlock;
        load(view, offset + i, narrow, count);
        widen_f32(narrow, row + i, count);
    }
}

void store(const float* row, const View& view, std::int64_t offset, std::int64_t n) {
    switch (view.dtype) {
        case DType::f16: return narrow_f16(row, at<std::uint16_t>(view, offset), n);
        case DType::bf16: return narrow_bf16(row, at<std::uint16_t>(view, offset), n);
        default: std::memcpy(at<float>(view, offset), row, static_cast<std::size_t>(n) * sizeof(float));
    }
}

void store(const double* row, const View& view, std::int64_t offset, std::int64_t n) {
    std::memcpy(at<double>(view, offset), row, static_cast<std::size_t>(n) * sizeof(double));
}

}  // namespace amed::cpu
