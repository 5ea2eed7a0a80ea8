#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "amed/cpu.h"
#include "basis.h"
#include "device.h"
#include "error.h"

// The analytic first step rounds after every operation, as the Python engine does: no fused multiply-add here.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace amed {
namespace {

class CpuDevice final : public Device {
  public:
    explicit CpuDevice(int threads) : threads_(threads) {}

    std::shared_ptr<void> allocate(std::size_t bytes) override {
        void* memory = std::malloc(std::max<std::size_t>(bytes, 1));
        if (memory == nullptr) throw std::bad_alloc();
        return {memory, std::free};
    }

    void upload(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

    void copy(float* to, const float* from, std::int64_t count) override {
        if (to != from) std::memmove(to, from, static_cast<std::size_t>(count) * sizeof(float));
    }

    void combine(const CombineArgs& args) override { cpu::combine(args, threads_); }
    void midpoint(const MidpointArgs& args) override { cpu::midpoint(args, threads_); }

    void mix(const MixArgs& args) override {
        for (std::int64_t b = 0; b < args.batch; ++b) {
            double basis[kBasisSize];
            evaluate_basis(args, b, basis);
            for (int k = 0; k < args.count; ++k)
                args.coeffs[k * args.batch + b] = weigh(args.weights + k * kBasisSize, basis);
        }
    }

    void midpoint_levels(const MixArgs& args, float* levels) override {
        for (std::int64_t b = 0; b < args.batch; ++b) levels[b] = told_level(args, b);
    }

    void analytic(const AnalyticArgs& args) override {
        const float s = static_cast<float>(args.sigma);
        const float c = s * (1 / std::sqrt(1 + s * s));
        for (std::int64_t b = 0; b < args.batch; ++b) {
            const float *x = args.x + b * args.size, *mean = args.mean;
            float* denoised = args.denoised + b * args.size;
            if (mean != nullptr) mean += mean_row(args, b) * args.size;
            for (std::int64_t i = 0; i < args.size; ++i)
                denoised[i] = x[i] - c * (mean == nullptr ? x[i] : x[i] - mean[i]);
        }
    }

    void check_classes(const std::int32_t* classes, std::int64_t batch, int count) override {
        for (std::int64_t b = 0; b < batch; ++b)
            if (classes[b] < -1 || classes[b] >= count)
                fail(AMED_ERROR_ARGUMENT, "class " + std::to_string(classes[b]) + " of sample " + std::to_string(b) +
                                              " must be -1 for none or 0 to " + std::to_string(count - 1));
    }

    void threshold(float* x, std::int64_t batch, std::int64_t size) override {
        magnitudes_.resize(static_cast<std::size_t>(size));
        for (std::int64_t b = 0; b < batch && size > 0; ++b) threshold_sample(x + b * size, size);
    }

    bool can_threshold() const override { return true; }

  private:
    int threads_;
    std::vector<float> magnitudes_;

    void threshold_sample(float* x, std::int64_t size) {
        for (std::int64_t i = 0; i < size; ++i) magnitudes_[static_cast<std::size_t>(i)] = std::abs(x[i]);
        const double rank = 0.995 * static_cast<double>(size - 1);
        const auto low = magnitudes_.begin() + static_cast<std::int64_t>(rank);
        // A NaN has no place in an order; it stays where it is and shows in the sample.
        const auto less = [](float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); };
        std::nth_element(magnitudes_.begin(), low, magnitudes_.end(), less);
        const float below = *low;
        const float above = low + 1 == magnitudes_.end() ? below : *std::min_element(low + 1, magnitudes_.end(), less);
        const float weight = static_cast<float>(rank - std::floor(rank));
        const float level = weight < 0.5F ? below + weight * (above - below) : above - (above - below) * (1 - weight);
        const float limit = std::max(level, 1.0F);
        for (std::int64_t i = 0; i < size; ++i) x[i] = std::min(std::max(x[i], -limit), limit) / limit;
    }
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(int threads) { return std::make_unique<CpuDevice>(threads); }

#if !defined(AMED_WITH_CUDA)
std::unique_ptr<Device> make_cuda_device(void*) {
    fail(AMED_ERROR_UNSUPPORTED, "this libamed was built without CUDA; reinstall with nvcc and AMED_CUDA=1");
}
#endif

}  // namespace amed
