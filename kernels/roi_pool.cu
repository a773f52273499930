// RoI max pooling, forward and backward.
//
//   inputs  (N, C, H, W)    T: float, double, __half or __nv_bfloat16; contiguous or channels_last; one for each level
//   rois    (K, 5)          Coord: float or double; batch index, x1, y1, x2, y2 in the units of the image
//   output  (K, C, PH, PW)  T, in the memory format of the inputs
//   argmax  (K, C, PH, PW)  Index: int, or long long for maps of 2^31 cells or more; y * W + x of the maximum on the
//                           box's level, -1 for none; in the memory format of the output
//
// A box covers whole cells, both ends included. An empty bin is 0. A box that image_of() rejects is NaN throughout, has
// no argmax and takes no gradient. Nothing outside the tensors is accessed for any content of `rois`.
//
// Limits that the launch checks: H, W and C * PH * PW at most 2^30, N * C below 2^31, PH + PW at most 6144 (the ranges
// of the bins stay in shared memory). Within them only addresses need 64 bits.

#include "roi_bins.cuh"
#include "roi_common.cuh"
#include "roi_gather.cuh"
#include "roi_layout.cuh"
#include "roi_levels.cuh"

namespace roi {

inline constexpr int kBothEnds = 1;

// The launches count on these: see roi_pool_launches.py.
static_assert(sizeof(Range) == 8 && sizeof(Candidate<Extent>) == 24);

// The maximum of each channel in a bin that has cells, and the cell of the first such.
template <typename Source, typename Number, typename Index, int N>
__device__ __forceinline__ void find_maxima(const Source& source, Range rows, Range columns, int width,
                                            Number (&best)[N], Index (&cell_of_best)[N]) {
    Index cell = static_cast<Index>(rows.begin) * width + columns.begin;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        best[j] = minus_infinity<Number>();
        cell_of_best[j] = cell;
    }
    const int skip = width - (columns.end - columns.begin);
    for (int y = rows.begin; y < rows.end; ++y, cell += skip) {
        // The second load does not wait for the first comparison.
#pragma unroll 2
        for (int x = columns.begin; x < columns.end; ++x, ++cell) {
            Number values[N];
            source.load(cell, values);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (replaces(values[j], best[j])) {
                    best[j] = values[j];
                    cell_of_best[j] = cell;
                }
            }
        }
    }
}

// The same without the cells, by an instruction for each value. It does not tell zeros of two signs apart: a maximum of
// zero is looked up.
template <typename Index, typename Source, int N>
__device__ __forceinline__ void find_maxima(const Source& source, Range rows, Range columns, int width,
                                            float (&best)[N]) {
    Index line = static_cast<Index>(rows.begin) * width;
    const Index top = line;
#pragma unroll
    for (int j = 0; j < N; ++j) best[j] = minus_infinity<float>();
    for (int y = rows.begin; y < rows.end; ++y, line += width) {
        // Two loads in flight; the last cell may be looked at twice.
#pragma unroll 1
        for (int x = columns.begin; x < columns.end; x += 2) {
            float values[2][N];
            source.load(line + x, values[0]);
            source.load(line + min(x + 1, columns.end - 1), values[1]);
#pragma unroll
            for (int j = 0; j < N; ++j) best[j] = greater_or_nan(greater_or_nan(best[j], values[0][j]), values[1][j]);
        }
    }

    unsigned zeros = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) zeros |= is_zero(best[j]) ? 1u << j : 0u;
    line = top;
#pragma unroll 1
    for (int y = rows.begin; zeros != 0 && y < rows.end; ++y, line += width) {
#pragma unroll 1
        for (int x = columns.begin; zeros != 0 && x < columns.end; ++x) {
            float values[N];
            source.load(line + x, values);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if ((zeros & 1u << j) != 0 && is_zero(values[j])) {
                    best[j] = values[j];
                    zeros &= ~(1u << j);
                }
            }
        }
    }
}

// A block serves one box (blockIdx.x); blockIdx.y splits the box's items. Dynamic shared memory: see share_bins(); then,
// for Transposed, a tile of the output and one of the argmax, of `turn` channels.
template <typename T, typename Coord, typename Index, bool WithArgmax, typename Layout>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_pool(const __grid_constant__ Levels<const T, Coord> inputs, const Coord* __restrict__ rois, T* __restrict__ output,
         Index* __restrict__ argmax, int batch_size, int channels, int pooled_height, int pooled_width, int turn) {
    using Number = Compute<T>;
    constexpr int kChannels = Layout::kChannels;
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    const int own = image >= 0 ? level_of(inputs, box) : -1;
    const int level = max(own, 0);
    const int height = inputs.height[level];
    const int width = inputs.width[level];
    const T* const input = inputs.data[level];
    const Range* const ranges =
        share_bins(box, inputs.scale[level], kBothEnds, height, width, pooled_height, pooled_width);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    SharedRest rest(ranges + pooled_height + pooled_width);
    Pooled<T, Layout> pooled(output, row, channels, bins, turn, rest);
    const Divisor across(static_cast<unsigned>(pooled_width));
    const auto pool = [&](Item item, Index (&cell_of_best)[kChannels]) {
        const unsigned bin_row = across.quotient(item.bin);
        const Range rows = ranges[bin_row];
        const Range columns = ranges[pooled_height + item.bin - bin_row * across.value];
        Number best[kChannels];
        if (own >= 0 && rows.begin < rows.end && columns.begin < columns.end) {
            const Slice<const T, Layout> source(input, image, item.channel, channels,
                                                static_cast<long long>(height) * width);
            if constexpr (!WithArgmax && kHasGreaterOrNan && sizeof(Number) == sizeof(float)) {
                find_maxima<Index>(source, rows, columns, width, best);
            } else {
                find_maxima(source, rows, columns, width, best, cell_of_best);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) {
                best[j] = image >= 0 ? Number(0) : not_a_number<Number>();
                cell_of_best[j] = -1;
            }
        }
        T maxima[kChannels];
#pragma unroll
        for (int j = 0; j < kChannels; ++j) maxima[j] = narrow<T>(best[j]);
        pooled.store(item, maxima);
    };
    if constexpr (WithArgmax) {
        Pooled<Index, Layout> cells(argmax, row, channels, bins, turn, rest);
        const auto pool_both = [&](Item item) {
            Index cell_of_best[kChannels];
            pool(item, cell_of_best);
            cells.store(item, cell_of_best);
        };
        for_each_item<Layout>(channels, bins, turn, pool_both, pooled, cells);
    } else {
        const auto pool_alone = [&](Item item) {
            Index unused[kChannels];
            pool(item, unused);
        };
        for_each_item<Layout>(channels, bins, turn, pool_alone, pooled);
    }
}

