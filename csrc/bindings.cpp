// The Python module amed_engine._native: raw addresses, sizes and strides, so that one build serves every torch.
// Addresses are trusted: kernels/native.py is the only caller and has checked the tensors they come from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "amed/cpu.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

struct ViewList {
    const std::vector<Address>& address;
    const std::vector<std::int64_t>& batch_stride;
    const std::vector<int>& dtype;
};

int fill(const ViewList& list, int limit, amed::View* views) {
    const std::size_t count = list.address.size();
    if (count < 1 || count > static_cast<std::size_t>(limit) || list.batch_stride.size() != count ||
        list.dtype.size() != count)
        throw std::invalid_argument("expected 1 to " + std::to_string(limit) + " tensors, got " +
                                    std::to_string(count));
    for (std::size_t k = 0; k < count; ++k) {
        if (list.dtype[k] < 0 || list.dtype[k] > 3) throw std::invalid_argument("unknown dtype code");
        views[k] = {reinterpret_cast<void*>(list.address[k]), list.batch_stride[k],
                    static_cast<amed::DType>(list.dtype[k])};
    }
    return static_cast<int>(count);
}

amed::CombineArgs operands(const ViewList& source, const ViewList& output, std::int64_t batch, std::int64_t size,
                           bool wide) {
    amed::CombineArgs args = {};
    args.sources = fill(source, amed::kMaxSources, args.source);
    args.outputs = fill(output, amed::kMaxOutputs, args.output);
    args.batch = batch;
    args.size = size;
    args.wide = wide;
    return args;
}

void combine(const std::vector<Address>& source, const std::vector<std::int64_t>& source_stride,
             const std::vector<int>& source_dtype, const std::vector<Address>& output,
             const std::vector<std::int64_t>& output_stride, const std::vector<int>& output_dtype, Address coeffs,
             const std::array<std::int64_t, 3>& coeff_stride, std::int64_t batch, std::int64_t size, bool wide,
             int threads) {
    amed::CombineArgs args =
        operands({source, source_stride, source_dtype}, {output, output_stride, output_dtype}, batch, size, wide);
    args.coeffs = reinterpret_cast<const void*>(coeffs);
    for (std::size_t k = 0; k < 3; ++k) args.coeff_stride[k] = coeff_stride[k];
    const py::gil_scoped_release release;
    amed::cpu::combine(args, threads);
}

void combine_coeff_grad(const std::vector<Address>& grad, const std::vector<std::int64_t>& grad_stride,
                        const std::vector<int>& grad_dtype, const std::vector<Address>& source,
                        const std::vector<std::int64_t>& source_stride, const std::vector<int>& source_dtype,
                        Address result, std::int64_t batch, std::int64_t size, bool wide, int threads) {
    const amed::DotArgs args = {
        operands({source, source_stride, source_dtype}, {grad, grad_stride, grad_dtype}, batch, size, wide),
        reinterpret_cast<void*>(result)};
    const py::gil_scoped_release release;
    amed::cpu::combine_coeff_grad(args, threads);
}

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }

// parameters: MidpointWeights in its order, 0 where a head is absent.
// sizes: noise channels, hidden, encoded, pixels. features: address, batch stride, channel stride, dtype, channels.
void midpoint(std::int64_t batch, const std::array<std::int64_t, 5>& features, const std::array<Address, 2>& sigma,
              const std::array<std::int64_t, 2>& sigma_stride, const std::array<int, 4>& sizes,
              const std::vector<double>& frequencies, const std::array<Address, 12>& parameters,
              const std::array<double, 2>& width, Address result, bool wide, int threads) {
    amed::MidpointArgs args = {};
    args.batch = batch;
    args.features = {reinterpret_cast<void*>(features[0]), features[1], static_cast<amed::DType>(features[3])};
    args.channel_stride = features[2];
    args.channels = static_cast<int>(features[4]);
    args.noise_channels = sizes[0];
    args.hidden = sizes[1];
    args.encoded = sizes[2];
    args.pixels = sizes[3];
    args.wide = wide;
    args.sigma = pointer(sigma[0]);
    args.sigma_next = pointer(sigma[1]);
    args.sigma_stride = sigma_stride[0];
    args.sigma_next_stride = sigma_stride[1];
    if (frequencies.size() * 2 != static_cast<std::size_t>(sizes[0]))
        throw std::invalid_argument("one frequency per pair");
    args.frequencies = frequencies.data();
    const void** target[] = {&args.map_weight, &args.map_bias,    &args.enc0_weight,
                             &args.enc0_bias,  &args.enc1_weight, &args.enc1_bias};
    for (std::size_t k = 0; k < 6; ++k) *target[k] = pointer(parameters[k]);
    for (std::size_t k = 0; k < 3; ++k) {
        args.head_weight[k] = pointer(parameters[6 + 2 * k]);
        args.head_bias[k] = pointer(parameters[7 + 2 * k]);
    }
    args.width[1] = width[0];
    args.width[2] = width[1];
    args.result = reinterpret_cast<void*>(result);
    const py::gil_scoped_release release;
    amed::cpu::midpoint(args, threads);
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ kernels of amed_engine; called by amed_engine.kernels.native with checked arguments";
    m.attr("openmp") = has_openmp();
    m.def("combine", &combine);
    m.def("combine_coeff_grad", &combine_coeff_grad);
    m.def("midpoint", &midpoint);
}
