// How fast a Pull is over loopback, from one process to another, beside plain sockets (one
// connection, send and recv of the same bytes at the same places: the limit).
//
//   pull_bench [seconds of a round, default 1] [rounds, default 5]
//
// One request (`batch` blocks) is under way at a time, and once more with two. Hot walks through
// one batch again and again, cold through 512 MiB on both sides. Rounds of both kinds alternate;
// printed are the median and the extremes in GB/s (10^9), and CPU seconds of both processes per GB.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "transfer/tcp_transport.h"

namespace antiphon::transfer {
namespace {

constexpr size_t kRegionBytes = 512 << 20;
constexpr RegionId kRegion = 1;

struct Shape {
  const char* name;
  uint32_t block_bytes;
  uint32_t batch;
  uint32_t batch_bytes() const { return block_bytes * batch; }
};
constexpr Shape kShapes[] = {
    {"64 KiB x 16", 64 << 10, 16}, {"1 MiB x 16", 1 << 20, 16}, {"16 MiB x 4", 16 << 20, 4}};

std::byte* Memory(int fill) {
  void* memory = mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  CHECK(memory != MAP_FAILED);
  std::memset(memory, fill, kRegionBytes);
  return static_cast<std::byte*>(memory);
}

// ---- The plain owner: (offset, bytes) in, those bytes out.

struct PlainRequest {
  uint64_t offset;
  uint64_t bytes;
};

bool ReceiveAll(int fd, void* to, size_t bytes) {
  for (size_t got = 0; got < bytes;) {
    const ssize_t n = recv(fd, static_cast<char*>(to) + got, bytes - got, 0);
    if (n <= 0) return false;
    got += static_cast<size_t>(n);
  }
  return true;
}

bool SendAll(int fd, const void* from, size_t bytes) {
  for (size_t sent = 0; sent < bytes;) {
    const ssize_t n = send(fd, static_cast<const char*>(from) + sent, bytes - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

void NoDelay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

void ServePlain(int listen_fd, const std::byte* memory) {
  while (true) {
    const int fd = accept(listen_fd, nullptr, nullptr);
    if (fd < 0) return;
    NoDelay(fd);
    PlainRequest request;
    while (ReceiveAll(fd, &request, sizeof(request)) &&
           SendAll(fd, memory + request.offset, request.bytes)) {
    }
    close(fd);
  }
}

// The owner's process; `to` gets the two ports, and its end ends it.
[[noreturn]] void Own(int to, int until) {
  const std::byte* memory = Memory(7);
  auto transport = MakeTcpTransport({});
  CHECK(transport.ok() && (*transport)->Export(kRegion, memory, kRegionBytes).ok());
  const int listen_fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  CHECK(bind(listen_fd, reinterpret_cast<sockaddr*>(&address), size) == 0);
  CHECK(listen(listen_fd, 8) == 0);
  CHECK(getsockname(listen_fd, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  Thread plain("plain", [&] { ServePlain(listen_fd, memory); });
  const uint16_t ports[2] = {ParseHostPort((*transport)->address())->port, ntohs(address.sin_port)};
  CHECK(write(to, ports, sizeof(ports)) == sizeof(ports));
  char end;
  [[maybe_unused]] const ssize_t n = read(until, &end, 1);
  _exit(0);
}

// ---- Rounds

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double CpuSeconds(pid_t owner) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  double seconds = 0;
  for (const timeval& t : {usage.ru_utime, usage.ru_stime}) {
    seconds += static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  }
  // The owner's: fields 14 and 15 of its stat, in ticks.
  const std::string path = "/proc/" + std::to_string(owner) + "/stat";
  if (FILE* file = std::fopen(path.c_str(), "r")) {
    unsigned long user = 0, system = 0;
    if (std::fscanf(file, "%*d %*s %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
                    &system) == 2) {
      seconds += static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
    std::fclose(file);
  }
  return seconds;
}

// Where batch after batch lies.
class Walk {
 public:
  Walk(const Shape& shape, bool cold) : step_(shape.batch_bytes()), cold_(cold) {}
  uint64_t Next() {
    const uint64_t at = at_;
    at_ += step_;
    if (!cold_ || at_ + step_ > kRegionBytes) at_ = 0;
    return at;
  }

 private:
  const uint64_t step_;
  const bool cold_;
  uint64_t at_ = 0;
};

struct Round {
  double gb_per_s = 0;
  double cpu_per_gb = 0;
};

Round Measure(double seconds, pid_t owner, const std::function<uint64_t(double until)>& run) {
  const double start = Now(), cpu = CpuSeconds(owner);
  const uint64_t bytes = run(start + seconds);
  const double took = Now() - start, gb = static_cast<double>(bytes) * 1e-9;
  return {gb / took, (CpuSeconds(owner) - cpu) / gb};
}

uint64_t PullUntil(Transport& puller, const std::string& peer, const Shape& shape, bool cold,
                   int depth, std::byte* memory, double until) {
  Walk walk(shape, cold);
  absl::Mutex mu;
  int under_way = 0;
  uint64_t bytes = 0;
  while (Now() < until) {
    const uint64_t at = walk.Next();
    PullRequest request{.peer = peer, .region = kRegion};
    for (uint32_t b = 0; b < shape.batch; ++b) {
      const uint64_t offset = at + uint64_t{b} * shape.block_bytes;
      request.slices.push_back({offset, memory + offset, shape.block_bytes});
    }
    {
      absl::MutexLock lock(&mu);
      const auto room = [&] { return under_way < depth; };
      mu.Await(absl::Condition(&room));
      ++under_way;
    }
    puller.Pull(std::move(request), [&](absl::Status status) {
      CHECK(status.ok());
      absl::MutexLock lock(&mu);
      --under_way;
      bytes += shape.batch_bytes();
    });
  }
  absl::MutexLock lock(&mu);
  const auto idle = [&] { return under_way == 0; };
  mu.Await(absl::Condition(&idle));
  return bytes;
}

uint64_t PlainUntil(int fd, const Shape& shape, bool cold, int depth, std::byte* memory,
                    double until) {
  Walk asked(shape, cold), received(shape, cold);
  uint64_t bytes = 0;
  int under_way = 0;
  while (true) {
    const bool more = Now() < until;
    while (more && under_way < depth) {
      const PlainRequest request{asked.Next(), shape.batch_bytes()};
      CHECK(SendAll(fd, &request, sizeof(request)));
      ++under_way;
    }
    if (under_way == 0) return bytes;
    CHECK(ReceiveAll(fd, memory + received.Next(), shape.batch_bytes()));
    --under_way;
    bytes += shape.batch_bytes();
  }
}

void Print(const char* what, std::vector<Round> rounds) {
  std::sort(rounds.begin(), rounds.end(),
            [](const Round& a, const Round& b) { return a.gb_per_s < b.gb_per_s; });
  const Round& median = rounds[rounds.size() / 2];
  std::printf("  %s %5.2f (%5.2f-%5.2f) GB/s %5.2f s/GB", what, median.gb_per_s,
              rounds.front().gb_per_s, rounds.back().gb_per_s, median.cpu_per_gb);
}

void Run(double seconds, int rounds) {
  int ports_pipe[2], end_pipe[2];
  CHECK(pipe(ports_pipe) == 0 && pipe(end_pipe) == 0);
  const pid_t owner = fork();
  CHECK(owner >= 0);
  if (owner == 0) {
    close(end_pipe[1]);
    Own(ports_pipe[1], end_pipe[0]);
  }
  uint16_t ports[2];
  CHECK(read(ports_pipe[0], ports, sizeof(ports)) == sizeof(ports));
  std::byte* memory = Memory(0);
  const std::string peer = HostPort{"127.0.0.1", ports[0]}.Text();
  auto puller = MakeTcpTransport({});
  CHECK(puller.ok());
  const int plain = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Loopback(ports[1]);
  CHECK(connect(plain, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  NoDelay(plain);

  for (const bool cold : {false, true}) {
    for (const Shape& shape : kShapes) {
      for (const int depth : {1, 2}) {
        std::vector<Round> pulls, plains;
        for (int round = -1; round < rounds; ++round) {  // the first warms up
          const double length = round < 0 ? 0.2 : seconds;
          const Round pull = Measure(length, owner, [&](double until) {
            return PullUntil(**puller, peer, shape, cold, depth, memory, until);
          });
          const Round limit = Measure(length, owner, [&](double until) {
            return PlainUntil(plain, shape, cold, depth, memory, until);
          });
          if (round < 0) continue;
          pulls.push_back(pull);
          plains.push_back(limit);
        }
        CHECK(memory[0] == std::byte{7});
        std::printf("%-12s %s, %d under way:", shape.name, cold ? "cold" : "hot ", depth);
        Print("pull", pulls);
        Print("plain", plains);
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  }
  close(plain);
  close(end_pipe[1]);
  waitpid(owner, nullptr, 0);
}

}  // namespace
}  // namespace antiphon::transfer

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 5;
  if (!(seconds > 0) || rounds <= 0) {
    std::fprintf(stderr, "usage: pull_bench [seconds of a round] [rounds]\n");
    return 2;
  }
  antiphon::transfer::Run(seconds, rounds);
  return 0;
}
