#include <cstring>

#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/tile_products-inl.h"

namespace antiphon::engine::cpu {
namespace {

// The processor's. Every instruction that touches memory says so: g++ 12's own intrinsics do not
// say what they read, and it removes the stores before them.
struct AmxTiles {
  static void Configure(const TileShapes& shapes) {
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  static void Release() { __asm__ volatile("tilerelease"); }
  template <int t>
  static void Load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void Store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void Zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int c, int a, int b>
  static void Dot() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

}  // namespace

const Kernels& AmxKernels() {
  static const Kernels table = TableWithTiles<AmxTiles>("amx");
  return table;
}

bool TileProductsAreExact() {
  alignas(64) int8_t activations[kRowTile][kQuantBlock];
  alignas(64) uint8_t weights[kQuantBlock / 4][kGroupRows][4];
  alignas(64) int32_t got[kRowTile][kGroupRows];
  uint32_t state = 1;
  const auto draw = [&state] {
    state = state * 1664525 + 1013904223;
    return static_cast<uint8_t>(state >> 24);
  };
  for (auto& row : activations) {
    for (int8_t& value : row) value = static_cast<int8_t>(draw());
  }
  for (auto& step : weights) {
    for (auto& lane : step) {
      for (uint8_t& value : lane) value = draw();
    }
  }
  const TileShapes shapes = ShapesOf<PackedType::kQ8_0>();
  AmxTiles::Configure(shapes);
  AmxTiles::Load<4>(activations, kQuantBlock);
  AmxTiles::Load<6>(weights, 64);
  AmxTiles::Zero<0>();
  AmxTiles::Dot<0, 4, 6>();
  AmxTiles::Store<0>(got, 64);
  AmxTiles::Release();
  for (int r = 0; r < kRowTile; ++r) {
    for (int lane = 0; lane < kGroupRows; ++lane) {
      int32_t want = 0;
      for (int c = 0; c < kQuantBlock; ++c) {
        want += int32_t{activations[r][c]} * int32_t{weights[c / 4][lane][c % 4]};
      }
      if (got[r][lane] != want) return false;
    }
  }
  return true;
}

}  // namespace antiphon::engine::cpu
