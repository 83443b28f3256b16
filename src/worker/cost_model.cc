#include "worker/cost_model.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "common/shared_memory.h"
#include "common/status_macros.h"

namespace antiphon::worker {
namespace {

namespace wire = ::antiphon::internal::v1;

constexpr double kSecondsFloor = 1e-9;
// A probe that took longer ends the row of ever larger ones.
constexpr absl::Duration kProbeMax = absl::Seconds(1);
// Where transfer between hosts is not measured: 10 Gbit/s.
constexpr double kTransferBytesPerSecond = 1.25e9;
// Weight of one step in the refined ratio: a few dozen steps forget an old load.
constexpr double kRefineWeight = 0.05;

// Solves the normal equations over the coefficients in `active`; the others stay at their floor.
std::optional<std::array<double, 3>> Solve(const std::vector<Observation>& observations,
                                           const std::array<double, 3>& floor, unsigned active) {
  double a[3][4] = {};
  for (const Observation& o : observations) {
    const double weight = 1 / std::max(o.seconds * o.seconds, 1e-18);
    double rest = o.seconds;
    for (int i = 0; i < 3; ++i) {
      if ((active >> i & 1) == 0) rest -= floor[i] * o.terms[i];
    }
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) a[i][j] += weight * o.terms[i] * o.terms[j];
      a[i][3] += weight * o.terms[i] * rest;
    }
  }
  for (int i = 0; i < 3; ++i) {
    if (active >> i & 1) continue;
    for (int j = 0; j < 4; ++j) a[i][j] = 0;
    for (int j = 0; j < 3; ++j) a[j][i] = 0;
    a[i][i] = 1;
    a[i][3] = floor[i];
  }
  // Scale each unknown to 1 on the diagonal, so that pivots compare across units.
  double scale[3];
  for (int i = 0; i < 3; ++i) {
    if (a[i][i] <= 0) return std::nullopt;
    scale[i] = 1 / std::sqrt(a[i][i]);
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) a[i][j] *= scale[i] * scale[j];
    a[i][3] *= scale[i];
  }
  for (int column = 0; column < 3; ++column) {
    int pivot = column;
    for (int i = column + 1; i < 3; ++i) {
      if (std::abs(a[i][column]) > std::abs(a[pivot][column])) pivot = i;
    }
    if (std::abs(a[pivot][column]) < 1e-9) return std::nullopt;
    std::swap(a[column], a[pivot]);
    for (int i = 0; i < 3; ++i) {
      if (i == column) continue;
      const double factor = a[i][column] / a[column][column];
      for (int j = column; j < 4; ++j) a[i][j] -= factor * a[column][j];
    }
  }
  std::array<double, 3> x;
  for (int i = 0; i < 3; ++i) x[i] = a[i][3] / a[i][i] * scale[i];
  return x;
}

double Error(const std::vector<Observation>& observations, const std::array<double, 3>& x) {
  double sum = 0;
  for (const Observation& o : observations) {
    double predicted = 0;
    for (int i = 0; i < 3; ++i) predicted += x[i] * o.terms[i];
    const double relative = (predicted - o.seconds) / std::max(o.seconds, kSecondsFloor);
    sum += relative * relative;
  }
  return sum;
}

// Scratch blocks and the steps over them.
class Probe {
 public:
  Probe(engine::ModelRunner& runner, const Clock& clock)
      : runner_(runner),
        clock_(clock),
        layout_(runner.layout()),
        tokens_(runner.shape().context, 0) {}

