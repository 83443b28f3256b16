#include "engine/tensor_group.h"

#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/fd_passing.h"
#include "common/status_macros.h"

namespace antiphon::engine {
namespace {

enum Kind : uint32_t { kStep = 1, kPool, kEnd };

// Before every message.
struct Header {
  uint32_t kind;
  uint32_t bytes;  // of the message that follows
};

struct PoolMessage {
  uint64_t bytes;  // 0: none
};

// A step: its count of chunks as uint64, then each chunk's header, tokens and blocks' offsets.
struct ChunkHeader {
  uint64_t sequence;
  uint32_t start;
  uint32_t tokens;
  uint32_t blocks;
  uint32_t output;  // kLast, kAll
};
enum Output : uint32_t { kNone, kLast, kAll };

constexpr size_t kModelTextBytes = 512;
constexpr int kDescriptorMillis = 10000;

absl::Span<std::byte> BytesOf(void* data, size_t bytes) {
  return absl::MakeSpan(static_cast<std::byte*>(data), bytes);
}

void Append(const void* data, size_t bytes, std::vector<std::byte>& out) {
  const auto* begin = static_cast<const std::byte*>(data);
  out.insert(out.end(), begin, begin + bytes);
}

class Reader {
 public:
  explicit Reader(absl::Span<const std::byte> bytes) : bytes_(bytes) {}
  // False: there are fewer.
  bool Read(void* out, size_t bytes) {
    if (bytes > bytes_.size()) return false;
    std::memcpy(out, bytes_.data(), bytes);
    bytes_.remove_prefix(bytes);
    return true;
  }
  size_t left() const { return bytes_.size(); }

