// smollm2_q4_1.golden, which make_goldens.py writes and describes.
#ifndef ANTIPHON_TESTS_ENGINE_GOLDEN_H_
#define ANTIPHON_TESTS_ENGINE_GOLDEN_H_

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace antiphon::engine {

struct Golden {
  struct Position {
    std::vector<uint16_t> ids;    // best first
    std::vector<float> logprobs;  // of the ids
    float tail;                   // logarithm of the mass of all others
  };
  uint32_t vocab = 0;
  std::vector<uint32_t> tokens;
  std::vector<Position> positions;
};

// Without tokens when the file is missing or is not one.
inline Golden ReadGolden() {
  std::ifstream in(std::string(ANTIPHON_ENGINE_TESTS) + "/smollm2_q4_1.golden", std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (bytes.size() < 20 || bytes.substr(0, 8) != "AGOLDEN1") return {};
  const char* at = bytes.data() + 8;
  const auto read = [&](void* out, size_t size) {
    std::memcpy(out, at, size);
    at += size;
  };
  Golden golden;
  uint32_t count, top;
  read(&count, 4);
  read(&top, 4);
  read(&golden.vocab, 4);
  if (bytes.size() != 20 + size_t{count} * (4 + 6 * size_t{top} + 4)) return {};
  golden.tokens.resize(count);
  golden.positions.resize(count);
  read(golden.tokens.data(), size_t{count} * 4);
  for (Golden::Position& position : golden.positions) {
    position.ids.resize(top);
    position.logprobs.resize(top);
    read(position.ids.data(), size_t{top} * 2);
    read(position.logprobs.data(), size_t{top} * 4);
    read(&position.tail, 4);
  }
  return golden;
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_GOLDEN_H_
