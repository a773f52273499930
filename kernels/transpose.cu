// Tensors from one memory format to the other: (batch, rows, columns) -> (batch, columns, rows).
//
//   source  From: float, double, __half, __nv_bfloat16, int or long long
//   target  To: From, or what numbers of From are rounded to

#include "roi_common.cuh"

namespace roi {

// A block moves a square of so many rows and columns; its threads are kSide x kLines.
inline constexpr int kSide = 32;
inline constexpr int kLines = 8;

template <typename To> __device__ __forceinline__ To converted(To value) { return value; }
template <> __device__ __forceinline__ float converted(float value) { return value; }
template <typename To> __device__ __forceinline__ To converted(float value) { return narrow<To>(value); }

// blockIdx.x counts the squares: those along a row of them, then the rows, then the batch. Both tensors are accessed along
// their lines; the square is turned in shared memory, of kSide * (kSide + 1) elements.
template <typename From, typename To>
__global__ void __launch_bounds__(kMaxThreads)
transpose(const From* __restrict__ source, To* __restrict__ target, int rows, int columns) {
    From* const square = dynamic_shared<From>();
    constexpr int kPitch = kSide + 1;  // so that a column is not in one bank
    const unsigned across = (static_cast<unsigned>(columns) + kSide - 1) / kSide;
    const unsigned down = (static_cast<unsigned>(rows) + kSide - 1) / kSide;
    const unsigned line = blockIdx.x / across;
    const int left = static_cast<int>(blockIdx.x - line * across) * kSide;
    const int top = static_cast<int>(line % down) * kSide;
    const long long first = static_cast<long long>(line / down) * rows * columns;
    const int x = threadIdx.x;
#pragma unroll
    for (int y = threadIdx.y; y < kSide; y += kLines) {
        if (top + y < rows && left + x < columns) {
            square[y * kPitch + x] = source[first + static_cast<long long>(top + y) * columns + left + x];
        }
    }
    __syncthreads();
#pragma unroll
    for (int y = threadIdx.y; y < kSide; y += kLines) {
        if (left + y < columns && top + x < rows) {
            target[first + static_cast<long long>(left + y) * rows + top + x] = converted<To>(square[x * kPitch + y]);
        }
    }
}

}  // namespace roi
