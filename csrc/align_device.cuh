// What the CUDA kernels of align share: constants with their reasons, what a launch knows, 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>

#include "align.h"

namespace {

using namespace ssr_align;
namespace wmma = nvcuda::wmma;

constexpr int kWarps = 4;                  // a patch of 64 rows is 4 tiles of 16 rows, one a warp
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;                  // rows, columns and depth of a wmma tile of 16-bit types
constexpr int kWarpTiles = 2;              // column tiles that a warp multiplies at once, sharing the rows' fragment
constexpr int kColumns = kTile * kWarpTiles;
constexpr int kHalf = 8;                   // the pixels that a lane walks along: one row of the patch
constexpr int kVector = 16;                // bytes of a load or store
constexpr int kPad = 8;                    // elements behind each row of a shared matrix: rows start 4 banks apart
constexpr int kMaxChannels = 240;          // the Gram form is chosen below 256
constexpr int kRowBlocks = 3;              // blocks an SM of the row passes: 168 registers a thread, none is spilled
constexpr int kAdjointBlocks = 5;          // blocks an SM of the adjoint: 96 registers a thread, none is spilled
constexpr int kStaticLimit = 48 * 1024;    // dynamic shared memory above it must be asked for
constexpr int kStripBytes = 16 * 1024;     // coefficients that a block of the adjoint holds at once, where rows allow

// What a launch knows of a stage. `first` is the stage's first tile (of the row passes) or block (of the adjoint).
struct DeviceStage {
  const void *x, *valid;
  const float *tokens, *gram;
  void *dx;
  float *y;
  int64_t row0, tile0;
  int h, w, channels, index, first;
  int panel, patch_tokens, buffers;           // row passes: see RowLayout
  int tokens_y, tokens_x, strip_width, strip_rows;  // adjoint: see AdjointShape
};

struct Launch {
  DeviceStage stage[kMaxStages];
  int count, blocks, batch, hs, ws, valid_kind;
  int64_t total;
  const float *grad, *scale;
  float *rows, *partial;
};

SSR_HD int stage_of(const Launch &launch, int block) {
  int s = 0;
  while (s + 1 < launch.count && block >= launch.stage[s + 1].first) ++s;
  return s;
}

template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr bool kScaled = false;  // has float's range
  static __device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  static __device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
};

template <>
struct Half<__half> {
  static constexpr bool kScaled = true;  // A is brought to float16's range by a power of two
  static __device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float widen(__half value) { return __half2float(value); }
};

}  // namespace
