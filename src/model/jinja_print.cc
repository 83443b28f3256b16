#include "model/jinja_print.h"

#include <algorithm>
#include <cmath>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_operations.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

absl::Status CheckGrowth(Heap& heap, const std::string& out, int depth) {
  if (depth > kDataDepthMax) return Error("a value is nested too deeply to print");
  if (!heap.Spend(1)) return heap.Check();
  return heap.Room(out.size());
}

absl::Status AppendItems(Heap& heap, const std::vector<Value>& items, std::string* out, int depth) {
  bool first = true;
  for (const Value& item : items) {
    if (!first) out->append(", ");
    first = false;
    RETURN_IF_ERROR(AppendRepr(heap, item, out, depth + 1));
  }
  return absl::OkStatus();
}

absl::Status AppendDict(Heap& heap, const Dict& dict, std::string* out, int depth) {
  out->push_back('{');
  bool first = true;
  for (const auto& [key, value] : dict.entries) {
    if (!first) out->append(", ");
    first = false;
    RETURN_IF_ERROR(AppendRepr(heap, key, out, depth + 1));
    out->append(": ");
    RETURN_IF_ERROR(AppendRepr(heap, value, out, depth + 1));
  }
  out->push_back('}');
  return absl::OkStatus();
}

std::string RangeText(const Range& range) {
  if (range.step == 1) return fmt::format("range({}, {})", range.start, range.stop);
  return fmt::format("range({}, {}, {})", range.start, range.stop, range.step);
}

class JsonWriter {
 public:
  JsonWriter(Heap& heap, const JsonStyle& style) : heap_(heap), style_(style) {}

  absl::Status Write(const Value& value, int depth) {
    RETURN_IF_ERROR(CheckGrowth(heap_, out_, depth));
    switch (value.kind()) {
      case Kind::kNone:
        out_ += "null";
        return absl::OkStatus();
      case Kind::kBool:
        out_ += value.boolean() ? "true" : "false";
        return absl::OkStatus();
      case Kind::kInt:
        out_ += fmt::format("{}", value.integer());
        return absl::OkStatus();
      case Kind::kFloat:
        out_ += FloatJson(value.real());
        return absl::OkStatus();
      case Kind::kString:
        return String(value.text());
      case Kind::kList:
      case Kind::kTuple:
        return List(value.as<Sequence>().items, depth);
      case Kind::kDict:
        return Object(value.as<Dict>(), depth);
      default:
        return Error(fmt::format("Object of type {} is not JSON serializable", TypeName(value)));
    }
  }

  std::string Take() { return std::move(out_); }

 private:
  static std::string FloatJson(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
    return FloatText(value);
  }

  absl::Status String(std::string_view text) {
    if (!heap_.SpendText(text.size() * 4)) return heap_.Check();
    RETURN_IF_ERROR(heap_.Room(out_.size() + text.size()));
    out_ += '"';
    while (!text.empty()) {
      const size_t bytes = FrontBytes(text);
      Character(Front(text), text.substr(0, bytes));
      text.remove_prefix(bytes);
    }
    out_ += '"';
    return absl::OkStatus();
  }

  void Character(uint32_t c, std::string_view bytes) {
    switch (c) {
      case '"':
        out_ += "\\\"";
        return;
      case '\\':
        out_ += "\\\\";
        return;
      case '\n':
        out_ += "\\n";
        return;
      case '\r':
        out_ += "\\r";
        return;
      case '\t':
        out_ += "\\t";
        return;
      case '\b':
        out_ += "\\b";
        return;
      case '\f':
        out_ += "\\f";
        return;
      default:
        break;
    }
    if (c >= 0x20 && (c < 0x7f || !style_.ensure_ascii)) {
      out_ += bytes;
    } else if (c < 0x10000) {
      out_ += fmt::format("\\u{:04x}", c);
    } else {
      const uint32_t rest = c - 0x10000;
      out_ += fmt::format("\\u{:04x}\\u{:04x}", 0xd800 + (rest >> 10), 0xdc00 + (rest & 0x3ff));
    }
  }

  void Separate(bool first, int depth) {
    if (!first) out_ += style_.item_separator;
    Newline(depth);
  }

  void Newline(int depth) {
    if (!style_.indent.has_value()) return;
    out_ += '\n';
    for (int i = 0; i < depth; ++i) out_ += *style_.indent;
  }

