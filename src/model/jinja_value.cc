#include "model/jinja_value.h"

#include <cmath>
#include <cstring>

#include "fmt/format.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

// Up to this size a dictionary is searched from front to back.
constexpr size_t kScanned = 8;

bool SameKey(const Value& a, const Value& b) {
  if (a.is(Kind::kString) && b.is(Kind::kString)) return a.text() == b.text();
  if (a.is(Kind::kString) != b.is(Kind::kString)) return false;
  return CanonicalKey(a) == CanonicalKey(b);
}

}  // namespace

String::String(Heap* heap, std::string value)
    : Object(heap), text(std::move(value)), length(CodePoints(text)) {}

void Dict::Clear() {
  entries.clear();
  index_.clear();
}

size_t Dict::Position(const Value& key) const {
  if (index_.empty()) {
    for (size_t i = 0; i < entries.size(); ++i) {
      if (SameKey(entries[i].first, key)) return i;
    }
    return entries.size();
  }
  const auto found = index_.find(CanonicalKey(key));
  return found == index_.end() ? entries.size() : found->second;
}

const Value* Dict::Find(const Value& key) const {
  const size_t at = Position(key);
  return at < entries.size() ? &entries[at].second : nullptr;
}

const Value* Dict::Find(std::string_view key) const {
  if (index_.empty()) {
    for (const auto& [name, value] : entries) {
      if (name.is(Kind::kString) && name.text() == key) return &value;
    }
    return nullptr;
  }
  const auto found = index_.find(fmt::format("s{}", key));
  return found == index_.end() ? nullptr : &entries[found->second].second;
}

void Dict::Set(const Value& key, Value value) {
  const size_t at = Position(key);
  if (at < entries.size()) {
    entries[at].second = std::move(value);
    return;
  }
  entries.emplace_back(key, std::move(value));
  if (!index_.empty()) {
    index_.emplace(CanonicalKey(key), at);
  } else if (entries.size() > kScanned) {
    for (size_t i = 0; i < entries.size(); ++i) index_.emplace(CanonicalKey(entries[i].first), i);
  }
}

bool Dict::Erase(const Value& key) {
  const size_t at = Position(key);
  if (at == entries.size()) return false;
  // The entry dies after the index is consistent again.
  const auto dying = std::move(entries[at]);
  entries.erase(entries.begin() + static_cast<ptrdiff_t>(at));
  index_.clear();
  if (entries.size() > kScanned) {
    for (size_t i = 0; i < entries.size(); ++i) index_.emplace(CanonicalKey(entries[i].first), i);
  }
  return true;
}

Heap::~Heap() {
  // What is left are cycles. Hold everything, so that nothing is deleted while links are cut.
  std::vector<Object*> left;
  for (Object* object = first_; object != nullptr; object = object->next) {
    Retain(object);
    left.push_back(object);
  }
  for (Object* object : left) object->Clear();
  for (Object* object : left) Release(object);
}

absl::Status Heap::Check() const {
  if (steps_ > steps_max_) {
    return absl::ResourceExhaustedError(
        fmt::format("the template needs more than {} steps", steps_max_));
  }
  return Room(0);
}

absl::Status Heap::Room(size_t bytes) const {
  if (bytes_ > bytes_max_ || bytes > bytes_max_ - bytes_) {
    return absl::ResourceExhaustedError(
        fmt::format("the template needs more than {} bytes of memory", bytes_max_));
  }
  return absl::OkStatus();
}

void Heap::Adopt(Object* object, size_t bytes) {
  object->bytes = bytes;
  bytes_ += bytes;
  ++steps_;
  object->next = first_;
  if (first_ != nullptr) first_->previous = object;
  first_ = object;
}

void Heap::Charge(Object& object, size_t bytes) {
  bytes_ += bytes;
  object.bytes += bytes;
}

void Heap::Delete(Object* object) {
  if (object->previous != nullptr) object->previous->next = object->next;
  if (object->next != nullptr) object->next->previous = object->previous;
  if (first_ == object) first_ = object->next;
  bytes_ -= object->bytes;
  delete object;
}

void Heap::Free(Object* object) {
  if (deleting_) {
    dying_.push_back(object);
    return;
  }
  deleting_ = true;
  Delete(object);
  while (!dying_.empty()) {
    Object* next = dying_.back();
    dying_.pop_back();
    Delete(next);
  }
  deleting_ = false;
}

Value Heap::Str(std::string text) {
  steps_ += text.size() / 128;
  const size_t bytes = sizeof(String) + text.size();
  auto* object = new String(this, std::move(text));
  Adopt(object, bytes);
  return Value(Kind::kString, object);
}

