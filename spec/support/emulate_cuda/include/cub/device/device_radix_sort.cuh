/* device_radix_sort.cuh - CUB's stable sort of pairs, on the host. */
#ifndef QM_EMULATED_DEVICE_RADIX_SORT_CUH
#define QM_EMULATED_DEVICE_RADIX_SORT_CUH

#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"

namespace cub {
struct DeviceRadixSort {
  template <typename K, typename V>
  static cudaError_t SortPairs(void *workspace, size_t &size_bytes, const K *keys, K *keys_out,
                               const V *values, V *values_out, int count, int begin_bit,
                               int end_bit, cudaStream_t stream) {
    if (workspace == NULL) {
      size_bytes = 1000;
      return cudaSuccess;
    }
    emulate::queue(stream, [=] {
      memset(workspace, 0xA5, 1000);
      const K low = (K)(((uint64_t)1 << end_bit) - 1), mask = (K)(low >> begin_bit << begin_bit);
      std::vector<int> order((size_t)count);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [=](int a, int b) { return (keys[a] & mask) < (keys[b] & mask); });
      for (int i = 0; i < count; i++) {
        keys_out[i] = keys[order[(size_t)i]];
        values_out[i] = values[order[(size_t)i]];
      }
    });
    return cudaSuccess;
  }
};
}  // namespace cub

#endif
