// The hash that a table carries as its last entry.
#pragma once

#include <string>
#include <string_view>

namespace amed {

// SHA-256 (FIPS 180-4) as 64 hexadecimal digits.
std::string sha256(std::string_view data);

// Throws Error(AMED_ERROR_FORMAT) where a JSON object with an entry sha256 does not end in it, or where it is not that
// of the other entries, written without space between the symbols. text: valid JSON.
void check_hash(std::string_view text);

}  // namespace amed
