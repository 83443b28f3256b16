#include "common/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "common/fd_passing.h"

namespace antiphon {
namespace {

TEST(SharedMemoryTest, WhoMapsItSeesWhatTheMakerWrote) {
  auto made = SharedMemory::Create("test", 5000);
  ASSERT_TRUE(made.ok());
  EXPECT_EQ(made->bytes() % 4096, 0u);
  EXPECT_EQ(made->data()[4999], std::byte{0});
  auto mapped = SharedMemory::Map(made->fd(), 5000);
  ASSERT_TRUE(mapped.ok());
  made->data()[17] = std::byte{42};
  EXPECT_EQ(mapped->data()[17], std::byte{42});
  EXPECT_NE(mapped->data(), made->data());
  *made = SharedMemory();  // a mapping outlives its maker's
  EXPECT_EQ(mapped->data()[17], std::byte{42});
  SharedMemory moved = *std::move(mapped);
  EXPECT_EQ(moved.data()[17], std::byte{42});
}

TEST(SharedMemoryTest, ItCannotShrinkAndWhatCouldIsRefused) {
  auto made = SharedMemory::Create("test", 8192);
  ASSERT_TRUE(made.ok());
  EXPECT_NE(ftruncate(made->fd(), 0), 0);
  EXPECT_EQ(SharedMemory::Map(made->fd(), 8193).status().code(),
            absl::StatusCode::kInvalidArgument);
  const int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(unsealed, 8192), 0);
  EXPECT_EQ(SharedMemory::Map(unsealed, 1).status().code(), absl::StatusCode::kInvalidArgument);
  close(unsealed);
  EXPECT_EQ(SharedMemory::Map(-1, 1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(SharedMemoryTest, WhatIsSealedIsReadAndNotWritten) {
  constexpr size_t kBytes = (4 << 20) + 4096;
  const int fd = memfd_create("blob", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(fd, kBytes), 0);
  EXPECT_FALSE(SharedMemory::MapHuge(fd, kBytes).ok());  // it may shrink
  ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  auto filled = SharedMemory::MapHuge(fd, kBytes);
  ASSERT_TRUE(filled.ok()) << filled.status();
  for (size_t i = 0; i < kBytes; i += 4096) EXPECT_EQ(filled->data()[i], std::byte{0});
  for (size_t i = 0; i < kBytes; i += 4096) filled->data()[i] = static_cast<std::byte>(i >> 12);
  EXPECT_FALSE(SharedMemory::MapSealed(fd, kBytes).ok());  // it may change
  EXPECT_NE(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0);
  *filled = SharedMemory();
  filled = SharedMemory();
  ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0);
  const auto read = SharedMemory::MapSealed(fd, kBytes);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(read->data()) % (2 << 20), 0u);
  for (size_t i = 0; i < kBytes; i += 4096) {
    EXPECT_EQ(read->data()[i], static_cast<std::byte>(i >> 12));
  }
  EXPECT_FALSE(SharedMemory::MapSealed(fd, kBytes + 1).ok());
  EXPECT_DEATH(read->data()[5] = std::byte{1}, "");
  close(fd);
}

TEST(SharedMemoryTest, ItsDescriptorTravelsOverASocket) {
  auto made = SharedMemory::Create("test", 4096);
  ASSERT_TRUE(made.ok());
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  EXPECT_EQ(SendWithFd(sockets[0], "x", made->fd()), 1);
  char byte = 0;
  std::vector<int> fds;
  EXPECT_EQ(RecvWithFds(sockets[1], &byte, 1, fds), 1);
  ASSERT_EQ(fds.size(), 1u);
  EXPECT_NE(fcntl(fds[0], F_GETFD) & FD_CLOEXEC, 0);
  auto mapped = SharedMemory::Map(fds[0], 4096);
  ASSERT_TRUE(mapped.ok());
  made->data()[0] = std::byte{7};
  EXPECT_EQ(mapped->data()[0], std::byte{7});
  for (int fd : {sockets[0], sockets[1], fds[0]}) close(fd);
}

}  // namespace
}  // namespace antiphon
