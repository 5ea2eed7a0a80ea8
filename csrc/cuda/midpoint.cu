#include "amed/midpoint.h"
#include "vector.cuh"

namespace amed::gpu {

constexpr int kMidpointThreads = 256;
constexpr int kWarps = kMidpointThreads / 32;

// sin(angle + quadrant * pi / 2) by Taylor series on [-pi/4, pi/4]: the library's sine keeps a path for huge angles,
// in double precision and on the stack.
__device__ inline float sine(float angle, int quadrant) {
    const float turns = floorf(fmaf(angle, 0.636619772f, 0.5f));
    // pi/2 = 1.57079637... - 4.3711390e-8: the first part is a float, so the first step is exact.
    const float x = fmaf(turns, 4.371139e-8f, fmaf(turns, -1.5707963705062866f, angle));
    const float square = x * x;
    const float sine =
        fmaf(x * square, -1.0f / 6 + square * (1.0f / 120 + square * (-1.0f / 5040 + square * (1.0f / 362880))), x);
    const float cosine = fmaf(
        square, -0.5f + square * (1.0f / 24 + square * (-1.0f / 720 + square * (1.0f / 40320 - square / 3628800.0f))),
        1.0f);
    quadrant += static_cast<int>(turns);
    const float value = quadrant % 2 == 0 ? sine : cosine;
    return (quadrant & 2) == 0 ? value : -value;
}

__device__ inline double sine(double angle, int quadrant) { return quadrant == 0 ? sin(angle) : cos(angle); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

template <typename T>
__device__ inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}

template <typename T>
__device__ inline const T* as(const void* p) {
    return static_cast<const T*>(p);
}

// out[o] = f(weight[o] . in + bias[o]): one warp for each o.
template <bool Silu, typename T>
__device__ inline void linear(const void* weight, const void* bias, const T* in, int inputs, T* out, int outputs) {
    const int lane = threadIdx.x % 32;
    for (int o = threadIdx.x / 32; o < outputs; o += kWarps) {
        T total = 0;
        for (int k = lane; k < inputs; k += 32) total = fused(as<T>(weight)[o * inputs + k], in[k], total);
        total = warp_sum(total) + as<T>(bias)[o];
        if (lane == 0) out[o] = Silu ? total * sigmoid(total) : total;
    }
    __syncthreads();
}

// Mean over channels into mean[0 .. pixels): groups of kVec pixels side by side, channels split over slices.
template <typename T>
__device__ inline void average(const MidpointArgs& args, std::int64_t sample, T* mean) {
    const int groups = (args.pixels + kVec - 1) / kVec;
    const int columns = groups < kMidpointThreads ? groups : kMidpointThreads;
    const int slices = kMidpointThreads / columns, slice = threadIdx.x / columns;
    const View& view = args.features;
    for (int group = threadIdx.x % columns; group < groups && slice < slices; group += columns) {
        const int first = group * kVec, count = args.pixels - first < kVec ? args.pixels - first : kVec;
        T total[kVec] = {}, row[kVec];
        for (int c = slice; c < args.channels; c += slices) {
            load(view, sample * view.batch_stride + c * args.channel_stride + first, count, row);
#pragma unroll
            for (int k = 0; k < kVec; ++k) total[k] += row[k];
        }
#pragma unroll
        for (int k = 0; k < kVec; ++k)
            if (k < count) mean[slice * args.pixels + first + k] = total[k];
    }
    __syncthreads();
    for (int p = threadIdx.x; p < args.pixels; p += kMidpointThreads) {
        T total = mean[p];
        for (int s = 1; s < slices; ++s) total += mean[s * args.pixels + p];
        mean[p] = total / static_cast<T>(args.channels);
    }
    __syncthreads();
}

template <typename T>
__device__ inline void write_step(const MidpointArgs& args, std::int64_t sample, T sigma, T sigma_next,
                                  const T* heads) {
    const T r = sigmoid(heads[0]);
    T scales[2];
    for (int k = 0; k < 2; ++k) {
        const T width = static_cast<T>(args.width[k + 1]);
        scales[k] = args.head_weight[k + 1] == nullptr ? T(1) : 2 * width * sigmoid(heads[k + 1]) + (1 - width);
    }
    const T ratio = exponential(r * logarithm(sigma_next / sigma)), mid = sigma * ratio;
    const T slope = scales[0] * (sigma_next - sigma) / mid;
    const T values[] = {r, scales[0], scales[1], mid, scales[1] * mid, ratio, 1 - ratio, T(1), slope, -slope};
#pragma unroll
    for (int k = 0; k < 10; ++k) static_cast<T*>(args.result)[k * args.batch + sample] = values[k];
}

// One block: one sample, from its bottleneck to the ten rows of the result.
template <typename T>
__device__ inline void midpoint_body(const MidpointArgs& args, const double* frequencies) {
    extern __shared__ double shared[];
    const std::int64_t sample = blockIdx.x;
    const int noise = args.noise_channels, inputs = args.encoded + 2 * noise;
    T* z = reinterpret_cast<T*>(shared);  // encoded, emb(sigma), emb(sigma_next)
    T* waves = z + inputs;                // 2 x noise
    T* heads = waves + 2 * noise;         // 3
    T* hidden = heads + 3;
    T* mean = hidden + args.hidden;
    const T sigma = as<T>(args.sigma)[sample * args.sigma_stride];
    const T sigma_next = as<T>(args.sigma_next)[sample * args.sigma_next_stride];

    for (int k = threadIdx.x; k < 2 * noise; k += kMidpointThreads) {
        const T level = k < noise ? sigma : sigma_next;
        const int half = noise / 2, channel = k % noise;
        waves[k] = sine(level * static_cast<T>(frequencies[channel % half]), channel / half);
    }
    if (args.channels > 0) average(args, sample, mean);
    linear<true>(args.enc0_weight, args.enc0_bias, mean, args.channels > 0 ? args.pixels : 0, hidden, args.hidden);
    linear<false>(args.enc1_weight, args.enc1_bias, hidden, args.hidden, z, args.encoded);
    linear<true>(args.map_weight, args.map_bias, waves, noise, z + args.encoded, noise);
    linear<true>(args.map_weight, args.map_bias, waves + noise, noise, z + args.encoded + noise, noise);
    for (int k = 0; k < 3; ++k)
        if (args.head_weight[k] != nullptr)
            linear<false>(args.head_weight[k], args.head_bias[k], z, inputs, heads + k, 1);
    if (threadIdx.x == 0) write_step(args, sample, sigma, sigma_next, heads);
}

// Frequencies travel by value: they are host numbers.
struct Frequencies {
    double values[32];
};

}  // namespace amed::gpu

