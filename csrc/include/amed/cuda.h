// The same operations on a CUDA device: launched on the stream that is handed in, never synchronizing, so that they can
// be captured into a graph. Return 0, or the cudaError_t of the launch. All addresses are device memory.
#pragma once

#include "amed/combine.h"
#include "amed/midpoint.h"

extern "C" {

int amed_cuda_combine(const amed::CombineArgs* args, void* stream);
int amed_cuda_combine_coeff_grad(const amed::DotArgs* args, void* stream);
int amed_cuda_midpoint(const amed::MidpointArgs* args, void* stream);

}  // extern "C"
