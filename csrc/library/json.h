// Strict JSON of bounded size and depth: what a plan needs, no more.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace amed::json {

constexpr std::size_t kMaxBytes = std::size_t{32} << 20;
constexpr std::size_t kMaxValues = std::size_t{1} << 21;  // each takes some forty bytes
constexpr std::size_t kMaxMembers = 64;                   // of one object
constexpr int kMaxDepth = 16;

struct Value;
struct Member;
using Array = std::vector<Value>;
using Object = std::vector<Member>;

struct Value {
    std::variant<std::monostate, bool, double, std::string, Array, Object> data;

    bool is_null() const { return std::holds_alternative<std::monostate>(data); }
    template <typename T>
    const T* as() const {
        return std::get_if<T>(&data);
    }
};

struct Member {
    std::string name;
    Value value;
};

// Throws Error(AMED_ERROR_FORMAT) with the byte where reading stopped.
Value parse(std::string_view text);

}  // namespace amed::json
