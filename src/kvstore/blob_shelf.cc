#include "kvstore/blob_shelf.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

std::vector<BlobAnswer> Refuse(ClientId session, uint64_t request, absl::Status why) {
  return {{.session = session, .request = request, .status = std::move(why)}};
}

absl::Status CheckText(const char* field, const std::string& text) {
  if (!text.empty() && text.size() <= kBlobNameBytesMax) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format("a blob's {} has {} bytes; it has 1 to {}", field,
                                                text.size(), kBlobNameBytesMax));
}

}  // namespace

BlobShelf::BlobShelf(BlobLimits limits, MakeBlobMemory make)
    : limits_(limits), make_(std::move(make)) {}

absl::Status BlobShelf::Check(ClientId session, const BlobName& name) const {
  RETURN_IF_ERROR(CheckText("name", name.name));
  RETURN_IF_ERROR(CheckText("model", name.model));
  if (name.bytes == 0) return absl::InvalidArgumentError("a blob has at least one byte");
  if (names_.contains(session)) {
    return absl::FailedPreconditionError(
        fmt::format("this connection has the blob {} already", names_.at(session)));
  }
  return absl::OkStatus();
}

std::vector<BlobAnswer> BlobShelf::Open(ClientId session, uint64_t request, const BlobName& name) {
  if (absl::Status bad = Check(session, name); !bad.ok()) return Refuse(session, request, bad);
  auto held = blobs_.find(name.name);
  if (held == blobs_.end()) {
    auto memory = Make(name);
    if (!memory.ok()) return Refuse(session, request, memory.status());
    Blob& blob = blobs_[name.name];
    blob.name = name;
    blob.memory = *memory;
    blob.filler = session;
    bytes_ += name.bytes;
    names_[session] = name.name;
    return {{.session = session, .request = request, .memory = *memory, .fill = true}};
  }
  Blob& blob = held->second;
  if (blob.name.bytes != name.bytes || blob.name.model != name.model) {
    return Refuse(session, request,
                  absl::FailedPreconditionError(fmt::format(
                      "the blob {} is held with {} bytes for the model {}, not {} for "
                      "{}",
                      name.name, blob.name.bytes, blob.name.model, name.bytes, name.model)));
  }
  names_[session] = name.name;
  if (blob.filler != 0) {
    blob.waiters.push_back({session, request});
    return {};
  }
  blob.users.insert(session);
  return {{.session = session, .request = request, .memory = blob.memory}};
}

std::vector<BlobAnswer> BlobShelf::Publish(ClientId session, uint64_t request) {
  const auto name = names_.find(session);
  if (name == names_.end() || blobs_.at(name->second).filler != session) {
    return Refuse(session, request, absl::FailedPreconditionError("this connection fills no blob"));
  }
  const auto held = blobs_.find(name->second);
  Blob& blob = held->second;
  std::vector<BlobAnswer> answers;
  if (absl::Status sealed = blob.memory->Seal(); !sealed.ok()) {
    answers = Refuse(session, request, std::move(sealed));
    names_.erase(name);
    PassOn(held, answers);
    return answers;
  }
  answers.push_back({.session = session, .request = request});
  blob.filler = 0;
  blob.users.insert(session);
  for (const Waiter& waiter : std::exchange(blob.waiters, {})) {
    blob.users.insert(waiter.session);
    answers.push_back(
        {.session = waiter.session, .request = waiter.request, .memory = blob.memory});
  }
  return answers;
}

std::vector<BlobAnswer> BlobShelf::Offer(ClientId session, uint64_t request, const BlobName& name,
                                         BlobMemoryRef memory) {
  if (absl::Status bad = Check(session, name); !bad.ok()) return Refuse(session, request, bad);
  if (blobs_.contains(name.name)) {
    return Refuse(session, request,
                  absl::AlreadyExistsError(fmt::format("the blob {} is here", name.name)));
  }
  if (absl::Status full = MakeRoom(name); !full.ok()) return Refuse(session, request, full);
  Blob& blob = blobs_[name.name];
  blob.name = name;
  blob.memory = std::move(memory);
  blob.users.insert(session);
  bytes_ += name.bytes;
  names_[session] = name.name;
  return {{.session = session, .request = request}};
}

std::vector<BlobAnswer> BlobShelf::End(ClientId session) {
  const auto name = names_.find(session);
  if (name == names_.end()) return {};
  const auto held = blobs_.find(name->second);
  names_.erase(name);
  Blob& blob = held->second;
  std::vector<BlobAnswer> answers;
  if (blob.filler == session) {
    PassOn(held, answers);
    return answers;
  }
  blob.users.erase(session);
  std::erase_if(blob.waiters, [&](const Waiter& waiter) { return waiter.session == session; });
  if (blob.users.empty()) blob.unused_since = ++ends_;
  return answers;
}

void BlobShelf::PassOn(Blobs::iterator held, std::vector<BlobAnswer>& answers) {
  Blob& blob = held->second;
  // Before the next is made: whoever filled it may be gone, and then its memory is free.
  blob.memory = nullptr;
  if (!blob.waiters.empty()) {
    auto memory = make_(blob.name.name, blob.name.bytes);
    if (memory.ok()) {
      const Waiter next = blob.waiters.front();
      blob.waiters.pop_front();
      blob.memory = *memory;
      blob.filler = next.session;
      answers.push_back(
          {.session = next.session, .request = next.request, .memory = *memory, .fill = true});
      return;
    }
    for (const Waiter& waiter : blob.waiters) {
      names_.erase(waiter.session);
      answers.push_back(
          {.session = waiter.session, .request = waiter.request, .status = memory.status()});
    }
  }
  Drop(held);
}

absl::Status BlobShelf::MakeRoom(const BlobName& name) {
  if (name.bytes > limits_.bytes) {
    return absl::ResourceExhaustedError(fmt::format(
        "a blob of {} bytes is larger than all may be, {} bytes", name.bytes, limits_.bytes));
  }
  for (auto it = blobs_.begin(); it != blobs_.end();) {
    const auto blob = it++;
    const bool unused = blob->second.filler == 0 && blob->second.users.empty();
    if (unused && blob->second.name.model != name.model) Drop(blob);
  }
  while (blobs_.size() >= limits_.blobs || bytes_ > limits_.bytes - name.bytes) {
    if (DropLongestUnused()) continue;
    return absl::ResourceExhaustedError(
        fmt::format("{} blobs of {} bytes are in use; {} of {} bytes are the limit", blobs_.size(),
                    bytes_, limits_.blobs, limits_.bytes));
  }
  return absl::OkStatus();
}

absl::StatusOr<BlobMemoryRef> BlobShelf::Make(const BlobName& name) {
  RETURN_IF_ERROR(MakeRoom(name));
  while (true) {
    auto memory = make_(name.name, name.bytes);
    if (memory.ok() || !absl::IsResourceExhausted(memory.status()) || !DropLongestUnused()) {
      return memory;
    }
  }
}

bool BlobShelf::DropLongestUnused() {
  auto longest = blobs_.end();
  for (auto it = blobs_.begin(); it != blobs_.end(); ++it) {
    if (it->second.filler != 0 || !it->second.users.empty()) continue;
    if (longest == blobs_.end() || it->second.unused_since < longest->second.unused_since) {
      longest = it;
    }
  }
  if (longest == blobs_.end()) return false;
  Drop(longest);
  return true;
}

void BlobShelf::Drop(Blobs::iterator blob) {
  bytes_ -= blob->second.name.bytes;
  blobs_.erase(blob);
}

}  // namespace antiphon::kvstore
