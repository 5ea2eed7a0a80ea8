// The operations on the CPU. `threads` is an upper bound: small problems use fewer. No result depends on it, bit for
// bit.
#pragma once

#include "amed/combine.h"
#include "amed/midpoint.h"

namespace amed::cpu {

void combine(const CombineArgs& args, int threads);
void combine_coeff_grad(const DotArgs& args, int threads);
void midpoint(const MidpointArgs& args, int threads);

}  // namespace amed::cpu
