# find_package(amed CONFIG) with -Damed_DIR=$(python -c "import amed_engine; print(amed_engine.get_cmake_dir())")
get_filename_component(_amed_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_amed_root}/lib/libamed.so")
  set(amed_FOUND FALSE)
  set(amed_NOT_FOUND_MESSAGE "libamed.so was not built; install amed-engine where a C++ compiler is found")
  return()
endif()
if(NOT TARGET amed::amed)
  add_library(amed::amed SHARED IMPORTED)
  set_target_properties(
    amed::amed PROPERTIES IMPORTED_LOCATION "${_amed_root}/lib/libamed.so"
                          INTERFACE_INCLUDE_DIRECTORIES "${_amed_root}/include")
endif()
unset(_amed_root)
