// Launches single kernels with a grid, and arguments by value, that were chosen outside: what CuPy does.
#include "amed/combine.h"
#include "amed/midpoint.h"

namespace {

struct Frequencies {
    double values[32];
};

template <typename... Args>
int launch(void (*kernel)(Args...), const unsigned int* shape, const Args&... args) {
    emulated::Launch{{shape[0], shape[1]}, shape[2], shape[3], nullptr}(kernel, args...);
    return cudaGetLastError();
}

}  // namespace

// shape: grid x and y, threads of a block, bytes of shared memory.
extern "C" {

int launch_combine(void (*kernel)(amed::CombineArgs), const unsigned int* shape, const amed::CombineArgs* args) {
    return launch(kernel, shape, *args);
}

int launch_dot(void (*kernel)(amed::DotArgs), const unsigned int* shape, const amed::DotArgs* args) {
    return launch(kernel, shape, *args);
}

int launch_midpoint(void (*kernel)(amed::MidpointArgs, Frequencies), const unsigned int* shape,
                    const amed::MidpointArgs* args, const Frequencies* frequencies) {
    return launch(kernel, shape, *args, *frequencies);
}

}  // extern "C"
