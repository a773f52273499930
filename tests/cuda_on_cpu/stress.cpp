// The main program of the sanitizers' runs: every kind of kernel on hostile boxes, in heap memory of the exact size.
//
// An argument plants a fault that the sanitizer has to report: short-output, misaligned-input, float-to-int. Built with
// STRESS_ONE_KIND it runs one kind of kernel, which builds faster and is enough to find a race that is planted
// everywhere.

#include "cuda_on_cpu.h"

#include "ps_roi_pool.cu"
#include "roi_align.cu"
#include "roi_pool.cu"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>

namespace {

constexpr int kImages = 2, kPooledHeight = 3, kPooledWidth = 2;
constexpr int kBins = kPooledHeight * kPooledWidth;
constexpr unsigned kThreads = 16;
constexpr int kLevels = 2, kHeight[kLevels] = {6, 3}, kWidth[kLevels] = {9, 5};

std::string fault;

// Not std::vector: aligned as a device allocation is, and short by as much as a fault asks for.
template <typename T> struct Buffer {
    explicit Buffer(std::size_t count, T value = T{})
        : data(static_cast<T*>(std::aligned_alloc(16, (count * sizeof(T) + 15) / 16 * 16))), size(count) {
        for (std::size_t i = 0; i < count; ++i) data[i] = value;
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(data + count, (16 - count * sizeof(T) % 16) % 16);
#endif
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(data + size, (16 - size * sizeof(T) % 16) % 16);
#endif
        std::free(data);
    }
    T* data;
    std::size_t size;
};

// The maps of a pyramid, the first `count` of kLevels.
template <typename T> struct Maps {
    Maps(int channels, int levels, T value = T{}) : count(levels) {
        for (int i = 0; i < levels; ++i) {
            const std::size_t size = std::size_t(kImages) * channels * kHeight[i] * kWidth[i];
            maps.push_back(std::make_unique<Buffer<T>>(size, value));
        }
    }
    template <typename Element, typename Coord> roi::Levels<Element, Coord> levels() const {
        roi::Levels<Element, Coord> all = {};
        for (int i = 0; i < count; ++i) {
            all.data[i] = maps[i]->data;
            all.height[i] = kHeight[i];
            all.width[i] = kWidth[i];
            all.scale[i] = Coord(1) / Coord(i + 1);
        }
        all.canonical_scale = 4;
        all.coarsest_level = Coord(count);  // one more than there are: boxes of it are on no level
        all.count = count;
        return all;
    }
    int count;
    std::vector<std::unique_ptr<Buffer<T>>> maps;
};

template <typename Coord> std::vector<Coord> boxes() {
    const Coord nan = std::numeric_limits<Coord>::quiet_NaN(), inf = std::numeric_limits<Coord>::infinity();
    const Coord huge = std::numeric_limits<Coord>::max(), tiny = std::numeric_limits<Coord>::denorm_min();
    const std::vector<std::vector<Coord>> rows = {
        {0, 0, 0, 8, 5},    {1, 2, 1, 7, 4},       {0, 8, 5, 0, 0},       {1, -4, -4, 20, 20},   {0, -9, -9, -5, -5},
        {1, 50, 1, 60, 4},  {0, 1, 50, 4, 60},     {1, -1e30, 1, 1e30, 4}, {0, 1e30, 1e30, 1e30, 1e30},
        {0, 1e30, 1e30, -1e30, -1e30}, {0, -3e7, -5e8, 3e7, 5e8}, {1, 2, 2, 2, 2}, {0, 3, 3, 4, 4},
        {1, 2, -1e5, 5, 1e5},
        {1, -huge, -huge, huge, huge}, {0, tiny, -tiny, 3, 3}, {0, nan, 0, 4, 4}, {0, 0, 0, inf, 4}, {0, 0, -inf, 4, 4},
        {-1, 0, 0, 4, 4},   {2, 0, 0, 4, 4},       {Coord(0.5), 0, 0, 4, 4}, {Coord(-0.5), 0, 0, 4, 4},
        {huge, 0, 0, 4, 4}, {-huge, 0, 0, 4, 4},   {nan, 0, 0, 4, 4},     {inf, 0, 0, 4, 4},
    };
    std::vector<Coord> flat;
    for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
    return flat;
}

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "wrong result: %s\n", what);
    std::exit(3);
}

