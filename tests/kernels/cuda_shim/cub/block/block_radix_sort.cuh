// cub::BlockRadixSort as its documentation defines it: a stable sort of a block's keys, ascending by some of their bits, of
// blocked items. All threads of the block take part, and the temporary storage is the caller's from then on.
#pragma once

#include <numeric>

#include "../../cuda_runtime.h"

namespace cub {

template <typename Key, int kThreads, int kItems, typename Value>
class BlockRadixSort {
 public:
  struct TempStorage {
    Key keys[kThreads * kItems];
    Value values[kThreads * kItems];
  };

  explicit BlockRadixSort(TempStorage &storage) : storage_(storage) {}

  void Sort(Key (&keys)[kItems], Value (&values)[kItems], int begin, int end) {
    const int first = threadIdx.x * kItems;
    for (int i = 0; i < kItems; ++i) storage_.keys[first + i] = keys[i], storage_.values[first + i] = values[i];
    __syncthreads();
    if (threadIdx.x == 0) sort(begin, end);
    __syncthreads();
    for (int i = 0; i < kItems; ++i) keys[i] = storage_.keys[first + i], values[i] = storage_.values[first + i];
  }

 private:
  void sort(int begin, int end) {
    shim::check(0 <= begin && begin < end && end <= static_cast<int>(8 * sizeof(Key)), "a sort of no bits");
    const uint64_t mask = ((uint64_t(1) << (end - begin)) - 1) << begin;
    const std::vector<Key> keys(storage_.keys, storage_.keys + kThreads * kItems);
    const std::vector<Value> values(storage_.values, storage_.values + kThreads * kItems);
    std::vector<int> order(keys.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (size_t i = 0; i < order.size(); ++i) storage_.keys[i] = keys[order[i]], storage_.values[i] = values[order[i]];
  }

  TempStorage &storage_;
};

}  // namespace cub
