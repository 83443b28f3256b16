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

// The calling thread's niceness, 0 to 19; a higher one than before cannot be taken back without
// privileges.
void SetThreadNice(int nice);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_THREAD_H_