// By atomic additions, in an order that differs from run to run. `grad_inputs` (N, C, H, W), in the maps' format of
// Layout, hold zeros on entry; `grad` and `argmax` (K, C, PH, PW) are in that of its pooled tensors. A block serves one
// box (blockIdx.x). Dynamic shared memory, for Transposed: a tile of `grad` and one of `argmax`, of `turn` channels.
template <typename T, typename Coord, typename Index, typename Layout>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_pool_backward_atomic(const __grid_constant__ Levels<Compute<T>, Coord> grad_inputs, const T* __restrict__ grad,
                         const Coord* __restrict__ rois, const Index* __restrict__ argmax, int batch_size, int channels,
                         int pooled_height, int pooled_width, int turn) {
    static_assert(Layout::kChannels == 1, "neighbouring channels have their maxima in cells of their own");
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    if (image < 0) return;

    const int level = level_of(grad_inputs, box);
    if (level < 0) return;
    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const long long cells = static_cast<long long>(grad_inputs.height[level]) * grad_inputs.width[level];
    SharedRest rest(dynamic_shared<T>());
    Pooled<const T, Layout> gradients(grad, row, channels, bins, turn, rest);
    Pooled<const Index, Layout> cells_of_best(argmax, row, channels, bins, turn, rest);
    const auto add = [&](Item item) {
        Index cell[1];
        cells_of_best.load(item, cell);
        if (cell[0] < 0 || cell[0] >= cells) return;
        Compute<T> gradient[1];
        gradients.load(item, gradient);
        Slice<Compute<T>, Layout>(grad_inputs.data[level], image, item.channel, channels, cells).add(cell[0], gradient);
    };
    for_each_item<Layout>(channels, bins, turn, add, gradients, cells_of_best);
}

// What roi_pool's gather is about: the bins that have their maximum in a cell.
template <typename T, typename Coord, typename Index, bool ChannelsLast> struct MaximaGather {
    using Axis = Extent;
    using Number = Compute<T>;
    static constexpr bool kWeighted = false;

    const T* grad;
    const Index* argmax;
    int channels;
    int pooled_height;
    int pooled_width;

    __device__ Extent axis(Coord low, Coord high, Coord scale, int) const {
        return extent_of(low, high, scale, kBothEnds);
    }
    __device__ bool overlaps(Extent extent, int, Range patch) const { return roi::overlaps(extent, patch); }
    __device__ Range cover(Extent extent, int cell, int, int bins, Number*) const {
        return bins_over(extent, cell, bins);
    }
    __device__ void add(Number (&sum)[kGatherChannels], int row, long long cell, const Cover<Number>& rows,
                        const Cover<Number>& columns, const ThreadChannels& mine) const {
        const int bins = pooled_height * pooled_width;
        const long long first = static_cast<long long>(row) * channels * bins;
        const T* const gradients = grad + first;
        const Index* const cells_of_best = argmax + first;
        for (int y = rows.bins.begin; y < rows.bins.end; ++y) {
#pragma unroll 1
            for (int x = columns.bins.begin; x < columns.bins.end; ++x) {
                const int bin = y * pooled_width + x;
#pragma unroll
                for (int j = 0; j < kGatherChannels; ++j) {
                    const int channel = mine.first + j * mine.step;
                    if (channel >= mine.end) continue;
                    const int element = ChannelsLast ? bin * channels + channel : channel * bins + bin;
                    if (cells_of_best[element] == static_cast<Index>(cell)) sum[j] += widen(gradients[element]);
                }
            }
        }
    }
};

template <typename T, typename Coord, typename Index, bool ChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_pool_backward_gather(const __grid_constant__ Levels<T, Coord> grad_inputs, const T* __restrict__ grad,
                         const Coord* __restrict__ rois, const Index* __restrict__ argmax, int boxes, int batch_size,
                         int channels, int pooled_height, int pooled_width, int slots) {
    const MaximaGather<T, Coord, Index, ChannelsLast> op = {grad, argmax, channels, pooled_height, pooled_width};
    gather<ChannelsLast>(op, grad_inputs, rois, boxes, batch_size, channels, pooled_height, pooled_width, slots);
}

}  // namespace roi
