// Metrics in Prometheus' text format. Instruments are created once, at start, with all the label
// values they will ever have; updating one is an atomic add and never blocks.
//
//   Registry registry(Labels{{"daemon", "gateway"}});
//   Counter& tokens = registry.AddCounter("antiphon_output_tokens_total", "Tokens sent.",
//                                         {{"model", "smollm2"}});
//   tokens.Add(3);
//
// Names and buckets: notes of the surface, checked with `promtool check metrics` in the tests.
#ifndef ANTIPHON_COMMON_METRICS_H_
#define ANTIPHON_COMMON_METRICS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/types/span.h"

namespace antiphon {

using Labels = std::vector<std::pair<std::string, std::string>>;

// All instruments are thread-safe and live as long as their registry.
class Counter {
 public:
  void Add(double v = 1);
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
};

class Gauge {
 public:
  void Set(double v) { value_.store(v, std::memory_order_relaxed); }
  void Add(double v);
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
};

class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);  // ascending upper bounds, +Inf implied
  void Observe(double v, uint64_t count = 1);

 private:
  friend class Registry;
  std::vector<double> bounds_;
  std::vector<std::atomic<uint64_t>> buckets_;
  std::atomic<double> sum_{0};
};

// Standard bounds, in seconds or tokens.
std::vector<double> TtftBuckets();
std::vector<double> TbtBuckets();
std::vector<double> RequestSecondsBuckets();
std::vector<double> TokenCountBuckets();
std::vector<double> TransferSecondsBuckets();

// Thread-safe. The same (name, labels) twice returns the same instrument; the same name with
// another help text or kind is a programmer's error.
class Registry {
 public:
  explicit Registry(Labels constant_labels);
  ~Registry();

  Counter& AddCounter(std::string_view name, std::string_view help, Labels labels = {});
  Gauge& AddGauge(std::string_view name, std::string_view help, Labels labels = {});
  Histogram& AddHistogram(std::string_view name, std::string_view help, std::vector<double> bounds,
                          Labels labels = {});
  // Called at every scrape; must be quick and thread-safe.
  void AddGaugeFunction(std::string_view name, std::string_view help, Labels labels,
                        absl::AnyInvocable<double()> read);

  // Text format 0.0.4, families sorted by name; process_* and antiphon_build_info included.
  std::string Render() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_METRICS_H_
