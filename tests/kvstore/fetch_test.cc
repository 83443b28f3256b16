#include "kvstore/fetch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace antiphon::kvstore {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

std::vector<LayerCopy> Tags(std::initializer_list<uint64_t> tags) {
  std::vector<LayerCopy> copies;
  for (uint64_t tag : tags) copies.push_back({.checksums = {0}, .tag = tag});
  return copies;
}

TEST(StreamFetchTest, ReportsTagsInOrderThoughCopiesEndInAnyOrder) {
  StreamFetch fetch;
  ASSERT_TRUE(fetch.Extend(Tags({1, 2, 5})).ok());
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(3));
  fetch.Done(5, absl::OkStatus());
  fetch.Done(2, absl::OkStatus());
  EXPECT_FALSE(fetch.TakeProgress().has_value());
  fetch.Done(1, absl::OkStatus());
  const auto progress = fetch.TakeProgress();
  ASSERT_TRUE(progress.has_value());
  EXPECT_EQ(progress->done_tag, 5u);
  EXPECT_TRUE(progress->status.ok());
  EXPECT_FALSE(fetch.TakeProgress().has_value());
}

TEST(StreamFetchTest, RefusesTagsThatDoNotAscend) {
  StreamFetch fetch;
  ASSERT_TRUE(fetch.Extend(Tags({3})).ok());
  EXPECT_EQ(fetch.Extend(Tags({4, 4})).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(fetch.Extend(Tags({4})).ok());
}

TEST(StreamFetchTest, TriesACopyWithAWrongChecksumOnceMore) {
  StreamFetch fetch;
  ASSERT_TRUE(fetch.Extend(Tags({1})).ok());
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(1));
  fetch.Done(1, absl::DataLossError("x"));
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(1));
  fetch.Done(1, absl::DataLossError("x"));
  EXPECT_THAT(fetch.TakeStarts(), IsEmpty());
  const auto progress = fetch.TakeProgress();
  ASSERT_TRUE(progress.has_value());
  EXPECT_EQ(progress->status.code(), absl::StatusCode::kDataLoss);
}

TEST(StreamFetchTest, TellsItsEndOnlyWhenNothingIsInFlight) {
  StreamFetch fetch;
  ASSERT_TRUE(fetch.Extend(Tags({1, 2})).ok());
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(2));
  fetch.Done(1, absl::UnavailableError("gone"));
  EXPECT_FALSE(fetch.TakeProgress().has_value());
  fetch.Done(2, absl::CancelledError(""));
  const auto progress = fetch.TakeProgress();
  ASSERT_TRUE(progress.has_value());
  EXPECT_EQ(progress->status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(progress->done_tag, 0u);
  EXPECT_FALSE(fetch.Extend(Tags({3})).ok());
}

TEST(StreamFetchTest, BoundsWhatIsInFlightAndQueued) {
  StreamFetch fetch;
  std::vector<LayerCopy> many;
  for (uint64_t tag = 1; tag <= StreamFetch::kQueuedMax; ++tag) many.push_back({.tag = tag});
  ASSERT_TRUE(fetch.Extend(std::move(many)).ok());
  EXPECT_EQ(fetch.Extend(Tags({1 << 20})).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(StreamFetch::kInFlightMax));
  EXPECT_THAT(fetch.TakeStarts(), IsEmpty());
}

TEST(PrefixFetchTest, OnlyAnUnbrokenPrefixEnters) {
  PrefixFetch fetch(4);
  EXPECT_THAT(fetch.TakeStarts(), ElementsAre(0, 1, 2, 3));
  fetch.Done(1, true);
  EXPECT_THAT(fetch.TakeVerified(), IsEmpty());
  fetch.Done(0, true);
  EXPECT_THAT(fetch.TakeVerified(), ElementsAre(0, 1));
  fetch.Done(2, false);
  fetch.Done(3, true);
  EXPECT_THAT(fetch.TakeVerified(), IsEmpty());
  EXPECT_EQ(fetch.limit(), 2u);
  EXPECT_TRUE(fetch.finished());
}

TEST(PrefixFetchTest, AfterItsEndItWaitsForWhatIsInFlight) {
  PrefixFetch fetch(40);
  EXPECT_THAT(fetch.TakeStarts(), SizeIs(PrefixFetch::kInFlightMax));
  fetch.End();
  for (uint32_t b = 0; b < PrefixFetch::kInFlightMax; ++b) {
    EXPECT_FALSE(fetch.finished());
    fetch.Done(b, b < 3);
  }
  EXPECT_THAT(fetch.TakeStarts(), IsEmpty());
  EXPECT_THAT(fetch.TakeVerified(), ElementsAre(0, 1, 2));
  EXPECT_TRUE(fetch.finished());
}

}  // namespace
}  // namespace antiphon::kvstore
