// align, Gram form, on the CPU: float and double. One thread, a fixed order: two runs are bitwise equal.
// What is summed over channels or rows is summed in double; A x is summed in A, along the columns, which vectorises.
#include <new>
#include <vector>

#include "align.h"

namespace {

using namespace ssr_align;

struct Call {
  int batch, hs, ws, valid_kind;
  int64_t total;
};

// A stage with its types.
template <typename A>
struct Stage {
  explicit Stage(const SsrAlignStage &stage)
      : x(static_cast<const A *>(stage.x)), tokens(static_cast<const A *>(stage.tokens)),
        gram(static_cast<const A *>(stage.gram)), dx(static_cast<A *>(stage.dx)), y(static_cast<A *>(stage.y)),
        valid(stage.valid), row0(stage.row0), tile0(stage.tile0), h(stage.h), w(stage.w), channels(stage.channels),
        columns(stage.channels + kExtra), index(stage.index) {}

  const A *x, *tokens, *gram;
  A *dx, *y;
  const void *valid;
  int64_t row0, tile0;
  int h, w, channels, columns, index;
};

// The four tokens of a fine pixel and their weights.
template <typename A>
struct Corners {
  Corners(const Stage<A> &stage, const Call &call, int image, int i, int j)
      : y(tap<A>(i, stage.h, call.hs)), x(tap<A>(j, stage.w, call.ws)) {
    const A *upper = stage.tokens + (int64_t(image) * call.hs + y.low) * call.ws * stage.columns;
    const A *lower = stage.tokens + (int64_t(image) * call.hs + y.high) * call.ws * stage.columns;
    t00 = upper + int64_t(x.low) * stage.columns, t01 = upper + int64_t(x.high) * stage.columns;
    t10 = lower + int64_t(x.low) * stage.columns, t11 = lower + int64_t(x.high) * stage.columns;
  }

  Tap<A> y, x;
  const A *t00, *t01, *t10, *t11;
};

// out[c] = interp(T W)[c], c < count
template <typename A>
void interpolate(const Corners<A> &at, int count, A *__restrict out) {
  const A w00 = at.y.weight0 * at.x.weight0, w01 = at.y.weight0 * at.x.weight1;
  const A w10 = at.y.weight1 * at.x.weight0, w11 = at.y.weight1 * at.x.weight1;
  const A *__restrict t00 = at.t00, *__restrict t01 = at.t01, *__restrict t10 = at.t10, *__restrict t11 = at.t11;
  for (int c = 0; c < count; ++c) out[c] = (w00 * t00[c] + w01 * t01[c]) + (w10 * t10[c] + w11 * t11[c]);
}

// out = A x + shift * u, four rows of A at a time
template <typename A>
void gram_product(const Stage<A> &stage, const A *x, A shift, A *__restrict out) {
  const int channels = stage.channels;
  const int64_t columns = stage.columns;
  const A *__restrict u = stage.gram + channels * columns;
  for (int c = 0; c < channels; ++c) out[c] = shift * u[c];
  int k = 0;
  for (; k + 4 <= channels; k += 4) {
    const A *__restrict a = stage.gram + k * columns;
    const A x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
    for (int c = 0; c < channels; ++c)
      out[c] += (x0 * a[c] + x1 * a[c + columns]) + (x2 * a[c + 2 * columns] + x3 * a[c + 3 * columns]);
  }
  for (; k < channels; ++k)
    for (int c = 0; c < channels; ++c) out[c] += x[k] * stage.gram[k * columns + c];
}

// sum a[c] b[c] in double, in eight running sums that the compiler keeps in vectors
template <typename A>
double dot(const A *__restrict a, const A *__restrict b, int count) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {}, rest = 0;
  int c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(a[c + lane]) * double(b[c + lane]);
  for (; c < count; ++c) rest += double(a[c]) * double(b[c]);
  for (int lane = 0; lane < kLanes; ++lane) rest += sums[lane];
  return rest;
}