#define AMED_MIDPOINT(TYPE)                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                   \
        amed_midpoint_##TYPE(const amed::MidpointArgs args, const amed::gpu::Frequencies frequencies) { \
        amed::gpu::midpoint_body<TYPE>(args, frequencies.values);                                       \
    }

AMED_MIDPOINT(float)
AMED_MIDPOINT(double)

#ifndef __CUDACC_RTC__

#include "amed/cuda.h"

int amed_cuda_midpoint(const amed::MidpointArgs* args, void* stream) {
    if (args->batch == 0) return cudaSuccess;
    if (args->batch > 0x7fffffff || args->noise_channels > 64 || args->pixels < 1) return cudaErrorInvalidConfiguration;
    amed::gpu::Frequencies frequencies = {};
    for (int k = 0; k < args->noise_channels / 2; ++k) frequencies.values[k] = args->frequencies[k];
    const int groups = (args->pixels + amed::gpu::kVec - 1) / amed::gpu::kVec;
    const int slices = groups < amed::gpu::kMidpointThreads ? amed::gpu::kMidpointThreads / groups : 1;
    const int values = args->encoded + 4 * args->noise_channels + 3 + args->hidden + slices * args->pixels;
    const std::size_t bytes = static_cast<std::size_t>(values) * (args->wide ? sizeof(double) : sizeof(float));
    const auto kernel = args->wide ? amed_midpoint_double : amed_midpoint_float;
    kernel<<<static_cast<unsigned int>(args->batch), amed::gpu::kMidpointThreads, bytes,
             static_cast<cudaStream_t>(stream)>>>(*args, frequencies);
    return cudaGetLastError();
}

#endif  // __CUDACC_RTC__
