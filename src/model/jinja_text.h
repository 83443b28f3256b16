// Python's view of text and numbers as text, over UTF-8. Pure functions. Bytes that are not UTF-8
// count as one code point each and are copied as they are.
#ifndef ANTIPHON_MODEL_JINJA_TEXT_H_
#define ANTIPHON_MODEL_JINJA_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace antiphon::model::jinja {

// Length of the code point at the front of a non-empty text, in bytes.
size_t FrontBytes(std::string_view text);
// The code point at the front; U+FFFD where the bytes are not UTF-8.
uint32_t Front(std::string_view text);
bool ValidUtf8(std::string_view text);
size_t CodePoints(std::string_view text);
// Byte offset of code point `index` (at most CodePoints()).
size_t ByteOffset(std::string_view text, size_t index);
void AppendUtf8(uint32_t code_point, std::string* out);

bool IsSpace(uint32_t code_point);
bool IsAlpha(uint32_t code_point);
bool IsDigit(uint32_t code_point);
bool IsAlnum(uint32_t code_point);
bool IsUpper(uint32_t code_point);
bool IsLower(uint32_t code_point);

// Strips white space, or the code points of `chars` when it isn't null.
enum class Side { kBoth, kLeft, kRight };
std::string_view Strip(std::string_view text, Side side, const std::string_view* chars = nullptr);

std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
// First letter in upper case, the rest in lower case.
std::string Capitalize(std::string_view text);
// str.title(): letters after anything that isn't a letter.
std::string Title(std::string_view text);
std::string SwapCase(std::string_view text);

// Offset of the first or last occurrence, npos when absent; linear in the text.
size_t Find(std::string_view text, std::string_view part, size_t from = 0);
size_t FindLast(std::string_view text, std::string_view part);

// repr() of a string: in quotes, with escapes for what doesn't print.
std::string Quoted(std::string_view text);
// repr() of a float: shortest digits that read back equal.
std::string FloatText(double value);
// &amp; &lt; &gt; &#39; &#34;
std::string HtmlEscaped(std::string_view text);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_TEXT_H_
