// Unit tests of the kernels without any framework; built with the address and undefined-behaviour sanitizers, once for
// the CPU and once, with AMED_TEST_CUDA, for the CUDA sources as emulated/ makes them run on host memory. Every buffer
// is allocated at its exact size, so that one element read or written too many is a failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/half.h"
#include "amed/cpu.h"
#include "amed/cuda.h"
#include "check.h"

namespace {

#ifdef AMED_TEST_CUDA
void combine(const amed::CombineArgs& args, int) { CHECK(amed_cuda_combine(&args, nullptr) == 0, "combine"); }
void combine_coeff_grad(const amed::DotArgs& args, int) {
    CHECK(amed_cuda_combine_coeff_grad(&args, nullptr) == 0, "combine_coeff_grad");
}
void midpoint(const amed::MidpointArgs& args, int) { CHECK(amed_cuda_midpoint(&args, nullptr) == 0, "midpoint"); }
#else
using amed::cpu::combine, amed::cpu::combine_coeff_grad, amed::cpu::midpoint;
#endif

std::size_t width(amed::DType dtype) { return dtype == amed::DType::f64 ? 8 : dtype == amed::DType::f32 ? 4 : 2; }

// Samples of one tensor with a gap between them, kept both as stored bytes and as the exact values stored.
struct Samples {
    amed::DType dtype;
    std::int64_t batch, size, stride;
    std::vector<unsigned char> bytes;

    Samples(amed::DType type, std::int64_t count, std::int64_t elements, std::int64_t gap)
        : dtype(type),
          batch(count),
          size(elements),
          stride(elements + gap),
          bytes(static_cast<std::size_t>(count == 0 ? 0 : (count - 1) * stride + size) * width(type), 0xff) {}

    amed::View view() { return {bytes.data(), stride, dtype}; }

    unsigned char* at(std::int64_t b, std::int64_t i) {
        return bytes.data() + static_cast<std::size_t>(b * stride + i) * width(dtype);
    }

    double get(std::int64_t b, std::int64_t i) {
        float f;
        double d;
        std::uint16_t h;
        switch (dtype) {
            case amed::DType::f64: std::memcpy(&d, at(b, i), 8); return d;
            case amed::DType::f32: std::memcpy(&f, at(b, i), 4); return static_cast<double>(f);
            default: std::memcpy(&h, at(b, i), 2);
        }
        return static_cast<double>(dtype == amed::DType::f16 ? amed::cpu::half_to_float(h)
                                                             : amed::cpu::bfloat_to_float(h));
    }

    void set(std::int64_t b, std::int64_t i, double value) {
        const float f = static_cast<float>(value);
        std::uint16_t h;
        switch (dtype) {
            case amed::DType::f64: std::memcpy(at(b, i), &value, 8); return;
            case amed::DType::f32: std::memcpy(at(b, i), &f, 4); return;
            default: h = dtype == amed::DType::f16 ? amed::cpu::float_to_half(f) : amed::cpu::float_to_bfloat(f);
        }
        std::memcpy(at(b, i), &h, 2);
    }
};

double tolerance(amed::DType dtype) {
    switch (dtype) {
        case amed::DType::f64: return 1e-13;
        case amed::DType::f32: return 1e-5;
        case amed::DType::f16: return 4e-3;
        default: return 3e-2;
    }
}

struct Problem {
    amed::CombineArgs args = {};
    std::vector<Samples> sources, outputs;
    std::vector<double> coeffs64;
    std::vector<float> coeffs32;

