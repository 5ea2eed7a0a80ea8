// What is thrown inside the library; api.cpp turns it into a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "amed/amed.h"

namespace amed {

struct Error : std::runtime_error {
    amed_status status;
    Error(amed_status code, const std::string& text) : std::runtime_error(text), status(code) {}
};

[[noreturn]] inline void fail(amed_status status, const std::string& text) { throw Error(status, text); }

}  // namespace amed