template <typename A>
Row<double> row_of(const Stage<A> &stage, const Call &call, int image, int i, int j, A *scratch) {
  const int channels = stage.channels;
  const A *x = stage.x + ((int64_t(image) * stage.h + i) * stage.w + j) * channels;
  const Corners<A> at(stage, call, image, i, j);
  gram_product(stage, x, A(2), scratch);
  const double q = dot(x, scratch, channels) + double(stage.gram[int64_t(channels) * stage.columns + channels]);
  interpolate(at, channels, scratch);
  const A *t00 = at.t00 + channels, *t01 = at.t01 + channels, *t10 = at.t10 + channels, *t11 = at.t11 + channels;
  const double tb = resample<double>(at.y, at.x, *t00, *t01, *t10, *t11);
  const double tt = target_square<double>(at.y, at.x, t00, t01, t10, t11);
  return finish_row(q, dot(x, scratch, channels) + tb, tt);
}

template <typename A>
void gram_rows(const Stage<A> &stage, const Call &call, A *rows, A *partial) {
  std::vector<A> scratch(stage.channels);
  const int count = static_cast<int>(tiles(call.batch, stage.h, stage.w));
  for (int tile = 0; tile < count; ++tile) {
    const Patch patch = patch_at(tile, stage.h, stage.w);
    double distance = 0, mass = 0;
    for (int i = patch.y; i < patch.y + kPatch && i < stage.h; ++i) {
      for (int j = patch.x; j < patch.x + kPatch && j < stage.w; ++j) {
        const Row<double> row = row_of(stage, call, patch.image, i, j, scratch.data());
        const int64_t n = (int64_t(patch.image) * stage.h + i) * stage.w + j;
        rows[stage.row0 + n] = A(row.cosine);
        rows[call.total + stage.row0 + n] = A(row.inverse_p);
        rows[2 * call.total + stage.row0 + n] = A(row.inverse_t);
        const double valid = valid_at<double>(stage.valid, call.valid_kind, n);
        if (valid != 0) distance += valid * (1 - row.cosine), mass += valid;
      }
    }
    partial[(stage.tile0 + tile) * 2] = A(distance);
    partial[(stage.tile0 + tile) * 2 + 1] = A(mass);
  }
}

// The gradient of row n: `upstream` is -(*grad) * scale[index].
template <typename A>
RowGradient<A> gradient_at(const Stage<A> &stage, const Call &call, const A *rows, A upstream, int64_t n) {
  const A *row = rows + stage.row0 + n;
  const A a = upstream * valid_at<A>(stage.valid, call.valid_kind, n);
  return row_gradient(a, Row<A>{row[0], row[call.total], row[2 * call.total]});
}

template <typename A>
void gram_dx(const Stage<A> &stage, const Call &call, const A *rows, A upstream) {
  const int channels = stage.channels;
  std::vector<A> scratch(2 * int64_t(channels));
  A *product = scratch.data(), *interpolated = product + channels;
  int64_t n = 0;
  for (int image = 0; image < call.batch; ++image) {
    for (int i = 0; i < stage.h; ++i) {
      for (int j = 0; j < stage.w; ++j, ++n) {
        const RowGradient<A> gradient = gradient_at(stage, call, rows, upstream, n);
        gram_product(stage, stage.x + n * channels, A(1), product);
        interpolate(Corners<A>(stage, call, image, i, j), channels, interpolated);
        A *dx = stage.dx + n * channels;
        for (int c = 0; c < channels; ++c) dx[c] = dx_element(gradient, interpolated[c], product[c]);
      }
    }
  }
}

