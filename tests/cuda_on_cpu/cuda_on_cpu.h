// CUDA C++ on the CPU, as far as this repository's kernels use it: g++ compiles the unchanged .cu files with this
// header in front (-include), and sanitizers see what the kernels do.
//
// A CUDA thread is an OS thread, __syncthreads is a barrier, and atomics are std::atomic_ref. Blocks run one after
// another, so that one array serves as shared memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

// CUDA has the overloads for float in the global namespace.
using std::abs;
using std::ceil;
using std::fabs;
using std::floor;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::log2;
using std::max;
using std::min;
using std::sqrt;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx;
inline thread_local dim3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace cuda_on_cpu {

constexpr std::size_t kSharedBytes = 48 * 1024;
inline std::barrier<>* block_barrier = nullptr;

}  // namespace cuda_on_cpu

// Where dynamic_shared() of roi_common.cuh finds its bytes.
namespace roi {
alignas(16) inline unsigned char shared_bytes[cuda_on_cpu::kSharedBytes];
}  // namespace roi

#ifdef CUDA_ON_CPU_WITHOUT_BARRIER  // a fault that a test plants
inline void __syncthreads() {}
// What is read too early is an empty range: followed as an index, it would end the program before the race is reported.
constexpr int kUnwritten = 0;
#else
inline void __syncthreads() { cuda_on_cpu::block_barrier->arrive_and_wait(); }
// Not a value of another block: a kernel that reads shared memory it did not write must not work by luck.
constexpr int kUnwritten = 0xa5;
#endif

template <typename Number> Number atomicAdd(Number* address, Number value) {
#ifdef CUDA_ON_CPU_WITHOUT_ATOMICS  // a fault that a test plants
    const Number before = *address;
    *address = before + value;
    return before;
#else
    return std::atomic_ref<Number>(*address).fetch_add(value, std::memory_order_relaxed);
#endif
}

inline unsigned atomicOr(unsigned* address, unsigned bits) {
    return std::atomic_ref<unsigned>(*address).fetch_or(bits, std::memory_order_relaxed);
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

namespace cuda_on_cpu {

// Runs body() once per CUDA thread of the grid.
template <typename Body> void launch(dim3 grid, dim3 block, std::size_t shared_bytes, Body body) {
    const unsigned threads = block.x * block.y * block.z;
    std::barrier<> barrier(threads);
    std::barrier<> between_blocks(threads);
    block_barrier = &barrier;
    gridDim = grid;
    blockDim = block;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(roi::shared_bytes, kSharedBytes);
    ASAN_UNPOISON_MEMORY_REGION(roi::shared_bytes, shared_bytes);
#endif
    auto run = [&](unsigned thread) {
        threadIdx = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, 0};
                if (thread == 0) std::memset(roi::shared_bytes, kUnwritten, shared_bytes);
                between_blocks.arrive_and_wait();
                body();
                between_blocks.arrive_and_wait();
            }
        }
    };
    std::vector<std::thread> pool;
    for (unsigned thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
    for (std::thread& thread : pool) thread.join();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(roi::shared_bytes, kSharedBytes);
#endif
}

}  // namespace cuda_on_cpu
