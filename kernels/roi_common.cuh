// What the RoI kernels share: number types, vector accesses, atomics, and the reading of a box's batch index.
//
// Compiled by NVRTC (through CuPy), by nvcc, and by g++ for the tests. CuPy always adds -ftz=true; what must be exact
// for subnormal numbers therefore avoids float arithmetic and the comparison operators on float.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace roi {

// A box is a row of five numbers: batch index, x1, y1, x2, y2.
inline constexpr int kBoxSize = 5;

// Every kernel here is launched with at most this many threads in a block.
inline constexpr int kMaxThreads = 256;

// Blocks of them that are to fit a multiprocessor at a time: leaves 64 registers to a thread, 128 where it computes in
// double.
template <typename T, typename Coord> inline constexpr int kMinBlocks = sizeof(T) == 8 || sizeof(Coord) == 8 ? 2 : 4;

// The type that values of a storage type are compared and summed in: float, or double for double.
template <typename T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
template <> struct ComputeType<int> { using type = int; };  // indices stay what they are
template <> struct ComputeType<long long> { using type = long long; };
template <typename T> struct ComputeType<const T> : ComputeType<T> {};
template <typename T> using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ int widen(int value) { return value; }
__device__ __forceinline__ long long widen(long long value) { return value; }

// The nearest T. Exact for a number that widen() produced.
template <typename T> __device__ __forceinline__ T narrow(Compute<T> value) { return value; }
template <> __device__ __forceinline__ __half narrow<__half>(float value) { return __float2half(value); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16(value);
}

template <typename Number> __device__ __forceinline__ Number not_a_number();
template <> __device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }
template <> __device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

template <typename Number> __device__ __forceinline__ Number minus_infinity();
template <> __device__ __forceinline__ float minus_infinity() { return -__int_as_float(0x7f800000); }
template <> __device__ __forceinline__ double minus_infinity() { return -__longlong_as_double(0x7ff0000000000000LL); }

// Does `candidate`, read after `best`, become the maximum? Yes if it is greater, or NaN, as in torch's max pooling: of
// several maxima the first is kept, of several NaN the last.
__device__ __forceinline__ bool replaces(double candidate, double best) {
    return candidate > best || candidate != candidate;
}
__device__ __forceinline__ bool replaces(float candidate, float best) {
#ifdef __CUDA_ARCH__
    // candidate > best || candidate != candidate, without the .ftz that would take subnormal numbers for zeros.
    int result;
    asm("{\n\t"
        ".reg .pred nan, taken;\n\t"
        "setp.nan.f32 nan, %1, %1;\n\t"
        "setp.gt.or.f32 taken, %1, %2, nan;\n\t"
        "selp.s32 %0, 1, 0, taken;\n\t"
        "}"
        : "=r"(result)
        : "f"(candidate), "f"(best));
    return result != 0;
#else
    return candidate > best || candidate != candidate;
#endif
}

// Whether greater_or_nan() is one instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kHasGreaterOrNan = false;
__device__ float greater_or_nan(float, float);
#else
inline constexpr bool kHasGreaterOrNan = true;
// The greater number, of two zeros any; NaN where one is NaN.
__device__ __forceinline__ float greater_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a != a ? a : b > a || b != b ? b : a;
#endif
}
#endif

// By its bits, for a comparison would take a subnormal number for one.
__device__ __forceinline__ bool is_zero(float value) { return (__float_as_uint(value) << 1) == 0; }

// The product, rounded. The compiler would contract a plain a * b + c into one rounding; coordinates are computed like
// this so that the CPU has the same ones.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

// Begin and end, half-open: cells, bins, samples, or entries of a table.
struct Range {
    int begin;
    int end;
};

// Division of many unsigned integers below 2^30 by one: an estimate and its correction take a third of the instructions.
struct Divisor {
    unsigned value;
    float inverse;

    __device__ explicit Divisor(unsigned value) : value(value), inverse(1.0f / static_cast<float>(value)) {}

    __device__ unsigned quotient(unsigned numerator) const {
        unsigned quotient = static_cast<unsigned>(static_cast<float>(numerator) * inverse);
        int rest = static_cast<int>(numerator - quotient * value);
        for (; rest < 0; rest += static_cast<int>(value)) --quotient;
        for (; rest >= static_cast<int>(value); rest -= static_cast<int>(value)) ++quotient;
        return quotient;
    }
};

// N neighbouring elements, moved by as few accesses as their size allows (16 bytes each at most).
template <typename T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T lane[N];
};

template <int N, typename T> __device__ __forceinline__ Pack<T, N> load(const T* address) {
    return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <typename T, int N> __device__ __forceinline__ void store(T* address, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

// Adds to N neighbouring numbers, each atomically.
template <typename Number, int N>
__device__ __forceinline__ void atomic_add(Number* address, const Number (&values)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) atomicAdd(address + j, values[j]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void atomic_add(float* address, const float (&values)[4]) {
    atomicAdd(reinterpret_cast<float4*>(address), make_float4(values[0], values[1], values[2], values[3]));
}
#endif

// The shared memory whose size the launch sets, as an array of Item.
template <typename Item> __device__ __forceinline__ Item* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    return reinterpret_cast<Item*>(shared_bytes);
}

// The image that a box belongs to, or -1 for a box to reject: one with a batch index outside [0, batch_size) or with a
// number that is not finite. A fraction in the batch index is dropped. The range is checked before the conversion to
// int, which is undefined for what does not fit.
template <typename Coord> __device__ __forceinline__ int image_of(const Coord* box, int batch_size) {
    const Coord index = box[0];
    bool valid = index >= 0 && index < static_cast<Coord>(batch_size);
    for (int i = 1; i < kBoxSize; ++i) valid = valid && isfinite(box[i]);
    return valid ? static_cast<int>(index) : -1;
}

}  // namespace roi
