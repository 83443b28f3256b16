#include "common/net.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "antiphon/v1/config.pb.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

TEST(NetTest, ReadsAddressesAsOperatorsWriteThem) {
  EXPECT_EQ(ParseHostPort("127.0.0.1:8000")->Text(), "127.0.0.1:8000");
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]:80")->Text(), "[::1]:80");
  EXPECT_EQ(ParseHostPort(":8000")->host, "");
  EXPECT_EQ(ParseHostPort("node-1.example:0")->port, 0);
}

TEST(NetTest, SaysWhatIsWrongWithAnAddress) {
  const auto error = [](std::string_view text) {
    return std::string(ParseHostPort(text).status().message());
  };
  EXPECT_THAT(error(""), HasSubstr("no port"));
  EXPECT_THAT(error("localhost"), HasSubstr("no port"));
  EXPECT_THAT(error("localhost:"), HasSubstr("no port"));
  EXPECT_THAT(error("h:99999"), HasSubstr("above 65535"));
  EXPECT_THAT(error("h:123456789012"), HasSubstr("no number"));
  EXPECT_THAT(error("h:8o"), HasSubstr("no number"));
  EXPECT_THAT(error("::1:80"), HasSubstr("brackets"));
  EXPECT_THAT(error("[::1"), HasSubstr("closing bracket"));
  EXPECT_THAT(error("[]:80"), HasSubstr("empty host"));
  EXPECT_THAT(error("[::1]80"), HasSubstr("no port"));
  EXPECT_THAT(error("a b:80"), HasSubstr("character"));
  EXPECT_THAT(error("http://h:80"), HasSubstr("brackets"));
  EXPECT_THAT(error(std::string(300, 'a') + ":1"), HasSubstr("too long"));
}

TEST(NetTest, KnowsLoopback) {
  EXPECT_TRUE(IsLoopback("127.0.0.1"));
  EXPECT_TRUE(IsLoopback("127.8.8.8"));
  EXPECT_TRUE(IsLoopback("::1"));
  EXPECT_TRUE(IsLoopback("localhost"));
  EXPECT_FALSE(IsLoopback(""));
  EXPECT_FALSE(IsLoopback("0.0.0.0"));
  EXPECT_FALSE(IsLoopback("10.0.0.1"));
}

TEST(NetTest, ATakenPortIsNamedInTheError) {
  uint16_t port = 0;
  const auto first = ListenTcp({"127.0.0.1", 0}, port);
  ASSERT_TRUE(first.ok());
  ASSERT_NE(port, 0);
  uint16_t unused = 0;
  const auto second = ListenTcp({"127.0.0.1", port}, unused);
  ASSERT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("port " + std::to_string(port) + " on 127.0.0.1 is taken"));
  close(*first);
}

TEST(NetTest, AForeignAddressAndAnUnknownHostGetASentence) {
  uint16_t port = 0;
  EXPECT_THAT(std::string(ListenTcp({"192.0.2.1", 0}, port).status().message()),
              HasSubstr("no address of this machine"));
  EXPECT_THAT(std::string(ListenTcp({"nowhere.invalid", 0}, port).status().message()),
              HasSubstr("no such host"));
}

TEST(NetTest, AllInterfacesListen) {
  uint16_t port = 0;
  const auto fd = ListenTcp({"", 0}, port);
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_NE(port, 0);
  close(*fd);
}

TEST(NetTest, AdvertisesTheRealPort) {
  config::v1::Listener listener;
  listener.set_listen("127.0.0.1:0");
  EXPECT_EQ(AdvertisedAddress(listener, 1234), "127.0.0.1:1234");
  listener.set_advertise("node-1");
  EXPECT_EQ(AdvertisedAddress(listener, 1234), "node-1:1234");
  listener.set_advertise("node-1:0");
  EXPECT_EQ(AdvertisedAddress(listener, 1234), "node-1:1234");
  listener.set_advertise("node-1:99");
  EXPECT_EQ(AdvertisedAddress(listener, 1234), "node-1:99");
  listener.Clear();
  listener.set_listen(":0");
  EXPECT_THAT(AdvertisedAddress(listener, 1234), ::testing::Not(::testing::StartsWith(":")));
}

}  // namespace
}  // namespace antiphon
