// How much memory this process may use, as the kernel and the cgroup see it.
#ifndef ANTIPHON_COMMON_MEMORY_H_
#define ANTIPHON_COMMON_MEMORY_H_

#include <cstdint>

namespace antiphon {

// The least of the machine's memory and the limits of our cgroup (v2) and its ancestors. Bytes.
uint64_t MemoryLimitBytes();
// What can still be had without swapping: the least of MemAvailable and what the limits leave.
uint64_t MemoryAvailableBytes();
// From now on buffers from 256 KiB on go back to the kernel when they are freed. (glibc raises that
// limit to the largest buffer yet freed, and what lies between such buffers then keeps them.)
void FreeLargeBuffersAtOnce();
// Gives the heap's free pages back to the kernel; takes milliseconds.
void ReturnFreeMemory();
// kvstore.pool's default: a quarter of the limit, at most 8 GiB, in whole 2 MiB.
uint64_t DefaultPoolBytes();

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_MEMORY_H_
