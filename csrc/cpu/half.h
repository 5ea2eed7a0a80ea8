// float16 and bfloat16 by integer arithmetic: branch-free, so that loops over them become vector code everywhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace amed::cpu {

template <typename To, typename From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "bits() copies between types of one size");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

inline float bfloat_to_float(std::uint16_t value) { return bits<float>(static_cast<std::uint32_t>(value) << 16); }

inline std::uint16_t float_to_bfloat(float value) {
    const std::uint32_t u = bits<std::uint32_t>(value);
    const std::uint32_t nearest_even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (u >> 16) | 0x40u;
    return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest_even);
}

inline float half_to_float(std::uint16_t value) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(value & 0x7fffu) << 13;
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000u) << 16;
    // 2^112 moves the exponent bias from 15 to 127, subnormals included.
    std::uint32_t u = bits<std::uint32_t>(bits<float>(magnitude) * 0x1p112f);
    u = magnitude >= 0x0f800000u ? u | 0x7f800000u : u;  // infinity and nan
    return bits<float>(u | sign);
}

inline std::uint16_t float_to_half(float value) {
    const std::uint32_t u = bits<std::uint32_t>(value);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves a subnormal half in the last bits of the sum, rounded by the processor.
    const std::uint32_t subnormal = bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? infinite : result;
    return static_cast<std::uint16_t>(result | ((u >> 16) & 0x8000u));
}

}  // namespace amed::cpu
