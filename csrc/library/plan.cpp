#include "plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>

#include "error.h"
#include "hash.h"
#include "json.h"

namespace amed {
namespace {

using json::Array;
using json::Object;
using json::Value;

constexpr double kLargest = 1e30;  // so that float holds it
constexpr int kMaxSize = 1 << 16;
constexpr std::size_t kMaxEvaluations = 1000;
constexpr std::int64_t kMaxMean = std::int64_t{1} << 20;  // numbers of all rows

[[noreturn]] void refuse(const std::string& where, const std::string& expected) {
    fail(AMED_ERROR_FORMAT, "plan entry " + where + ": expected " + expected + "; write the plan again");
}

// An object with its path, from which entries are taken by name.
class Entries {
  public:
    Entries(const Value& value, std::string where) : where_(std::move(where)), object_(value.as<Object>()) {
        if (object_ == nullptr) refuse(where_, "an object");
    }

    // That many entries and no more, each of which is asked for by name.
    void count(std::size_t expected) const {
        if (object_->size() != expected)
            refuse(where_, "exactly the " + std::to_string(expected) + " entries of this version");
    }

    std::string path(const char* name) const { return where_.empty() ? name : where_ + "." + name; }

    bool has(const char* name) const {
        return std::any_of(object_->begin(), object_->end(), [&](const json::Member& m) { return m.name == name; });
    }

    const Value& find(const char* name) const {
        for (const json::Member& member : *object_)
            if (member.name == name) return member.value;
        refuse(path(name), "to be there");
    }

    bool is_null(const char* name) const { return find(name).is_null(); }

    bool flag(const char* name) const {
        const bool* value = find(name).as<bool>();
        if (value == nullptr) refuse(path(name), "true or false");
        return *value;
    }

    const std::string& text(const char* name) const {
        const auto* value = find(name).as<std::string>();
        if (value == nullptr) refuse(path(name), "text");
        return *value;
    }

    double number(const char* name) const { return to_number(find(name), path(name)); }
    int size(const char* name, int low) const { return to_size(find(name), path(name), low); }

    const Array& array(const char* name, std::size_t low, std::size_t high) const {
        return to_array(find(name), path(name), low, high);
    }

    std::vector<double> numbers(const char* name, std::size_t low, std::size_t high) const {
        std::vector<double> out;
        for (const Value& value : array(name, low, high)) out.push_back(to_number(value, path(name)));
        return out;
    }

    std::vector<double> levels(const char* name, std::size_t low, std::size_t high) const {
        std::vector<double> out = numbers(name, low, high);
        for (const double level : out)
            if (!(level >= 1 / kLargest)) refuse(path(name), "positive noise levels");
        return out;
    }

    std::vector<int> sizes(const char* name, std::size_t low, std::size_t high, int least) const {
        std::vector<int> out;
        for (const Value& value : array(name, low, high)) out.push_back(to_size(value, path(name), least));
        return out;
    }

    static const Array& to_array(const Value& value, const std::string& where, std::size_t low, std::size_t high) {
        const auto* array = value.as<Array>();
        if (array == nullptr || array->size() < low || array->size() > high)
            refuse(where, "a list of " + std::to_string(low) + " to " + std::to_string(high) + " entries");
        return *array;
    }

    static double to_number(const Value& value, const std::string& where) {
        const double* number = value.as<double>();
        if (number == nullptr || !(std::abs(*number) <= kLargest)) refuse(where, "a number up to 1e30");
        return *number;
    }

    static int to_size(const Value& value, const std::string& where, int low) {
        const double number = to_number(value, where);
        if (!(number >= low && number <= kMaxSize && number == std::floor(number)))
            refuse(where, "a whole number from " + std::to_string(low) + " to " + std::to_string(kMaxSize));
        return static_cast<int>(number);
    }

