// contrast's sampler on the GPU: a count, a choice, a sort of tiles and their merge; the same bits as contrast.cpp.
// Nothing waits for the device, the key is read there, and the only atomics add integers: a graph replays with new
// samples, and two runs are equal.
#include <cub/block/block_radix_sort.cuh>
#include <cuda_runtime.h>

#include "contrast.h"

namespace {

using namespace ssr_contrast;

constexpr int kCountThreads = 256, kRun = 8;  // a thread of the count adds up runs among 8 neighbours before it adds
constexpr int kChooseThreads = 1024, kOwnIds = kIds / kChooseThreads;
constexpr int kSortThreads = 512, kItems = 8, kTile = kSortThreads * kItems;  // pixels that one block sorts
constexpr int kWarp = 32;
constexpr uint64_t kNothing = ~uint64_t(0);

struct Call {
  const int32_t *ids;  // [batch, pixels]
  const int64_t *key;
  int32_t *sizes;     // [batch, kIds] pixels of each id
  int32_t *ranks;     // [batch, kIds] rank + 1 of a chosen id, 0 of any other
  uint64_t *present;  // [batch, kIds] size << 32 | id of the ids that occur, in their order
  uint64_t *sorted;   // [batch, tiles, segments, samples] draw << 32 | pixel, ascending, kNothing behind the last
  int64_t *index;
  int32_t *segment, *taken, *dropped;
  int batch, pixels, segments, samples, tiles;
};

__host__ __device__ __forceinline__ int divide_up(int a, int b) { return a / b + (a % b != 0); }

// A block counts 2048 pixels of one image; counters are in global memory (they stay in the second-level cache).
__global__ void __launch_bounds__(kCountThreads) count_sizes(Call call) {
  const int blocks = divide_up(call.pixels, kCountThreads * kRun), image = blockIdx.x / blocks;
  const int64_t first = int64_t(blockIdx.x - image * blocks) * kCountThreads * kRun + threadIdx.x * kRun;
  const int32_t *ids = call.ids + int64_t(image) * call.pixels;
  int32_t *sizes = call.sizes + int64_t(image) * kIds;
  int32_t id = 0, run = 0;
  for (int64_t i = first; i < first + kRun && i < call.pixels; ++i) {
    if (ids[i] != id) {
      if (is_segment(id)) atomicAdd(&sizes[id], run);
      id = ids[i], run = 0;
    }
    ++run;
  }
  if (is_segment(id)) atomicAdd(&sizes[id], run);
}

// What `choose` keeps in shared memory.
struct Choice {
  int sums[2][kChooseThreads];
  int total;
  uint64_t chosen[kMaxSegments];
};

// Sum of `value` over the threads before this one; *total: over all.
__device__ int scan(Choice *choice, int value, int *total) {
  const int thread = threadIdx.x;
  int from = 0;
  choice->sums[0][thread] = value;
  __syncthreads();
  for (int reach = 1; reach < kChooseThreads; reach *= 2, from ^= 1) {
    const int other = thread >= reach ? choice->sums[from][thread - reach] : 0;
    choice->sums[from ^ 1][thread] = choice->sums[from][thread] + other;
    __syncthreads();
  }
  const int before = choice->sums[from][thread] - value;
  *total = choice->sums[from][kChooseThreads - 1];
  __syncthreads();
  return before;
}

struct Range {
  int begin, end;
};

// How many of all threads' entries have at least `size` pixels.
__device__ int count_from(Choice *choice, const uint64_t *present, Range mine, int64_t size) {
  if (threadIdx.x == 0) choice->total = 0;
  __syncthreads();
  int count = 0;
  for (int i = mine.begin; i < mine.end; ++i) count += int64_t(present[i] >> 32) >= size;
  if (count) atomicAdd(&choice->total, count);
  __syncthreads();
  const int total = choice->total;
  __syncthreads();
  return total;
}

// Lists the ids that occur, in their order; returns how many.
__device__ int list_present(Choice *choice, const int32_t *sizes, uint64_t *present) {
  const int first = threadIdx.x * kOwnIds;
  int count = 0, total = 0;
  for (int id = first; id < first + kOwnIds; ++id) count += sizes[id] != 0;
  int place = scan(choice, count, &total);
  for (int id = first; id < first + kOwnIds; ++id)
    if (sizes[id]) present[place++] = uint64_t(sizes[id]) << 32 | uint64_t(id);
  __syncthreads();
  return total;
}

// A block ranks the segments of one image. All larger than a size are taken, found by bisection, and of the next size
// the lowest ids; each of those then counts who comes before it.
__global__ void __launch_bounds__(kChooseThreads, 1) choose(Call call) {
  extern __shared__ __align__(16) unsigned char shared[];
  Choice *choice = reinterpret_cast<Choice *>(shared);
  const int image = blockIdx.x, thread = threadIdx.x;
  uint64_t *present = call.present + int64_t(image) * kIds;
  const int all = list_present(choice, call.sizes + int64_t(image) * kIds, present);
  const int share = divide_up(all, kChooseThreads), begin = min(all, thread * share);
  const Range mine = {begin, min(all, begin + share)};

  int64_t low = 1, high = int64_t(call.pixels) + 1;  // the least size of which at most `segments` are as large
  if (all <= call.segments) high = low;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (count_from(choice, present, mine, middle) <= call.segments)
      high = middle;
    else
      low = middle + 1;
  }
  const int larger = count_from(choice, present, mine, low);
  int equals = 0, taken = 0, chosen = 0, ignored = 0;
  for (int i = mine.begin; i < mine.end; ++i) equals += int64_t(present[i] >> 32) == low - 1;
  const int equals_before = scan(choice, equals, &ignored), left = call.segments - larger;
  for (int i = mine.begin, equal = equals_before; i < mine.end; ++i) {
    const int64_t size = present[i] >> 32;
    taken += size >= low || (size == low - 1 && equal++ < left);
  }
  int place = scan(choice, taken, &chosen);
  for (int i = mine.begin, equal = equals_before; i < mine.end; ++i) {
    const int64_t size = present[i] >> 32;
    if (size >= low || (size == low - 1 && equal++ < left)) choice->chosen[place++] = present[i];
  }
  __syncthreads();

