// Values of the template language, with Python's reference semantics: lists, dictionaries and
// namespaces are shared, everything else is immutable. All objects of one rendering belong to its
// Heap, which counts their bytes and the steps of the rendering.
//
// Not thread-safe: one rendering runs on one thread.
#ifndef ANTIPHON_MODEL_JINJA_VALUE_H_
#define ANTIPHON_MODEL_JINJA_VALUE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace antiphon::model::jinja {

// Python's integers are unbounded; ours hold 128 bits, so that every integer of JSON prints
// exactly. Arithmetic that leaves the range is an error.
__extension__ typedef __int128 Int;

class Heap;
class Interpreter;
struct Args;

enum class Kind : uint8_t {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kTuple,
  kDict,
  kRange,
  kIterator,
  kNamespace,
  kFunction,
  kMacro,
  kLoop,
  kCycler,
  kJoiner,
};

// Base of everything that lives on the heap. The count of references starts at zero; the first
// Value or Ref takes it.
struct Object {
  explicit Object(Heap* owner) : heap(owner) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  virtual ~Object() = default;
  // Drops the references to other objects; how the heap breaks cycles at the end.
  virtual void Clear() {}

  Heap* heap;
  Object* previous = nullptr;
  Object* next = nullptr;
  size_t bytes = 0;
  uint32_t references = 0;
};

void Retain(Object* object);
void Release(Object* object);

template <typename T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) {
    if (object_ != nullptr) Retain(object_);
  }
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ != nullptr) Release(object_);
  }
  T* get() const { return object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  T* object_ = nullptr;
};

class Value {
 public:
  // Undefined without a name.
  Value() : kind_(Kind::kUndefined) { payload_.object = nullptr; }
  Value(Kind kind, Object* object) : kind_(kind) {
    payload_.object = object;
    if (object != nullptr) Retain(object);
  }
  Value(const Value& other) : payload_(other.payload_), kind_(other.kind_) {
    if (Object* object = heap_object()) Retain(object);
  }
  Value(Value&& other) noexcept : payload_(other.payload_), kind_(other.kind_) {
    other.kind_ = Kind::kNone;
  }
  Value& operator=(Value other) noexcept {
    std::swap(payload_, other.payload_);
    std::swap(kind_, other.kind_);
    return *this;
  }
  ~Value() {
    if (Object* object = heap_object()) Release(object);
  }

  static Value None() { return Value(Kind::kNone, nullptr); }
  static Value Bool(bool value) {
    Value out(Kind::kBool, nullptr);
    out.payload_.boolean = value;
    return out;
  }
  static Value Integer(Int value) {
    Value out(Kind::kInt, nullptr);
    out.payload_.integer = value;
    return out;
  }
  static Value Float(double value) {
    Value out(Kind::kFloat, nullptr);
    out.payload_.real = value;
    return out;
  }

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  // Python's numbers, which include bool.
  bool numeric() const {
    return kind_ == Kind::kBool || kind_ == Kind::kInt || kind_ == Kind::kFloat;
  }
  bool integral() const { return kind_ == Kind::kBool || kind_ == Kind::kInt; }

  bool boolean() const { return payload_.boolean; }
  // Of kBool or kInt.
  Int integer() const { return kind_ == Kind::kBool ? Int{payload_.boolean} : payload_.integer; }
  // Of kBool, kInt or kFloat.
  double real() const {
    return kind_ == Kind::kFloat ? payload_.real : static_cast<double>(integer());
  }
  Object* object() const { return heap_object(); }
  template <typename T>
  T& as() const {
    return static_cast<T&>(*payload_.object);
  }
  // Of kString.
  const std::string& text() const;

 private:
  Object* heap_object() const {
    return kind_ >= Kind::kString || kind_ == Kind::kUndefined ? payload_.object : nullptr;
  }

  union {
    bool boolean;
    Int integer;
    double real;
    Object* object;
  } payload_;
  Kind kind_;
};

using Result = absl::StatusOr<Value>;
// A filter, test, method or global function. `self` is what it is applied to (none for functions).
using Native = Result (*)(Interpreter& in, const Value& self, Args& args);

// Also the message of an undefined value ("'x' is undefined").
struct String : Object {
  String(Heap* heap, std::string value);
  const std::string text;
  size_t length;        // in code points
  bool markup = false;  // made by `safe` or `escape`: `+` escapes the other operand
};

// kList and kTuple.
struct Sequence : Object {
  using Object::Object;
  void Clear() override { items.clear(); }
  std::vector<Value> items;
};