  private:
    std::string where_;
    const Object* object_;
};

// Numbers, or weights on the basis where any entry has them.
void read_matrix(const Array& rows, const std::string& where, Evaluation& e) {
    e.rows = static_cast<int>(rows.size());
    for (const Value& row : rows)
        for (const Value& entry : Entries::to_array(row, where, e.columns.size(), e.columns.size()))
            e.learned = e.learned || entry.as<Array>() != nullptr;
    for (const Value& row : rows)
        for (const Value& entry : *row.as<Array>()) {
            const bool weights = entry.as<Array>() != nullptr;
            if (weights)
                for (const Value& weight : Entries::to_array(entry, where, kBasis, kBasis))
                    e.weights.push_back(Entries::to_number(weight, where));
            else
                e.weights.push_back(Entries::to_number(entry, where));
            if (e.learned && !weights) e.weights.insert(e.weights.end(), kBasis - 1, 0.0);
        }
}

Evaluation read_evaluation(const Value& value, const std::string& where) {
    const Entries in(value, where);
    in.count(11);
    Evaluation e;
    if (!in.is_null("sigma")) e.sigma = in.levels("sigma", 1, kMaxOutputs);
    if (!in.is_null("sigma_net")) e.sigma_net = in.levels("sigma_net", 1, kMaxOutputs);
    if (e.sigma.size() != e.sigma_net.size()) refuse(in.path("sigma_net"), "one level for each of sigma");
    e.columns = in.sizes("columns", 1, kMaxSources, 0);
    read_matrix(in.array("coefficients", 1, kMaxOutputs), in.path("coefficients"), e);
    e.new_directions = in.size("new_directions", 0);
    e.keep = in.size("keep", 0);
    e.moves_x = in.flag("moves_x");
    e.x_is_y = in.flag("x_is_y");
    e.analytic = in.flag("analytic");
    e.threshold = in.flag("threshold");
    if (!in.is_null("predict")) e.predict = in.levels("predict", 2, 2);
    return e;
}

void read_layers(const Entries& in, PredictorWeights& p) {
    const int wide = p.encoded + 2 * p.noise_channels;
    const struct {
        const char* name;
        int outputs, inputs;
        bool present;
    } layers[] = {{"map_layer0", p.noise_channels, p.noise_channels, true},
                  {"enc_layer0", p.hidden, p.pixels, true},
                  {"enc_layer1", p.encoded, p.hidden, true},
                  {"fc_r", 1, wide, true},
                  {"fc_scale_dir", 1, wide, p.scale_dir != 0},
                  {"fc_scale_time", 1, wide, p.scale_time != 0}};
    std::size_t expected = 0;
    for (int k = 0; k < 12; ++k) {
        const auto& layer = layers[k / 2];
        if (!layer.present) continue;
        const std::string name = std::string(layer.name) + (k % 2 == 0 ? ".weight" : ".bias");
        const auto count = static_cast<std::size_t>(layer.outputs) * (k % 2 == 0 ? layer.inputs : 1);
        for (const double value : in.numbers(name.c_str(), count, count))
            p.parameters[k].push_back(static_cast<float>(value));
        ++expected;
    }
    in.count(expected);
}

PredictorWeights read_predictor(const Value& value) {
    const Entries in(value, "predictor");
    in.count(8);
    PredictorWeights p;
    p.scale_dir = in.number("scale_dir");
    p.scale_time = in.number("scale_time");
    for (const double width : {p.scale_dir, p.scale_time})
        if (!(width >= 0 && width < 1)) refuse("predictor", "half-widths of the scales in [0, 1)");
    const std::vector<int> bottleneck = in.sizes("bottleneck", 2, 2, 1);
    const std::int64_t pixels = static_cast<std::int64_t>(bottleneck[0]) * bottleneck[1];
    if (pixels > kMaxSize) refuse("predictor.bottleneck", "at most 65536 pixels");
    p.pixels = static_cast<int>(pixels);
    p.hidden = in.size("hidden", 1);
    p.encoded = in.size("encoded", 1);
    p.noise_channels = in.size("noise_channels", 2);
    if (p.noise_channels % 2 != 0 || p.noise_channels > 64) refuse("predictor.noise_channels", "an even number to 64");
    const auto half = static_cast<std::size_t>(p.noise_channels / 2);
    p.frequencies = in.numbers("frequencies", half, half);
    read_layers(Entries(in.find("parameters"), "predictor.parameters"), p);
    return p;
}

Mean read_mean(const Value& value, std::int64_t size) {
    const Entries in(value, "mean");
    in.count(2);
    Mean mean;
    mean.classes = in.size("classes", 0);
    const Array& rows = in.array("rows", 1, 1 + kMaxSize);
    mean.rows = static_cast<int>(rows.size());
    const bool any_class = mean.classes > 0 && mean.rows == 2;
    if (mean.rows != 1 + mean.classes && !any_class) refuse("mean.rows", "1 without classes, 1 + classes, or 2");
    if (size == 0) refuse("mean", "null, where shape is");
    if (size * mean.rows > kMaxMean) refuse("mean.rows", "at most " + std::to_string(kMaxMean) + " numbers in all");
    const auto count = static_cast<std::size_t>(size);
    for (const Value& row : rows)
        for (const Value& number : Entries::to_array(row, "mean.rows", count, count))
            mean.values.push_back(static_cast<float>(Entries::to_number(number, "mean.rows")));
    return mean;
}

void check_matrix(const Evaluation& e, int size, const std::string& where) {
    for (std::size_t j = 0; j < e.columns.size(); ++j)
        if (e.columns[j] >= size || (j > 0 && e.columns[j] <= e.columns[j - 1]))
            refuse(where + ".columns", "increasing numbers below " + std::to_string(size));
    if (e.next_points() < 1 || (e.x_is_y && e.next_points() != 1))
        refuse(where + ".coefficients", "a row for every direction, anchor and point");
    if (e.x_is_y && !e.moves_x) refuse(where + ".x_is_y", "false, where the anchor does not move");
    if ((e.analytic || !e.predict.empty()) && e.sigma.size() != 1)
        refuse(where + ".sigma", "one noise level, for a first evaluation");
}

// Walks through the evaluations: every column exists, every row has a meaning.
void check(const Plan& plan) {
    int past = 0;
    bool y_is_x = true, predicted = false;
    for (std::size_t i = 0; i < plan.evaluations.size(); ++i) {
        const Evaluation& e = plan.evaluations[i];
        const std::string where = "evaluations[" + std::to_string(i) + "]";
        if (i == 0 && e.points() != 1) refuse(where + ".sigma", "one point to begin with");
        check_matrix(e, 1 + e.points() * (y_is_x ? 1 : 2) + past, where);
        const int made = e.new_directions != 0 ? e.new_directions : e.points();
        if (e.new_directions > e.points() || e.keep > made + past || (e.new_directions != 0 && e.keep < made))
            refuse(where + ".keep", "as many directions as exist");
        predicted = predicted || !e.predict.empty();
        if ((e.learned || e.sigma.empty() || !e.predict.empty()) && !(plan.has_predictor && predicted))
            refuse(where, "numbers, since no predictor has spoken yet");
        const bool last = i + 1 == plan.evaluations.size();
        if (e.next_points() != (last ? 1 : plan.evaluations[i + 1].points()))
            refuse(where + ".coefficients", "a row for every point that is evaluated next");
        if (plan.mean.rows > 0 && e.analytic != (i == 0))
            refuse("mean", "null, unless the first evaluation and no other is analytic");
        past = e.keep;
        y_is_x = e.x_is_y;
    }
}

}  // namespace

Plan read_plan(std::string_view text) {
    const Value value = json::parse(text);
    const Entries in(value, "");
    const double version = in.number("version");
    if (in.text("format") != "amed_plan" || (version != 1 && version != 2))
        refuse("format", "\"amed_plan\" of version 1 or 2");
    in.count((version == 1 ? 9 : 10) + (in.has("sha256") ? 1 : 0));
    in.text("description");
    Plan plan;
    if (!in.is_null("guidance_scale")) plan.guidance_scale = in.number("guidance_scale");
    plan.sigmas = in.levels("sigmas", 2, kMaxEvaluations + 1);
    plan.has_predictor = !in.is_null("predictor");
    if (plan.has_predictor) plan.predictor = read_predictor(in.find("predictor"));
    for (const Value& entry : in.array("evaluations", 1, kMaxEvaluations)) {
        const std::string where = "evaluations[" + std::to_string(plan.evaluations.size()) + "]";
        plan.evaluations.push_back(read_evaluation(entry, where));
        const int points = plan.evaluations.back().points();
        plan.nfe += plan.evaluations.back().analytic ? 0 : points;
        plan.max_points = std::max(plan.max_points, points);
    }
    if (in.number("nfe") != plan.nfe) refuse("nfe", std::to_string(plan.nfe) + ", the evaluations' count");
    plan.size = in.is_null("shape") ? 0 : 1;
    if (plan.size != 0)
        for (const int extent : in.sizes("shape", 1, 8, 1)) {
            plan.size *= extent;
            if (plan.size > std::int64_t{1} << 40) refuse("shape", "at most 2^40 values");
        }
    if (version != 1 && !in.is_null("mean")) plan.mean = read_mean(in.find("mean"), plan.size);
    check(plan);
    if (in.has("sha256")) check_hash(text);
    assign_slots(plan);
    return plan;
}

}  // namespace amed
