// No renumbering, no retyping, no removal without `reserved`, against the last release's
// descriptors in wire_baseline.binpb. After a release, or to accept additions:
//   protoc -I proto --descriptor_set_out=tests/common/wire_baseline.binpb proto/antiphon/v1/*.proto
#include "tests/common/proto_compat.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "antiphon/v1/admin.pb.h"
#include "antiphon/v1/config.pb.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/inference.pb.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "antiphon/v1/worker.pb.h"

namespace antiphon {
namespace {

using google::protobuf::DescriptorProto;
using google::protobuf::FileDescriptorSet;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

FileDescriptorSet Current() {
  FileDescriptorSet set;
  for (const auto* file :
       {admin::v1::GetStatusRequest::descriptor()->file(), config::v1::Config::descriptor()->file(),
        internal::v1::NodeReport::descriptor()->file(),
        inference::v1::ChatRequest::descriptor()->file(),
        internal::v1::ModelCard::descriptor()->file(), internal::v1::Hello::descriptor()->file(),
        google::protobuf::DescriptorPool::generated_pool()->FindFileByName(
            "antiphon/v1/worker.proto")}) {
    file->CopyTo(set.add_file());
  }
  return set;
}

DescriptorProto* Message(FileDescriptorSet& set, const std::string& name) {
  for (auto& file : *set.mutable_file()) {
    for (auto& message : *file.mutable_message_type()) {
      if (message.name() == name) return &message;
    }
  }
  return nullptr;
}

TEST(ProtoCompatTest, TheWireKeepsItsPromises) {
  std::ifstream in(ANTIPHON_WIRE_BASELINE, std::ios::binary);
  FileDescriptorSet baseline;
  ASSERT_TRUE(baseline.ParseFromIstream(&in)) << ANTIPHON_WIRE_BASELINE;
  ASSERT_EQ(baseline.file_size(), Current().file_size());
  EXPECT_THAT(CompareWire(baseline, Current()), IsEmpty());
}

TEST(ProtoCompatTest, AdditionsAreFine) {
  FileDescriptorSet now = Current();
  auto* field = Message(now, "Hello")->add_field();
  field->set_name("extra");
  field->set_number(99);
  now.mutable_file(0)->add_message_type()->set_name("New");
  EXPECT_THAT(CompareWire(Current(), now), IsEmpty());
}

TEST(ProtoCompatTest, RenumberingIsSeen) {
  FileDescriptorSet now = Current();
  Message(now, "Hello")->mutable_field(0)->set_number(42);
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("was 1 and is now 42")));
}

TEST(ProtoCompatTest, RetypingAndRenamingAreSeen) {
  FileDescriptorSet now = Current();
  Message(now, "Hello")
      ->mutable_field(0)
      ->set_type(google::protobuf::FieldDescriptorProto::TYPE_UINT64);
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("another type")));
  now = Current();
  Message(now, "Hello")->mutable_field(0)->set_name("other");
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("was wire_min and is now other")));
  now = Current();
  Message(now, "Hello")
      ->mutable_field(0)
      ->set_label(google::protobuf::FieldDescriptorProto::LABEL_REPEATED);
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("another type")));
}

TEST(ProtoCompatTest, RemovalNeedsItsNumberAndNameReserved) {
  FileDescriptorSet now = Current();
  DescriptorProto* hello = Message(now, "Hello");
  hello->mutable_field()->DeleteSubrange(0, 1);
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("wire_min is gone; reserve")));
  auto* range = hello->add_reserved_range();
  range->set_start(1);
  range->set_end(2);
  EXPECT_THAT(CompareWire(Current(), now), ElementsAre(HasSubstr("wire_min is gone; reserve")));
  hello->add_reserved_name("wire_min");
  EXPECT_THAT(CompareWire(Current(), now), IsEmpty());
}

TEST(ProtoCompatTest, LostMessagesEnumsAndMethodsAreSeen) {
  FileDescriptorSet now = Current();
  for (auto& file : *now.mutable_file()) {
    if (file.service_size() > 0 && file.name() == "antiphon/v1/control.proto") {
      file.mutable_service(0)->mutable_method(1)->set_server_streaming(true);
      file.mutable_enum_type(0)->mutable_value(1)->set_number(77);
    }
    if (file.name() == "antiphon/v1/admin.proto") file.mutable_message_type()->RemoveLast();
  }
  EXPECT_THAT(CompareWire(Current(), now),
              ::testing::UnorderedElementsAre(HasSubstr("is gone"), HasSubstr("gone or renumbered"),
                                              HasSubstr("gone or changed")));
}

}  // namespace
}  // namespace antiphon
