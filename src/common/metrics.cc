#include "common/metrics.h"

#include <dirent.h>
#include <spdlog/fmt/fmt.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/status_macros.h"
#include "common/wire.h"

namespace antiphon {
namespace {

std::string Number(double v) {
  if (std::isnan(v)) return "NaN";
  if (std::isinf(v)) return v > 0 ? "+Inf" : "-Inf";
  return fmt::format("{}", v);
}

std::string EscapeLabel(std::string_view value) {
  std::string out;
  for (char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

// `a="b",c="d"`, by name.
std::string LabelText(Labels labels) {
  std::sort(labels.begin(), labels.end());
  std::string out;
  for (const auto& [name, value] : labels) {
    if (!out.empty()) out += ',';
    out += fmt::format("{}=\"{}\"", name, EscapeLabel(value));
  }
  return out;
}

bool ValidName(std::string_view name) {
  if (name.empty() || (name[0] >= '0' && name[0] <= '9')) return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

void Sample(std::string& out, std::string_view name, std::string_view labels, double value) {
  if (labels.empty()) {
    out += fmt::format("{} {}\n", name, Number(value));
  } else {
    out += fmt::format("{}{{{}}} {}\n", name, labels, Number(value));
  }
}

struct ProcessSample {
  double cpu_seconds = 0;
  double resident_bytes = 0;
  double virtual_bytes = 0;
  double start_time_seconds = 0;
  double open_fds = 0;
  double max_fds = 0;
};

double BootTimeSeconds() {
  std::ifstream in("/proc/stat");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("btime ", 0) == 0) return std::atof(line.c_str() + 6);
  }
  return 0;
}

// proc(5), /proc/self/stat: fields are counted behind the last ')' of the command's name.
ProcessSample ReadProcess() {
  ProcessSample sample;
  std::ifstream in("/proc/self/stat");
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  if (end != std::string::npos) {
    std::istringstream fields(text.substr(end + 1));
    std::vector<std::string> f{std::istream_iterator<std::string>(fields),
                               std::istream_iterator<std::string>()};
    if (f.size() > 21) {
      const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
      sample.cpu_seconds = (std::atof(f[11].c_str()) + std::atof(f[12].c_str())) / ticks;
      static const double boot = BootTimeSeconds();
      sample.start_time_seconds = boot + std::atof(f[19].c_str()) / ticks;
      sample.virtual_bytes = std::atof(f[20].c_str());
      sample.resident_bytes = std::atof(f[21].c_str()) * static_cast<double>(sysconf(_SC_PAGESIZE));
    }
  }
  if (DIR* dir = opendir("/proc/self/fd")) {
    int entries = 0;
    while (readdir(dir) != nullptr) ++entries;
    closedir(dir);
    sample.open_fds = entries - 3;  // ".", ".." and the directory itself
  }
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) sample.max_fds = static_cast<double>(limit.rlim_cur);
  return sample;
}

enum class Kind { kCounter, kGauge, kHistogram };
constexpr const char* kKindNames[] = {"counter", "gauge", "histogram"};

using Instrument = std::variant<Counter*, Gauge*, Histogram*, absl::AnyInvocable<double()>*>;

struct Family {
  std::string help;
  Kind kind = Kind::kCounter;
  std::map<std::string, Instrument> by_labels;
};

}  // namespace

void Counter::Add(double v) { value_.fetch_add(v, std::memory_order_relaxed); }
void Gauge::Add(double v) { value_.fetch_add(v, std::memory_order_relaxed); }

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), buckets_(bounds_.size() + 1) {
  CHECK(std::is_sorted(bounds_.begin(), bounds_.end()));
}

void Histogram::Observe(double v, uint64_t count) {
  if (std::isnan(v)) return;
  const size_t i = std::lower_bound(bounds_.begin(), bounds_.end(), v) - bounds_.begin();
  buckets_[i].fetch_add(count, std::memory_order_relaxed);
  sum_.fetch_add(v * static_cast<double>(count), std::memory_order_relaxed);
}

std::vector<double> TtftBuckets() {
  return {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
          1,     2.5,   5,    7.5,  10,   20,   30,   40,  80,   160, 640};
}
std::vector<double> TbtBuckets() {
  return {0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075,
          0.1,   0.15,   0.2,   0.3,  0.4,   0.5,  0.75,  1,    2.5,  5,    10};
}
std::vector<double> RequestSecondsBuckets() {
  return {0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5, 5,    10,
          15,   20,  30,  40,  50,  60,  120, 240, 480, 960, 1920, 7680};
}
std::vector<double> TokenCountBuckets() {
  return {1,    2,    5,    10,    20,    50,    100,    200,    500,
          1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
}
std::vector<double> TransferSecondsBuckets() {
  return {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
          0.05,   0.1,     0.25,   0.5,   1,      2.5,   5};
}

struct Registry::State {
  Labels constant_labels;
  mutable absl::Mutex mu;
  std::map<std::string, Family> families ABSL_GUARDED_BY(mu);
  // Addresses are stable: instruments are handed out by reference.
  std::deque<Counter> counters ABSL_GUARDED_BY(mu);
  std::deque<Gauge> gauges ABSL_GUARDED_BY(mu);
  std::deque<Histogram> histograms ABSL_GUARDED_BY(mu);
  std::deque<absl::AnyInvocable<double()>> functions ABSL_GUARDED_BY(mu);

  // The place of (name, labels); monostate-like nullptr Counter when it is new.
  Instrument& Slot(std::string_view name, std::string_view help, Kind kind, const Labels& labels)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    CHECK(ValidName(name));
    auto [it, added] = families.try_emplace(std::string(name));
    if (added) {
      it->second.help = std::string(help);
      it->second.kind = kind;
    }
    CHECK(it->second.kind == kind && it->second.help == help);
    Labels all = constant_labels;
    for (const auto& label : labels) {
      CHECK(ValidName(label.first));
      all.push_back(label);
    }
    return it->second.by_labels.try_emplace(LabelText(std::move(all)), Instrument()).first->second;
  }
};

