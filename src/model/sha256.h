// SHA-256 as lower-case hexadecimal.
#ifndef ANTIPHON_MODEL_SHA256_H_
#define ANTIPHON_MODEL_SHA256_H_

#include <string>
#include <string_view>

struct evp_md_ctx_st;

namespace antiphon::model {

// Of bytes that come in pieces. Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256& Add(std::string_view bytes);
  std::string Hex();  // once, after all of Add

 private:
  evp_md_ctx_st* context_;
};

inline std::string Sha256Hex(std::string_view bytes) { return Sha256().Add(bytes).Hex(); }

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_SHA256_H_