  // Seconds of one step; `rows` chunks of `tokens` tokens each, behind `context` tokens.
  absl::StatusOr<double> Run(uint32_t rows, uint32_t tokens, uint32_t context) {
    const uint32_t shared = context / layout_.block_tokens;
    const uint32_t own = layout_.BlocksFor(context + tokens) - shared;
    RETURN_IF_ERROR(Grow(shared + rows * own));
    std::vector<std::vector<std::byte*>> blocks(rows);
    engine::Step step;
    const engine::SamplingParams greedy{.temperature = 0};
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t i = 0; i < shared; ++i) blocks[row].push_back(Block(i));
      for (uint32_t i = 0; i < own; ++i) blocks[row].push_back(Block(shared + row * own + i));
      step.chunks.push_back({.sequence = row,
                             .tokens = absl::MakeConstSpan(tokens_).first(tokens),
                             .start = context,
                             .blocks = blocks[row],
                             .sample = engine::SampleRequest{.params = &greedy}});
    }
    const absl::Time begin = clock_.Now();
    RETURN_IF_ERROR(runner_.Submit(std::move(step)));
    engine::StepProgress progress;
    while (!progress.finished) progress = runner_.Await(progress, absl::Seconds(1));
    RETURN_IF_ERROR(runner_.Take().status());
    return std::max(absl::ToDoubleSeconds(clock_.Now() - begin), kSecondsFloor);
  }

  // The engine must let go of the blocks before they go.
  absl::Status End() { return runner_.UsePool({}); }

 private:
  // What the blocks held is lost, and was of no use.
  absl::Status Grow(size_t count) {
    const size_t bytes = count * layout_.payload_bytes();
    if (bytes <= memory_.bytes()) return absl::OkStatus();
    ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Create("antiphon-probe", bytes));
    RETURN_IF_ERROR(runner_.UsePool({memory.data(), memory.bytes(), memory.fd()}));
    memory_ = std::move(memory);
    return absl::OkStatus();
  }
  std::byte* Block(size_t index) const { return memory_.data() + index * layout_.payload_bytes(); }

  engine::ModelRunner& runner_;
  const Clock& clock_;
  const KvLayout layout_;
  SharedMemory memory_;
  std::vector<uint32_t> tokens_;
};

}  // namespace

std::array<double, 3> FitPositive(const std::vector<Observation>& observations,
                                  const std::array<double, 3>& floor) {
  // Eight sets of active coefficients: the best that respects the floors is the optimum.
  std::array<double, 3> best = floor;
  double best_error = Error(observations, best);
  for (unsigned active = 1; active < 8; ++active) {
    const auto x = Solve(observations, floor, active);
    if (!x.has_value()) continue;
    bool feasible = true;
    for (int i = 0; i < 3; ++i) feasible &= std::isfinite((*x)[i]) && (*x)[i] >= floor[i];
    if (!feasible) continue;
    const double error = Error(observations, *x);
    if (error < best_error) {
      best = *x;
      best_error = error;
    }
  }
  return best;
}

double PrefillSeconds(const wire::CostModel& cost, double tokens, double context) {
  return cost.prefill_base() + cost.prefill_per_token() * tokens +
         cost.prefill_per_pair() * (context * tokens + tokens * tokens / 2);
}

double StepSeconds(const wire::CostModel& cost, double rows, double context_tokens) {
  return cost.step_base() + cost.step_per_row() * rows + cost.step_per_context() * context_tokens;
}

bool IsPlausible(const wire::CostModel& cost) {
  for (const double v : {cost.prefill_base(), cost.prefill_per_token(), cost.prefill_per_pair(),
                         cost.step_base(), cost.step_per_row(), cost.step_per_context(),
                         cost.bytes_per_token(), cost.transfer_bytes_per_s()}) {
    if (!std::isfinite(v) || v <= 0) return false;
  }
  return true;
}

