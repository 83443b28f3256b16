#include "gateway/dispatcher.h"

#include <algorithm>

#include "common/logging.h"

namespace antiphon::gateway {
namespace {

// How exactly deadlines and retries are kept: looks at the clock are no closer.
constexpr absl::Duration kTick = absl::Milliseconds(50);

}  // namespace

void Dispatcher::Submit(const RequestId& request, std::unique_ptr<Exchange> exchange,
                        std::shared_ptr<ResponseSink> sink) {
  auto running = std::make_unique<Running>();
  running->exchange = std::move(exchange);
  running->sink = std::move(sink);
  uint32_t choice = 0;
  for (const auto& generation : running->exchange->choices()) {
    generations_[generation->spec().id] = {request, choice++};
  }
  Running& r = *running;
  requests_[request] = std::move(running);
  r.exchange->Begin(options_.clock->Now());
  Perform(request, r);
}

void Dispatcher::Cancel(const RequestId& request) {
  const auto it = requests_.find(request);
  if (it == requests_.end()) return;
  it->second->exchange->OnCancel(options_.clock->Now());
  Perform(request, *it->second);
}

void Dispatcher::AbortAll(const ApiError& error) {
  std::vector<RequestId> all;
  for (const auto& [id, running] : requests_) all.push_back(id);
  std::sort(all.begin(), all.end());
  for (const RequestId& id : all) {
    Running& running = *requests_[id];
    running.exchange->OnAbort(error, options_.clock->Now());
    Perform(id, running);
  }
}

void Dispatcher::Deliver(const RequestId& request, uint32_t choice,
                         const std::function<void(Generation&)>& event) {
  const auto it = requests_.find(request);
  if (it == requests_.end()) return;
  Running& running = *it->second;
  running.exchange->Deliver(choice, options_.clock->Now(), event);
  Perform(request, running);
}

void Dispatcher::OnTokens(const wire::TokenBatch& batch) {
  for (const wire::SequenceUpdate& update : batch.updates()) {
    const auto id = RequestId::FromBytes(update.id());
    if (!id) continue;
    const auto it = generations_.find(*id);
    if (it == generations_.end()) continue;  // ended here, not there yet
    const Place place = it->second;
    if (update.end_case() == wire::SequenceUpdate::kError) {
      LogWarning(Req(update.id().empty() ? "" : id->Hex()), "decode: {} (code {}, node {})",
                 update.error().message(), update.error().code(), update.failed_node());
    }
    Deliver(place.request, place.choice,
            [&](Generation& g) { g.OnUpdate(update, options_.clock->Now()); });
  }
}

void Dispatcher::OnDecodeBroken(const std::string& address, const absl::Status& why) {
  std::vector<RequestId> all;
  for (const auto& [id, running] : requests_) all.push_back(id);
  std::sort(all.begin(), all.end());
  for (const RequestId& id : all) {
    const auto it = requests_.find(id);
    if (it == requests_.end()) continue;
    it->second->exchange->OnDecodeBroken(address, why, options_.clock->Now());
    Perform(id, *it->second);
  }
}

void Dispatcher::Perform(const RequestId& request, Running& running) {
  for (auto& generation : running.exchange->choices()) {
    auto& intervals = generation->stats().intervals_s;
    if (intervals.empty()) continue;
    running.sink->OnIntervals(intervals);
    intervals.clear();
  }
  // What the conductor learns for its books comes after what a client waits for.
  std::vector<ToCluster> reports;
  bool done = false;
  for (Output& output : running.exchange->TakeOutputs()) {
    if (auto* cluster = std::get_if<ToCluster>(&output)) {
      if (std::holds_alternative<Report>(cluster->action)) {
        reports.push_back(std::move(*cluster));
      } else {
        PerformOnCluster(request, running, cluster->choice, cluster->action);
      }
    } else if (auto* delta = std::get_if<ChoiceDelta>(&output)) {
      running.sink->OnDelta(*delta);
    } else if (auto* end = std::get_if<ChoiceEnd>(&output)) {
      running.sink->OnChoiceEnd(*end);
    } else {
      running.sink->OnDone(std::get<RequestEnd>(output), running.exchange.get());
      done = true;
    }
  }
  for (ToCluster& report : reports) {
    PerformOnCluster(request, running, report.choice, report.action);
  }
  if (done) return Remove(request);
  WakeAt(running.exchange->next_timer());
}

void Dispatcher::PerformOnCluster(const RequestId& request, Running& running, uint32_t choice,
                                  Action& action) {
  const std::string id = running.exchange->choices()[choice]->spec().id.ToBytes();
  if (auto* admit = std::get_if<Admit>(&action)) {
    const uint32_t epoch = admit->request.epoch();
    // The answer comes later, never from within the call.
    running.admits[choice] = upstream_->Admit(
        std::move(admit->request),
        [this, request, choice, epoch](absl::StatusOr<wire::AdmitReply> reply) {
          Deliver(request, choice,
                  [&](Generation& g) { g.OnAdmitReply(epoch, reply, options_.clock->Now()); });
        });
  } else if (std::holds_alternative<AbandonAdmit>(action)) {
    upstream_->AbandonAdmit(running.admits[choice]);
  } else if (auto* start = std::get_if<StartOn>(&action)) {
    if (start->start.epoch() > 1) {
      LogInfo(Req(start->start.request_label()),
              "epoch {} continues at token {} on {} (prefill {})", start->start.epoch(),
              start->start.emitted_ids_size(), start->node,
              start->start.placement().prefill_node());
    }
    upstream_->Start(start->address, std::move(start->start));
  } else if (auto* cancel = std::get_if<CancelOn>(&action)) {
    wire::Cancel message;
    message.set_id(id);
    message.set_epoch(cancel->epoch);
    upstream_->Cancel(cancel->address, std::move(message));
  } else if (auto* report = std::get_if<Report>(&action)) {
    upstream_->Finish(std::move(report->report));
  }
}

void Dispatcher::Remove(const RequestId& request) {
  const auto it = requests_.find(request);
  for (const auto& generation : it->second->exchange->choices()) {
    generations_.erase(generation->spec().id);
  }
  requests_.erase(it);
}

// The timer goes off for the earliest of all; what moves later in the meantime makes it find
// nothing, and it is set anew.
void Dispatcher::WakeAt(absl::Time due) {
  if (due >= wake_at_) return;
  if (timer_ != 0) options_.executor->CancelTimer(timer_);
  wake_at_ = due;
  const absl::Duration wait = std::max(kTick, due - options_.clock->Now());
  timer_ = options_.executor->PostAfter(wait, [this] {
    timer_ = 0;
    wake_at_ = absl::InfiniteFuture();
    Tick();
  });
}

void Dispatcher::Tick() {
  const absl::Time now = options_.clock->Now();
  std::vector<RequestId> due;
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [id, running] : requests_) {
    const absl::Time timer = running->exchange->next_timer();
    if (timer <= now) {
      due.push_back(id);
    } else {
      next = std::min(next, timer);
    }
  }
  std::sort(due.begin(), due.end());
  for (const RequestId& id : due) {
    const auto it = requests_.find(id);
    if (it == requests_.end()) continue;
    it->second->exchange->OnTimer(now);
    Perform(id, *it->second);
  }
  WakeAt(next);
}

}  // namespace antiphon::gateway
