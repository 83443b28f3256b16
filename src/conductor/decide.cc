#include "conductor/decide.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace antiphon::conductor {
namespace {

constexpr size_t kOptionsKept = 8;
// Decode workers whose load is predicted exactly; the others lose by a cheap upper bound.
constexpr size_t kDecodeShortlist = 16;
constexpr double kNever = std::numeric_limits<double>::infinity();

// Keeps the `n` smallest of what is offered, in order.
template <typename T, typename Less>
void Offer(std::vector<T>& best, size_t n, T value, Less less) {
  if (best.size() == n && !less(value, best.back())) return;
  if (best.size() == n) best.pop_back();
  best.insert(std::upper_bound(best.begin(), best.end(), value, less), std::move(value));
}

// What one role's candidates fell out for, to name the reason when none is left.
struct Tally {
  int draining = 0;
  int usable = 0;     // ready and not excluded
  int full = 0;       // of those: queue or rows
  int no_space = 0;   // of those: pool too full now
  int too_small = 0;  // of no_space: the whole pool is smaller than the request
  uint32_t shortest_queue = std::numeric_limits<uint32_t>::max();
  double soonest_s = kNever;  // until a queue of the full ones moves
  uint32_t largest_pool = 0;
};

struct PrefillChoice {
  const Worker* worker = nullptr;
  PrefillOption option;
  uint32_t slots = 0;
};

struct DecodeChoice {
  const Worker* worker = nullptr;
  DecodeOption option;
  uint32_t local_blocks = 0;
  uint32_t slots = 0;
  double bound_s = 0;
};

class Placement {
 public:
  Placement(const Request& request, const View& view, const Policy& policy, absl::Time now)
      : request_(request), view_(view), policy_(policy), now_(now) {}

  Decision Run();

 private:
  bool KnowsModel() const;
  void MarkExcluded();
  void MatchPrefixes();
  void ChooseSource();
  bool Usable(const Worker& worker, size_t index, Tally& tally) const;
  bool HasSpace(const Worker& worker, uint32_t slots, Tally& tally) const;
  uint32_t LocalBlocks(const Worker& worker) const {
    return worker.store >= 0 ? matched_[worker.store] : 0;
  }
  // Tokens that need no computing; the last one always does.
  double Cached(uint32_t blocks) const {
    return std::min(1.0 * blocks * view_.block_tokens, request_.tokens() - 1.0);
  }
  PrefillOption Estimate(const Worker& worker) const;
  void RankPrefills();
  void RankDecodes();
  DecodeOption Predict(const Worker& worker, absl::Time at) const;
  void RejectForRole(WorkerRole role, const Tally& tally);
  void Judge();
  double EarliestEnd(const Worker& worker) const;
  void Reject(Verdict verdict, double retry_after_s, std::string message);

  const Request& request_;
  const View& view_;
  const Policy& policy_;
  const absl::Time now_;

