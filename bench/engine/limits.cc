// The limits of this machine that an engine's speed is held against: bytes read a second and
// operations a second, with one thread and with several.
//
//   limits THREADS WEIGHTS_BYTES [read_weights]
//
// With read_weights only that. Prints one line a limit, separated by tabs: key, unit, with one
// thread, with THREADS threads, what it is. A path that the processor lacks or the system does not
// grant is left out. Each figure is the best of its rounds: other work on the machine only lowers
// it.
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace antiphon::engine {
namespace {

constexpr int kRounds = 7;
constexpr double kRoundSeconds = 0.1;
constexpr size_t kReadStep = 512;  // bytes a turn of the reading loops

using ReadLoop = void (*)(const std::byte* begin, size_t bytes);
using ComputeLoop = void (*)(uint64_t turns);

struct ComputePath {
  const char* key;
  const char* what;
  double operations_per_turn;  // a multiplication and its addition are two
  ComputeLoop loop;
};

void ReadPlainly(const std::byte* begin, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < bytes; i += sizeof(sums)) {
    uint64_t words[8];
    std::memcpy(words, begin + i, sizeof(words));
    for (int k = 0; k < 8; ++k) sums[k] += words[k];
  }
  for (uint64_t sum : sums) __asm__ volatile("" : : "r"(sum));
}

#if defined(__x86_64__)

// The loops are assembly: what is timed is what is written, whatever the compiler. Twelve
// accumulators hide the latency of each kind of product on every processor that has it.
#define TWELVE(instruction) ".irp i,0,1,2,3,4,5,6,7,8,9,10,11\n" instruction "\n.endr\n"
#define CLOBBERS                                                                                 \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
constexpr double kAccumulators = 12;

constexpr uint32_t kBytesOfThree = 0x03030303;
constexpr uint32_t kBf16Ones = 0x3f803f80;
constexpr float kOne = 1;

#define COMPUTE_256(name, features, operand, instruction)                                      \
  __attribute__((target(features))) void name(uint64_t turns) {                                \
    __asm__ volatile(TWELVE("vpxor %%ymm\\i, %%ymm\\i, %%ymm\\i") /* accumulators */         \
                     "vpbroadcastd %[value], %%ymm14\n"                                      \
                     "vmovdqa %%ymm14, %%ymm15\n"                                            \
                     ".balign 32\n"                                                          \
                     "1:\n" TWELVE(instruction) "dec %[turns]\n"                             \
                     "jnz 1b\n"                                                              \
                     "vzeroupper\n"                                                          \
                     : [turns] "+r"(turns)                                                   \
                     : [value] "m"(operand)                                                  \
                     : CLOBBERS); \
  }
#define COMPUTE_512(name, features, operand, instruction)                                      \
  __attribute__((target(features))) void name(uint64_t turns) {                                \
    __asm__ volatile(TWELVE("vpxord %%zmm\\i, %%zmm\\i, %%zmm\\i") /* accumulators */        \
                     "vpbroadcastd %[value], %%zmm14\n"                                      \
                     "vmovdqa64 %%zmm14, %%zmm15\n"                                          \
                     ".balign 32\n"                                                          \
                     "1:\n" TWELVE(instruction) "dec %[turns]\n"                             \
                     "jnz 1b\n"                                                              \
                     "vzeroupper\n"                                                          \
                     : [turns] "+r"(turns)                                                   \
                     : [value] "m"(operand)                                                  \
                     : CLOBBERS); \
  }

COMPUTE_256(Fma256, "avx2,fma", kOne, "vfmadd231ps %%ymm14, %%ymm15, %%ymm\\i")
COMPUTE_512(Fma512, "avx512f", kOne, "vfmadd231ps %%zmm14, %%zmm15, %%zmm\\i")
// As with four-bit weights: eight pairs of products fit 16 bits before they are widened.
COMPUTE_256(Maddubs256, "avx2", kBytesOfThree,
            "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n"
            ".rept 7\n"
            "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n"
            "vpaddw %%ymm13, %%ymm12, %%ymm12\n"
            ".endr\n"
            "vpmaddwd %%ymm15, %%ymm12, %%ymm12\n"
            "vpaddd %%ymm12, %%ymm\\i, %%ymm\\i")
COMPUTE_256(Vnni256, "avx2,avxvnni", kBytesOfThree, "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\i")
COMPUTE_512(Vnni512, "avx512f,avx512vnni", kBytesOfThree, "vpdpbusd %%zmm14, %%zmm15, %%zmm\\i")
COMPUTE_512(DpBf16, "avx512f,avx512bf16", kBf16Ones, "vdpbf16ps %%zmm14, %%zmm15, %%zmm\\i")

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
struct alignas(64) TileBytes {
  TileBytes() { std::memset(bytes, 0x3f, sizeof(bytes)); }  // 63, or 0.75 as bf16
  uint8_t bytes[1024];
};

// Six accumulators of 16 x 16: a product's latency is 52 cycles, one starts every 16. The whole
// configuration is an operand, so that the compiler keeps the stores to all of it.
#define COMPUTE_TILES(name, features, instruction)                                                 \
  __attribute__((target(features))) void name(uint64_t turns) {                                    \
    const TileConfig config;                                                                       \
    const TileBytes values;                                                                        \
    __asm__ volatile(                                                                              \
        "ldtilecfg %[config]\n"                                                                    \
        ".irp i,0,1,2,3,4,5\n"                                                                     \
        "tilezero %%tmm\\i\n"                                                                      \
        ".endr\n"                                                                                  \
        "tileloadd (%[values],%[stride],1), %%tmm6\n"                                              \
        "tileloadd (%[values],%[stride],1), %%tmm7\n"                                              \
        ".balign 32\n"                                                                             \
        "1:\n"                                                                                     \
        ".irp i,0,1,2,3,4,5\n" instruction                                                         \
        "\n.endr\n"                                                                                \
        "dec %[turns]\n"                                                                           \
        "jnz 1b\n"                                                                                 \
        "tilerelease\n"                                                                            \
        : [turns] "+r"(turns)                                                                      \
        : [config] "m"(config), [values] "r"(values.bytes), "m"(values), [stride] "r"(int64_t{64}) \
        : "cc");                                                                                   \
  }
COMPUTE_TILES(AmxInt8, "amx-tile,amx-int8", "tdpbusd %%tmm6, %%tmm7, %%tmm\\i")
COMPUTE_TILES(AmxBf16, "amx-tile,amx-bf16", "tdpbf16ps %%tmm6, %%tmm7, %%tmm\\i")

#define READ_LOOP(name, features, load, width)                                        \
  __attribute__((target(features))) void name(const std::byte* begin, size_t bytes) { \
    const std::byte* end = begin + bytes;                                             \
    __asm__ volatile(                                                                 \
        ".balign 32\n"                                                                \
        "1:\n" load "add $" #width                                                    \
        " * 8, %[at]\n"                                                               \
        "cmp %[end], %[at]\n"                                                         \
        "jb 1b\n"                                                                     \
        "vzeroupper\n"                                                                \
        : [at] "+r"(begin)                                                            \
        : [end] "r"(end)                                                              \
        : "memory", CLOBBERS);                                                        \
  }
READ_LOOP(Read256, "avx2", ".irp i,0,1,2,3,4,5,6,7\nvmovdqu 32*\\i(%[at]), %%ymm\\i\n.endr\n", 32)
READ_LOOP(Read512, "avx512f", ".irp i,0,1,2,3,4,5,6,7\nvmovdqu64 64*\\i(%[at]), %%zmm\\i\n.endr\n",
          64)

struct Granted {
  bool avx2 = false, fma = false, avx_vnni = false;
  bool avx512 = false, avx512_vnni = false, avx512_bf16 = false;
  bool amx_int8 = false, amx_bf16 = false;
};

constexpr bool HasAll(uint64_t bits, uint64_t wanted) { return (bits & wanted) == wanted; }

// What the processor has and the system saves the registers of; for the tiles the system is asked.
Granted Detect() {
  Granted granted;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0, leaf1_ecx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &leaf1_ecx, &edx)) return granted;
  if (!HasAll(leaf1_ecx, 1u << 27 | 1u << 28)) return granted;  // XGETBV, AVX
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const uint64_t saved = static_cast<uint64_t>(high) << 32 | low;
  if (!HasAll(saved, 0x6) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return granted;
  uint32_t more_eax = 0, unused = 0;
  if (eax >= 1) __get_cpuid_count(7, 1, &more_eax, &unused, &unused, &unused);
  granted.avx2 = HasAll(ebx, 1u << 5);
  granted.fma = granted.avx2 && HasAll(leaf1_ecx, 1u << 12);
  granted.avx_vnni = granted.avx2 && HasAll(more_eax, 1u << 4);
  granted.avx512 = granted.avx2 && HasAll(saved, 0xe6) && HasAll(ebx, 1u << 16);
  granted.avx512_vnni = granted.avx512 && HasAll(ecx, 1u << 11);
  granted.avx512_bf16 = granted.avx512 && HasAll(more_eax, 1u << 5);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  const bool tiles = HasAll(edx, 1u << 24) && HasAll(saved, 3u << 17) &&
                     syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  granted.amx_int8 = tiles && HasAll(edx, 1u << 25);
  granted.amx_bf16 = tiles && HasAll(edx, 1u << 22);
  return granted;
}

