// The border: no exception crosses it.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "error.h"
#include "json.h"
#include "plan.h"
#include "sampler.h"

struct amed_plan {
    std::shared_ptr<const amed::Plan> plan;
};

struct amed_sampler {
    std::unique_ptr<amed::Sampler> sampler;
};

namespace {

void say(amed_message* why, const char* text) {
    if (why == nullptr) return;
    std::snprintf(why->text, sizeof why->text, "%s", text);
}

template <typename Body>
amed_status guarded(amed_message* why, const Body& body) noexcept {
    say(why, "");
    try {
        body();
        return AMED_OK;
    } catch (const amed::Error& error) {
        say(why, error.what());
        return error.status;
    } catch (const std::bad_alloc&) {
        say(why, "out of memory");
        return AMED_ERROR_MEMORY;
    } catch (const std::exception& error) {
        say(why, error.what());
    } catch (...) {
        say(why, "unknown error");
    }
    return AMED_ERROR_INTERNAL;
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) amed::fail(AMED_ERROR_ARGUMENT, std::string(name) + " must not be NULL");
}

std::string read_file(const char* path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) amed::fail(AMED_ERROR_FILE, std::string(path) + ": " + std::strerror(errno));
    std::string text;
    char chunk[1 << 14];
    std::size_t count = 0;
    while ((count = std::fread(chunk, 1, sizeof chunk, file.get())) > 0 && text.size() <= amed::json::kMaxBytes)
        text.append(chunk, count);
    if (std::ferror(file.get()) != 0) amed::fail(AMED_ERROR_FILE, std::string(path) + ": it cannot be read");
    return text;
}

void parse(std::string_view text, amed_plan** plan) {
    auto made = std::make_unique<amed_plan>();
    made->plan = std::make_shared<const amed::Plan>(amed::read_plan(text));
    *plan = made.release();
}

template <typename MakeDevice>
void create(const amed_plan* plan, std::int64_t batch, std::int64_t size, amed_sampler** sampler,
            const MakeDevice& make_device) {
    require(sampler, "sampler");
    *sampler = nullptr;
    require(plan, "plan");
    auto made = std::make_unique<amed_sampler>();
    made->sampler = std::make_unique<amed::Sampler>(plan->plan, batch, size, make_device());
    *sampler = made.release();
}

}  // namespace

extern "C" {

int amed_api_version(void) { return AMED_API_VERSION; }

int amed_has_cuda(void) {
#if defined(AMED_WITH_CUDA)
    return 1;
#else
    return 0;
#endif
}

amed_status amed_plan_parse(const char* text, size_t length, amed_plan** plan, amed_message* why) {
    return guarded(why, [&] {
        require(plan, "plan");
        *plan = nullptr;
        require(text, "text");
        parse({text, length}, plan);
    });
}

amed_status amed_plan_load(const char* path, amed_plan** plan, amed_message* why) {
    return guarded(why, [&] {
        require(plan, "plan");
        *plan = nullptr;
        require(path, "path");
        parse(read_file(path), plan);
    });
}

void amed_plan_free(amed_plan* plan) { delete plan; }

int amed_plan_nfe(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->nfe; }
double amed_plan_sigma_max(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->sigmas.front(); }
double amed_plan_sigma_min(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->sigmas.back(); }
int64_t amed_plan_size(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->size; }

int amed_plan_max_points(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->max_points; }
int amed_plan_classes(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->mean.classes; }
double amed_plan_guidance_scale(const amed_plan* plan) { return plan == nullptr ? 0 : plan->plan->guidance_scale; }

int64_t amed_plan_bottleneck(const amed_plan* plan) {
    return plan == nullptr || !plan->plan->has_predictor ? 0 : plan->plan->predictor.pixels;
}

amed_status amed_sampler_create(const amed_plan* plan, int64_t batch, int64_t size, int threads, amed_sampler** sampler,
                                amed_message* why) {
    return guarded(why, [&] {
        if (threads < 1) amed::fail(AMED_ERROR_ARGUMENT, "threads must be at least 1");
        create(plan, batch, size, sampler, [&] { return amed::make_cpu_device(threads); });
    });
}

amed_status amed_sampler_create_cuda(const amed_plan* plan, int64_t batch, int64_t size, void* stream,
                                     amed_sampler** sampler, amed_message* why) {
    return guarded(why, [&] { create(plan, batch, size, sampler, [&] { return amed::make_cuda_device(stream); }); });
}

void amed_sampler_free(amed_sampler* sampler) { delete sampler; }

amed_status amed_sampler_start(amed_sampler* sampler, const float* x, amed_message* why) {
    return guarded(why, [&] {
        require(sampler, "sampler");
        require(x, "x");
        const std::lock_guard<std::mutex> held(sampler->sampler->lock());
        sampler->sampler->start(x, nullptr);
    });
}

amed_status amed_sampler_start_classes(amed_sampler* sampler, const float* x, const int32_t* classes,
                                       amed_message* why) {
    return guarded(why, [&] {
        require(sampler, "sampler");
        require(x, "x");
        require(classes, "classes");
        const std::lock_guard<std::mutex> held(sampler->sampler->lock());
        sampler->sampler->start(x, classes);
    });
}

amed_status amed_sampler_next(amed_sampler* sampler, amed_evaluation* evaluation, amed_message* why) {
    return guarded(why, [&] {
        require(sampler, "sampler");
        require(evaluation, "evaluation");
        const std::lock_guard<std::mutex> held(sampler->sampler->lock());
        const amed::Next next = sampler->sampler->next();
        *evaluation = {next.points, next.sigma, next.rows, next.index, next.done ? 1 : 0};
    });
}

amed_status amed_sampler_put(amed_sampler* sampler, const float* denoised, const float* features, int64_t channels,
                             amed_message* why) {
    return guarded(why, [&] {
        require(sampler, "sampler");
        require(denoised, "denoised");
        const std::lock_guard<std::mutex> held(sampler->sampler->lock());
        sampler->sampler->put(denoised, features, channels);
    });
}

}  // extern "C"
