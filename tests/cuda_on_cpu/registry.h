// Kernels by name, launched with an array of pointers to their arguments as the CUDA driver does it.
//
// A library is one generated file: this header, the kernels' source, and KERNEL(name expression) for each
// instantiation. The names are the very ones that the launches ask NVRTC for.

#pragma once

#include <cstdio>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

using Launcher = void (*)(dim3, dim3, std::size_t, void**);

inline std::map<std::string, Launcher>& kernels() {
    static std::map<std::string, Launcher> all;
    return all;
}

template <auto Kernel, typename... Arguments, std::size_t... I>
void launch_with(void (*)(Arguments...), std::index_sequence<I...>, dim3 grid, dim3 block, std::size_t shared_bytes,
                 void** arguments) {
    launch(grid, block, shared_bytes, [=] { Kernel(*static_cast<std::remove_cv_t<Arguments>*>(arguments[I])...); });
}

template <typename... Arguments> constexpr std::size_t count(void (*)(Arguments...)) { return sizeof...(Arguments); }

template <auto Kernel> void launch_kernel(dim3 grid, dim3 block, std::size_t shared_bytes, void** arguments) {
    launch_with<Kernel>(Kernel, std::make_index_sequence<count(Kernel)>(), grid, block, shared_bytes, arguments);
}

struct Registration {
    Registration(const char* name, Launcher launcher) { kernels()[name] = launcher; }
};

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_JOIN(a, b) a##b
#define CUDA_ON_CPU_NAME(line) CUDA_ON_CPU_JOIN(registration_, line)
#define KERNEL(...)                                                   \
    static const cuda_on_cpu::Registration CUDA_ON_CPU_NAME(__LINE__)( \
        #__VA_ARGS__, &cuda_on_cpu::launch_kernel<&__VA_ARGS__>);

// 0, or 1 where no kernel has the name.
extern "C" inline __attribute__((used)) int launch_kernel(const char* name, const unsigned* grid, const unsigned* block,
                                                          std::size_t shared_bytes, void** arguments) {
    const auto found = cuda_on_cpu::kernels().find(name);
    if (found == cuda_on_cpu::kernels().end()) return 1;
    found->second({grid[0], grid[1], 1}, {block[0], block[1], 1}, shared_bytes, arguments);
    return 0;
}