  Decision d_;
  std::vector<char> excluded_workers_;
  std::vector<char> excluded_stores_;
  std::vector<uint32_t> matched_;  // prefix blocks, by store
  double egress_wait_s_ = 0;       // of the source
  uint32_t blocks_needed_ = 0;     // of the whole sequence so far and its next token
  Tally prefill_tally_, decode_tally_;
  std::vector<PrefillChoice> prefills_;
  std::vector<DecodeChoice> decodes_;
};

bool Placement::KnowsModel() const {
  return std::find(view_.model_names.begin(), view_.model_names.end(), request_.model) !=
         view_.model_names.end();
}

void Placement::MarkExcluded() {
  excluded_workers_.assign(view_.workers.size(), 0);
  excluded_stores_.assign(view_.stores.size(), 0);
  for (const NodeId& id : request_.excluded) {
    if (const Worker* worker = view_.FindWorker(id)) {
      excluded_workers_[worker - view_.workers.data()] = 1;
    }
    for (size_t s = 0; s < view_.stores.size(); ++s) {
      if (view_.stores[s].id == id) excluded_stores_[s] = 1;
    }
  }
}

void Placement::MatchPrefixes() {
  matched_.assign(view_.stores.size(), 0);
  for (const auto& [holder, blocks] :
       view_.index.LongestPrefixes(request_.keys, view_.fingerprint)) {
    const int store = holder < view_.store_of_holder.size() ? view_.store_of_holder[holder] : -1;
    if (store >= 0) matched_[store] = blocks;
  }
}

// The store with the longest prefix; of equals, the one that sends least, so that one popular
// prefix does not queue all its readers at one host.
void Placement::ChooseSource() {
  const Store* best = nullptr;
  for (size_t s = 0; s < view_.stores.size(); ++s) {
    const Store& store = view_.stores[s];
    if (matched_[s] == 0 || excluded_stores_[s] || store.state != NodeState::kReady) continue;
    const double wait =
        store.egress_free_at > now_ ? absl::ToDoubleSeconds(store.egress_free_at - now_) : 0;
    const bool better =
        best == nullptr || matched_[s] > d_.best_blocks ||
        (matched_[s] == d_.best_blocks &&
         (wait < egress_wait_s_ || (wait == egress_wait_s_ && store.id < best->id)));
    if (!better) continue;
    best = &store;
    d_.best_blocks = matched_[s];
    d_.source_store = static_cast<int>(s);
    egress_wait_s_ = wait;
  }
}

bool Placement::Usable(const Worker& worker, size_t index, Tally& tally) const {
  if (excluded_workers_[index]) return false;
  if (worker.state == NodeState::kDraining) {
    ++tally.draining;
    return false;
  }
  if (worker.state != NodeState::kReady || worker.store_lost) return false;
  if (worker.store >= 0) {
    const Store& store = view_.stores[worker.store];
    if (excluded_stores_[worker.store] || store.state == NodeState::kLost) return false;
    if (store.state == NodeState::kDraining) {
      ++tally.draining;
      return false;
    }
  }
  ++tally.usable;
  return true;
}

bool Placement::HasSpace(const Worker& worker, uint32_t slots, Tally& tally) const {
  if (worker.store < 0) return true;  // its store has not reported: the worker will say no itself
  const Store& store = view_.stores[worker.store];
  if (store.slot_count > 0) tally.largest_pool = std::max(tally.largest_pool, store.slot_count);
  if (store.slot_count > 0 && slots > store.slot_count) {
    ++tally.no_space;
    ++tally.too_small;
    return false;
  }
  if (!store.load_known) return true;
  if (slots + store.planned_slots <= store.slots_free) return true;
  ++tally.no_space;
  return false;
}

PrefillOption Placement::Estimate(const Worker& worker) const {
  PrefillOption option{.node = NodeId(), .queue_s = worker.QueueSeconds(now_)};
  option.queue_depth = worker.queue_depth();
  option.local_blocks = option.used_blocks = LocalBlocks(worker);
  const double tokens = request_.tokens();
  const double local = Cached(option.local_blocks);
  option.prefill_s = worker.cost.PrefillSeconds(tokens - local, local);
  // best/local > threshold; without a local prefix the ratio is infinite.
  const bool much_longer = d_.best_blocks > option.local_blocks &&
                           d_.best_blocks > policy_.balancing_threshold * option.local_blocks;
  if (much_longer) {
    const double best = Cached(d_.best_blocks);
    const double transfer_s = egress_wait_s_ + worker.cost.TransferSeconds(best - local);
    const double rest_s = worker.cost.PrefillSeconds(tokens - best, best);
    // A slow network makes recomputing the faster way, whatever the ratio.
    if (transfer_s + rest_s < option.prefill_s) {
      option.used_blocks = d_.best_blocks;
      option.transfer_s = transfer_s;
      option.prefill_s = rest_s;
    }
  }
  option.ttft_s = option.queue_s + option.transfer_s + option.prefill_s;
  return option;
}

void Placement::RankPrefills() {
  d_.idle_ttft_s = kNever;
  const auto less = [](const PrefillChoice& a, const PrefillChoice& b) {
    return std::tie(a.option.ttft_s, a.option.queue_depth, a.worker->running, a.worker->id) <
           std::tie(b.option.ttft_s, b.option.queue_depth, b.worker->running, b.worker->id);
  };
  prefills_.reserve(kOptionsKept + 1);
  for (size_t i = 0; i < view_.workers.size(); ++i) {
    const Worker& worker = view_.workers[i];
    if (worker.role != WorkerRole::kPrefill || !Usable(worker, i, prefill_tally_)) continue;
    const uint32_t depth = worker.queue_depth();
    prefill_tally_.shortest_queue = std::min(prefill_tally_.shortest_queue, depth);
    if (depth >= policy_.max_queue) {
      ++prefill_tally_.full;
      prefill_tally_.soonest_s = std::min(prefill_tally_.soonest_s,
                                          worker.QueueSeconds(now_) / std::max<uint32_t>(depth, 1));
      continue;
    }
    const uint32_t local = std::min(LocalBlocks(worker), blocks_needed_);
    if (!HasSpace(worker, blocks_needed_ - local, prefill_tally_)) continue;
    PrefillOption option = Estimate(worker);
    d_.idle_ttft_s = std::min(d_.idle_ttft_s, option.transfer_s + option.prefill_s);
    Offer(prefills_, kOptionsKept,
          PrefillChoice{&worker, std::move(option), blocks_needed_ - local}, less);
  }
}

// Rows and context of the worker at `at`: what runs now, less the answers that will have ended by
// then, plus those whose prefill will have ended (A3, section 7.4, with known placements instead of
// a uniform spread).
DecodeOption Placement::Predict(const Worker& worker, absl::Time at) const {
  double rows = worker.running;
  double context = worker.context_tokens;
  const double mean_context = worker.running > 0 ? context / worker.running : 0;
  const absl::Duration lasts =
      view_.decode_seconds > 0 ? absl::Seconds(view_.decode_seconds) : absl::InfiniteDuration();
  for (const PlannedDecode& decode : worker.decodes) {
    const bool reported = worker.Reported(decode);
    const bool ended = decode.starts_at + lasts <= at;
    if (reported && ended && rows > 0) {
      rows -= 1;
      context = std::max(0.0, context - mean_context);
    } else if (!reported && !ended && decode.starts_at <= at) {
      rows += 1;
      context += decode.context_tokens;
    }
  }
  DecodeOption option;
  option.rows = rows + 1;
  option.context_tokens = context + request_.tokens();
  option.tbt_s = worker.cost.StepSeconds(option.rows, option.context_tokens);
  return option;
}

void Placement::RankDecodes() {
  d_.idle_tbt_s = kNever;
  const Worker& prefill = *prefills_.front().worker;
  const auto same_host = [&prefill](const Worker& worker) {
    return worker.store_incarnation != 0 && worker.store_incarnation == prefill.store_incarnation;
  };
  // On a shared host decode reads prefill's blocks in place.
  std::vector<DecodeChoice> shortlist;
  shortlist.reserve(kDecodeShortlist + 1);
  const auto cheaper = [](const DecodeChoice& a, const DecodeChoice& b) {
    const bool a_far = !a.option.same_host, b_far = !b.option.same_host;
    return std::tie(a.bound_s, a_far, a.worker->rows_bound, a.worker->id) <
           std::tie(b.bound_s, b_far, b.worker->rows_bound, b.worker->id);
  };
  for (size_t i = 0; i < view_.workers.size(); ++i) {
    const Worker& worker = view_.workers[i];
    if (worker.role != WorkerRole::kDecode || !Usable(worker, i, decode_tally_)) continue;
    DecodeChoice choice{.worker = &worker};
    choice.option.same_host = same_host(worker);
    choice.local_blocks = std::min(LocalBlocks(worker), blocks_needed_);
    // Where prefill's blocks are read in place, only growth takes slots.
    choice.slots = choice.option.same_host ? 1 : blocks_needed_ - choice.local_blocks;
    const uint32_t asked =
        choice.option.same_host ? choice.slots + prefills_.front().slots : choice.slots;
    if (!HasSpace(worker, asked, decode_tally_)) continue;
    // Decode counts a sequence from its arrival on, before its prefill has ended.
    if (worker.max_sequences > 0 && worker.rows_bound >= worker.max_sequences) {
      ++decode_tally_.full;
      decode_tally_.soonest_s = std::min(decode_tally_.soonest_s, EarliestEnd(worker));
      continue;
    }
    choice.bound_s =
        worker.cost.StepSeconds(worker.rows_bound + 1.0, worker.context_bound + request_.tokens());
    d_.idle_tbt_s = std::min(d_.idle_tbt_s, worker.cost.StepSeconds(1, request_.tokens()));
    Offer(shortlist, kDecodeShortlist, std::move(choice), cheaper);
  }

  const absl::Time prefill_ends = now_ + absl::Seconds(prefills_.front().option.ttft_s);
  const auto better = [](const DecodeChoice& a, const DecodeChoice& b) {
    const bool a_far = !a.option.same_host, b_far = !b.option.same_host;
    return std::tie(a.option.tbt_s, a_far, a.option.rows, a.worker->id) <
           std::tie(b.option.tbt_s, b_far, b.option.rows, b.worker->id);
  };
  decodes_.reserve(kOptionsKept + 1);
  for (DecodeChoice& choice : shortlist) {
    const bool near = choice.option.same_host;
    choice.option = Predict(*choice.worker, prefill_ends);
    choice.option.same_host = near;
    Offer(decodes_, kOptionsKept, std::move(choice), better);
  }
}

double Placement::EarliestEnd(const Worker& worker) const {
  const double lasts = view_.decode_seconds > 0 ? view_.decode_seconds : 5.0;
  double soonest = lasts;
  for (const PlannedDecode& decode : worker.decodes) {
    const double left = absl::ToDoubleSeconds(decode.starts_at - now_) + lasts;
    if (left > 0) soonest = std::min(soonest, left);
  }
  return soonest;
}

void Placement::Reject(Verdict verdict, double retry_after_s, std::string message) {
  d_.verdict = verdict;
  d_.retry_after_s = std::isfinite(retry_after_s) ? std::clamp(retry_after_s, 1.0, 60.0) : 60.0;
  d_.message = std::move(message);
}

void Placement::RejectForRole(WorkerRole role, const Tally& tally) {
  const std::string_view name = NameOf(role);
  if (tally.usable == 0) {
    if (tally.draining > 0) {
      Reject(Verdict::kDraining, 5, fmt::format("every {} worker is draining", name));
    } else {
      Reject(Verdict::kNoWorkers, 2,
             fmt::format("no {} worker is ready{}", name,
                         request_.excluded.empty() ? "" : " besides those that just failed"));
    }
    return;
  }
  if (tally.full > 0) {
    if (tally.shortest_queue != std::numeric_limits<uint32_t>::max()) {
      d_.queue_depth = tally.shortest_queue;
    }
    Reject(Verdict::kQueueFull, tally.soonest_s,
           role == WorkerRole::kPrefill
               ? fmt::format("every prefill queue holds {} requests", policy_.max_queue)
               : "every decode worker runs as many sequences as it may");
    return;
  }
  if (tally.too_small == tally.usable) {
    d_.retry_is_useless = true;
    Reject(Verdict::kNoKvSpace, 60,
           fmt::format("{} tokens need {} KV blocks; the largest pool has {}", request_.tokens(),
                       blocks_needed_, tally.largest_pool));
    return;
  }
  Reject(
      Verdict::kNoKvSpace, view_.decode_seconds > 0 ? view_.decode_seconds : 2,
      fmt::format("no {} worker's host has KV blocks free for {} tokens", name, request_.tokens()));
}

// The SLO, and whether it could be met at all.
void Placement::Judge() {
  const double slo_ttft = absl::ToDoubleSeconds(policy_.slo_ttft);
  const double slo_tbt = absl::ToDoubleSeconds(policy_.slo_tbt);
  const double deadline = absl::ToDoubleSeconds(request_.deadline);
  const bool hopeless_ttft = d_.idle_ttft_s > slo_ttft;
  const bool hopeless_tbt = d_.idle_tbt_s > slo_tbt;
  d_.best_effort = (hopeless_ttft || hopeless_tbt) && !policy_.strict;
  if (d_.predicted_ttft_s > deadline) {
    d_.retry_is_useless = d_.idle_ttft_s > deadline;
    Reject(Verdict::kPredictedTtft, d_.predicted_ttft_s - deadline,
           fmt::format(
               "the first token is predicted after {:.2f} s, the request's timeout is {:.2f} s",
               d_.predicted_ttft_s, deadline));
  } else if (d_.predicted_ttft_s > slo_ttft && (!hopeless_ttft || policy_.strict)) {
    d_.retry_is_useless = hopeless_ttft;
    Reject(Verdict::kPredictedTtft, d_.predicted_ttft_s - slo_ttft,
           fmt::format("the first token is predicted after {:.2f} s, slo.ttft is {:.2f} s",
                       d_.predicted_ttft_s, slo_ttft));
  } else if (d_.predicted_tbt_s > slo_tbt && (!hopeless_tbt || policy_.strict)) {
    d_.retry_is_useless = hopeless_tbt;
    Reject(Verdict::kPredictedTbt, EarliestEnd(*decodes_.front().worker),
           fmt::format("{:.1f} ms between tokens are predicted, slo.tbt is {:.1f} ms",
                       d_.predicted_tbt_s * 1e3, slo_tbt * 1e3));
  } else {
    d_.verdict = Verdict::kPlaced;
  }
}

Decision Placement::Run() {
  d_.id = request_.id;
  d_.epoch = request_.epoch;
  d_.at = now_;
  d_.tokens = request_.tokens();
  d_.blocks = static_cast<uint32_t>(request_.keys.size());
  if (view_.block_tokens == 0) {
    Reject(Verdict::kNoWorkers, 2, "no worker has registered");
    return std::move(d_);
  }
  if (!KnowsModel()) {
    d_.retry_is_useless = true;
    Reject(Verdict::kUnknownModel, 60,
           fmt::format("the model '{}' is not served here; served is '{}'", request_.model,
                       view_.model_names.front()));
    return std::move(d_);
  }
  // The next token's block too.
  blocks_needed_ = request_.tokens() / view_.block_tokens + 1;
  MarkExcluded();
  MatchPrefixes();
  ChooseSource();
  RankPrefills();
  for (const PrefillChoice& choice : prefills_) {
    d_.prefills.push_back(choice.option);
    d_.prefills.back().node = choice.worker->id;
  }
  if (prefills_.empty()) {
    RejectForRole(WorkerRole::kPrefill, prefill_tally_);
    return std::move(d_);
  }
  const PrefillChoice& prefill = prefills_.front();
  d_.queue_depth = prefill.option.queue_depth;
  if (prefill.option.transfer_s > 0 || prefill.option.used_blocks > prefill.option.local_blocks) {
    d_.source = view_.stores[d_.source_store].id;
  } else {
    d_.source_store = -1;
  }
  RankDecodes();
  for (const DecodeChoice& choice : decodes_) {
    d_.decodes.push_back(choice.option);
    d_.decodes.back().node = choice.worker->id;
  }
  if (decodes_.empty()) {
    RejectForRole(WorkerRole::kDecode, decode_tally_);
    return std::move(d_);
  }
  const DecodeChoice& decode = decodes_.front();
  d_.decode_blocks = decode.local_blocks;
  d_.prefill_slots = prefill.slots;
  d_.decode_slots = decode.slots;
  if (!decode.option.same_host && prefill.worker->cost.transfer_bytes_per_s > 0) {
    // Layers move while later ones are computed; only what the network is slower by shows.
    const double moved = d_.tokens - Cached(decode.local_blocks);
    d_.handoff_s =
        std::max(0.0, prefill.worker->cost.TransferSeconds(moved) - prefill.option.prefill_s);
  }
  d_.predicted_ttft_s = prefill.option.ttft_s + d_.handoff_s;
  d_.idle_ttft_s += d_.handoff_s;
  d_.predicted_tbt_s = decode.option.tbt_s;
  Judge();
  return std::move(d_);
}

}  // namespace

std::string_view NameOf(Verdict verdict) {
  switch (verdict) {
    case Verdict::kPlaced:
      return "placed";
    case Verdict::kPredictedTtft:
      return "predicted_ttft";
    case Verdict::kPredictedTbt:
      return "predicted_tbt";
    case Verdict::kQueueFull:
      return "queue_full";
    case Verdict::kNoKvSpace:
      return "no_kv_space";
    case Verdict::kNoWorkers:
      return "no_workers";
    case Verdict::kDraining:
      return "draining";
    case Verdict::kUnknownModel:
      return "unknown_model";
  }
  return "unknown";
}

Decision Decide(const Request& request, const View& view, const Policy& policy, absl::Time now) {
  return Placement(request, view, policy, now).Run();
}

}  // namespace antiphon::conductor
