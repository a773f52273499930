// The memory formats of maps (N, C, cells) and of pooled tensors (K, C, bins), and which element a thread takes in them.
//
// An item is one bin of a box in a few neighbouring channels: what a thread computes at a time.

#pragma once

#include "roi_common.cuh"

namespace roi {

struct Item {
    unsigned bin;
    int channel;  // the first
};

// Contiguous: neighbouring threads take neighbouring bins. Their channels are as many independent loads in flight, and
// the geometry of a bin is paid for once.
template <int Channels> struct Contiguous {
    static constexpr int kChannels = Channels;

    __device__ static unsigned items(int channels, unsigned bins) {
        return (static_cast<unsigned>(channels) + Channels - 1) / Channels * bins;
    }
    __device__ static Item item(unsigned index, int, unsigned bins) {
        const unsigned group = index / bins;
        return {index - group * bins, static_cast<int>(group) * Channels};
    }
};

// channels_last: neighbouring threads take neighbouring channels. More than one channel needs C to be a multiple of
// Channels, and the tensors to be aligned to that many elements (at most 16 bytes).
template <int Channels> struct ChannelsLast {
    static constexpr int kChannels = Channels;

    __device__ static unsigned items(int channels, unsigned bins) {
        return static_cast<unsigned>(channels) / Channels * bins;
    }
    __device__ static Item item(unsigned index, int channels, unsigned) {
        const unsigned packs = static_cast<unsigned>(channels) / Channels;
        const unsigned bin = index / packs;
        return {bin, static_cast<int>(index - bin * packs) * Channels};
    }
};

// Maps in channels_last, pooled tensors contiguous: the maps of contiguous features, copied. A block takes so many
// channels of a box at a time that their bins fit a tile in shared memory. Of the maps neighbouring threads take
// neighbouring channels; the tile's part of a pooled tensor lies in one piece.
template <int Channels> struct Transposed {
    static constexpr int kChannels = Channels;
};

// The channels of an item in one image, or box, of a tensor (N, C, cells).
template <typename T, typename Layout> class Slice;

template <typename T, int N> class Slice<T, Contiguous<N>> {
  public:
    __device__ Slice(T* tensor, long long image, int channel, int channels, long long cells)
        : first_(tensor + (image * channels + channel) * cells), cells_(cells), left_(channels - channel) {}

    // Past the last channel, that channel once more: the loads need no condition.
    __device__ void load(long long cell, Compute<T> (&values)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(first_[min(j, left_ - 1) * cells_ + cell]);
    }
    __device__ void store(long long cell, const T (&values)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j < left_) first_[j * cells_ + cell] = values[j];
        }
    }
    __device__ void add(long long cell, const Compute<T> (&values)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j < left_) atomicAdd(first_ + j * cells_ + cell, values[j]);
        }
    }

  private:
    T* first_;
    long long cells_;
    int left_;
};

template <typename T, int N> class Slice<T, ChannelsLast<N>> {
  public:
    __device__ Slice(T* tensor, long long image, int channel, int channels, long long cells)
        : first_(tensor + image * cells * channels + channel), channels_(channels) {}

    __device__ void load(long long cell, Compute<T> (&values)[N]) const {
        const auto pack = roi::load<N>(first_ + cell * channels_);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(pack.lane[j]);
    }
    __device__ void store(long long cell, const T (&values)[N]) const {
        Pack<T, N> pack;
#pragma unroll
        for (int j = 0; j < N; ++j) pack.lane[j] = values[j];
        roi::store(first_ + cell * channels_, pack);
    }
    __device__ void add(long long cell, const Compute<T> (&values)[N]) const {
        atomic_add(first_ + cell * channels_, values);
    }

  private:
    T* first_;
    int channels_;
};

template <typename T, int N> class Slice<T, Transposed<N>> : public Slice<T, ChannelsLast<N>> {
  public:
    using Slice<T, ChannelsLast<N>>::Slice;
};

// The dynamic shared memory behind what is used of it, in pieces that begin at multiples of 16 bytes.
class SharedRest {
  public:
    __device__ explicit SharedRest(const void* end_of_used)
        : next_(static_cast<unsigned>(static_cast<const unsigned char*>(end_of_used) -
                                      dynamic_shared<unsigned char>())) {}

    // Where `count` elements begin, as a byte: a pointer that is kept would no longer be known to be one to shared memory.
    template <typename T> __device__ unsigned take(unsigned count) {
        const unsigned first = (next_ + 15) / 16 * 16;
        next_ = first + count * static_cast<unsigned>(sizeof(T));
        return first;
    }

  private:
    unsigned next_;
};

