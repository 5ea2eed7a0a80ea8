// Where a sampler's memory is and its arithmetic happens. Addresses are the device's; nothing here waits for it but
// `allocate` and `upload`.
#pragma once

#include <cstddef>
#include <memory>

#include "amed/combine.h"
#include "amed/midpoint.h"

#if defined(__CUDACC__)
#define AMED_BOTH __host__ __device__
#else
#define AMED_BOTH
#endif

namespace amed {

// Coefficients that a predictor's midpoint gives: coeffs[k, b] = sum over i of weights[k, i] * basis_i(r, c, m) of
// sample b, with r, c and scale_time rows 0 to 2 of the table of `midpoint`, (10, batch).
struct MixArgs {
    const double* weights;  // (count, kBasis)
    const float* table;
    int count;
    std::int64_t batch;
    double sigma, sigma_next;
    float* coeffs;  // (count, batch)
};

// The analytic first step: denoised = x - c (x - m) with c = s / sqrt(1 + s^2) and m the sample's row of `mean`, or 0.
struct AnalyticArgs {
    const float* x;  // (batch, size), as denoised
    float* denoised;
    std::int64_t batch, size;
    double sigma;
    const float* mean;  // (rows, size), null for 0
    int rows, class_count;
    const std::int32_t* classes;  // (batch), null where class_count is 0
};

// The row of sample b; -1 where its class is none of the plan's.
AMED_BOTH inline int mean_row(const AnalyticArgs& args, std::int64_t b) {
    if (args.classes == nullptr) return 0;
    const std::int32_t chosen = args.classes[b];
    if (chosen < -1 || chosen >= args.class_count) return -1;
    return chosen + 1 < args.rows ? chosen + 1 : args.rows - 1;
}

class Device {
  public:
    virtual ~Device() = default;

    virtual std::shared_ptr<void> allocate(std::size_t bytes) = 0;
    // From host memory, waiting for it; `to` is memory of `allocate`.
    virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
    virtual void copy(float* to, const float* from, std::int64_t count) = 0;
    virtual void combine(const CombineArgs& args) = 0;
    virtual void midpoint(const MidpointArgs& args) = 0;
    virtual void mix(const MixArgs& args) = 0;
    // levels[b] = scale_time * m of sample b.
    virtual void midpoint_levels(const MixArgs& args, float* levels) = 0;
    // Samples whose class is none of the plan's become NaN, where `check_classes` could not look at it.
    virtual void analytic(const AnalyticArgs& args) = 0;
    // Throws Error(AMED_ERROR_ARGUMENT) for a class beyond -1 .. count - 1, where memory can be read without waiting.
    virtual void check_classes(const std::int32_t* classes, std::int64_t batch, int count) = 0;
    // Dynamic thresholding in place: clamp(x, -s, s) / s with s the 0.995 quantile of |x|, at least 1.
    virtual void threshold(float* x, std::int64_t batch, std::int64_t size) = 0;
    virtual bool can_threshold() const = 0;
};

std::unique_ptr<Device> make_cpu_device(int threads);
// Throws Error(AMED_ERROR_UNSUPPORTED) in a build without CUDA.
std::unique_ptr<Device> make_cuda_device(void* stream);

}  // namespace amed
