// One Prefill stream: a prompt on its way to KV blocks and a first token. Internal to prefill/.
#ifndef ANTIPHON_PREFILL_STREAM_H_
#define ANTIPHON_PREFILL_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "antiphon/v1/worker.pb.h"
#include "common/ids.h"
#include "engine/sampler.h"

namespace antiphon::prefill {

struct Stream {
  enum class State {
    kPinning,    // PinPrefix is out
    kFetching,   // FetchPrefix is out
    kReserving,  // Reserve is out
    kComputing,  // every block has a slot; tokens remain
    kServing,    // the last Ready is out; held until the consumer half-closes
  };

  uint64_t handle = 0;
  RequestId id;
  uint32_t epoch = 0;
  std::string label;
  State state = State::kPinning;
  bool ended = false;  // its End is out; slots go when the running step has let go of them

  std::vector<uint32_t> ids;  // prompt, then emitted
  uint32_t prompt_count = 0;
  BlockKey root;
  std::vector<BlockKey> keys;  // of the whole blocks
  std::vector<internal::v1::BlockSource> sources;
  engine::SamplingParams params;
  std::vector<uint32_t> masked_ids;  // for the first token
  uint32_t have_blocks = 0;
  bool same_host = false;

  absl::Time arrival;
  absl::Time deadline;
  absl::Time first_step = absl::InfiniteFuture();

  std::vector<SlotId> blocks;  // held, one count each, in order
  std::vector<std::byte*> payloads;
  uint32_t dram_blocks = 0;
  uint32_t remote_blocks = 0;

  uint32_t done_tokens = 0;  // K and V of every layer are in the blocks
  uint32_t announced_blocks = 0;

  // While a chunk of it runs.
  bool in_step = false;
  uint32_t chunk_end = 0;
  uint32_t announced_layers = 0;
  // [block of the chunk][layer]; an engine that makes checksums writes into it while the step runs.
  std::vector<uint64_t> checksums;
  uint32_t checksum_layers = 0;  // [0, checksum_layers) of every block are computed here

  bool first_message = true;
};

}  // namespace antiphon::prefill

#endif  // ANTIPHON_PREFILL_STREAM_H_
