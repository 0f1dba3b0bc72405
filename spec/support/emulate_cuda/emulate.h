/* emulate.h - CUDA's threads on the host. A thread is a fiber; the threads of a block take turns,
** the blocks of a launch come one after another.
**
** It does what a GPU may do at worst: background copies arrive as late as they may and spoil their
** target at once; shared memory begins as rubbish; threads run in either order. Lanes that wait for
** each other for ever, an instruction that a lane of the warp misses, a misaligned address or one
** out of shared memory end the process with a sentence. Races of other kinds go unseen.
*/
#ifndef QM_EMULATE_H
#define QM_EMULATE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#include "cuda_runtime_api.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

/* ---- launches ---- */

struct shape {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  shape(dim3 grid_, dim3 block_, size_t shared_bytes_ = 0, cudaStream_t stream_ = nullptr)
      : grid(grid_), block(block_), shared_bytes(shared_bytes_), stream(stream_) {}
};
/* Do this when its turn in the stream comes. */
void queue(cudaStream_t stream, std::function<void()> work);
void launch_body(const shape &at, std::function<void()> body);
template <typename Body, typename... Arguments>
void launch(const shape &at, Body body, Arguments... arguments) {
  launch_body(at, [=] { body(arguments...); });
}

/* ---- what threads ask for ---- */

[[noreturn]] void die(const char *what, ...) __attribute__((format(printf, 1, 2)));
void *dynamic_shared();
void sync_block();
/* Let others run until something may have changed. */
void pause();
/* Something has changed that another thread may wait for. */
void note_progress();
int thread();
static inline int lane() { return thread() % 32; }

/* All lanes of `mask` come here, each with its `mine`; the last of them acts for all. A lane that
** is not among them is NULL. */
void meet(uint32_t mask, void *mine, void (*act)(void *const *lanes));

/* ---- shared memory by its 32-bit addresses ---- */

uint32_t shared_address(const void *at);
char *shared_memory(uint32_t address, uint32_t bytes, uint32_t alignment);

/* A double as the float that a further rounding to 16 bits leaves as if it were the only one:
** toward zero, its last bit set where something was lost (Boldo and Melquiond, 2008). */
static inline float round_to_odd(double x) {
  float near = (float)x;
  if ((double)near == x || x != x) return near;
  uint32_t bits;
  memcpy(&bits, &near, sizeof bits);
  const double size = x < 0 ? -x : x, near_size = near < 0 ? -(double)near : (double)near;
  if (near_size > size) bits--;
  bits |= 1u;
  memcpy(&near, &bits, sizeof near);
  return near;
}

}  // namespace emulate

#endif
