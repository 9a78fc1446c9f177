// wmma tiles of 16x16x16 with float sums. A lane holds one row's 8 sums, and of the factors what these need; a load or
// a store is no barrier, so that a missing one shows.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

inline float shim_float(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float shim_float(__half value) { return __half2float(value); }

namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment;
template <typename T>
struct fragment<matrix_a, 16, 16, 16, T, row_major> {
  float x[16] = {NAN};  // row lane/2
};
template <typename T>
struct fragment<matrix_b, 16, 16, 16, T, col_major> {
  float x[16][8] = {{NAN}};  // columns lane%2*8 and the 7 behind
};
template <>
struct fragment<accumulator, 16, 16, 16, float> {
  enum { num_elements = 8 };
  float x[8] = {NAN};
};

inline int row() { return threadIdx.x % 32 / 2; }
inline int column() { return threadIdx.x % 2 * 8; }
template <typename T>
void check(const T *pointer, unsigned stride) {
  shim::check(shim::aligned(pointer, 32), "a wmma pointer that is not aligned to 32 bytes");
  shim::check(stride * sizeof(T) % 16 == 0, "a wmma stride that is no multiple of 16 bytes");
  ++shim::fibers[shim::running].matrix_ops;
}

template <typename T>
void load_matrix_sync(fragment<matrix_a, 16, 16, 16, T, row_major> &to, const T *from, unsigned stride) {
  check(from, stride);
  for (int k = 0; k < 16; ++k) to.x[k] = shim_float(from[row() * stride + k]);
}
template <typename T>
void load_matrix_sync(fragment<matrix_b, 16, 16, 16, T, col_major> &to, const T *from, unsigned stride) {
  check(from, stride);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 8; ++n) to.x[k][n] = shim_float(from[(column() + n) * stride + k]);
}
inline void fill_fragment(fragment<accumulator, 16, 16, 16, float> &to, float value) { std::fill_n(to.x, 8, value); }
template <typename A, typename B>
void mma_sync(fragment<accumulator, 16, 16, 16, float> &to, const A &a, const B &b,
              const fragment<accumulator, 16, 16, 16, float> &c) {
  ++shim::fibers[shim::running].matrix_ops;
  for (int n = 0; n < 8; ++n) {
    float sum = c.x[n];
    for (int k = 0; k < 16; ++k) sum += a.x[k] * b.x[k][n];
    to.x[n] = sum;
  }
}
inline void store_matrix_sync(float *to, const fragment<accumulator, 16, 16, 16, float> &from, unsigned stride,
                              layout_t) {
  check(to, stride);
  std::copy_n(from.x, 8, to + row() * stride + column());
}

}  // namespace nvcuda::wmma
