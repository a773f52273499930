// The geometry of RoIAlign: bins of regularly spaced samples, each interpolated between the four nearest cells.
//
// Which samples count and what a sample weighs are products of an answer for its row and one for its column. So a bin
// is a weighted sum over a few rows of the map times a few columns: its taps. Samples that share a cell share a tap.

#pragma once

#include "roi_common.cuh"

namespace roi {

// One axis of a box on the map.
template <typename Coord> struct Sampling {
    Coord start;
    Coord bin;   // length of a bin, in cells
    Coord grid;  // samples in a bin, a whole number; not positive: none
};

// Scaled coordinates saturate here, so that everything is finite.
inline constexpr int kFarthestSample = 1 << 30;

template <typename Coord>
__device__ __forceinline__ Sampling<Coord> sampling_of(Coord low, Coord high, Coord scale, int bins, int sampling_ratio,
                                                       int aligned) {
    const Coord limit = kFarthestSample;
    const Coord offset = aligned ? static_cast<Coord>(0.5) : static_cast<Coord>(0);
    const Coord start = fmin(fmax(multiply(low, scale), -limit), limit) - offset;
    const Coord end = fmin(fmax(multiply(high, scale), -limit), limit) - offset;
    const Coord size = aligned ? end - start : fmax(end - start, static_cast<Coord>(1));
    const Coord bin = size / static_cast<Coord>(bins);
    return {start, bin, sampling_ratio > 0 ? static_cast<Coord>(sampling_ratio) : ceil(bin)};
}

// In cells; the centre of the first cell is 0.
template <typename Coord> __device__ __forceinline__ Coord position(Sampling<Coord> axis, int bin, int sample) {
    const Coord first = axis.start + multiply(static_cast<Coord>(bin), axis.bin);
    return first + multiply(static_cast<Coord>(sample) + static_cast<Coord>(0.5), axis.bin) / axis.grid;
}

// A sample between two cells, or on the last one.
template <typename Coord> struct Between {
    int low;
    int high;
    Coord to_high;  // weight of `high`; `low` has the rest
};

// False where the position is off the map, whose edges are a cell beyond the centres of the outermost cells.
template <typename Coord>
__device__ __forceinline__ bool between(Coord position, int cells, Between<Coord>& sample) {
    if (!(position >= -1 && position <= static_cast<Coord>(cells))) return false;
    position = fmax(position, static_cast<Coord>(0));
    const int low = min(static_cast<int>(position), cells - 1);
    const bool last = low == cells - 1;
    sample = {low, last ? low : low + 1, last ? static_cast<Coord>(0) : position - static_cast<Coord>(low)};
    return true;
}

// Relative error of a position, with room to spare.
template <typename Coord> __device__ __forceinline__ Coord position_error();
template <> __device__ __forceinline__ float position_error() { return 1e-6f; }
template <> __device__ __forceinline__ double position_error() { return 2e-15; }

// The samples of a bin that may lie in [low, high]; a few others may be among them.
template <typename Coord>
__device__ __forceinline__ Range samples_within(Sampling<Coord> axis, int bin, Coord low, Coord high) {
    if (!(axis.grid > 0)) return {0, 0};
    const Coord count = fmin(axis.grid, static_cast<Coord>(2147483520));  // the greatest float that is an int
    const Coord step = axis.bin / axis.grid;
    // An adaptive grid, the only one that grows with the box, has steps of half a cell to a cell where it has several.
    if (count <= 8 || fabs(step) < static_cast<Coord>(0.25)) return {0, static_cast<int>(count)};
    const Coord first = axis.start + multiply(static_cast<Coord>(bin), axis.bin);
    const Coord a = (low - first) / step;
    const Coord b = (high - first) / step;
    const Coord slack = 2 + position_error<Coord>() * (fabs(a) + fabs(b));
    const Coord begin = fmin(fmax(fmin(a, b) - slack, static_cast<Coord>(0)), count);
    const Coord end = fmin(fmax(fmax(a, b) + slack, static_cast<Coord>(0)), count);
    return {static_cast<int>(begin), static_cast<int>(end)};
}

// --- Forward: the taps of every bin, in shared memory

template <typename Number> struct Tap {
    int cell;
    Number weight;
};

template <typename Number> struct Taps {
    const Range* bins;  // which taps: PH rows, then PW columns
    const Tap<Number>* taps;
    Number samples;  // in a bin, on the map or off it; at least 1
};

// What of it the block writes first.
template <typename Number> struct TapsHeader {
    Number samples;
    int used;
};

// Adds to the taps [begin, end) of a bin, which are at most `limit`. Samples are walked in order, so that only the last
// two taps can be of the same cell.
template <typename Number>
__device__ __forceinline__ int add_tap(Tap<Number>* taps, Range used, int limit, int cell, Number weight) {
    if (weight == 0) return used.end;
    for (int i = used.end - 1; i >= max(used.begin, used.end - 2); --i) {
        if (taps[i].cell == cell) {
            taps[i].weight += weight;
            return used.end;
        }
    }
    if (used.end == limit) return used.end;
    taps[used.end] = {cell, weight};
    return used.end + 1;
}

// At most as many taps as a bin can have: two for each sample, and one for each cell.
template <typename Coord>
__device__ __forceinline__ int most_taps(Sampling<Coord> axis, int bin, Range samples, int cells) {
    const Coord last = static_cast<Coord>(cells - 1);
    const int a = static_cast<int>(fmin(fmax(position(axis, bin, samples.begin), static_cast<Coord>(0)), last));
    const int b = static_cast<int>(fmin(fmax(position(axis, bin, samples.end - 1), static_cast<Coord>(0)), last));
    const unsigned twice = 2u * static_cast<unsigned>(samples.end - samples.begin);
    return static_cast<int>(min(twice, static_cast<unsigned>(abs(a - b)) + 2u));
}

// Fills the dynamic shared memory: a TapsHeader, PH + PW ranges, then `capacity` taps. Ends with a barrier.
//
// Neighbouring bins share two cells, so that min(2 * samples, cells + 2) taps for each bin, and cells + 2 * bins for
// all of an axis, are enough. Only where Coord cannot tell neighbouring samples apart, millions of cells off the map,
// may bins overlap by more; what does not fit is then dropped.
template <typename Number, typename Coord>
__device__ __forceinline__ Taps<Number> share_taps(const Coord* box, Coord scale, int height, int width,
                                                   int pooled_height, int pooled_width, int sampling_ratio, int aligned,
                                                   int capacity) {
    auto* const header = dynamic_shared<TapsHeader<Number>>();
    Range* const ranges = reinterpret_cast<Range*>(header + 1);
    auto* const taps = reinterpret_cast<Tap<Number>*>(ranges + pooled_height + pooled_width);
    const Sampling<Coord> rows = sampling_of(box[2], box[4], scale, pooled_height, sampling_ratio, aligned);
    const Sampling<Coord> columns = sampling_of(box[1], box[3], scale, pooled_width, sampling_ratio, aligned);
    if (threadIdx.x == 0) *header = {static_cast<Number>(fmax(rows.grid * columns.grid, static_cast<Coord>(1))), 0};
    __syncthreads();
    for (int i = threadIdx.x; i < pooled_height + pooled_width; i += blockDim.x) {
        const bool vertical = i < pooled_height;
        const Sampling<Coord> axis = vertical ? rows : columns;
        const int bin = vertical ? i : i - pooled_height;
        const int cells = vertical ? height : width;
        const Range samples = samples_within(axis, bin, static_cast<Coord>(-1), static_cast<Coord>(cells));
        Range used = {0, 0};
        if (samples.begin < samples.end) {
            const int room = min(most_taps(axis, bin, samples, cells), capacity);
            used.begin = used.end = min(atomicAdd(&header->used, room), capacity);
            const int limit = min(used.begin + room, capacity);
            for (int sample = samples.begin; sample < samples.end; ++sample) {
                Between<Coord> at;
                if (!between(position(axis, bin, sample), cells, at)) continue;
                // In the direction of the walk: a reversed box goes backwards.
                const bool forwards = axis.bin >= 0;
                const Number high = static_cast<Number>(at.to_high);
                const Number low = 1 - high;
                used.end = add_tap(taps, used, limit, forwards ? at.low : at.high, forwards ? low : high);
                used.end = add_tap(taps, used, limit, forwards ? at.high : at.low, forwards ? high : low);
            }
        }
        ranges[i] = used;
    }
    __syncthreads();
    return {ranges, taps, header->samples};
}

// --- Backward: the bins that a cell is a tap of

// What is added to a distance, in cells, so that no sample is missed for a rounding error.
template <typename Coord> __device__ __forceinline__ Coord slack_of(Sampling<Coord> axis, int bins) {
    const Coord farthest = fabs(axis.start) + fabs(axis.bin) * static_cast<Coord>(bins);
    return static_cast<Coord>(0.5) + position_error<Coord>() * farthest;
}

// Whether cells may be taps of a box.
template <typename Coord>
__device__ __forceinline__ bool overlaps(Sampling<Coord> axis, int bins, Range cells) {
    const Coord end = axis.start + axis.bin * static_cast<Coord>(bins);
    const Coord slack = slack_of(axis, bins);
    return axis.grid > 0 && fmin(axis.start, end) <= static_cast<Coord>(cells.end) + slack &&
           fmax(axis.start, end) >= static_cast<Coord>(cells.begin - 1) - slack;
}

// The bins that a cell may be a tap of; a few others may be among them.
template <typename Coord> __device__ __forceinline__ Range bins_near(Sampling<Coord> axis, int cell, int bins) {
    if (!(axis.grid > 0)) return {0, 0};
    const Coord reach = 1 + slack_of(axis, bins);
    const Coord a = (static_cast<Coord>(cell) - reach - axis.start) / axis.bin;
    const Coord b = (static_cast<Coord>(cell) + reach - axis.start) / axis.bin;
    const Coord begin = fmin(fmax(floor(fmin(a, b)), static_cast<Coord>(0)), static_cast<Coord>(bins));
    const Coord end = fmin(fmax(ceil(fmax(a, b)), static_cast<Coord>(0)), static_cast<Coord>(bins));
    return {static_cast<int>(begin), static_cast<int>(end)};
}

// Weight of the tap that share_taps() makes of a cell; 0 where it makes none.
template <typename Number, typename Coord>
__device__ __forceinline__ Number tap_weight(Sampling<Coord> axis, int bin, int cell, int cells) {
    const Range samples =
        samples_within(axis, bin, static_cast<Coord>(cell - 1), static_cast<Coord>(cell + 1));
    Number weight = 0;
#pragma unroll 1
    for (int sample = samples.begin; sample < samples.end; ++sample) {
        Between<Coord> at;
        if (!between(position(axis, bin, sample), cells, at)) continue;
        if (at.low == cell) weight += 1 - static_cast<Number>(at.to_high);
        else if (at.high == cell) weight += static_cast<Number>(at.to_high);
    }
    return weight;
}

}  // namespace roi
