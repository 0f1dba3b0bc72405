/* list.cuh - one launch over many tensors: the list is the kernel's parameter, cut into chunks of
** one size, and block b does chunk b of all of them, one tensor's after the other's. A recorded
** launch keeps the list.
*/
#ifndef QM_LIST_CUH
#define QM_LIST_CUH

#include "device.cuh"

/* As many items as 4 KB of parameters hold, with 64 bytes for what else a kernel takes. */
template <typename Item>
struct qm_list {
  static constexpr int32_t most = (4096 - 64 - 8) / (int32_t)(sizeof(Item) + sizeof(int32_t));
  Item item[most];
  int32_t end[most]; /* chunks of an item and of those before it: ascending */
  int32_t count;

  __host__ __device__ int32_t chunks() const { return count == 0 ? 0 : end[count - 1]; }

  /* False where it is full; without chunks there is nothing to add. */
  bool add(const Item &added, int64_t chunks_added) {
    if (count == most || chunks() + chunks_added > INT32_MAX) return false;
    if (chunks_added == 0) return true;
    end[count] = chunks() + (int32_t)chunks_added;
    item[count++] = added;
    return true;
  }

  /* Which item this block is for; *chunk: which of its chunks. */
  __device__ __forceinline__ int32_t find(int32_t *chunk) const {
    int32_t first = 0, last = count - 1;
    while (first < last) {
      const int32_t middle = (first + last) / 2;
      if (end[middle] <= (int32_t)blockIdx.x)
        first = middle + 1;
      else
        last = middle;
    }
    *chunk = (int32_t)blockIdx.x - (first == 0 ? 0 : end[first - 1]);
    return first;
  }
};

#endif