    double coeff(int m, int j, std::int64_t b) const {
        const auto k =
            static_cast<std::size_t>(m * args.coeff_stride[0] + j * args.coeff_stride[1] + b * args.coeff_stride[2]);
        return args.wide ? coeffs64[k] : static_cast<double>(coeffs32[k]);
    }
};

Problem make(std::mt19937& random, int sources, int outputs, std::int64_t batch, std::int64_t size,
             const std::vector<amed::DType>& dtypes, std::int64_t gap, bool shared) {
    std::normal_distribution<double> normal;
    Problem p;
    p.args.sources = sources;
    p.args.outputs = outputs;
    p.args.batch = batch;
    p.args.size = size;
    p.args.wide = dtypes[0] == amed::DType::f64;
    for (int j = 0; j < sources; ++j) {
        p.sources.emplace_back(dtypes[static_cast<std::size_t>(j) % dtypes.size()], batch, size, gap * j);
        for (std::int64_t b = 0; b < batch; ++b)
            for (std::int64_t i = 0; i < size; ++i) p.sources.back().set(b, i, normal(random));
    }
    for (int m = 0; m < outputs; ++m) p.outputs.emplace_back(dtypes[0], batch, size, gap * m);
    const std::int64_t count = shared ? 1 : batch;
    p.args.coeff_stride[0] = sources * count;
    p.args.coeff_stride[1] = count;
    p.args.coeff_stride[2] = shared ? 0 : 1;
    for (std::int64_t k = 0; k < outputs * sources * count; ++k) {
        p.coeffs64.push_back(normal(random));
        p.coeffs32.push_back(static_cast<float>(p.coeffs64.back()));
    }
    return p;
}

void bind(Problem& p) {
    for (std::size_t j = 0; j < p.sources.size(); ++j) p.args.source[j] = p.sources[j].view();
    for (std::size_t m = 0; m < p.outputs.size(); ++m) p.args.output[m] = p.outputs[m].view();
    p.args.coeffs = p.args.wide ? static_cast<const void*>(p.coeffs64.data()) : p.coeffs32.data();
}

void check_combine(Problem& p) {
    bind(p);
    combine(p.args, 2);
    const double limit = tolerance(p.outputs[0].dtype);
    for (int m = 0; m < p.args.outputs; ++m)
        for (std::int64_t b = 0; b < p.args.batch; ++b)
            for (std::int64_t i = 0; i < p.args.size; ++i) {
                double expected = 0, magnitude = 1;
                for (int j = 0; j < p.args.sources; ++j) {
                    const double term = p.coeff(m, j, b) * p.sources[static_cast<std::size_t>(j)].get(b, i);
                    expected += term;
                    magnitude += std::abs(term);
                }
                const double got = p.outputs[static_cast<std::size_t>(m)].get(b, i);
                CHECK(std::abs(got - expected) <= limit * magnitude, "m=%d b=%lld i=%lld: got %g, expected %g", m,
                      static_cast<long long>(b), static_cast<long long>(i), got, expected);
            }
}

void test_combine() {
    using D = amed::DType;
    std::mt19937 random(1);
    const std::vector<std::vector<D>> dtypes = {
        {D::f32}, {D::f64}, {D::f16}, {D::bf16}, {D::f32, D::bf16}, {D::f64, D::f16, D::f32}, {D::bf16, D::f32}};
    for (const auto& types : dtypes)
        for (const int sources : {1, 2, 3, 5, 16})
            for (const int outputs : {1, 2, 8})
                for (const std::int64_t size : {1, 7, 31, 64, 513, 1100}) {
                    Problem p = make(random, sources, outputs, 3, size, types, size % 5, sources % 2 == 0);
                    check_combine(p);
                }
    Problem empty = make(random, 2, 1, 0, 5, {D::f32}, 0, true);
    check_combine(empty);
}

void test_in_place() {
    std::mt19937 random(2);
    Problem p = make(random, 3, 2, 4, 1500, {amed::DType::f32}, 3, false), q = p;
    bind(p);
    combine(p.args, 1);
    bind(q);
    q.args.output[0] = q.args.source[1];
    q.args.output[1] = q.args.source[0];
    combine(q.args, 2);
    for (std::int64_t b = 0; b < 4; ++b)
        for (std::int64_t i = 0; i < 1500; ++i) {
            CHECK(p.outputs[0].get(b, i) == q.sources[1].get(b, i), "output 0 over source 1");
            CHECK(p.outputs[1].get(b, i) == q.sources[0].get(b, i), "output 1 over source 0");
        }
}

void test_threads_and_batch_do_not_matter() {
    std::mt19937 random(3);
    const std::int64_t batch = 40, size = 12289;
    Problem p = make(random, 5, 2, batch, size, {amed::DType::f32}, 0, false), q = p;
    bind(p);
    combine(p.args, 1);
    bind(q);
    combine(q.args, 4);
    CHECK(p.outputs[0].bytes == q.outputs[0].bytes && p.outputs[1].bytes == q.outputs[1].bytes, "threads");
    for (std::int64_t b = 0; b < batch; b += 13) {
        Samples alone(amed::DType::f32, 1, size, 0);
        amed::CombineArgs args = p.args;
        args.batch = 1;
        args.outputs = 1;
        args.output[0] = alone.view();
        args.coeffs = p.coeffs32.data() + b * args.coeff_stride[2];
        for (int j = 0; j < args.sources; ++j) args.source[j].data = p.sources[static_cast<std::size_t>(j)].at(b, 0);
        combine(args, 1);
        CHECK(std::memcmp(alone.bytes.data(), p.outputs[0].at(b, 0), alone.bytes.size()) == 0, "sample alone");
    }
}

void test_dots() {
    std::mt19937 random(4);
    for (const auto dtype : {amed::DType::f32, amed::DType::f64, amed::DType::f16}) {
        Problem p = make(random, 3, 2, 5, 1037, {dtype}, 2, false);
        for (auto& output : p.outputs)
            for (std::int64_t b = 0; b < 5; ++b)
                for (std::int64_t i = 0; i < 1037; ++i) output.set(b, i, std::sin(static_cast<double>(b + i)));
        bind(p);
        std::vector<double> wide(30);
        std::vector<float> narrow(30);
        const amed::DotArgs args = {p.args, p.args.wide ? static_cast<void*>(wide.data()) : narrow.data()};
        combine_coeff_grad(args, 3);
        for (std::size_t k = 0; k < 30; ++k) {
            const std::size_t m = k / 15, j = k / 5 % 3;
            const auto b = static_cast<std::int64_t>(k % 5);
            double expected = 0;
            for (std::int64_t i = 0; i < 1037; ++i) expected += p.outputs[m].get(b, i) * p.sources[j].get(b, i);
            const double got = p.args.wide ? wide[k] : static_cast<double>(narrow[k]);
            CHECK(std::abs(got - expected) < (p.args.wide ? 1e-11 : 1e-3), "got %g, expected %g", got, expected);
        }
    }
}

// Against the formulas, with every weight chosen so that they can be followed by hand.
void test_midpoint() {
    const int pixels = 5, channels = 3, noise = 4, hidden = 2, encoded = 1, inputs = encoded + 2 * noise;
    std::vector<double> features(2 * channels * pixels), enc0(hidden * pixels, 1.0), enc0_bias(hidden, 0.0);
    for (std::size_t k = 0; k < features.size(); ++k) features[k] = static_cast<double>(k) / 10;
    std::vector<double> enc1(hidden, 0.5), enc1_bias(1, 0.25), map(noise * noise, 0.0), map_bias(noise, 0.0);
    for (int k = 0; k < noise; ++k) map[static_cast<std::size_t>(k * noise + k)] = 1.0;
    std::vector<double> head(inputs, 0.1), head_bias(1, -0.2), frequencies = {1.0, 0.5}, result(20);
    const double sigma[] = {3.0, 2.0}, sigma_next = 0.5;
    amed::MidpointArgs args = {};
    args.batch = 2;
    args.channels = channels;
    args.pixels = pixels;
    args.features = {features.data(), channels * pixels, amed::DType::f64};
    args.channel_stride = pixels;
    args.noise_channels = noise;
    args.hidden = hidden;
    args.encoded = encoded;
    args.wide = true;
    args.sigma = sigma;
    args.sigma_next = &sigma_next;
    args.sigma_stride = 1;
    args.frequencies = frequencies.data();
    args.map_weight = map.data();
    args.map_bias = map_bias.data();
    args.enc0_weight = enc0.data();
    args.enc0_bias = enc0_bias.data();
    args.enc1_weight = enc1.data();
    args.enc1_bias = enc1_bias.data();
    args.head_weight[0] = args.head_weight[2] = head.data();
    args.head_bias[0] = args.head_bias[2] = head_bias.data();
    args.width[2] = 0.2;
    args.result = result.data();
    midpoint(args, 2);

    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    for (std::size_t b = 0; b < 2; ++b) {
        double sum = 0;
        for (std::size_t k = 0; k < channels * pixels; ++k) sum += features[b * channels * pixels + k] / channels;
        double z = enc1_bias[0] + sum * sigmoid(sum);
        for (const double level : {sigma[b], sigma_next})
            for (const double wave : {std::sin(level), std::sin(level / 2), std::cos(level), std::cos(level / 2)})
                z += wave * sigmoid(wave);
        const double r = sigmoid(0.1 * z - 0.2), time = 2 * 0.2 * r + 0.8;
        const double mid = std::pow(sigma_next, r) * std::pow(sigma[b], 1 - r), slope = (sigma_next - sigma[b]) / mid;
        const double expected[] = {r,   1.0,   time,  mid, time * mid, mid / sigma[b], 1 - mid / sigma[b],
                                   1.0, slope, -slope};
        for (std::size_t k = 0; k < 10; ++k)
            CHECK(std::abs(result[2 * k + b] - expected[k]) < 1e-12, "row %zu: got %g, expected %g", k,
                  result[2 * k + b], expected[k]);
    }
}

}  // namespace

int failures = 0;

int main() {
    test_half();
    test_bfloat();
    test_combine();
    test_in_place();
    test_threads_and_batch_do_not_matter();
    test_dots();
    test_midpoint();
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
