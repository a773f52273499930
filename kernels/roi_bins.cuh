// The integer geometry of RoI pooling: a box covers whole cells, and its bins are cut by integer arithmetic before they
// are clipped to the map, so that the result does not depend on how a float division rounds.

#pragma once

#include "roi_common.cuh"

namespace roi {

// Scaled and rounded coordinates saturate here. A position relative to the start then fits unsigned, sums fit int.
inline constexpr int kFarthestCell = 1 << 30;

// One axis of a box on the map, not clipped.
struct Extent {
    int start;
    unsigned size;
};

__device__ __forceinline__ float round_half_away(float value) { return roundf(value); }
__device__ __forceinline__ double round_half_away(double value) { return round(value); }

template <typename Coord> __device__ __forceinline__ int to_cell(Coord coordinate, Coord scale) {
    const Coord limit = kFarthestCell;
    // A product that is NaN (0 times an infinite scale) becomes -limit: fmax and fmin return their other argument.
    return static_cast<int>(fmin(fmax(round_half_away(coordinate * scale), -limit), limit));
}

// From the cell of `low` to that of `high`, with it where `inclusive` is 1, without it where that is 0; at least one
// cell.
template <typename Coord>
__device__ __forceinline__ Extent extent_of(Coord low, Coord high, Coord scale, int inclusive) {
    const int first = to_cell(low, scale);
    const int end = to_cell(high, scale) + inclusive;
    return {first, end <= first ? 1u : static_cast<unsigned>(end) - static_cast<unsigned>(first)};
}

__device__ __forceinline__ int clip(int cell, int cells) { return min(max(cell, 0), cells); }

// The cells of bin i of n, floor(i * size / n) up to ceil((i + 1) * size / n), clipped to [0, cells). Split into
// size = quotient * n + remainder, every product fits 32 bits.
__device__ __forceinline__ Range bin_cells(Extent extent, int bin, int bins, int cells) {
    const unsigned n = static_cast<unsigned>(bins);
    const unsigned i = static_cast<unsigned>(bin);
    const unsigned quotient = extent.size / n;
    const unsigned remainder = extent.size - quotient * n;
    const unsigned begin = i * quotient + i * remainder / n;
    const unsigned end = (i + 1) * quotient + ((i + 1) * remainder + n - 1) / n;
    const unsigned start = static_cast<unsigned>(extent.start);
    return {clip(static_cast<int>(start + begin), cells), clip(static_cast<int>(start + end), cells)};
}

// The cells of a box's bins in dynamic shared memory: PH rows, then PW columns. The block's threads share the
// divisions; ends with a barrier.
template <typename Coord>
__device__ __forceinline__ const Range* share_bins(const Coord* box, Coord scale, int inclusive, int height, int width,
                                                   int pooled_height, int pooled_width) {
    Range* const ranges = dynamic_shared<Range>();
    for (int i = threadIdx.x; i < pooled_height + pooled_width; i += blockDim.x) {
        const bool vertical = i < pooled_height;
        const Coord* const low = box + (vertical ? 2 : 1);
        ranges[i] = bin_cells(extent_of(low[0], low[2], scale, inclusive), vertical ? i : i - pooled_height,
                              vertical ? pooled_height : pooled_width, vertical ? height : width);
    }
    __syncthreads();
    return ranges;
}

__device__ __forceinline__ bool overlaps(Extent extent, Range cells) {
    return extent.start < cells.end && static_cast<long long>(extent.start) + extent.size > cells.begin;
}

// floor(numerator / denominator), from an estimate that is off by little: the correction is exact and needs no
// division.
__device__ __forceinline__ unsigned floor_divide(unsigned long long numerator, unsigned denominator, float estimate) {
    unsigned quotient = static_cast<unsigned>(estimate);
    while (static_cast<unsigned long long>(quotient) * denominator > numerator) --quotient;
    while ((quotient + 1ULL) * denominator <= numerator) ++quotient;
    return quotient;
}

// The bins that cover a cell of the map: those to which bin_cells() gives it.
__device__ __forceinline__ Range bins_over(Extent extent, int cell, int bins) {
    // Unsigned: a cell before the start is beyond the size too.
    const unsigned offset = static_cast<unsigned>(cell) - static_cast<unsigned>(extent.start);
    if (offset >= extent.size) return {0, 0};
    const unsigned long long n = static_cast<unsigned>(bins);
    const float bins_per_cell = static_cast<float>(bins) / static_cast<float>(extent.size);
    const unsigned first = floor_divide(offset * n, extent.size, offset * bins_per_cell);
    const unsigned last = floor_divide((offset + 1ULL) * n - 1, extent.size, (offset + 1.0f) * bins_per_cell);
    return {static_cast<int>(first), static_cast<int>(last) + 1};
}

}  // namespace roi
