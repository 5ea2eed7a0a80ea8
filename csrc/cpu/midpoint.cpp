#include <algorithm>
#include <cmath>
#include <vector>

#include "amed/cpu.h"
#include "parallel.h"
#include "vector.h"

namespace amed::cpu {
namespace {

template <typename T>
const T* as(const void* p) {
    return static_cast<const T*>(p);
}

template <typename T>
T sigmoid(T x) {
    return 1 / (1 + std::exp(-x));
}

template <typename T>
T silu(T x) {
    return x * sigmoid(x);
}

// out[o] = weight[o] . in + bias[o]
template <typename T>
void linear(const void* weight, const void* bias, const T* in, int inputs, T* out, int outputs) {
    for (int o = 0; o < outputs; ++o) {
        out[o] =
            static_cast<T>(dot(as<T>(weight) + static_cast<std::int64_t>(o) * inputs, in, inputs)) + as<T>(bias)[o];
    }
}

template <typename T>
void embed(const MidpointArgs& args, T sigma, T* out) {
    const int half = args.noise_channels / 2;
    std::vector<T> angles(static_cast<std::size_t>(args.noise_channels));
    for (int k = 0; k < half; ++k) {
        const T angle = sigma * static_cast<T>(args.frequencies[k]);
        angles[static_cast<std::size_t>(k)] = std::sin(angle);
        angles[static_cast<std::size_t>(k + half)] = std::cos(angle);
    }
    linear(args.map_weight, args.map_bias, angles.data(), args.noise_channels, out, args.noise_channels);
    for (int k = 0; k < args.noise_channels; ++k) out[k] = silu(out[k]);
}

template <typename T>
void average_channels(const MidpointArgs& args, std::int64_t sample, T* mean) {
    T row[kBlock];
    for (std::int64_t first = 0; first < args.pixels; first += kBlock) {
        const std::int64_t n = args.pixels - first < kBlock ? args.pixels - first : kBlock;
        T* part = mean + first;
        std::fill(part, part + n, T(0));
        for (int c = 0; c < args.channels; ++c) {
            load(args.features, sample * args.features.batch_stride + c * args.channel_stride + first, row, n);
            add(row, part, n);
        }
        for (std::int64_t i = 0; i < n; ++i) part[i] /= static_cast<T>(args.channels);
    }
}

template <typename T>
void encode(const MidpointArgs& args, std::int64_t sample, T* out) {
    std::vector<T> hidden(static_cast<std::size_t>(args.hidden));
    if (args.channels == 0) {
        std::copy_n(as<T>(args.enc0_bias), args.hidden, hidden.begin());
    } else {
        std::vector<T> mean(static_cast<std::size_t>(args.pixels));
        average_channels(args, sample, mean.data());
        linear(args.enc0_weight, args.enc0_bias, mean.data(), args.pixels, hidden.data(), args.hidden);
    }
    for (T& value : hidden) value = silu(value);
    linear(args.enc1_weight, args.enc1_bias, hidden.data(), args.hidden, out, args.encoded);
}

template <typename T>
T head(const MidpointArgs& args, int which, const std::vector<T>& z) {
    T value;
    linear(args.head_weight[which], args.head_bias[which], z.data(), static_cast<int>(z.size()), &value, 1);
    return sigmoid(value);
}

template <typename T>
T scale(const MidpointArgs& args, int which, const std::vector<T>& z) {
    if (args.head_weight[which] == nullptr) return T(1);
    const T width = static_cast<T>(args.width[which]);
    return 2 * width * head(args, which, z) + (1 - width);
}

template <typename T>
void midpoint_of_sample(const MidpointArgs& args, std::int64_t sample) {
    const T sigma = as<T>(args.sigma)[sample * args.sigma_stride];
    const T sigma_next = as<T>(args.sigma_next)[sample * args.sigma_next_stride];
    std::vector<T> z(static_cast<std::size_t>(args.encoded + 2 * args.noise_channels));
    encode(args, sample, z.data());
    embed(args, sigma, z.data() + args.encoded);
    embed(args, sigma_next, z.data() + args.encoded + args.noise_channels);

    const T r = head(args, 0, z), direction = scale(args, 1, z), time = scale(args, 2, z);
    const T mid = std::pow(sigma_next, r) * std::pow(sigma, 1 - r);
    const T ratio = mid / sigma, slope = direction * (sigma_next - sigma) / mid;
    const T values[] = {r, direction, time, mid, time * mid, ratio, 1 - ratio, T(1), slope, -slope};
    T* result = static_cast<T*>(args.result) + sample;
    for (const T value : values) {
        *result = value;
        result += args.batch;
    }
}

}  // namespace

void midpoint(const MidpointArgs& args, int threads) {
    const std::int64_t work = args.batch * args.pixels * (args.channels + args.hidden);
    parallel_for(args.batch, work, threads, [&](std::int64_t sample) {
        args.wide ? midpoint_of_sample<double>(args, sample) : midpoint_of_sample<float>(args, sample);
    });
}

}  // namespace amed::cpu
