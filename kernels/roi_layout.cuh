// The two memory formats of a tensor (N, C, cells), and which element a thread takes in them.
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

}  // namespace roi