 private:
  absl::Span<const std::byte> bytes_;
};

absl::Status Malformed() { return absl::InternalError("rank 0 sent a malformed step"); }

}  // namespace

GroupLeader::GroupLeader(const TensorGroup& group, const KvLayout& layout)
    : group_(group), layout_(layout) {}

absl::Status GroupLeader::Begin(const std::string& model) {
  std::vector<std::byte> text(kModelTextBytes);
  std::memcpy(text.data(), model.data(), std::min(model.size(), text.size()));
  RETURN_IF_ERROR(group_.comm->Broadcast(absl::MakeSpan(text), 0, absl::InfiniteDuration()));
  return group_.comm->Barrier(absl::InfiniteDuration());
}

absl::Status GroupLeader::UsePool(const PoolMemory& pool) {
  pool_ = {};
  for (int socket : group_.sockets) {
    if (pool.bytes != 0 && SendWithFd(socket, "p", pool.fd) != 1) {
      const absl::Status status = absl::UnavailableError(
          fmt::format("a rank cannot be given the pool: {}", std::strerror(errno)));
      group_.comm->Abort(status);
      return status;
    }
  }
  PoolMessage message{.bytes = pool.bytes};
  RETURN_IF_ERROR(Tell(kPool, BytesOf(&message, sizeof(message))));
  pool_ = pool;
  return absl::OkStatus();
}

absl::Status GroupLeader::Encode(const Step& step) {
  message_.clear();
  const uint64_t chunks = step.chunks.size();
  Append(&chunks, sizeof(chunks), message_);
  for (size_t c = 0; c < step.chunks.size(); ++c) {
    const SequenceChunk& chunk = step.chunks[c];
    const uint32_t blocks = layout_.BlocksFor(chunk.start + chunk.tokens.size());
    const Output output = chunk.want_logits ? kAll : chunk.sample.has_value() ? kLast : kNone;
    const ChunkHeader header{.sequence = chunk.sequence,
                             .start = chunk.start,
                             .tokens = static_cast<uint32_t>(chunk.tokens.size()),
                             .blocks = blocks,
                             .output = output};
    Append(&header, sizeof(header), message_);
    Append(chunk.tokens.data(), chunk.tokens.size() * sizeof(uint32_t), message_);
    for (uint32_t b = 0; b < blocks; ++b) {
      const std::byte* block = chunk.blocks[b];
      // A block behind the pool's end gives a huge difference, as does one before its beginning.
      const uint64_t offset =
          reinterpret_cast<uintptr_t>(block) - reinterpret_cast<uintptr_t>(pool_.base);
      if (pool_.bytes < layout_.payload_bytes() || offset > pool_.bytes - layout_.payload_bytes()) {
        return absl::InvalidArgumentError(
            fmt::format("chunk {}: block {} is not in the pool that the ranks share", c, b));
      }
      Append(&offset, sizeof(offset), message_);
    }
  }
  return absl::OkStatus();
}

absl::Status GroupLeader::Send() { return Tell(kStep, absl::MakeSpan(message_)); }

void GroupLeader::End() {
  // Ranks that cannot be told see that this one has left.
  (void)Tell(kEnd, {});
}

absl::Status GroupLeader::Tell(uint32_t kind, absl::Span<std::byte> message) {
  Header header{.kind = kind, .bytes = static_cast<uint32_t>(message.size())};
  RETURN_IF_ERROR(group_.comm->Broadcast(BytesOf(&header, sizeof(header)), 0, group_.timeout));
  return group_.comm->Broadcast(message, 0, group_.timeout);
}

GroupMember::GroupMember(const TensorGroup& group, const KvLayout& layout,
                         std::function<void(std::byte*, size_t)> on_pool)
    : group_(group), layout_(layout), on_pool_(std::move(on_pool)) {}

GroupMember::~GroupMember() { UnmapPool(); }

void GroupMember::UnmapPool() {
  if (pool_.bytes() > 0 && on_pool_) on_pool_(nullptr, 0);
  pool_ = SharedMemory();
}

absl::Status GroupMember::Begin(const std::string& model) {
  std::vector<std::byte> theirs(kModelTextBytes), mine(kModelTextBytes);
  std::memcpy(mine.data(), model.data(), std::min(model.size(), mine.size()));
  RETURN_IF_ERROR(group_.comm->Broadcast(absl::MakeSpan(theirs), 0, absl::InfiniteDuration()));
  if (theirs != mine) {
    const absl::Status status = absl::FailedPreconditionError(fmt::format(
        "rank {} has loaded \"{}\", rank 0 \"{}\"", group_.comm->rank(), model,
        std::string(reinterpret_cast<const char*>(theirs.data()),
                    strnlen(reinterpret_cast<const char*>(theirs.data()), theirs.size()))));
    group_.comm->Abort(status);
    return status;
  }
  return group_.comm->Barrier(absl::InfiniteDuration());
}

absl::StatusOr<std::optional<Step>> GroupMember::Next() {
  while (true) {
    Header header{};
    RETURN_IF_ERROR(
        group_.comm->Broadcast(BytesOf(&header, sizeof(header)), 0, absl::InfiniteDuration()));
    message_.resize(header.bytes);
    RETURN_IF_ERROR(group_.comm->Broadcast(absl::MakeSpan(message_), 0, group_.timeout));
    absl::Status status = Malformed();
    if (header.kind == kEnd) return std::nullopt;
    if (header.kind == kStep) {
      absl::StatusOr<Step> step = Decode(message_);
      if (step.ok()) return *std::move(step);
      status = step.status();
    } else if (PoolMessage pool; header.kind == kPool && message_.size() == sizeof(pool)) {
      std::memcpy(&pool, message_.data(), sizeof(pool));
      status = MapPool(pool.bytes);
    }
    if (status.ok()) continue;
    group_.comm->Abort(status);
    return status;
  }
}

absl::Status GroupMember::MapPool(uint64_t bytes) {
  UnmapPool();
  if (bytes == 0) return absl::OkStatus();
  pollfd poll_for{.fd = group_.sockets.at(0), .events = POLLIN};
  char byte = 0;
  std::vector<int> fds;
  if (poll(&poll_for, 1, kDescriptorMillis) != 1 || RecvWithFds(poll_for.fd, &byte, 1, fds) != 1 ||
      fds.size() != 1) {
    for (int fd : fds) close(fd);
    return absl::UnavailableError("rank 0 sent no descriptor of the pool");
  }
  absl::StatusOr<SharedMemory> pool = SharedMemory::Map(fds[0], bytes);
  close(fds[0]);
  RETURN_IF_ERROR(pool.status());
  pool_ = *std::move(pool);
  if (on_pool_) on_pool_(pool_.data(), pool_.bytes());
  return absl::OkStatus();
}

absl::StatusOr<Step> GroupMember::Decode(absl::Span<const std::byte> message) {
  Reader reader(message);
  uint64_t chunks = 0;
  if (!reader.Read(&chunks, sizeof(chunks)) || chunks > reader.left() / sizeof(ChunkHeader)) {
    return Malformed();
  }
  tokens_.clear();
  blocks_.clear();
  // Both are larger than what they come to hold, so that spans into them stay.
  tokens_.reserve(message.size() / sizeof(uint32_t));
  blocks_.reserve(message.size() / sizeof(uint64_t));
  Step step;
  for (uint64_t c = 0; c < chunks; ++c) {
    ChunkHeader header;
    if (!reader.Read(&header, sizeof(header)) || header.tokens > reader.left() / sizeof(uint32_t)) {
      return Malformed();
    }
    const size_t first_token = tokens_.size(), first_block = blocks_.size();
    tokens_.resize(first_token + header.tokens);
    if (!reader.Read(tokens_.data() + first_token, header.tokens * sizeof(uint32_t)) ||
        header.blocks > reader.left() / sizeof(uint64_t) ||
        header.blocks < layout_.BlocksFor(size_t{header.start} + header.tokens)) {
      return Malformed();
    }
    for (uint32_t b = 0; b < header.blocks; ++b) {
      uint64_t offset = 0;
      if (!reader.Read(&offset, sizeof(offset)) || pool_.bytes() < layout_.payload_bytes() ||
          offset > pool_.bytes() - layout_.payload_bytes()) {
        return Malformed();
      }
      blocks_.push_back(pool_.data() + offset);
    }
    SequenceChunk chunk;
    chunk.tokens = absl::MakeConstSpan(tokens_).subspan(first_token, header.tokens);
    chunk.sequence = header.sequence;
    chunk.start = header.start;
    chunk.blocks = absl::MakeConstSpan(blocks_).subspan(first_block, header.blocks);
    chunk.want_logits = header.output == kAll;
    if (header.output == kLast) chunk.sample.emplace();  // rank 0 draws; here it marks the row
    step.chunks.push_back(chunk);
  }
  return step;
}

}  // namespace antiphon::engine
