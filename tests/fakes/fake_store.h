// A KV store in memory, for tests of workers: the whole local protocol, other stores included.
// Freed slots are scribbled over, so that whoever reads one too late reads wrong bytes. Copies of a
// fetch happen one at a time in Pump, so that a test decides what happens between them.
#ifndef ANTIPHON_TESTS_FAKES_FAKE_STORE_H_
#define ANTIPHON_TESTS_FAKES_FAKE_STORE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "antiphon/v1/store.pb.h"
#include "common/ids.h"
#include "common/kv_layout.h"

namespace antiphon::fakes {

class FakeStore;

// All stores by their data and RPC addresses.
using StoreNet = std::map<std::string, FakeStore*>;

class FakeStore {
 public:
  struct Reply {
    uint64_t client = 0;
    internal::v1::StoreReply reply;
  };

  FakeStore(KvLayout layout, uint32_t slots, uint64_t incarnation, std::string address,
            StoreNet* net);
  ~FakeStore();

  // Answers appear in replies(), in order.
  void Handle(uint64_t client, const internal::v1::StoreRequest& request);
  std::deque<Reply>& replies() { return replies_; }
  // One pending copy of a fetch; false when there was none.
  bool Pump();
  bool HasCopies() const { return !copies_.empty(); }
  // The client is gone: all that it held is released.
  void DropClient(uint64_t client);

  std::byte* Payload(uint32_t slot);
  uint64_t incarnation() const { return incarnation_; }
  const std::string& address() const { return address_; }
  uint32_t held() const;                       // reservations and pins of all clients
  uint32_t errors() const { return errors_; }  // requests that only a broken client makes
  std::string last_error() const { return last_error_; }

 private:
  enum class State { kFree, kReserved, kCommitted };
  struct Slot {
    State state = State::kFree;
    uint64_t generation = 1;
    std::map<uint64_t, uint32_t> holders;  // client -> count
    uint64_t writer = 0;
    internal::v1::BlockMeta meta;
    bool indexed = false;
    uint64_t used = 0;
    std::vector<std::byte> payload;
  };
  struct Copy {
    uint64_t client = 0;
    uint64_t fetch = 0;
    std::string source;
    uint64_t source_incarnation = 0;
    internal::v1::StoreRequest::LayerCopy copy;
  };
  struct Fetch {
    std::string source;
    uint64_t incarnation = 0;
    bool failed = false;
  };

  void Answer(uint64_t client, internal::v1::StoreReply reply);
  void Error(uint64_t client, uint64_t id, int code, const std::string& message);
  // The index of a slot to write, or -1.
  int Allocate();
  internal::v1::SlotRef ReserveOne(uint64_t client);
  uint32_t Available() const;
  void Free(uint32_t slot);
  void Hold(uint32_t slot, uint64_t client);
  bool Unhold(uint32_t slot, uint64_t client);
  Slot* Named(const internal::v1::SlotRef& ref);
  bool Verified(const internal::v1::BlockMeta& meta, const std::byte* payload) const;
  void FetchPrefix(uint64_t client, const internal::v1::StoreRequest& request);

  KvLayout layout_;
  uint64_t incarnation_;
  std::string address_;
  StoreNet* net_;
  std::vector<Slot> slots_;
  std::map<std::string, uint32_t> index_;
  std::map<std::pair<uint64_t, uint64_t>, Fetch> fetches_;
  std::deque<Copy> copies_;
  std::deque<Reply> replies_;
  uint64_t clock_ = 0;
  uint32_t errors_ = 0;
  std::string last_error_;
};

}  // namespace antiphon::fakes

#endif  // ANTIPHON_TESTS_FAKES_FAKE_STORE_H_
