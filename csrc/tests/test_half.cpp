// float16 and bfloat16: every value, every tie.
#include <cmath>
#include <cstdint>
#include <limits>

#include "../cpu/half.h"
#include "check.h"

// Every half is the float that its bits define, and rounding goes to the nearest, ties to even.
void test_half() {
    using amed::cpu::float_to_half;
    using amed::cpu::half_to_float;
    for (unsigned int k = 0; k < 0x10000u; ++k) {
        const auto bits = static_cast<std::uint16_t>(k);
        const int exponent = static_cast<int>(k >> 10 & 31u), mantissa = static_cast<int>(k & 1023u);
        const double sign = k >> 15 ? -1.0 : 1.0;
        const float got = half_to_float(bits);
        if (exponent == 31) {
            CHECK(mantissa ? std::isnan(got) : std::isinf(got), "half %04x", k);
            continue;
        }
        const double expected =
            sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
        CHECK(static_cast<double>(got) == expected, "half %04x: got %g, expected %g", k, static_cast<double>(got),
              expected);
        CHECK(float_to_half(got) == bits, "half %04x does not return", k);
        if (exponent < 30 && k < 0x8000u) {
            const float next = half_to_float(static_cast<std::uint16_t>(k + 1));
            const float middle = got + (next - got) / 2;
            CHECK(float_to_half(middle) == bits + (k & 1u), "tie above %04x", k);
            CHECK(float_to_half(std::nextafter(middle, next)) == bits + 1, "just above the tie above %04x", k);
        }
    }
    CHECK(float_to_half(65520.0f) == 0x7c00 && float_to_half(65519.0f) == 0x7bff, "overflow");
    CHECK(float_to_half(1e-9f) == 0 && float_to_half(-1e-9f) == 0x8000, "underflow");
    CHECK(std::isnan(half_to_float(float_to_half(std::numeric_limits<float>::quiet_NaN()))), "nan");
    CHECK(std::isinf(half_to_float(float_to_half(std::numeric_limits<float>::infinity()))), "infinity");
}

void test_bfloat() {
    using amed::cpu::bfloat_to_float;
    using amed::cpu::float_to_bfloat;
    CHECK(float_to_bfloat(1.0f) == 0x3f80 && bfloat_to_float(0x3f80) == 1.0f, "one");
    CHECK(float_to_bfloat(1.00390625f) == 0x3f80, "a tie goes to the even neighbour below");
    CHECK(float_to_bfloat(1.01171875f) == 0x3f82, "a tie goes to the even neighbour above");
    CHECK(float_to_bfloat(3.4e38f) == 0x7f80, "overflow");
    CHECK(std::isnan(bfloat_to_float(float_to_bfloat(std::numeric_limits<float>::signaling_NaN()))), "nan");
}
