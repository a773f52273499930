// RoIAlign and its position-sensitive form, forward and backward.
//
//   inputs  (N, C, H, W)     T: float, double, __half or __nv_bfloat16; contiguous or channels_last; one for each level
//   rois    (K, 5)           Coord: float or double; batch index, x1, y1, x2, y2 in the units of the image
//   output  (K, C', PH, PW)  T, in the memory format of the inputs
//
// C' = C; or C = C' * PH * PW where PositionSensitive, and bin b of channel c is made of channel c * PH * PW + b.
//
// A bin is the mean over regularly spaced samples, those off the map counting as 0, and 0 where it has none; see
// roi_bilinear.cuh. A cell that has no weight is not read. A box that image_of() rejects is NaN throughout and takes no
// gradient. Nothing outside the tensors is accessed, and nothing off the map is looked at, for any content of `rois`.
//
// Limits that the launch checks: H, W from 1 to 2^30, C * PH * PW at most 2^30, N * C below 2^31, and that the taps fit
// shared memory. Within them only addresses need 64 bits.

#include "roi_bilinear.cuh"
#include "roi_common.cuh"
#include "roi_gather.cuh"
#include "roi_layout.cuh"
#include "roi_levels.cuh"

namespace roi {

// The launches count on these: see roi_align_launches.py.
static_assert(sizeof(Candidate<Sampling<float>>) == 32 && sizeof(Candidate<Sampling<double>>) == 56);
static_assert(sizeof(TapsHeader<float>) == 8 && sizeof(TapsHeader<double>) == 16);
static_assert(sizeof(Tap<float>) == 8 && sizeof(Tap<double>) == 16);

// The channel of the inputs that an item's first channel is made of.
template <bool PositionSensitive> __device__ __forceinline__ int input_channel(Item item, unsigned bins) {
    return PositionSensitive ? item.channel * static_cast<int>(bins) + static_cast<int>(item.bin) : item.channel;
}

// A block serves one box (blockIdx.x); blockIdx.y splits the box's items. `channels` are C', here and below. Dynamic
// shared memory: see share_taps(); then, for Transposed, a tile of the output of `turn` channels.
template <typename T, typename Coord, typename Layout, bool PositionSensitive>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_align(const __grid_constant__ Levels<const T, Coord> inputs, const Coord* __restrict__ rois, T* __restrict__ output,
          int batch_size, int channels, int pooled_height, int pooled_width, int sampling_ratio, int aligned,
          int capacity, int turn) {
    using Number = Compute<T>;
    constexpr int kChannels = Layout::kChannels;
    static_assert(!PositionSensitive || kChannels == 1, "neighbouring channels of a bin lie apart in the input");
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    const int own = image >= 0 ? level_of(inputs, box) : -1;
    const int level = max(own, 0);
    const int height = inputs.height[level];
    const int width = inputs.width[level];
    const T* const input = inputs.data[level];
    const Taps<Number> taps = share_taps<Number>(box, inputs.scale[level], height, width, pooled_height, pooled_width,
                                                 sampling_ratio, aligned, capacity);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const int input_channels = PositionSensitive ? channels * static_cast<int>(bins) : channels;
    SharedRest rest(taps.taps + capacity);
    Pooled<T, Layout> pooled(output, row, channels, bins, turn, rest);
    const Divisor across(static_cast<unsigned>(pooled_width));
    const Number share = 1 / taps.samples;
    const auto average = [&](Item item) {
        T means[kChannels];
        if (own < 0) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) means[j] = narrow<T>(image < 0 ? not_a_number<Number>() : Number(0));
        } else {
            const unsigned bin_row = across.quotient(item.bin);
            const Range rows = taps.bins[bin_row];
            const Range columns = taps.bins[pooled_height + item.bin - bin_row * across.value];
            const Slice<const T, Layout> source(input, image, input_channel<PositionSensitive>(item, bins),
                                                input_channels, static_cast<long long>(height) * width);
            Number sum[kChannels] = {};
            for (int r = rows.begin; r < rows.end; ++r) {
                const Tap<Number> vertical = taps.taps[r];
                const long long line = static_cast<long long>(vertical.cell) * width;
                // The second load does not wait for the first sum.
#pragma unroll 2
                for (int c = columns.begin; c < columns.end; ++c) {
                    const Tap<Number> horizontal = taps.taps[c];
                    const Number weight = vertical.weight * horizontal.weight;
                    Number values[kChannels];
                    source.load(line + horizontal.cell, values);
#pragma unroll
                    for (int j = 0; j < kChannels; ++j) sum[j] += weight * values[j];
                }
            }
#pragma unroll
            for (int j = 0; j < kChannels; ++j) means[j] = narrow<T>(sum[j] * share);
        }
        pooled.store(item, means);
    };
    for_each_item<Layout>(channels, bins, turn, average, pooled);
}

