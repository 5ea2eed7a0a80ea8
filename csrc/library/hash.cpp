#include "hash.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "error.h"

namespace amed {
namespace {

using State = std::array<std::uint32_t, 8>;

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t turn(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

void add_block(State& state, const unsigned char* block) {
    std::uint32_t w[64];
    for (int k = 0; k < 16; ++k)
        w[k] = std::uint32_t{block[4 * k]} << 24 | std::uint32_t{block[4 * k + 1]} << 16 |
               std::uint32_t{block[4 * k + 2]} << 8 | block[4 * k + 3];
    for (int k = 16; k < 64; ++k) {
        const std::uint32_t early = turn(w[k - 15], 7) ^ turn(w[k - 15], 18) ^ w[k - 15] >> 3;
        const std::uint32_t late = turn(w[k - 2], 17) ^ turn(w[k - 2], 19) ^ w[k - 2] >> 10;
        w[k] = w[k - 16] + early + w[k - 7] + late;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int k = 0; k < 64; ++k) {
        const std::uint32_t first =
            h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + kRounds[k] + w[k];
        const std::uint32_t second = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const State change{a, b, c, d, e, f, g, h};
    for (std::size_t k = 0; k < state.size(); ++k) state[k] += change[k];
}

// Without the space between symbols.
std::string dense(std::string_view text) {
    std::string out;
    bool inside = false;  // of a string
    for (std::size_t k = 0; k < text.size(); ++k) {
        const char c = text[k];
        if (!inside && (c == ' ' || c == '\n' || c == '\r' || c == '\t')) continue;
        out.push_back(c);
        if (c == '"') inside = !inside;
        if (inside && c == '\\') out.push_back(text[++k]);
    }
    return out;
}

}  // namespace

std::string sha256(std::string_view data) {
    State state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::string rest(data.substr(data.size() / 64 * 64));
    rest.push_back('\x80');
    rest.resize(rest.size() <= 56 ? 56 : 120);
    for (int shift = 56; shift >= 0; shift -= 8)
        rest.push_back(static_cast<char>(std::uint64_t{data.size()} * 8 >> shift & 0xff));
    for (const std::string_view part : {data.substr(0, data.size() / 64 * 64), std::string_view(rest)})
        for (std::size_t at = 0; at < part.size(); at += 64)
            add_block(state, reinterpret_cast<const unsigned char*>(part.data()) + at);
    std::string digits;
    for (const std::uint32_t word : state)
        for (int shift = 28; shift >= 0; shift -= 4) digits.push_back("0123456789abcdef"[word >> shift & 15]);
    return digits;
}

void check_hash(std::string_view text) {
    constexpr std::string_view kEntry = ",\"sha256\":";
    const std::string table = dense(text);
    const std::size_t start = std::min(table.rfind(kEntry), table.size());
    const std::string own = sha256(table.substr(0, start) + "}");
    if (table.substr(start) != std::string(kEntry) + "\"" + own + "\"}")
        fail(AMED_ERROR_FORMAT, "plan entry sha256: expected " + own +
                                    " as the last, that of the other entries: the file is damaged, or, if you changed "
                                    "it, delete sha256; write the plan again");
}

}  // namespace amed
