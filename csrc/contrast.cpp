// contrast's sampler on the CPU: one thread, a fixed order.
#include <algorithm>
#include <new>
#include <vector>

#include "contrast.h"

namespace {

using namespace ssr_contrast;

struct Segment {
  int32_t id, size;
};

bool larger(const Segment &a, const Segment &b) { return a.size != b.size ? a.size > b.size : a.id < b.id; }

// What one call keeps between its images.
struct Scratch {
  Scratch() : sizes(kIds), ranks(kIds) {}

  std::vector<int32_t> sizes, ranks;
  std::vector<Segment> present;
  std::vector<std::vector<uint64_t>> pixels;  // draw << 32 | pixel of each chosen segment
};

// The K largest segments of an image, largest first; how many there are in all.
int choose(const int32_t *ids, int64_t count, int most, Scratch *scratch) {
  std::fill(scratch->sizes.begin(), scratch->sizes.end(), 0);
  for (int64_t i = 0; i < count; ++i)
    if (is_segment(ids[i])) ++scratch->sizes[ids[i]];
  std::vector<Segment> &present = scratch->present;
  present.clear();
  for (int id = 1; id < kIds; ++id)
    if (scratch->sizes[id]) present.push_back({id, scratch->sizes[id]});
  const int all = static_cast<int>(present.size()), chosen = std::min(all, most);
  std::partial_sort(present.begin(), present.begin() + chosen, present.end(), larger);
  present.resize(chosen);
  std::fill(scratch->ranks.begin(), scratch->ranks.end(), -1);
  for (int rank = 0; rank < chosen; ++rank) scratch->ranks[present[rank].id] = rank;
  return all;
}

// Sorts the pixels of an image into the chosen segments.
void gather(const int32_t *ids, int64_t count, uint32_t image_key, Scratch *scratch) {
  scratch->pixels.resize(std::max(scratch->pixels.size(), scratch->present.size()));
  for (size_t rank = 0; rank < scratch->present.size(); ++rank) {
    scratch->pixels[rank].clear();
    scratch->pixels[rank].reserve(scratch->present[rank].size);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int rank = is_segment(ids[i]) ? scratch->ranks[ids[i]] : -1;
    if (rank >= 0) scratch->pixels[rank].push_back(uint64_t(draw(image_key, uint32_t(i))) << 32 | uint64_t(i));
  }
}

void sample_image(const int32_t *ids, int64_t count, uint32_t image_key, int most, int samples, Scratch *scratch,
                  int64_t *index, int32_t *segment, int32_t *taken, int32_t *dropped) {
  *dropped = std::max(0, choose(ids, count, most, scratch) - most);
  gather(ids, count, image_key, scratch);
  std::fill(index, index + int64_t(most) * samples, -1);
  std::fill(segment, segment + most, 0);
  std::fill(taken, taken + most, 0);
  for (size_t rank = 0; rank < scratch->present.size(); ++rank) {
    std::vector<uint64_t> &pixels = scratch->pixels[rank];
    const size_t wanted = std::min<size_t>(pixels.size(), samples);
    std::partial_sort(pixels.begin(), pixels.begin() + wanted, pixels.end());
    for (size_t a = 0; a < wanted; ++a) index[rank * samples + a] = static_cast<int64_t>(pixels[a] & 0xFFFFFFFFu);
    segment[rank] = scratch->present[rank].id, taken[rank] = static_cast<int32_t>(wanted);
  }
}

}  // namespace

// ids [batch, pixels]; key: one number; index [batch, segments, samples], segment and taken [batch, segments], dropped
// [batch]: see ssr_kernels/contrast/sampling.py.
SSR_EXPORT int ssr_contrast_sample(const int32_t *ids, const int64_t *key, int batch, int64_t pixels, int segments,
                                   int samples, int64_t *index, int32_t *segment, int32_t *taken, int32_t *dropped) {
  if (invalid_call(batch, pixels, segments, samples)) return kInvalidValue;
  try {
    Scratch scratch;
    for (int64_t b = 0; b < batch; ++b)
      sample_image(ids + b * pixels, pixels, fold(static_cast<uint32_t>(*key), static_cast<uint32_t>(b)), segments,
                   samples, &scratch, index + b * segments * samples, segment + b * segments, taken + b * segments,
                   dropped + b);
  } catch (const std::bad_alloc &) {
    return kOutOfMemory;
  }
  return kSuccess;
}
