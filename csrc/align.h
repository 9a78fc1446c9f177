// align, Gram form: the logic that the CPU library and the CUDA kernels share. Letters and tables: see the functions of
// the C ABI at the end. B batch, h w fine grid of a stage, C its channels, hs ws grid of the frozen target.
//
// Tables, dense, row-major, of type A (float; double for double operands), with P = C + kExtra columns:
//   tokens [B*hs*ws, P]  0..C-1: T W; C: T.b; C+1..C+5: dot products of the token with itself, its right, lower and
//                        lower-right neighbour, and of its right with its lower neighbour (0 outside the grid)
//   gram   [C+1, P]      row c < C: A = W^T W and, at column C, u = W^T b; row C: u and, at column C, |b|^2
//   y      [B*hs*ws, P]  0..C-1: adjoint resampling of r_n x_n; C: of r_n
#pragma once

#include <cmath>
#include <cstdint>

#include "ssr.h"

struct SsrAlignStage {
  const void *x;       // [B, h, w, C]
  const void *valid;   // [B, h, w] or NULL: 1
  const void *tokens;  // [B*hs*ws, P]
  const void *gram;    // [C+1, P]
  void *dx;            // [B, h, w, C], written by ssr_align_gram_dx
  void *y;             // [B*hs*ws, P], written by ssr_align_gram_adjoint
  int64_t row0;        // first row of this stage in rows [3, total]
  int64_t tile0;       // first tile of this stage in partial [tiles, 2]
  int32_t h, w, channels, index;  // index: this stage's entry of scale
};

