// contrast: which pixels a step contrasts. The draw is defined here, for the CPU library and the CUDA kernels alike.
//
// Of each image the K largest segments are taken (of equal ones the lower id), and of each segment the A pixels with
// the smallest (draw, pixel). A draw is 22 bits of a counter-based hash of (key, image, pixel): the same on every
// device, so that all backends return the same samples bit for bit.
#pragma once

#include <cstdint>

#include "ssr.h"

namespace ssr_contrast {

constexpr int kIds = 65536;         // a segment's id lies in 1 .. kIds - 1; any other pixel is in no segment
constexpr int kMaxSegments = 1023;  // a rank and the mark of no segment fit 10 bits
constexpr int kMaxPixels = 1024;    // samples of a segment: threads of a block
constexpr int kDrawBits = 22;

enum Error { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2 };

// The mixer of kernels/ssr_kernels/counter.py ("lowbias32").
SSR_HD uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

SSR_HD uint32_t fold(uint32_t key, uint32_t value) { return mix(mix(key) + 0x9E3779B9u + value); }

SSR_HD uint32_t draw(uint32_t image_key, uint32_t pixel) {
  return mix(mix(pixel * 0x9E3779B9u) ^ image_key) >> (32 - kDrawBits);
}

SSR_HD bool is_segment(int32_t id) { return id > 0 && id < kIds; }

// What pixels of one image are ordered by: rank (kMaxSegments at most), draw.
SSR_HD uint32_t order_key(uint32_t rank, uint32_t draw) { return rank << kDrawBits | draw; }

inline bool invalid_call(int batch, int64_t pixels, int segments, int samples) {
  return batch < 0 || pixels < 0 || pixels > INT32_MAX || segments < 1 || segments > kMaxSegments || samples < 1 ||
         samples > kMaxPixels;
}

}  // namespace ssr_contrast
