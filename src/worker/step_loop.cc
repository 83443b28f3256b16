#include "worker/step_loop.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/logging.h"
#include "common/status_macros.h"

namespace antiphon::worker {
namespace {

// Deadlines and stalls are looked at no more often.
constexpr absl::Duration kTick = absl::Milliseconds(100);
constexpr absl::Duration kReportEvery = absl::Milliseconds(500);
constexpr absl::Duration kReportSpacing = absl::Milliseconds(20);
// What changes a load also starts a step, which goes ahead of the news.
constexpr absl::Duration kReportAfter = absl::Milliseconds(2);
constexpr absl::Duration kStuckAfter = absl::Seconds(120);
// Both cores count their sequences from 1; the runner tells them apart by this bit.
constexpr uint64_t kPrefillSequence = uint64_t{1} << 63;

}  // namespace

StepLoop::StepLoop(StepLoopOptions options, StepLoopEvents events)
    : options_(std::move(options)),
      events_(std::move(events)),
      queue_(options_.clock),
      metrics_(*options_.registry, options_.prefill_role) {
  thread_ = Thread("steps", [this] { Run(); });
}

StepLoop::~StepLoop() { Stop(); }

void StepLoop::Stop() {
  stop_ = true;
  queue_.Post([] {});
  thread_.Join();
  queue_.Close();
}

void StepLoop::SetPeers(prefill::PrefillService* prefills, decode::DecodeService* gateways,
                        decode::PrefillClient* client) {
  prefills_ = prefills;
  gateways_ = gateways;
  client_ = client;
}

void StepLoop::Begin(std::unique_ptr<engine::ModelRunner> runner, internal::v1::CostModel cost,
                     internal::v1::Fingerprint fingerprint) {
  auto shared = std::make_shared<std::unique_ptr<engine::ModelRunner>>(std::move(runner));
  queue_.Post([this, shared, cost = std::move(cost), fingerprint = std::move(fingerprint)] {
    runner_ = std::move(*shared);
    queue_.SetInterrupt([runner = runner_.get()] { runner->Interrupt(); });
    const engine::RunnerShape shape = runner_->shape();
    cost_.emplace(cost);
    prefill_ = std::make_unique<prefill::PrefillCore>(
        prefill::CoreOptions{.layout = runner_->layout(),
                             .vocab = shape.vocab,
                             .context = shape.context,
                             .seconds_per_token = cost.prefill_per_token(),
                             .engine_makes_checksums = shape.makes_checksums});
    decode_ = std::make_unique<decode::DecodeCore>(decode::CoreOptions{
        .self = options_.self.node,
        .layout = runner_->layout(),
        .vocab = shape.vocab,
        .context = shape.context,
        .sequences_max = std::min(options_.max_sequences, shape.step_tokens_max),
        .engine_makes_checksums = shape.makes_checksums,
        .tbt_max = options_.tbt_max});
    decode_->SetStepCost({cost.step_base(), cost.step_per_row(), cost.step_per_context()});
    if (draining_) SetDraining();
    StoreLinkOptions link;
    link.socket_path = options_.store_socket;
    link.self = options_.self;
    link.layout = runner_->layout();
    link.fingerprint = fingerprint;
    link.executor = &queue_;
    link.attach = options_.attach;
    link.on_attached = [this](kvstore::StoreClient& client) { OnStoreAttached(client); };
    link.on_lost = [this](const absl::Status& why) { OnStoreLost(why); };
    link.on_reply = [this](Side side, const internal::v1::StoreReply& reply) {
      if (side == Side::kPrefill) {
        prefill_->OnStoreReply(reply, options_.clock->Now());
      } else {
        decode_->OnStoreReply(reply, options_.clock->Now());
      }
    };
    store_.emplace(std::move(link));
    store_->Attach();
  });
}

void StepLoop::Run() {
  while (!stop_) {
    const bool can_run = prefill_ != nullptr;
    const bool heard = queue_.Run(idle_ ? Patience() : absl::ZeroDuration());
    if (!can_run) continue;
    const absl::Time now = options_.clock->Now();
    if (now >= next_tick_) {
      next_tick_ = now + kTick;
      prefill_->Tick(now);
      decode_->Tick(now);
    }
    // A step starts before anybody hears of what has happened: messages take time to write.
    if (stepping_) {
      Perform();
    } else {
      StartStep();
    }
    idle_ = !stepping_;
    Report(heard);
    if (stepping_) WatchStep();
  }
  // The pool must stay mapped until the engine has let go of it.
  while (stepping_) WatchStep();
  if (runner_ != nullptr) {
    if (absl::Status status = runner_->UsePool({}); !status.ok()) {
      LogWarning("the engine keeps the pool: {}", std::string(status.message()));
    }
  }
  store_.reset();
}

void StepLoop::StartStep() {
  if (store_lost_) {
    Perform();  // what was meant for the lost one
    store_lost_ = false;
    // Other ranks of the engine would keep the lost store's memory alive.
    if (absl::Status status = runner_->UsePool({}); !status.ok()) EndAfter(status);
    store_->Reattach();
  }
  const absl::Time now = options_.clock->Now();
  engine::Step step;
  decode_->Plan(now, step.chunks);
  rows_ = step.chunks.size();
  step_size_ = {.rows = static_cast<uint32_t>(rows_)};
  step_context_ = 0;
  for (const auto& row : step.chunks) step_context_ += row.start;
  const uint32_t room = runner_->shape().step_tokens_max - step_size_.rows;
  prefill_->Plan(std::min(room, options_.chunk_tokens), now, step.chunks);
  for (size_t i = rows_; i < step.chunks.size(); ++i) {
    step.chunks[i].sequence |= kPrefillSequence;
    step_size_.prefill_tokens += step.chunks[i].tokens.size();
    if (rows_ == 0) step_context_ = step.chunks[i].start;
  }
  if (step.chunks.empty()) return Perform();
  prefill_chunks_ = step.chunks.size() - rows_;
  step.report_layers = prefill_->WatchesLayers();
  step_begin_ = now;
  progress_ = {};
  stepping_ = true;
  if (absl::Status status = runner_->Submit(std::move(step)); !status.ok()) {
    LogError("the engine refused a step: {}", std::string(status.message()));
    FailStep(status, now);
  }
  Perform();
}

// Waits for the next layer, and tells of it, or for something posted. Whenever the loop wakes, a
// thread of the engine loses its core and the others wait for it.
void StepLoop::WatchStep() {
  const engine::StepProgress progress = runner_->Await(progress_, Patience());
  if (progress == progress_) return;
  if (progress.layers_done != progress_.layers_done) prefill_->OnProgress(progress.layers_done);
  progress_ = progress;
  if (progress.finished) FinishStep();
  Perform();
}

void StepLoop::FinishStep() {
  stepping_ = false;
  const absl::Time now = options_.clock->Now();
  auto result = runner_->Take();
  if (!result.ok()) {
    LogError("a step failed: {}", std::string(result.status().message()));
    FailStep(result.status(), now);
    return;
  }
  const auto chunks = absl::MakeConstSpan(result->chunks);
  decode_->OnStepDone(chunks.first(rows_), now);
  prefill_->OnStepDone(chunks.subspan(rows_), now);
  CountStep(now);
  if (step_size_.prefill_tokens == 0 && !stop_) {
    // The engine goes on before anybody hears of its tokens: it waits for us, they for the network.
    StartStep();
    return;
  }
  Perform();
  prefill_->CommitStep();
}

void StepLoop::CountStep(absl::Time now) {
  ++steps_;
  metrics_.OnStep(step_size_, now - step_begin_, options_.clock->WallNow());
  const double seconds = absl::ToDoubleSeconds(now - step_begin_);
  if (step_size_.prefill_tokens == 0) {
    cost_->OnRows(step_size_.rows, step_context_, seconds);
  } else if (step_size_.rows == 0 && prefill_chunks_ == 1) {
    cost_->OnPrefill(step_size_.prefill_tokens, step_context_, seconds);
  }
}

void StepLoop::FailStep(const absl::Status& status, absl::Time now) {
  stepping_ = false;
  LookAtEngine();
  EndAfter(status);
  decode_->OnStepDone(status, now);
  prefill_->OnStepDone(status, now);
}

void StepLoop::EndAfter(const absl::Status& status) {
  if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) return;
  const absl::Status ours =
      absl::UnavailableError(absl::StrCat("the engine failed: ", std::string(status.message())));
  prefill_->EndAll(ours);
  decode_->EndAll(ours);
}

