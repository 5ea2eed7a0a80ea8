/* The C API: a host that owns its network samples by a plan that amed_engine wrote ("amed export --format plan").
 *
 *     amed_plan_load("plan.json", &plan, &why);
 *     amed_sampler_create(plan, batch, size, 1, &sampler, &why);
 *     amed_sampler_start(sampler, noise, &why);                       noise times amed_plan_sigma_max(plan)
 *     for (;;) {
 *         amed_sampler_next(sampler, &at, &why);
 *         if (at.done) break;                                         at.points is the sample
 *         my_network(at.points, at.sigma, at.rows, denoised);
 *         amed_sampler_put(sampler, denoised, NULL, 0, &why);
 *     }
 *
 * Every function that can fail returns AMED_OK or what went wrong, with a sentence in `why`, which may be NULL. No
 * exception and no global state crosses this border. A plan does not change once loaded and may be shared by threads
 * and outlived by its samplers; calls on one sampler wait for each other, different samplers do not. Needs neither
 * torch nor Python.
 */
#ifndef AMED_AMED_H
#define AMED_AMED_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define AMED_API __declspec(dllexport)
#elif defined(__GNUC__)
#define AMED_API __attribute__((visibility("default")))
#else
#define AMED_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define AMED_API_VERSION 1

typedef enum amed_status {
    AMED_OK = 0,
    AMED_ERROR_ARGUMENT = 1,    /* a null pointer, a size that cannot be */
    AMED_ERROR_FORMAT = 2,      /* a plan that is not one */
    AMED_ERROR_FILE = 3,        /* a file that cannot be read */
    AMED_ERROR_STATE = 4,       /* a call out of order */
    AMED_ERROR_MEMORY = 5,      /* no memory */
    AMED_ERROR_UNSUPPORTED = 6, /* not in this build, or not on this device */
    AMED_ERROR_DEVICE = 7,      /* CUDA refused */
    AMED_ERROR_INTERNAL = 8
} amed_status;

/* Why a call failed; empty after AMED_OK. */
typedef struct amed_message {
    char text[512];
} amed_message;

typedef struct amed_plan amed_plan;
typedef struct amed_sampler amed_sampler;

/* What the network is to be asked for next, or the sample. Memory of the sampler, valid until the next call that
 * changes it; device memory for a sampler on a stream. */
typedef struct amed_evaluation {
    const float* points; /* (rows, size) */
    const float* sigma;  /* (rows): noise levels as told to the network; NULL when done */
    int64_t rows;        /* batch, or several points of every sample, first points of all samples first */
    int32_t index;       /* counts the calls of the network from 0 */
    int32_t done;        /* 1: nothing to ask for, points is the sample (batch, size) */
} amed_evaluation;

AMED_API int amed_api_version(void);
/* Whether this build has CUDA. */
AMED_API int amed_has_cuda(void);

/* A plan from JSON text of `length` bytes, or from a file. Free it with amed_plan_free. */
AMED_API amed_status amed_plan_parse(const char* text, size_t length, amed_plan** plan, amed_message* why);
AMED_API amed_status amed_plan_load(const char* path, amed_plan** plan, amed_message* why);
AMED_API void amed_plan_free(amed_plan* plan);

/* Facts of a plan; 0 for a null pointer. */
AMED_API int amed_plan_nfe(const amed_plan* plan);
AMED_API double amed_plan_sigma_max(const amed_plan* plan);
AMED_API double amed_plan_sigma_min(const amed_plan* plan);
/* Values of one sample, 0 where the plan is for any; whether a predictor reads the network's bottleneck, and its h * w.
 */
AMED_API int64_t amed_plan_size(const amed_plan* plan);
AMED_API int64_t amed_plan_bottleneck(const amed_plan* plan);
/* Points of every sample that one evaluation may ask for: `rows` is at most batch times this. */
AMED_API int amed_plan_max_points(const amed_plan* plan);
/* The classifier-free guidance that the host's network is to be under: g in D_u + g (D_c - D_u), 1 for none. */
AMED_API double amed_plan_guidance_scale(const amed_plan* plan);
/* Classes whose means the plan begins with: where it is not 0, amed_sampler_start_classes takes the place of
 * amed_sampler_start. */
AMED_API int amed_plan_classes(const amed_plan* plan);

/* A sampler for `batch` samples of `size` values on the CPU, with at most `threads` threads. */
AMED_API amed_status amed_sampler_create(const amed_plan* plan, int64_t batch, int64_t size, int threads,
                                         amed_sampler** sampler, amed_message* why);
/* The same on the current CUDA device: every pointer is device memory, work is queued on `stream` (a cudaStream_t, NULL
 * for the default one) and nothing waits for it after this call. AMED_ERROR_UNSUPPORTED in a build without CUDA. */
AMED_API amed_status amed_sampler_create_cuda(const amed_plan* plan, int64_t batch, int64_t size, void* stream,
                                              amed_sampler** sampler, amed_message* why);
AMED_API void amed_sampler_free(amed_sampler* sampler);

/* Begin, or begin again, from x (batch, size) of noise level amed_plan_sigma_max; copied. */
AMED_API amed_status amed_sampler_start(amed_sampler* sampler, const float* x, amed_message* why);
/* The same for a plan of amed_plan_classes classes: classes (batch), the class of each sample from 0, -1 for none; read
 * once, as x is. A class that the plan does not have is AMED_ERROR_ARGUMENT on the CPU; on a stream, where classes is
 * device memory and cannot be looked at, its sample is NaN. */
AMED_API amed_status amed_sampler_start_classes(amed_sampler* sampler, const float* x, const int32_t* classes,
                                                amed_message* why);
/* What to evaluate next. Asking twice gives the same answer. */
AMED_API amed_status amed_sampler_next(amed_sampler* sampler, amed_evaluation* evaluation, amed_message* why);
/* Go on with the network's answer `denoised` (rows, size), its estimate of the clean data. features: the bottleneck
 * (batch, channels, h * w) that a predictor reads, or NULL and 0 for a network without one. */
AMED_API amed_status amed_sampler_put(amed_sampler* sampler, const float* denoised, const float* features,
                                      int64_t channels, amed_message* why);

#ifdef __cplusplus
}
#endif

#endif
