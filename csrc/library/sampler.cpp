#include "sampler.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "error.h"

namespace amed {
namespace {

// Bytes of everything of one sampler, so that no product below overflows.
constexpr std::int64_t kMaxValues = std::int64_t{1} << 45;

std::int64_t checked(std::int64_t a, std::int64_t b) {
    if (a > kMaxValues / std::max<std::int64_t>(b, 1))
        fail(AMED_ERROR_ARGUMENT, "batch times size is too large: more than 2^45 values in all");
    return a * b;
}

}  // namespace

Sampler::Sampler(std::shared_ptr<const Plan> plan, std::int64_t batch, std::int64_t size,
                 std::unique_ptr<Device> device)
    : plan_(std::move(plan)), batch_(batch), size_(size), device_(std::move(device)) {
    if (batch < 1 || size < 1) fail(AMED_ERROR_ARGUMENT, "batch and size must be positive");
    if (plan_->size != 0 && plan_->size != size)
        fail(AMED_ERROR_ARGUMENT,
             "this plan is for samples of " + std::to_string(plan_->size) + " values, got " + std::to_string(size));
    for (const Evaluation& e : plan_->evaluations)
        if (e.threshold && !device_->can_threshold())
            fail(AMED_ERROR_UNSUPPORTED, "dynamic thresholding is not on this device; export with thresholding=False");
    slots_ = reserve<float>(static_cast<std::size_t>(checked(plan_->slots, checked(batch, size))));
    keep_constants();
    if (plan_->has_predictor) keep_predictor();
    keep_mean();
}

template <typename T>
T* Sampler::reserve(std::size_t count) {
    memory_.push_back(device_->allocate(count * sizeof(T)));
    return static_cast<T*>(memory_.back().get());
}

template <typename T>
const T* Sampler::keep(const std::vector<T>& values) {
    T* memory = reserve<T>(values.size());
    device_->upload(memory, values.data(), values.size() * sizeof(T));
    return memory;
}

void Sampler::keep_constants() {
    for (const Evaluation& e : plan_->evaluations) {
        Constants c;
        std::vector<float> told;
        for (const double level : e.sigma_net)
            told.insert(told.end(), static_cast<std::size_t>(batch_), static_cast<float>(level));
        if (!told.empty() && !e.analytic) c.sigma = keep(told);
        if (e.learned)
            c.weights = keep(e.weights);
        else
            c.coeffs = keep(std::vector<float>(e.weights.begin(), e.weights.end()));
        if (!e.predict.empty())
            for (std::size_t k = 0; k < 2; ++k)
                c.interval[k] = keep(std::vector<float>{static_cast<float>(e.predict[k])});
        constants_.push_back(c);
    }
}

void Sampler::keep_predictor() {
    const PredictorWeights& p = plan_->predictor;
    predictor_.batch = batch_;
    predictor_.pixels = p.pixels;
    predictor_.noise_channels = p.noise_channels;
    predictor_.hidden = p.hidden;
    predictor_.encoded = p.encoded;
    predictor_.frequencies = p.frequencies.data();
    const void** layers[] = {&predictor_.map_weight, &predictor_.map_bias,    &predictor_.enc0_weight,
                             &predictor_.enc0_bias,  &predictor_.enc1_weight, &predictor_.enc1_bias};
    for (std::size_t k = 0; k < 6; ++k) *layers[k] = keep(p.parameters[k]);
    for (std::size_t k = 0; k < 3; ++k) {
        if (p.parameters[6 + 2 * k].empty()) continue;
        predictor_.head_weight[k] = keep(p.parameters[6 + 2 * k]);
        predictor_.head_bias[k] = keep(p.parameters[7 + 2 * k]);
    }
    predictor_.width[1] = p.scale_dir;
    predictor_.width[2] = p.scale_time;
    float* table = reserve<float>(static_cast<std::size_t>(checked(10, batch_)));
    predictor_.result = table;
    mix_.table = table;
    mix_.batch = batch_;
    mix_.coeffs = reserve<float>(static_cast<std::size_t>(checked(kMaxOutputs * kMaxSources, batch_)));
    levels_ = reserve<float>(static_cast<std::size_t>(batch_));
}

void Sampler::keep_mean() {
    const Mean& mean = plan_->mean;
    analytic_.batch = batch_;
    analytic_.size = size_;
    analytic_.rows = mean.rows;
    analytic_.class_count = mean.classes;
    if (mean.rows > 0) analytic_.mean = keep(mean.values);
}

void Sampler::start(const float* x, const std::int32_t* classes) {
    if (analytic_.class_count > 0 && classes == nullptr)
        fail(AMED_ERROR_ARGUMENT, "this plan begins with the mean of a class; call amed_sampler_start_classes");
    if (analytic_.class_count == 0 && classes != nullptr)
        fail(AMED_ERROR_ARGUMENT, "this plan begins the same for every class; call amed_sampler_start");
    if (classes != nullptr) device_->check_classes(classes, batch_, analytic_.class_count);
    analytic_.classes = classes;
    device_->copy(slot(0), x, sample_count());
    at_ = 0;
    asked_ = 0;
    started_ = true;
    skip_analytic();
}

Next Sampler::next() const {
    if (!started_) fail(AMED_ERROR_STATE, "start the sampler first");
    if (at_ == plan_->evaluations.size()) return {slot(plan_->result), nullptr, batch_, asked_, true};
    const float* sigma = current().sigma.empty() ? levels_ : constants_[at_].sigma;
    return {slot(current().y), sigma, current().points() * batch_, asked_, false};
}

void Sampler::put(const float* denoised, const float* features, std::int64_t channels) {
    if (!started_) fail(AMED_ERROR_STATE, "start the sampler first");
    if (at_ == plan_->evaluations.size()) fail(AMED_ERROR_STATE, "the trajectory is at its end; start again");
    if (channels < 0 || channels > std::numeric_limits<int>::max() || (channels > 0) != (features != nullptr))
        fail(AMED_ERROR_ARGUMENT, "features need their number of channels, no features 0");
    apply(denoised, features, channels);
    ++asked_;
    skip_analytic();
}

void Sampler::skip_analytic() {
    while (at_ < plan_->evaluations.size() && current().analytic) {
        analytic_.x = slot(current().y);
        analytic_.denoised = slot(current().staged);
        analytic_.sigma = current().sigma[0];
        device_->analytic(analytic_);
        apply(nullptr, nullptr, 0);
    }
}

void Sampler::apply(const float* denoised, const float* features, std::int64_t channels) {
    const Evaluation& e = current();
    if (e.staged >= 0 && denoised != nullptr) device_->copy(slot(e.staged), denoised, e.points() * sample_count());
    if (e.threshold) device_->threshold(slot(e.staged), e.points() * batch_, size_);
    if (!e.predict.empty()) predict(e, features, channels);
    combine(e, denoised);
    ++at_;
}

void Sampler::predict(const Evaluation& e, const float* features, std::int64_t channels) {
    MidpointArgs args = predictor_;
    args.channels = static_cast<int>(channels);
    args.features = {const_cast<float*>(features), channels * args.pixels, DType::f32};
    args.channel_stride = args.pixels;
    args.sigma = constants_[at_].interval[0];
    args.sigma_next = constants_[at_].interval[1];
    device_->midpoint(args);
    mix_.sigma = e.predict[0];
    mix_.sigma_next = e.predict[1];
    device_->midpoint_levels(mix_, levels_);
}

void Sampler::combine(const Evaluation& e, const float* denoised) {
    CombineArgs args = {};
    args.sources = static_cast<int>(e.source.size());
    args.outputs = e.rows;
    args.batch = batch_;
    args.size = size_;
    for (std::size_t j = 0; j < e.source.size(); ++j) {
        const int from = e.source[j];
        // Sources are only read.
        float* data = from >= 0 ? slot(from) : const_cast<float*>(denoised) + (-1 - from) * sample_count();
        args.source[j] = {data, size_, DType::f32};
    }
    for (std::size_t m = 0; m < e.output.size(); ++m) args.output[m] = {slot(e.output[m]), size_, DType::f32};
    set_coefficients(e, args);
    device_->combine(args);
}

void Sampler::set_coefficients(const Evaluation& e, CombineArgs& args) {
    const std::int64_t wide = e.learned ? batch_ : 1;
    args.coeff_stride[0] = args.sources * wide;
    args.coeff_stride[1] = wide;
    args.coeff_stride[2] = e.learned ? 1 : 0;
    args.coeffs = constants_[at_].coeffs;
    if (!e.learned) return;
    mix_.weights = constants_[at_].weights;
    mix_.count = args.outputs * args.sources;
    device_->mix(mix_);
    args.coeffs = mix_.coeffs;
}

}  // namespace amed
