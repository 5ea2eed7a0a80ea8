// The AMED predictor and the coefficients of the step that follow from it; formulas in kernels/reference.py.
#pragma once

#include "amed/types.h"

namespace amed {

// Dense parameters, T = double where `wide`, otherwise float. E noise channels, H hidden, K encoded, P = h * w.
struct MidpointArgs {
    std::int64_t batch;
    int channels;   // averaged; 0: no features (zeros)
    int pixels;     // P
    View features;  // (batch, channels, P), batch_stride in elements, pixels adjacent
    std::int64_t channel_stride;
    int noise_channels;  // E, even
    int hidden;          // H
    int encoded;         // K
    bool wide;
    const void* sigma;       // batch values, or one with stride 0
    const void* sigma_next;  // likewise
    std::int64_t sigma_stride;
    std::int64_t sigma_next_stride;
    const double* frequencies;   // (E / 2)
    const void* map_weight;      // (E, E)
    const void* map_bias;        // (E)
    const void* enc0_weight;     // (H, P)
    const void* enc0_bias;       // (H)
    const void* enc1_weight;     // (K, H)
    const void* enc1_bias;       // (K)
    const void* head_weight[3];  // r, scale_dir, scale_time: (K + 2 E), or null where the head is absent
    const void* head_bias[3];    // one value each
    double width[3];             // half-widths of the scales; [0] is not used
    void* result;                // (10, batch): r, scale_dir, scale_time, sigma, sigma_net, C1 (2), C2 (3)
};

}  // namespace amed
