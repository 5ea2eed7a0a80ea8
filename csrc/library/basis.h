// The eight functions of a midpoint that learned coefficients are made of, for the CPU and for CUDA. In double
// precision: they are few, and differences of them cancel.
#pragma once

#include <cmath>

#include "device.h"

namespace amed {

constexpr int kBasisSize = 8;

AMED_BOTH inline double midpoint_level(const MixArgs& args, std::int64_t b) {
    const double r = static_cast<double>(args.table[b]);
    return pow(args.sigma_next, r) * pow(args.sigma, 1 - r);
}

AMED_BOTH inline void evaluate_basis(const MixArgs& args, std::int64_t b, double* basis) {
    const double r = static_cast<double>(args.table[b]), c = static_cast<double>(args.table[args.batch + b]);
    const double m = midpoint_level(args, b);
    const double values[kBasisSize] = {1, m, 1 / m, c, c * m, c / m, c / r, c / (r * m)};
    for (int i = 0; i < kBasisSize; ++i) basis[i] = values[i];
}

AMED_BOTH inline float weigh(const double* weights, const double* basis) {
    double total = 0;
    for (int i = 0; i < kBasisSize; ++i) total += weights[i] * basis[i];
    return static_cast<float>(total);
}

AMED_BOTH inline float told_level(const MixArgs& args, std::int64_t b) {
    return static_cast<float>(static_cast<double>(args.table[2 * args.batch + b]) * midpoint_level(args, b));
}

}  // namespace amed
