// Deterministic gradients: a thread owns a cell of a few channels, adds up what every box's bins give it, in the order
// of the boxes and of the bins, and writes it once.
//
// A block owns a patch of cells of one level. It first finds the boxes that touch its patch, then works out which bins
// cover each of its rows and columns, so that the geometry is paid for once for all channels and a thread looks at
// nothing else.
//
// A block is blockDim.x x blockDim.y threads; blockIdx.x is its patch, the levels' one after another; blockIdx.y its
// image and channels.
//   contiguous:     a patch of blockDim.x x blockDim.y cells; threads along x have neighbouring cells
//   channels_last:  a patch of blockDim.y x 1 cells; threads along x have neighbouring channels

#pragma once

#include "roi_common.cuh"
#include "roi_levels.cuh"

namespace roi {

// Channels per thread: as many independent sums, and as many loads in flight.
inline constexpr int kGatherChannels = 4;

// A box that touches the block's patch.
template <typename Axis> struct alignas(8) Candidate {
    int row;  // of the boxes
    Axis vertical;
    Axis horizontal;
};

// The bins that cover a cell along one axis, and, indexed by bin, what the cell weighs in each.
template <typename Number> struct Cover {
    Range bins;
    const Number* weights;
};

// The channels of a thread: first, first + step, …, kGatherChannels of them, as far as they are below `end`.
struct ThreadChannels {
    int first;
    int step;
    int end;
};

// For the operators: adds to a cell what the bins that cover it give to each of the thread's channels. `gradients` are
// one box's (C, PH, PW).
template <bool ChannelsLast, typename T, typename Number>
__device__ __forceinline__ void add_bins(Number (&sum)[kGatherChannels], const T* gradients, const Cover<Number>& rows,
                                         const Cover<Number>& columns, const ThreadChannels& mine, int pooled_height,
                                         int pooled_width) {
    const int bins = pooled_height * pooled_width;
    for (int y = rows.bins.begin; y < rows.bins.end; ++y) {
#pragma unroll 1
        for (int x = columns.bins.begin; x < columns.bins.end; ++x) {
            const Number weight = rows.weights[y] * columns.weights[x];
            const int bin = y * pooled_width + x;
#pragma unroll
            for (int j = 0; j < kGatherChannels; ++j) {
                const int channel = mine.first + j * mine.step;
                if (channel >= mine.end) continue;
                sum[j] += weight * widen(gradients[ChannelsLast ? bin * mine.end + channel : channel * bins + bin]);
            }
        }
    }
}

// The same where channel c * PH * PW + b takes part in bin b alone, that of channel c of `gradients` (C / (PH * PW),
// PH, PW).
template <bool ChannelsLast, typename T, typename Number>
__device__ __forceinline__ void add_own_bin(Number (&sum)[kGatherChannels], const T* gradients,
                                            const Cover<Number>& rows, const Cover<Number>& columns,
                                            const ThreadChannels& mine, int pooled_height, int pooled_width) {
    const int bins = pooled_height * pooled_width;
#pragma unroll
    for (int j = 0; j < kGatherChannels; ++j) {
        const int channel = mine.first + j * mine.step;
        const int bin = channel % bins;
        const int y = bin / pooled_width;
        const int x = bin - y * pooled_width;
        if (channel >= mine.end || y < rows.bins.begin || y >= rows.bins.end || x < columns.bins.begin ||
            x >= columns.bins.end) {
            continue;
        }
        const int element = ChannelsLast ? bin * (mine.end / bins) + channel / bins : channel;
        sum[j] += rows.weights[y] * columns.weights[x] * widen(gradients[element]);
    }
}

// What is gathered is the operator's:
//   Op::Axis                              one axis of a box
//   Op::kWeighted                         whether cells have weights
//   op.axis(low, high, scale, bins)       -> Axis
//   op.overlaps(axis, bins, patch)        -> whether some bin may cover some cell of the Range `patch`
//   op.cover(axis, cell, cells, bins, w)  -> Range of the bins that cover a cell; w[bin] is its weight in each
//   op.add(sum, row, cell, rows, columns, channels)   adds what the bins of box `row` give to a cell
//
// `grad_inputs` may hold anything on entry. Dynamic shared memory: a Candidate for each thread; `slots` times, where
// cells have weights, a Number for each bin and row, and for each bin and column, of the patch; `slots` times a Range
// for each of these rows and columns; a bit for each thread in words of 32.
template <bool ChannelsLast, typename T, typename Coord, typename Op>
__device__ __forceinline__ void gather(const Op& op, const Levels<T, Coord>& grad_inputs,
                                       const Coord* __restrict__ rois, int boxes, int batch_size, int channels,
                                       int pooled_height, int pooled_width, int slots) {
    using Number = Compute<T>;
    using Box = Candidate<typename Op::Axis>;
    const int threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int words = (threads + 31) / 32;
    const int patch_width = ChannelsLast ? blockDim.y : blockDim.x;
    const int patch_height = ChannelsLast ? 1 : blockDim.y;
    const int lines = patch_height + patch_width;
    const int slot_weights = Op::kWeighted ? patch_height * pooled_height + patch_width * pooled_width : 0;

    Box* const candidates = dynamic_shared<Box>();
    Number* const weights = reinterpret_cast<Number*>(candidates + threads);
    Range* const covers = reinterpret_cast<Range*>(weights + slots * slot_weights);
    unsigned* const touching = reinterpret_cast<unsigned*>(covers + slots * lines);

    int level = 0;
    unsigned patch = blockIdx.x;
    unsigned patches_across = 0;
    for (;; ++level) {
        patches_across = (grad_inputs.width[level] + patch_width - 1) / patch_width;
        const unsigned patches_down = (grad_inputs.height[level] + patch_height - 1) / patch_height;
        if (level == grad_inputs.count - 1 || patch < patches_across * patches_down) break;
        patch -= patches_across * patches_down;
    }
    const int height = grad_inputs.height[level];
    const int width = grad_inputs.width[level];
    const Coord scale = grad_inputs.scale[level];
    const int left = static_cast<int>(patch % patches_across) * patch_width;
    const int top = static_cast<int>(patch / patches_across) * patch_height;
    const int row = ChannelsLast ? 0 : threadIdx.y;
    const int column = ChannelsLast ? threadIdx.y : threadIdx.x;
    const bool inside = left + column < width && top + row < height;
    const long long cell = static_cast<long long>(top + row) * width + left + column;

    const int channels_per_block = kGatherChannels * (ChannelsLast ? blockDim.x : 1);
    const unsigned groups = (channels + channels_per_block - 1) / channels_per_block;
    const unsigned units = static_cast<unsigned>(batch_size) * groups;
    for (unsigned unit = blockIdx.y; unit < units; unit += gridDim.y) {
        const int image = static_cast<int>(unit / groups);
        const ThreadChannels mine = {
            static_cast<int>(unit % groups) * channels_per_block + (ChannelsLast ? static_cast<int>(threadIdx.x) : 0),
            ChannelsLast ? static_cast<int>(blockDim.x) : 1, channels};
        Number sum[kGatherChannels] = {};

        for (long long base = 0; base < boxes; base += threads) {
            if (thread < words) touching[thread] = 0;
            __syncthreads();

            Box candidate;
            bool touches = false;
            if (base + thread < boxes) {
                const Coord* const box = rois + (base + thread) * kBoxSize;
                if (image_of(box, batch_size) == image && level_of(grad_inputs, box) == level) {
                    candidate = {static_cast<int>(base) + thread, op.axis(box[2], box[4], scale, pooled_height),
                                 op.axis(box[1], box[3], scale, pooled_width)};
                    touches = op.overlaps(candidate.vertical, pooled_height, {top, top + patch_height}) &&
                              op.overlaps(candidate.horizontal, pooled_width, {left, left + patch_width});
                }
            }
            if (touches) atomicOr(&touching[thread / 32], 1u << (thread % 32));
            __syncthreads();

            int found = 0;
            int before = 0;
#pragma unroll 1
            for (int word = 0; word < words; ++word) {
                if (word == thread / 32) before = found + __popc(touching[word] & ((1u << (thread % 32)) - 1));
                found += __popc(touching[word]);
            }
            if (touches) candidates[before] = candidate;
            __syncthreads();

            for (int first = 0; first < found; first += slots) {
                const int taken = min(slots, found - first);
#pragma unroll 1
                for (int i = thread; i < taken * lines; i += threads) {
                    const int slot = i / lines;
                    const int line = i - slot * lines;
                    const Box& box = candidates[first + slot];
                    Number* const start = weights + slot * slot_weights;
                    covers[i] = line < patch_height
                                    ? op.cover(box.vertical, top + line, height, pooled_height,
                                               start + line * pooled_height)
                                    : op.cover(box.horizontal, left + line - patch_height, width, pooled_width,
                                               start + patch_height * pooled_height +
                                                   (line - patch_height) * pooled_width);
                }
                __syncthreads();
                for (int slot = 0; inside && slot < taken; ++slot) {
                    const Number* const start = weights + slot * slot_weights;
                    const Range* const ranges = covers + slot * lines;
                    op.add(sum, candidates[first + slot].row, cell,
                           Cover<Number>{ranges[row], start + row * pooled_height},
                           Cover<Number>{ranges[patch_height + column],
                                         start + patch_height * pooled_height + column * pooled_width},
                           mine);
                }
                __syncthreads();
            }
        }

        if (inside) {
            T* const target = grad_inputs.data[level];
            const long long cells = static_cast<long long>(height) * width;
#pragma unroll
            for (int j = 0; j < kGatherChannels; ++j) {
                const int channel = mine.first + j * mine.step;
                if (channel >= channels) continue;
                target[ChannelsLast ? (image * cells + cell) * channels + channel
                                    : (static_cast<long long>(image) * channels + channel) * cells + cell] =
                    narrow<T>(sum[j]);
            }
        }
    }
}

}  // namespace roi
