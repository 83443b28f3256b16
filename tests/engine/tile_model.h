// The kernel table "amx" on a model of the tile unit in plain C++, for machines without one.
#ifndef ANTIPHON_TESTS_ENGINE_TILE_MODEL_H_
#define ANTIPHON_TESTS_ENGINE_TILE_MODEL_H_

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

// For those that grant AVX-512 with BF16, which the rest of the table needs.
const Kernels& ModelledTileKernels();

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_TESTS_ENGINE_TILE_MODEL_H_
