// One generation at its decode worker. Internal to decode/.
#ifndef ANTIPHON_DECODE_SEQUENCE_H_
#define ANTIPHON_DECODE_SEQUENCE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "antiphon/v1/worker.pb.h"
#include "common/ids.h"
#include "engine/sampler.h"

namespace antiphon::decode {

// A block of the sequence. `held`: we owe the store one Release of `slot`.
struct Block {
  SlotId slot;
  bool held = false;
  bool ready = false;               // K and V of its tokens are in the slot
  std::vector<uint64_t> checksums;  // by layer, as announced (other host)
  uint32_t layers_verified = 0;
};

// A LayerCopy that the store has not verified yet.
struct Copy {
  uint64_t tag = 0;
  uint32_t block = 0;
  uint32_t layers = 0;
};

struct Sequence {
  enum class State {
    kPinning,     // PinPrefix and the first Reserve are out
    kPrefilling,  // the prefill stream is open, or KV is still on its way
    kRunning,     // in the batch
  };

  uint64_t handle = 0;  // of its prefill stream too; ascending with age
  uint64_t gateway = 0;
  std::string id_bytes;
  RequestId id;
  uint32_t epoch = 0;
  std::string label;
  State state = State::kPinning;
  bool ended = false;

  // The request. `ids` is prompt, emitted in earlier epochs, emitted here.
  std::vector<uint32_t> ids;
  uint32_t prompt_count = 0;
  uint32_t start_count = 0;    // tokens that prefill computes
  std::vector<BlockKey> keys;  // of the whole blocks of ids
  BlockKey root;
  engine::SamplingParams params;
  internal::v1::Sampling sampling;
  uint32_t max_tokens = 0;
  uint32_t min_tokens = 0;
  std::vector<uint32_t> stop_ids;  // sorted
  internal::v1::Placement placement;
  absl::Time deadline = absl::InfiniteFuture();

  // KV.
  std::vector<Block> blocks;         // of [0, start_count), then as it grows
  std::vector<std::byte*> payloads;  // of `blocks`, once running
  std::vector<SlotId> spare;         // reserved, not part of `blocks` yet
  bool growing = false;              // a Reserve(1) is out
  bool growth_failed = false;
  uint32_t blocks_missing = 0;         // of [0, start_count), not ready
  uint32_t first_replies_missing = 0;  // of PinPrefix and the first Reserve

  // Prefill.
  bool prefill_open = false;
  bool same_host = false;
  bool greeted = false;                          // the first Ready came
  bool slots_pending = false;                    // the Reserve for another host's blocks is out
  std::deque<internal::v1::BlockReady> waiting;  // announced before those slots came
  std::string data_address;
  uint64_t source_incarnation = 0;
  uint64_t fetch = 0;  // 0: none open
  uint64_t next_tag = 1;
  std::deque<Copy> copies;
  absl::Time fetch_moved;  // when it last made progress, or had nothing to do
  bool first_token_seen = false;
  absl::Time prefill_end;
  internal::v1::Timings timings;
  bool timings_due = false;  // transfer_s goes out with the next token

  bool in_step = false;
  // By layer, of the block that the running step fills, if it fills one; the engine may write here.
  std::vector<uint64_t> filled_checksums;
  bool closing_fetch = false;  // slots wait for FetchClose's reply

  uint32_t emitted_count() const { return ids.size() - prompt_count; }
};

}  // namespace antiphon::decode

#endif  // ANTIPHON_DECODE_SEQUENCE_H_
