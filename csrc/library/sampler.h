// A plan at work on one batch.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "plan.h"

namespace amed {

struct Next {
    const float* points;
    const float* sigma;
    std::int64_t rows;
    int index;
    bool done;
};

class Sampler {
  public:
    // Allocates everything. Throws Error, or std::bad_alloc.
    Sampler(std::shared_ptr<const Plan> plan, std::int64_t batch, std::int64_t size, std::unique_ptr<Device> device);

    // classes: (batch) where the plan has classes, null where not.
    void start(const float* x, const std::int32_t* classes);
    Next next() const;
    // features: (batch, channels, pixels), or none with channels 0.
    void put(const float* denoised, const float* features, std::int64_t channels);

    std::mutex& lock() { return lock_; }

  private:
    // What an evaluation reads besides the state: on the device, written once.
    struct Constants {
        const float* sigma = nullptr;     // (points * batch), null for a midpoint
        const float* coeffs = nullptr;    // (rows, columns), null where learned
        const double* weights = nullptr;  // (rows * columns, kBasis), null where not
        const float* interval[2] = {};    // sigma and sigma_next of the interval that it predicts
    };

    std::shared_ptr<const Plan> plan_;
    std::int64_t batch_, size_;
    std::unique_ptr<Device> device_;
    std::vector<std::shared_ptr<void>> memory_;
    std::vector<Constants> constants_;
    MidpointArgs predictor_ = {};
    MixArgs mix_ = {};
    AnalyticArgs analytic_ = {};
    float *slots_ = nullptr, *levels_ = nullptr;
    std::size_t at_ = 0;
    int asked_ = 0;
    bool started_ = false;
    std::mutex lock_;

    std::int64_t sample_count() const { return batch_ * size_; }
    float* slot(int index) const { return slots_ + index * sample_count(); }
    const Evaluation& current() const { return plan_->evaluations[at_]; }

    template <typename T>
    T* reserve(std::size_t count);
    template <typename T>
    const T* keep(const std::vector<T>& values);
    void keep_constants();
    void keep_predictor();
    void keep_mean();
    void skip_analytic();
    void apply(const float* denoised, const float* features, std::int64_t channels);
    void predict(const Evaluation& e, const float* features, std::int64_t channels);
    void combine(const Evaluation& e, const float* denoised);
    void set_coefficients(const Evaluation& e, CombineArgs& args);
};

}  // namespace amed
