#include "tests/engine/tile_model.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/tile_products-inl.h"

namespace antiphon::engine::cpu {
namespace {

// What Intel's SDM says of the instructions, and of when they fault.
class ModelTiles {
 public:
  static void Configure(const TileShapes& shapes) {
    Want(shapes.palette == 1 && shapes.start_row == 0, "ldtilecfg: the palette");
    for (int i = 0; i < 16; ++i) {
      const bool used = shapes.rows[i] != 0;
      Want(used == (shapes.row_bytes[i] != 0), "ldtilecfg: half a tile");
      Want(shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64, "ldtilecfg: too large");
      Want(i < 8 || !used, "ldtilecfg: there are eight tiles");
    }
    for (uint8_t byte : shapes.reserved) Want(byte == 0, "ldtilecfg: reserved bytes");
    shapes_ = shapes;
    configured_ = true;
    std::memset(tiles_, 0xA5, sizeof(tiles_));  // the unit zeroes them: nobody may count on it
  }
  static void Release() { configured_ = false; }
  template <int t>
  static void Load(const void* from, size_t stride) {
    Known(t);
    std::memset(tiles_[t], 0, sizeof(tiles_[t]));
    for (size_t r = 0; r < shapes_.rows[t]; ++r) {
      std::memcpy(tiles_[t][r], static_cast<const char*>(from) + r * stride, shapes_.row_bytes[t]);
    }
  }
  template <int t>
  static void Store(void* to, size_t stride) {
    Known(t);
    for (size_t r = 0; r < shapes_.rows[t]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, tiles_[t][r], shapes_.row_bytes[t]);
    }
  }
  template <int t>
  static void Zero() {
    Known(t);
    std::memset(tiles_[t], 0, sizeof(tiles_[t]));
  }
  template <int c, int a, int b>
  static void Dot() {
    Known(c), Known(a), Known(b);
    Want(c != a && a != b && b != c, "tdpbsud: a tile twice");
    Want(shapes_.rows[c] == shapes_.rows[a] && shapes_.row_bytes[c] == shapes_.row_bytes[b] &&
             shapes_.row_bytes[a] == 4 * shapes_.rows[b] && shapes_.row_bytes[b] % 4 == 0,
         "tdpbsud: shapes that do not meet");
    for (int m = 0; m < shapes_.rows[c]; ++m) {
      for (int n = 0; n < shapes_.row_bytes[c] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, tiles_[c][m] + 4 * n, 4);
        for (int k = 0; k < shapes_.row_bytes[a]; ++k) {
          sum += int32_t{static_cast<int8_t>(tiles_[a][m][k])} *
                 int32_t{tiles_[b][k / 4][4 * n + k % 4]};
        }
        std::memcpy(tiles_[c][m] + 4 * n, &sum, 4);
      }
    }
  }

 private:
  static void Want(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s: the tile unit would fault\n", what);
    std::abort();
  }
  static void Known(int t) {
    Want(configured_ && shapes_.rows[t] != 0, "a tile that is not configured");
  }

  static thread_local TileShapes shapes_;
  static thread_local bool configured_;
  static thread_local uint8_t tiles_[8][16][64];
};
thread_local TileShapes ModelTiles::shapes_;
thread_local bool ModelTiles::configured_ = false;
thread_local uint8_t ModelTiles::tiles_[8][16][64];

}  // namespace

const Kernels& ModelledTileKernels() {
  static const Kernels table = TableWithTiles<ModelTiles>("amx, its tiles modelled");
  return table;
}

}  // namespace antiphon::engine::cpu
