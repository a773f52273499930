// RoI max pooling, forward and backward.
//
//   input   (N, C, H, W)    T: float, double, __half or __nv_bfloat16; contiguous or channels_last
//   rois    (K, 5)          Coord: float or double; batch index, x1, y1, x2, y2 in the units of the image
//   output  (K, C, PH, PW)  T, in the memory format of the input
//   argmax  (K, C, PH, PW)  Index: int, or long long for maps of 2^31 cells or more; y * W + x of the maximum, -1 for none;
//                           in the memory format of the output
//
// A box covers whole cells, both ends included. Its bins are cut by integer arithmetic before it is clipped to the map, so
// the result does not depend on how a float division rounds. An empty bin is 0. A box that image_of() rejects is NaN
// throughout, has no argmax and takes no gradient. Nothing outside the tensors is accessed for any content of `rois`.
//
// Limits that the launch checks: H, W and C * PH * PW at most 2^30, N * C below 2^31, PH + PW at most 6144 (the edges of
// the bins stay in shared memory). Within them only addresses need 64 bits: they are computed once per thread and box,
// and the loops add 32-bit offsets to them.

#include "roi_common.cuh"

namespace roi {

// Neighbouring channels per thread where they are not vector lanes: as many independent loads in flight, and the
// geometry of a bin is paid for once.
inline constexpr int kChannels = 4;

// Scaled and rounded coordinates saturate here. A position relative to the start then fits unsigned, sums fit int.
inline constexpr int kFarthestCell = 1 << 30;

// One axis of a box on the map, not clipped.
struct Extent {
    int start;
    unsigned size;
};

// Cells [begin, end) of one axis that a bin covers, clipped to the map.
struct Edges {
    int begin;
    int end;
};

__device__ __forceinline__ float round_half_away(float value) { return roundf(value); }
__device__ __forceinline__ double round_half_away(double value) { return round(value); }
__device__ __forceinline__ float clamp(float value, float limit) { return fminf(fmaxf(value, -limit), limit); }
__device__ __forceinline__ double clamp(double value, double limit) { return fmin(fmax(value, -limit), limit); }

template <typename Coord> __device__ __forceinline__ int to_cell(Coord coordinate, Coord scale) {
    // A product that is NaN (0 times an infinite scale) becomes -limit: fmax and fmin return their other argument.
    return static_cast<int>(clamp(round_half_away(coordinate * scale), static_cast<Coord>(kFarthestCell)));
}

template <typename Coord> __device__ __forceinline__ Extent extent_of(Coord low, Coord high, Coord scale) {
    const int first = to_cell(low, scale);
    const int last = to_cell(high, scale);
    return {first, last < first ? 1u : static_cast<unsigned>(last) - static_cast<unsigned>(first) + 1u};
}

__device__ __forceinline__ int clip(int cell, int cells) { return min(max(cell, 0), cells); }

// Bin i of n: floor(i * size / n) up to ceil((i + 1) * size / n). Split into size = quotient * n + remainder, every
// product fits 32 bits.
__device__ __forceinline__ Edges bin_edges(Extent extent, int bin, int bins, int cells) {
    const unsigned n = static_cast<unsigned>(bins);
    const unsigned i = static_cast<unsigned>(bin);
    const unsigned quotient = extent.size / n;
    const unsigned remainder = extent.size - quotient * n;
    const unsigned begin = i * quotient + i * remainder / n;
    const unsigned end = (i + 1) * quotient + ((i + 1) * remainder + n - 1) / n;
    const unsigned start = static_cast<unsigned>(extent.start);
    return {clip(static_cast<int>(start + begin), cells), clip(static_cast<int>(start + end), cells)};
}

// Fills edges[0 .. PH) with the bins' rows and edges[PH .. PH + PW) with their columns, the block's threads sharing the
// divisions. Ends with a barrier.
template <typename Coord>
__device__ __forceinline__ void share_bin_edges(Edges* edges, const Coord* box, Coord scale, int height, int width,
                                                int pooled_height, int pooled_width) {
    for (int i = threadIdx.x; i < pooled_height + pooled_width; i += blockDim.x) {
        const bool vertical = i < pooled_height;
        const Coord* const low = box + (vertical ? 2 : 1);
        edges[i] = bin_edges(extent_of(low[0], low[2], scale), vertical ? i : i - pooled_height,
                             vertical ? pooled_height : pooled_width, vertical ? height : width);
    }
    __syncthreads();
}

// Forward, contiguous. A block serves one box (blockIdx.x); blockIdx.y splits the box's work. A thread takes one bin of
// kChannels channels, neighbouring threads take neighbouring bins, so that stores coalesce.
template <typename T, typename Coord, typename Index, bool WithArgmax>
__global__ void __launch_bounds__(kMaxThreads, 4)
roi_pool_contiguous(const T* __restrict__ input, const Coord* __restrict__ rois, T* __restrict__ output,
                    Index* __restrict__ argmax, Coord scale, int batch_size, int channels, int height, int width,
                    int pooled_height, int pooled_width) {
    using Number = Compute<T>;
    Edges* const edges = dynamic_shared<Edges>();
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    if (image >= 0) share_bin_edges(edges, box, scale, height, width, pooled_height, pooled_width);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const unsigned items = (static_cast<unsigned>(channels) + kChannels - 1) / kChannels * bins;
    const long long plane = static_cast<long long>(height) * width;

    for (unsigned item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
        const unsigned group = item / bins;
        const unsigned bin = item - group * bins;
        const int channel = static_cast<int>(group) * kChannels;
        Number best[kChannels];
        Index cell_of_best[kChannels];

        if (image < 0) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) {
                best[j] = not_a_number<Number>();
                cell_of_best[j] = -1;
            }
        } else {
            const unsigned bin_row = bin / static_cast<unsigned>(pooled_width);
            const Edges rows = edges[bin_row];
            const Edges columns = edges[pooled_height + bin - bin_row * pooled_width];
            const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
            Index cell = static_cast<Index>(rows.begin) * width + columns.begin;

            const T* source[kChannels];
#pragma unroll
            for (int j = 0; j < kChannels; ++j) {
                best[j] = empty ? Number(0) : minus_infinity<Number>();
                cell_of_best[j] = empty ? Index(-1) : cell;
                // Past the last channel, that channel once more: the loads need no condition, and it is not stored.
                source[j] = input + (static_cast<long long>(image) * channels + min(channel + j, channels - 1)) * plane;
            }
            const int skip = width - (columns.end - columns.begin);
            if (!empty) {
                for (int y = rows.begin; y < rows.end; ++y, cell += skip) {
                    for (int x = columns.begin; x < columns.end; ++x, ++cell) {
#pragma unroll
                        for (int j = 0; j < kChannels; ++j) {
                            const Number value = widen(source[j][cell]);
                            if (replaces(value, best[j])) {
                                best[j] = value;
                                cell_of_best[j] = cell;
                            }
                        }
                    }
                }
            }
        }

