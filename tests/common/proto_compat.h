// The compatibility rules of proto/README.md, over descriptors.
#ifndef ANTIPHON_TESTS_COMMON_PROTO_COMPAT_H_
#define ANTIPHON_TESTS_COMMON_PROTO_COMPAT_H_

#include <google/protobuf/descriptor.pb.h>

#include <string>
#include <vector>

namespace antiphon {

// What `now` breaks of `before`, one sentence each.
std::vector<std::string> CompareWire(const google::protobuf::FileDescriptorSet& before,
                                     const google::protobuf::FileDescriptorSet& now);

}  // namespace antiphon

#endif  // ANTIPHON_TESTS_COMMON_PROTO_COMPAT_H_
