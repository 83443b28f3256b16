// What a worker leaves for the others of its host, with a real store between them.
#include "worker/host_blobs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstring>

#include "common/thread.h"
#include "kvstore/client/blob_lease.h"
#include "tests/kvstore/store_process.h"

namespace antiphon::worker {
namespace {

using kvstore::StoreProcess;

const Identity kSelf{.cluster = "antiphon", .node = NodeId("test"), .incarnation = 1};
constexpr size_t kBytes = (3 << 20) + 17;

std::unique_ptr<HostBlobs> Blobs(const std::string& socket_path) {
  return std::make_unique<HostBlobs>(socket_path, kSelf, "model");
}

TEST(HostBlobsTest, AnImageIsFilledByOneAndReadByAll) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  const auto first = Blobs(store.socket_path()), second = Blobs(store.socket_path());
  auto mine = first->Open("image", kBytes);
  ASSERT_TRUE(mine.ok()) << mine.status();
  ASSERT_NE((*mine)->fill(), nullptr);
  absl::StatusOr<std::unique_ptr<engine::SharedImage>> other = absl::UnknownError("");
  Thread waiter("waiter", [&] { other = second->Open("image", kBytes); });
  for (size_t i = 0; i < kBytes; ++i) {
    ASSERT_EQ((*mine)->fill()[i], std::byte{0});
    (*mine)->fill()[i] = static_cast<std::byte>(i % 251);
  }
  ASSERT_TRUE((*mine)->Finish().ok());
  waiter.Join();
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ((*other)->fill(), nullptr);
  EXPECT_EQ((*mine)->fill(), nullptr);
  EXPECT_EQ(std::memcmp((*mine)->data(), (*other)->data(), kBytes), 0);
  EXPECT_EQ((*other)->data()[1000], static_cast<std::byte>(1000 % 251));
}

TEST(HostBlobsTest, AnImageThatIsGivenUpIsFilledByTheNext) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  const auto first = Blobs(store.socket_path()), second = Blobs(store.socket_path());
  {
    auto mine = first->Open("image", kBytes);
    ASSERT_TRUE(mine.ok());
    (*mine)->fill()[0] = std::byte{1};
  }
  auto other = second->Open("image", kBytes);
  ASSERT_TRUE(other.ok());
  ASSERT_NE((*other)->fill(), nullptr);
  EXPECT_EQ((*other)->fill()[0], std::byte{0});
}

TEST(HostBlobsTest, TheNextStoreGetsTheImageFromWhoHasIt) {
  auto store = std::make_unique<StoreProcess>();
  ASSERT_TRUE(store->ready());
  const std::string flag = "--cluster.runtime_dir=" + store->dir();
  const auto first = Blobs(store->socket_path());
  auto mine = first->Open("image", kBytes);
  ASSERT_TRUE(mine.ok());
  (*mine)->fill()[5] = std::byte{42};
  ASSERT_TRUE((*mine)->Finish().ok());
  const auto compute = []() -> absl::StatusOr<std::string> { return std::string("text"); };
  ASSERT_TRUE(first
                  ->Recall(
                      "a", [](const std::string&) { return true; }, compute)
                  .ok());
  store->Kill(SIGKILL);
  store->Wait();
  StoreProcess next({flag});
  ASSERT_TRUE(next.ready());
  first->OfferTo(12345);
  first->OfferTo(12345);  // it is there: no harm
  const auto second = Blobs(store->socket_path());
  auto other = second->Open("image", kBytes);
  ASSERT_TRUE(other.ok()) << other.status();
  ASSERT_EQ((*other)->fill(), nullptr);
  EXPECT_EQ((*other)->data()[5], std::byte{42});
  const auto never = []() -> absl::StatusOr<std::string> { return absl::UnknownError("computed"); };
  EXPECT_EQ(second
                ->Recall(
                    "a", [](const std::string&) { return true; }, never)
                .value(),
            "text");
}

TEST(HostBlobsTest, ATextIsComputedOnceUnlessItIsRefused) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  int computed = 0;
  const auto recall = [&](const char* name, bool valid, const std::string& text = "text") {
    return Blobs(store.socket_path())
        ->Recall(
            name, [&](const std::string& t) { return valid && t == text; },
            [&]() -> absl::StatusOr<std::string> {
              ++computed;
              return text;
            });
  };
  EXPECT_EQ(recall("a", true).value(), "text");
  EXPECT_EQ(recall("a", true).value(), "text");
  EXPECT_EQ(computed, 1);
  EXPECT_EQ(recall("a", false).value(), "text");
  EXPECT_EQ(computed, 2);
  // What does not fit is computed by everybody.
  const std::string large(5000, 'x');
  EXPECT_EQ(recall("large", true, large).value(), large);
  EXPECT_EQ(recall("large", true, large).value(), large);
  EXPECT_EQ(computed, 4);
  // A failure is passed on, and leaves nothing behind.
  EXPECT_FALSE(Blobs(store.socket_path())
                   ->Recall(
                       "b", [](const std::string&) { return true; },
                       []() -> absl::StatusOr<std::string> { return absl::UnknownError("no"); })
                   .ok());
  EXPECT_EQ(recall("b", true).value(), "text");
  EXPECT_EQ(computed, 5);
}

TEST(HostBlobsTest, GarbageInARecordIsComputedAgain) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto lease = kvstore::BlobLease::Open({.socket_path = store.socket_path(),
                                         .self = kSelf,
                                         .name = "a model",
                                         .model = "model",
                                         .bytes = 4096});
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(lease->fill());
  ASSERT_EQ(pwrite(lease->fd(), "\xFF\xFF\xFF\xFF", 4, 0), 4);
  ASSERT_TRUE(lease->Publish().ok());
  const auto text = Blobs(store.socket_path())
                        ->Recall(
                            "a", [](const std::string&) { return true; },
                            []() -> absl::StatusOr<std::string> { return std::string("mine"); });
  EXPECT_EQ(text.value(), "mine");
}

TEST(HostBlobsTest, WithoutAStoreEverythingIsComputedHere) {
  const auto blobs = Blobs("/nonexistent/kvstore.sock");
  EXPECT_TRUE(absl::IsUnavailable(blobs->Open("image", kBytes).status()));
  const auto text = blobs->Recall(
      "a", [](const std::string&) { return true; },
      []() -> absl::StatusOr<std::string> { return std::string("mine"); });
  EXPECT_EQ(text.value(), "mine");
}

}  // namespace
}  // namespace antiphon::worker
