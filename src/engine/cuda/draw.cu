#include <cfloat>

#include "engine/cuda/arithmetic.h"
#include "engine/cuda/block_best.cuh"
#include "engine/cuda/draw.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kChunk = 1024;  // logits whose weights are summed in floats
constexpr uint32_t kLanes = 16;    // ... by so many lanes
constexpr uint32_t kChunks = kDrawVocabMax / kChunk;
constexpr uint32_t kBins = 2048;
constexpr float kBinsOfOne = 64.0f;  // a bin is 1/64 of a nat
constexpr uint64_t kNoKey = ~uint64_t{0};
static_assert(kDrawCandidates == 2 * kThreads && kBins == 2 * kThreads && kChunks == 2 * kThreads);

struct Shared {
  uint64_t keys[kDrawCandidates];
  union {
    double sums[kDrawCandidates];
    uint32_t bins[kBins];
  };
  double partial[kWarp];
  uint32_t count;
  uint32_t found;
};

// (logit - peak) / temperature of one row. NaN is never drawn.
struct Scaled {
  const float* logits;
  uint32_t size;
  float peak;
  float inverse;
  __device__ __forceinline__ float operator()(uint32_t i) const {
    if (i >= size) return -INFINITY;
    const float v = (logits[i] - peak) * inverse;
    return v <= 0.0f ? v : -INFINITY;
  }
};

__device__ __forceinline__ uint32_t BinOf(float scaled) {
  const float bin = -scaled * kBinsOfOne;  // exact
  return bin < static_cast<float>(kBins - 1) ? static_cast<uint32_t>(bin) : kBins - 1;
}

// Candidates in the order of keys: the best first, ties by id.
__device__ __forceinline__ uint64_t KeyOf(float scaled, uint32_t id) {
  return (uint64_t{__float_as_uint(fabsf(scaled))} << 32) | id;
}
__device__ __forceinline__ uint64_t Swapped(uint64_t key) { return (key << 32) | (key >> 32); }
__device__ __forceinline__ double WeightOf(uint32_t magnitude) {
  return exp(-static_cast<double>(__uint_as_float(magnitude)));
}

// The sums up to and with each thread's value.
template <typename T>
__device__ __forceinline__ T ScanOfBlock(T value, T* partial) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += before;
  }
  if (lane == kWarp - 1) partial[warp] = value;
  __syncthreads();
  if (warp == 0) {
    T sum = partial[lane];
    for (uint32_t step = 1; step < kWarp; step *= 2) {
      const T before = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += before;
    }
    partial[lane] = sum;
  }
  __syncthreads();
  if (warp > 0) value += partial[warp - 1];
  __syncthreads();  // `partial` may be used again
  return value;
}

// s.sums[c] = the mass of logits [c * kChunk, (c + 1) * kChunk).
__device__ void SumChunks(const Scaled& scaled, Shared& s) {
  const uint32_t chunks = (scaled.size + kChunk - 1) / kChunk;
  const uint32_t lane = threadIdx.x % kLanes, half = threadIdx.x % kWarp / kLanes;
  for (uint32_t base = threadIdx.x / kWarp * 2; base < chunks; base += kThreads / kLanes) {
    const uint32_t begin = (base + half) * kChunk + lane;
    float part = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < kChunk; i += kLanes) part += SamplerExp(scaled(begin + i));
    for (uint32_t step = kLanes / 2; step > 0; step /= 2) {
      part += __shfl_down_sync(0xffffffffu, part, step, kLanes);
    }
    if (lane == 0 && base + half < chunks) s.sums[base + half] = static_cast<double>(part);
  }
  __syncthreads();
}

__device__ double SumInOrder(const double* values, uint32_t count) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

