#include "model/jinja_builtins.h"

#include <initializer_list>
#include <string>

#include "absl/container/flat_hash_map.h"

namespace antiphon::model::jinja {
namespace {

using Table = absl::flat_hash_map<std::string, const NamedNative*>;

const Table* Join(std::initializer_list<absl::Span<const NamedNative>> parts) {
  auto* table = new Table;
  for (const auto& part : parts) {
    for (const NamedNative& entry : part) table->emplace(entry.name, &entry);
  }
  return table;
}

const NamedNative* Look(const Table& table, std::string_view name) {
  const auto found = table.find(std::string(name));
  return found == table.end() ? nullptr : found->second;
}

}  // namespace

const NamedNative* FindFilter(std::string_view name) {
  static const Table* const kTable =
      Join({TextFilters(), NumberFilters(), SequenceFilters(), SelectionFilters()});
  return Look(*kTable, name);
}

const NamedNative* FindTest(std::string_view name) {
  static const Table* const kTable = Join({Tests()});
  return Look(*kTable, name);
}

const NamedNative* FindFunction(std::string_view name) {
  static const Table* const kTable = Join({Functions()});
  return Look(*kTable, name);
}

const NamedNative* FindMethod(Kind kind, std::string_view name) {
  static const Table* const kStrings = Join({StringMethods()});
  static const Table* const kLists = Join({ListMethods()});
  static const Table* const kTuples = Join({TupleMethods()});
  static const Table* const kDicts = Join({DictMethods()});
  static const Table* const kCyclers = Join({CyclerMethods()});
  static const Table* const kLoops = Join({LoopMethods()});
  switch (kind) {
    case Kind::kString:
      return Look(*kStrings, name);
    case Kind::kList:
      return Look(*kLists, name);
    case Kind::kTuple:
      return Look(*kTuples, name);
    case Kind::kDict:
      return Look(*kDicts, name);
    case Kind::kCycler:
      return Look(*kCyclers, name);
    case Kind::kLoop:
      return Look(*kLoops, name);
    default:
      return nullptr;
  }
}

}  // namespace antiphon::model::jinja