  const int64_t row = int64_t(image) * call.segments;
  if (thread < chosen) {
    const uint64_t own = choice->chosen[thread];
    const int id = static_cast<int>(own & 0xFFFFFFFFu), size = static_cast<int>(own >> 32);
    int rank = 0;
    for (int other = 0; other < chosen; ++other) {
      const int its = static_cast<int>(choice->chosen[other] >> 32);
      rank += its > size || (its == size && other < thread);
    }
    call.segment[row + rank] = id, call.taken[row + rank] = min(size, call.samples);
    call.ranks[int64_t(image) * kIds + id] = rank + 1;
  } else if (thread < call.segments) {
    call.segment[row + thread] = 0, call.taken[row + thread] = 0;
  }
  if (thread == 0) call.dropped[image] = all - chosen;
}

using Sort = cub::BlockRadixSort<uint32_t, kSortThreads, kItems, uint16_t>;

// What `sort_tiles` keeps in shared memory: the sort's own, or its result.
union Tile {
  Sort::TempStorage sort;
  struct {
    uint32_t keys[kTile];
    uint16_t pixels[kTile];
    uint16_t begin[kMaxSegments + 1], end[kMaxSegments + 1];
  } result;
};
static_assert(sizeof(Tile) <= 48 * 1024 && sizeof(Choice) <= 48 * 1024, "more has to be asked for");

// The rank of an image's pixel; that of no segment is `segments`, the last.
__device__ uint32_t rank_of(const Call &call, int image, int64_t pixel) {
  if (pixel >= call.pixels) return call.segments;
  const int32_t id = call.ids[int64_t(image) * call.pixels + pixel];
  const int rank = is_segment(id) ? call.ranks[int64_t(image) * kIds + id] : 0;
  return rank ? rank - 1 : call.segments;
}

