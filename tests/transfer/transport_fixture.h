// What the tests of the transports share: patterns, pulls one can wait for, a clock that moves when
// told, and a fixture that counts descriptors.
#ifndef ANTIPHON_TESTS_TRANSFER_TRANSPORT_FIXTURE_H_
#define ANTIPHON_TESTS_TRANSFER_TRANSPORT_FIXTURE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "tests/transfer/raw_peer.h"
#include "transfer/tcp_transport.h"
#include "transfer/transport.h"

namespace antiphon::transfer {

// Bytes that differ at every place and between seeds.
Bytes Pattern(size_t bytes, uint64_t seed);

size_t OpenDescriptors();

// The end of one pull.
class PullEnd {
 public:
  PullEnd() : state_(std::make_shared<State>()) {}
  PullDone Done();
  // INTERNAL when the pull does not end in time.
  absl::Status Wait() const;
  bool ended() const { return times() > 0; }
  int times() const;

 private:
  struct State {
    mutable absl::Mutex mu;
    int times ABSL_GUARDED_BY(mu) = 0;
    absl::Status status ABSL_GUARDED_BY(mu);
  };
  std::shared_ptr<State> state_;
};

absl::Status PullNow(Transport& transport, PullRequest request);
PullRequest OneSlice(const std::string& peer, RegionId region, uint64_t offset, Bytes& local);

// Thread-safe.
class TestClock final : public Clock {
 public:
  absl::Time Now() const override;
  absl::Time WallNow() const override { return Now(); }
  void Advance(absl::Duration d);
  uint64_t calls() const;
  // False when nobody asks in time.
  bool WaitForCalls(uint64_t calls) const;

 private:
  mutable absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::UnixEpoch();
  mutable uint64_t calls_ ABSL_GUARDED_BY(mu_) = 0;
};

// Each test leaves as many descriptors open as it found.
class TransferTest : public ::testing::Test {
 protected:
  TransferTest() : descriptors_(OpenDescriptors()) {}
  ~TransferTest() override { EXPECT_EQ(OpenDescriptors(), descriptors_); }

  static std::unique_ptr<Transport> Make(TcpOptions options = {});

 private:
  const size_t descriptors_;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TESTS_TRANSFER_TRANSPORT_FIXTURE_H_
