#include "common/config/spelling.h"

#include <google/protobuf/descriptor.h>
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <vector>

namespace antiphon {
namespace {

using google::protobuf::Descriptor;

// A name that differs by more than a third is another name.
bool Near(std::string_view a, std::string_view b, int distance) {
  return distance <= std::max<int>(1, static_cast<int>(std::max(a.size(), b.size())) / 3);
}

std::string FindByName(const Descriptor& type, std::string_view path, std::string_view key) {
  for (int i = 0; i < type.field_count(); ++i) {
    const auto& field = *type.field(i);
    const std::string name = path.empty() ? field.name() : fmt::format("{}.{}", path, field.name());
    if (field.name() == key) return name;
    if (field.message_type() != nullptr && field.message_type()->file() == type.file()) {
      std::string below = FindByName(*field.message_type(), name, key);
      if (!below.empty()) return below;
    }
  }
  return "";
}

}  // namespace

int EditDistance(std::string_view a, std::string_view b) {
  const size_t width = b.size() + 1;
  std::vector<int> d((a.size() + 1) * width);
  for (size_t i = 0; i <= a.size(); ++i) d[i * width] = static_cast<int>(i);
  for (size_t j = 0; j <= b.size(); ++j) d[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      int& cell = d[i * width + j];
      cell = std::min({d[(i - 1) * width + j] + 1, d[i * width + j - 1] + 1,
                       d[(i - 1) * width + j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        cell = std::min(cell, d[(i - 2) * width + j - 2] + 1);
      }
    }
  }
  return d.back();
}

std::string NearestKey(const Descriptor& root, const Descriptor& section, std::string_view parent,
                       std::string_view key) {
  if (key.size() > 64) return "";
  std::string best;
  int best_distance = 1 << 20;
  for (int i = 0; i < section.field_count(); ++i) {
    const std::string& name = section.field(i)->name();
    const int distance = EditDistance(key, name);
    if (distance < best_distance && Near(key, name, distance)) {
      best = parent.empty() ? name : fmt::format("{}.{}", parent, name);
      best_distance = distance;
    }
  }
  return best.empty() ? FindByName(root, "", key) : best;
}

}  // namespace antiphon