void StepLoop::Perform() {
  store_->Cork();
  PerformPrefill();
  PerformDecode();
  store_->Uncork();
}

void StepLoop::PerformPrefill() {
  for (prefill::Action& action : prefill_->TakeActions()) {
    if (auto* call = std::get_if<prefill::StoreCall>(&action)) {
      store_->Call(Side::kPrefill, std::move(call->request));
    } else if (auto* send = std::get_if<prefill::Send>(&action)) {
      prefills_->Send(send->stream, std::move(send->message));
    } else {
      const auto& end = std::get<prefill::End>(action);
      if (!end.status.ok()) {
        LogInfo("prefill stream {} ends: {}", end.stream, end.status.ToString());
      }
      prefills_->End(end.stream, end.status);
    }
  }
}

void StepLoop::PerformDecode() {
  for (decode::Action& action : decode_->TakeActions()) {
    if (auto* call = std::get_if<decode::StoreCall>(&action)) {
      store_->Call(Side::kDecode, std::move(call->request));
    } else if (auto* send = std::get_if<decode::SendTokens>(&action)) {
      gateways_->Send(send->gateway, std::move(send->batch));
    } else if (auto* open = std::get_if<decode::OpenPrefill>(&action)) {
      client_->Open(open->prefill, open->address, std::move(open->open));
    } else if (auto* close = std::get_if<decode::HalfClosePrefill>(&action)) {
      client_->HalfClose(close->prefill);
    } else {
      client_->Cancel(std::get<decode::CancelPrefill>(action).prefill);
    }
  }
}