        const long long target = (row * channels + channel) * bins + bin;
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
            if (channel + j < channels) {
                output[target + static_cast<long long>(j) * bins] = narrow<T>(best[j]);
                if (WithArgmax) argmax[target + static_cast<long long>(j) * bins] = cell_of_best[j];
            }
        }
    }
}

// Forward, channels_last. As above, except that a thread takes one bin of Lanes neighbouring channels and neighbouring
// threads take neighbouring channels, so that loads and stores both coalesce. Lanes > 1 needs channels to be a multiple
// of Lanes, and the tensors to be aligned to Lanes elements (at most 16 bytes).
template <typename T, typename Coord, typename Index, bool WithArgmax, int Lanes>
__global__ void __launch_bounds__(kMaxThreads, 4)
roi_pool_channels_last(const T* __restrict__ input, const Coord* __restrict__ rois, T* __restrict__ output,
                       Index* __restrict__ argmax, Coord scale, int batch_size, int channels, int height, int width,
                       int pooled_height, int pooled_width) {
    using Number = Compute<T>;
    Edges* const edges = dynamic_shared<Edges>();
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    if (image >= 0) share_bin_edges(edges, box, scale, height, width, pooled_height, pooled_width);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const unsigned packs = static_cast<unsigned>(channels) / Lanes;
    const unsigned items = packs * bins;

    for (unsigned item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
        const unsigned bin = item / packs;
        const unsigned channel = (item - bin * packs) * Lanes;
        Number best[Lanes];
        Index cell_of_best[Lanes];

        if (image < 0) {
#pragma unroll
            for (int j = 0; j < Lanes; ++j) {
                best[j] = not_a_number<Number>();
                cell_of_best[j] = -1;
            }
        } else {
            const unsigned bin_row = bin / static_cast<unsigned>(pooled_width);
            const Edges rows = edges[bin_row];
            const Edges columns = edges[pooled_height + bin - bin_row * pooled_width];
            const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
            Index cell = static_cast<Index>(rows.begin) * width + columns.begin;
#pragma unroll
            for (int j = 0; j < Lanes; ++j) {
                best[j] = empty ? Number(0) : minus_infinity<Number>();
                cell_of_best[j] = empty ? Index(-1) : cell;
            }
            if (!empty) {
                const long long first = static_cast<long long>(image) * height * width + cell;
                const T* source = input + first * channels + channel;
                const int skip = width - (columns.end - columns.begin);
                for (int y = rows.begin; y < rows.end; ++y) {
                    // The second load does not wait for the first comparison.
#pragma unroll 2
                    for (int x = columns.begin; x < columns.end; ++x) {
                        const Pack<T, Lanes> values = load<T, Lanes>(source);
#pragma unroll
                        for (int j = 0; j < Lanes; ++j) {
                            const Number value = widen(values.lane[j]);
                            if (replaces(value, best[j])) {
                                best[j] = value;
                                cell_of_best[j] = cell;
                            }
                        }
                        source += channels;
                        ++cell;
                    }
                    source += static_cast<long long>(skip) * channels;
                    cell += skip;
                }
            }
        }

        const long long target = (row * bins + bin) * channels + channel;
        Pack<T, Lanes> values;
#pragma unroll
        for (int j = 0; j < Lanes; ++j) values.lane[j] = narrow<T>(best[j]);
        store(output + target, values);
        if (WithArgmax) {
            Pack<Index, Lanes> cells;
#pragma unroll
            for (int j = 0; j < Lanes; ++j) cells.lane[j] = cell_of_best[j];
            store(argmax + target, cells);
        }
    }
}

