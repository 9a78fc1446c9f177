// align, Gram form, on the GPU: bfloat16 and float16 features, float tables and sums. Needs sm_80 or later.
// One launch a function for all stages; nothing is added atomically and every sum has a fixed order, so that two runs
// are bitwise equal on any number of multiprocessors. Nothing synchronises: each function can be captured in a graph.
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

// ---- 16-bit types --------------------------------------------------------------------------------------------------

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

// ---- row passes: shared memory -------------------------------------------------------------------------------------

// Byte offsets of a block's dynamic shared memory. Every part is a multiple of 32 bytes, as wmma wants.
//   sums     [kWarps][2] float       loss partials; in the same place for all stages, see row_pass
//   gram     [panel][2*C + kPad] T   the panel's columns of A, a column a row: hi, then lo; what a matrix instruction
//            takes in one register, two neighbours in depth, lies in one word
//   shift    [C + kExtra] float      u, and |b|^2 at C
//   tiles    [kWarps][kWarpTiles][16][16] float   A x, a warp's own; then dx as T, in its place
//   buffers  x [64][C + kPad] T, tokens [patch_tokens][P] float, taps [16]: one, or two where the next tile is fetched
//            while this one is computed
struct RowLayout {
  static constexpr int sums = 0, gram = 128;
  int gram_stride, x_stride, shift, tiles, buffer, tokens, taps, buffer_bytes;

  SSR_HD RowLayout(int channels, int panel, int patch_tokens) {
    gram_stride = 2 * channels + kPad;
    x_stride = channels + kPad;
    shift = gram + panel * gram_stride * 2;
    tiles = shift + (channels + kExtra) * 4;
    buffer = tiles + kWarps * kWarpTiles * kTile * kTile * 4;
    tokens = kPatchRows * x_stride * 2;
    taps = tokens + patch_tokens * (channels + kExtra) * 4;
    buffer_bytes = taps + 2 * kPatch * static_cast<int>(sizeof(Tap<float>));
  }

  SSR_HD int bytes(int buffers) const { return buffer + buffers * buffer_bytes; }
};

// Row r of a tile is this pixel of the patch. A warp has two rows of the patch, interleaved, so that its half-warps,
// each on one of them, read neighbouring rows of the product: no two on one bank.
struct Pixel {
  int i, j;
};
SSR_HD Pixel pixel_of(int r) { return {r / kTile * 2 + (r & 1), r % kTile / 2}; }

// The row that a lane finishes; of two neighbouring lanes the even one acts.
SSR_HD int own_row(int warp, int lane) { return warp * kTile + 2 * (lane % 16 / 2) + lane / 16; }

// Element number `thread`, `thread + kThreads`, ... of a matrix with `columns` columns, without a division a step.
struct Walk {
  int row, column, columns, row_step, column_step;

  SSR_HD Walk(int thread, int width)
      : row(thread / width), column(thread % width), columns(width), row_step(kThreads / width),
        column_step(kThreads % width) {}

  SSR_HD void advance() {
    row += row_step, column += column_step;
    if (column >= columns) column -= columns, ++row;
  }
};

// ---- row passes: loads ---------------------------------------------------------------------------------------------

// What the row that a lane finishes brings along; raw, so that nothing waits for it before it is used.
struct RowInput {
  unsigned valid;
  Row<float> row;
};

struct TileAt {
  int stage;
  Patch patch;
};

__device__ __forceinline__ TileAt locate(const Launch &launch, int tile) {
  const int s = stage_of(launch, tile);
  return {s, patch_at(tile - launch.stage[s].first, launch.stage[s].h, launch.stage[s].w)};
}

__device__ __forceinline__ int64_t first_pixel(const DeviceStage &stage, const Patch &patch) {
  return (int64_t(patch.image) * stage.h + patch.y) * stage.w + patch.x;
}

__device__ __forceinline__ void copy_vector(void *shared, const void *global, bool wanted) {
  __pipeline_memcpy_async(shared, global, kVector, wanted ? 0 : kVector);  // the unwanted is filled with zeros
}