template <typename A>
void gram_adjoint(const Stage<A> &stage, const Call &call, const A *rows, A upstream) {
  const int channels = stage.channels;
  std::vector<double> sums(int64_t(channels) + 1);
  double *__restrict sum = sums.data();
  for (int64_t token = 0; token < int64_t(call.batch) * call.hs * call.ws; ++token) {
    const int64_t image = token / (int64_t(call.hs) * call.ws);
    const int ty = static_cast<int>(token / call.ws % call.hs), tx = static_cast<int>(token % call.ws);
    const Span down = footprint<A>(ty, stage.h, call.hs), across = footprint<A>(tx, stage.w, call.ws);
    for (int c = 0; c <= channels; ++c) sum[c] = 0;
    for (int i = down.begin; i < down.end; ++i) {
      for (int j = across.begin; j < across.end; ++j) {
        const int64_t n = (image * stage.h + i) * stage.w + j;
        const double weight = double(tap_weight<A>(i, stage.h, call.hs, ty)) *
                              double(tap_weight<A>(j, stage.w, call.ws, tx)) *
                              double(gradient_at(stage, call, rows, upstream, n).target);
        if (weight == 0) continue;
        const A *__restrict x = stage.x + n * channels;
        for (int c = 0; c < channels; ++c) sum[c] += weight * double(x[c]);
        sum[channels] += weight;
      }
    }
    A *y = stage.y + token * stage.columns;
    for (int c = 0; c <= channels; ++c) y[c] = A(sum[c]);
  }
}

// Calls run(stage, call) for each stage with its types.
template <typename A, typename Run>
int each_stage(const SsrAlignStage *stages, int count, const Call &call, Run run) {
  if (invalid_call(stages, count, call.batch, call.hs, call.ws, call.valid_kind)) return kInvalidValue;
  try {
    for (int s = 0; s < count; ++s) run(Stage<A>(stages[s]), call);
  } catch (const std::bad_alloc &) {
    return kOutOfMemory;
  }
  return kSuccess;
}

template <typename A>
int run_rows(const SsrAlignStage *stages, int count, const Call &call, void *rows, void *partial) {
  return each_stage<A>(stages, count, call, [&](const Stage<A> &stage, const Call &with) {
    gram_rows(stage, with, static_cast<A *>(rows), static_cast<A *>(partial));
  });
}

template <typename A, typename Pass>
int run_backward(const SsrAlignStage *stages, int count, const Call &call, const void *grad, const void *scale,
                 const void *rows, Pass pass) {
  return each_stage<A>(stages, count, call, [&](const Stage<A> &stage, const Call &with) {
    const A upstream = -*static_cast<const A *>(grad) * static_cast<const A *>(scale)[stage.index];
    pass(stage, with, static_cast<const A *>(rows), upstream);
  });
}

}  // namespace

SSR_EXPORT int ssr_align_gram_rows(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                   int valid_kind, void *rows, int64_t total, void *partial, void * /*stream*/) {
  const Call call = {batch, hs, ws, valid_kind, total};
  if (dtype == kFloat32) return run_rows<float>(stages, count, call, rows, partial);
  if (dtype == kFloat64) return run_rows<double>(stages, count, call, rows, partial);
  return kInvalidValue;
}

SSR_EXPORT int ssr_align_gram_dx(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                 int valid_kind, const void *grad, const void *scale, const void *rows, int64_t total,
                                 void * /*stream*/) {
  const Call call = {batch, hs, ws, valid_kind, total};
  if (dtype == kFloat32) return run_backward<float>(stages, count, call, grad, scale, rows, gram_dx<float>);
  if (dtype == kFloat64) return run_backward<double>(stages, count, call, grad, scale, rows, gram_dx<double>);
  return kInvalidValue;
}

SSR_EXPORT int ssr_align_gram_adjoint(const SsrAlignStage *stages, int count, int batch, int hs, int ws, int dtype,
                                      int valid_kind, const void *grad, const void *scale, const void *rows,
                                      int64_t total, void * /*stream*/) {
  const Call call = {batch, hs, ws, valid_kind, total};
  if (dtype == kFloat32) return run_backward<float>(stages, count, call, grad, scale, rows, gram_adjoint<float>);
  if (dtype == kFloat64) return run_backward<double>(stages, count, call, grad, scale, rows, gram_adjoint<double>);
  return kInvalidValue;
}
