// run_package LOOP.pt2 SAMPLES.npy [--class K] SEED...: the samples of these seeds, those that amed_engine draws in
// Python.
//
// LOOP.pt2 is what Sampler.export wrote: latents (B, C, H, W) of unit variance and, for a conditional model, labels
// (B, label_dim) go in, images come out. What it wants stands in its metadata; solver, noise levels and guidance are
// part of it. The graph does not check its inputs. Without --class each sample's label comes from its seed.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

struct Facts {
    std::vector<int64_t> shape;  // (C, H, W)
    int64_t label_dim;           // 0: the loop takes no labels
    int64_t max_batch;
    at::ScalarType dtype;
    at::Device device;
};

Facts read_facts(const std::unordered_map<std::string, std::string>& metadata) {
    auto text = [&](const std::string& name) {
        const auto found = metadata.find("amed_engine." + name);
        if (found == metadata.end()) throw std::runtime_error("the package does not say its " + name);
        return found->second;
    };
    Facts facts{{}, std::stoll(text("label_dim")), std::stoll(text("max_batch")), at::kFloat, text("device")};
    if (text("dtype") == "float64") facts.dtype = at::kDouble;
    std::istringstream sizes(text("shape"));
    for (int64_t size; sizes >> size;) facts.shape.push_back(size);
    return facts;
}

struct Wishes {
    std::string package, samples;
    std::vector<uint64_t> seeds;
    std::optional<int64_t> label;
};

// Digits alone: std::stoull would take "-1", " 7" and "7x".
uint64_t read_number(const std::string& text, uint64_t limit, const std::string& what) {
    const bool digits = !text.empty() && text.size() <= 10 && text.find_first_not_of("0123456789") == std::string::npos;
    const uint64_t value = digits ? std::stoull(text) : 0;
    if (!digits || value >= limit)
        throw std::invalid_argument(what + " must be a whole number below " + std::to_string(limit) + ", got '" + text +
                                    "'");
    return value;
}

Wishes read_arguments(const std::vector<std::string>& arguments) {
    constexpr uint64_t kLimit = uint64_t{1} << 32;  // of seeds: beyond, torch's generator repeats itself
    Wishes wishes{arguments.at(0), arguments.at(1), {}, {}};
    for (size_t k = 2; k < arguments.size(); ++k) {
        if (arguments[k] != "--class")
            wishes.seeds.push_back(read_number(arguments[k], kLimit, "a seed"));
        else
            wishes.label = read_number(k + 1 < arguments.size() ? arguments[++k] : "", kLimit, "--class");
    }
    if (wishes.seeds.empty()) throw std::invalid_argument("no seeds: give one for every sample");
    return wishes;
}

void check(const Wishes& wishes, const Facts& facts) {
    if (!wishes.label) return;
    if (facts.label_dim == 0)
        throw std::invalid_argument("--class is for a conditional model, this one takes no labels");
    if (*wishes.label >= facts.label_dim)
        throw std::invalid_argument("--class must be below " + std::to_string(facts.label_dim));
}

// Noise and then the label come from a generator of the seed's own, as in Python: a sample does not depend on its
// batch.
std::vector<at::Tensor> draw(const std::vector<uint64_t>& seeds, std::optional<int64_t> label, const Facts& facts) {
    std::vector<at::Tensor> noise, labels;
    for (const uint64_t seed : seeds) {
        auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
        noise.push_back(at::randn(facts.shape, generator));
        if (facts.label_dim == 0) continue;
        const at::Tensor drawn = at::randint(facts.label_dim, {}, generator, at::kLong);
        labels.push_back(label ? at::full_like(drawn, *label) : drawn);
    }
    const auto options = at::TensorOptions(facts.device).dtype(facts.dtype);
    std::vector<at::Tensor> inputs{at::stack(noise).to(options)};
    if (facts.label_dim) inputs.push_back(at::one_hot(at::stack(labels), facts.label_dim).to(options));
    return inputs;
}

// NumPy's own format: numpy.load reads it.
void save(const std::string& path, const at::Tensor& images) {
    std::ostringstream header;
    header << "{'descr': '<f" << images.element_size() << "', 'fortran_order': False, 'shape': (";
    for (const int64_t size : images.sizes()) header << size << ", ";
    header << "), }";
    std::string text = header.str();
    text.resize((text.size() + 10) / 64 * 64 + 64 - 10, ' ');  // magic, length and text fill whole lines of 64 bytes
    text.back() = '\n';
    const char length[] = {static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)};
    std::ofstream file(path, std::ios::binary);
    file.write("\x93NUMPY\x01\x00", 8).write(length, 2) << text;
    file.write(static_cast<const char*>(images.data_ptr()), images.nbytes());
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

int run(const std::vector<std::string>& arguments) {
    if (arguments.size() < 3) {
        std::cerr << "usage: run_package LOOP.pt2 SAMPLES.npy [--class K] SEED...\n";
        return 2;
    }
    const Wishes wishes = read_arguments(arguments);
    const std::vector<uint64_t>& seeds = wishes.seeds;
    c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader loader(wishes.package);
    const Facts facts = read_facts(loader.get_metadata());
    check(wishes, facts);
    std::vector<at::Tensor> images;
    for (size_t start = 0; start < seeds.size(); start += facts.max_batch) {
        const size_t stop = std::min(seeds.size(), start + facts.max_batch);
        images.push_back(loader.run(draw({seeds.begin() + start, seeds.begin() + stop}, wishes.label, facts)).at(0));
    }
    const at::Tensor samples = at::cat(images).cpu().contiguous();
    save(wishes.samples, samples);
    std::cout << samples.size(0) << " samples of " << facts.shape << " in " << wishes.samples << "\n";
    return 0;
}

int main(int argc, char** argv) {
    try {
        return run({argv + 1, argv + argc});
    } catch (const c10::Error& error) {
        std::cerr << "run_package: " << error.what_without_backtrace() << "\n";
        return 1;
    } catch (const std::exception& error) {
        std::cerr << "run_package: " << error.what() << "\n";
        return 1;
    }
}
