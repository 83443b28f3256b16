// Descriptors that travel over a Unix socket, beside the first byte of a message.
#ifndef ANTIPHON_COMMON_FD_PASSING_H_
#define ANTIPHON_COMMON_FD_PASSING_H_

#include <sys/types.h>

#include <cstddef>
#include <string_view>
#include <vector>

namespace antiphon {

// sendmsg/recvmsg with descriptors, never blocking. Both return what the system call returns, errno
// set; EINTR is retried. `fd` < 0: none. Received descriptors are close-on-exec and the caller's.
ssize_t SendWithFd(int socket, std::string_view bytes, int fd);
ssize_t RecvWithFds(int socket, char* buffer, size_t size, std::vector<int>& fds);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_FD_PASSING_H_