// kDict and kNamespace: keeps insertion order; keys are strings, numbers, booleans, none and tuples
// of those.
struct Dict : Object {
  using Object::Object;
  void Clear() override;
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  // The key must be Hashable().
  void Set(const Value& key, Value value);
  // False when there is no such key.
  bool Erase(const Value& key);
  size_t size() const { return entries.size(); }

  std::vector<std::pair<Value, Value>> entries;

 private:
  // The position, or size() when absent.
  size_t Position(const Value& key) const;
  // Maps the canonical form of each key to its position; empty while the dictionary is small.
  absl::flat_hash_map<std::string, uint32_t> index_;
};

struct Range : Object {
  using Object::Object;
  int64_t start = 0;
  int64_t stop = 0;  // as it was given
  int64_t step = 1;
  int64_t size = 0;
};

// A one-shot iterator (what `map`, `select`, ... give) or a view of a dictionary.
struct Iterator : Object {
  using Object::Object;
  void Clear() override { items.clear(); }
  std::vector<Value> items;
  size_t position = 0;
  bool is_view = false;
};

struct Function : Object {
  using Object::Object;
  void Clear() override { self = Value::None(); }
  Native native = nullptr;
  Value self = Value::None();
  std::string_view name;  // of a static table
};

struct Cycler : Object {
  using Object::Object;
  void Clear() override { items.clear(); }
  std::vector<Value> items;
  size_t position = 0;
};

struct Joiner : Object {
  using Object::Object;
  void Clear() override { separator = Value::None(); }
  Value separator = Value::None();
  bool used = false;
};

// Owns the values of one rendering. Limits are checked after small allocations (Spend fails then)
// and before those that a template could make arbitrarily larger than its inputs (Room).
class Heap {
 public:
  Heap(uint64_t steps_max, size_t bytes_max) : steps_max_(steps_max), bytes_max_(bytes_max) {}
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  // Every Value outside the heap's own objects must be gone.
  ~Heap();

  // Counts steps of work; false once a limit is passed.
  bool Spend(uint64_t steps) {
    steps_ += steps;
    return steps_ <= steps_max_ && bytes_ <= bytes_max_;
  }
  // Work on `bytes` of text.
  bool SpendText(size_t bytes) { return Spend(1 + bytes / 128); }
  // RESOURCE_EXHAUSTED with the limit's name once one is passed.
  absl::Status Check() const;
  // Whether `bytes` more would fit.
  absl::Status Room(size_t bytes) const;

  Value Str(std::string text);
  Value Str(std::string_view text) { return Str(std::string(text)); }
  Value Str(const char* text) { return Str(std::string(text)); }
  Value Markup(std::string text);
  Value Undefined(std::string message);
  Value List(std::vector<Value> items) { return NewSequence(Kind::kList, std::move(items)); }
  Value Tuple(std::vector<Value> items) { return NewSequence(Kind::kTuple, std::move(items)); }
  Value NewDict() { return Value(Kind::kDict, New<Dict>()); }
  Value View(std::vector<Value> items) { return NewIterator(std::move(items), true); }
  Value Once(std::vector<Value> items) { return NewIterator(std::move(items), false); }
  Value NewFunction(std::string_view name, Native native, Value self);

  // Adds to or replaces in a dictionary or namespace; INVALID_ARGUMENT when the key is unhashable.
  absl::Status SetItem(Dict& dict, const Value& key, Value value);
  void Append(Sequence& list, Value value);

  template <typename T>
  T* New() {
    T* object = new T(this);
    Adopt(object, sizeof(T));
    return object;
  }
  // Changes what an object is charged with.
  void Charge(Object& object, size_t bytes);
  void Free(Object* object);

 private:
  void Adopt(Object* object, size_t bytes);
  Value NewSequence(Kind kind, std::vector<Value> items);
  Value NewIterator(std::vector<Value> items, bool is_view);
  void Delete(Object* object);

  const uint64_t steps_max_;
  const size_t bytes_max_;
  uint64_t steps_ = 0;
  size_t bytes_ = 0;
  Object* first_ = nullptr;
  // Destruction of deep structures is a loop, not a recursion: objects that die meanwhile wait
  // here.
  std::vector<Object*> dying_;
  bool deleting_ = false;
};

inline void Retain(Object* object) { ++object->references; }
inline void Release(Object* object) {
  if (--object->references == 0) object->heap->Free(object);
}
inline const std::string& Value::text() const { return as<String>().text; }

// Python's name of the type: 'str', 'dict', 'NoneType', ...
std::string_view TypeName(const Value& value);
bool Hashable(const Value& value);
// A text equal for equal keys (1, 1.0 and true are one key) and different for others.
std::string CanonicalKey(const Value& key);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_VALUE_H_
