#include "common/wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/kv_layout.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

const Identity kSelf = {.cluster = "c", .node = NodeId("a@h"), .incarnation = 7};

TEST(WireTest, EqualsAgreeOnTheHighestVersion) {
  const auto version = Negotiate(kSelf, MakeHello(kSelf));
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(*version, kWireMax);
}

TEST(WireTest, ANewerPeerThatStillSpeaksOursIsAccepted) {
  wire::Hello peer = MakeHello(kSelf);
  peer.set_wire_max(kWireMax + 1);
  EXPECT_EQ(*Negotiate(kSelf, peer), kWireMax);
}

TEST(WireTest, NoCommonVersionNamesBothRanges) {
  wire::Hello peer = MakeHello(kSelf);
  peer.set_wire_min(kWireMax + 1);
  peer.set_wire_max(kWireMax + 2);
  const auto refused = Negotiate(kSelf, peer);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("speaks 2-3"));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("speaks 1-1"));
  EXPECT_FALSE(Negotiate(kSelf, wire::Hello()).ok());
}

TEST(WireTest, AnotherClusterIsRefusedByName) {
  wire::Hello peer = MakeHello(kSelf);
  peer.set_cluster("d");
  EXPECT_THAT(std::string(Negotiate(kSelf, peer).status().message()), HasSubstr("'d'"));
}

TEST(WireTest, LayoutsSurviveTheWire) {
  KvLayout layout{.block_tokens = 16, .layers = 30, .kv_heads = 3, .head_dim = 64};
  for (KvDtype dtype : {KvDtype::kBf16, KvDtype::kF32}) {
    layout.dtype = dtype;
    const auto back = LayoutFromProto(LayoutToProto(layout));
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(*back, layout);
  }
  wire::KvLayout bad = LayoutToProto(layout);
  bad.set_dtype("f8");
  EXPECT_THAT(std::string(LayoutFromProto(bad).status().message()), HasSubstr("layout.dtype"));
  bad = LayoutToProto(layout);
  bad.set_checksum("crc");
  EXPECT_THAT(std::string(LayoutFromProto(bad).status().message()), HasSubstr("layout.checksum"));
}

TEST(WireTest, FingerprintsTellWhatDiffers) {
  wire::Fingerprint a;
  a.set_weights_digest("w");
  a.set_kv_dtype("bf16");
  wire::Fingerprint b = a;
  EXPECT_EQ(IdOf(a), IdOf(b));
  EXPECT_EQ(DescribeDifference(a, b), "");
  b.set_kv_dtype("f32");
  b.set_tp_degree(2);
  EXPECT_NE(IdOf(a), IdOf(b));
  EXPECT_EQ(DescribeDifference(a, b), "kv_dtype bf16 != f32; tp_degree 0 != 2");
}

TEST(WireTest, FingerprintFieldsCannotRunIntoOneAnother) {
  wire::Fingerprint a, b;
  a.set_weights_digest("w1:x");
  b.set_weights_digest("w");
  b.set_kv_dtype("x");
  EXPECT_NE(IdOf(a), IdOf(b));
}

}  // namespace
}  // namespace antiphon