// Starts the copies of a tile's x and tokens into `buffer`, writes its taps (as indices into the staged tokens), and
// loads what the lane's own row needs.
template <typename T, bool kBackward>
__device__ __forceinline__ RowInput fetch(const Launch &launch, const TileAt &at, const RowLayout &layout,
                                          unsigned char *buffer) {
  const DeviceStage &stage = launch.stage[at.stage];
  const int rows = min(kPatch, stage.h - at.patch.y), columns = min(kPatch, stage.w - at.patch.x);
  const int64_t origin = first_pixel(stage, at.patch);

  const T *x = static_cast<const T *>(stage.x) + origin * stage.channels;
  T *shared_x = reinterpret_cast<T *>(buffer);
  for (Walk at_x(threadIdx.x, stage.channels / 8); at_x.row < kPatchRows; at_x.advance()) {
    const Pixel pixel = pixel_of(at_x.row);
    const bool inside = pixel.i < rows && pixel.j < columns;
    const int64_t offset = inside ? (int64_t(pixel.i) * stage.w + pixel.j) * stage.channels : 0;
    copy_vector(shared_x + at_x.row * layout.x_stride + at_x.column * 8, x + offset + at_x.column * 8, inside);
  }

  // the tokens of one row of the grid lie behind one another
  const Span down = coarse_span<float>(at.patch.y, stage.h, launch.hs);
  const Span across = coarse_span<float>(at.patch.x, stage.w, launch.ws);
  const int table = stage.channels + kExtra, width = (across.end - across.begin) * table;
  const float *tokens =
      stage.tokens + ((int64_t(at.patch.image) * launch.hs + down.begin) * launch.ws + across.begin) * table;
  float *shared_tokens = reinterpret_cast<float *>(buffer + layout.tokens);
  for (Walk at_token(threadIdx.x, width / 4); at_token.row < down.end - down.begin; at_token.advance())
    copy_vector(shared_tokens + at_token.row * width + at_token.column * 4,
                tokens + int64_t(at_token.row) * launch.ws * table + at_token.column * 4, true);
  __pipeline_commit();

  if (threadIdx.x < 2 * kPatch) {
    const int k = threadIdx.x % kPatch;
    const bool vertical = threadIdx.x < kPatch;
    // pixels outside of the grid take the taps of the last one inside
    Tap<float> own = vertical ? tap<float>(at.patch.y + min(k, rows - 1), stage.h, launch.hs)
                              : tap<float>(at.patch.x + min(k, columns - 1), stage.w, launch.ws);
    const int begin = vertical ? down.begin : across.begin, stride = vertical ? width : table;
    own.low = (own.low - begin) * stride, own.high = (own.high - begin) * stride;
    reinterpret_cast<Tap<float> *>(buffer + layout.taps)[threadIdx.x] = own;
  }

  RowInput input = {0, {0, 0, 0}};
  const Pixel pixel = pixel_of(own_row(threadIdx.x / 32, threadIdx.x % 32));
  if (pixel.i < rows && pixel.j < columns) {
    const int64_t n = origin + int64_t(pixel.i) * stage.w + pixel.j;
    if (launch.valid_kind == kValidByte) input.valid = static_cast<const unsigned char *>(stage.valid)[n];
    if (launch.valid_kind == kValidFloat) input.valid = static_cast<const unsigned *>(stage.valid)[n];
    if constexpr (kBackward) {
      const float *row = launch.rows + stage.row0 + n;
      input.row = {row[0], row[launch.total], row[2 * launch.total]};
    }
  }
  return input;
}

__device__ __forceinline__ float valid_of(const RowInput &input, int kind) {
  if (kind == kValidByte) return static_cast<float>(input.valid);
  return kind == kValidFloat ? __uint_as_float(input.valid) : 1.f;
}

// The power of two that brings A into float16's range: A is positive semi-definite, so its largest entry is on its
// diagonal. With the largest at 2^14, hi + lo holds any entry to 2^-22 of itself or 2^-39 of the largest.
__device__ __forceinline__ float gram_scale(const DeviceStage &stage) {
  float largest = 0;
  for (int c = threadIdx.x % 32; c < stage.channels; c += 32)
    largest = fmaxf(largest, stage.gram[int64_t(c) * (stage.channels + kExtra + 1)]);
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (!(largest > 0 && largest < 1e38f)) return 1;
  return ldexpf(1.f, max(-100, min(100, 14 - ilogbf(largest))));
}

