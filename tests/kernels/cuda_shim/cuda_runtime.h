// Enough of CUDA to run csrc/*.cu as host C++, one block after another, for tests without a GPU.
// A thread is a fiber that runs until its next barrier, threads and warps in random order: what a missing barrier
// leaves to chance goes wrong here. Shared memory starts as NaN, and what is written behind its end is found.
// Asynchronous copies land at random, either at once or when they are waited for. A mistake ends the process with one
// line.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, gridDim;  // set by the scheduler before it resumes a fiber

namespace shim {

constexpr int kMostShared = 232448, kStack = 128 * 1024;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::fflush(stderr);
  std::abort();
}
inline void check(bool holds, const char *what) {
  if (!holds) fail(what);
}
inline bool aligned(const void *pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What the tests choose.
inline int processors = 2, shared_limit = kMostShared, asked_shared = 48 * 1024;
inline std::mt19937 random{1};

enum class State { kReady, kAtBlock, kAtWarp, kDone };
struct Copy {
  void *to;
  const void *from;
  size_t bytes, zeros;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state = State::kReady;
  int barrier = 0;      // which kind of barrier it waits at
  int64_t matrix_ops = 0;
  uint32_t slot = 0;    // what it shows to the other lanes
  std::vector<Copy> copies;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int running = 0;
inline void (*body)(void *) = nullptr;
inline void *argument = nullptr;

inline void enter() {
  body(argument);
  fibers[running].state = State::kDone;
  swapcontext(&fibers[running].context, &scheduler);
}

inline void wait(State state, int kind) {
  Fiber &self = fibers[running];
  self.state = state, self.barrier = kind;
  swapcontext(&self.context, &scheduler);
}

// Lets the fibers first..last-1 go on if all that are not done wait for each other at one barrier.
inline bool release(int first, int last, State state) {
  int kind = -1;
  int64_t ops = -1;
  for (int f = first; f < last; ++f) {
    const Fiber &fiber = fibers[f];
    if (fiber.state == State::kDone && state == State::kAtBlock) continue;
    if (fiber.state != state) return false;
    check(kind < 0 || kind == fiber.barrier, "lanes wait at different barriers");
    check(state == State::kAtBlock || ops < 0 || ops == fiber.matrix_ops, "lanes differ in their matrix operations");
    kind = fiber.barrier, ops = fiber.matrix_ops;
  }
  if (kind < 0) return false;
  for (int f = first; f < last; ++f)
    if (fibers[f].state == state) fibers[f].state = State::kReady;
  return true;
}

inline void run_block(int threads) {
  if (static_cast<int>(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
  for (Fiber &fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady, fiber.matrix_ops = 0;
  }
  // Between two barriers of the block either all warps go on side by side, or one after another as far as they come.
  const int warps = threads / 32;
  std::vector<int> lanes(32), order(warps);
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = lane;
  for (int warp = 0; warp < warps; ++warp) order[warp] = warp;
  bool skewed = random() % 2;
  for (bool moved = true; moved;) {
    moved = false;
    for (int warp : order) {
      std::shuffle(lanes.begin(), lanes.end(), random);
      for (int lane : lanes) {
        const int f = warp * 32 + lane;
        if (fibers[f].state != State::kReady) continue;
        running = f, threadIdx.x = f, moved = true;
        swapcontext(&scheduler, &fibers[f].context);
      }
      moved |= release(warp * 32, warp * 32 + 32, State::kAtWarp);
      if (moved && skewed) break;
    }
    if (moved || !release(0, threads, State::kAtBlock)) continue;
    moved = true, skewed = random() % 2;
    std::shuffle(order.begin(), order.end(), random);
  }
  for (const Fiber &fiber : fibers) {
    check(fiber.state == State::kDone, "threads wait for ever");
    check(fiber.copies.empty(), "asynchronous copies that nobody waited for");
  }
}

}  // namespace shim

// ---- threads -------------------------------------------------------------------------------------------------------

inline void __syncthreads() { shim::wait(shim::State::kAtBlock, 0); }
inline void __syncwarp() { shim::wait(shim::State::kAtWarp, 1); }

inline float shim_exchange(float value, int lane) {
  std::memcpy(&shim::fibers[shim::running].slot, &value, 4);
  shim::wait(shim::State::kAtWarp, 2);
  float other;
  std::memcpy(&other, &shim::fibers[shim::running / 32 * 32 + lane].slot, 4);
  shim::wait(shim::State::kAtWarp, 3);
  return other;
}
inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  shim::check(mask == 0xffffffffu, "a shuffle without all lanes");
  return shim_exchange(value, (threadIdx.x % 32) ^ lanes);
}
inline float __shfl_sync(unsigned mask, float value, int lane) {
  shim::check(mask == 0xffffffffu, "a shuffle without all lanes");
  return shim_exchange(value, lane);
}

template <typename V>
V __ldg(const V *pointer) {
  shim::check(shim::aligned(pointer, alignof(V)), "a misaligned load");
  return *pointer;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename V>
V atomicAdd(V *to, V value) {  // a fiber runs alone
  shim::check(shim::aligned(to, sizeof(V)), "a misaligned atomic");
  const V old = *to;
  *to = old + value;
  return old;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- runtime -------------------------------------------------------------------------------------------------------

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };

namespace {  // where the kernels' `extern __shared__ unsigned char shared[]` looks for it
alignas(128) unsigned char shared[shim::kMostShared + 4096];
}

inline const char *cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? shim::processors : shim::shared_limit;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute what, int value) {
  if (what == cudaFuncAttributeMaxDynamicSharedMemorySize) shim::asked_shared = value;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, F *, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

namespace shim {
template <typename... P, size_t... I>
void call(void (*kernel)(P...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P *>(arguments[I])...);
}
}  // namespace shim

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **arguments, size_t bytes, cudaStream_t) {
  static void (*launched)(P...);
  launched = kernel;
  shim::check(grid.x > 0 && block.x > 0 && block.x <= 1024, "a launch of no blocks, or of too many threads");
  shim::check(bytes <= static_cast<size_t>(std::min(shim::asked_shared, shim::shared_limit)), "too much shared memory");
  shim::body = [](void *all) { shim::call(launched, static_cast<void **>(all), std::index_sequence_for<P...>()); };
  shim::argument = arguments;
  gridDim = grid;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    std::memset(shared, shim::kPoison, bytes);
    std::memset(shared + bytes, shim::kGuard, sizeof(shared) - bytes);
    shim::run_block(block.x);
    const bool kept = std::all_of(shared + bytes, shared + sizeof(shared), [](auto b) { return b == shim::kGuard; });
    shim::check(kept, "something was written behind the shared memory");
  }
  shim::asked_shared = 48 * 1024;
  return cudaSuccess;
}

// For the tests: how many blocks run at once (one a processor), how much shared memory there is, and the order.
extern "C" __attribute__((visibility("default"))) inline void shim_configure(int processors, int limit, int seed) {
  shim::processors = processors, shim::shared_limit = limit;
  shim::random.seed(seed);
}
__attribute__((used)) inline void (*const shim_keeps)(int, int, int) = shim_configure;
