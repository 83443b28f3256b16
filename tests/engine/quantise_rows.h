// Activation rows as the tiles that a table's integer products take.
#ifndef ANTIPHON_TESTS_ENGINE_QUANTISE_ROWS_H_
#define ANTIPHON_TESTS_ENGINE_QUANTISE_ROWS_H_

#include <algorithm>
#include <cstddef>
#include <vector>

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

// All but the last are full tiles.
inline std::vector<std::byte> QuantiseAll(const Kernels& kernels, const std::vector<float>& x,
                                          size_t rows, size_t columns) {
  std::vector<std::byte> tiles(QuantTileBytes(rows, columns));
  for (size_t row = 0; row < rows; ++row) {
    const size_t tile = row / kRowTile;
    kernels.quantize_row(&x[row * columns], columns, static_cast<int>(row % kRowTile),
                         static_cast<int>(std::min<size_t>(kRowTile, rows - tile * kRowTile)),
                         tiles.data() + tile * QuantTileBytes(kRowTile, columns));
  }
  return tiles;
}

// Rows at 16 bits, as `kernels` multiplies them.
inline std::vector<std::byte> QuantiseFine(const Kernels& kernels, const std::vector<float>& x,
                                           size_t rows, size_t columns) {
  const size_t places = 2 * rows;
  std::vector<std::byte> tiles(QuantTileBytes(places, columns));
  for (size_t row = 0; row < rows; ++row) {
    const size_t first = 2 * row / kRowTile * kRowTile;
    kernels.quantize_row_fine(&x[row * columns], columns, static_cast<int>(2 * row - first),
                              static_cast<int>(std::min<size_t>(kRowTile, places - first)),
                              tiles.data() + QuantTileBytes(first, columns));
  }
  return tiles;
}

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_TESTS_ENGINE_QUANTISE_ROWS_H_
