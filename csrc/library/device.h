// Where a sampler's memory is and its arithmetic happens. Addresses are the device's; nothing here waits for it but
// `allocate` and `upload`.
#pragma once

#include <cstddef>
#include <memory>

#include "amed/combine.h"
#include "amed/midpoint.h"

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
    // denoised = x - s / sqrt(1 + s^2) * x
    virtual void analytic(const float* x, double sigma, float* denoised, std::int64_t count) = 0;
    // Dynamic thresholding in place: clamp(x, -s, s) / s with s the 0.995 quantile of |x|, at least 1.
    virtual void threshold(float* x, std::int64_t batch, std::int64_t size) = 0;
    virtual bool can_threshold() const = 0;
};

std::unique_ptr<Device> make_cpu_device(int threads);
// Throws Error(AMED_ERROR_UNSUPPORTED) in a build without CUDA.
std::unique_ptr<Device> make_cuda_device(void* stream);

}  // namespace amed