// Columns first .. first+count-1 of A as hi + lo, and (u, |b|^2). Returns what a product must be multiplied by.
template <typename T>
__device__ __forceinline__ float load_gram(const DeviceStage &stage, const RowLayout &layout, int first, int count,
                                           unsigned char *shared) {
  const int columns = stage.channels + kExtra;
  const float scale = Half<T>::kScaled ? gram_scale(stage) : 1.f;
  T *gram = reinterpret_cast<T *>(shared + RowLayout::gram);
  for (Walk at(threadIdx.x, stage.channels); at.row < count; at.advance()) {  // A is symmetric: rows for columns
    const float value = scale * stage.gram[int64_t(first + at.row) * columns + at.column];
    const T high = Half<T>::narrow(value);
    T *row = gram + at.row * layout.gram_stride + at.column;
    row[0] = high;
    row[stage.channels] = Half<T>::narrow(value - Half<T>::widen(high));
  }
  float *shift = reinterpret_cast<float *>(shared + layout.shift);
  for (int c = threadIdx.x; c <= stage.channels; c += kThreads)
    shift[c] = stage.gram[int64_t(stage.channels) * columns + c];
  return 1.f / scale;
}

// ---- row passes: products and rows ---------------------------------------------------------------------------------

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

// ---- adjoint -------------------------------------------------------------------------------------------------------

// A block's tokens: a patch of the coarse grid, nearly square, so that the fine rows that its tokens share come from
// the first-level cache. C/8 threads a token.
SSR_HD void adjoint_patch(int channels, int *tokens_y, int *tokens_x) {
  const int slots = kThreads / (channels / 8);
  int down = 1;
  while (4 * down * down <= slots) down *= 2;
  *tokens_y = down, *tokens_x = slots / down;
}

SSR_HD int divide_up(int a, int b) { return (a + b - 1) / b; }

// The fine indices that the coarse indices first .. first+count-1 (inside the grid) touch.
SSR_HD Span fine_span(int first, int count, int fine, int coarse) {
  const int last = first + count - 1 < coarse ? first + count - 1 : coarse - 1;
  return {footprint<float>(first, fine, coarse).begin, footprint<float>(last, fine, coarse).end};
}

// weight_x[t * strip_width + j]: weight of the block's token column t in fine column across.begin + j
__device__ __forceinline__ void fill_weights(const Launch &launch, const DeviceStage &stage, int first_x, Span across,
                                             float *weight_x) {
  const int width = across.end - across.begin;
  for (int e = threadIdx.x; e < stage.tokens_x * width; e += kThreads) {
    const int t = e / width, j = e - t * width;
    const float weight = tap_weight<float>(across.begin + j, stage.w, launch.ws, first_x + t);
    weight_x[t * stage.strip_width + j] = weight;
  }
}

// r of the fine rows begin .. end-1 in the columns `across`; `pixel` is the image's first.
__device__ __forceinline__ void fill_coefficients(const Launch &launch, const DeviceStage &stage, int64_t pixel,
                                                  int begin, int end, Span across, float *coefficient) {
  const int width = across.end - across.begin;
  const float upstream = -launch.grad[0] * launch.scale[stage.index];
  for (int e = threadIdx.x; e < (end - begin) * width; e += kThreads) {
    const int i = e / width, j = e - i * width;
    const int64_t n = pixel + int64_t(begin + i) * stage.w + across.begin + j;
    const float *row = launch.rows + stage.row0 + n;
    const float a = upstream * valid_at<float>(stage.valid, launch.valid_kind, n);
    const RowGradient<float> gradient = row_gradient(a, {row[0], row[launch.total], row[2 * launch.total]});
    coefficient[i * stage.strip_width + j] = gradient.target;
  }
}

// sum[0..7] += weight * x[0..7]
template <typename T>
__device__ __forceinline__ void add_vector(uint4 vector, float weight, float (&sum)[8]) {
  const T *x = reinterpret_cast<const T *>(&vector);
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] += weight * Half<T>::widen(x[c]);
}

