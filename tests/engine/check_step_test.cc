#include "engine/check_step.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace antiphon::engine {
namespace {

using ::testing::HasSubstr;

constexpr KvLayout kLayout = {.block_tokens = 16, .layers = 3, .kv_heads = 1, .head_dim = 64};
constexpr RunnerShape kShape = {.vocab = 100, .context = 1000, .step_tokens_max = 256};

TEST(CheckStepTest, RoomForChecksumsIsOfTheBlocksThatTheChunkWritesOrNone) {
  std::byte memory[1];
  const std::vector<std::byte*> blocks(8, memory);
  const std::vector<uint32_t> ids(100, 5);
  struct Case {
    uint32_t start, tokens;
    size_t blocks_written;
  };
  for (const Case& c : {Case{0, 1, 1}, Case{0, 16, 1}, Case{0, 17, 2}, Case{15, 1, 1},
                        Case{16, 1, 1}, Case{15, 2, 2}, Case{17, 60, 4}, Case{32, 32, 2}}) {
    SCOPED_TRACE(testing::Message() << c.tokens << " tokens at " << c.start);
    for (size_t room = 0; room <= 5 * kLayout.layers; ++room) {
      std::vector<uint64_t> checksums(room);
      Step step;
      step.chunks.push_back({.tokens = absl::MakeConstSpan(ids).first(c.tokens),
                             .start = c.start,
                             .blocks = blocks,
                             .checksums = absl::MakeSpan(checksums)});
      const absl::Status status = CheckStep(step, kShape, kLayout);
      if (room == 0 || room == c.blocks_written * kLayout.layers) {
        EXPECT_TRUE(status.ok()) << status;
      } else {
        EXPECT_TRUE(absl::IsInvalidArgument(status)) << room;
        EXPECT_THAT(std::string(status.message()), HasSubstr("checksums"));
      }
    }
  }
}

}  // namespace
}  // namespace antiphon::engine