namespace ssr_align {

constexpr int kMaxStages = 8;   // of one call, so that they fit the parameters of one launch
constexpr int kExtra = 8;       // columns of a table behind its C channels
constexpr int kPatch = 8;       // a tile is kPatch x kPatch pixels of the fine grid
constexpr int kPatchRows = kPatch * kPatch;
constexpr double kEps = 1e-8;   // lower bound of either norm, as in PyTorch

enum Dtype { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };
enum ValidKind { kNoValid = 0, kValidByte = 1, kValidFloat = 2, kValidDouble = 3 };
enum Error { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2 };  // the same numbers as CUDA's

struct Span {
  int begin, end;
};

// ---- resampling ----------------------------------------------------------------------------------------------------

// Where fine index i falls between two indices of the coarse grid: value = weight0 * [low] + weight1 * [high].
template <typename A>
struct Tap {
  int low, high;
  A weight0, weight1;
};

// a * b - c with both results rounded: forward and adjoint must see the same bits whatever the compiler would fuse.
SSR_HD float rounded(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(__fmul_rn(a, b), c);
#else
  return a * b - c;  // the CPU library is compiled with -ffp-contract=off
#endif
}
SSR_HD double rounded(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(__dmul_rn(a, b), c);
#else
  return a * b - c;
#endif
}

// The taps of ATen's bilinear resampling with align_corners False. Where high would leave the grid both taps are the
// same token: its weight is 1 and weight1 is 0, so that no product with a neighbour outside is asked for.
template <typename A>
SSR_HD Tap<A> tap(int i, int fine, int coarse) {
  A source = rounded(A(i) + A(0.5), A(coarse) / A(fine), A(0.5));
  source = source > A(0) ? source : A(0);
  int low = static_cast<int>(source);
  low = low < coarse - 1 ? low : coarse - 1;
  const int high = low + 1 < coarse ? low + 1 : low;
  const A weight1 = high > low ? source - A(low) : A(0);
  return {low, high, A(1) - weight1, weight1};
}

// Weight of coarse index y in fine index i: the transpose of tap().
template <typename A>
SSR_HD A tap_weight(int i, int fine, int coarse, int y) {
  const Tap<A> at = tap<A>(i, fine, coarse);
  return y == at.low ? at.weight0 : y == at.high ? at.weight1 : A(0);
}

// The fine indices to which coarse index y gives a weight other than 0; they are neighbours.
template <typename A>
SSR_HD Span footprint(int y, int fine, int coarse) {
  // source lies in (y-1, y+1); one index more on either side, for the rounding, is taken away again below
  const int64_t size = fine, first = (2 * int64_t(y) - 1) * size / (2 * int64_t(coarse)) - 2;
  const int64_t last = (2 * int64_t(y) + 3) * size / (2 * int64_t(coarse)) + 2;
  Span span = {y == 0 || first < 0 ? 0 : static_cast<int>(first),
               y == coarse - 1 || last > size ? fine : static_cast<int>(last)};
  while (span.begin < span.end && tap_weight<A>(span.begin, fine, coarse, y) == A(0)) ++span.begin;
  while (span.begin < span.end && tap_weight<A>(span.end - 1, fine, coarse, y) == A(0)) --span.end;
  return span;
}

// The coarse indices that the fine indices first .. first+kPatch-1 touch.
template <typename A>
SSR_HD Span coarse_span(int first, int fine, int coarse) {
  const int last = first + kPatch - 1 < fine ? first + kPatch - 1 : fine - 1;
  return {tap<A>(first, fine, coarse).low, tap<A>(last, fine, coarse).high + 1};
}

// |t|^2 of a resampled token from the products of its four tokens; each pointer is at column C of a token's row.
template <typename Sum, typename A>
SSR_HD Sum target_square(const Tap<A> &y, const Tap<A> &x, const A *t00, const A *t01, const A *t10, const A *t11) {
  const Sum w00 = Sum(y.weight0) * Sum(x.weight0), w01 = Sum(y.weight0) * Sum(x.weight1);
  const Sum w10 = Sum(y.weight1) * Sum(x.weight0), w11 = Sum(y.weight1) * Sum(x.weight1);
  const Sum squares = w00 * w00 * t00[1] + w01 * w01 * t01[1] + w10 * w10 * t10[1] + w11 * w11 * t11[1];
  const Sum sides = w00 * w01 * t00[2] + w10 * w11 * t10[2] + w00 * w10 * t00[3] + w01 * w11 * t01[3];
  const Sum diagonals = w00 * w11 * t00[4] + w01 * w10 * t00[5];
  return squares + Sum(2) * (sides + diagonals);
}

template <typename Sum, typename A>
SSR_HD Sum resample(const Tap<A> &y, const Tap<A> &x, A t00, A t01, A t10, A t11) {
  return Sum(y.weight0) * (Sum(x.weight0) * t00 + Sum(x.weight1) * t01) +
         Sum(y.weight1) * (Sum(x.weight0) * t10 + Sum(x.weight1) * t11);
}

// ---- a row ---------------------------------------------------------------------------------------------------------

template <typename A>
struct Row {
  A cosine, inverse_p, inverse_t;
};

template <typename A>
SSR_HD A inverse_norm(A square) {
  const A norm = std::sqrt(square < A(0) ? A(0) : square);  // a NaN passes both clamps
  return A(1) / (norm < A(kEps) ? A(kEps) : norm);
}

// q = |p|^2, pt = p.t, tt = |t|^2
template <typename A>
SSR_HD Row<A> finish_row(A q, A pt, A tt) {
  const A inverse_p = inverse_norm(q), inverse_t = inverse_norm(tt);
  return {pt * inverse_p * inverse_t, inverse_p, inverse_t};
}

// dx = target * interp(T W) - own * (A x + u); target is also the r of the adjoint. Both are 0 where a is, whatever
// the row holds (an invalid pixel's norm may have overflowed).
template <typename A>
struct RowGradient {
  A target, own;
};

template <typename A>
SSR_HD RowGradient<A> row_gradient(A a, const Row<A> &row) {
  if (a == A(0)) return {A(0), A(0)};
  // a norm that was clamped is a constant
  const A k = row.inverse_p < A(1) / A(kEps) ? row.cosine * row.inverse_p * row.inverse_p : A(0);
  return {a * row.inverse_p * row.inverse_t, a * k};
}

template <typename A>
SSR_HD A dx_element(const RowGradient<A> &gradient, A interpolated, A gram_product) {
  if (gradient.target == A(0) && gradient.own == A(0)) return A(0);
  return gradient.target * interpolated - gradient.own * gram_product;
}

template <typename A>
SSR_HD A valid_at(const void *valid, int kind, int64_t row) {
  if (kind == kValidByte) return A(static_cast<const uint8_t *>(valid)[row]);
  if (kind == kValidFloat) return A(static_cast<const float *>(valid)[row]);
  if (kind == kValidDouble) return A(static_cast<const double *>(valid)[row]);
  return A(1);
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

SSR_HD int patches(int size) { return (size + kPatch - 1) / kPatch; }
SSR_HD int64_t tiles(int batch, int h, int w) { return int64_t(batch) * patches(h) * patches(w); }

// A patch of the fine grid: image, and its first pixel.
struct Patch {
  int image, y, x;
};

SSR_HD Patch patch_at(int tile, int h, int w) {
  const int across = patches(w), each = across * patches(h);
  const int image = tile / each, rest = tile - image * each, down = rest / across;
  return {image, down * kPatch, (rest - down * across) * kPatch};
}

// A call that makes no sense on any machine.
inline bool invalid_call(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int valid_kind) {
  if (!stages || count < 1 || count > kMaxStages || batch < 0 || hs < 1 || ws < 1) return true;
  if (valid_kind < kNoValid || valid_kind > kValidDouble) return true;
  for (int s = 0; s < count; ++s) {
    if (stages[s].h < 1 || stages[s].w < 1 || stages[s].channels < 1 || stages[s].index < 0) return true;
    if (valid_kind != kNoValid && !stages[s].valid) return true;
  }
  return false;
}

}  // namespace ssr_align
