// Vectors that begin at a cache line: a vector register's load from a plain one, which begins at
// any multiple of 16 bytes, takes two lines as often as not.
#ifndef ANTIPHON_ENGINE_CPU_ALIGNED_H_
#define ANTIPHON_ENGINE_CPU_ALIGNED_H_

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace antiphon::engine::cpu {

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) { return true; }
};

inline bool BeginsAtALine(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ALIGNED_H_
