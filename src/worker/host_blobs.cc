#include "worker/host_blobs.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "common/clock.h"
#include "common/logging.h"
#include "common/shared_memory.h"
#include "common/status_macros.h"

namespace antiphon::worker {
namespace {

constexpr absl::Duration kConnect = absl::Seconds(3);
constexpr absl::Duration kFill = absl::Seconds(60);
constexpr double kFillBytesPerSecond = 100e6;
constexpr size_t kTextBytes = 4096;

// Its length and the text; the rest is zero.
std::optional<std::string> ReadText(int fd) {
  char bytes[kTextBytes];
  if (pread(fd, bytes, sizeof(bytes), 0) != sizeof(bytes)) return std::nullopt;
  uint32_t length = 0;
  std::memcpy(&length, bytes, sizeof(length));
  if (length > sizeof(bytes) - sizeof(length)) return std::nullopt;
  return std::string(bytes + sizeof(length), length);
}

bool WriteText(int fd, const std::string& text) {
  const uint32_t length = static_cast<uint32_t>(text.size());
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  bytes += text;
  return bytes.size() <= kTextBytes &&
         pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size());
}

}  // namespace

struct HostBlobs::Held {
  explicit Held(kvstore::BlobOptions o, kvstore::BlobLease l)
      : options(std::move(o)), lease(std::move(l)) {}
  const kvstore::BlobOptions options;
  absl::Mutex mu;
  kvstore::BlobLease lease ABSL_GUARDED_BY(mu);
  bool finished ABSL_GUARDED_BY(mu) = false;
};

class HostBlobs::Image final : public engine::SharedImage {
 public:
  explicit Image(std::shared_ptr<Held> held) : held_(std::move(held)) {}

  absl::Status Map() {
    absl::MutexLock lock(&held_->mu);
    fills_ = held_->lease.fill();
    held_->finished = !fills_;
    const int fd = held_->lease.fd();
    const size_t bytes = held_->options.bytes;
    ASSIGN_OR_RETURN(
        memory_, fills_ ? SharedMemory::MapHuge(fd, bytes) : SharedMemory::MapSealed(fd, bytes));
    return absl::OkStatus();
  }

  std::byte* fill() override { return fills_ ? memory_.data() : nullptr; }
  const std::byte* data() const override { return memory_.data(); }

  absl::Status Finish() override {
    memory_ = SharedMemory();
    fills_ = false;
    absl::MutexLock lock(&held_->mu);
    if (absl::Status published = held_->lease.Publish(); !published.ok()) {
      LogWarning("other workers do not get the packed weights: {}",
                 std::string(published.message()));
    }
    held_->finished = true;
    ASSIGN_OR_RETURN(memory_, SharedMemory::MapSealed(held_->lease.fd(), held_->options.bytes));
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<Held> held_;
  bool fills_ = false;
  SharedMemory memory_;
};

HostBlobs::HostBlobs(std::string socket_path, Identity self, std::string model)
    : socket_path_(std::move(socket_path)),
      self_(std::move(self)),
      model_(std::move(model)),
      connect_until_(Clock::Real().Now() + kConnect) {}

HostBlobs::~HostBlobs() = default;

absl::StatusOr<std::unique_ptr<engine::SharedImage>> HostBlobs::Open(const std::string& name,
                                                                     size_t bytes) {
  kvstore::BlobOptions options{
      .socket_path = socket_path_,
      .self = self_,
      .name = fmt::format("{} {}", name, model_),
      .model = model_,
      .bytes = bytes,
      .connect_patience = std::max(absl::ZeroDuration(), connect_until_ - Clock::Real().Now()),
      .fill_patience = kFill + absl::Seconds(static_cast<double>(bytes) / kFillBytesPerSecond)};
  ASSIGN_OR_RETURN(kvstore::BlobLease lease, kvstore::BlobLease::Open(options));
  auto held = std::make_shared<Held>(std::move(options), std::move(lease));
  auto image = std::make_unique<Image>(held);
  RETURN_IF_ERROR(image->Map());
  absl::MutexLock lock(&mu_);
  std::erase_if(images_, [](const auto& other) { return other.expired(); });
  images_.push_back(held);
  return image;
}

absl::StatusOr<kvstore::BlobLease> HostBlobs::OpenText(const std::string& name) {
  return kvstore::BlobLease::Open(
      {.socket_path = socket_path_,
       .self = self_,
       .name = fmt::format("{} {}", name, model_),
       .model = model_,
       .bytes = kTextBytes,
       .connect_patience = std::max(absl::ZeroDuration(), connect_until_ - Clock::Real().Now()),
       .fill_patience = kFill});
}

// `lease` is to be filled with it.
void HostBlobs::Keep(const std::string& name, const std::string& text, kvstore::BlobLease& lease) {
  const absl::Status kept =
      WriteText(lease.fd(), text) ? lease.Publish() : absl::InternalError("it is too long");
  if (!kept.ok()) LogWarning("'{}' is not kept: {}", name, std::string(kept.message()));
}

absl::StatusOr<std::string> HostBlobs::Recall(
    const std::string& name, const std::function<bool(const std::string&)>& valid,
    const std::function<absl::StatusOr<std::string>()>& compute) {
  auto lease = OpenText(name);
  std::optional<std::string> text;
  if (lease.ok() && !lease->fill()) {
    text = ReadText(lease->fd());
    if (!text.has_value() || !valid(*text)) {
      LogWarning("what another worker left as '{}' makes no sense; it is computed again", name);
      return compute();
    }
  } else {
    ASSIGN_OR_RETURN(text, compute());
    if (lease.ok()) Keep(name, *text, *lease);
  }
  absl::MutexLock lock(&mu_);
  texts_[name] = {*text, lease.ok() ? lease->store_incarnation() : 0};
  return *std::move(text);
}

void HostBlobs::OfferTo(uint64_t store_incarnation) {
  std::vector<std::shared_ptr<Held>> all;
  std::map<std::string, Text> texts;
  {
    absl::MutexLock lock(&mu_);
    texts = texts_;
    for (auto& [name, text] : texts_) text.store_incarnation = store_incarnation;
    for (const auto& image : images_) {
      if (auto held = image.lock()) all.push_back(std::move(held));
    }
  }
  for (const std::shared_ptr<Held>& held : all) {
    absl::MutexLock lock(&held->mu);
    if (!held->finished || held->lease.store_incarnation() == store_incarnation) continue;
    auto taken = kvstore::BlobLease::Offer(held->options, held->lease.fd());
    if (taken.ok()) {
      held->lease = *std::move(taken);
      LogInfo("brought the {} MiB of packed weights to the store", held->options.bytes >> 20);
    } else if (!absl::IsAlreadyExists(taken.status())) {
      LogWarning(
          "the store does not take the packed weights, which later workers will pack again: "
          "{}",
          std::string(taken.status().message()));
    }
  }
  for (const auto& [name, text] : texts) {
    if (text.store_incarnation == store_incarnation) continue;
    auto lease = OpenText(name);
    if (lease.ok() && lease->fill()) Keep(name, text.text, *lease);
  }
}

}  // namespace antiphon::worker
