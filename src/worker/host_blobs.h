// What the workers of a host need compute only once: packed weights, the model's digest, the
// measured speed. Kept as blobs by the host's store, under the identity of the model's file.
#ifndef ANTIPHON_WORKER_HOST_BLOBS_H_
#define ANTIPHON_WORKER_HOST_BLOBS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/wire.h"
#include "engine/image_source.h"
#include "kvstore/client/blob_lease.h"

namespace antiphon::worker {

// Thread-safe. Without a store, or with one that knows no blobs, everything is computed here: what
// goes wrong with blobs costs time and memory only.
class HostBlobs final : public engine::ImageSource {
 public:
  // `model`: ModelFile::identity(). A store that is not there yet gets three seconds from now.
  HostBlobs(std::string socket_path, Identity self, std::string model);
  ~HostBlobs() override;

  // A filler gets a minute and 100 MB/s; after that its memory is not waited for.
  absl::StatusOr<std::unique_ptr<engine::SharedImage>> Open(const std::string& name,
                                                            size_t bytes) override;

  // The short text that a worker of this host computed for `name`, or what `compute` returns: when
  // there is none yet (while it runs, others wait for its result), or when `valid` refuses it.
  absl::StatusOr<std::string> Recall(const std::string& name,
                                     const std::function<bool(const std::string&)>& valid,
                                     const std::function<absl::StatusOr<std::string>()>& compute);

  // Brings the images that are open, and the texts, to a store that has started after them. Blocks
  // for seconds when that store hangs.
  void OfferTo(uint64_t store_incarnation);

 private:
  struct Held;
  class Image;
  struct Text {
    std::string text;
    uint64_t store_incarnation = 0;  // of the store that has it
  };

  absl::StatusOr<kvstore::BlobLease> OpenText(const std::string& name);
  void Keep(const std::string& name, const std::string& text, kvstore::BlobLease& lease);

  const std::string socket_path_;
  const Identity self_;
  const std::string model_;
  const absl::Time connect_until_;
  absl::Mutex mu_;
  std::vector<std::weak_ptr<Held>> images_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Text> texts_ ABSL_GUARDED_BY(mu_);
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_HOST_BLOBS_H_