  absl::Status List(const std::vector<Value>& items, int depth) {
    if (items.empty()) {
      out_ += "[]";
      return absl::OkStatus();
    }
    out_ += '[';
    bool first = true;
    for (const Value& item : items) {
      Separate(first, depth + 1);
      first = false;
      RETURN_IF_ERROR(Write(item, depth + 1));
    }
    Newline(depth);
    out_ += ']';
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Key(const Value& key) const {
    switch (key.kind()) {
      case Kind::kString:
        return key.text();
      case Kind::kNone:
        return "null";
      case Kind::kBool:
        return key.boolean() ? "true" : "false";
      case Kind::kInt:
        return fmt::format("{}", key.integer());
      case Kind::kFloat:
        return FloatJson(key.real());
      default:
        return Error(
            fmt::format("keys must be str, int, float, bool or None, not {}", TypeName(key)));
    }
  }

  absl::Status Object(const Dict& dict, int depth) {
    if (dict.entries.empty()) {
      out_ += "{}";
      return absl::OkStatus();
    }
    if (!heap_.Spend(dict.size())) return heap_.Check();
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (style_.sort_keys) {
      absl::Status failure;
      std::stable_sort(entries.begin(), entries.end(), [&](const auto* a, const auto* b) {
        const auto order = Compare(heap_, a->first, b->first);
        if (!order.ok()) failure = order.status();
        return order.ok() && *order == std::partial_ordering::less;
      });
      RETURN_IF_ERROR(failure);
    }
    out_ += '{';
    bool first = true;
    for (const auto* entry : entries) {
      Separate(first, depth + 1);
      first = false;
      ASSIGN_OR_RETURN(const std::string key, Key(entry->first));
      RETURN_IF_ERROR(String(key));
      out_ += style_.key_separator;
      RETURN_IF_ERROR(Write(entry->second, depth + 1));
    }
    Newline(depth);
    out_ += '}';
    return absl::OkStatus();
  }

  Heap& heap_;
  const JsonStyle& style_;
  std::string out_;
};

}  // namespace

absl::Status AppendStr(Heap& heap, const Value& value, std::string* out) {
  if (value.is(Kind::kString)) {
    const std::string& text = value.text();
    if (!heap.SpendText(text.size())) return heap.Check();
    RETURN_IF_ERROR(heap.Room(out->size() + text.size()));
    out->append(text);
    return absl::OkStatus();
  }
  if (value.is(Kind::kUndefined)) return absl::OkStatus();
  return AppendRepr(heap, value, out);
}

absl::StatusOr<std::string> ToStr(Heap& heap, const Value& value) {
  std::string out;
  RETURN_IF_ERROR(AppendStr(heap, value, &out));
  return out;
}

absl::Status AppendRepr(Heap& heap, const Value& value, std::string* out, int depth) {
  RETURN_IF_ERROR(CheckGrowth(heap, *out, depth));
  switch (value.kind()) {
    case Kind::kUndefined:
      out->append("Undefined");
      break;
    case Kind::kNone:
      out->append("None");
      break;
    case Kind::kBool:
      out->append(value.boolean() ? "True" : "False");
      break;
    case Kind::kInt:
      out->append(fmt::format("{}", value.integer()));
      break;
    case Kind::kFloat:
      out->append(FloatText(value.real()));
      break;
    case Kind::kString: {
      if (!heap.SpendText(value.text().size() * 4)) return heap.Check();
      RETURN_IF_ERROR(heap.Room(out->size() + value.text().size()));
      const std::string quoted = Quoted(value.text());
      out->append(value.as<String>().markup ? fmt::format("Markup({})", quoted) : quoted);
      break;
    }
    case Kind::kList:
      out->push_back('[');
      RETURN_IF_ERROR(AppendItems(heap, value.as<Sequence>().items, out, depth));
      out->push_back(']');
      break;
    case Kind::kTuple:
      out->push_back('(');
      RETURN_IF_ERROR(AppendItems(heap, value.as<Sequence>().items, out, depth));
      out->append(value.as<Sequence>().items.size() == 1 ? ",)" : ")");
      break;
    case Kind::kDict:
      return AppendDict(heap, value.as<Dict>(), out, depth);
    case Kind::kNamespace:
      out->append("<Namespace ");
      RETURN_IF_ERROR(AppendDict(heap, value.as<Dict>(), out, depth));
      out->push_back('>');
      break;
    case Kind::kRange:
      out->append(RangeText(value.as<Range>()));
      break;
    case Kind::kIterator:
      if (value.as<Iterator>().is_view) {
        out->append("dict_view([");
        RETURN_IF_ERROR(AppendItems(heap, value.as<Iterator>().items, out, depth));
        out->append("])");
      } else {
        out->append("<generator object>");
      }
      break;
    default:
      out->append(fmt::format("<{}>", TypeName(value)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ToJson(Heap& heap, const Value& value, const JsonStyle& style) {
  JsonWriter writer(heap, style);
  RETURN_IF_ERROR(writer.Write(value, 0));
  return writer.Take();
}

}  // namespace antiphon::model::jinja