void StepLoop::OnStoreAttached(kvstore::StoreClient& client) {
  const kvstore::PoolMapping pool = client.pool();
  if (absl::Status status = runner_->UsePool({pool.base, pool.bytes, pool.fd}); !status.ok()) {
    LogError("the engine cannot use the pool: {}", std::string(status.message()));
  }
  const auto payload = [&client](uint32_t slot) { return client.Payload(slot); };
  prefill_->OnStoreAttached({.incarnation = client.store_incarnation(),
                             .data_address = client.data_address(),
                             .payload = payload});
  decode_->OnStoreAttached({.incarnation = client.store_incarnation(), .payload = payload});
  metrics_.OnStoreAttached(true);
  events_.on_attached(client.store_incarnation());
}

void StepLoop::LookAtEngine() {
  const absl::Status health = runner_->Health();
  if (health.ok() || engine_lost_) return;
  engine_lost_ = true;
  draining_ = true;
  prefill_->SetDraining();
  decode_->SetDraining();
  queue_.Post([this, health] {
    prefill_->EndAll(health);
    decode_->EndAll(health);
    Perform();
    if (events_.on_engine_lost) events_.on_engine_lost(health);
  });
}

void StepLoop::OnStoreLost(const absl::Status& why) {
  LogError("the KV store is lost: {}", std::string(why.message()));
  metrics_.OnStoreLost();
  metrics_.OnStoreAttached(false);
  const absl::Time now = options_.clock->Now();
  prefill_->OnStoreLost(why, now);
  decode_->OnStoreLost(why, now);
  store_lost_ = true;
  events_.on_lost();
}

internal::v1::WorkerLoad StepLoop::LoadNow() const {
  const prefill::Load prefill = prefill_->load();
  const decode::Load decode = decode_->load();
  internal::v1::WorkerLoad load;
  load.set_running(decode.running + decode.prefilling);
  load.set_context_tokens(decode.context_tokens);
  load.set_waiting(prefill.waiting);
  load.set_waiting_tokens(prefill.waiting_tokens);
  load.set_steps(steps_);
  *load.mutable_cost() = cost_->Current();
  load.set_queue_s(PrefillSeconds(load.cost(), prefill.waiting_tokens, 0) *
                   (prefill.waiting > 0 ? 1 : 0));
  return load;
}

absl::Time StepLoop::ReportDue() const {
  if (!report_owed_) return next_report_;
  return std::min(next_report_,
                  std::max(last_report_ + kReportSpacing, changed_at_ + kReportAfter));
}

absl::Duration StepLoop::Patience() const {
  if (prefill_ == nullptr) return kReportEvery;
  const absl::Time deadline = std::min(prefill_->next_deadline(), decode_->next_deadline());
  const absl::Time next =
      std::min({ReportDue(), std::max(deadline, next_tick_), queue_.next_timer()});
  return std::clamp(next - options_.clock->Now(), absl::Milliseconds(1), kReportEvery);
}

