#include "tests/transfer/transport_fixture.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "common/status_macros.h"

namespace antiphon::transfer {

Bytes Pattern(size_t bytes, uint64_t seed) {
  Bytes out(bytes);
  for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
    // SplitMix64 of (seed, place).
    uint64_t z = (seed << 40) + at * 0x9E3779B97F4A7C15 + 1;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z ^= z >> 31;
    std::memcpy(out.data() + at, &z, std::min(sizeof(z), bytes - at));
  }
  return out;
}

size_t OpenDescriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

PullDone PullEnd::Done() {
  return [state = state_](absl::Status status) {
    absl::MutexLock lock(&state->mu);
    ++state->times;
    // A Status of its own: the library counts references where ThreadSanitizer does not see it.
    state->status = absl::Status(status.code(), status.message());
  };
}

absl::Status PullEnd::Wait() const {
  const State* state = state_.get();
  absl::MutexLock lock(&state->mu);
  const auto ended = [state] {
    state->mu.AssertHeld();
    return state->times > 0;
  };
  if (!state->mu.AwaitWithTimeout(absl::Condition(&ended), kPatience)) {
    return absl::InternalError("the pull does not end");
  }
  return absl::Status(state->status.code(), state->status.message());
}

int PullEnd::times() const {
  absl::MutexLock lock(&state_->mu);
  return state_->times;
}

absl::Status PullNow(Transport& transport, PullRequest request) {
  PullEnd end;
  transport.Pull(std::move(request), end.Done());
  return end.Wait();
}

PullRequest OneSlice(const std::string& peer, RegionId region, uint64_t offset, Bytes& local) {
  return {.peer = peer,
          .region = region,
          .slices = {{offset, local.data(), static_cast<uint32_t>(local.size())}}};
}

absl::Time TestClock::Now() const {
  absl::MutexLock lock(&mu_);
  ++calls_;
  return now_;
}

void TestClock::Advance(absl::Duration d) {
  absl::MutexLock lock(&mu_);
  now_ += d;
}

uint64_t TestClock::calls() const {
  absl::MutexLock lock(&mu_);
  return calls_;
}

bool TestClock::WaitForCalls(uint64_t calls) const {
  absl::MutexLock lock(&mu_);
  const auto enough = [this, calls] {
    mu_.AssertHeld();
    return calls_ >= calls;
  };
  return mu_.AwaitWithTimeout(absl::Condition(&enough), kPatience);
}

std::unique_ptr<Transport> TransferTest::Make(TcpOptions options) {
  auto transport = MakeTcpTransport(std::move(options));
  CHECK(transport.ok());
  return *std::move(transport);
}

}  // namespace antiphon::transfer
