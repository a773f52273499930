// Position-sensitive RoI average pooling, forward and backward.
//
//   input   (N, C * PH * PW, H, W)  T: float, double, __half or __nv_bfloat16; contiguous or channels_last
//   rois    (K, 5)                  Coord: float or double; batch index, x1, y1, x2, y2 in the units of the image
//   output  (K, C, PH, PW)          T, in the memory format of the input
//
// Bin b of channel c is the mean of channel c * PH * PW + b over the bin's cells. A box ends before the cell of its
// second corner, and the map before its last row and column. An empty bin is 0. A box that image_of() rejects is NaN
// throughout and takes no gradient. Nothing outside the tensors is accessed for any content of `rois`.
//
// Limits that the launch checks: those of roi_pool.cu, for the channels of the input. The map is the only one of a
// pyramid.

#include "roi_bins.cuh"
#include "roi_common.cuh"
#include "roi_gather.cuh"
#include "roi_layout.cuh"
#include "roi_levels.cuh"

namespace roi {

inline constexpr int kWithoutEnd = 0;

// The launches count on these: see ps_roi_pool_launches.py.
static_assert(sizeof(Range) == 8 && sizeof(Candidate<Extent>) == 24);

__device__ __forceinline__ int pooled_cells(int cells) { return max(cells - 1, 0); }

template <typename Number> __device__ __forceinline__ Number area(Range rows, Range columns) {
    return static_cast<Number>(rows.end - rows.begin) * static_cast<Number>(columns.end - columns.begin);
}

// A block serves one box (blockIdx.x); blockIdx.y splits the box's items. Layout has one channel. Dynamic shared
// memory: see share_bins().
template <typename T, typename Coord, typename Layout>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
ps_roi_pool(const __grid_constant__ Levels<const T, Coord> map, const Coord* __restrict__ rois, T* __restrict__ output,
            int batch_size, int channels, int pooled_height, int pooled_width) {
    using Number = Compute<T>;
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    const int height = map.height[0];
    const int width = map.width[0];
    const Range* const ranges = share_bins(box, map.scale[0], kWithoutEnd, pooled_cells(height), pooled_cells(width),
                                           pooled_height, pooled_width);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const unsigned items = Layout::items(channels, bins);
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < items; i += gridDim.y * blockDim.x) {
        const Item item = Layout::item(i, channels, bins);
        const unsigned bin_row = item.bin / static_cast<unsigned>(pooled_width);
        const Range rows = ranges[bin_row];
        const Range columns = ranges[pooled_height + item.bin - bin_row * pooled_width];
        Number mean = image < 0 ? not_a_number<Number>() : Number(0);
        if (image >= 0 && rows.begin < rows.end && columns.begin < columns.end) {
            const int channel = item.channel * static_cast<int>(bins) + static_cast<int>(item.bin);
            const Slice<const T, Layout> source(map.data[0], image, channel, channels * static_cast<int>(bins),
                                                static_cast<long long>(height) * width);
            for (int y = rows.begin; y < rows.end; ++y) {
                const long long line = static_cast<long long>(y) * width;
#pragma unroll 4
                for (int x = columns.begin; x < columns.end; ++x) {
                    Number value[1];
                    source.load(line + x, value);
                    mean += value[0];
                }
            }
            mean /= area<Number>(rows, columns);
        }
        const T means[1] = {narrow<T>(mean)};
        Slice<T, Layout>(output, row, item.channel, channels, bins).store(item.bin, means);
    }
}

// By atomic additions, in an order that differs from run to run. `grad` (K, C, PH, PW) shares its memory format with
// `grad_input` (N, C * PH * PW, H, W), which holds zeros on entry. Work is split as in the forward pass.
template <typename T, typename Coord, typename Layout>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
ps_roi_pool_backward_atomic(const __grid_constant__ Levels<Compute<T>, Coord> grad_input, const T* __restrict__ grad,
                            const Coord* __restrict__ rois, int batch_size, int channels, int pooled_height,
                            int pooled_width) {
    using Number = Compute<T>;
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    if (image < 0) return;

    const int height = grad_input.height[0];
    const int width = grad_input.width[0];
    const Range* const ranges = share_bins(box, grad_input.scale[0], kWithoutEnd, pooled_cells(height),
                                           pooled_cells(width), pooled_height, pooled_width);
    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const unsigned items = Layout::items(channels, bins);
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < items; i += gridDim.y * blockDim.x) {
        const Item item = Layout::item(i, channels, bins);
        const unsigned bin_row = item.bin / static_cast<unsigned>(pooled_width);
        const Range rows = ranges[bin_row];
        const Range columns = ranges[pooled_height + item.bin - bin_row * pooled_width];
        if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
        const int channel = item.channel * static_cast<int>(bins) + static_cast<int>(item.bin);
        const Slice<Number, Layout> target(grad_input.data[0], image, channel, channels * static_cast<int>(bins),
                                           static_cast<long long>(height) * width);
        Number share[1];
        Slice<const T, Layout>(grad, row, item.channel, channels, bins).load(item.bin, share);
        share[0] /= area<Number>(rows, columns);
        for (int y = rows.begin; y < rows.end; ++y) {
            const long long line = static_cast<long long>(y) * width;
            for (int x = columns.begin; x < columns.end; ++x) target.add(line + x, share);
        }
    }
}

// What the gather is about: the bins that average a cell.
template <typename T, typename Coord, bool ChannelsLast> struct AverageGather {
    using Axis = Extent;
    using Number = Compute<T>;
    static constexpr bool kWeighted = true;

    const T* grad;
    int channels;
    int pooled_height;
    int pooled_width;

    __device__ Extent axis(Coord low, Coord high, Coord scale, int) const {
        return extent_of(low, high, scale, kWithoutEnd);
    }
    __device__ bool overlaps(Extent extent, int, Range patch) const { return roi::overlaps(extent, patch); }
    __device__ Range cover(Extent extent, int cell, int cells, int bins, Number* weights) const {
        const int pooled = pooled_cells(cells);
        if (cell >= pooled) return {0, 0};
        const Range covering = bins_over(extent, cell, bins);
        for (int bin = covering.begin; bin < covering.end; ++bin) {
            const Range range = bin_cells(extent, bin, bins, pooled);
            weights[bin] = 1 / static_cast<Number>(range.end - range.begin);
        }
        return covering;
    }
    __device__ void add(Number (&sum)[kGatherChannels], int row, long long, const Cover<Number>& rows,
                        const Cover<Number>& columns, const ThreadChannels& mine) const {
        add_own_bin<ChannelsLast>(sum, grad + static_cast<long long>(row) * channels * pooled_height * pooled_width,
                                  rows, columns, mine, pooled_height, pooled_width);
    }
};

template <typename T, typename Coord, bool ChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
ps_roi_pool_backward_gather(const __grid_constant__ Levels<T, Coord> grad_input, const T* __restrict__ grad,
                            const Coord* __restrict__ rois, int boxes, int batch_size, int channels, int pooled_height,
                            int pooled_width, int slots) {
    const AverageGather<T, Coord, ChannelsLast> op = {grad, channels, pooled_height, pooled_width};
    gather<ChannelsLast>(op, grad_input, rois, boxes, batch_size, channels * pooled_height * pooled_width,
                         pooled_height, pooled_width, slots);
}

}  // namespace roi