Registry::Registry(Labels constant_labels) : state_(std::make_unique<State>()) {
  state_->constant_labels = std::move(constant_labels);
}
Registry::~Registry() = default;

Counter& Registry::AddCounter(std::string_view name, std::string_view help, Labels labels) {
  absl::MutexLock lock(&state_->mu);
  Instrument& slot = state_->Slot(name, help, Kind::kCounter, labels);
  if (std::get<Counter*>(slot) == nullptr) slot = &state_->counters.emplace_back();
  return *std::get<Counter*>(slot);
}

Gauge& Registry::AddGauge(std::string_view name, std::string_view help, Labels labels) {
  absl::MutexLock lock(&state_->mu);
  Instrument& slot = state_->Slot(name, help, Kind::kGauge, labels);
  if (std::holds_alternative<Counter*>(slot)) slot = &state_->gauges.emplace_back();
  CHECK(std::holds_alternative<Gauge*>(slot));
  return *std::get<Gauge*>(slot);
}

Histogram& Registry::AddHistogram(std::string_view name, std::string_view help,
                                  std::vector<double> bounds, Labels labels) {
  absl::MutexLock lock(&state_->mu);
  Instrument& slot = state_->Slot(name, help, Kind::kHistogram, labels);
  if (std::holds_alternative<Counter*>(slot)) {
    slot = &state_->histograms.emplace_back(std::move(bounds));
  }
  return *std::get<Histogram*>(slot);
}

void Registry::AddGaugeFunction(std::string_view name, std::string_view help, Labels labels,
                                absl::AnyInvocable<double()> read) {
  absl::MutexLock lock(&state_->mu);
  state_->Slot(name, help, Kind::kGauge, labels) = &state_->functions.emplace_back(std::move(read));
}

std::string Registry::Render() const {
  std::map<std::string, std::string> out;  // family name -> text
  const auto header = [](std::string_view name, std::string_view help, Kind kind) {
    return fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, help, name,
                       kKindNames[static_cast<int>(kind)]);
  };
  const std::string constant = LabelText(state_->constant_labels);
  const auto process = [&](std::string_view name, std::string_view help, Kind kind, double value) {
    std::string& text = out[std::string(name)];
    text = header(name, help, kind);
    Sample(text, name, constant, value);
  };
  const ProcessSample p = ReadProcess();
  process("process_cpu_seconds_total", "User and system CPU time.", Kind::kCounter, p.cpu_seconds);
  process("process_resident_memory_bytes", "Resident memory.", Kind::kGauge, p.resident_bytes);
  process("process_virtual_memory_bytes", "Virtual memory.", Kind::kGauge, p.virtual_bytes);
  process("process_start_time_seconds", "Start of the process since the Unix epoch.", Kind::kGauge,
          p.start_time_seconds);
  process("process_open_fds", "Open file descriptors.", Kind::kGauge, p.open_fds);
  process("process_max_fds", "Limit of open file descriptors.", Kind::kGauge, p.max_fds);
  {
    Labels labels = state_->constant_labels;
    labels.emplace_back("version", kVersion);
    labels.emplace_back("compiler", __VERSION__);
    std::string& text = out["antiphon_build_info"];
    text = header("antiphon_build_info", "Version of this program; always 1.", Kind::kGauge);
    Sample(text, "antiphon_build_info", LabelText(std::move(labels)), 1);
  }

  absl::MutexLock lock(&state_->mu);
  for (auto& [name, family] : state_->families) {
    std::string& text = out[name];
    text = header(name, family.help, family.kind);
    for (auto& [labels, instrument] : family.by_labels) {
      if (auto* counter = std::get_if<Counter*>(&instrument)) {
        Sample(text, name, labels, (*counter)->value());
      } else if (auto* gauge = std::get_if<Gauge*>(&instrument)) {
        Sample(text, name, labels, (*gauge)->value());
      } else if (auto* read = std::get_if<absl::AnyInvocable<double()>*>(&instrument)) {
        Sample(text, name, labels, (**read)());
      } else {
        const Histogram& h = *std::get<Histogram*>(instrument);
        const std::string prefix = labels.empty() ? "" : labels + ",";
        uint64_t total = 0;
        for (size_t i = 0; i <= h.bounds_.size(); ++i) {
          total += h.buckets_[i].load(std::memory_order_relaxed);
          const std::string le = i < h.bounds_.size() ? Number(h.bounds_[i]) : "+Inf";
          Sample(text, name + "_bucket", fmt::format("{}le=\"{}\"", prefix, le),
                 static_cast<double>(total));
        }
        Sample(text, name + "_sum", labels, h.sum_.load(std::memory_order_relaxed));
        Sample(text, name + "_count", labels, static_cast<double>(total));
      }
    }
  }
  std::string page;
  for (const auto& [name, text] : out) page += text;
  return page;
}

}  // namespace antiphon
