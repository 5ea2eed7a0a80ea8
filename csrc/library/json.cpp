#include "json.h"

#include <charconv>
#include <cstdint>
#include <utility>

#include "error.h"
#if !defined(__cpp_lib_to_chars)
#include <locale>
#include <sstream>
#endif

namespace amed::json {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    Value document() {
        Value value = read_value(0);
        skip_space();
        if (at_ != text_.size()) stop("text after the end");
        return value;
    }

  private:
    std::string_view text_;
    std::size_t at_ = 0, values_ = 0;

    [[noreturn]] void stop(const char* what) const {
        fail(AMED_ERROR_FORMAT, "not valid JSON at byte " + std::to_string(at_) + ": " + what);
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
    }

    bool take(char c) {
        if (peek() != c || at_ >= text_.size()) return false;
        ++at_;
        return true;
    }

    void expect(char c, const char* what) {
        skip_space();
        if (!take(c)) stop(what);
    }

    bool take_word(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Value read_value(int depth) {
        if (depth > kMaxDepth) stop("nested too deeply");
        if (++values_ > kMaxValues) stop("more values than a plan can have");
        skip_space();
        switch (peek()) {
            case '{': return {read_object(depth)};
            case '[': return {read_array(depth)};
            case '"': return {read_text()};
            default: return read_scalar();
        }
    }

    Value read_scalar() {
        if (take_word("null")) return {};
        if (take_word("true")) return {true};
        if (take_word("false")) return {false};
        return {read_number()};
    }

    Array read_array(int depth) {
        Array array;
        ++at_;
        skip_space();
        if (take(']')) return array;
        do array.push_back(read_value(depth + 1));
        while (skip_space(), take(','));
        expect(']', "expected , or ]");
        return array;
    }

    Object read_object(int depth) {
        Object object;
        ++at_;
        skip_space();
        if (take('}')) return object;
        do {
            skip_space();
            if (peek() != '"') stop("expected a name");
            std::string name = read_text();
            for (const Member& other : object)
                if (other.name == name) stop("a name twice in one object");
            if (object.size() == kMaxMembers) stop("too many names in one object");
            expect(':', "expected :");
            Value value = read_value(depth + 1);
            object.push_back({std::move(name), std::move(value)});
            skip_space();
        } while (take(','));
        expect('}', "expected , or }");
        return object;
    }

    // As JSON writes numbers: from_chars alone would take "01", ".5" and "inf".
    double read_number() {
        const std::size_t first = at_;
        take('-');
        if (!take('0')) digits();
        if (take('.')) digits();
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            digits();
        }
        return convert(text_.substr(first, at_ - first));
    }

    void digits() {
        if (!is_digit(peek())) stop("expected a value");
        while (is_digit(peek())) ++at_;
    }

    double convert(std::string_view number) const {
        double value = 0;
#if defined(__cpp_lib_to_chars)
        const auto result = std::from_chars(number.data(), number.data() + number.size(), value);
        if (result.ec != std::errc{}) stop("a number beyond double precision");
#else
        std::istringstream stream{std::string(number)};
        stream.imbue(std::locale::classic());
        if (!(stream >> value)) stop("a number beyond double precision");
#endif
        return value;
    }

    std::string read_text() {
        std::string out;
        ++at_;
        while (!take('"')) {
            if (at_ >= text_.size() || static_cast<unsigned char>(peek()) < 0x20) stop("text without an end");
            if (take('\\'))
                read_escape(out);
            else
                out.push_back(text_[at_++]);
        }
        return out;
    }

    void read_escape(std::string& out) {
        constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
        if (take('u')) return append(out, read_code_point());
        const std::size_t which = at_ < text_.size() ? kNames.find(peek()) : std::string_view::npos;
        if (which == std::string_view::npos) stop("unknown escape");
        out.push_back(kMeanings[which]);
        ++at_;
    }

    std::uint32_t read_code_point() {
        const std::uint32_t high = read_hex();
        if (high < 0xd800 || high > 0xdfff) return high;
        if (high > 0xdbff || !take_word("\\u")) stop("half a surrogate pair");
        const std::uint32_t low = read_hex();
        if (low < 0xdc00 || low > 0xdfff) stop("half a surrogate pair");
        return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    }

    std::uint32_t read_hex() {
        std::uint32_t value = 0;
        const std::string_view four = text_.substr(at_, 4);
        const auto result = std::from_chars(four.data(), four.data() + four.size(), value, 16);
        if (four.size() != 4 || result.ptr != four.data() + 4) stop("expected four hexadecimal digits");
        at_ += 4;
        return value;
    }

    static void append(std::string& out, std::uint32_t code) {
        if (code < 0x80) {
            out.push_back(static_cast<char>(code));
            return;
        }
        const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        const std::uint32_t lead = more == 1 ? 0xc0 : more == 2 ? 0xe0 : 0xf0;
        out.push_back(static_cast<char>(lead | code >> (6 * more)));
        for (int k = more - 1; k >= 0; --k) out.push_back(static_cast<char>(0x80 | ((code >> (6 * k)) & 0x3f)));
    }
};

}  // namespace

Value parse(std::string_view text) {
    if (text.size() > kMaxBytes)
        fail(AMED_ERROR_FORMAT, "the plan has " + std::to_string(text.size()) + " bytes, at most " +
                                    std::to_string(kMaxBytes) + " are allowed");
    return Parser(text).document();
}

}  // namespace amed::json