// Backward by atomic additions, in an order that differs from run to run. `grad` and `argmax` (K, C, PH, PW) share their
// memory format with `grad_input` (N, C, H, W), which holds zeros on entry. Sum: float, or double where T is double.
// A block serves one box (blockIdx.x); neighbouring threads take neighbouring elements in memory.
template <typename T, typename Coord, typename Index, bool ChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 4)
roi_pool_backward_atomic(const T* __restrict__ grad, const Coord* __restrict__ rois, const Index* __restrict__ argmax,
                         Compute<T>* __restrict__ grad_input, int batch_size, int channels, int height, int width,
                         int pooled_height, int pooled_width) {
    const long long row = blockIdx.x;
    const int image = image_of(rois + row * kBoxSize, batch_size);
    if (image < 0) return;

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const unsigned items = static_cast<unsigned>(channels) * bins;
    const long long cells = static_cast<long long>(height) * width;
    const long long first = row * items;
    Compute<T>* const target = grad_input + static_cast<long long>(image) * channels * cells;

    for (unsigned item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
        const long long cell = argmax[first + item];
        if (cell < 0 || cell >= cells) continue;
        const unsigned channel = ChannelsLast ? item % static_cast<unsigned>(channels) : item / bins;
        atomicAdd(target + (ChannelsLast ? cell * channels + channel : channel * cells + cell),
                  widen(grad[first + item]));
    }
}

// What the gather keeps of a box that touches the block's cells.
struct Candidate {
    int row;
    Extent vertical;
    Extent horizontal;
    float rows_per_cell;     // bins per cell of the map, rounded
    float columns_per_cell;
};

__device__ __forceinline__ bool overlaps(Extent extent, int begin, int end) {
    return extent.start < end && static_cast<long long>(extent.start) + extent.size > begin;
}

// floor(numerator / denominator), from an estimate that is off by little: the correction is exact and needs no division.
__device__ __forceinline__ unsigned floor_divide(unsigned long long numerator, unsigned denominator, float estimate) {
    unsigned quotient = static_cast<unsigned>(estimate);
    while (static_cast<unsigned long long>(quotient) * denominator > numerator) --quotient;
    while ((quotient + 1ULL) * denominator <= numerator) ++quotient;
    return quotient;
}

// The bins [begin, end) that cover cell `offset` of an extent: those that bin_edges() gives it to.
__device__ __forceinline__ Edges bins_over(unsigned offset, unsigned size, int bins, float bins_per_cell) {
    const unsigned long long n = static_cast<unsigned>(bins);
    const unsigned first = floor_divide(offset * n, size, offset * bins_per_cell);
    const unsigned last = floor_divide((offset + 1ULL) * n - 1, size, (offset + 1.0f) * bins_per_cell);
    return {static_cast<int>(first), static_cast<int>(last) + 1};
}

