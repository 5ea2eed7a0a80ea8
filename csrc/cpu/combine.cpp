#include <algorithm>
#include <type_traits>

#include "amed/cpu.h"
#include "parallel.h"
#include "vector.h"

namespace amed::cpu {
namespace {

template <typename T>
constexpr DType native_type = std::is_same_v<T, double> ? DType::f64 : DType::f32;

// Rows of one block, all sources as T: in place where the type already is T, converted into `buffer` elsewhere.
template <typename T>
void gather_rows(const View* views, int count, std::int64_t sample, std::int64_t first, std::int64_t n,
                 T (*buffer)[kBlock], const T** rows) {
    for (int j = 0; j < count; ++j) {
        const std::int64_t offset = sample * views[j].batch_stride + first;
        if (views[j].dtype == native_type<T>) {
            rows[j] = static_cast<const T*>(views[j].data) + offset;
            continue;
        }
        load(views[j], offset, buffer[j], n);
        rows[j] = buffer[j];
    }
}

template <typename T>
void combine_block(const CombineArgs& args, std::int64_t sample, std::int64_t first, std::int64_t n) {
    T converted[kMaxSources][kBlock];
    T results[kMaxOutputs][kBlock];
    const T* rows[kMaxSources];
    gather_rows<T>(args.source, args.sources, sample, first, n, converted, rows);
    const std::int64_t* stride = args.coeff_stride;
    for (int m = 0; m < args.outputs; ++m) {
        const T* coeff = static_cast<const T*>(args.coeffs) + m * stride[0] + sample * stride[2];
        T c[kMaxSources];
        for (int j = 0; j < args.sources; ++j) c[j] = coeff[j * stride[1]];
        weighted_sum(rows, c, args.sources, results[m], n);
    }
    // Stored last, since an output may be a source.
    for (int m = 0; m < args.outputs; ++m) {
        const View& output = args.output[m];
        store(results[m], output, sample * output.batch_stride + first, n);
    }
}

template <typename T>
void combine_all(const CombineArgs& args, int threads) {
    const std::int64_t blocks = (args.size + kBlock - 1) / kBlock;
    const std::int64_t touched = args.batch * args.size * (args.sources + args.outputs);
    parallel_for(args.batch * blocks, touched, threads, [&](std::int64_t item) {
        const std::int64_t first = item % blocks * kBlock;
        combine_block<T>(args, item / blocks, first, std::min(kBlock, args.size - first));
    });
}

template <typename T>
void dots_of_sample(const DotArgs& args, std::int64_t sample) {
    const CombineArgs& a = args.operands;
    T left_buffer[kMaxOutputs][kBlock], right_buffer[kMaxSources][kBlock];
    const T *left[kMaxOutputs], *right[kMaxSources];
    double totals[kMaxOutputs][kMaxSources] = {};
    for (std::int64_t first = 0; first < a.size; first += kBlock) {
        const std::int64_t n = std::min(kBlock, a.size - first);
        gather_rows<T>(a.output, a.outputs, sample, first, n, left_buffer, left);
        gather_rows<T>(a.source, a.sources, sample, first, n, right_buffer, right);
        for (int m = 0; m < a.outputs; ++m)
            for (int j = 0; j < a.sources; ++j) totals[m][j] += dot(left[m], right[j], n);
    }
    T* result = static_cast<T*>(args.result);
    for (int m = 0; m < a.outputs; ++m)
        for (int j = 0; j < a.sources; ++j)
            result[(m * a.sources + j) * a.batch + sample] = static_cast<T>(totals[m][j]);
}

}  // namespace

void combine(const CombineArgs& args, int threads) {
    args.wide ? combine_all<double>(args, threads) : combine_all<float>(args, threads);
}

void combine_coeff_grad(const DotArgs& args, int threads) {
    const CombineArgs& a = args.operands;
    const std::int64_t touched = a.batch * a.size * (a.sources + a.outputs);
    parallel_for(a.batch, touched, threads, [&](std::int64_t sample) {
        a.wide ? dots_of_sample<double>(args, sample) : dots_of_sample<float>(args, sample);
    });
}

}  // namespace amed::cpu
