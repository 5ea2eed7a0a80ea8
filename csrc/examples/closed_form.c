/* Five evaluations without Python: a plan, and the exact denoiser of unit Gaussian data, D = x / (1 + sigma^2).
 *
 *     cc closed_form.c $(pkg-config --cflags --libs amed) -lm -o closed_form
 *     ./closed_form plan.json noise.f32 sample.f32 BATCH
 *
 * noise.f32 holds BATCH samples of unit variance as raw float32; the samples are written the same way. */
#include <stdio.h>
#include <stdlib.h>

#include "amed/amed.h"

static void check(amed_status status, const amed_message* why) {
    if (status == AMED_OK) return;
    fprintf(stderr, "error %d: %s\n", (int)status, why->text);
    exit(EXIT_FAILURE);
}

static void* need(void* pointer, const char* what) {
    if (pointer != NULL) return pointer;
    perror(what);
    exit(EXIT_FAILURE);
}

/* The host's network: any function of (points, sigma). */
static void denoise(const amed_evaluation* at, size_t size, float* denoised) {
    for (int64_t row = 0; row < at->rows; ++row) {
        const float square = at->sigma[row] * at->sigma[row], variance = 1 + square;
        for (size_t i = 0; i < size; ++i)
            denoised[(size_t)row * size + i] = at->points[(size_t)row * size + i] / variance;
    }
}

/* The file's values; their number must be a multiple of batch. */
static float* read_noise(const char* path, size_t batch, size_t* size) {
    FILE* file = need(fopen(path, "rb"), path);
    fseek(file, 0, SEEK_END);
    const size_t values = (size_t)ftell(file) / sizeof(float);
    rewind(file);
    float* noise = need(malloc(values * sizeof(float)), "noise");
    if (batch == 0 || values == 0 || values % batch != 0 || fread(noise, sizeof(float), values, file) != values) {
        fprintf(stderr, "%s does not hold %zu samples\n", path, batch);
        exit(EXIT_FAILURE);
    }
    fclose(file);
    *size = values / batch;
    return noise;
}

static void run(amed_sampler* sampler, const float* x, size_t batch, size_t size, const char* path) {
    amed_message why;
    amed_evaluation at;
    float* denoised = NULL;
    check(amed_sampler_start(sampler, x, &why), &why);
    for (;;) {
        check(amed_sampler_next(sampler, &at, &why), &why);
        if (at.done) break;
        denoised = need(realloc(denoised, (size_t)at.rows * size * sizeof(float)), "denoised");
        denoise(&at, size, denoised);
        check(amed_sampler_put(sampler, denoised, NULL, 0, &why), &why);
    }
    FILE* file = need(fopen(path, "wb"), path);
    if (fwrite(at.points, sizeof(float), batch * size, file) != batch * size || fclose(file) != 0) {
        perror(path);
        exit(EXIT_FAILURE);
    }
    printf("%d calls of the network, %lld samples\n", at.index, (long long)at.rows);
    free(denoised);
}

int main(int count, char** arguments) {
    amed_message why;
    amed_plan* plan;
    amed_sampler* sampler;
    size_t size;
    if (count != 5) {
        fprintf(stderr, "usage: %s plan.json noise.f32 sample.f32 batch\n", arguments[0]);
        return EXIT_FAILURE;
    }
    const size_t batch = strtoul(arguments[4], NULL, 10);
    float* x = read_noise(arguments[2], batch, &size);
    check(amed_plan_load(arguments[1], &plan, &why), &why);
    const float scale = (float)amed_plan_sigma_max(plan);
    for (size_t i = 0; i < batch * size; ++i) x[i] *= scale;
    check(amed_sampler_create(plan, (int64_t)batch, (int64_t)size, 1, &sampler, &why), &why);
    amed_plan_free(plan);
    run(sampler, x, batch, size, arguments[3]);
    amed_sampler_free(sampler);
    free(x);
    return EXIT_SUCCESS;
}
