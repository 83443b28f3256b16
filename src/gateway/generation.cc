#include "gateway/generation.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "common/block_key.h"

namespace antiphon::gateway {
namespace {

constexpr absl::Duration kRetryDelayMax = absl::Seconds(1);
constexpr double kStallIntervals = 20;

}  // namespace

Generation::Generation(GenerationSpec spec, const GenerationLimits& limits)
    : spec_(std::move(spec)),
      limits_(limits),
      delay_(limits.retry_delay),
      detokenizer_(spec_.tokenizer.get(), spec_.skip_special_tokens),
      stop_text_(spec_.stop_strings, spec_.include_stop_string) {}

void Generation::Begin(absl::Time now) {
  if (state_ != State::kNew) return;
  stats_.began = now;
  AskForPlacement(now);
}

uint32_t Generation::DeadlineMs(absl::Time now) const {
  if (spec_.deadline == absl::InfiniteFuture()) return 0;
  const int64_t left = absl::ToInt64Milliseconds(spec_.deadline - now);
  return static_cast<uint32_t>(std::clamp<int64_t>(left, 1, UINT32_MAX));
}

void Generation::AskForPlacement(absl::Time now) {
  state_ = State::kAdmitting;
  retry_at_ = absl::InfiniteFuture();
  ++epoch_;
  progress_start_ = static_cast<uint32_t>(emitted_.size());
  std::vector<uint32_t> tokens = *spec_.prompt;
  tokens.insert(tokens.end(), emitted_.begin(), emitted_.end());
  Admit admit;
  wire::AdmitRequest& request = admit.request;
  request.set_id(spec_.id.ToBytes());
  request.set_epoch(epoch_);
  request.set_tenant(spec_.tenant);
  request.set_model(spec_.model);
  request.set_class_(spec_.request_class);
  request.set_prompt_count(static_cast<uint32_t>(spec_.prompt->size()));
  request.set_emitted_count(static_cast<uint32_t>(emitted_.size()));
  if (spec_.block_tokens > 0) {
    for (const BlockKey& key : BlockKeys(spec_.root, tokens, spec_.block_tokens)) {
      request.add_block_keys(key.ToBytes());
    }
  }
  request.set_max_tokens(spec_.stop.max_tokens());
  request.set_deadline_ms(DeadlineMs(now));
  for (const auto& [node, since] : excluded_) request.add_excluded(node);
  actions_.emplace_back(std::move(admit));
}

void Generation::WaitAndAsk(absl::Time now) {
  state_ = State::kWaiting;
  retry_at_ = now + delay_;
  delay_ = std::min(2 * delay_, kRetryDelayMax);
}

void Generation::OnAdmitReply(uint32_t epoch, const absl::StatusOr<wire::AdmitReply>& reply,
                              absl::Time now) {
  if (state_ != State::kAdmitting || epoch != epoch_) return;
  state_ = State::kWaiting;
  if (!reply.ok()) {
    const std::string why(reply.status().message());
    if (admitted_once_ && now < patience_ends_) return WaitAndAsk(now);
    ApiError error = Unavailable("no_conductor", fmt::format("No conductor answers: {}", why));
    if (absl::IsDeadlineExceeded(reply.status())) error = TimedOut("The request waited too long.");
    return Finish({.reason = EndReason::kError, .error = std::move(error)}, now);
  }
  if (reply->has_rejected()) return OnRejected(reply->rejected(), now);
  if (!reply->has_placement() || reply->placement().decode_address().empty()) {
    return Finish({.reason = EndReason::kError, .error = Internal(spec_.label)}, now);
  }
  admitted_once_ = true;
  state_ = State::kRunning;
  placement_ = reply->placement();
  stats_.prefill_node = placement_.prefill_node();
  stats_.decode_node = placement_.decode_node();
  if (epoch_ == 1) stats_.predicted_ttft_s = placement_.predicted_ttft_s();
  StartOn start{.node = placement_.decode_node(), .address = placement_.decode_address()};
  start.start.set_id(spec_.id.ToBytes());
  start.start.set_epoch(epoch_);
  start.start.mutable_prompt_ids()->Add(spec_.prompt->begin(), spec_.prompt->end());
  start.start.mutable_emitted_ids()->Add(emitted_.begin(), emitted_.end());
  *start.start.mutable_sampling() = spec_.sampling;
  *start.start.mutable_stop() = spec_.stop;
  *start.start.mutable_placement() = placement_;
  start.start.set_deadline_ms(DeadlineMs(now));
  start.start.set_root_key(spec_.root.ToBytes());
  start.start.set_request_label(spec_.label);
  start.start.set_tenant(spec_.tenant);
  actions_.emplace_back(std::move(start));
}

void Generation::OnRejected(const wire::Rejected& rejected, absl::Time now) {
  const bool no_place = rejected.reason() == wire::Rejected::NO_WORKERS ||
                        rejected.reason() == wire::Rejected::DRAINING;
  if (admitted_once_ && rejected.reason() != wire::Rejected::UNKNOWN_MODEL) {
    std::erase_if(excluded_,
                  [&](const auto& entry) { return now - entry.second >= limits_.exclusion_min; });
    // An overloaded cluster keeps a promise that it has made; one without workers gets time for a
    // restart.
    if (no_place ? now < patience_ends_ : !emitted_.empty() || now < patience_ends_) {
      return WaitAndAsk(now);
    }
  }
  Finish({.reason = EndReason::kError,
          .error = FromRejected(rejected, limits_.overload_status, limits_.jitter)},
         now);
}

void Generation::LeavePlacement() {
  if (state_ == State::kRunning) {
    actions_.emplace_back(CancelOn{.address = placement_.decode_address(), .epoch = epoch_});
  } else if (state_ == State::kAdmitting) {
    actions_.emplace_back(AbandonAdmit{.epoch = epoch_});
  }
}

void Generation::PlaceAgain(const std::string& failed_node, ApiError error, absl::Time now) {
  LeavePlacement();
  state_ = State::kWaiting;
  if (++failures_ > limits_.replacements_max) {
    return Finish({.reason = EndReason::kError, .error = std::move(error)}, now);
  }
  ++stats_.replacements;
  if (!failed_node.empty()) excluded_[failed_node] = now;
  if (patience_ends_ == absl::InfiniteFuture()) patience_ends_ = now + limits_.patience;
  AskForPlacement(now);
}

void Generation::PlaceAgainAfterRefusal(const std::string& message, absl::Time now) {
  LeavePlacement();
  state_ = State::kWaiting;
  ++stats_.refusals;
  if (patience_ends_ == absl::InfiniteFuture()) patience_ends_ = now + limits_.patience;
  if (emitted_.size() > progress_start_) return AskForPlacement(now);  // preempted
  if (!emitted_.empty()) return WaitAndAsk(now);
  if (++refusals_ > limits_.replacements_max) {
    wire::Rejected rejected;
    rejected.set_reason(wire::Rejected::NO_KV_SPACE);
    rejected.set_message(fmt::format("No decode worker takes the request: {}", message));
    return Finish({.reason = EndReason::kError,
                   .error = FromRejected(rejected, limits_.overload_status, limits_.jitter)},
                  now);
  }
  excluded_[placement_.decode_node()] = now;
  AskForPlacement(now);
}

bool Generation::IsEndOfGeneration(uint32_t id) const {
  const auto& ids = spec_.tokenizer->end_of_generation_ids();
  return std::binary_search(ids.begin(), ids.end(), id);
}

void Generation::TakePromptSource(const wire::SequenceUpdate& update) {
  if (!update.has_prompt_source()) return;
  const wire::PromptSource& said = update.prompt_source();
  if (stats_.prompt_source.has_value()) {
    stats_.recomputed_tokens += said.computed();
    return;
  }
  // The sum is the prompt's length whatever a worker says; what nobody claims was computed.
  wire::PromptSource source;
  uint32_t left = static_cast<uint32_t>(spec_.prompt->size());
  const auto take = [&left](uint32_t wanted) {
    const uint32_t n = std::min(wanted, left);
    left -= n;
    return n;
  };
  source.set_dram(take(said.dram()));
  source.set_remote(take(said.remote()));
  source.set_ssd(take(said.ssd()));
  source.set_device(take(said.device()));
  source.set_computed(left);
  stats_.prompt_source = source;
  stats_.timings = update.timings();
}

bool Generation::TokensFit(const wire::SequenceUpdate& update) {
  if (update.first_index() > emitted_.size()) return false;
  if (spec_.sampling.logprobs() && update.logprobs_size() != update.ids_size()) return false;
  for (int i = 0; i < update.ids_size(); ++i) {
    const size_t index = size_t{update.first_index()} + static_cast<size_t>(i);
    if (update.ids(i) >= spec_.tokenizer->vocab_size()) return false;
    if (index < emitted_.size() && emitted_[index] != update.ids(i)) {
      ++stats_.divergences;
      return false;
    }
  }
  return true;
}

void Generation::OnUpdate(const wire::SequenceUpdate& update, absl::Time now) {
  if (state_ != State::kRunning || update.epoch() != epoch_) return;
  if (!TokensFit(update)) {
    return PlaceAgain(placement_.decode_node(), Internal(spec_.label), now);
  }
  TakePromptSource(update);
  const bool stops = update.end_case() == wire::SequenceUpdate::kFinish &&
                     update.finish() == wire::FINISH_REASON_STOP;
  for (int i = 0; i < update.ids_size() && state_ == State::kRunning; ++i) {
    if (size_t{update.first_index()} + static_cast<size_t>(i) < emitted_.size()) continue;
    Accept(update.ids(i), spec_.sampling.logprobs() ? &update.logprobs(i) : nullptr,
           stops && i + 1 == update.ids_size(), now);
  }
  if (state_ != State::kRunning) return;
  if (update.end_case() == wire::SequenceUpdate::kFinish) {
    state_ = State::kWaiting;  // decode has let go
    FinishByDecode(stops, now);
  } else if (update.end_case() == wire::SequenceUpdate::kError) {
    OnError(update, now);
  } else if (emitted_.size() >= spec_.stop.max_tokens()) {
    FinishByDecode(false, now);
  }
}

void Generation::OnError(const wire::SequenceUpdate& update, absl::Time now) {
  const std::string& message = update.error().message();
  switch (static_cast<absl::StatusCode>(update.error().code())) {
    case absl::StatusCode::kResourceExhausted:
      return PlaceAgainAfterRefusal(message, now);
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kDataLoss: {
      ApiError error =
          Unavailable("upstream_failed", fmt::format("Workers failed too often: {}", message));
      error.status = 502;
      error.type = "upstream_error";
      return PlaceAgain(
          update.failed_node().empty() ? placement_.decode_node() : update.failed_node(),
          std::move(error), now);
    }
    case absl::StatusCode::kDeadlineExceeded:
      return Finish({.reason = EndReason::kError, .error = TimedOut("The request took too long.")},
                    now);
    default:
      return Finish({.reason = EndReason::kError, .error = Internal(spec_.label)}, now);
  }
}

void Generation::NoteArrival(absl::Time now) {
  if (!first_token_seen()) {
    stats_.first_token = now;
    Report report;
    report.report.set_id(spec_.id.ToBytes());
    report.report.set_epoch(epoch_);
    report.report.set_ttft_s(absl::ToDoubleSeconds(now - stats_.began));
    report.report.set_output_tokens(1);
    report.report.set_first_token_seen(true);
    actions_.emplace_back(std::move(report));
  } else {
    const double interval = absl::ToDoubleSeconds(now - last_token_);
    intervals_.push_back(static_cast<float>(interval));
    stats_.intervals_s.push_back(static_cast<float>(interval));
    interval_mean_s_ += (interval - interval_mean_s_) / std::min<size_t>(intervals_.size(), 16);
  }
  last_token_ = now;
  refusals_ = 0;
  delay_ = limits_.retry_delay;
  patience_ends_ = absl::InfiniteFuture();
}

void Generation::Accept(uint32_t id, const wire::TokenLogprobs* logprobs, bool is_stop,
                        absl::Time now) {
  const bool first = emitted_.empty();
  NoteArrival(now);
  emitted_.push_back(id);
  ++stats_.output_tokens;
  // The token that stops is text only when the client wants it, and never an end of generation.
  const bool hidden = is_stop && (!spec_.include_stop_string || IsEndOfGeneration(id));
  const std::string piece = hidden ? std::string() : detokenizer_.Push(id);
  Held held{.begin = text_end_, .end = text_end_ + piece.size()};
  held.token.id = id;
  held.token.shown = !hidden;
  if (logprobs != nullptr) held.token.logprobs = *logprobs;
  text_end_ = held.end;
  held_.push_back(std::move(held));
  const StopText::Result result =
      stop_text_.Push(piece, emitted_.size() >= spec_.stop.min_tokens());
  const size_t before = actions_.size();
  Send(result, result.match.has_value());
  if (first && actions_.size() == before) actions_.emplace_back(Deliver{});
  if (result.match) Finish({.reason = EndReason::kStop, .stop_string = *result.match}, now);
}

void Generation::Send(const StopText::Result& result, bool everything) {
  text_sent_ += result.text.size();
  Delta delta{.text = result.text};
  while (!held_.empty() && (everything || held_.front().end <= text_sent_)) {
    Held& held = held_.front();
    if (held.begin >= text_sent_ && held.end > held.begin) held.token.shown = false;
    delta.tokens.push_back(std::move(held.token));
    held_.pop_front();
  }
  if (!delta.text.empty() || !delta.tokens.empty()) {
    actions_.emplace_back(Deliver{.delta = std::move(delta)});
  }
}

void Generation::FinishByDecode(bool by_stop, absl::Time now) {
  Ending ending{.reason = by_stop ? EndReason::kStop : EndReason::kLength};
  if (by_stop && !emitted_.empty() && !IsEndOfGeneration(emitted_.back())) {
    ending.stop_token = emitted_.back();
  }
  const std::string rest = detokenizer_.Finish();
  text_end_ += rest.size();
  StopText::Result result = stop_text_.Push(rest, emitted_.size() >= spec_.stop.min_tokens());
  if (result.match) {
    ending = {.reason = EndReason::kStop, .stop_string = *result.match};
  } else {
    result.text += stop_text_.Finish();
  }
  Send(result, true);
  Finish(std::move(ending), now);
}

void Generation::OnDecodeBroken(const std::string& address, const absl::Status& why,
                                absl::Time now) {
  if (state_ != State::kRunning || placement_.decode_address() != address) return;
  ApiError error = Unavailable(
      "upstream_failed", fmt::format("Workers failed too often; last the decode worker {}: {}",
                                     placement_.decode_node(), std::string(why.message())));
  error.status = 502;
  error.type = "upstream_error";
  state_ = State::kWaiting;  // nothing to cancel
  PlaceAgain(placement_.decode_node(), std::move(error), now);
}

void Generation::OnCancel(absl::Time now) { Finish({.reason = EndReason::kCancelled}, now); }

void Generation::OnAbort(const ApiError& error, absl::Time now) {
  Finish({.reason = EndReason::kError, .error = error}, now);
}

absl::Time Generation::next_timer() const {
  if (ended() || state_ == State::kNew) return absl::InfiniteFuture();
  absl::Time next = std::min(spec_.deadline, retry_at_);
  if (state_ == State::kRunning && emitted_.size() > progress_start_) {
    next =
        std::min(next, last_token_ + std::max(limits_.stall_min,
                                              absl::Seconds(kStallIntervals * interval_mean_s_)));
  }
  return next;
}

void Generation::OnTimer(absl::Time now) {
  if (ended() || now < next_timer()) return;
  if (now >= spec_.deadline) {
    return Finish(
        {.reason = EndReason::kError, .error = TimedOut("The request's deadline passed.")}, now);
  }
  if (state_ == State::kWaiting && now >= retry_at_) return AskForPlacement(now);
  if (state_ == State::kRunning) {
    ApiError error = Unavailable("upstream_failed", "The decode worker makes no progress.");
    error.status = 502;
    error.type = "upstream_error";
    PlaceAgain(placement_.decode_node(), std::move(error), now);
  }
}

double Generation::LongestTenthMean() const {
  if (intervals_.empty()) return 0;
  std::vector<float> sorted = intervals_;
  const size_t n = std::max<size_t>(1, sorted.size() / 10);
  std::nth_element(sorted.begin(), sorted.begin() + static_cast<long>(n) - 1, sorted.end(),
                   std::greater<>());
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += sorted[i];
  return sum / static_cast<double>(n);
}

void Generation::Finish(Ending ending, absl::Time now) {
  if (ended()) return;
  const bool at_conductor = admitted_once_ || state_ == State::kAdmitting;
  LeavePlacement();
  state_ = State::kEnded;
  stats_.ended = now;
  if (at_conductor) {
    Report report;
    report.report.set_id(spec_.id.ToBytes());
    report.report.set_epoch(epoch_);
    if (first_token_seen()) {
      report.report.set_ttft_s(absl::ToDoubleSeconds(stats_.first_token - stats_.began));
      report.report.set_tbt_s(LongestTenthMean());
    }
    report.report.set_output_tokens(static_cast<uint32_t>(emitted_.size()));
    report.report.set_first_token_seen(first_token_seen());
    report.report.set_finished(true);
    actions_.emplace_back(std::move(report));
  }
  actions_.emplace_back(End{.ending = std::move(ending)});
}

}  // namespace antiphon::gateway
