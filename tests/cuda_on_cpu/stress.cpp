// The main program of the sanitizers' runs: every kind of kernel on hostile boxes, in heap memory of the exact size.
//
// An argument plants a fault that the sanitizer has to report: short-output, misaligned-input, float-to-int.

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>

namespace {

constexpr int kImages = 2, kHeight = 6, kWidth = 9, kPooledHeight = 3, kPooledWidth = 2;
constexpr int kBins = kPooledHeight * kPooledWidth;
constexpr unsigned kThreads = 16;

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
    ~Buffer() { std::free(data); }
    T* data;
    std::size_t size;
};

template <typename Coord> std::vector<Coord> boxes() {
    const Coord nan = std::numeric_limits<Coord>::quiet_NaN(), inf = std::numeric_limits<Coord>::infinity();
    const Coord huge = std::numeric_limits<Coord>::max(), tiny = std::numeric_limits<Coord>::denorm_min();
    const std::vector<std::vector<Coord>> rows = {
        {0, 0, 0, 8, 5},    {1, 2, 1, 7, 4},       {0, 8, 5, 0, 0},       {1, -4, -4, 20, 20},   {0, -9, -9, -5, -5},
        {1, 50, 1, 60, 4},  {0, 1, 50, 4, 60},     {1, -1e30, 1, 1e30, 4}, {0, 1e30, 1e30, 1e30, 1e30},
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

// Lanes == 0: contiguous.
template <typename T, typename Coord, typename Index, int Lanes> void run(int channels) {
    constexpr bool kChannelsLast = Lanes > 0;
    const std::vector<Coord> rois = boxes<Coord>();
    const unsigned count = static_cast<unsigned>(rois.size() / roi::kBoxSize);
    const std::size_t cells = std::size_t(kImages) * channels * kHeight * kWidth;
    const std::size_t outputs = std::size_t(count) * channels * kBins;
    const Coord scale = 1;

    Buffer<T> input(cells + 1);
    for (std::size_t i = 0; i < cells; ++i) input.data[i] = roi::narrow<T>(static_cast<float>(i * 37 % 11) - 5.0f);
    const T* source = input.data;
    if (fault == "misaligned-input") source = reinterpret_cast<const T*>(reinterpret_cast<const char*>(source) + 2);
    Buffer<T> output(fault == "short-output" ? outputs - 1 : outputs);
    Buffer<Index> argmax(outputs, Index(-7));

    cuda_on_cpu::launch({count, 2}, {kThreads}, sizeof(roi::Edges) * (kPooledHeight + kPooledWidth), [&] {
        if constexpr (kChannelsLast) {
            roi::roi_pool_channels_last<T, Coord, Index, true, Lanes>(
                source, rois.data(), output.data, argmax.data, scale, kImages, channels, kHeight, kWidth,
                kPooledHeight, kPooledWidth);
        } else {
            roi::roi_pool_contiguous<T, Coord, Index, true>(
                source, rois.data(), output.data, argmax.data, scale, kImages, channels, kHeight, kWidth,
                kPooledHeight, kPooledWidth);
        }
    });
    for (std::size_t i = 0; i < outputs; ++i) {
        expect(argmax.data[i] >= -1 && argmax.data[i] < kHeight * kWidth, "a position is outside the map");
    }

    Buffer<T> grad(outputs, roi::narrow<T>(1.0f));
    Buffer<roi::Compute<T>> scattered(cells);
    cuda_on_cpu::launch({count, 2}, {kThreads}, 0, [&] {
        roi::roi_pool_backward_atomic<T, Coord, Index, kChannelsLast>(
            grad.data, rois.data(), argmax.data, scattered.data, kImages, channels, kHeight, kWidth, kPooledHeight,
            kPooledWidth);
    });

    Buffer<T> gathered(cells, roi::narrow<T>(99.0f));
    const dim3 block{4, kThreads / 4};
    const unsigned patches = kChannelsLast ? (kWidth + block.y - 1) / block.y * kHeight
                                           : (kWidth + block.x - 1) / block.x * ((kHeight + block.y - 1) / block.y);
    const std::size_t shared_bytes = sizeof(roi::Candidate) * kThreads + sizeof(unsigned) * ((kThreads + 31) / 32);
    cuda_on_cpu::launch({patches, 3}, block, shared_bytes, [&] {
        roi::roi_pool_backward_gather<T, Coord, Index, kChannelsLast>(
            grad.data, rois.data(), argmax.data, gathered.data, scale, static_cast<int>(count), kImages, channels,
            kHeight, kWidth, kPooledHeight, kPooledWidth);
    });
    for (std::size_t i = 0; i < cells; ++i) {
        expect(roi::widen(gathered.data[i]) == scattered.data[i], "the two gradients differ");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) fault = argv[1];
    if (fault == "float-to-int") {
        volatile float huge = 1e30f;
        std::printf("%d\n", static_cast<int>(huge));
    }
    run<float, float, int, 0>(5);
    run<float, float, int, 4>(8);
    run<float, double, long long, 1>(3);
    run<double, double, int, 2>(4);
    run<double, float, int, 0>(3);
    run<__half, float, int, 8>(8);
    run<__half, float, long long, 0>(2);
    run<__nv_bfloat16, float, int, 8>(16);
    run<__nv_bfloat16, double, int, 1>(3);
    std::puts("done");
}
