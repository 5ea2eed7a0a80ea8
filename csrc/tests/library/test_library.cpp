// Tests of the C library under the sanitizers: JSON by table, memory by walking every plan given, and the loader
// against mutations of them. Arguments: how many mutations of each plan, then the files.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../../library/error.h"
#include "../../library/json.h"
#include "../check.h"
#include "amed/amed.h"

int failures = 0;

namespace {

using Random = std::mt19937;

std::size_t below(Random& random, std::size_t limit) { return random() % limit; }

// ---- JSON

bool is_json(const std::string& text) {
    try {
        amed::json::parse(text);
        return true;
    } catch (const amed::Error& error) {
        CHECK(error.status == AMED_ERROR_FORMAT, "%s", error.what());
        return false;
    }
}

void test_json() {
    for (const char* good : {"0", "-0", "1e5", "1.5E-7", "[]", "{}", " [1 , 2]\n", "{\"a\":{\"b\":[null,true,false]}}",
                             "\"\\u00e9\\ud83d\\ude00\\n\"", "123456789012345678901234567890"})
        CHECK(is_json(good), "%s", good);
    for (const char* bad : {"",
                            " ",
                            "01",
                            "+1",
                            ".5",
                            "1.",
                            "1e",
                            "-",
                            "inf",
                            "nan",
                            "NaN",
                            "1e999",
                            "[1,]",
                            "[1 2]",
                            "[",
                            "]",
                            "{\"a\"}",
                            "{\"a\":}",
                            "{a:1}",
                            "{\"a\":1,}",
                            "{\"a\":1,\"a\":1}",
                            "\"",
                            "\"\\x\"",
                            "\"\\u12\"",
                            "\"\\ud800\"",
                            "\"\\ud800\\u0041\"",
                            "\"\n\"",
                            "1 1",
                            "tru",
                            "nullx",
                            "'a'"})
        CHECK(!is_json(bad), "%s", bad);
    CHECK(!is_json(std::string("1\0", 2)), "a zero byte");
    CHECK(!is_json(std::string(100000, '[')), "depth");
    std::string wide = "[0";
    for (int k = 0; k < 2200000; ++k) wide += ",0";
    CHECK(!is_json(wide + "]"), "number of values");
    const double value = *amed::json::parse("0.1").as<double>();
    CHECK(value == 0.1, "got %.17g", value);
    const auto text = *amed::json::parse("\"\\u00e9\\u20ac\\ud83d\\ude00\"").as<std::string>();
    CHECK(text == "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", "%s", text.c_str());
}

// ---- plans

// With no class, the first and the last in turn, where the plan has classes.
amed_status start(amed_sampler* sampler, const std::vector<float>& x, std::int64_t batch, int classes,
                  amed_message* why) {
    if (classes == 0) return amed_sampler_start(sampler, x.data(), why);
    std::vector<std::int32_t> chosen;
    for (std::int64_t b = 0; b < batch; ++b) chosen.push_back(b % 3 == 2 ? classes - 1 : static_cast<int>(b % 3) - 1);
    return amed_sampler_start_classes(sampler, x.data(), chosen.data(), why);
}

// A whole trajectory with buffers of exactly the right size; false where the plan is not one.
bool walk(const std::string& text, std::int64_t batch, std::int64_t size) {
    // At its exact size, so that one byte read too many is seen.
    const std::vector<char> exact(text.begin(), text.end());
    amed_message why;
    amed_plan* plan = nullptr;
    amed_sampler* sampler = nullptr;
    const amed_status status = amed_plan_parse(exact.data(), exact.size(), &plan, &why);
    CHECK((status == AMED_OK) == (plan != nullptr) && (status == AMED_OK) == (why.text[0] == '\0'), "%s", why.text);
    CHECK(status == AMED_OK || status == AMED_ERROR_FORMAT, "status %d: %s", static_cast<int>(status), why.text);
    if (status != AMED_OK) return false;
    const std::int64_t pixels = amed_plan_bottleneck(plan);
    const bool fits = amed_plan_size(plan) == 0 || amed_plan_size(plan) == size;
    const amed_status made = amed_sampler_create(plan, batch, size, 2, &sampler, &why);
    const int classes = amed_plan_classes(plan);
    amed_plan_free(plan);
    CHECK((made == AMED_OK) == fits, "%s", why.text);
    if (made != AMED_OK) return true;
    const std::vector<float> x(static_cast<std::size_t>(batch * size), 0.5F);
    const std::vector<float> features(static_cast<std::size_t>(batch * 3 * pixels), 0.25F);
    CHECK(start(sampler, x, batch, classes, &why) == AMED_OK, "%s", why.text);
    amed_evaluation at = {};
    for (;;) {
        CHECK(amed_sampler_next(sampler, &at, &why) == AMED_OK, "%s", why.text);
        if (at.done != 0) break;
        std::vector<float> denoised(at.points, at.points + at.rows * size);
        for (std::int64_t row = 0; row < at.rows; ++row)
            denoised[static_cast<std::size_t>(row * size)] += at.sigma[row];
        const bool seen = pixels > 0 && at.index % 2 == 0;
        CHECK(
            amed_sampler_put(sampler, denoised.data(), seen ? features.data() : nullptr, seen ? 3 : 0, &why) == AMED_OK,
            "%s", why.text);
    }
    const std::vector<float> sample(at.points, at.points + batch * size);
    CHECK(at.rows == batch && at.sigma == nullptr, "the sample has a row for each");
    amed_sampler_free(sampler);
    return true;
}

std::size_t number_end(const std::string& text, std::size_t at) {
    while (at < text.size() && std::string("+-.eE0123456789").find(text[at]) != std::string::npos) ++at;
    return at;
}

// Another number where one stands, so that most of the file stays a plan.
void replace_number(std::string& text, Random& random) {
    static const char* const kNumbers[] = {"0",      "1",          "2",    "3",    "7",    "8",     "16",
                                           "-1",     "0.5",        "1e30", "1e31", "-0.0", "65536", "65537",
                                           "1e-300", "4294967297", "null", "true", "[1]",  "[]"};
    std::size_t at = text.find_first_of("0123456789", below(random, text.size()));
    if (at == std::string::npos) return;
    text.replace(at, number_end(text, at) - at, kNumbers[below(random, sizeof kNumbers / sizeof *kNumbers)]);
}

void mutate(std::string& text, Random& random) {
    static const char kBytes[] = "{}[],:\"\\-+.eE019 ntfu\x01\x80\xff";
    const std::size_t at = below(random, text.size()), span = 1 + below(random, 1 + below(random, 200));
    switch (below(random, 9)) {
        case 0: text[at] = kBytes[below(random, sizeof kBytes)]; break;
        case 1: text.erase(at, span); break;
        case 2: text.insert(below(random, text.size()), text.substr(at, span)); break;
        case 3: text.resize(at); break;
        case 4: text[at] = static_cast<char>(text[at] ^ (1 << below(random, 8))); break;
        default: replace_number(text, random);
    }
    if (text.empty()) text = " ";
}

std::size_t fuzz(const std::string& text, unsigned int seed, int count) {
    Random random(seed);
    std::size_t accepted = 0;
    for (int k = 0; k < count; ++k) {
        std::string mutant = text;
        for (std::size_t n = 1 + below(random, 3); n > 0; --n) mutate(mutant, random);
        accepted += walk(mutant, 2, 3) ? 1 : 0;
    }
    return accepted;
}

std::string read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// One sampler, several threads: their calls may meet, the memory must not. And a sampler of each thread's own.
void test_threads(const std::string& text) {
    amed_plan* plan = nullptr;
    amed_sampler* shared = nullptr;
    CHECK(amed_plan_parse(text.data(), text.size(), &plan, nullptr) == AMED_OK, "plan");
    CHECK(amed_sampler_create(plan, 2, 3, 1, &shared, nullptr) == AMED_OK, "sampler");
    const auto work = [&] {
        const std::vector<float> x(48);  // of up to eight points
        amed_sampler* own = nullptr;
        amed_evaluation at = {};
        CHECK(amed_sampler_create(plan, 2, 3, 1, &own, nullptr) == AMED_OK, "sampler");
        for (int k = 0; k < 200; ++k)
            for (amed_sampler* sampler : {shared, own}) {
                if (k % 5 == 0) start(sampler, x, 2, amed_plan_classes(plan), nullptr);
                amed_sampler_next(sampler, &at, nullptr);
                amed_sampler_put(sampler, x.data(), nullptr, 0, nullptr);
            }
        amed_sampler_free(own);
    };
    std::thread other(work);
    work();
    other.join();
    amed_sampler_free(shared);
    amed_plan_free(plan);
}

}  // namespace

int main(int count, char** arguments) {
    test_json();
    const int mutations = count > 1 ? std::atoi(arguments[1]) : 0;
    for (int k = 2; k < count; ++k) {
        const std::string text = read(arguments[k]);
        for (const std::int64_t size : {1, 3, 513}) CHECK(walk(text, 3, size), "%s is not a plan", arguments[k]);
        const std::size_t accepted = fuzz(text, static_cast<unsigned int>(k), mutations);
        std::printf("%zu of %d mutations of plan %d are plans\n", accepted, mutations, k - 1);
        CHECK(accepted > 0 || mutations == 0, "no mutation survives: they are too wild to test what follows");
    }
    for (int k = 2; k < count; ++k) test_threads(read(arguments[k]));
    std::printf(failures != 0 ? "%d failures\n" : "ok\n", failures);
    return failures != 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