// Metrics always; the conductors on change and every 500 ms.
void StepLoop::Report(bool heard) {
  const absl::Time now = options_.clock->Now();
  // The loop comes by at every layer; counting what it holds would cost more than the layer.
  if (stepping_ && !heard && now < next_count_ && now < ReportDue()) return;
  next_count_ = now + kReportSpacing;
  const prefill::Load prefill = prefill_->load();
  const decode::Load decode = decode_->load();
  metrics_.Update(prefill, prefill_->counters(), decode, decode_->counters(), store_->slots_held(),
                  store_->slot_count());
  const uint32_t waiting = prefill.waiting + decode.running;
  if (waiting == 0 || stepping_) {
    // A running step that never ends is stuck as well: its begin counts.
    waiting_since_ns_ = stepping_ ? absl::ToUnixNanos(step_begin_) : 0;
  } else if (waiting_since_ns_ == 0) {
    waiting_since_ns_ = absl::ToUnixNanos(now);
  }
  waiting_ = waiting;
  {
    absl::MutexLock lock(&error_mu_);
    store_error_ = store_->error();
  }
  if (prefill_->idle() && decode_->idle()) {
    for (auto& done : std::exchange(when_idle_, {})) done();
  }
  const uint64_t said = (uint64_t{prefill.waiting} << 32) | (decode.running + decode.prefilling);
  if (said != noticed_) {
    noticed_ = said;
    changed_at_ = now;
  }
  report_owed_ = said != reported_;
  if (now < ReportDue()) return;
  report_owed_ = false;
  reported_ = said;
  last_report_ = now;
  next_report_ = now + kReportEvery;
  const internal::v1::WorkerLoad load = LoadNow();
  prefill_->SetSecondsPerToken(load.cost().prefill_per_token());
  decode_->SetStepCost(
      {load.cost().step_base(), load.cost().step_per_row(), load.cost().step_per_context()});
  events_.on_load(load);
}

void StepLoop::SetDraining() {
  queue_.Post([this] {
    draining_ = true;
    if (prefill_ == nullptr) return;
    prefill_->SetDraining();
    decode_->SetDraining();
  });
}

void StepLoop::WhenIdle(absl::AnyInvocable<void()> done) {
  auto shared = std::make_shared<absl::AnyInvocable<void()>>(std::move(done));
  queue_.Post([this, shared] {
    if (prefill_ == nullptr) return (*shared)();
    when_idle_.push_back(std::move(*shared));
  });
}

void StepLoop::EndAll(const absl::Status& status) {
  queue_.Post([this, status] {
    if (prefill_ == nullptr) return;
    prefill_->EndAll(status);
    decode_->EndAll(status);
  });
}

std::string StepLoop::StoreError() const {
  absl::MutexLock lock(&error_mu_);
  return store_error_;
}

std::string StepLoop::StuckReason() const {
  const int64_t since = waiting_since_ns_;
  if (since == 0) return "";
  const absl::Duration waited = options_.clock->Now() - absl::FromUnixNanos(since);
  if (waited < kStuckAfter) return "";
  return absl::StrCat("no step for ", absl::FormatDuration(absl::Trunc(waited, absl::Seconds(1))),
                      " with ", waiting_.load(), " sequences waiting");
}

void StepLoop::OnPrefillOpen(uint64_t stream, const internal::v1::PrefillOpen& open) {
  if (prefill_ == nullptr) {
    return prefills_->End(stream, absl::UnavailableError("the worker is still loading its model"));
  }
  prefill_->OnOpen(stream, open, options_.clock->Now());
}

void StepLoop::OnPrefillHalfClose(uint64_t stream) {
  if (prefill_ != nullptr) prefill_->OnHalfClose(stream, options_.clock->Now());
}

void StepLoop::OnPrefillBroken(uint64_t stream) {
  if (prefill_ != nullptr) prefill_->OnBroken(stream);
}

void StepLoop::OnStart(uint64_t gateway, const internal::v1::Start& start) {
  if (decode_ != nullptr) return decode_->OnStart(gateway, start, options_.clock->Now());
  internal::v1::TokenBatch batch;
  auto& update = *batch.add_updates();
  update.set_id(start.id());
  update.set_epoch(start.epoch());
  update.mutable_error()->set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  update.mutable_error()->set_message("the worker is still loading its model");
  update.set_failed_node(options_.self.node.value());
  gateways_->Send(gateway, std::move(batch));
}

void StepLoop::OnCancel(uint64_t gateway, const internal::v1::Cancel& cancel) {
  if (decode_ != nullptr) decode_->OnCancel(gateway, cancel);
}

void StepLoop::OnGatewayBroken(uint64_t gateway) {
  if (decode_ != nullptr) decode_->OnGatewayBroken(gateway);
}

void StepLoop::OnPrefillUp(uint64_t prefill, const internal::v1::PrefillUp& up) {
  if (decode_ != nullptr) decode_->OnPrefillUp(prefill, up, options_.clock->Now());
}

void StepLoop::OnPrefillEnd(uint64_t prefill, const absl::Status& status) {
  if (decode_ != nullptr) decode_->OnPrefillEnd(prefill, status, options_.clock->Now());
}

}  // namespace antiphon::worker
