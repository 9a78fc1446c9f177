// align, Gram form, on the GPU: bfloat16 and float16 features, float tables and sums. Needs sm_80 or later.
// One launch a function for all stages; nothing is added atomically and every sum has a fixed order, so that two runs
// are bitwise equal on any number of multiprocessors. Nothing synchronises: each function can be captured in a graph.
#include "align_adjoint.cuh"
#include "align_rows.cuh"

namespace {

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