Value Heap::Markup(std::string text) {
  Value out = Str(std::move(text));
  out.as<String>().markup = true;
  return out;
}

Value Heap::Undefined(std::string message) {
  auto* object = new String(this, std::move(message));
  Adopt(object, sizeof(String) + object->text.size());
  return Value(Kind::kUndefined, object);
}

Value Heap::NewSequence(Kind kind, std::vector<Value> items) {
  auto* object = New<Sequence>();
  object->items = std::move(items);
  Charge(*object, object->items.size() * sizeof(Value));
  steps_ += object->items.size() / 8;
  return Value(kind, object);
}

Value Heap::NewIterator(std::vector<Value> items, bool is_view) {
  auto* object = New<Iterator>();
  object->items = std::move(items);
  object->is_view = is_view;
  Charge(*object, object->items.size() * sizeof(Value));
  steps_ += object->items.size() / 8;
  return Value(Kind::kIterator, object);
}

Value Heap::NewFunction(std::string_view name, Native native, Value self) {
  auto* object = New<Function>();
  object->name = name;
  object->native = native;
  object->self = std::move(self);
  return Value(Kind::kFunction, object);
}

absl::Status Heap::SetItem(Dict& dict, const Value& key, Value value) {
  if (!Hashable(key)) {
    return absl::InvalidArgumentError(fmt::format("unhashable type: '{}'", TypeName(key)));
  }
  const size_t before = dict.size();
  dict.Set(key, std::move(value));
  // Entry, index slot and the canonical copy of the key.
  if (dict.size() != before) {
    Charge(dict, 2 * sizeof(Value) + 48 + (key.is(Kind::kString) ? key.text().size() : 0));
  }
  return absl::OkStatus();
}

void Heap::Append(Sequence& list, Value value) {
  list.items.push_back(std::move(value));
  Charge(list, sizeof(Value));
}

std::string_view TypeName(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return "Undefined";
    case Kind::kNone:
      return "NoneType";
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
      return "int";
    case Kind::kFloat:
      return "float";
    case Kind::kString:
      return "str";
    case Kind::kList:
      return "list";
    case Kind::kTuple:
      return "tuple";
    case Kind::kDict:
      return "dict";
    case Kind::kRange:
      return "range";
    case Kind::kIterator:
      return value.as<Iterator>().is_view ? "dict_view" : "generator";
    case Kind::kNamespace:
      return "Namespace";
    case Kind::kFunction:
      return "function";
    case Kind::kMacro:
      return "Macro";
    case Kind::kLoop:
      return "LoopContext";
    case Kind::kCycler:
      return "Cycler";
    case Kind::kJoiner:
      return "Joiner";
  }
  return "object";
}

bool Hashable(const Value& value) {
  switch (value.kind()) {
    case Kind::kList:
    case Kind::kDict:
      return false;
    case Kind::kTuple: {
      // Tuples of tuples are rare as keys; a limit on the size of the canonical form keeps shared
      // structure from exploding.
      size_t budget = 64;
      std::vector<Value> open{value};
      while (!open.empty()) {
        const Value top = std::move(open.back());
        open.pop_back();
        if (top.is(Kind::kTuple)) {
          for (const Value& item : top.as<Sequence>().items) {
            if (budget-- == 0) return false;
            open.push_back(item);
          }
        } else if (top.is(Kind::kList) || top.is(Kind::kDict)) {
          return false;
        }
      }
      return true;
    }
    default:
      return true;
  }
}

std::string CanonicalKey(const Value& key) {
  switch (key.kind()) {
    case Kind::kString:
      return "s" + key.text();
    case Kind::kNone:
      return "n";
    case Kind::kUndefined:
      return "u";
    case Kind::kBool:
    case Kind::kInt:
      return fmt::format("i{}", key.integer());
    case Kind::kFloat: {
      const double real = key.real();
      if (real == std::floor(real) && std::fabs(real) < 1e38) {
        return fmt::format("i{}", static_cast<Int>(real));
      }
      uint64_t bits;
      std::memcpy(&bits, &real, sizeof bits);
      return fmt::format("f{}", bits);
    }
    case Kind::kTuple: {
      std::string out = "t";
      for (const Value& item : key.as<Sequence>().items) {
        const std::string part = CanonicalKey(item);
        out += fmt::format("{}:{}", part.size(), part);
      }
      return out;
    }
    default:
      return fmt::format("p{}", static_cast<const void*>(key.object()));
  }
}

}  // namespace antiphon::model::jinja