ReadLoop BestReadLoop() {
  const Granted granted = Detect();
  return granted.avx512 ? Read512 : granted.avx2 ? Read256 : ReadPlainly;
}

std::vector<ComputePath> GrantedPaths() {
  const Granted granted = Detect();
  constexpr double kTileProduct = 6 * 16 * 16 * 2;  // times the depth
  std::vector<ComputePath> paths;
  const auto add = [&](bool is_granted, ComputePath path) {
    if (is_granted) paths.push_back(path);
  };
  add(granted.amx_int8, {"int8_amx", "int8, AMX", kTileProduct * 64, AmxInt8});
  add(granted.avx512_vnni,
      {"int8_avx512_vnni", "int8, AVX-512 VNNI", kAccumulators * 128, Vnni512});
  add(granted.avx_vnni, {"int8_avx_vnni", "int8, AVX-VNNI", kAccumulators * 64, Vnni256});
  add(granted.avx2,
      {"int8_avx2", "int8 x 4 bits, AVX2 vpmaddubsw", kAccumulators * 8 * 64, Maddubs256});
  add(granted.amx_bf16, {"bf16_amx", "bf16, AMX", kTileProduct * 32, AmxBf16});
  add(granted.avx512_bf16, {"bf16_avx512", "bf16, AVX-512 vdpbf16ps", kAccumulators * 64, DpBf16});
  add(granted.avx512, {"fp32_avx512", "fp32, AVX-512 FMA", kAccumulators * 32, Fma512});
  add(granted.fma, {"fp32_avx2", "fp32, AVX2 FMA", kAccumulators * 16, Fma256});
  return paths;
}

