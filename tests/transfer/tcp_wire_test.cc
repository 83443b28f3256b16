#include "transfer/tcp_wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

namespace antiphon::transfer {
namespace {

using ::testing::HasSubstr;

template <size_t kBytes, typename Frame>
std::vector<uint8_t> Encoded(const Frame& frame) {
  // One byte more on each side: the encoder stays within its frame.
  std::vector<uint8_t> out(kBytes + 2, 0xEE);
  Encode(frame, reinterpret_cast<std::byte*>(out.data() + 1));
  EXPECT_EQ(out.front(), 0xEE);
  EXPECT_EQ(out.back(), 0xEE);
  return {out.begin() + 1, out.end() - 1};
}

// The bytes that version 1 puts on the wire, for good.
TEST(TcpWireTest, FramesHaveTheirBytes) {
  using Raw = std::vector<uint8_t>;
  EXPECT_EQ(Encoded<kHelloBytes>(HelloFrame{.version_min = 1, .version_max = 0x0203}),
            (Raw{'A', 'N', 'T', 'P', 'U', 'L', 'L', '1',  //
                 1, 0, 3, 2, 0, 0, 0, 0}));
  EXPECT_EQ(Encoded<kRequestBytes>(RequestFrame{.id = 0x1122334455667788,
                                                .region = 0x99AABBCCDDEEFF00,
                                                .offset = 0x0102030405060708,
                                                .bytes = 0x00A0B0C0}),
            (Raw{'P',  'T',  'R',  'Q',  0xC0, 0xB0, 0xA0, 0x00,  //
                 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,  //
                 0x00, 0xFF, 0xEE, 0xDD, 0xCC, 0xBB, 0xAA, 0x99,  //
                 0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,  //
                 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}));
  EXPECT_EQ(Encoded<kReplyBytes>(ReplyFrame{
                .id = 0x1122334455667788, .code = ReplyCode::kOutOfRange, .bytes = 0x0A0B0C0D}),
            (Raw{'P',  'T',  'R',  'P',  2,    0,    0,    0,     //
                 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,  //
                 0x0D, 0x0C, 0x0B, 0x0A, 0,    0,    0,    0}));
}

const std::byte* In(const std::vector<uint8_t>& bytes) {
  return reinterpret_cast<const std::byte*>(bytes.data());
}

TEST(TcpWireTest, WhatIsEncodedDecodes) {
  const auto hello = DecodeHello(In(Encoded<kHelloBytes>(HelloFrame{3, 9})));
  ASSERT_TRUE(hello.ok()) << hello.status();
  EXPECT_EQ(hello->version_min, 3);
  EXPECT_EQ(hello->version_max, 9);

  const uint64_t ids[] = {0, 1, UINT64_MAX};
  const uint32_t sizes[] = {1, 2, kPullBytesMax};
  for (const uint64_t id : ids) {
    for (const uint32_t bytes : sizes) {
      for (const uint64_t offset : {uint64_t{0}, uint64_t{1} << 40, UINT64_MAX - bytes}) {
        const auto request =
            DecodeRequest(In(Encoded<kRequestBytes>(RequestFrame{id, ~id, offset, bytes})));
        ASSERT_TRUE(request.ok()) << request.status();
        EXPECT_EQ(request->id, id);
        EXPECT_EQ(request->region, ~id);
        EXPECT_EQ(request->offset, offset);
        EXPECT_EQ(request->bytes, bytes);
      }
      const auto reply =
          DecodeReply(In(Encoded<kReplyBytes>(ReplyFrame{id, ReplyCode::kOk, bytes})));
      ASSERT_TRUE(reply.ok()) << reply.status();
      EXPECT_EQ(reply->id, id);
      EXPECT_EQ(reply->code, ReplyCode::kOk);
      EXPECT_EQ(reply->bytes, bytes);
    }
    for (const ReplyCode code : {ReplyCode::kNoRegion, ReplyCode::kOutOfRange}) {
      const auto reply = DecodeReply(In(Encoded<kReplyBytes>(ReplyFrame{id, code, 0})));
      ASSERT_TRUE(reply.ok()) << reply.status();
      EXPECT_EQ(reply->code, code);
      EXPECT_EQ(reply->bytes, 0u);
    }
  }
}

// A good frame with one field overwritten.
struct Spoiled {
  size_t at;
  size_t bytes;
  uint64_t value;
  const char* says;  // what the status has to name; null: decodes all the same
};

void Spoil(std::vector<uint8_t>& frame, const Spoiled& with) {
  ASSERT_LE(with.at + with.bytes, frame.size());
  std::memcpy(frame.data() + with.at, &with.value, with.bytes);
}

template <size_t kBytes, typename Frame, typename Decoder>
void CheckSpoiled(const Frame& good, const std::vector<Spoiled>& table, Decoder decode) {
  const std::vector<uint8_t> frame = Encoded<kBytes>(good);
  ASSERT_TRUE(decode(In(frame)).ok());
  for (const Spoiled& spoiled : table) {
    SCOPED_TRACE(testing::Message() << spoiled.bytes << " bytes at " << spoiled.at << ": 0x"
                                    << std::hex << spoiled.value);
    std::vector<uint8_t> bad = frame;
    Spoil(bad, spoiled);
    const absl::Status status = decode(In(bad)).status();
    if (spoiled.says == nullptr) {
      EXPECT_TRUE(status.ok()) << status;
    } else {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()), HasSubstr(spoiled.says));
    }
  }
}

