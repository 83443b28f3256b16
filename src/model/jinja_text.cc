#include "model/jinja_text.h"

#include <utf8proc.h>

#include <charconv>
#include <cmath>
#include <cstring>

#include "fmt/format.h"

namespace antiphon::model::jinja {
namespace {

constexpr uint32_t kReplacement = 0xfffd;

struct Decoded {
  uint32_t code_point;
  size_t bytes;
  bool valid;
};

Decoded Decode(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  const size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || bytes > text.size()) return {kReplacement, 1, false};
  uint32_t value = lead & (0x7f >> bytes);
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {kReplacement, 1, false};
    value = value << 6 | (byte(i) & 0x3f);
  }
  const bool overlong = (bytes == 3 && value < 0x800) || (bytes == 4 && value < 0x10000);
  if (overlong || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) {
    return {kReplacement, 1, false};
  }
  return {value, bytes, true};
}

utf8proc_category_t Category(uint32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

// Python maps a few letters to more than one; utf8proc maps one to one.
void AppendUpper(uint32_t c, std::string* out) {
  if (c == 0xdf) {
    out->append("SS");
  } else {
    AppendUtf8(static_cast<uint32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))), out);
  }
}

void AppendTitle(uint32_t c, std::string* out) {
  if (c == 0xdf) {
    out->append("Ss");
  } else {
    AppendUtf8(static_cast<uint32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(c))), out);
  }
}

void AppendLower(uint32_t c, std::string* out) {
  if (c == 0x130) {
    out->append("i\xcc\x87");
  } else {
    AppendUtf8(static_cast<uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), out);
  }
}

// Calls visit(code_point, bytes as written) for each code point.
template <typename Visit>
void ForEach(std::string_view text, Visit visit) {
  while (!text.empty()) {
    const Decoded front = Decode(text);
    visit(front, text.substr(0, front.bytes));
    text.remove_prefix(front.bytes);
  }
}

bool IsCased(uint32_t c) {
  const utf8proc_category_t category = Category(c);
  return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL ||
         category == UTF8PROC_CATEGORY_LT;
}

bool Printable(uint32_t c) {
  switch (Category(c)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return false;
    case UTF8PROC_CATEGORY_ZS:
      return c == ' ';
    default:
      return true;
  }
}

bool InSet(std::string_view set, std::string_view part) {
  while (!set.empty()) {
    const size_t bytes = FrontBytes(set);
    if (set.substr(0, bytes) == part) return true;
    set.remove_prefix(bytes);
  }
  return false;
}

}  // namespace

size_t FrontBytes(std::string_view text) { return Decode(text).bytes; }
uint32_t Front(std::string_view text) { return Decode(text).code_point; }

bool ValidUtf8(std::string_view text) {
  while (!text.empty()) {
    const Decoded front = Decode(text);
    if (!front.valid) return false;
    text.remove_prefix(front.bytes);
  }
  return true;
}

size_t CodePoints(std::string_view text) {
  size_t count = 0;
  size_t i = 0;
  while (i < text.size()) {
    i += static_cast<uint8_t>(text[i]) < 0x80 ? 1 : Decode(text.substr(i)).bytes;
    ++count;
  }
  return count;
}

size_t ByteOffset(std::string_view text, size_t index) {
  size_t offset = 0;
  for (; index > 0 && offset < text.size(); --index) offset += Decode(text.substr(offset)).bytes;
  return offset;
}

void AppendUtf8(uint32_t c, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6);
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
         c == 0x205f || c == 0x3000;
}

bool IsAlpha(uint32_t c) {
  const utf8proc_category_t category = Category(c);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}
bool IsDigit(uint32_t c) { return Category(c) == UTF8PROC_CATEGORY_ND; }
bool IsAlnum(uint32_t c) {
  const utf8proc_category_t category = Category(c);
  return IsAlpha(c) || category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}
bool IsUpper(uint32_t c) { return Category(c) == UTF8PROC_CATEGORY_LU; }
bool IsLower(uint32_t c) { return Category(c) == UTF8PROC_CATEGORY_LL; }

