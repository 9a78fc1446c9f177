// The row passes of align: layout of the shared memory, and what is loaded into it.
#pragma once

#include "align_device.cuh"

namespace {

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

}  // namespace
