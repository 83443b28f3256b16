// Configuration files from hostile bytes: what is accepted must print and read back as itself.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "common/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > (1 << 16)) return 0;
  const std::string text(reinterpret_cast<const char*>(data), size);
  (void)antiphon::ParseDuration(text);
  (void)antiphon::ParseByteSize(text);
  const auto config = antiphon::ParseConfig(text, "f");
  if (!config.ok()) {
    if (config.status().message().empty()) std::abort();
    return 0;
  }
  const std::string printed = config->Print();
  const auto again = antiphon::ParseConfig(printed, "g");
  if (!again.ok()) {
    std::fprintf(stderr, "%s\n%s", std::string(again.status().message()).c_str(), printed.c_str());
    std::abort();
  }
  return 0;
}