__device__ void Sort(uint64_t* keys, uint32_t size) {
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step > 0; step /= 2) {
      for (uint32_t t = threadIdx.x; t < size / 2; t += kThreads) {
        const uint32_t low = 2 * t - t % step, high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

__device__ __forceinline__ uint32_t PowerOfTwoFrom(uint32_t n) {
  uint32_t size = 2;
  while (size < n) size *= 2;
  return size;
}

// s.sums[i] = the weights of keys [0, i], whose magnitudes lie `shift` bits up.
__device__ void SumWeights(Shared& s, uint32_t count, uint32_t shift) {
  const uint32_t i = 2 * threadIdx.x;
  double w[2];
  for (uint32_t k = 0; k < 2; ++k) {
    w[k] = i + k < count ? WeightOf(static_cast<uint32_t>(s.keys[i + k] >> shift)) : 0.0;
  }
  const double sum = ScanOfBlock(w[0] + w[1], s.partial);
  s.sums[i] = sum - w[1];
  s.sums[i + 1] = sum;
  __syncthreads();
}

// The lowest i < count for which `good` holds, else count.
template <typename Good>
__device__ uint32_t First(Shared& s, uint32_t count, const Good& good) {
  if (threadIdx.x == 0) s.found = count;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    if (good(i)) {
      atomicMin(&s.found, i);
      break;
    }
  }
  __syncthreads();
  const uint32_t found = s.found;
  __syncthreads();
  return found;
}

// The first token, in the order of ids, at which the weights pass u of their sum. s.sums holds the
// masses of chunks.
template <typename Weight>
__device__ uint32_t DrawInOrder(uint32_t size, double u, const Weight& weight_of, Shared& s) {
  const uint32_t chunks = (size + kChunk - 1) / kChunk;
  const double target = u * SumInOrder(s.sums, chunks);
  double passed = 0;
  for (uint32_t c = 0; c < chunks; ++c) {
    const double mass = s.sums[c];
    if (mass == 0) continue;
    if (passed + mass <= target && c + 1 < chunks) {
      passed += mass;
      continue;
    }
    const double weight = weight_of(c * kChunk + threadIdx.x);
    const double sum = passed + ScanOfBlock(weight, s.partial);
    if (threadIdx.x == 0) s.found = kUndecided;
    __syncthreads();
    if (weight > 0 && sum > target) atomicMin(&s.found, c * kChunk + threadIdx.x);
    if (threadIdx.x == kThreads - 1) s.partial[0] = sum;
    __syncthreads();
    if (s.found != kUndecided) return s.found;
    passed = s.partial[0];
    __syncthreads();
  }
  return kUndecided;  // the sums' rounding left nothing: the host knows what to do
}

// Without top-k, top-p and min-p.
__device__ uint32_t DrawFromAll(const Scaled& scaled, double u, Shared& s) {
  SumChunks(scaled, s);
  return DrawInOrder(
      scaled.size, u, [&](uint32_t i) { return exp(static_cast<double>(scaled(i))); }, s);
}

// Of the tokens whose key is at most `last` and whose logarithm of the weight is at least `least`.
__device__ uint32_t DrawUpTo(const Scaled& scaled, uint64_t last, float least, double u,
                             Shared& s) {
  const auto weight_of = [&](uint32_t i) {
    const float v = scaled(i);
    return v >= least && KeyOf(v, i) <= last ? exp(static_cast<double>(v)) : 0.0;
  };
  const uint32_t chunks = (scaled.size + kChunk - 1) / kChunk;
  const uint32_t lane = threadIdx.x % kWarp;
  __syncthreads();
  for (uint32_t c = threadIdx.x / kWarp; c < chunks; c += kThreads / kWarp) {
    double sum = 0;
    for (uint32_t i = lane; i < kChunk; i += kWarp) sum += weight_of(c * kChunk + i);
    for (uint32_t step = kWarp / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane == 0) s.sums[c] = sum;
  }
  __syncthreads();
  return DrawInOrder(scaled.size, u, weight_of, s);
}

// s.bins[b] = how many tokens bins [0, b] hold.
__device__ void CountBins(const Scaled& scaled, Shared& s) {
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < scaled.size; i += kThreads) {
    const uint32_t bin = BinOf(scaled(i));
    if (bin < kBins - 1) atomicAdd(&s.bins[bin], 1u);  // most of a vocabulary is in the last
  }
  __syncthreads();
  const uint32_t i = 2 * threadIdx.x;
  const uint32_t a = s.bins[i], b = s.bins[i + 1];
  const uint32_t sum = ScanOfBlock(a + b, reinterpret_cast<uint32_t*>(s.partial));
  s.bins[i] = sum - b;
  s.bins[i + 1] = i + 1 == kBins - 1 ? scaled.size : sum;
  __syncthreads();
}