// Where `scattered` is channels_last beside contiguous `gathered`, `channels` is their number; else 1.
template <typename T>
void expect_close(const Maps<T>& gathered, const Maps<roi::Compute<T>>& scattered, double tolerance, int channels = 1) {
    for (int level = 0; level < gathered.count; ++level) {
        const std::size_t cells = std::size_t(kHeight[level]) * kWidth[level];
        for (std::size_t i = 0; i < gathered.maps[level]->size; ++i) {
            const std::size_t plane = i / cells, image = plane / channels, channel = plane % channels;
            const std::size_t same = channels == 1 ? i : (image * cells + i % cells) * channels + channel;
            const double expected = scattered.maps[level]->data[same];
            const double difference = std::fabs(roi::widen(gathered.maps[level]->data[i]) - expected);
            expect(difference <= tolerance * (1 + std::fabs(expected)), "the two gradients differ");
        }
    }
}

// Of the pooled tensors, and so of the gather; the maps of Transposed are channels_last.
template <typename Layout>
constexpr bool is_channels_last = std::is_same_v<Layout, roi::ChannelsLast<Layout::kChannels>>;
template <typename Layout> constexpr bool is_transposed = std::is_same_v<Layout, roi::Transposed<Layout::kChannels>>;

// Where a block takes turns of channels: several turns.
template <typename Layout>
constexpr int kTurn = is_transposed<Layout> || is_channels_last<Layout> ? Layout::kChannels : 0;

// As access.py has it: tiles of elements of so many bytes behind what the kernel uses.
template <typename Layout> std::size_t with_tiles(std::size_t used, std::initializer_list<std::size_t> elements) {
    for (const std::size_t bytes : elements) {
        if (is_transposed<Layout>) used = (used + 15) / 16 * 16 + kTurn<Layout> * kBins * bytes;
    }
    return used;
}

// As launch.per_cell() has it: threads, patches of all levels, and shared memory for two boxes at a time.
constexpr int kSlots = 2;
struct Gather {
    dim3 block{4, kThreads / 4};
    dim3 grid;
    std::size_t shared_bytes;

    Gather(bool channels_last, int levels, std::size_t candidate, std::size_t weight) {
        const unsigned columns = channels_last ? block.y : block.x, rows = channels_last ? 1 : block.y;
        unsigned patches = 0;
        for (int i = 0; i < levels; ++i) {
            patches += (kWidth[i] + columns - 1) / columns * ((kHeight[i] + rows - 1) / rows);
        }
        grid = {patches, 3};
        shared_bytes = candidate * kThreads + 4 * ((kThreads + 31) / 32) +
                       kSlots * (sizeof(roi::Range) * (rows + columns) +
                                 weight * (rows * kPooledHeight + columns * kPooledWidth));
    }
};

