// Loops over rows of at most a few hundred elements; the only code that meets the instruction set.
#pragma once

#include <cstdint>

#include "amed/types.h"

namespace amed::cpu {

// Elements that one call treats: sixteen float rows fit a 32 KiB first-level cache.
constexpr std::int64_t kBlock = 512;

// row = sum over j of c[j] * s[j], in the order of j, each term one fused multiply-add where the machine has it.
void weighted_sum(const float* const* s, const float* c, int count, float* row, std::int64_t n);
void weighted_sum(const double* const* s, const double* c, int count, double* row, std::int64_t n);

// Sum of a[i] * b[i] in a fixed order.
double dot(const float* a, const float* b, std::int64_t n);
double dot(const double* a, const double* b, std::int64_t n);

// total += row
void add(const float* row, float* total, std::int64_t n);
void add(const double* row, double* total, std::int64_t n);

// n elements of any type, `offset` elements behind data, as float or double.
void load(const View& view, std::int64_t offset, float* row, std::int64_t n);
void load(const View& view, std::int64_t offset, double* row, std::int64_t n);

// The inverse, rounding to nearest even.
void store(const float* row, const View& view, std::int64_t offset, std::int64_t n);
void store(const double* row, const View& view, std::int64_t offset, std::int64_t n);

}  // namespace amed::cpu