// A block owns a patch of tokens of one stage, a thread 8 channels of a token, whose fine pixels it adds up in raster
// order. Registers: 9 sums. Shared: r of the patch's fine pixels (a strip of rows at a time), the columns' weights.
// Moves: x once from memory (a pixel's up to four tokens share it in the caches), 12 bytes a row, y once.
template <typename T>
__global__ void __launch_bounds__(kThreads, kAdjointBlocks) adjoint_pass(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) unsigned char shared[];
  const DeviceStage &stage = launch.stage[stage_of(launch, blockIdx.x)];
  const int down_blocks = divide_up(launch.hs, stage.tokens_y), across_blocks = divide_up(launch.ws, stage.tokens_x);
  const int block = blockIdx.x - stage.first, image = block / (down_blocks * across_blocks);
  const int rest = block - image * down_blocks * across_blocks;
  const int first_y = rest / across_blocks * stage.tokens_y, first_x = rest % across_blocks * stage.tokens_x;

  const int group = stage.channels / 8, slot = threadIdx.x / group, chunk = threadIdx.x % group;
  const int t = slot % stage.tokens_x, y = first_y + slot / stage.tokens_x, x = first_x + t;
  const bool active = slot < stage.tokens_y * stage.tokens_x && y < launch.hs && x < launch.ws;
  const Span down = fine_span(first_y, stage.tokens_y, stage.h, launch.hs);
  const Span across = fine_span(first_x, stage.tokens_x, stage.w, launch.ws);
  Span own_y = {0, 0}, own_x = {0, 0};
  if (active) own_y = footprint<float>(y, stage.h, launch.hs), own_x = footprint<float>(x, stage.w, launch.ws);

  float *weight_x = reinterpret_cast<float *>(shared);
  float *coefficient = weight_x + stage.tokens_x * stage.strip_width;
  const int64_t pixel = int64_t(image) * stage.h * stage.w;
  const T *features = static_cast<const T *>(stage.x) + pixel * stage.channels + chunk * 8;
  fill_weights(launch, stage, first_x, across, weight_x);

  float sum[8] = {}, mass = 0;
  for (int begin = down.begin; begin < down.end; begin += stage.strip_rows) {
    const int end = min(begin + stage.strip_rows, down.end);
    if (begin > down.begin) __syncthreads();  // the last strip has been used
    fill_coefficients(launch, stage, pixel, begin, end, across, coefficient);
    __syncthreads();
    for (int i = max(begin, own_y.begin); i < min(end, own_y.end); ++i) {
      const float weight_y = tap_weight<float>(i, stage.h, launch.hs, y);
      const float *r = coefficient + (i - begin) * stage.strip_width - across.begin;
      const float *weight = weight_x + t * stage.strip_width - across.begin;
      const T *row = features + int64_t(i) * stage.w * stage.channels;
#pragma unroll 4
      for (int j = own_x.begin; j < own_x.end; ++j) {
        const float factor = weight_y * weight[j] * r[j];
        add_vector<T>(__ldg(reinterpret_cast<const uint4 *>(row + int64_t(j) * stage.channels)), factor, sum);
        mass += factor;
      }
    }
  }
  if (!active) return;
  const int64_t token = (int64_t(image) * launch.hs + y) * launch.ws + x;
  float *out = stage.y + token * (stage.channels + kExtra);
  float4 *vectors = reinterpret_cast<float4 *>(out + chunk * 8);
  vectors[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  vectors[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  if (chunk == 0) out[stage.channels] = mass;
}

// ---- host ----------------------------------------------------------------------------------------------------------

bool misaligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVector != 0; }

bool invalid_stage(const SsrAlignStage &stage, int hs, int ws) {
  return stage.channels % kTile != 0 || stage.channels > kMaxChannels || stage.h < hs || stage.w < ws ||
         misaligned(stage.x) || misaligned(stage.tokens) || misaligned(stage.gram) || misaligned(stage.dx) ||
         misaligned(stage.y);
}