template <typename T, typename Coord, typename Index, typename Layout> void run_pool(int channels) {
    const std::vector<Coord> rois = boxes<Coord>();
    const unsigned count = static_cast<unsigned>(rois.size() / roi::kBoxSize);
    const std::size_t outputs = std::size_t(count) * channels * kBins;

    Maps<T> input(channels, kLevels);
    for (auto& map : input.maps) {
        for (std::size_t i = 0; i < map->size; ++i) {
            map->data[i] = roi::narrow<T>(static_cast<float>(i * 37 % 11) - 5.0f);
        }
    }
    auto levels = input.template levels<const T, Coord>();
    if (fault == "misaligned-input") {
        levels.data[0] = reinterpret_cast<const T*>(reinterpret_cast<const char*>(levels.data[0]) + 2);
    }
    Buffer<T> output(fault == "short-output" ? outputs - 1 : outputs);
    Buffer<Index> argmax(outputs, Index(-7));
    const std::size_t ranges = sizeof(roi::Range) * (kPooledHeight + kPooledWidth);
    cuda_on_cpu::launch({count, 2}, {kThreads}, with_tiles<Layout>(ranges, {sizeof(T), sizeof(Index)}), [&] {
        roi::roi_pool<T, Coord, Index, true, Layout>(levels, rois.data(), output.data, argmax.data, kImages, channels,
                                                     kPooledHeight, kPooledWidth, kTurn<Layout>);
    });
    for (std::size_t i = 0; i < outputs; ++i) {
        expect(argmax.data[i] >= -1 && argmax.data[i] < kHeight[0] * kWidth[0], "a position is outside the map");
    }

    constexpr bool kChannelsLast = is_channels_last<Layout>;
    Buffer<T> grad(outputs, roi::narrow<T>(1.0f));
    Maps<roi::Compute<T>> scattered(channels, kLevels);
    using Single = std::conditional_t<is_transposed<Layout>, roi::Transposed<1>,
                                      std::conditional_t<kChannelsLast, roi::ChannelsLast<1>, roi::Contiguous<1>>>;
    cuda_on_cpu::launch({count, 2}, {kThreads}, with_tiles<Single>(0, {sizeof(T), sizeof(Index)}), [&] {
        roi::roi_pool_backward_atomic<T, Coord, Index, Single>(
            scattered.template levels<roi::Compute<T>, Coord>(), grad.data, rois.data(), argmax.data, kImages, channels,
            kPooledHeight, kPooledWidth, kTurn<Single>);
    });
    Maps<T> gathered(channels, kLevels, roi::narrow<T>(99.0f));
    const Gather launch(kChannelsLast, kLevels, sizeof(roi::Candidate<roi::Extent>), 0);
    cuda_on_cpu::launch(launch.grid, launch.block, launch.shared_bytes, [&] {
        roi::roi_pool_backward_gather<T, Coord, Index, kChannelsLast>(
            gathered.template levels<T, Coord>(), grad.data, rois.data(), argmax.data, static_cast<int>(count), kImages,
            channels, kPooledHeight, kPooledWidth, kSlots);
    });
    expect_close(gathered, scattered, 0, is_transposed<Layout> ? channels : 1);
}

template <typename T, typename Coord, typename Layout, bool PositionSensitive>
void run_align(int channels, int sampling_ratio, int aligned) {
    using Number = roi::Compute<T>;
    constexpr bool kChannelsLast = is_channels_last<Layout>;
    constexpr int kMaps = PositionSensitive ? 1 : kLevels;
    const std::vector<Coord> rois = boxes<Coord>();
    const unsigned count = static_cast<unsigned>(rois.size() / roi::kBoxSize);
    const std::size_t outputs = std::size_t(count) * channels * kBins;
    const int input_channels = PositionSensitive ? channels * kBins : channels;
    const auto shared_bytes = [](int capacity) {
        return with_tiles<Layout>(sizeof(roi::TapsHeader<Number>) + sizeof(roi::Range) * (kPooledHeight + kPooledWidth) +
                                      sizeof(roi::Tap<Number>) * capacity,
                                  {sizeof(T)});
    };

    Maps<T> input(input_channels, kMaps, roi::narrow<T>(1.0f));
    // As launch.py has it, and too small: what does not fit is dropped, and nothing else is written.
    int capacity = kHeight[0] + 2 * kPooledHeight + kWidth[0] + 2 * kPooledWidth + 128;
    for (const int taps : {3, capacity}) {
        Buffer<T> output(outputs);
        cuda_on_cpu::launch({count, 2}, {kThreads}, shared_bytes(taps), [&] {
            roi::roi_align<T, Coord, Layout, PositionSensitive>(input.template levels<const T, Coord>(), rois.data(),
                                                                output.data, kImages, channels, kPooledHeight,
                                                                kPooledWidth, sampling_ratio, aligned, taps, kTurn<Layout>);
        });
        for (std::size_t i = 0; i < outputs; ++i) {
            expect(!(std::fabs(static_cast<double>(roi::widen(output.data[i]))) > 1.01), "a mean is beyond its terms");
        }
    }

    Buffer<T> grad(outputs, roi::narrow<T>(1.0f));
    Maps<Number> scattered(input_channels, kMaps);
    cuda_on_cpu::launch({count, 2}, {kThreads}, shared_bytes(capacity), [&] {
        roi::roi_align_backward_atomic<T, Coord, Layout, PositionSensitive>(
            scattered.template levels<Number, Coord>(), grad.data, rois.data(), kImages, channels, kPooledHeight,
            kPooledWidth, sampling_ratio, aligned, capacity, kTurn<Layout>);
    });
    Maps<T> gathered(input_channels, kMaps, roi::narrow<T>(99.0f));
    const Gather launch(kChannelsLast, kMaps, sizeof(roi::Candidate<roi::Sampling<Coord>>), sizeof(Number));
    cuda_on_cpu::launch(launch.grid, launch.block, launch.shared_bytes, [&] {
        roi::roi_align_backward_gather<T, Coord, kChannelsLast, PositionSensitive>(
            gathered.template levels<T, Coord>(), grad.data, rois.data(), static_cast<int>(count), kImages, channels,
            kPooledHeight, kPooledWidth, sampling_ratio, aligned, kSlots);
    });
    expect_close(gathered, scattered, sizeof(T) == 2 ? 1e-2 : 1e-5, is_transposed<Layout> ? channels : 1);
}

