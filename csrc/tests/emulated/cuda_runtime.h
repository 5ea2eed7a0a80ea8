// The part of CUDA that csrc uses, on the CPU: a thread is a fiber, blocks run one after another. For tests; nvcc.py
// beside this file compiles against it. Stricter than a GPU where that is possible: shared memory is NaN before each
// block and of the size asked for, the threads' order is reversed at every second launch, a barrier that not all reach
// is an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../../cpu/half.h"

#define __global__
#define __device__
#define __shared__ thread_local
#define __launch_bounds__(threads)

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int a = 1, unsigned int b = 1, unsigned int c = 1) : x(a), y(b), z(c) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
using cudaStream_t = struct CUstream_st*;

namespace emulated {

constexpr std::size_t kStackBytes = 1 << 17, kSharedBytes = 48 << 10;
constexpr unsigned int kMaxThreads = 1024, kWarp = 32;

struct Barrier {
    unsigned int expected = 0, arrived = 0, generation = 0;
};

struct Fiber {
    void* here[5];
    ucontext_t start;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool busy = false;
    unsigned int shuffles = 0;
};

// The builtins, since swapcontext asks the system at every switch.
[[gnu::noinline, gnu::no_sanitize_address]] inline void jump(void** to) { __builtin_longjmp(to, 1); }
[[gnu::noinline, gnu::no_sanitize_address]] inline void swap(void** from, void** to) {
    if (__builtin_setjmp(from) == 0) jump(to);
}

class Block {
  public:
    Barrier all, warp[kMaxThreads / kWarp];
    std::unique_ptr<char[]> shared;

    static Block& current() {
        static thread_local Block block;
        return block;
    }

    void run(const std::function<void()>& body, unsigned int threads, std::size_t shared_bytes, bool backwards) {
        while (fibers_.size() < threads) create();
        body_ = &body;
        shared.reset(new char[shared_bytes]);
        std::memset(shared.get(), 0xff, shared_bytes);
        all = {threads};
        for (unsigned int t = 0; t < threads; t += kWarp) warp[t / kWarp] = {threads - t < kWarp ? threads - t : kWarp};
        for (unsigned int t = 0; t < threads; ++t) fibers_[t]->busy = true;
        for (unsigned int left = threads; left > 0;) {
            const unsigned int before = left;
            passed_ = false;
            for (unsigned int t = 0; t < threads; ++t) left -= resume(backwards ? threads - 1 - t : t);
            if (left == before && !passed_) {
                std::fprintf(stderr, "emulated CUDA: a barrier that only some threads reach\n");
                std::abort();
            }
        }
    }

    void wait(Barrier& barrier) {
        const unsigned int generation = barrier.generation;
        if (++barrier.arrived == barrier.expected) {
            barrier.arrived = 0;
            ++barrier.generation;
            passed_ = true;
        }
        while (barrier.generation == generation) swap(fibers_[threadIdx.x]->here, scheduler_);
    }

    // Two rows of slots in turns: a lane is at most one shuffle ahead of the slowest.
    template <typename T>
    T shuffle(T value, unsigned int other) {
        const unsigned int row = ++fibers_[threadIdx.x]->shuffles % 2;
        std::memcpy(&lanes_[row][threadIdx.x], &value, sizeof value);
        wait(warp[threadIdx.x / kWarp]);
        std::memcpy(&value, &lanes_[row][threadIdx.x ^ other], sizeof value);
        return value;
    }

  private:
    std::vector<std::unique_ptr<Fiber>> fibers_;
    const std::function<void()>* body_ = nullptr;
    void* scheduler_[5];
    bool passed_ = false;
    double lanes_[2][kMaxThreads];

    // Runs for ever: a body for each block, and back to the scheduler.
    static void work() {
        Block& block = current();
        Fiber& self = *block.fibers_.back();
        for (;;) {
            swap(self.here, block.scheduler_);
            (*block.body_)();
            self.busy = false;
        }
    }

    [[gnu::noinline, gnu::no_sanitize_address]] void create() {
        fibers_.emplace_back(new Fiber);
        Fiber& fiber = *fibers_.back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.start, work, 0);
        if (__builtin_setjmp(scheduler_) == 0) setcontext(&fiber.start);
    }

    unsigned int resume(unsigned int thread) {
        Fiber& fiber = *fibers_[thread];
        if (!fiber.busy) return 0;
        threadIdx = thread;
        swap(scheduler_, fiber.here);
        return fiber.busy ? 0 : 1;
    }
};

inline thread_local cudaError_t last_error = cudaSuccess;

// What kernel<<<grid, block, shared, stream>>>(...) becomes.
struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes;
    cudaStream_t stream;

    template <typename Kernel, typename... Args>
    void operator()(Kernel kernel, const Args&... args) const {
        static thread_local bool backwards = false;
        const bool fits = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 0xffff;
        if (!fits || block.x < 1 || block.x > kMaxThreads || shared_bytes > kSharedBytes) {
            last_error = fits ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
            return;
        }
        backwards = !backwards;
        gridDim = grid;
        blockDim = block;
        const std::function<void()> body = [&] { kernel(args...); };
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
                Block::current().run(body, block.x, shared_bytes, backwards);
    }
};

inline void* shared() { return Block::current().shared.get(); }

// The conversions that the kernels write as PTX, by their names there.
inline void cvt_f32_f16(float& to, unsigned short from) { to = amed::cpu::half_to_float(from); }
inline void cvt_rn_f16_f32(unsigned short& to, float from) { to = amed::cpu::float_to_half(from); }
inline void cvt_rn_bf16_f32(unsigned short& to, float from) { to = amed::cpu::float_to_bfloat(from); }

}  // namespace emulated

inline void __syncthreads() { emulated::Block::current().wait(emulated::Block::current().all); }

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int lane) {
    return emulated::Block::current().shuffle(value, static_cast<unsigned int>(lane));
}

inline float __uint_as_float(unsigned int value) { return amed::cpu::bits<float>(value); }

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulated::last_error;
    emulated::last_error = cudaSuccess;
    return error;
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

template <typename T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
    constexpr std::size_t kLargestDevice = std::size_t{1} << 40;
    *memory = bytes > kLargestDevice ? nullptr : static_cast<T*>(std::malloc(bytes));
    if (*memory != nullptr) std::memset(static_cast<void*>(*memory), 0xff, bytes);
    return emulated::last_error = *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

inline cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (to != from) std::memcpy(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
