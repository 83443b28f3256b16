// How long a placement takes: 1,000 workers on 500 hosts, an index of millions of blocks, prompts
// of some thousand tokens. Prints the percentiles, one decision at a time on one core.
//
//   decide_bench [blocks, default 10000000] [decisions, default 20000]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "conductor/decide.h"

namespace antiphon::conductor {
namespace {

constexpr int kHosts = 500;
constexpr uint32_t kBlockTokens = 64;
constexpr size_t kChainBlocks = 188;  // 12,000 tokens

BlockKey RandomKey(std::mt19937_64& rng) {
  std::array<uint8_t, 16> bytes;
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng());
  return BlockKey(bytes);
}

void AddHosts(View& view, std::mt19937_64& rng, absl::Time now) {
  Cost cost{.prefill_per_token = 1.1e-4,
            .prefill_per_pair = 1.5e-9,
            .step_base = 0.02,
            .step_per_row = 1e-4,
            .step_per_context = 1e-8,
            .bytes_per_token = 327'680,
            .transfer_bytes_per_s = 2e10};
  for (int i = 0; i < kHosts; ++i) {
    Store store;
    store.id = NodeId("store-" + std::to_string(10'000 + i));
    store.incarnation = 1 + i;
    store.slot_count = 1 << 20;
    store.slots_free = 1 << 19;
    store.load_known = true;
    store.holder = view.index.AddHolder();
    view.store_of_holder.push_back(i);
    view.stores.push_back(store);
    for (WorkerRole role : {WorkerRole::kDecode, WorkerRole::kPrefill}) {
      Worker worker;
      worker.id = NodeId(std::string(NameOf(role)) + "-" + std::to_string(10'000 + i));
      worker.role = role;
      worker.rpc_address = "10.0.0.1:7404";
      worker.store_incarnation = store.incarnation;
      worker.store = i;
      worker.cost = cost;
      worker.reported_at = now;
      worker.queue_s = static_cast<double>(rng() % 1000) * 1e-3;
      worker.running = role == WorkerRole::kDecode ? rng() % 64 : 0;
      worker.context_tokens = worker.running * 4000.0;
      for (uint32_t r = 0; r < worker.running; ++r) {
        worker.decodes.push_back({.id = RequestId(),
                                  .starts_at = now - absl::Seconds(r % 20),
                                  .context_tokens = 4000,
                                  .started = true});
      }
      worker.Refresh();
      view.workers.push_back(std::move(worker));
    }
  }
  std::sort(view.workers.begin(), view.workers.end(),
            [](const Worker& a, const Worker& b) { return a.id < b.id; });
}

}  // namespace
}  // namespace antiphon::conductor

int main(int argc, char** argv) {
  using namespace antiphon;
  using namespace antiphon::conductor;
  using Clock = std::chrono::steady_clock;
  const size_t blocks = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10'000'000;
  const size_t decisions = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20'000;
  std::mt19937_64 rng(1);
  const absl::Time now = absl::UnixEpoch() + absl::Hours(1);
  View view(2 * blocks + 1, 7);
  view.model_names = {"m"};
  view.block_tokens = kBlockTokens;
  view.decode_seconds = 20;
  AddHosts(view, rng, now);

  // A system prompt of 16 blocks that every host has; then chains that branch off it, each on one
  // to three hosts.
  std::vector<BlockKey> system;
  for (int i = 0; i < 16; ++i) system.push_back(RandomKey(rng));
  for (const BlockKey& key : system) {
    for (const Store& store : view.stores) view.index.Insert(key, view.fingerprint, store.holder);
  }
  std::vector<std::vector<BlockKey>> chains;
  const auto fill_begin = Clock::now();
  size_t inserted = 0;
  while (view.index.blocks() < blocks) {
    std::vector<BlockKey> chain = system;
    const int copies = 1 + static_cast<int>(rng() % 3);
    while (chain.size() < kChainBlocks) chain.push_back(RandomKey(rng));
    for (int c = 0; c < copies; ++c) {
      const auto holder = view.stores[rng() % kHosts].holder;
      for (size_t i = system.size(); i < chain.size(); ++i) {
        inserted += view.index.Insert(chain[i], view.fingerprint, holder);
      }
    }
    if (chains.size() < 20'000) {
      chains.push_back(std::move(chain));
    } else {
      chains[rng() % chains.size()] = std::move(chain);
    }
  }
  const double fill_s = std::chrono::duration<double>(Clock::now() - fill_begin).count();
  std::printf("index: %zu blocks, %zu inserts, %.2f M inserts/s\n", view.index.blocks(), inserted,
              static_cast<double>(inserted) / fill_s / 1e6);

  Policy policy;
  std::vector<double> match_us, decide_us;
  uint64_t checksum = 0;
  for (size_t i = 0; i < decisions; ++i) {
    Request request;
    request.model = "m";
    request.keys = chains[rng() % chains.size()];
    request.prompt_count = static_cast<uint32_t>(request.keys.size()) * kBlockTokens + 30;
    const auto begin = Clock::now();
    const auto matches = view.index.LongestPrefixes(request.keys, view.fingerprint);
    const auto matched = Clock::now();
    const Decision decision = Decide(request, view, policy, now);
    const auto end = Clock::now();
    checksum += matches.size() + decision.best_blocks;
    match_us.push_back(std::chrono::duration<double, std::micro>(matched - begin).count());
    decide_us.push_back(std::chrono::duration<double, std::micro>(end - matched).count());
  }
  for (auto& [name, us] :
       {std::pair<const char*, std::vector<double>&>{"match ", match_us}, {"decide", decide_us}}) {
    std::sort(us.begin(), us.end());
    double sum = 0;
    for (double v : us) sum += v;
    const auto at = [&us](double q) { return us[static_cast<size_t>(q * (us.size() - 1))]; };
    std::printf("%s: mean %.1f us, p50 %.1f us, p99 %.1f us, p99.9 %.1f us, max %.1f us\n", name,
                sum / us.size(), at(.5), at(.99), at(.999), us.back());
  }
  std::printf("checksum %llu\n", static_cast<unsigned long long>(checksum));
  return 0;
}
