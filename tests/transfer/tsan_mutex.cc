// Tells ThreadSanitizer of absl::Mutex and absl::CondVar: the distribution's Abseil is compiled
// without it, so that every critical section looks like a race. These definitions come before the
// library's, call them, and say what happens before what. Reads are ignored inside the library: an
// unlocking thread evaluates the conditions of those who wait, still under the lock.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/mutex.h"

extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);

namespace {

// The library's function behind the exported name.
template <typename Function>
Function* Library(const char* name) {
  void* const found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) __builtin_trap();
  return reinterpret_cast<Function*>(found);
}

class IgnoreReads {
 public:
  IgnoreReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

}  // namespace

#define ANTIPHON_MUTEX(name) "_ZN4absl7debian35Mutex" name
#define ANTIPHON_CONDVAR(name) "_ZN4absl7debian37CondVar" name

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static auto* const library = Library<void(Mutex*)>(ANTIPHON_MUTEX("4LockEv"));
  {
    const IgnoreReads ignore;
    library(this);
  }
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static auto* const library = Library<void(Mutex*)>(ANTIPHON_MUTEX("6UnlockEv"));
  __tsan_release(this);
  const IgnoreReads ignore;
  library(this);
}

void Mutex::ReaderLock() {
  static auto* const library = Library<void(Mutex*)>(ANTIPHON_MUTEX("10ReaderLockEv"));
  {
    const IgnoreReads ignore;
    library(this);
  }
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static auto* const library = Library<void(Mutex*)>(ANTIPHON_MUTEX("12ReaderUnlockEv"));
  __tsan_release(this);
  const IgnoreReads ignore;
  library(this);
}

void Mutex::Await(const Condition& condition) {
  static auto* const library =
      Library<void(Mutex*, const Condition&)>(ANTIPHON_MUTEX("5AwaitERKNS0_9ConditionE"));
  __tsan_release(this);
  {
    const IgnoreReads ignore;
    library(this, condition);
  }
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const library = Library<bool(Mutex*, const Condition&, Duration)>(
      ANTIPHON_MUTEX("16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  __tsan_release(this);
  bool met = false;
  {
    const IgnoreReads ignore;
    met = library(this, condition, timeout);
  }
  __tsan_acquire(this);
  return met;
}

void CondVar::Wait(Mutex* mu) {
  static auto* const library =
      Library<void(CondVar*, Mutex*)>(ANTIPHON_CONDVAR("4WaitEPNS0_5MutexE"));
  __tsan_release(mu);
  {
    const IgnoreReads ignore;
    library(this, mu);
  }
  __tsan_acquire(mu);
}

bool CondVar::WaitWithTimeout(Mutex* mu, Duration timeout) {
  static auto* const library = Library<bool(CondVar*, Mutex*, Duration)>(
      ANTIPHON_CONDVAR("15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE"));
  __tsan_release(mu);
  bool timed_out = false;
  {
    const IgnoreReads ignore;
    timed_out = library(this, mu, timeout);
  }
  __tsan_acquire(mu);
  return timed_out;
}

ABSL_NAMESPACE_END
}  // namespace absl
