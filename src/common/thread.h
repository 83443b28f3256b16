// A named thread that is joined when it goes out of scope. The only maker of threads outside
// third-party code.
#ifndef ANTIPHON_COMMON_THREAD_H_
#define ANTIPHON_COMMON_THREAD_H_

#include <string>
#include <thread>

#include "absl/functional/any_invocable.h"

namespace antiphon {

class Thread {
 public:
  Thread() = default;
  // `name` is cut to 15 bytes, which is what the kernel keeps.
  Thread(std::string name, absl::AnyInvocable<void()> body);
  Thread(Thread&&) = default;
  Thread& operator=(Thread&& other);
  ~Thread() { Join(); }

  void Join();
  bool joinable() const { return thread_.joinable(); }

 private:
  std::thread thread_;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_THREAD_H_
