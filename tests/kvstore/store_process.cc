#include "tests/kvstore/store_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "common/block_key.h"
#include "common/clock.h"
#include "common/net.h"
#include "common/philox.h"
#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(20);

std::string Field(const std::string& line, const std::string& name) {
  const std::string start = "\"" + name + "\":\"";
  const size_t at = line.find(start);
  if (at == std::string::npos) return "";
  return line.substr(at + start.size(), line.find('"', at + start.size()) - at - start.size());
}

std::string HttpGet(const std::string& address, const std::string& path) {
  const auto to = ParseHostPort(address);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in sa{};
  sa.sin_family = AF_INET;
  sa.sin_port = htons(to->port);
  inet_pton(AF_INET, "127.0.0.1", &sa.sin_addr);
  std::string out;
  if (connect(fd, reinterpret_cast<sockaddr*>(&sa), sizeof(sa)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    (void)!write(fd, request.data(), request.size());
    char buffer[4096];
    for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) {
      out.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return out;
}

}  // namespace

StoreProcess::StoreProcess(std::vector<std::string> flags) {
  char name[] = "/tmp/antiphon-kv-XXXXXX";
  dir_ = mkdtemp(name);
  int fds[2];
  CHECK(pipe2(fds, O_CLOEXEC) == 0);
  std::vector<std::string> args = {ANTIPHON_KVSTORE,
                                   "--announce-fd=" + std::to_string(fds[1]),
                                   "--cluster.runtime_dir=" + dir_,
                                   "--cluster.conductors=[127.0.0.1:1]",
                                   "--kvstore.rpc.listen=127.0.0.1:0",
                                   "--kvstore.data.listen=127.0.0.1:0",
                                   "--kvstore.ops.listen=127.0.0.1:0",
                                   "--kvstore.drain.delay=0s",
                                   "--kvstore.drain.deadline=5s",
                                   "--kvstore.pool=16MiB"};
  for (const std::string& flag : flags) {
    const std::string key = flag.substr(0, flag.find('=') + 1);
    std::erase_if(args, [&](const std::string& arg) { return arg.rfind(key, 0) == 0; });
    args.push_back(flag);
  }
  const std::string parent = std::to_string(getpid());
  pid_ = fork();
  if (pid_ == 0) {
    setenv("ANTIPHON_PARENT_PID", parent.c_str(), 1);  // ends with us, however we end
    fcntl(fds[1], F_SETFD, 0);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(fds[1]);
  announce_ = fds[0];
  std::string text;
  const absl::Time deadline = Clock::Real().Now() + kPatience;
  while (!ready_ && Clock::Real().Now() < deadline) {
    pollfd p{.fd = announce_, .events = POLLIN, .revents = 0};
    if (poll(&p, 1, 100) <= 0) continue;
    char buffer[4096];
    const ssize_t n = read(announce_, buffer, sizeof(buffer));
    if (n <= 0) break;
    text.append(buffer, static_cast<size_t>(n));
    for (size_t end; (end = text.find('\n')) != std::string::npos; text.erase(0, end + 1)) {
      const std::string line = text.substr(0, end);
      if (Field(line, "event") == "listening") {
        addresses_[Field(line, "listener")] = Field(line, "address");
      }
      if (line.find("\"ready\":true") != std::string::npos) ready_ = true;
    }
  }
}

StoreProcess::~StoreProcess() {
  if (pid_ > 0) {
    Kill(SIGKILL);
    Wait();
  }
  close(announce_);
  std::filesystem::remove_all(dir_);
}

void StoreProcess::Kill(int signal) { kill(pid_, signal); }

int StoreProcess::Wait() {
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  return status;
}

double StoreProcess::Metric(const std::string& name) const {
  const std::string body = HttpGet(address("kvstore.ops"), "/metrics");
  // Label order is the registry's: the daemon's own label may come anywhere.
  for (size_t at = 0; at < body.size();) {
    size_t end = body.find('\n', at);
    if (end == std::string::npos) end = body.size();
    std::string line = body.substr(at, end - at);
    at = end + 1;
    const std::string daemon = "daemon=\"kvstore\"";
    if (const size_t d = line.find(daemon); d != std::string::npos) {
      line.erase(d, daemon.size());
      if (line[d] == ',') {
        line.erase(d, 1);
      } else if (line[d - 1] == ',') {
        line.erase(d - 1, 1);
      } else {
        line.erase(d - 1, 2);
      }
    }
    if (line.rfind(name + " ", 0) == 0) return std::atof(line.c_str() + name.size() + 1);
  }
  return -1;
}

bool StoreProcess::AwaitMetric(const std::string& name, double value) const {
  const absl::Time deadline = Clock::Real().Now() + absl::Seconds(10);
  do {
    if (Metric(name) == value) return true;
  } while (Clock::Real().Now() < deadline);
  return false;
}

absl::StatusOr<std::unique_ptr<TestWorker>> TestWorker::Attach(const std::string& socket_path,
                                                               KvLayout layout,
                                                               std::string weights) {
  std::unique_ptr<TestWorker> worker(new TestWorker(layout));
  TestWorker* w = worker.get();
  wire::Fingerprint fingerprint;
  fingerprint.set_weights_digest(weights);
  fingerprint.set_kv_dtype("bf16");
  fingerprint.set_layout(layout.Text());
  ASSIGN_OR_RETURN(worker->client_,
                   StoreClient::Attach(
                       {.socket_path = socket_path,
                        .self = {.cluster = "antiphon", .node = NodeId("test"), .incarnation = 1},
                        .layout = layout,
                        .fingerprint = &fingerprint,
                        .executor = &worker->executor_,
                        .on_event =
                            [w](const wire::StoreReply& reply) {
                              absl::MutexLock lock(&w->mu_);
                              w->progress_[reply.progress().fetch()] = reply.progress();
                            },
                        .on_refused =
                            [w](const wire::StoreReply& reply) {
                              absl::MutexLock lock(&w->mu_);
                              w->refusals_.push_back(reply);
                            },
                        .on_lost =
                            [w](absl::Status) {
                              absl::MutexLock lock(&w->mu_);
                              w->lost_ = true;
                            }}));
  return worker;
}

TestWorker::~TestWorker() { client_ = nullptr; }

wire::StoreReply TestWorker::Call(wire::StoreRequest request, uint64_t* id) {
  auto reply = std::make_shared<wire::StoreReply>();
  auto done = std::make_shared<bool>(false);
  const uint64_t number =
      client_->Call(std::move(request), [this, reply, done](const wire::StoreReply& r) {
        absl::MutexLock lock(&mu_);
        *reply = r;
        *done = true;
      });
  if (id != nullptr) *id = number;
  absl::MutexLock lock(&mu_);
  if (!mu_.AwaitWithTimeout(absl::Condition(done.get()), kPatience)) {
    reply->mutable_status()->set_code(static_cast<int>(absl::StatusCode::kDeadlineExceeded));
  }
  return *reply;
}

std::vector<SlotId> TestWorker::Reserve(uint32_t count) {
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(count);
  std::vector<SlotId> out;
  const wire::StoreReply reply = Call(request);
  for (const auto& slot : reply.slots().slots()) out.push_back(SlotFromProto(slot));
  return out;
}

std::vector<SlotId> TestWorker::PinPrefix(const std::vector<BlockKey>& keys) {
  wire::StoreRequest request;
  for (const BlockKey& key : keys) request.mutable_pin_prefix()->add_keys(key.ToBytes());
  std::vector<SlotId> out;
  const wire::StoreReply reply = Call(request);
  for (const auto& slot : reply.slots().slots()) out.push_back(SlotFromProto(slot));
  return out;
}

void TestWorker::Release(const std::vector<SlotId>& slots) {
  wire::StoreRequest request;
  for (const SlotId& slot : slots) *request.mutable_release()->add_slots() = SlotToProto(slot);
  CHECK(Call(request).status().code() == 0);
}

void TestWorker::Fill(SlotId slot, uint64_t seed) {
  std::byte* at = client_->Payload(slot.slot);
  for (size_t i = 0; i < layout_.payload_bytes(); i += 16) {
    const auto v = Philox4x32(seed, i);
    std::memcpy(at + i, v.data(), 16);
  }
}

bool TestWorker::Holds(SlotId slot, uint64_t seed) const {
  const std::byte* at = client_->Payload(slot.slot);
  for (uint32_t l = 0; l < layout_.layers; ++l) {
    const size_t begin = l * layout_.layer_bytes();
    for (size_t i = begin; i < begin + 2 * layout_.half_bytes(); i += 16) {
      const auto v = Philox4x32(seed, i);
      if (std::memcmp(at + i, v.data(), 16) != 0) return false;
    }
  }
  return true;
}

std::vector<uint64_t> TestWorker::Checksums(SlotId slot, uint32_t tokens) const {
  std::vector<uint64_t> out;
  for (uint32_t l = 0; l < layout_.layers; ++l) {
    out.push_back(
        LayerChecksum(layout_, client_->Payload(slot.slot) + l * layout_.layer_bytes(), tokens));
  }
  return out;
}

wire::StoreReply TestWorker::Commit(SlotId slot, const BlockKey& parent, uint32_t position,
                                    const std::vector<uint32_t>& tokens, uint64_t seed) {
  Fill(slot, seed);
  wire::StoreRequest request;
  auto* commit = request.mutable_commit();
  *commit->mutable_slot() = SlotToProto(slot);
  auto* meta = commit->mutable_meta();
  meta->set_key(NextKey(parent, tokens).ToBytes());
  meta->set_parent(parent.ToBytes());
  meta->set_position(position);
  meta->mutable_token_ids()->Add(tokens.begin(), tokens.end());
  for (uint64_t sum : Checksums(slot, layout_.block_tokens)) meta->add_layer_checksums(sum);
  return Call(request);
}

wire::StoreReply::FetchProgress TestWorker::AwaitProgress(uint64_t fetch, uint64_t tag) {
  absl::MutexLock lock(&mu_);
  const auto there = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const auto& p = progress_[fetch];
    return p.done_tag() >= tag || p.status().code() != 0;
  };
  mu_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(10));
  return progress_[fetch];
}

bool TestWorker::AwaitLost() {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithTimeout(absl::Condition(&lost_), absl::Seconds(10));
}

wire::StoreReply TestWorker::AwaitRefusal() {
  absl::MutexLock lock(&mu_);
  const auto there = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !refusals_.empty(); };
  mu_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(10));
  return refusals_.empty() ? wire::StoreReply() : refusals_.front();
}

TestChain::TestChain(const std::string& name, uint32_t n)
    : root(RootKey({.weights_digest = name, .block_tokens = 16})) {
  for (uint32_t i = 0; i < n; ++i) {
    std::vector<uint32_t> block;
    for (uint32_t t = 0; t < 16; ++t) block.push_back(100 * i + t);
    keys.push_back(NextKey(i == 0 ? root : keys[i - 1], block));
    tokens.push_back(std::move(block));
  }
}

}  // namespace antiphon::kvstore
