// A sampler's memory and arithmetic on a CUDA device: part of libamed only, never compiled at run time.
#include <cuda_runtime.h>

#include <cmath>
#include <string>

#include "amed/cuda.h"
#include "basis.h"
#include "error.h"

namespace amed {
namespace {

constexpr unsigned int kMixThreads = 128;

__global__ void mix_kernel(const MixArgs args) {
    const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (b >= args.batch) return;
    double basis[kBasisSize];
    evaluate_basis(args, b, basis);
    for (int k = 0; k < args.count; ++k) args.coeffs[k * args.batch + b] = weigh(args.weights + k * kBasisSize, basis);
}

__global__ void levels_kernel(const MixArgs args, float* levels) {
    const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (b < args.batch) levels[b] = told_level(args, b);
}

// scale = 1 - c. A class that is none of the plan's cannot be refused from here: its sample shows it.
__global__ void analytic_kernel(const AnalyticArgs args, float scale, float c) {
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x, count = args.batch * args.size;
    for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count; i += step) {
        float denoised = scale * args.x[i];
        if (args.mean != nullptr) {
            const int row = mean_row(args, i / args.size);
            denoised += c * (row < 0 ? NAN : args.mean[row * args.size + i % args.size]);
        }
        args.denoised[i] = denoised;
    }
}

void check(int code, const char* what) {
    if (code != cudaSuccess)
        fail(AMED_ERROR_DEVICE, std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(code)));
}

class CudaDevice final : public Device {
  public:
    explicit CudaDevice(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

    std::shared_ptr<void> allocate(std::size_t bytes) override {
        void* memory = nullptr;
        if (cudaMalloc(&memory, bytes < 1 ? 1 : bytes) == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            fail(AMED_ERROR_MEMORY, "out of device memory: " + std::to_string(bytes) + " bytes");
        }
        check(cudaGetLastError(), "allocating");
        return {memory, [](void* p) { cudaFree(p); }};
    }

    void upload(void* to, const void* from, std::size_t bytes) override {
        // On the stream that will read it: a plain cudaMemcpy may return before the device has the bytes, and a stream
        // made with cudaStreamNonBlocking would not wait for it.
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying constants");
        check(cudaStreamSynchronize(stream_), "copying constants");
    }

    void copy(float* to, const float* from, std::int64_t count) override {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copying");
    }

    void combine(const CombineArgs& args) override { check(amed_cuda_combine(&args, stream_), "launching combine"); }

    void midpoint(const MidpointArgs& args) override {
        check(amed_cuda_midpoint(&args, stream_), "launching the predictor");
    }

    void mix(const MixArgs& args) override {
        mix_kernel<<<blocks(args.batch), kMixThreads, 0, stream_>>>(args);
        check(cudaGetLastError(), "launching the coefficients");
    }

    void midpoint_levels(const MixArgs& args, float* levels) override {
        levels_kernel<<<blocks(args.batch), kMixThreads, 0, stream_>>>(args, levels);
        check(cudaGetLastError(), "launching the noise levels");
    }

    void analytic(const AnalyticArgs& args) override {
        const double c = args.sigma / sqrt(1 + args.sigma * args.sigma);
        const auto scale = static_cast<float>(1 - c), slope = static_cast<float>(c);
        analytic_kernel<<<1024, 2 * kMixThreads, 0, stream_>>>(args, scale, slope);
        check(cudaGetLastError(), "launching the analytic first step");
    }

    void check_classes(const std::int32_t*, std::int64_t, int) override {}

    void threshold(float*, std::int64_t, std::int64_t) override {
        fail(AMED_ERROR_UNSUPPORTED, "dynamic thresholding is not on this device");
    }

    bool can_threshold() const override { return false; }

  private:
    cudaStream_t stream_;

    static unsigned int blocks(std::int64_t batch) {
        return static_cast<unsigned int>((batch + kMixThreads - 1) / kMixThreads);
    }
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(void* stream) { return std::make_unique<CudaDevice>(stream); }

}  // namespace amed
