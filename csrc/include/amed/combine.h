// Linear updates of a solver step: one read of every source, one write of every output.
#pragma once

#include "amed/types.h"

namespace amed {

// output[m][b, i] = sum over j of coeffs[m, j, b] * source[j][b, i]
//
// All samples share one dense inner order of `size` elements. Accumulation is double where `wide` is true, otherwise
// float; outputs are the dtype of source[0]. An output may be the very view of a source; any other overlap is
// undefined. coeffs are double where `wide`, otherwise float; strides in elements, 0 where shared.
struct CombineArgs {
    int sources;
    int outputs;
    std::int64_t batch;
    std::int64_t size;
    View source[kMaxSources];
    View output[kMaxOutputs];
    const void* coeffs;
    std::int64_t coeff_stride[3];  // m, j, b
    bool wide;
};

// result[m, j, b] = sum over i of output[m][b, i] * source[j][b, i]; the views in `output` are read.
// result is dense (outputs, sources, batch), double where `wide`, otherwise float; `coeffs` is not used.
struct DotArgs {
    CombineArgs operands;
    void* result;
};

}  // namespace amed