// Fills all but what the two kinds of kernels choose for themselves (first, blocks, shapes).
int describe(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int valid_kind, int64_t total,
             Launch *launch) {
  if (invalid_call(stages, count, batch, hs, ws, valid_kind) || valid_kind == kValidDouble) return kInvalidValue;
  *launch = {};
  launch->count = count, launch->batch = batch, launch->hs = hs, launch->ws = ws;
  launch->valid_kind = valid_kind, launch->total = total;
  for (int s = 0; s < count; ++s) {
    const SsrAlignStage &from = stages[s];
    if (invalid_stage(from, hs, ws)) return kInvalidValue;
    DeviceStage &to = launch->stage[s];
    to.x = from.x, to.valid = from.valid, to.dx = from.dx, to.y = static_cast<float *>(from.y);
    to.tokens = static_cast<const float *>(from.tokens), to.gram = static_cast<const float *>(from.gram);
    to.row0 = from.row0, to.tile0 = from.tile0;
    to.h = from.h, to.w = from.w, to.channels = from.channels, to.index = from.index;
  }
  return kSuccess;
}

// Adds `more` blocks of stage s; false if a launch cannot hold them.
bool add_blocks(Launch *launch, int s, int64_t more) {
  launch->stage[s].first = launch->blocks;
  if (more > INT32_MAX / 2 - launch->blocks) return false;
  launch->blocks += static_cast<int>(more);
  return true;
}

// The most tokens that an 8x8 patch of the fine grid touches along one axis.
int longest_span(int fine, int coarse) {
  int longest = 0;
  for (int first = 0; first < fine; first += kPatch) {
    const Span span = coarse_span<float>(first, fine, coarse);
    longest = span.end - span.begin > longest ? span.end - span.begin : longest;
  }
  return longest;
}

// The widest panel of A with which a stage's block fits the shared memory: all of A where possible, so that a block
// loads it once. Returns the bytes, or 0 if even 32 columns do not fit.
int choose_panel(DeviceStage *stage, int limit) {
  for (int parts = 1;; ++parts) {
    const int even = divide_up(divide_up(stage->channels, parts), kColumns) * kColumns;
    stage->panel = even < stage->channels ? even : stage->channels;
    const int bytes = RowLayout(stage->channels, stage->panel, stage->patch_tokens).bytes(1);
    if (bytes <= limit) return bytes;
    if (stage->panel <= kColumns) return 0;
  }
}

// Shapes of the row passes; *shared is what the stage that needs most needs.
int shape_rows(Launch *launch, int limit, int *shared) {
  *shared = 0;
  for (int s = 0; s < launch->count; ++s) {
    DeviceStage &stage = launch->stage[s];
    if (!add_blocks(launch, s, tiles(launch->batch, stage.h, stage.w))) return kInvalidValue;
    stage.patch_tokens = longest_span(stage.h, launch->hs) * longest_span(stage.w, launch->ws);
    const int bytes = choose_panel(&stage, limit);
    if (bytes == 0) return kInvalidValue;
    *shared = bytes > *shared ? bytes : *shared;
  }
  for (int s = 0; s < launch->count; ++s) {  // a second buffer costs nothing where another stage needs the memory
    DeviceStage &stage = launch->stage[s];
    const RowLayout layout(stage.channels, stage.panel, stage.patch_tokens);
    stage.buffers = stage.panel == stage.channels && layout.bytes(2) <= *shared ? 2 : 1;
  }
  return kSuccess;
}

// Shapes of the adjoint.
int shape_adjoint(Launch *launch, int limit, int *shared) {
  *shared = 0;
  for (int s = 0; s < launch->count; ++s) {
    DeviceStage &stage = launch->stage[s];
    adjoint_patch(stage.channels, &stage.tokens_y, &stage.tokens_x);
    const int down = divide_up(launch->hs, stage.tokens_y), across = divide_up(launch->ws, stage.tokens_x);
    if (!add_blocks(launch, s, int64_t(launch->batch) * down * across)) return kInvalidValue;
    int height = 1;
    for (int y = 0; y < launch->hs; y += stage.tokens_y) {
      const Span span = fine_span(y, stage.tokens_y, stage.h, launch->hs);
      height = span.end - span.begin > height ? span.end - span.begin : height;
    }
    for (int x = 0; x < launch->ws; x += stage.tokens_x) {
      const Span span = fine_span(x, stage.tokens_x, stage.w, launch->ws);
      stage.strip_width = span.end - span.begin > stage.strip_width ? span.end - span.begin : stage.strip_width;
    }
    if (stage.strip_width > limit / 16) return kInvalidValue;  // far beyond any grid; what follows fits an int
    const int held = kStripBytes / 4 / stage.strip_width;
    stage.strip_rows = held < 1 ? 1 : held < height ? held : height;
    const int bytes = (stage.tokens_x + stage.strip_rows) * stage.strip_width * 4;
    if (bytes > limit) return kInvalidValue;
    *shared = bytes > *shared ? bytes : *shared;
  }
  return kSuccess;
}

