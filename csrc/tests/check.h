// A check that reports and goes on; main() turns the count into the exit status.
#pragma once

#include <cstdio>

extern int failures;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
            ++failures;                                                 \
        }                                                               \
    } while (false)

void test_half();
void test_bfloat();