// Backward by gathering: deterministic. A thread owns a cell of kChannels channels, reads the argmax of every bin that
// covers the cell, in the order of the boxes, sums in a register and writes once; `grad_input` may hold anything on
// entry. A block first finds the boxes that touch its cells, so that its threads look at no others.
//
// A block is blockDim.x × blockDim.y threads; blockIdx.x is its patch of cells, blockIdx.y its image and channels.
//   contiguous:     a patch of blockDim.x × blockDim.y cells; threads along x have neighbouring cells
//   channels_last:  a patch of blockDim.y × 1 cells; threads along x have neighbouring channels
// Dynamic shared memory: a Candidate per thread, then a bit per thread in words of 32.
template <typename T, typename Coord, typename Index, bool ChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 4)
roi_pool_backward_gather(const T* __restrict__ grad, const Coord* __restrict__ rois, const Index* __restrict__ argmax,
                         T* __restrict__ grad_input, Coord scale, int boxes, int batch_size, int channels, int height,
                         int width, int pooled_height, int pooled_width) {
    using Number = Compute<T>;
    const int threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int words = (threads + 31) / 32;
    Candidate* const candidates = dynamic_shared<Candidate>();
    unsigned* const touching = reinterpret_cast<unsigned*>(candidates + threads);

    const int patch_width = ChannelsLast ? blockDim.y : blockDim.x;
    const int patch_height = ChannelsLast ? 1 : blockDim.y;
    const unsigned patches_across = (width + patch_width - 1) / patch_width;
    const int left = blockIdx.x % patches_across * patch_width;
    const int top = blockIdx.x / patches_across * patch_height;
    const int x = left + (ChannelsLast ? threadIdx.y : threadIdx.x);
    const int y = top + (ChannelsLast ? 0 : threadIdx.y);
    const bool inside = x < width && y < height;

    const int channel_step = ChannelsLast ? blockDim.x : 1;
    const int channels_per_block = ChannelsLast ? kChannels * blockDim.x : kChannels;
    const unsigned groups = (channels + channels_per_block - 1) / channels_per_block;
    const int bins = pooled_height * pooled_width;
    const int bin_stride = ChannelsLast ? channels : 1;
    const int channel_stride = ChannelsLast ? 1 : bins;
    const Index cell = static_cast<Index>(y) * width + x;

    const unsigned units = static_cast<unsigned>(batch_size) * groups;
    for (unsigned unit = blockIdx.y; unit < units; unit += gridDim.y) {
        const int image = static_cast<int>(unit / groups);
        const int channel = static_cast<int>(unit % groups) * channels_per_block + (ChannelsLast ? threadIdx.x : 0);
        Number sum[kChannels] = {};

        for (long long base = 0; base < boxes; base += threads) {
            if (thread < words) touching[thread] = 0;
            __syncthreads();
            if (base + thread < boxes) {
                const Coord* const box = rois + (base + thread) * kBoxSize;
                if (image_of(box, batch_size) == image) {
                    const Extent vertical = extent_of(box[2], box[4], scale);
                    const Extent horizontal = extent_of(box[1], box[3], scale);
                    if (overlaps(vertical, top, top + patch_height) && overlaps(horizontal, left, left + patch_width)) {
                        candidates[thread] = {static_cast<int>(base) + thread, vertical, horizontal,
                                              static_cast<float>(pooled_height) / static_cast<float>(vertical.size),
                                              static_cast<float>(pooled_width) / static_cast<float>(horizontal.size)};
                        atomicOr(&touching[thread / 32], 1u << (thread % 32));
                    }
                }
            }
            __syncthreads();
            for (int word = 0; word < words; ++word) {
                for (unsigned left_over = touching[word]; left_over != 0; left_over &= left_over - 1) {
                    const Candidate& box = candidates[word * 32 + __ffs(static_cast<int>(left_over)) - 1];
                    // Unsigned: a cell before the start is beyond the size too.
                    const unsigned down = static_cast<unsigned>(y) - static_cast<unsigned>(box.vertical.start);
                    const unsigned across = static_cast<unsigned>(x) - static_cast<unsigned>(box.horizontal.start);
                    if (!inside || down >= box.vertical.size || across >= box.horizontal.size) continue;
                    const Edges rows = bins_over(down, box.vertical.size, pooled_height, box.rows_per_cell);
                    const Edges columns = bins_over(across, box.horizontal.size, pooled_width, box.columns_per_cell);
                    const long long first = static_cast<long long>(box.row) * channels * bins;
                    const Index* const cells_of_best = argmax + first;
                    const T* const gradients = grad + first;
                    for (int row = rows.begin; row < rows.end; ++row) {
                        for (int column = columns.begin; column < columns.end; ++column) {
                            const int bin = (row * pooled_width + column) * bin_stride;
#pragma unroll
                            for (int j = 0; j < kChannels; ++j) {
                                const int c = channel + j * channel_step;
                                const int element = bin + c * channel_stride;
                                if (c < channels && cells_of_best[element] == cell) sum[j] += widen(gradients[element]);
                            }
                        }
                    }
                }
            }
            __syncthreads();
        }

        if (inside) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) {
                const int c = channel + j * channel_step;
                if (c < channels) {
                    const long long target =
                        ChannelsLast ? ((static_cast<long long>(image) * height + y) * width + x) * channels + c
                                     : ((static_cast<long long>(image) * channels + c) * height + y) * width + x;
                    grad_input[target] = narrow<T>(sum[j]);
                }
            }
        }
    }
}

}  // namespace roi
