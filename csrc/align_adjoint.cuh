// The adjoint resampling of align, in gather form.
#pragma once

#include "align_device.cuh"

namespace {

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

}  // namespace