#else

ReadLoop BestReadLoop() { return ReadPlainly; }
std::vector<ComputePath> GrantedPaths() { return {}; }

#endif

using Clock = std::chrono::steady_clock;

// Seconds from the common start until the last of `threads` is through with `work(thread)`.
double SecondsOf(int threads, const std::function<void(int)>& work) {
  std::barrier start(threads);
  std::vector<Clock::time_point> began(threads), ended(threads);
  const auto run = [&](int thread) {
    start.arrive_and_wait();
    began[thread] = Clock::now();
    work(thread);
    ended[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& thread : others) thread.join();
  return std::chrono::duration<double>(*std::max_element(ended.begin(), ended.end()) -
                                       *std::min_element(began.begin(), began.end()))
      .count();
}

// Units a second at best; work(thread, repeats) does `units` / threads of them `repeats` times.
double BestRate(int threads, double units, const std::function<void(int, uint64_t)>& work) {
  uint64_t repeats = 1;
  while (SecondsOf(threads, [&](int i) { work(i, repeats); }) < kRoundSeconds) repeats *= 2;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double seconds = SecondsOf(threads, [&](int i) { work(i, repeats); });
    best = std::max(best, units * static_cast<double>(repeats) / seconds);
  }
  return best;
}

void Print(const char* key, const char* unit, double one, double all, const std::string& what) {
  std::printf("%s\t%s\t%.1f\t%.1f\t%s\n", key, unit, one, all, what.c_str());
  std::fflush(stdout);
}

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
      std::perror("limits: mmap");
      std::exit(1);
    }
    data_ = static_cast<std::byte*>(at);
    madvise(at, bytes, MADV_HUGEPAGE);
    std::memset(at, 1, bytes);  // untouched pages would all be one page of zeros
  }
  ~Memory() { munmap(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  const std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  size_t bytes_;
};

double ReadRate(const Memory& memory, size_t bytes, int threads) {
  const ReadLoop loop = BestReadLoop();
  const size_t slice = bytes / threads / kReadStep * kReadStep;
  return BestRate(threads, static_cast<double>(slice * threads), [&](int i, uint64_t repeats) {
    for (uint64_t k = 0; k < repeats; ++k) loop(memory.data() + i * slice, slice);
  });
}

void MeasureReading(const char* key, size_t bytes, int threads) {
  const Memory memory(bytes);
  const double one = ReadRate(memory, bytes, 1) / 1e9;
  Print(key, "GB/s", one, threads == 1 ? one : ReadRate(memory, bytes, threads) / 1e9,
        "streaming read of " + std::to_string(bytes / 1'000'000) + " MB");
}

void MeasureComputing(const ComputePath& path, int threads) {
  constexpr uint64_t kTurns = 100'000;
  const auto rate = [&](int count) {
    return BestRate(count, path.operations_per_turn * kTurns * count,
                    [&](int, uint64_t repeats) { path.loop(kTurns * repeats); }) /
           1e9;
  };
  const double one = rate(1);
  Print(path.key, "GOP/s", one, threads == 1 ? one : rate(threads), path.what);
}

int Main(int argc, char** argv) {
  constexpr const char* kReadWeights = "read_weights";
  const bool only_weights = argc == 4 && std::strcmp(argv[3], kReadWeights) == 0;
  const bool understood = argc == 3 || only_weights;
  const int threads = understood ? std::atoi(argv[1]) : 0;
  const long long weights_bytes = understood ? std::atoll(argv[2]) : 0;
  if (threads < 1 || threads > 4096 ||
      weights_bytes < static_cast<long long>(kReadStep) * threads) {
    std::fprintf(stderr, "usage: limits THREADS WEIGHTS_BYTES [read_weights]\n");
    return 2;
  }
  MeasureReading(kReadWeights, static_cast<size_t>(weights_bytes), threads);
  if (only_weights) return 0;
  MeasureReading("read_gibibyte", size_t{1} << 30, threads);
  for (const ComputePath& path : GrantedPaths()) MeasureComputing(path, threads);
  return 0;
}

}  // namespace
}  // namespace antiphon::engine

int main(int argc, char** argv) { return antiphon::engine::Main(argc, argv); }
