#include "transfer/faulty_transport.h"

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/philox.h"

namespace antiphon::transfer {
namespace {

enum class Fault { kNone, kFail, kWrongByte, kTorn, kLate };

uint64_t BytesOf(const std::vector<Slice>& slices) {
  uint64_t total = 0;
  for (const Slice& slice : slices) total += slice.bytes;
  return total;
}

void FlipByte(const std::vector<Slice>& slices, uint64_t at) {
  for (const Slice& slice : slices) {
    if (at < slice.bytes) {
      slice.local[at] ^= std::byte{0x40};
      return;
    }
    at -= slice.bytes;
  }
}

// Keeps what was in the second half of the memory before the pull.
std::vector<std::byte> SecondHalf(const std::vector<Slice>& slices) {
  std::vector<std::byte> old;
  const uint64_t from = BytesOf(slices) / 2;
  uint64_t at = 0;
  for (const Slice& slice : slices) {
    for (uint32_t i = 0; i < slice.bytes; ++i, ++at) {
      if (at >= from) old.push_back(slice.local[i]);
    }
  }
  return old;
}

void PutSecondHalf(const std::vector<Slice>& slices, const std::vector<std::byte>& old) {
  const uint64_t from = BytesOf(slices) / 2;
  uint64_t at = 0;
  for (const Slice& slice : slices) {
    for (uint32_t i = 0; i < slice.bytes; ++i, ++at) {
      if (at >= from) slice.local[i] = old[at - from];
    }
  }
}

// Pulls that have ended, whose `done` waits. Outlives the transport, for timers point to it.
class LateEnds {
 public:
  uint64_t Add(PullDone done, absl::Status status) {
    absl::MutexLock lock(&mu_);
    ends_.emplace(++last_, End{std::move(done), std::move(status)});
    return last_;
  }
  // No effect when it ran already.
  void Run(uint64_t id) {
    End end;
    {
      absl::MutexLock lock(&mu_);
      auto it = ends_.find(id);
      if (it == ends_.end()) return;
      end = std::move(it->second);
      ends_.erase(it);
      ++running_;
    }
    end.done(end.status);
    end.done = nullptr;
    absl::MutexLock lock(&mu_);
    --running_;
  }
  // All that wait; comes back when none runs any more.
  void RunAll() {
    while (const uint64_t id = First()) Run(id);
    const auto none_runs = [this] {
      mu_.AssertHeld();
      return running_ == 0;
    };
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&none_runs));
  }

 private:
  struct End {
    PullDone done;
    absl::Status status;
  };
  uint64_t First() {
    absl::MutexLock lock(&mu_);
    return ends_.empty() ? 0 : ends_.begin()->first;
  }

  absl::Mutex mu_;
  std::map<uint64_t, End> ends_ ABSL_GUARDED_BY(mu_);
  uint64_t last_ ABSL_GUARDED_BY(mu_) = 0;
  int running_ ABSL_GUARDED_BY(mu_) = 0;
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, FaultRates rates, uint64_t seed,
                  Executor* executor)
      : inner_(std::move(inner)), rates_(rates), seed_(seed), executor_(executor) {}
  ~FaultyTransport() override {
    inner_ = nullptr;
    late_->RunAll();
  }

  absl::Status Export(RegionId id, const std::byte* base, size_t bytes) override {
    return inner_->Export(id, base, bytes);
  }
  void Unexport(RegionId id) override { inner_->Unexport(id); }
  void Cancel(PullId id) override { inner_->Cancel(id); }
  std::string address() const override { return inner_->address(); }

  PullId Pull(PullRequest request, PullDone done) override {
    double chance = 0;
    const Fault fault = Choose(chance);
    const std::vector<Slice> slices = request.slices;
    switch (fault) {
      case Fault::kNone:
        return inner_->Pull(std::move(request), std::move(done));
      case Fault::kFail:
        // A pull of nothing from nowhere: the inner transport ends it on its own thread.
        request.slices.clear();
        return inner_->Pull(std::move(request), [done = std::move(done)](absl::Status) mutable {
          done(absl::UnavailableError("injected"));
        });
      case Fault::kWrongByte:
        return inner_->Pull(std::move(request), [done = std::move(done), slices,
                                                 chance](absl::Status status) mutable {
          const uint64_t bytes = BytesOf(slices);
          if (status.ok() && bytes > 0) {
            FlipByte(slices, static_cast<uint64_t>(chance * static_cast<double>(bytes)));
          }
          done(status);
        });
      case Fault::kTorn:
        return inner_->Pull(std::move(request),
                            [done = std::move(done), slices,
                             old = SecondHalf(slices)](absl::Status status) mutable {
                              if (status.ok()) PutSecondHalf(slices, old);
                              done(status);
                            });
      case Fault::kLate:
        return inner_->Pull(std::move(request),
                            [executor = executor_, late = late_, delay = chance * rates_.late_max,
                             done = std::move(done)](absl::Status status) mutable {
                              const uint64_t id = late->Add(std::move(done), std::move(status));
                              executor->PostAfter(delay, [late, id] { late->Run(id); });
                            });
    }
    return 0;
  }

 private:
  Fault Choose(double& chance) {
    uint64_t n = 0;
    {
      absl::MutexLock lock(&mu_);
      n = pulls_++;
    }
    double u = PhiloxUniform(seed_, 2 * n);
    chance = PhiloxUniform(seed_, 2 * n + 1);
    const std::pair<double, Fault> table[] = {{rates_.fail, Fault::kFail},
                                              {rates_.wrong_byte, Fault::kWrongByte},
                                              {rates_.torn, Fault::kTorn},
                                              {rates_.late, Fault::kLate}};
    for (const auto& [rate, fault] : table) {
      if (u < rate) return fault;
      u -= rate;
    }
    return Fault::kNone;
  }

  std::unique_ptr<Transport> inner_;
  const FaultRates rates_;
  const uint64_t seed_;
  Executor* const executor_;
  const std::shared_ptr<LateEnds> late_ = std::make_shared<LateEnds>();
  absl::Mutex mu_;
  uint64_t pulls_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace

std::unique_ptr<Transport> MakeFaultyTransport(std::unique_ptr<Transport> inner, FaultRates rates,
                                               uint64_t seed, Executor* executor) {
  return std::make_unique<FaultyTransport>(std::move(inner), rates, seed, executor);
}

}  // namespace antiphon::transfer