// The tokens of bins [first, end), which fit, become the sorted keys; returns how many they are.
__device__ uint32_t GatherBins(const Scaled& scaled, uint32_t first, uint32_t end, Shared& s) {
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < scaled.size; i += kThreads) {
    const float v = scaled(i);
    const uint32_t bin = BinOf(v);
    if (bin >= first && bin < end) s.keys[atomicAdd(&s.count, 1u)] = KeyOf(v, i);
  }
  __syncthreads();
  const uint32_t count = s.count, size = PowerOfTwoFrom(count);
  for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) s.keys[i] = kNoKey;
  __syncthreads();
  Sort(s.keys, size);
  return count;
}

// The key of the least likely token that top-k and top-p keep, when that lies beyond the first
// kDrawCandidates; kNoKey: undecided. `mass`: of all tokens, for top-p alone.
__device__ uint64_t LastOfMany(const Scaled& scaled, const Draw& d, bool top_k, double mass,
                               Shared& s) {
  const bool top_p = d.top_p < 1.0f;
  uint64_t last = kNoKey;
  uint32_t bins = kBins - 1;  // the last bin is a tail without order
  if (top_k) {
    CountBins(scaled, s);
    const uint32_t bin = First(s, bins, [&](uint32_t i) { return s.bins[i] >= d.top_k; });
    if (bin == bins) return kNoKey;
    const uint32_t before = bin == 0 ? 0 : s.bins[bin - 1];
    if (s.bins[bin] - before > kDrawCandidates) return kNoKey;
    (void)GatherBins(scaled, bin, bin + 1, s);
    last = s.keys[d.top_k - before - 1];
    bins = bin + 1;
    __syncthreads();
    if (!top_p) return last;
  }
  // Masses of bins in whole numbers, so that the order of the sum does not matter.
  uint64_t* masses = s.keys;
  uint32_t bits = 62;
  for (uint32_t size = scaled.size; size > 1; size /= 2) --bits;
  const double unit = static_cast<double>(uint64_t{1} << bits);
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) masses[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < scaled.size; i += kThreads) {
    const float v = scaled(i);
    const uint32_t bin = BinOf(v);
    if (bin >= bins || KeyOf(v, i) > last) continue;
    const auto weight = static_cast<uint64_t>(exp(static_cast<double>(v)) * unit);
    atomicAdd(reinterpret_cast<unsigned long long*>(&masses[bin]), weight);
  }
  __syncthreads();
  {
    const uint32_t i = 2 * threadIdx.x;
    const uint64_t b = masses[i + 1];
    const uint64_t sum = ScanOfBlock(masses[i] + b, reinterpret_cast<uint64_t*>(s.partial));
    s.sums[i] = static_cast<double>(sum - b) / unit;
    s.sums[i + 1] = static_cast<double>(sum) / unit;
    __syncthreads();
  }
  if (top_k) mass = s.sums[bins - 1];
  const double least = static_cast<double>(d.top_p) * mass;
  const uint32_t bin = First(s, bins, [&](uint32_t i) { return s.sums[i] >= least; });
  if (bin == bins) return top_k ? last : kNoKey;
  const double before = bin == 0 ? 0 : s.sums[bin - 1];
  CountBins(scaled, s);
  if (s.bins[bin] - (bin == 0 ? 0 : s.bins[bin - 1]) > kDrawCandidates) return kNoKey;
  const uint32_t count = GatherBins(scaled, bin, bin + 1, s);
  SumWeights(s, count, 32);
  const uint32_t at = First(s, count, [&](uint32_t i) { return before + s.sums[i] >= least; });
  const uint64_t key = s.keys[min(at, count - 1)];
  __syncthreads();
  return min(key, last);
}