// A block sorts the 4096 pixels of a tile by (rank, draw); the sort is stable, so equal draws stay in order of pixel.
// It writes the first `samples` of each rank.
__global__ void __launch_bounds__(kSortThreads) sort_tiles(Call call, int key_bits) {
  extern __shared__ __align__(16) unsigned char shared[];
  Tile &tile = *reinterpret_cast<Tile *>(shared);
  const int image = blockIdx.x / call.tiles, thread = threadIdx.x;
  const int64_t first = int64_t(blockIdx.x - image * call.tiles) * kTile;
  const uint32_t image_key = fold(static_cast<uint32_t>(*call.key), static_cast<uint32_t>(image));
  uint32_t keys[kItems];
  uint16_t pixels[kItems];
  for (int i = 0; i < kItems; ++i) {
    const int64_t pixel = first + thread * kItems + i;
    keys[i] = order_key(rank_of(call, image, pixel), draw(image_key, static_cast<uint32_t>(pixel)));
    pixels[i] = static_cast<uint16_t>(thread * kItems + i);
  }
  Sort(tile.sort).Sort(keys, pixels, 0, key_bits);
  __syncthreads();
  auto &result = tile.result;
  for (int i = 0; i < kItems; ++i) {
    result.keys[thread * kItems + i] = keys[i];
    result.pixels[thread * kItems + i] = pixels[i];
  }
  for (int rank = thread; rank <= call.segments; rank += kSortThreads) result.begin[rank] = result.end[rank] = 0;
  __syncthreads();
  for (int i = thread; i < kTile; i += kSortThreads) {
    const uint32_t rank = result.keys[i] >> kDrawBits;
    if (i == 0 || result.keys[i - 1] >> kDrawBits != rank) result.begin[rank] = static_cast<uint16_t>(i);
    if (i == kTile - 1 || result.keys[i + 1] >> kDrawBits != rank) result.end[rank] = static_cast<uint16_t>(i + 1);
  }
  __syncthreads();
  const int entries = call.segments * call.samples;
  uint64_t *out = call.sorted + int64_t(blockIdx.x) * entries;
  for (int e = thread; e < entries; e += kSortThreads) {
    const int rank = e / call.samples, place = result.begin[rank] + e - rank * call.samples;
    const bool is_there = place < result.end[rank];
    const uint64_t drawn = is_there ? result.keys[place] & ((1u << kDrawBits) - 1) : 0;
    out[e] = is_there ? drawn << 32 | uint64_t(first + result.pixels[place]) : kNothing;
  }
}

// How many of `list`, ascending, come before `entry`; `equal` counts those equal to it too.
__device__ int count_before(const uint64_t *list, int count, uint64_t entry, bool equal) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < entry || (equal && list[middle] == entry))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A block merges the tiles' lists of one segment, tile after tile, keeping the first `samples`; a thread owns a sample.
__global__ void __launch_bounds__(kMaxPixels) merge(Call call) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint64_t *best = reinterpret_cast<uint64_t *>(shared), *next = best + call.samples, *merged = next + call.samples;
  const int image = blockIdx.x / call.segments, rank = blockIdx.x - image * call.segments, thread = threadIdx.x;
  const int64_t step = int64_t(call.segments) * call.samples;
  const uint64_t *lists = call.sorted + image * call.tiles * step + int64_t(rank) * call.samples;
  const bool active = thread < call.samples;
  if (active) best[thread] = lists[thread];
  for (int tile = 1; tile < call.tiles; ++tile) {
    if (active) next[thread] = lists[tile * step + thread];
    __syncthreads();
    if (active) {
      const int old = thread + count_before(next, call.samples, best[thread], false);
      const int fresh = thread + count_before(best, call.samples, next[thread], true);
      if (old < call.samples) merged[old] = best[thread];
      if (fresh < call.samples) merged[fresh] = next[thread];
    }
    __syncthreads();
    uint64_t *const other = best;
    best = merged, merged = other;
  }
  if (active) {
    const uint64_t entry = best[thread];
    call.index[int64_t(blockIdx.x) * call.samples + thread] =
        entry == kNothing ? -1 : static_cast<int64_t>(entry & 0xFFFFFFFFu);
  }
}

