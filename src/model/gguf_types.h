// What a file's first bytes say when it is not a GGUF.
#ifndef ANTIPHON_MODEL_GGUF_TYPES_H_
#define ANTIPHON_MODEL_GGUF_TYPES_H_

#include <string>
#include <string_view>

namespace antiphon::model {

// "it starts with 50 4b 03 04; that looks like a zip archive (a PyTorch checkpoint?)". For files
// whose first four bytes are not "GGUF".
std::string DescribeForeignFile(std::string_view bytes);
// What they look like alone, "a gzip archive: unpack it first"; nullptr: nothing known.
const char* GuessForeignFile(std::string_view bytes);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_GGUF_TYPES_H_