__device__ uint32_t DrawFromBest(const Scaled& scaled, const Draw& d, Shared& s) {
  const bool top_k = d.top_k > 0 && d.top_k < scaled.size;
  const bool top_p = d.top_p < 1.0f;
  if (!top_k && !top_p) return DrawUpTo(scaled, kNoKey, d.least, d.u, s);
  double mass = 0;
  if (!top_k) {
    SumChunks(scaled, s);
    mass = SumInOrder(s.sums, (scaled.size + kChunk - 1) / kChunk);
  }
  // Candidates: all tokens of the best bins, as many as there is room for. Most often they do.
  CountBins(scaled, s);
  const uint32_t bins = First(s, kBins, [&](uint32_t i) { return s.bins[i] > kDrawCandidates; });
  const uint32_t count = GatherBins(scaled, 0, bins, s);
  const bool all = count == scaled.size;
  bool enough = !top_k || d.top_k <= count;
  uint32_t limit = top_k ? min(d.top_k, count) : count;
  if (top_p && enough) {
    SumWeights(s, count, 32);
    const double least = static_cast<double>(d.top_p) * (top_k ? s.sums[limit - 1] : mass);
    const uint32_t before = First(s, limit, [&](uint32_t i) { return s.sums[i] >= least; });
    enough = before < limit || top_k || all;
    limit = min(limit, before + 1);
  }
  if (!enough) {
    const uint64_t last = LastOfMany(scaled, d, top_k, mass, s);
    return last == kNoKey ? kUndecided : DrawUpTo(scaled, last, d.least, d.u, s);
  }
  limit = First(s, limit, [&](uint32_t i) {
    return -__uint_as_float(static_cast<uint32_t>(s.keys[i] >> 32)) < d.least;
  });
  // In the order of ids, as the sampler draws.
  const uint32_t size = PowerOfTwoFrom(limit);
  for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
    s.keys[i] = i < limit ? Swapped(s.keys[i]) : kNoKey;
  }
  __syncthreads();
  Sort(s.keys, size);
  SumWeights(s, limit, 0);
  const double target = d.u * s.sums[limit - 1];
  const uint32_t at = First(s, limit, [&](uint32_t i) {
    return s.sums[i] > target && (i == 0 || s.sums[i] > s.sums[i - 1]);
  });
  return at == limit ? kUndecided : static_cast<uint32_t>(s.keys[at] >> 32);
}

__global__ void __launch_bounds__(kThreads, 1)
    DrawKernel(const DrawRow* __restrict__ rows, const LogitEdit* __restrict__ all_edits,
               float* __restrict__ all_originals, float* __restrict__ logits, uint32_t size,
               size_t stride) {
  __shared__ Shared s;
  const DrawRow& row = rows[blockIdx.x];
  const Draw& d = row.draw;
  const LogitEdit* edits = all_edits + row.first_edit;
  float* originals = all_originals + row.first_edit;
  float* x = logits + row.row * stride;
  for (uint32_t i = threadIdx.x; i < d.edit_count; i += kThreads) {
    const float logit = x[edits[i].id];
    originals[i] = logit;
    x[edits[i].id] = EditedLogit(logit, edits[i], d.repetition_penalty);
  }
  __syncthreads();
  const Best best = BestOfBlock<kThreads>(x, size);
  uint32_t token = best.id == 0xffffffffu ? 0 : best.id;
  if (d.inverse_temperature > 0 && best.value > -INFINITY) {
    const Scaled scaled = {x, size, best.value, d.inverse_temperature};
    const bool filtered = (d.top_k > 0 && d.top_k < size) || d.top_p < 1.0f || d.least > -INFINITY;
    token = filtered ? DrawFromBest(scaled, d, s) : DrawFromAll(scaled, d.u, s);
  }
  if (threadIdx.x == 0) *row.token = token;
  if (token != kUndecided) return;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < d.edit_count; i += kThreads) x[edits[i].id] = originals[i];
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < size; i += kThreads) row.undecided[i] = x[i];
}

}  // namespace

cudaError_t DrawTokens(const DrawRow* rows, uint32_t count, const LogitEdit* edits,
                       float* originals, float* logits, uint32_t size, size_t stride,
                       cudaStream_t stream) {
  DrawKernel<<<count, kThreads, 0, stream>>>(rows, edits, originals, logits, size, stride);
  return cudaGetLastError();
}

}  // namespace antiphon::engine::cuda
