#include <cstring>

#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx512.h"
#include "engine/cpu/exp-inl.h"
#include "engine/cpu/attention_operands-inl.h"
#include "engine/cpu/pair_operands_avx512.h"

namespace antiphon::engine::cpu {
namespace {

using Bf16Operands = PairOperands;

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/attention-inl.h"

namespace antiphon::engine::cpu {

// Attention only: the rest is Avx512Kernels'.
void AttendWithBf16(const Attention& a) { Attend(a); }

}  // namespace antiphon::engine::cpu
