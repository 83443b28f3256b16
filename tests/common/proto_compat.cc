#include "tests/common/proto_compat.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <map>

namespace antiphon {
namespace {

using google::protobuf::DescriptorProto;
using google::protobuf::EnumDescriptorProto;
using google::protobuf::FieldDescriptorProto;
using google::protobuf::FileDescriptorSet;
using google::protobuf::ServiceDescriptorProto;

struct Wire {
  std::map<std::string, DescriptorProto> messages;
  std::map<std::string, EnumDescriptorProto> enums;
  std::map<std::string, ServiceDescriptorProto> services;
};

void Collect(const std::string& scope, const DescriptorProto& message, Wire& wire) {
  const std::string name = scope + "." + message.name();
  wire.messages[name] = message;
  for (const auto& nested : message.nested_type()) Collect(name, nested, wire);
  for (const auto& e : message.enum_type()) wire.enums[name + "." + e.name()] = e;
}

Wire WireOf(const FileDescriptorSet& files) {
  Wire wire;
  for (const auto& file : files.file()) {
    for (const auto& message : file.message_type()) Collect(file.package(), message, wire);
    for (const auto& e : file.enum_type()) wire.enums[file.package() + "." + e.name()] = e;
    for (const auto& s : file.service()) wire.services[file.package() + "." + s.name()] = s;
  }
  return wire;
}

bool NumberReserved(const DescriptorProto& message, int number) {
  return std::any_of(message.reserved_range().begin(), message.reserved_range().end(),
                     [number](const auto& r) { return number >= r.start() && number < r.end(); });
}

std::string Shape(const FieldDescriptorProto& f) {
  return fmt::format("{} {}{}", static_cast<int>(f.label()), static_cast<int>(f.type()),
                     f.type_name());
}

void CompareMessage(const std::string& name, const DescriptorProto& before,
                    const DescriptorProto& now, std::vector<std::string>& problems) {
  std::map<int, const FieldDescriptorProto*> by_number;
  std::map<std::string, const FieldDescriptorProto*> by_name;
  for (const auto& f : now.field()) {
    by_number[f.number()] = &f;
    by_name[f.name()] = &f;
  }
  for (const auto& f : before.field()) {
    const auto same = by_number.find(f.number());
    const auto renumbered = by_name.find(f.name());
    if (renumbered != by_name.end() && renumbered->second->number() != f.number()) {
      problems.push_back(fmt::format("{}.{} was {} and is now {}", name, f.name(), f.number(),
                                     renumbered->second->number()));
    } else if (same == by_number.end()) {
      const bool name_reserved =
          std::count(now.reserved_name().begin(), now.reserved_name().end(), f.name()) > 0;
      if (!NumberReserved(now, f.number()) || !name_reserved) {
        problems.push_back(fmt::format("{}.{} is gone; reserve its number {} and its name", name,
                                       f.name(), f.number()));
      }
    } else if (same->second->name() != f.name()) {
      problems.push_back(fmt::format("{} field {} was {} and is now {}", name, f.number(), f.name(),
                                     same->second->name()));
    } else if (Shape(*same->second) != Shape(f)) {
      problems.push_back(fmt::format("{}.{} has another type", name, f.name()));
    } else if (same->second->has_oneof_index() != f.has_oneof_index()) {
      problems.push_back(fmt::format("{}.{} entered or left a oneof or optional", name, f.name()));
    }
  }
}

}  // namespace

std::vector<std::string> CompareWire(const FileDescriptorSet& before_files,
                                     const FileDescriptorSet& now_files) {
  const Wire before = WireOf(before_files), now = WireOf(now_files);
  std::vector<std::string> problems;
  for (const auto& [name, message] : before.messages) {
    const auto it = now.messages.find(name);
    if (it == now.messages.end()) {
      problems.push_back(fmt::format("message {} is gone", name));
    } else {
      CompareMessage(name, message, it->second, problems);
    }
  }
  for (const auto& [name, e] : before.enums) {
    const auto it = now.enums.find(name);
    if (it == now.enums.end()) {
      problems.push_back(fmt::format("enum {} is gone", name));
      continue;
    }
    for (const auto& value : e.value()) {
      const bool kept = std::any_of(
          it->second.value().begin(), it->second.value().end(), [&value](const auto& v) {
            return v.name() == value.name() && v.number() == value.number();
          });
      if (!kept) problems.push_back(fmt::format("{}.{} is gone or renumbered", name, value.name()));
    }
  }
  for (const auto& [name, service] : before.services) {
    const auto it = now.services.find(name);
    if (it == now.services.end()) {
      problems.push_back(fmt::format("service {} is gone", name));
      continue;
    }
    for (const auto& method : service.method()) {
      const bool kept = std::any_of(
          it->second.method().begin(), it->second.method().end(), [&method](const auto& m) {
            return m.name() == method.name() && m.input_type() == method.input_type() &&
                   m.output_type() == method.output_type() &&
                   m.client_streaming() == method.client_streaming() &&
                   m.server_streaming() == method.server_streaming();
          });
      if (!kept) problems.push_back(fmt::format("{}.{} is gone or changed", name, method.name()));
    }
  }
  return problems;
}

}  // namespace antiphon