// Where the parts of the workspace begin: sizes and ranks (both start as 0), present, sorted; and its bytes.
struct Workspace {
  Workspace(int64_t batch, int64_t entries)
      : ranks(batch * kIds * 4), present(2 * ranks), sorted(present + batch * kIds * 8), bytes(sorted + entries * 8) {}

  int64_t ranks, present, sorted, bytes;
};

int64_t sorted_entries(int batch, int64_t pixels, int segments, int samples) {
  return batch * ((pixels + kTile - 1) / kTile) * segments * samples;
}

template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes, cudaStream_t stream,
                  Parameters... parameters) {
  void *arguments[] = {&parameters...};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, bytes, stream);
}

}  // namespace

// Bytes of the workspace of a call, which must be aligned to 16.
SSR_EXPORT int64_t ssr_contrast_workspace(int batch, int64_t pixels, int segments, int samples) {
  return Workspace(batch, sorted_entries(batch, pixels, segments, samples)).bytes;
}

// See ssr_kernels/contrast/sampling.py; all pointers are on the device.
SSR_EXPORT int ssr_contrast_sample(const int32_t *ids, const int64_t *key, int batch, int64_t pixels, int segments,
                                   int samples, int64_t *index, int32_t *segment, int32_t *taken, int32_t *dropped,
                                   void *workspace, void *stream_) {
  if (ssr_contrast::invalid_call(batch, pixels, segments, samples)) return kInvalidValue;
  if (batch == 0) return kSuccess;
  const int tiles = static_cast<int>((pixels + kTile - 1) / kTile);
  const int64_t counting = int64_t(batch) * divide_up(static_cast<int>(pixels), kCountThreads * kRun);
  if (counting > INT32_MAX || int64_t(batch) * tiles > INT32_MAX || int64_t(batch) * segments > INT32_MAX)
    return kInvalidValue;
  const Workspace at(batch, sorted_entries(batch, pixels, segments, samples));
  char *const base = static_cast<char *>(workspace);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Call call = {ids, key};
  call.sizes = reinterpret_cast<int32_t *>(base), call.ranks = reinterpret_cast<int32_t *>(base + at.ranks);
  call.present = reinterpret_cast<uint64_t *>(base + at.present);
  call.sorted = reinterpret_cast<uint64_t *>(base + at.sorted);
  call.index = index, call.segment = segment, call.taken = taken, call.dropped = dropped;
  call.batch = batch, call.pixels = static_cast<int>(pixels), call.segments = segments, call.samples = samples;
  call.tiles = tiles;
  int key_bits = kDrawBits;
  while (segments >> (key_bits - kDrawBits)) ++key_bits;
  const int merging = divide_up(samples, kWarp) * kWarp;

  cudaError_t error = cudaMemsetAsync(base, 0, at.present, stream);
  if (!error && counting) error = start(count_sizes, counting, kCountThreads, 0, stream, call);
  if (!error) error = start(choose, batch, kChooseThreads, sizeof(Choice), stream, call);
  if (!error && tiles)
    error = start(sort_tiles, int64_t(batch) * tiles, kSortThreads, sizeof(Tile), stream, call, key_bits);
  if (!error && tiles) error = start(merge, int64_t(batch) * segments, merging, size_t(3) * samples * 8, stream, call);
  if (!error && !tiles) error = cudaMemsetAsync(index, 0xFF, size_t(batch) * segments * samples * 8, stream);
  if (error) cudaGetLastError();  // or the next check of this runtime would report it again
  return error;
}
