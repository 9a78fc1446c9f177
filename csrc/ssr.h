// What every source of the native libraries shares. No torch header: the libraries load under any torch and Python.
#pragma once

// SSR_HD marks per-element logic that runs on the host and on the device from one source, so that the CPU library
// executes in CI what the CUDA kernels execute on a GPU.
#if defined(__CUDACC__)
#define SSR_HD __host__ __device__ __forceinline__
#else
#define SSR_HD inline
#endif

// The libraries hide every symbol but these.
#define SSR_EXPORT extern "C" __attribute__((visibility("default")))

// Digest of the sources (see CMakeLists.txt): ssr_kernels/library.py refuses a library built from other sources.
#if !defined(SSR_SOURCES)
#error "SSR_SOURCES is not defined: build with CMake"
#endif
