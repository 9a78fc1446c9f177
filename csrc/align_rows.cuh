// The row passes of align: products on the matrix units, the rows that lanes finish, and the kernel.
#pragma once

#include "align_tiles.cuh"

namespace {

// tiles[t] = rows of x times the columns first+16t .. first+16t+15 of the panel, t < kWarpTiles; scaled like A.
// Columns behind the panel's last are not read: the last tile is repeated and its second copy never used.
template <typename T>
__device__ __forceinline__ void multiply(const T *x, int x_stride, const T *gram, int gram_stride, int channels,
                                         int first, int width, float *tiles) {
  wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> sum[kWarpTiles];
  int column[kWarpTiles];
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
    wmma::fill_fragment(sum[t], 0.f);
    column[t] = min(first + t * kTile, width - kTile);
  }
#pragma unroll 2
  for (int k = 0; k < channels; k += kTile) {
    wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::row_major> rows;
    wmma::load_matrix_sync(rows, x + k, x_stride);
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::col_major> columns;
      wmma::load_matrix_sync(columns, gram + column[t] * gram_stride + k, gram_stride);
      wmma::mma_sync(sum[t], rows, columns, sum[t]);
      wmma::load_matrix_sync(columns, gram + column[t] * gram_stride + channels + k, gram_stride);
      wmma::mma_sync(sum[t], rows, columns, sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t)
    wmma::store_matrix_sync(tiles + t * kTile * kTile, sum[t], kTile, wmma::mem_row_major);
}

// values[j], j < 8, summed over the 16 lanes of a half-warp: lane l gets the sum of values[l % 16 / 2].
__device__ __forceinline__ float sum_halves(float (&values)[kHalf], int lane) {
#pragma unroll
  for (int kept = kHalf / 2; kept; kept /= 2) {
    const bool upper = lane & 2 * kept;
#pragma unroll
    for (int j = 0; j < kept; ++j) {
      const float mine = upper ? values[j + kept] : values[j], other = upper ? values[j] : values[j + kept];
      values[j] = mine + __shfl_xor_sync(0xffffffffu, other, 2 * kept);
    }
  }
  return values[0] + __shfl_xor_sync(0xffffffffu, values[0], 1);
}

// What a lane knows of its row of the patch while it walks along its 8 pixels.
struct Strip {
  float upper, lower;   // weights of the two token rows
  int above, below;     // their offsets in the staged tokens
  unsigned fresh;       // bit j: pixel j lies between other token columns than pixel j-1
  float right[kHalf];   // weight of the right one of pixel j's two token columns
};

__device__ __forceinline__ Strip strip_of(const Tap<float> *taps, int i) {
  Strip strip = {taps[i].weight0, taps[i].weight1, taps[i].low, taps[i].high, 0, {}};
  int column = -1;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const Tap<float> tap = taps[kPatch + j];
    strip.right[j] = tap.weight1;
    strip.fresh |= (tap.low != column ? 1u : 0u) << j;
    column = tap.low;
  }
  return strip;
}

// interp(T W) of one channel at pixel j; `tokens` is at the channel's column. left and right carry the two token
// columns from pixel to pixel: the branch is the same for all lanes of a warp, and rarely taken on a fine grid.
__device__ __forceinline__ float interpolated(const Strip &strip, const Tap<float> *taps, const float *tokens, int j,
                                              float &left, float &right) {
  if (strip.fresh >> j & 1) {
    const Tap<float> tap = taps[kPatch + j];
    left = strip.upper * tokens[strip.above + tap.low] + strip.lower * tokens[strip.below + tap.low];
    right = strip.upper * tokens[strip.above + tap.high] + strip.lower * tokens[strip.below + tap.high];
  }
  return (1.f - strip.right[j]) * left + strip.right[j] * right;
}

// q and p.t of a lane's 8 pixels: adds the channel `column`.
template <typename T>
__device__ __forceinline__ void add_channel(const Strip &strip, const Tap<float> *taps, const float *tokens,
                                            const T *x, int x_stride, const float *product, float unscale, float shift,
                                            float (&q)[kHalf], float (&pt)[kHalf]) {
  float left = 0, right = 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float value = Half<T>::widen(x[2 * j * x_stride]);
    q[j] += value * (unscale * product[2 * j * kTile] + 2.f * shift);
    pt[j] += value * interpolated(strip, taps, tokens, j, left, right);
  }
}