struct Device {
  int processors, shared_limit;
};

cudaError_t this_device(Device *device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  return error;
}

using Kernel = void (*)(Launch);

// Launches `kernel` with one block a tile, or with as many as run at once where blocks loop over tiles.
cudaError_t start(Kernel kernel, const Launch &launch, const Device &device, bool loops, int shared, void *stream) {
  cudaError_t error = cudaSuccess;
  if (shared > kStaticLimit)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  int grid = launch.blocks, resident = 0;
  if (error == cudaSuccess && loops) {
    constexpr int most_shared = cudaSharedmemCarveoutMaxShared;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, most_shared);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared);
    const int most = device.processors * (resident > 1 ? resident : 1);
    grid = grid < most ? grid : most;
  }
  if (error == cudaSuccess) {
    Launch parameters = launch;
    void *arguments[] = {&parameters};
    error = cudaLaunchKernel(kernel, dim3(grid), dim3(kThreads), arguments, shared, static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next check of this runtime would report it again
  return error;
}

using Shape = int (*)(Launch *, int, int *);

int run(Launch *launch, Shape shape, Kernel kernel, bool loops, void *stream) {
  Device device = {};
  int shared = 0;
  if (const cudaError_t error = this_device(&device)) return error;
  if (const int error = shape(launch, device.shared_limit, &shared)) return error;
  if (launch->blocks == 0) return kSuccess;
  return start(kernel, *launch, device, loops, shared, stream);
}

}  // namespace

SSR_EXPORT int ssr_align_gram_rows(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                   int valid_kind, void *rows, int64_t total, void *partial, void *stream) {
  Launch launch;
  if (const int error = describe(stages, count, batch, hs, ws, valid_kind, total, &launch)) return error;
  launch.rows = static_cast<float *>(rows), launch.partial = static_cast<float *>(partial);
  if (dtype == kBfloat16) return run(&launch, shape_rows, row_pass<__nv_bfloat16, false>, true, stream);
  if (dtype == kFloat16) return run(&launch, shape_rows, row_pass<__half, false>, true, stream);
  return kInvalidValue;
}

SSR_EXPORT int ssr_align_gram_dx(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                 int valid_kind, const void *grad, const void *scale, const void *rows, int64_t total,
                                 void *stream) {
  Launch launch;
  if (const int error = describe(stages, count, batch, hs, ws, valid_kind, total, &launch)) return error;
  launch.grad = static_cast<const float *>(grad), launch.scale = static_cast<const float *>(scale);
  launch.rows = static_cast<float *>(const_cast<void *>(rows));  // this pass only reads them
  if (dtype == kBfloat16) return run(&launch, shape_rows, row_pass<__nv_bfloat16, true>, true, stream);
  if (dtype == kFloat16) return run(&launch, shape_rows, row_pass<__half, true>, true, stream);
  return kInvalidValue;
}

SSR_EXPORT int ssr_align_gram_adjoint(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                      int valid_kind, const void *grad, const void *scale, const void *rows,
                                      int64_t total, void *stream) {
  Launch launch;
  if (const int error = describe(stages, count, batch, hs, ws, valid_kind, total, &launch)) return error;
  launch.grad = static_cast<const float *>(grad), launch.scale = static_cast<const float *>(scale);
  launch.rows = static_cast<float *>(const_cast<void *>(rows));  // this pass only reads them
  if (dtype == kBfloat16) return run(&launch, shape_adjoint, adjoint_pass<__nv_bfloat16>, false, stream);
  if (dtype == kFloat16) return run(&launch, shape_adjoint, adjoint_pass<__half>, false, stream);
  return kInvalidValue;
}

SSR_EXPORT const char *ssr_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
