// RETURN_IF_ERROR(expr), ASSIGN_OR_RETURN(lhs, expr) and CHECK(cond): upstream Abseil's names and
// meaning, absent from Debian 12's Abseil (20220623). An upgrade deletes this file.
#ifndef ANTIPHON_COMMON_STATUS_MACROS_H_
#define ANTIPHON_COMMON_STATUS_MACROS_H_

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define ANTIPHON_CONCAT_INNER_(a, b) a##b
#define ANTIPHON_CONCAT_(a, b) ANTIPHON_CONCAT_INNER_(a, b)

#define RETURN_IF_ERROR(expr)                                                           \
  do {                                                                                  \
    if (absl::Status status_macro_ = (expr); !status_macro_.ok()) return status_macro_; \
  } while (false)

#define ASSIGN_OR_RETURN(lhs, expr) \
  ASSIGN_OR_RETURN_IMPL_(ANTIPHON_CONCAT_(status_or_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_IMPL_(var, lhs, expr)   \
  auto var = (expr);                             \
  if (!var.ok()) return std::move(var).status(); \
  lhs = *std::move(var)

// For programmer errors only, never for input or peers. Stays on in release.
#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) [[unlikely]] {                                                     \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

#endif  // ANTIPHON_COMMON_STATUS_MACROS_H_