// dx of a lane's 8 pixels in one channel; overwrites the warp's tile of products with its tile of dx.
template <typename T>
__device__ __forceinline__ void dx_channel(const Strip &strip, const Tap<float> *taps, const float *tokens,
                                           const RowGradient<float> (&gradient)[kHalf], float *tile, int half, int c,
                                           float unscale, float shift) {
  float product[kHalf], left = 0, right = 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) product[j] = unscale * tile[(2 * j + half) * kTile + c] + shift;
  __syncwarp();  // the tile has been read by all lanes
  T *out = reinterpret_cast<T *>(tile);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float value = interpolated(strip, taps, tokens, j, left, right);
    out[(2 * j + half) * kTile + c] = Half<T>::narrow(dx_element(gradient[j], value, product[j]));
  }
}

// The warp's tiles of dx, 16 bytes a lane: 64 bytes of a row by neighbouring lanes. `dx` is at the patch's first pixel
// and at the first tile's column.
template <typename T>
__device__ __forceinline__ void store_dx(const DeviceStage &stage, const Patch &patch, const float *tiles, int count,
                                         int warp, int lane, T *dx) {
  const int parts = 2 * count;  // of a row
  __syncwarp();
  for (int v = lane; v < kTile * parts; v += 32) {
    const int r = v / parts, part = v % parts;
    const Pixel pixel = pixel_of(warp * kTile + r);
    if (patch.y + pixel.i >= stage.h || patch.x + pixel.j >= stage.w) continue;
    const T *tile = reinterpret_cast<const T *>(tiles + part / 2 * kTile * kTile);
    const int64_t offset = (int64_t(pixel.i) * stage.w + pixel.j) * stage.channels + part * 8;
    *reinterpret_cast<uint4 *>(dx + offset) = *reinterpret_cast<const uint4 *>(tile + r * kTile + part % 2 * 8);
  }
}

// cos, 1/|p| and 1/|t| of the lane's own row, and the warp's part of the loss.
__device__ __forceinline__ void finish(const Launch &launch, const TileAt &at, const RowInput &input,
                                       const Tap<float> *taps, const float *tokens, float q, float pt, float *sums) {
  const DeviceStage &stage = launch.stage[at.stage];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Pixel pixel = pixel_of(own_row(warp, lane));
  float distance = 0, mass = 0;
  if (lane % 2 == 0 && at.patch.y + pixel.i < stage.h && at.patch.x + pixel.j < stage.w) {
    const Tap<float> y = taps[pixel.i], x = taps[kPatch + pixel.j];
    const float *extra = tokens + stage.channels;
    const float *t00 = extra + y.low + x.low, *t01 = extra + y.low + x.high;
    const float *t10 = extra + y.high + x.low, *t11 = extra + y.high + x.high;
    const Row<float> row = finish_row(q, pt + resample<float>(y, x, *t00, *t01, *t10, *t11),
                                      target_square<float>(y, x, t00, t01, t10, t11));
    float *out = launch.rows + stage.row0 + first_pixel(stage, at.patch) + int64_t(pixel.i) * stage.w + pixel.j;
    out[0] = row.cosine, out[launch.total] = row.inverse_p, out[2 * launch.total] = row.inverse_t;
    const float valid = valid_of(input, launch.valid_kind);
    if (valid != 0) distance = valid * (1.f - row.cosine), mass = valid;
  }
  for (int step = 16; step; step /= 2) {
    distance += __shfl_xor_sync(0xffffffffu, distance, step);
    mass += __shfl_xor_sync(0xffffffffu, mass, step);
  }
  if (lane == 0) sums[2 * warp] = distance, sums[2 * warp + 1] = mass;
}

