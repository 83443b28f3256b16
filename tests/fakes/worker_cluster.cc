#include "tests/fakes/worker_cluster.h"

#include <gtest/gtest.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/wire_sampling.h"

namespace antiphon::fakes {

namespace wire = ::antiphon::internal::v1;

namespace {

constexpr int kMovesMax = 1'000'000;

// Random bytes of a root: one tenant.
const std::string kRootKey(16, 'r');

template <typename T>
T PopFront(std::deque<T>& queue) {
  T item = std::move(queue.front());
  queue.pop_front();
  return item;
}

}  // namespace

WorkerCluster::WorkerCluster(ClusterOptions options)
    : options_(std::move(options)), rng_(options_.seed) {
  for (uint32_t host = 0; host < options_.hosts; ++host) {
    stores_.push_back(std::make_unique<FakeStore>(
        SmallLayout(), options_.slots, next_incarnation_++, absl::StrCat("store-", host), &net_));
  }
  for (uint32_t host : options_.prefill_hosts) {
    prefills_.push_back(std::make_unique<PrefillWorker>());
    prefills_.back()->host = host;
    prefills_.back()->runner = MakeRunner();
    Attach(*prefills_.back());
  }
  for (uint32_t host : options_.decode_hosts) {
    decodes_.push_back(std::make_unique<DecodeWorker>());
    DecodeWorker& worker = *decodes_.back();
    worker.host = host;
    worker.runner = MakeRunner();
    worker.gateway = next_stream_++;
    worker.core = std::make_unique<decode::DecodeCore>(
        decode::CoreOptions{.self = NodeId(absl::StrCat("decode-", decodes_.size() - 1)),
                            .layout = SmallLayout(),
                            .vocab = 1000,
                            .context = 4096,
                            .sequences_max = options_.sequences_max,
                            .engine_makes_checksums = options_.engines_make_checksums});
    Attach(worker);
  }
}

WorkerCluster::~WorkerCluster() = default;

std::unique_ptr<HashRunner> WorkerCluster::MakeRunner() const {
  return std::make_unique<HashRunner>(
      SmallLayout(), engine::RunnerShape{.vocab = 1000,
                                         .context = 4096,
                                         .step_tokens_max = 64,
                                         .makes_checksums = options_.engines_make_checksums});
}

void WorkerCluster::Attach(PrefillWorker& worker) {
  FakeStore* store = stores_[worker.host].get();
  worker.client = next_client_++;
  worker.to_store.clear();
  worker.from_store.clear();
  if (worker.core == nullptr) {
    worker.core = std::make_unique<prefill::PrefillCore>(
        prefill::CoreOptions{.layout = SmallLayout(),
                             .vocab = 1000,
                             .context = 4096,
                             .publish_layers = 1,
                             .engine_makes_checksums = options_.engines_make_checksums});
  }
  worker.core->OnStoreAttached(
      {.incarnation = store->incarnation(),
       .data_address = store->address(),
       .payload = [store](uint32_t slot) { return store->Payload(slot); }});
}

void WorkerCluster::Attach(DecodeWorker& worker) {
  FakeStore* store = stores_[worker.host].get();
  worker.client = next_client_++;
  worker.to_store.clear();
  worker.from_store.clear();
  worker.core->OnStoreAttached(
      {.incarnation = store->incarnation(),
       .payload = [store](uint32_t slot) { return store->Payload(slot); }});
}

size_t WorkerCluster::Start(Request request) {
  requests_.push_back(std::make_unique<Request>(std::move(request)));
  Request& r = *requests_.back();
  if (r.id.empty()) {
    r.id.assign(16, '\0');
    for (char& c : r.id) c = static_cast<char>(rng_());
  }
  Place(r);
  return requests_.size() - 1;
}

void WorkerCluster::Place(Request& r) {
  ++r.epoch;
  ++r.placements;
  r.source.reset();
  wire::GenerateDown down;
  wire::Start& start = *down.mutable_start();
  start.set_id(r.id);
  start.set_epoch(r.epoch);
  start.mutable_prompt_ids()->Assign(r.prompt.begin(), r.prompt.end());
  start.mutable_emitted_ids()->Assign(r.emitted.begin(), r.emitted.end());
  *start.mutable_sampling() = r.sampling;
  start.mutable_stop()->set_max_tokens(r.max_tokens);
  start.mutable_stop()->set_min_tokens(r.min_tokens);
  start.mutable_stop()->mutable_stop_ids()->Assign(r.stop_ids.begin(), r.stop_ids.end());
  start.mutable_placement()->set_prefill_node(absl::StrCat("prefill-", r.prefill));
  start.mutable_placement()->set_prefill_address(absl::StrCat(r.prefill));
  // A conductor of yesterday does not say it.
  if (rng_() % 4 != 0) {
    start.mutable_placement()->set_prefill_store_incarnation(
        stores_[options_.prefill_hosts[r.prefill]]->incarnation());
  }
  for (const auto& source : r.sources) *start.mutable_placement()->add_sources() = source;
  start.set_root_key(kRootKey);
  decodes_[r.decode]->down.push_back(std::move(down));
}

void WorkerCluster::Cancel(size_t index) {
  Request& r = *requests_[index];
  wire::GenerateDown down;
  down.mutable_cancel()->set_id(r.id);
  down.mutable_cancel()->set_epoch(r.epoch);
  decodes_[r.decode]->down.push_back(std::move(down));
}

void WorkerCluster::OnTokens(const wire::TokenBatch& batch) {
  for (const auto& update : batch.updates()) {
    Request* r = nullptr;
    for (auto& candidate : requests_) {
      if (candidate->id == update.id()) r = candidate.get();
    }
    ASSERT_NE(r, nullptr);
    const bool ends = update.end_case() != wire::SequenceUpdate::END_NOT_SET;
    EXPECT_EQ(r->ends[update.epoch()], 0) << "an update after the end";
    if (ends) ++r->ends[update.epoch()];
    if (update.epoch() != r->epoch || r->over) continue;
    if (update.ids_size() > 0) {
      EXPECT_EQ(update.first_index(), r->emitted.size());
      EXPECT_EQ(update.logprobs_size(), r->sampling.logprobs() ? update.ids_size() : 0);
      r->emitted.insert(r->emitted.end(), update.ids().begin(), update.ids().end());
    }
    if (update.has_prompt_source()) r->source = update.prompt_source();
    if (!ends) continue;
    if (update.has_finish()) {
      r->finish = update.finish();
      r->over = true;
      continue;
    }
    const auto code = static_cast<absl::StatusCode>(update.error().code());
    r->error = absl::Status(code, update.error().message());
    r->failed_node = update.failed_node();
    const bool again =
        code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kResourceExhausted;
    if (again && r->placements < r->placements_max) {
      Place(*r);
    } else {
      r->over = true;
    }
  }
}

void WorkerCluster::Perform(PrefillWorker& worker) {
  for (prefill::Action& action : worker.core->TakeActions()) {
    if (auto* call = std::get_if<prefill::StoreCall>(&action)) {
      worker.to_store.push_back(std::move(call->request));
      continue;
    }
    uint64_t stream = 0;
    std::optional<wire::PrefillUp> up;
    std::optional<absl::Status> end;
    if (auto* send = std::get_if<prefill::Send>(&action)) {
      stream = send->stream;
      up = std::move(send->message);
    } else {
      stream = std::get<prefill::End>(action).stream;
      end = std::get<prefill::End>(action).status;
    }
    for (auto& owned : calls_) {
      Call* call = owned.get();
      if (call->prefill_handle != stream) continue;
      if (end.has_value()) call->down_closed = true;
      call->up.push_back([this, call, up, end] {
        if (std::exchange(call->up_closed, call->up_closed || end.has_value())) return;
        auto& core = *decodes_[call->decode]->core;
        if (up.has_value()) core.OnPrefillUp(call->decode_handle, *up, now_);
        if (end.has_value()) core.OnPrefillEnd(call->decode_handle, *end, now_);
        Perform(*decodes_[call->decode], call->decode);
      });
    }
  }
}

void WorkerCluster::Perform(DecodeWorker& worker, uint32_t index) {
  for (decode::Action& action : worker.core->TakeActions()) {
    if (auto* call = std::get_if<decode::StoreCall>(&action)) {
      worker.to_store.push_back(std::move(call->request));
    } else if (auto* send = std::get_if<decode::SendTokens>(&action)) {
      if (send->gateway == worker.gateway) worker.up.push_back(std::move(send->batch));
    } else if (auto* open = std::get_if<decode::OpenPrefill>(&action)) {
      calls_.push_back(std::make_unique<Call>());
      Call* call = calls_.back().get();
      call->decode = index;
      call->decode_handle = open->prefill;
      call->prefill = std::stoul(open->address);
      call->prefill_handle = next_stream_++;
      call->down.push_back([this, call, message = open->open] {
        call->opened = true;
        prefills_[call->prefill]->core->OnOpen(call->prefill_handle, message, now_);
        Perform(*prefills_[call->prefill]);
      });
    } else {
      const bool half_close = std::holds_alternative<decode::HalfClosePrefill>(action);
      const uint64_t handle = half_close ? std::get<decode::HalfClosePrefill>(action).prefill
                                         : std::get<decode::CancelPrefill>(action).prefill;
      for (auto& owned : calls_) {
        Call* call = owned.get();
        if (call->decode != index || call->decode_handle != handle) continue;
        if (!half_close) call->up_closed = true;
        call->down.push_back([this, call, half_close] {
          auto& core = *prefills_[call->prefill]->core;
          if (half_close) {
            core.OnHalfClose(call->prefill_handle, now_);
          } else {
            call->down_closed = true;
            core.OnBroken(call->prefill_handle);
          }
          Perform(*prefills_[call->prefill]);
        });
      }
    }
  }
}

bool WorkerCluster::Step(PrefillWorker& worker) {
  if (!worker.stepping) {
    engine::Step step;
    worker.core->Plan(options_.chunk_tokens, now_, step.chunks);
    Perform(worker);
    if (step.chunks.empty()) return false;
    EXPECT_TRUE(worker.runner->Submit(std::move(step)).ok());
    worker.stepping = true;
    return true;
  }
  worker.runner->AdvanceLayer();
  worker.core->OnProgress(worker.runner->Progress().layers_done);
  if (worker.runner->Progress().finished) {
    worker.stepping = false;
    auto result = worker.runner->Take();
    worker.core->OnStepDone(
        result.ok() ? absl::StatusOr<absl::Span<const engine::ChunkResult>>(result->chunks)
                    : result.status(),
        now_);
    Perform(worker);
    worker.core->CommitStep();
  }
  Perform(worker);
  return true;
}

bool WorkerCluster::Step(DecodeWorker& worker, uint32_t index) {
  if (!worker.stepping) {
    engine::Step step;
    worker.core->Plan(now_, step.chunks);
    Perform(worker, index);
    if (step.chunks.empty()) return !worker.to_store.empty();
    EXPECT_TRUE(worker.runner->Submit(std::move(step)).ok());
    worker.stepping = true;
    return true;
  }
  worker.runner->AdvanceLayer();
  if (worker.runner->Progress().finished) {
    worker.stepping = false;
    auto result = worker.runner->Take();
    worker.core->OnStepDone(
        result.ok() ? absl::StatusOr<absl::Span<const engine::ChunkResult>>(result->chunks)
                    : result.status(),
        now_);
  }
  Perform(worker, index);
  return true;
}

void WorkerCluster::RouteReplies() {
  for (auto& store : stores_) {
    while (!store->replies().empty()) {
      FakeStore::Reply reply = PopFront(store->replies());
      for (auto& worker : prefills_) {
        if (worker->client == reply.client) worker->from_store.push_back(reply.reply);
      }
      for (auto& worker : decodes_) {
        if (worker->client == reply.client) worker->from_store.push_back(reply.reply);
      }
    }
  }
}

void WorkerCluster::Collect(std::vector<std::function<void()>>& moves) {
  const auto store_side = [&](Worker& worker) {
    if (worker.to_store.empty()) return;
    moves.push_back([this, &worker] {
      stores_[worker.host]->Handle(worker.client, PopFront(worker.to_store));
    });
  };
  for (auto& owned : prefills_) {
    PrefillWorker* worker = owned.get();
    store_side(*worker);
    if (!worker->from_store.empty()) {
      moves.push_back([this, worker] {
        worker->core->OnStoreReply(PopFront(worker->from_store), now_);
        Perform(*worker);
      });
    }
    if (worker->stepping) moves.push_back([this, worker] { Step(*worker); });
  }
  for (uint32_t i = 0; i < decodes_.size(); ++i) {
    DecodeWorker* worker = decodes_[i].get();
    store_side(*worker);
    if (!worker->from_store.empty()) {
      moves.push_back([this, worker, i] {
        worker->core->OnStoreReply(PopFront(worker->from_store), now_);
        Perform(*worker, i);
      });
    }
    if (!worker->down.empty()) {
      moves.push_back([this, worker, i] {
        const wire::GenerateDown down = PopFront(worker->down);
        if (down.has_start()) worker->core->OnStart(worker->gateway, down.start(), now_);
        if (down.has_cancel()) worker->core->OnCancel(worker->gateway, down.cancel());
        Perform(*worker, i);
      });
    }
    if (!worker->up.empty()) moves.push_back([this, worker] { OnTokens(PopFront(worker->up)); });
    if (worker->stepping) moves.push_back([this, worker, i] { Step(*worker, i); });
  }
  for (auto& owned : calls_) {
    Call* call = owned.get();
    if (!call->down.empty()) {
      moves.push_back([call] {
        const auto message = PopFront(call->down);
        if (!call->down_closed) message();
      });
    }
    if (!call->up.empty()) moves.push_back([call] { PopFront(call->up)(); });
  }
  for (auto& store : stores_) {
    if (store->HasCopies()) moves.push_back([&store] { store->Pump(); });
  }
}

bool WorkerCluster::Move() {
  RouteReplies();
  std::vector<std::function<void()>> moves;
  Collect(moves);
  const size_t workers = prefills_.size() + decodes_.size();
  const auto plan = [this](size_t i) {
    if (i < prefills_.size()) return !prefills_[i]->stepping && Step(*prefills_[i]);
    i -= prefills_.size();
    return !decodes_[i]->stepping && Step(*decodes_[i], i);
  };
  const uint64_t draw = Random(moves.size() + workers);
  if (draw < moves.size()) {
    moves[draw]();
  } else if (!plan(draw - moves.size())) {
    if (!moves.empty()) return true;
    for (size_t i = 0; i < workers; ++i) {
      if (plan(i)) return true;
    }
    std::erase_if(calls_, [](const auto& call) { return call->up.empty() && call->down.empty(); });
    return false;
  }
  return true;
}

void WorkerCluster::Run() {
  for (int i = 0; i < kMovesMax; ++i) {
    if (!Move()) return;
  }
  ADD_FAILURE() << "no end after " << kMovesMax << " moves";
}

void WorkerCluster::Advance(absl::Duration d) {
  now_ += d;
  for (auto& worker : prefills_) {
    worker->core->Tick(now_);
    EXPECT_GT(worker->core->next_deadline(), now_);
    Perform(*worker);
  }
  for (uint32_t i = 0; i < decodes_.size(); ++i) {
    decodes_[i]->core->Tick(now_);
    EXPECT_GT(decodes_[i]->core->next_deadline(), now_);
    Perform(*decodes_[i], i);
  }
}

void WorkerCluster::Break(Call& call) {
  call.down.clear();
  call.up.clear();
  if (call.opened && !call.down_closed) {
    call.down_closed = true;
    prefills_[call.prefill]->core->OnBroken(call.prefill_handle);
    Perform(*prefills_[call.prefill]);
  }
  if (!call.up_closed) {
    call.up_closed = true;
    decodes_[call.decode]->core->OnPrefillEnd(call.decode_handle,
                                              absl::UnavailableError("connection reset"), now_);
    Perform(*decodes_[call.decode], call.decode);
  }
  call.down_closed = true;
}

void WorkerCluster::BreakPrefillStream() {
  if (!calls_.empty()) Break(*calls_[Random(calls_.size())]);
}

void WorkerCluster::BreakGateway(uint32_t index) {
  DecodeWorker& worker = *decodes_[index];
  for (auto& r : requests_) {
    if (r->decode == index) r->over = true;
  }
  worker.down.clear();
  worker.up.clear();
  worker.core->OnGatewayBroken(worker.gateway);
  worker.gateway = next_stream_++;
  Perform(worker, index);
}

void WorkerCluster::RestartStore(uint32_t host) {
  dead_stores_.push_back(std::move(stores_[host]));
  stores_[host] = std::make_unique<FakeStore>(SmallLayout(), options_.slots, next_incarnation_++,
                                              absl::StrCat("store-", host), &net_);
  const absl::Status why = absl::UnavailableError("connection reset");
  for (auto& worker : prefills_) {
    if (worker->host != host) continue;
    worker->core->OnStoreLost(why, now_);
    Attach(*worker);
    Perform(*worker);
  }
  for (uint32_t i = 0; i < decodes_.size(); ++i) {
    if (decodes_[i]->host != host) continue;
    decodes_[i]->core->OnStoreLost(why, now_);
    Attach(*decodes_[i]);
    Perform(*decodes_[i], i);
  }
}

void WorkerCluster::RestartPrefill(uint32_t index) {
  PrefillWorker& worker = *prefills_[index];
  stores_[worker.host]->DropClient(worker.client);
  worker.core = nullptr;
  worker.runner = MakeRunner();
  worker.stepping = false;
  Attach(worker);
  for (auto& call : calls_) {
    if (call->prefill != index) continue;
    call->down_closed = true;
    Break(*call);
  }
}

std::string WorkerCluster::Leaks() const {
  std::string leaks;
  for (size_t i = 0; i < stores_.size(); ++i) {
    if (stores_[i]->held() > 0)
      absl::StrAppend(&leaks, "store ", i, " holds ", stores_[i]->held(), "; ");
    if (stores_[i]->errors() > 0) {
      absl::StrAppend(&leaks, "store ", i, " saw a broken client: ", stores_[i]->last_error(),
                      "; ");
    }
  }
  for (size_t i = 0; i < prefills_.size(); ++i) {
    if (!prefills_[i]->core->idle()) absl::StrAppend(&leaks, "prefill ", i, " is not idle; ");
  }
  for (size_t i = 0; i < decodes_.size(); ++i) {
    if (!decodes_[i]->core->idle()) absl::StrAppend(&leaks, "decode ", i, " is not idle; ");
  }
  return leaks;
}

std::vector<uint32_t> WorkerCluster::Reference(size_t index) const {
  const Request& r = *requests_[index];
  return ReferenceTokens(r.prompt, *engine::SamplingFromProto(r.sampling, 1000), r.max_tokens,
                         r.min_tokens, r.stop_ids);
}

}  // namespace antiphon::fakes
