// The exponential over the sixteen lanes of a simd_*.h file. Part of kernels-inl.h.
#ifndef ANTIPHON_ENGINE_CPU_EXP_INL_H_
#define ANTIPHON_ENGINE_CPU_EXP_INL_H_

namespace antiphon::engine::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowestExp = -87.0f;  // exp below this is taken as 0 where it matters

// exp for |x| within the range of normal floats (clamped); 1 ulp. Polynomial: Cephes expf.
inline F Exp(F x) {
  x = Min(Max(x, Splat(kLowestExp)), Splat(88.0f));
  const F magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = Sub(Fma(x, Splat(1.44269504088896341f), magic), magic);
  F r = Fma(n, Splat(-0.693359375f), x);
  r = Fma(n, Splat(2.12194440e-4f), r);
  F p = Splat(1.9875691500e-4f);
  p = Fma(p, r, Splat(1.3981999507e-3f));
  p = Fma(p, r, Splat(8.3334519073e-3f));
  p = Fma(p, r, Splat(4.1665795894e-2f));
  p = Fma(p, r, Splat(1.6666665459e-1f));
  p = Fma(p, r, Splat(5.0000001201e-1f));
  p = Add(Fma(p, Mul(r, r), r), Splat(1.0f));
  return Mul(p, Exp2(n));
}

// exp for |x| <= 80, within 3e-7 of it; quicker. Polynomial: minimax on [-ln(2)/2, ln(2)/2].
inline F ExpInRange(F x) {
  const F magic = Splat(12582912.0f);
  const F shifted = Fma(x, Splat(1.44269504088896341f), magic);  // an integer in the low bits
  const F r = Fma(Sub(shifted, magic), Splat(-0.693147180559945f), x);
  F p = Splat(0.008290305875f);
  p = Fma(p, r, Splat(0.04189797551f));
  p = Fma(p, r, Splat(0.1666763659f));
  p = Fma(p, r, Splat(0.4999914919f));
  p = Fma(p, r, Splat(0.999999707f));
  p = Fma(p, r, Splat(1.0f));
  return AddToExponent(p, shifted);
}

// For x <= 0. Below -40 it is exp(-40): beside a weight of 1 neither is seen in a float's sum.
inline F ExpOfScore(F x) { return ExpInRange(Max(x, Splat(-40.0f))); }

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_EXP_INL_H_
