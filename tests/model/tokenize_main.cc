// tokenize MODEL [plain] < TEXTS > IDS
// Every text on standard input is a 32-bit little-endian length and that many bytes; the answer
// to each is a line of ids. `plain` turns parse_special off. With `speed` instead, standard input
// is one text and the answer is megabytes a second.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <string>

#include "antiphon/v1/model.pb.h"
#include "model/model_file.h"
#include "model/tokenizer.h"

int main(int argc, char** argv) {
  using antiphon::model::Tokenizer;
  if (argc < 2) {
    std::fprintf(stderr, "usage: tokenize MODEL [plain|speed]\n");
    return 64;
  }
  const std::string mode = argc > 2 ? argv[2] : "";
  const auto file = antiphon::model::OpenModelFile(argv[1]);
  if (!file.ok()) {
    std::cerr << file.status() << "\n";
    return 1;
  }
  const auto spec = antiphon::model::TokenizerSpecOf(**file);
  if (!spec.ok()) {
    std::cerr << spec.status() << "\n";
    return 1;
  }
  const auto tokenizer = Tokenizer::Create(*spec);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status() << "\n";
    return 1;
  }
  const std::string input((std::istreambuf_iterator<char>(std::cin)),
                          std::istreambuf_iterator<char>());
  const Tokenizer::EncodeOptions options{.add_bos = false, .parse_special = mode != "plain"};
  if (mode == "speed") {
    for (int round = 0; round < 4; ++round) {
      const auto start = std::chrono::steady_clock::now();
      const auto ids = (*tokenizer)->Encode(input, options);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      if (!ids.ok()) return 1;
      std::printf("%zu bytes, %zu tokens, %.2f MB/s\n", input.size(), ids->size(),
                  static_cast<double>(input.size()) / took.count() / 1e6);
    }
    return 0;
  }
  for (size_t at = 0; at + 4 <= input.size();) {
    uint32_t size = 0;
    std::memcpy(&size, input.data() + at, 4);
    at += 4;
    if (size > input.size() - at) return 64;
    const auto ids = (*tokenizer)->Encode(std::string_view(input).substr(at, size), options);
    at += size;
    if (!ids.ok()) {
      std::cout << ids.status() << "\n";
      continue;
    }
    std::string line;
    for (const uint32_t id : *ids) line += std::to_string(id) + " ";
    std::cout << line << "\n";
  }
  return 0;
}
