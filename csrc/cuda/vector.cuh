// Rows of kVec elements of any type: 16-byte accesses where the addresses allow, single elements elsewhere.
// Free of host headers, so that NVRTC compiles it too.
#pragma once

#include "amed/types.h"

namespace amed::gpu {

constexpr int kVec = 8;

struct alignas(16) Chunk {
    unsigned int words[4];
};

__device__ inline float half_to_float(unsigned short value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}

__device__ inline unsigned short float_to_half(float value) {
    unsigned short result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

__device__ inline float bfloat_to_float(unsigned short value) {
    return __uint_as_float(static_cast<unsigned int>(value) << 16);
}

__device__ inline unsigned short float_to_bfloat(float value) {
    unsigned short result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

__device__ inline int width_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

__device__ inline double widen(double value, DType) { return value; }
__device__ inline float widen(float value, DType) { return value; }
__device__ inline float widen(unsigned short value, DType dtype) {
    return dtype == DType::f16 ? half_to_float(value) : bfloat_to_float(value);
}

__device__ inline void narrow(double value, DType, double* out) { *out = value; }
__device__ inline void narrow(float value, DType, float* out) { *out = value; }
__device__ inline void narrow(float value, DType dtype, unsigned short* out) {
    *out = dtype == DType::f16 ? float_to_half(value) : float_to_bfloat(value);
}

// `count` of kVec elements from p, the rest zero.
template <typename Stored, typename T>
__device__ inline void load_as(const Stored* p, DType dtype, int count, bool aligned, T* row) {
    alignas(16) Stored raw[kVec];
    if (aligned) {
        constexpr int kChunks = kVec * sizeof(Stored) / sizeof(Chunk);
#pragma unroll
        for (int k = 0; k < kChunks; ++k) reinterpret_cast<Chunk*>(raw)[k] = reinterpret_cast<const Chunk*>(p)[k];
    } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) raw[k] = k < count ? p[k] : Stored(0);
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) row[k] = static_cast<T>(widen(raw[k], dtype));
}

template <typename Stored, typename T>
__device__ inline void store_as(const T* row, DType dtype, int count, bool aligned, Stored* p) {
    alignas(16) Stored raw[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) narrow(row[k], dtype, raw + k);
    if (aligned) {
        constexpr int kChunks = kVec * sizeof(Stored) / sizeof(Chunk);
#pragma unroll
        for (int k = 0; k < kChunks; ++k) reinterpret_cast<Chunk*>(p)[k] = reinterpret_cast<const Chunk*>(raw)[k];
        return;
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k)
        if (k < count) p[k] = raw[k];
}

__device__ inline bool is_aligned(const void* address, int count) {
    return count >= kVec && reinterpret_cast<unsigned long long>(address) % sizeof(Chunk) == 0;
}

template <typename Stored>
__device__ inline Stored* at(const View& view, std::int64_t offset) {
    return static_cast<Stored*>(view.data) + offset;
}

// The dtype is the same for a whole launch, so these branches do not diverge.
template <typename T>
__device__ inline void load(const View& view, std::int64_t offset, int count, T* row) {
    const char* address = static_cast<const char*>(view.data) + offset * width_of(view.dtype);
    const bool aligned = is_aligned(address, count);
    if (view.dtype == DType::f32)
        load_as(at<const float>(view, offset), view.dtype, count, aligned, row);
    else if (view.dtype == DType::f64)
        load_as(at<const double>(view, offset), view.dtype, count, aligned, row);
    else
        load_as(at<const unsigned short>(view, offset), view.dtype, count, aligned, row);
}

__device__ inline void store(const double* row, const View& view, std::int64_t offset, int count) {
    double* p = at<double>(view, offset);
    store_as(row, view.dtype, count, is_aligned(p, count), p);
}

__device__ inline void store(const float* row, const View& view, std::int64_t offset, int count) {
    if (view.dtype == DType::f32) {
        float* p = at<float>(view, offset);
        store_as(row, view.dtype, count, is_aligned(p, count), p);
    } else {
        unsigned short* p = at<unsigned short>(view, offset);
        store_as(row, view.dtype, count, is_aligned(p, count), p);
    }
}

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// Sum over a warp; every lane gets it.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

}  // namespace amed::gpu
