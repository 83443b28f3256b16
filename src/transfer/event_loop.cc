#include "transfer/event_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "common/status_macros.h"

namespace antiphon::transfer {
namespace {

constexpr uint64_t kWakeId = 0;
constexpr int kEventsMax = 64;
constexpr absl::Duration kWaitMax = absl::Minutes(1);

}  // namespace

EventLoop::EventLoop(std::string thread_name, const Clock& clock) : clock_(clock) {
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK(epoll_fd_ >= 0 && wake_fd_ >= 0);
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeId}};
  CHECK(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event) == 0);
  thread_ = Thread(std::move(thread_name), [this] { Run(); });
}

EventLoop::~EventLoop() {
  Stop();
  close(epoll_fd_);
  close(wake_fd_);
}

void EventLoop::Post(Closure closure) {
  absl::MutexLock lock(&mu_);
  if (closed_) return;
  posted_.push_back(std::move(closure));
  if (woken_) return;
  woken_ = true;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof(one));
}

void EventLoop::Stop() {
  Post([this] {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  });
  thread_.Join();
}

EventLoop::WatchId EventLoop::Watch(int fd, uint32_t events, Handler handler) {
  const WatchId id = next_id_++;
  epoll_event event{.events = events, .data = {.u64 = id}};
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) return 0;
  watched_[id] = {fd, events, std::make_shared<Handler>(std::move(handler))};
  return id;
}

void EventLoop::Modify(WatchId id, uint32_t events) {
  auto it = watched_.find(id);
  if (it == watched_.end() || it->second.events == events) return;
  it->second.events = events;
  epoll_event event{.events = events, .data = {.u64 = id}};
  epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, it->second.fd, &event);
}

void EventLoop::Unwatch(WatchId id) {
  auto it = watched_.find(id);
  if (it == watched_.end()) return;
  epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, it->second.fd, nullptr);
  watched_.erase(it);
}

EventLoop::TimerId EventLoop::AddTimer(absl::Time at, Closure closure) {
  const TimerId id = next_id_++;
  timers_.emplace(std::pair(at, id), std::move(closure));
  due_[id] = at;
  return id;
}

void EventLoop::CancelTimer(TimerId id) {
  auto it = due_.find(id);
  if (it == due_.end()) return;
  timers_.erase({it->second, id});
  due_.erase(it);
}

bool EventLoop::RunPosted() {
  std::vector<Closure> batch;
  {
    absl::MutexLock lock(&mu_);
    batch.swap(posted_);
    woken_ = false;
    if (batch.empty() && stopping_) {
      closed_ = true;
      return false;
    }
  }
  for (Closure& closure : batch) closure();
  return true;
}

int EventLoop::RunTimers() {
  while (!timers_.empty()) {
    const absl::Duration left = timers_.begin()->first.first - clock_.Now();
    if (left > absl::ZeroDuration()) {
      // Rounded up; no more than a minute, for delays may be infinite.
      return static_cast<int>(absl::ToInt64Milliseconds(std::min(left, kWaitMax))) + 1;
    }
    Closure closure = std::move(timers_.begin()->second);
    due_.erase(timers_.begin()->first.second);
    timers_.erase(timers_.begin());
    closure();
  }
  return -1;
}

void EventLoop::Run() {
  epoll_event events[kEventsMax];
  while (true) {
    if (!RunPosted()) return;
    int timeout_ms = RunTimers();
    {
      absl::MutexLock lock(&mu_);
      if (!posted_.empty() || stopping_) timeout_ms = 0;
    }
    const int n = epoll_wait(epoll_fd_, events, kEventsMax, timeout_ms);
    for (int i = 0; i < n; ++i) {
      const uint64_t id = events[i].data.u64;
      if (id == kWakeId) {
        uint64_t count = 0;
        [[maybe_unused]] const ssize_t r = read(wake_fd_, &count, sizeof(count));
        continue;
      }
      auto it = watched_.find(id);
      if (it == watched_.end()) continue;
      const std::shared_ptr<Handler> handler = it->second.handler;  // may unwatch itself
      (*handler)(events[i].events);
    }
  }
}

}  // namespace antiphon::transfer