absl::StatusOr<wire::CostModel> MeasureCost(engine::ModelRunner& runner, const Clock& clock) {
  Probe probe(runner, clock);
  const engine::RunnerShape shape = runner.shape();
  const uint32_t tokens_max = std::min(shape.step_tokens_max, shape.context);
  // The first step pays for cold caches and page faults.
  RETURN_IF_ERROR(probe.Run(1, std::min(8u, tokens_max), 0).status());

  const double floor = kSecondsFloor;
  std::vector<Observation> prefill;
  struct Prompt {
    uint32_t tokens, context;
  };
  for (const Prompt p :
       {Prompt{8, 0}, Prompt{32, 0}, Prompt{128, 0}, Prompt{64, 448}, Prompt{256, 0}}) {
    const bool fits = p.tokens <= tokens_max && p.tokens + p.context <= shape.context;
    if (!fits && !prefill.empty()) continue;
    const uint32_t tokens = std::min(p.tokens, tokens_max);
    // The context is there when a later chunk of a prompt comes.
    if (shape.copies_blocks) RETURN_IF_ERROR(probe.Run(1, tokens, fits ? p.context : 0).status());
    ASSIGN_OR_RETURN(const double seconds, probe.Run(1, tokens, fits ? p.context : 0));
    const double n = tokens;
    prefill.push_back({{1, n, p.context * n + n * n / 2}, seconds});
    if (absl::Seconds(seconds) > kProbeMax) break;
  }
  std::vector<Observation> steps;
  struct Rows {
    uint32_t rows, context;
  };
  for (const Rows r : {Rows{1, 16}, Rows{1, 512}, Rows{4, 16}, Rows{8, 256}, Rows{16, 64}}) {
    const bool fits = r.rows <= tokens_max && r.context < shape.context;
    if (!fits && !steps.empty()) continue;
    const uint32_t context = fits ? r.context : 0;
    const uint32_t rows = fits ? r.rows : 1;
    ASSIGN_OR_RETURN(double seconds, probe.Run(rows, 1, context));
    ASSIGN_OR_RETURN(const double again, probe.Run(rows, 1, context));
    seconds = std::min(seconds, again);
    steps.push_back({{1, double(rows), double(rows) * context}, seconds});
    if (absl::Seconds(seconds) > kProbeMax) break;
  }
  RETURN_IF_ERROR(probe.End());
  runner.ReleaseScratch();
  const auto p = FitPositive(prefill, {floor, floor, floor * 1e-3});
  const auto s = FitPositive(steps, {floor, floor, floor * 1e-3});
  wire::CostModel cost;
  cost.set_prefill_base(p[0]);
  cost.set_prefill_per_token(p[1]);
  cost.set_prefill_per_pair(p[2]);
  cost.set_step_base(s[0]);
  cost.set_step_per_row(s[1]);
  cost.set_step_per_context(s[2]);
  const KvLayout& layout = runner.layout();
  cost.set_bytes_per_token(static_cast<double>(layout.token_bytes()) * 2 * layout.layers);
  cost.set_transfer_bytes_per_s(kTransferBytesPerSecond);
  return cost;
}

void CostRefiner::OnRows(double rows, double context_tokens, double seconds) {
  const double ratio = seconds / StepSeconds(measured_, rows, context_tokens);
  rows_ratio_ += kRefineWeight * (std::clamp(ratio, 0.1, 10.0) - rows_ratio_);
}

void CostRefiner::OnPrefill(double tokens, double context, double seconds) {
  const double ratio = seconds / PrefillSeconds(measured_, tokens, context);
  prefill_ratio_ += kRefineWeight * (std::clamp(ratio, 0.1, 10.0) - prefill_ratio_);
}

wire::CostModel CostRefiner::Current() const {
  wire::CostModel cost = measured_;
  cost.set_prefill_base(cost.prefill_base() * prefill_ratio_);
  cost.set_prefill_per_token(cost.prefill_per_token() * prefill_ratio_);
  cost.set_prefill_per_pair(cost.prefill_per_pair() * prefill_ratio_);
  cost.set_step_base(cost.step_base() * rows_ratio_);
  cost.set_step_per_row(cost.step_per_row() * rows_ratio_);
  cost.set_step_per_context(cost.step_per_context() * rows_ratio_);
  return cost;
}

}  // namespace antiphon::worker
