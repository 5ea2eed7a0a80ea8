#include "amed/combine.h"
#include "vector.cuh"

namespace amed::gpu {

constexpr int kThreads = 256;

// One thread: kVec elements of one sample, every source read once and every output written once.
template <typename T, int Outputs>
__device__ inline void combine_body(const CombineArgs& args) {
    const std::int64_t per_sample = (args.size + kVec * kThreads - 1) / (kVec * kThreads);
    const std::int64_t sample = blockIdx.x / per_sample;
    const std::int64_t first = (blockIdx.x % per_sample * kThreads + threadIdx.x) * kVec;
    if (first >= args.size) return;
    const int count = args.size - first < kVec ? static_cast<int>(args.size - first) : kVec;
    const std::int64_t* stride = args.coeff_stride;
    const T* coeffs = static_cast<const T*>(args.coeffs) + sample * stride[2];
    T totals[Outputs][kVec] = {};
    for (int j = 0; j < args.sources; ++j) {
        T row[kVec];
        load(args.source[j], sample * args.source[j].batch_stride + first, count, row);
#pragma unroll
        for (int m = 0; m < Outputs; ++m) {
            const T coeff = m < args.outputs ? coeffs[m * stride[0] + j * stride[1]] : T(0);
#pragma unroll
            for (int k = 0; k < kVec; ++k) totals[m][k] = fused(coeff, row[k], totals[m][k]);
        }
    }
    // Stored last, since an output may be a source.
#pragma unroll
    for (int m = 0; m < Outputs; ++m)
        if (m < args.outputs) store(totals[m], args.output[m], sample * args.output[m].batch_stride + first, count);
}

// One block: one sample and one pair (m, j); the order of the sum is fixed.
template <typename T>
__device__ inline void dot_body(const DotArgs& args) {
    const CombineArgs& a = args.operands;
    const std::int64_t sample = blockIdx.x;
    const View& left = a.output[blockIdx.y / a.sources];
    const View& right = a.source[blockIdx.y % a.sources];
    T total = 0;
    for (std::int64_t first = threadIdx.x * kVec; first < a.size; first += kThreads * kVec) {
        const int count = a.size - first < kVec ? static_cast<int>(a.size - first) : kVec;
        T x[kVec], y[kVec];
        load(left, sample * left.batch_stride + first, count, x);
        load(right, sample * right.batch_stride + first, count, y);
#pragma unroll
        for (int k = 0; k < kVec; ++k) total = fused(x[k], y[k], total);
    }
    __shared__ T warps[kThreads / 32];
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int k = 1; k < kThreads / 32; ++k) total += warps[k];
    static_cast<T*>(args.result)[blockIdx.y * a.batch + sample] = total;
}

}  // namespace amed::gpu

// Plain names, which NVRTC does not mangle. Outputs beyond the last instance with exactly M use the next larger one.
#define AMED_COMBINE(TYPE, M)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) amed_combine_##TYPE##_##M(const amed::CombineArgs args) { \
        amed::gpu::combine_body<TYPE, M>(args);                                                                 \
    }
#define AMED_DOT(TYPE)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) amed_dot_##TYPE(const amed::DotArgs args) { \
        amed::gpu::dot_body<TYPE>(args);                                                          \
    }

AMED_COMBINE(float, 1)
AMED_COMBINE(float, 2)
AMED_COMBINE(float, 4)
AMED_COMBINE(float, 8)
AMED_COMBINE(double, 1)
AMED_COMBINE(double, 2)
AMED_COMBINE(double, 4)
AMED_COMBINE(double, 8)
AMED_DOT(float)
AMED_DOT(double)

#ifndef __CUDACC_RTC__

#include "amed/cuda.h"

namespace {

using Kernel = void (*)(amed::CombineArgs);

Kernel combine_kernel(bool wide, int outputs) {
    if (outputs == 1) return wide ? amed_combine_double_1 : amed_combine_float_1;
    if (outputs == 2) return wide ? amed_combine_double_2 : amed_combine_float_2;
    if (outputs <= 4) return wide ? amed_combine_double_4 : amed_combine_float_4;
    return wide ? amed_combine_double_8 : amed_combine_float_8;
}

}  // namespace

int amed_cuda_combine(const amed::CombineArgs* args, void* stream) {
    constexpr std::int64_t kElements = amed::gpu::kThreads * amed::gpu::kVec;
    const std::int64_t blocks = args->batch * ((args->size + kElements - 1) / kElements);
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    const Kernel kernel = combine_kernel(args->wide, args->outputs);
    kernel<<<static_cast<unsigned int>(blocks), amed::gpu::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    return cudaGetLastError();
}

int amed_cuda_combine_coeff_grad(const amed::DotArgs* args, void* stream) {
    const amed::CombineArgs& a = args->operands;
    if (a.batch == 0) return cudaSuccess;
    if (a.batch > 0x7fffffff) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned int>(a.batch), static_cast<unsigned int>(a.outputs * a.sources));
    const auto kernel = a.wide ? amed_dot_double : amed_dot_float;
    kernel<<<grid, amed::gpu::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    return cudaGetLastError();
}

#endif  // __CUDACC_RTC__
