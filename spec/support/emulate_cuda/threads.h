/* threads.h - what an emulated thread has under way. */
#ifndef QM_EMULATE_THREADS_H
#define QM_EMULATE_THREADS_H

#include <deque>

#include "emulate.h"

namespace emulate {

/* A cp.async that has not arrived yet. */
struct copy {
  char *to;
  const void *from; /* NULL: zeros */
  int bytes;
  int64_t group;
};
/* A lane's part of a wgmma that has not been worked out yet. */
struct product {
  float *sums[64];
  int columns; /* of the product; half as many sums */
  bool bf16, in_registers, fresh, along;
  uint32_t fragment[4];
  uint64_t a, b;
  int64_t group;
};
struct fiber {
  dim3 index;
  bool done;
  std::deque<copy> copies;
  int64_t copy_group;
  std::deque<product> products;
  int64_t product_group;
};
/* The thread that runs. */
fiber &self();

}  // namespace emulate

#endif