template <typename T, typename Coord, typename Layout> void run_ps_pool(int channels) {
    using Number = roi::Compute<T>;
    constexpr bool kChannelsLast = is_channels_last<Layout>;
    const std::vector<Coord> rois = boxes<Coord>();
    const unsigned count = static_cast<unsigned>(rois.size() / roi::kBoxSize);
    const std::size_t outputs = std::size_t(count) * channels * kBins;
    const std::size_t shared_bytes = sizeof(roi::Range) * (kPooledHeight + kPooledWidth);

    Maps<T> input(channels * kBins, 1);
    Buffer<T> output(outputs);
    cuda_on_cpu::launch({count, 2}, {kThreads}, shared_bytes, [&] {
        roi::ps_roi_pool<T, Coord, Layout>(input.template levels<const T, Coord>(), rois.data(), output.data, kImages,
                                           channels, kPooledHeight, kPooledWidth);
    });
    Buffer<T> grad(outputs, roi::narrow<T>(1.0f));
    Maps<Number> scattered(channels * kBins, 1);
    cuda_on_cpu::launch({count, 2}, {kThreads}, shared_bytes, [&] {
        roi::ps_roi_pool_backward_atomic<T, Coord, Layout>(scattered.template levels<Number, Coord>(), grad.data,
                                                           rois.data(), kImages, channels, kPooledHeight, kPooledWidth);
    });
    Maps<T> gathered(channels * kBins, 1, roi::narrow<T>(99.0f));
    const Gather launch(kChannelsLast, 1, sizeof(roi::Candidate<roi::Extent>), sizeof(Number));
    cuda_on_cpu::launch(launch.grid, launch.block, launch.shared_bytes, [&] {
        roi::ps_roi_pool_backward_gather<T, Coord, kChannelsLast>(
            gathered.template levels<T, Coord>(), grad.data, rois.data(), static_cast<int>(count), kImages, channels,
            kPooledHeight, kPooledWidth, kSlots);
    });
    expect_close(gathered, scattered, sizeof(T) == 2 ? 1e-2 : 1e-5);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) fault = argv[1];
    if (fault == "float-to-int") {
        volatile float huge = 1e30f;
        std::printf("%d\n", static_cast<int>(huge));
    }
    run_pool<float, float, int, roi::Contiguous<4>>(5);
#ifndef STRESS_ONE_KIND
    run_align<float, float, roi::Contiguous<4>, false>(5, 0, 0);
    run_pool<float, double, long long, roi::ChannelsLast<1>>(3);
    run_pool<double, double, int, roi::ChannelsLast<2>>(4);
    run_pool<__half, float, int, roi::ChannelsLast<8>>(8);
    run_pool<__nv_bfloat16, float, int, roi::Contiguous<4>>(2);
    run_pool<float, float, int, roi::Transposed<4>>(8);
    run_align<float, float, roi::ChannelsLast<4>, false>(8, 2, 1);
    run_align<__nv_bfloat16, float, roi::Transposed<8>, false>(16, 2, 0);
    run_align<__half, double, roi::ChannelsLast<1>, false>(3, 0, 1);
    run_align<double, float, roi::Contiguous<1>, true>(2, 3, 1);
    run_align<float, float, roi::ChannelsLast<1>, true>(1, 0, 1);
    run_ps_pool<float, float, roi::Contiguous<1>>(2);
    run_ps_pool<__half, double, roi::ChannelsLast<1>>(1);
#endif
    std::puts("done");
}