// By atomic additions, in an order that differs from run to run, one for each tap. `grad` (K, C', PH, PW) is in the
// format of Layout's pooled tensors, `grad_inputs` (N, C, H, W), which hold zeros on entry, in that of its maps. Work is
// split as in the forward pass, and shared memory is as there.
template <typename T, typename Coord, typename Layout, bool PositionSensitive>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_align_backward_atomic(const __grid_constant__ Levels<Compute<T>, Coord> grad_inputs, const T* __restrict__ grad,
                          const Coord* __restrict__ rois, int batch_size, int channels, int pooled_height,
                          int pooled_width, int sampling_ratio, int aligned, int capacity, int turn) {
    using Number = Compute<T>;
    constexpr int kChannels = Layout::kChannels;
    static_assert(!PositionSensitive || kChannels == 1, "neighbouring channels of a bin lie apart in the input");
    const long long row = blockIdx.x;
    const Coord* const box = rois + row * kBoxSize;
    const int image = image_of(box, batch_size);
    if (image < 0) return;

    const int level = level_of(grad_inputs, box);
    if (level < 0) return;
    const int height = grad_inputs.height[level];
    const int width = grad_inputs.width[level];
    const Taps<Number> taps = share_taps<Number>(box, grad_inputs.scale[level], height, width, pooled_height,
                                                 pooled_width, sampling_ratio, aligned, capacity);

    const unsigned bins = static_cast<unsigned>(pooled_height) * static_cast<unsigned>(pooled_width);
    const int input_channels = PositionSensitive ? channels * static_cast<int>(bins) : channels;
    SharedRest rest(taps.taps + capacity);
    Pooled<const T, Layout> pooled(grad, row, channels, bins, turn, rest);
    const Divisor across(static_cast<unsigned>(pooled_width));
    const Number share = 1 / taps.samples;
    const auto scatter = [&](Item item) {
        const unsigned bin_row = across.quotient(item.bin);
        const Range rows = taps.bins[bin_row];
        const Range columns = taps.bins[pooled_height + item.bin - bin_row * across.value];
        const Slice<Number, Layout> target(grad_inputs.data[level], image, input_channel<PositionSensitive>(item, bins),
                                           input_channels, static_cast<long long>(height) * width);
        Number gradients[kChannels];
        pooled.load(item, gradients);
#pragma unroll
        for (int j = 0; j < kChannels; ++j) gradients[j] *= share;
        for (int r = rows.begin; r < rows.end; ++r) {
            const Tap<Number> vertical = taps.taps[r];
            const long long line = static_cast<long long>(vertical.cell) * width;
            for (int c = columns.begin; c < columns.end; ++c) {
                const Tap<Number> horizontal = taps.taps[c];
                const Number weight = vertical.weight * horizontal.weight;
                Number shares[kChannels];
#pragma unroll
                for (int j = 0; j < kChannels; ++j) shares[j] = weight * gradients[j];
                target.add(line + horizontal.cell, shares);
            }
        }
    };
    for_each_item<Layout>(channels, bins, turn, scatter, pooled);
}

// What the gather is about: the bins that a cell is a tap of.
template <typename T, typename Coord, bool ChannelsLast, bool PositionSensitive> struct TapsGather {
    using Axis = Sampling<Coord>;
    using Number = Compute<T>;
    static constexpr bool kWeighted = true;

    const T* grad;
    int channels;
    int pooled_height;
    int pooled_width;
    int sampling_ratio;
    int aligned;

    __device__ Axis axis(Coord low, Coord high, Coord scale, int bins) const {
        return sampling_of(low, high, scale, bins, sampling_ratio, aligned);
    }
    __device__ bool overlaps(Axis axis, int bins, Range patch) const { return roi::overlaps(axis, bins, patch); }
    __device__ Range cover(Axis axis, int cell, int cells, int bins, Number* weights) const {
        const Range near = bins_near(axis, cell, bins);
        Range covering = {near.end, near.begin};
        for (int bin = near.begin; bin < near.end; ++bin) {
            weights[bin] = tap_weight<Number>(axis, bin, cell, cells) / static_cast<Number>(axis.grid);
            if (weights[bin] == 0) continue;
            covering = {min(covering.begin, bin), bin + 1};
        }
        return covering;
    }
    __device__ void add(Number (&sum)[kGatherChannels], int row, long long, const Cover<Number>& rows,
                        const Cover<Number>& columns, const ThreadChannels& mine) const {
        const T* const gradients = grad + static_cast<long long>(row) * channels * pooled_height * pooled_width;
        if constexpr (PositionSensitive) {
            add_own_bin<ChannelsLast>(sum, gradients, rows, columns, mine, pooled_height, pooled_width);
        } else {
            add_bins<ChannelsLast>(sum, gradients, rows, columns, mine, pooled_height, pooled_width);
        }
    }
};

template <typename T, typename Coord, bool ChannelsLast, bool PositionSensitive>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)
roi_align_backward_gather(const __grid_constant__ Levels<T, Coord> grad_inputs, const T* __restrict__ grad,
                          const Coord* __restrict__ rois, int boxes, int batch_size, int channels, int pooled_height,
                          int pooled_width, int sampling_ratio, int aligned, int slots) {
    const int bins = PositionSensitive ? pooled_height * pooled_width : 1;
    const TapsGather<T, Coord, ChannelsLast, PositionSensitive> op = {grad,         channels,       pooled_height,
                                                                      pooled_width, sampling_ratio, aligned};
    gather<ChannelsLast>(op, grad_inputs, rois, boxes, batch_size, channels * bins, pooled_height, pooled_width, slots);
}

}  // namespace roi