std::string_view Strip(std::string_view text, Side side, const std::string_view* chars) {
  const auto strip = [&](std::string_view part) {
    return chars == nullptr ? IsSpace(Front(part)) : InSet(*chars, part);
  };
  if (side != Side::kRight) {
    while (!text.empty() && strip(text.substr(0, FrontBytes(text)))) {
      text.remove_prefix(FrontBytes(text));
    }
  }
  if (side != Side::kLeft) {
    while (!text.empty()) {
      size_t start = text.size() - 1;
      while (start > 0 && text.size() - start < 4 &&
             (static_cast<uint8_t>(text[start]) & 0xc0) == 0x80) {
        --start;
      }
      if (start + FrontBytes(text.substr(start)) != text.size()) start = text.size() - 1;
      if (!strip(text.substr(start))) break;
      text.remove_suffix(text.size() - start);
    }
  }
  return text;
}

std::string Upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    c.valid ? AppendUpper(c.code_point, &out) : void(out.append(bytes));
  });
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    c.valid ? AppendLower(c.code_point, &out) : void(out.append(bytes));
  });
  return out;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    if (!c.valid) {
      out.append(bytes);
    } else if (out.empty()) {
      AppendTitle(c.code_point, &out);
    } else {
      AppendLower(c.code_point, &out);
    }
  });
  return out;
}

std::string Title(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  bool in_word = false;
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    if (!c.valid) {
      out.append(bytes);
    } else if (in_word) {
      AppendLower(c.code_point, &out);
    } else {
      AppendTitle(c.code_point, &out);
    }
    in_word = c.valid && IsCased(c.code_point);
  });
  return out;
}

std::string SwapCase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    if (c.valid && IsUpper(c.code_point)) {
      AppendLower(c.code_point, &out);
    } else if (c.valid && IsLower(c.code_point)) {
      AppendUpper(c.code_point, &out);
    } else {
      out.append(bytes);
    }
  });
  return out;
}

// std::string_view::find is quadratic on repetitive text; glibc's memmem is linear.
size_t Find(std::string_view text, std::string_view part, size_t from) {
  if (from > text.size()) return std::string_view::npos;
  if (part.empty()) return from;
  const void* found = memmem(text.data() + from, text.size() - from, part.data(), part.size());
  if (found == nullptr) return std::string_view::npos;
  return static_cast<size_t>(static_cast<const char*>(found) - text.data());
}

size_t FindLast(std::string_view text, std::string_view part) {
  if (part.empty()) return text.size();
  // The mirror image, so that the search is linear here too.
  const std::string mirrored(text.rbegin(), text.rend());
  const std::string needle(part.rbegin(), part.rend());
  const size_t at = Find(mirrored, needle);
  return at == std::string_view::npos ? at : text.size() - at - part.size();
}

std::string Quoted(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, quote);
  ForEach(text, [&](const Decoded& c, std::string_view bytes) {
    if (c.code_point == static_cast<uint32_t>(quote) || c.code_point == '\\') {
      out.push_back('\\');
      out.append(bytes);
    } else if (c.code_point == '\n') {
      out.append("\\n");
    } else if (c.code_point == '\r') {
      out.append("\\r");
    } else if (c.code_point == '\t') {
      out.append("\\t");
    } else if (!c.valid) {
      out.append(fmt::format("\\x{:02x}", static_cast<uint8_t>(bytes[0])));
    } else if (Printable(c.code_point)) {
      out.append(bytes);
    } else if (c.code_point < 0x100) {
      out.append(fmt::format("\\x{:02x}", c.code_point));
    } else if (c.code_point < 0x10000) {
      out.append(fmt::format("\\u{:04x}", c.code_point));
    } else {
      out.append(fmt::format("\\U{:08x}", c.code_point));
    }
  });
  out.push_back(quote);
  return out;
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  std::string_view text(buffer, static_cast<size_t>(end.ptr - buffer));
  std::string out;
  if (text.front() == '-') {
    out = "-";
    text.remove_prefix(1);
  }
  const size_t e = text.find('e');
  int exponent = 0;
  const char* sign = text.data() + e + 1;
  std::from_chars(*sign == '+' ? sign + 1 : sign, text.data() + text.size(), exponent);
  std::string digits(1, text[0]);
  if (e > 2) digits.append(text.substr(2, e - 2));
  const int count = static_cast<int>(digits.size());
  // Python's repr switches to an exponent below 1e-4 and from 1e16 on.
  if (exponent < -4 || exponent >= 16) {
    out += digits.substr(0, 1);
    if (count > 1) out += "." + digits.substr(1);
    return out + fmt::format("e{}{:02d}", exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  if (exponent < 0)
    return out + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  if (count <= exponent + 1) {
    return out + digits + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
  }
  const auto whole = static_cast<size_t>(exponent + 1);
  return out + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::string HtmlEscaped(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

}  // namespace antiphon::model::jinja