// A block owns one 8x8 patch of one stage at a time, a warp 16 of its rows: a lane, one channel of 8 pixels at a time.
// Registers: products of 16 rows x 32 channels, q and p.t (forward). Shared: A (hi + lo, all or a panel), x, tokens.
// Moves, of a patch: 64 rows of x, its tokens (from L2), 12 bytes a row of cos, 1/|p|, 1/|t|; backward also writes dx.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads, kRowBlocks) row_pass(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 16, half = lane / 16;
  int loaded_stage = -1, loaded_panel = -1, current = 0;
  bool fetched = false;
  float unscale = 1;
  RowInput input;
  for (int tile = blockIdx.x; tile < launch.blocks; tile += gridDim.x) {
    const TileAt at = locate(launch, tile);
    const DeviceStage &stage = launch.stage[at.stage];
    const RowLayout layout(stage.channels, stage.panel, stage.patch_tokens);
    const int channels = stage.channels;
    unsigned char *buffer = shared + layout.buffer + current * layout.buffer_bytes;
    const T *x = reinterpret_cast<const T *>(buffer) + warp * kTile * layout.x_stride;
    const float *tokens = reinterpret_cast<const float *>(buffer + layout.tokens);
    const Tap<float> *taps = reinterpret_cast<const Tap<float> *>(buffer + layout.taps);
    const float *shift = reinterpret_cast<const float *>(shared + layout.shift);
    float *tiles = reinterpret_cast<float *>(shared + layout.tiles) + warp * kWarpTiles * kTile * kTile;

    // all warps are past the barrier at the end of the last tile: nothing in shared memory is in use
    if (!fetched) input = fetch<T, kBackward>(launch, at, layout, buffer);

    RowInput next_input = {0, {0, 0, 0}};
    RowGradient<float> gradient[kHalf];
    float q[kHalf] = {}, pt[kHalf] = {};
    if constexpr (kBackward) {
      const float a = -launch.grad[0] * launch.scale[stage.index] * valid_of(input, launch.valid_kind);
      const RowGradient<float> own = row_gradient(a, input.row);
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {  // pixel j of this half-warp is finished by its lane 2j
        gradient[j].target = __shfl_sync(0xffffffffu, own.target, half * 16 + 2 * j);
        gradient[j].own = __shfl_sync(0xffffffffu, own.own, half * 16 + 2 * j);
      }
    }
    Strip strip;
    for (int first = 0; first < channels; first += stage.panel) {
      const int width = min(stage.panel, channels - first);
      if (first > 0) __syncthreads();  // the last panel has been used
      if (loaded_stage != at.stage || loaded_panel != first) {
        unscale = load_gram<T>(stage, layout, first, width, shared);
        loaded_stage = at.stage, loaded_panel = first;
      }
      if (first == 0) __pipeline_wait_prior(0);
      __syncthreads();
      if (first == 0) {
        // the other buffer was last read before the barrier at the end of the last tile
        const TileAt next = locate(launch, min(tile + static_cast<int>(gridDim.x), launch.blocks - 1));
        fetched = stage.buffers == 2 && next.stage == at.stage && tile + static_cast<int>(gridDim.x) < launch.blocks;
        if (fetched)
          next_input = fetch<T, kBackward>(launch, next, layout,
                                           shared + layout.buffer + (1 - current) * layout.buffer_bytes);
        strip = strip_of(taps, 2 * warp + half);
      }
      for (int n = 0; n < width; n += kColumns) {
        const int count = min(kWarpTiles, (width - n) / kTile);
        multiply(x, layout.x_stride, reinterpret_cast<const T *>(shared + RowLayout::gram), layout.gram_stride,
                 channels, n, width, tiles);
        __syncwarp();
        for (int t = 0; t < count; ++t) {
          const int column = first + n + t * kTile + c;
          if constexpr (kBackward)
            dx_channel<T>(strip, taps, tokens + column, gradient, tiles + t * kTile * kTile, half, c, unscale,
                          shift[column]);
          else
            add_channel<T>(strip, taps, tokens + column, x + half * layout.x_stride + column, layout.x_stride,
                           tiles + t * kTile * kTile + half * kTile + c, unscale, shift[column], q, pt);
        }
        if constexpr (kBackward)
          store_dx(stage, at.patch, tiles, count, warp, lane,
                   static_cast<T *>(stage.dx) + first_pixel(stage, at.patch) * channels + first + n);
        __syncwarp();  // the tiles may be written again
      }
    }
    float *sums = reinterpret_cast<float *>(shared + layout.sums);
    if constexpr (!kBackward)
      finish(launch, at, input, taps, tokens, sum_halves(q, lane) + shift[channels], sum_halves(pt, lane), sums);
    __syncthreads();
    if constexpr (!kBackward) {
      if (threadIdx.x < 2) {  // sums is written again only behind the next tile's first barrier
        const float *part = sums + threadIdx.x;
        const int64_t entry = (stage.tile0 + tile - stage.first) * 2 + threadIdx.x;
        launch.partial[entry] = (part[0] + part[2]) + (part[4] + part[6]);
      }
    }
    current = fetched ? 1 - current : 0;
    input = next_input;
  }
}

}  // namespace
