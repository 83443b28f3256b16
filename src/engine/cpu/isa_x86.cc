#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "engine/cpu/detect.h"
#include "engine/cpu/kernels_x86.h"

namespace antiphon::engine::cpu {
namespace {

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid Query(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Register state that the system saves: what it does not save, it does not grant.
uint64_t SavedState() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

constexpr bool HasAll(uint64_t bits, uint64_t wanted) { return (bits & wanted) == wanted; }

// Tiles have 8 KiB of registers, which the system keeps for those processes that ask for them, once
// for all their threads.
bool AskForTiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

std::vector<const Kernels*> DetectKernels() {
  std::vector<const Kernels*> granted;
  const Cpuid basic = Query(1, 0);
  const Cpuid extended = Query(7, 0);
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5;
  constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr uint32_t kVnni = 1u << 11;
  const uint64_t saved = HasAll(basic.ecx, kOsxsave) ? SavedState() : 0;
  const bool avx2 =
      HasAll(saved, 0x6) && HasAll(basic.ecx, kFma | kAvx | kF16c) && HasAll(extended.ebx, kAvx2);
  const bool avx512 =
      avx2 && HasAll(saved, 0xe6) && HasAll(extended.ebx, kAvx512) && HasAll(extended.ecx, kVnni);
  constexpr uint32_t kBf16 = 1u << 5;
  const bool bf16 = avx512 && HasAll(Query(7, 1).eax, kBf16) && Bf16ProductsAreTwoFmas();
  constexpr uint32_t kTile = 1u << 24, kTileInt8 = 1u << 25;
  constexpr uint64_t kTileState = 3u << 17;
  const bool amx = bf16 && HasAll(saved, kTileState) && HasAll(extended.edx, kTile | kTileInt8) &&
                   AskForTiles() && TileProductsAreExact();
  if (amx) granted.push_back(&AmxKernels());
  if (bf16) granted.push_back(&Avx512Bf16Kernels());
  if (avx512) granted.push_back(&Avx512Kernels());
  if (avx2) granted.push_back(&Avx2Kernels());
  granted.push_back(&ScalarKernels());
  return granted;
}

}  // namespace antiphon::engine::cpu