TEST(TcpWireTest, EachFieldOfAHelloIsChecked) {
  CheckSpoiled<kHelloBytes>(HelloFrame{1, 2},
                            {
                                {0, 8, 0, "hello magic"},
                                {0, 8, UINT64_MAX, "hello magic"},
                                {0, 1, 'a', "hello magic"},
                                {7, 1, '2', "hello magic"},
                                {8, 2, 0, "versions"},
                                {8, 2, 3, "versions"},
                                {8, 2, 0xFFFF, "versions"},
                                {10, 2, 0, "versions"},
                                {8, 2, 2, nullptr},
                                {10, 2, 0xFFFF, nullptr},
                                // What later versions may say there is not ours to refuse.
                                {12, 4, 0xFFFFFFFF, nullptr},
                            },
                            DecodeHello);
}

TEST(TcpWireTest, EachFieldOfARequestIsChecked) {
  CheckSpoiled<kRequestBytes>(RequestFrame{.id = 5, .region = 6, .offset = 4096, .bytes = 64},
                              {
                                  {0, 4, 0, "request magic"},
                                  {0, 4, 0x50525450, "request magic"},  // a reply's
                                  {3, 1, 'q', "request magic"},
                                  {4, 4, 0, "bytes"},
                                  {4, 4, kPullBytesMax + 1, "bytes"},
                                  {4, 4, 0x80000000, "bytes"},
                                  {4, 4, UINT32_MAX, "bytes"},
                                  {4, 4, kPullBytesMax, nullptr},
                                  {8, 8, UINT64_MAX, nullptr},   // any id
                                  {16, 8, UINT64_MAX, nullptr},  // any region
                                  {24, 8, UINT64_MAX, "offset"},
                                  {24, 8, UINT64_MAX - 63, "offset"},
                                  {24, 8, UINT64_MAX - 64, nullptr},
                                  {32, 8, 1, "reserved"},
                                  {39, 1, 0x80, "reserved"},
                              },
                              DecodeRequest);
}

TEST(TcpWireTest, EachFieldOfAReplyIsChecked) {
  CheckSpoiled<kReplyBytes>(ReplyFrame{.id = 5, .code = ReplyCode::kOk, .bytes = 64},
                            {
                                {0, 4, 0, "reply magic"},
                                {0, 4, 0x51525450, "reply magic"},  // a request's
                                {4, 4, 1, "bytes for this code"},
                                {4, 4, 2, "bytes for this code"},
                                {4, 4, 3, "code"},
                                {4, 4, UINT32_MAX, "code"},
                                {7, 1, 0x80, "code"},
                                {8, 8, 0, nullptr},  // any id; whose it is the connection knows
                                {16, 4, 0, "bytes for this code"},
                                {16, 4, kPullBytesMax + 1, "bytes"},
                                {16, 4, UINT32_MAX, "bytes"},
                                {20, 4, 1, "reserved"},
                                {23, 1, 0x80, "reserved"},
                            },
                            DecodeReply);
  CheckSpoiled<kReplyBytes>(ReplyFrame{.id = 5, .code = ReplyCode::kNoRegion, .bytes = 0},
                            {
                                {4, 4, 0, "bytes for this code"},
                                {4, 4, 2, nullptr},
                                {16, 4, 1, "bytes for this code"},
                            },
                            DecodeReply);
}

TEST(TcpWireTest, TheNewestCommonVersionIsChosen) {
  for (const auto& [low, high] : {std::pair<uint16_t, uint16_t>{1, 1}, {1, 2}, {1, 0xFFFF}}) {
    const auto version = ChooseVersion(HelloFrame{low, high});
    ASSERT_TRUE(version.ok()) << version.status();
    EXPECT_EQ(*version, kPullVersionMax);
  }
}

TEST(TcpWireTest, WithoutACommonVersionBothRangesAreNamed) {
  const auto version = ChooseVersion(HelloFrame{7, 9});
  EXPECT_EQ(version.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(version.status().message()), HasSubstr("speaks 1-1"));
  EXPECT_THAT(std::string(version.status().message()), HasSubstr("the peer 7-9"));
}

}  // namespace
}  // namespace antiphon::transfer
