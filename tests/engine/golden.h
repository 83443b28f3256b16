// smollm2_q4_1.golden, which make_goldens.py writes and describes.
#ifndef ANTIPHON_TESTS_ENGINE_GOLDEN_H_
#define ANTIPHON_TESTS_ENGINE_GOLDEN_H_

#include <algorithm>
#include <cmath>
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

struct Accuracy {
  double agreement = 0, clear_agreement = 0, kl = 0, kl_p99 = 0;
};

// The same figures as compare() of make_goldens.py.
inline Accuracy Measure(const Golden& golden, const std::vector<float>& logits) {
  std::vector<double> kls;
  size_t agree = 0, clear = 0, clear_agree = 0;
  double total = 0;
  for (size_t i = 0; i < golden.positions.size(); ++i) {
    const Golden::Position& p = golden.positions[i];
    const float* row = &logits[i * golden.vocab];
    const float* best = std::max_element(row, row + golden.vocab);
    double sum = 0;
    for (uint32_t t = 0; t < golden.vocab; ++t) sum += std::exp(double{row[t]} - double{*best});
    const double log_sum = double{*best} + std::log(sum);
    double kl = 0, covered = 0;
    for (size_t k = 0; k < p.ids.size(); ++k) {
      const double q = double{row[p.ids[k]]} - log_sum;
      kl += std::exp(double{p.logprobs[k]}) * (double{p.logprobs[k]} - q);
      covered += std::exp(q);
    }
    kl += std::exp(double{p.tail}) * (double{p.tail} - std::log(std::max(1.0 - covered, 1e-30)));
    const bool same = static_cast<size_t>(best - row) == p.ids[0];
    agree += same;
    if (p.logprobs[0] - p.logprobs[1] > 0.1f) {
      ++clear;
      clear_agree += same;
    }
    kls.push_back(kl);
    total += kl;
  }
  std::sort(kls.begin(), kls.end());
  const double n = static_cast<double>(kls.size());
  return {static_cast<double>(agree) / n,
          static_cast<double>(clear_agree) / static_cast<double>(clear), total / n,
          kls[kls.size() * 99 / 100]};
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_GOLDEN_H_