// A box's part (C, bins) of a pooled tensor, item by item, within for_each_item(). Of const T it is read, else written.
template <typename T, typename Layout> class Pooled {
    static constexpr int kChannels = Layout::kChannels;

  public:
    // `turn`: channels in the tile, for Transposed alone.
    __device__ Pooled(T* tensor, long long box, int channels, unsigned bins, int, SharedRest&)
        : tensor_(tensor), box_(box), channels_(channels), bins_(bins) {}

    __device__ void load(Item item, Compute<T> (&values)[kChannels]) const { slice(item).load(item.bin, values); }
    __device__ void store(Item item, const T (&values)[kChannels]) const { slice(item).store(item.bin, values); }

  private:
    __device__ Slice<T, Layout> slice(Item item) const { return {tensor_, box_, item.channel, channels_, bins_}; }

    T* tensor_;
    long long box_;
    int channels_;
    unsigned bins_;
};

template <typename T> struct Mutable { using type = T; };
template <typename T> struct Mutable<const T> { using type = T; };

template <typename T, int N> class Pooled<T, Transposed<N>> {
    using Value = typename Mutable<T>::type;

  public:
    __device__ Pooled(T* tensor, long long box, int channels, unsigned bins, int turn, SharedRest& rest)
        : of_box_(tensor + box * channels * bins), bins_(bins), tile_(rest.take<Value>(turn * bins)) {}

    __device__ void load(Item item, Compute<T> (&values)[N]) const {
        const Value* const bin = tile() + (item.channel - first_) * bins_ + item.bin;
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(bin[j * bins_]);
    }
    __device__ void store(Item item, const Value (&values)[N]) const {
        Value* const bin = tile() + (item.channel - first_) * bins_ + item.bin;
#pragma unroll
        for (int j = 0; j < N; ++j) bin[j * bins_] = values[j];
    }

    // The tile becomes that of `count` channels from `first`.
    __device__ void begin(int first, int count) {
        first_ = first;
        fill(of_box_, count);
    }
    __device__ void end(int, int count) const { empty(of_box_, count); }

  private:
    __device__ Value* tile() const { return reinterpret_cast<Value*>(dynamic_shared<unsigned char>() + tile_); }
    __device__ void fill(const Value* source, int count) const {
        for (unsigned i = threadIdx.x; i < count * bins_; i += blockDim.x) tile()[i] = source[first_ * bins_ + i];
    }
    __device__ void fill(Value*, int) const {}
    __device__ void empty(Value* target, int count) const {
        for (unsigned i = threadIdx.x; i < count * bins_; i += blockDim.x) target[first_ * bins_ + i] = tile()[i];
    }
    __device__ void empty(const Value*, int) const {}

    T* of_box_;
    unsigned bins_;
    unsigned tile_;
    int first_ = 0;
};

// Calls `body` with the items of `count` channels from `first`, the channels of a bin for neighbouring threads.
template <int N, typename Body>
__device__ __forceinline__ void of_channels(int first, int count, unsigned bins, const Body& body) {
    const Divisor packs(static_cast<unsigned>(count) / N);
    for (unsigned i = threadIdx.x; i < packs.value * bins; i += blockDim.x) {
        const unsigned bin = packs.quotient(i);
        body(Item{bin, first + static_cast<int>(i - bin * packs.value) * N});
    }
}

// Calls `body` with each item of a box that is this thread's. blockIdx.y splits them among blocks. All that `body` reads
// or writes of pooled tensors goes through `pooled`.
template <typename Layout> struct ForEachItem {
    template <typename Body, typename... Ts>
    __device__ static void run(int channels, unsigned bins, int, Body body, Pooled<Ts, Layout>&...) {
        const unsigned items = Layout::items(channels, bins);
        for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < items; i += gridDim.y * blockDim.x) {
            body(Layout::item(i, channels, bins));
        }
    }
};

// A block takes `turn` channels at a time, for all bins: the cells that neighbouring bins share stay in the cache.
template <int N> struct ForEachItem<ChannelsLast<N>> {
    template <typename Body, typename... Ts>
    __device__ static void run(int channels, unsigned bins, int turn, Body body, Pooled<Ts, ChannelsLast<N>>&...) {
        for (int first = blockIdx.y * turn; first < channels; first += gridDim.y * turn) {
            of_channels<N>(first, min(turn, channels - first), bins, body);
        }
    }
};

template <int N> struct ForEachItem<Transposed<N>> {
    template <typename Body, typename... Ts>
    __device__ static void run(int channels, unsigned bins, int turn, Body body,
                               Pooled<Ts, Transposed<N>>&... pooled) {
        for (int first = blockIdx.y * turn; first < channels; first += gridDim.y * turn) {
            const int count = min(turn, channels - first);
            (pooled.begin(first, count), ...);
            __syncthreads();
            of_channels<N>(first, count, bins, body);
            __syncthreads();
            (pooled.end(first, count), ...);
            __syncthreads();
        }
    }
};

template <typename Layout, typename Body, typename... Ts>
__device__ __forceinline__ void for_each_item(int channels, unsigned bins, int turn, Body body,
                                              Pooled<Ts, Layout>&... pooled) {
    ForEachItem<Layout>::run(channels, bins, turn, body, pooled...);
}

}  // namespace roi
