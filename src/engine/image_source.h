// Where packed weights come from and go to when processes of one host share them.
#ifndef ANTIPHON_ENGINE_IMAGE_SOURCE_H_
#define ANTIPHON_ENGINE_IMAGE_SOURCE_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace antiphon::engine {

// One image; the memory lives as long as this.
class SharedImage {
 public:
  virtual ~SharedImage() = default;
  // Zeroed memory for us to fill; null when the image is finished.
  virtual std::byte* fill() = 0;
  // Everything is written: the memory at fill() goes away, the same bytes are at data(). Not OK:
  // they cannot be had any more. That nobody else gets them is no error.
  virtual absl::Status Finish() = 0;
  // A finished image's bytes, at a page's boundary.
  virtual const std::byte* data() const = 0;
};

// Of one model file.
class ImageSource {
 public:
  virtual ~ImageSource() = default;
  // `name` says all that decides about the bytes but the file. Blocks while another process fills
  // the image. Any error: make one of your own.
  virtual absl::StatusOr<std::unique_ptr<SharedImage>> Open(const std::string& name,
                                                            size_t bytes) = 0;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_IMAGE_SOURCE_H_
