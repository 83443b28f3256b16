# room_library(NAME SOURCES ... DEPS ...)   one static library per folder: antiphon_NAME
# room_binary(NAME SOURCES ... DEPS ...)    an installed program
# room_test(NAME SOURCES ... DEPS ... [LABELS unit] [PURE])   a GoogleTest program run by ctest; PURE
#   ones (no gRPC, no other process) also run with sanitizers: target pure_tests, label pure
# room_bench(NAME SOURCES ... DEPS ...)     a Google Benchmark program, built and never run by ctest
# room_fuzz(NAME SOURCES ... DEPS ...)      a libFuzzer target with clang, else a corpus replayer
#   fuzz targets are PURE
# DEPS name rooms (common, model, ...) or CMake targets.

include(GNUInstallDirs)
include(CheckCXXCompilerFlag)
find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(spdlog REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(Boost 1.81 REQUIRED COMPONENTS headers)

set(ANTIPHON_SANITIZE "" CACHE STRING "comma-separated sanitizers, e.g. address,undefined")

add_library(antiphon_options INTERFACE)
target_compile_options(antiphon_options INTERFACE -Wall -Wextra -Wno-unused-parameter
                       -Wno-missing-field-initializers -fno-omit-frame-pointer)
target_include_directories(antiphon_options INTERFACE ${CMAKE_SOURCE_DIR}/src)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(antiphon_options INTERFACE -Wthread-safety)
endif()
if(ANTIPHON_SANITIZE)
  add_compile_options(-fsanitize=${ANTIPHON_SANITIZE} -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${ANTIPHON_SANITIZE})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    add_compile_options(-fsanitize=fuzzer-no-link)  # libFuzzer is blind without coverage counters
  endif()
endif()

function(_antiphon_deps target visibility)
  foreach(dep IN LISTS ARGN)
    if(TARGET antiphon_${dep})
      target_link_libraries(${target} ${visibility} antiphon_${dep})
    else()
      target_link_libraries(${target} ${visibility} ${dep})
    endif()
  endforeach()
endfunction()

function(room_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(antiphon_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(antiphon_${name} PUBLIC antiphon_options Threads::Threads)
  _antiphon_deps(antiphon_${name} PUBLIC ${ARG_DEPS})
  if(ANTIPHON_TESTS AND NOT ANTIPHON_SANITIZE)
    # All of the library with what it declares and nothing else: a dependency that is used and not
    # declared does not link.
    add_executable(link_${name} ${CMAKE_SOURCE_DIR}/tests/lint/link_main.cc)
    target_link_libraries(link_${name} PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,antiphon_${name}>)
    add_test(NAME link_${name} COMMAND link_${name})
    set_tests_properties(link_${name} PROPERTIES LABELS tidy)
  endif()
endfunction()

function(room_binary name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE antiphon_options)
  _antiphon_deps(${name} PRIVATE ${ARG_DEPS})
  install(TARGETS ${name} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()

add_custom_target(pure_tests)

function(room_test name)
  cmake_parse_arguments(ARG "PURE" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  find_package(GTest REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE antiphon_options GTest::gmock GTest::gtest GTest::gtest_main)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  _antiphon_deps(${name} PRIVATE ${ARG_DEPS})
  if(ARG_PURE)
    add_dependencies(pure_tests ${name})
    list(APPEND ARG_LABELS pure)
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
                       SKIP_RETURN_CODE 77)
endfunction()

function(room_bench name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  find_package(benchmark REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE antiphon_options benchmark::benchmark)
  _antiphon_deps(${name} PRIVATE ${ARG_DEPS})
endfunction()

function(room_fuzz name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE antiphon_options)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  _antiphon_deps(${name} PRIVATE ${ARG_DEPS})
  add_dependencies(pure_tests ${name})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND ANTIPHON_SANITIZE)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    set(ANTIPHON_FUZZ_SECONDS 20 CACHE STRING "seconds each fuzz target runs under ctest")
    add_test(NAME ${name} COMMAND ${name} -max_total_time=${ANTIPHON_FUZZ_SECONDS} -timeout=10
             -rss_limit_mb=2048 -print_final_stats=1
             ${CMAKE_BINARY_DIR}/corpus/${name} ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${name})
    file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/corpus/${name})
  else()
    target_sources(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.cc)
    add_test(NAME ${name} COMMAND ${name} ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${name})
  endif()
  set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT 120)
endfunction()
