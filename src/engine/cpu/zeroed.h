// Large buffers whose pages come when they are first written: a worker that only ever generates
// never touches what a long prompt would need.
#ifndef ANTIPHON_ENGINE_CPU_ZEROED_H_
#define ANTIPHON_ENGINE_CPU_ZEROED_H_

#include <sys/mman.h>

#include <cstddef>
#include <type_traits>

#include "common/status_macros.h"

namespace antiphon::engine::cpu {

// Zero until written.
template <typename T>
class Zeroed {
  static_assert(std::is_trivial_v<T>);

 public:
  Zeroed() = default;
  Zeroed(const Zeroed&) = delete;
  Zeroed& operator=(const Zeroed&) = delete;
  ~Zeroed() {
    if (data_ != nullptr) munmap(data_, size_ * sizeof(T));
  }

  // Once.
  void Allocate(size_t size) {
    CHECK(data_ == nullptr);
    if (size == 0) return;
    // Not of the heap, which would clear memory that it had before.
    void* data =
        mmap(nullptr, size * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(data != MAP_FAILED);
    data_ = static_cast<T*>(data);
    size_ = size;
  }
  // All of it is zero again and takes no memory until written.
  void Release() {
    if (data_ != nullptr) madvise(data_, size_ * sizeof(T), MADV_DONTNEED);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ZEROED_H_
