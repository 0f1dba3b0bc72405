/* adam.cu - AdamW on dense parameters, and Adam's direction alone.
**
** Reference: kernels/reference/adam.c, equal bit for bit (IEEE sqrt and divide, no contraction).
** Launch:    WIDTH elements to a thread at a time, all their loads under way before the first is
**            used; parameters of the same types share launches, a block to a chunk of one.
** Cost:      f32: reads 16 and writes 12 bytes an element, memory bound; bf16 moments move 8 less
**            and draw one Philox block for four elements.
*/
#include "adam.h"
#include "dtype.h"
#include "list.cuh"

enum {
  THREADS = 256,
  WIDTH = 4, /* elements of one Philox block */
  ROUNDS = 4,
  CHUNK = ROUNDS * THREADS * WIDTH,
};

/* ---- elements i .. i + n - 1 in f32; n below WIDTH only at the very end ---- */

template <typename T>
static __device__ __forceinline__ qm_pack<T, WIDTH> fetch(const T *x, int64_t i, int64_t n) {
  if (n == WIDTH) return *(const qm_pack<T, WIDTH> *)(x + i);
  qm_pack<T, WIDTH> pack = {};
  for (int j = 0; j < WIDTH; j++)
    if (j < n) pack.at[j] = x[i + j];
  return pack;
}

template <typename T>
static __device__ __forceinline__ void put(T *x, int64_t i, int64_t n,
                                           const qm_pack<T, WIDTH> &pack) {
  if (n == WIDTH) {
    *(qm_pack<T, WIDTH> *)(x + i) = pack;
    return;
  }
  for (int j = 0; j < WIDTH; j++)
    if (j < n) x[i + j] = pack.at[j];
}

static __device__ __forceinline__ float value_of(float x) { return x; }
static __device__ __forceinline__ float value_of(uint16_t x) { return qm_from_bf16(x); }
/* A state as it is stored: bf16 (as uint16_t) goes up or down by chance. */
template <typename T>
static __device__ __forceinline__ T state_of(float x, uint32_t random) {
  if constexpr (sizeof(T) == 2)
    return qm_to_bf16_stochastic(x, random);
  else
    return x;
}

template <typename T>
static constexpr bool is_half = sizeof(T) == 2;

/* Elements i .. i + WIDTH - 1 each have one random word. */
static __device__ __forceinline__ void draw(const qm_adam_numbers &c, int64_t i,
                                            uint32_t (&words)[WIDTH]) {
  const qm_noise noise = qm_adam_noise(&c, QM_STREAM_EXP_AVG);
  qm_philox(&noise, (uint64_t)i / WIDTH, words);
}

/* Advance the moments of WIDTH elements whose values are there; u receives their direction. */
template <typename G, typename M>
static __device__ __forceinline__ void advance(float (&u)[WIDTH], const qm_adam_numbers &c,
                                               const qm_pack<G, WIDTH> &grad,
                                               qm_pack<M, WIDTH> &exp_avg,
                                               qm_pack<M, WIDTH> &exp_avg_sq,
                                               const uint32_t (&words)[WIDTH]) {
  for (int j = 0; j < WIDTH; j++) {
    float m = value_of(exp_avg.at[j]), v = value_of(exp_avg_sq.at[j]);
    u[j] = qm_adam_advance(&c, value_of(grad.at[j]), &m, &v);
    exp_avg.at[j] = state_of<M>(m, qm_exp_avg_bits(words[j]));
    exp_avg_sq.at[j] = state_of<M>(v, qm_exp_avg_sq_bits(words[j]));
  }
}

/* One parameter's step. */
struct adamw_item {
  void *param;
  const void *grad;
  void *exp_avg, *exp_avg_sq;
  int64_t count;
  qm_adam_source source;
};
using adamw_list = qm_list<adamw_item>;

template <typename P, typename G, typename M>
static __global__ void __launch_bounds__(THREADS) adamw(const __grid_constant__ adamw_list list) {
  int32_t chunk;
  const adamw_item &step = list.item[list.find(&chunk)];
  P *param = (P *)step.param;
  const G *grad = (const G *)step.grad;
  M *exp_avg = (M *)step.exp_avg, *exp_avg_sq = (M *)step.exp_avg_sq;
  const int64_t first = (int64_t)chunk * CHUNK + threadIdx.x * WIDTH;
  const int64_t end = first + CHUNK < step.count ? first + CHUNK : step.count;
  const qm_adam_numbers c = qm_adam_in_force(&step.source);
  if (c.skip) return;
  for (int64_t i = first; i < end; i += THREADS * WIDTH) {
    const int64_t n = step.count - i < WIDTH ? step.count - i : WIDTH;
    qm_pack<P, WIDTH> w = fetch(param, i, n);
    const qm_pack<G, WIDTH> g = fetch(grad, i, n);
    qm_pack<M, WIDTH> m = fetch(exp_avg, i, n), v = fetch(exp_avg_sq, i, n);
    uint32_t words[WIDTH] = {};
    if (is_half<P> || is_half<M>) draw(c, i, words);
    float u[WIDTH];
    advance(u, c, g, m, v, words);
    for (int j = 0; j < WIDTH; j++)
      w.at[j] = state_of<P>(qm_adam_move(&c, value_of(w.at[j]), u[j]), qm_weight_bits(words[j]));
    put(exp_avg, i, n, m);
    put(exp_avg_sq, i, n, v);
    put(param, i, n, w);
  }
}

template <typename G, typename M>
static __global__ void __launch_bounds__(THREADS)
    adam_direction(const G *grad, M *exp_avg, M *exp_avg_sq, float *update, int64_t count,
                   const __grid_constant__ qm_adam_source source) {
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
  if (i >= count) return;
  const int64_t n = count - i < WIDTH ? count - i : WIDTH;
  const qm_pack<G, WIDTH> g = fetch(grad, i, n);
  qm_pack<M, WIDTH> m = fetch(exp_avg, i, n), v = fetch(exp_avg_sq, i, n);
  qm_pack<float, WIDTH> u = {};
  const qm_adam_numbers c = qm_adam_in_force(&source);
  if (!c.skip) {
    uint32_t words[WIDTH] = {};
    if (is_half<M>) draw(c, i, words);
    advance(u.at, c, g, m, v, words);
    put(exp_avg, i, n, m);
    put(exp_avg_sq, i, n, v);
  }
  put(update, i, n, u);
}

/* ---- any types, any alignment, no moments: element by element ---- */

typedef struct any_args {
  qm_array param, grad, exp_avg, exp_avg_sq, update; /* param or update */
  qm_adam_source source;
} any_args;

static __device__ void put_any(const qm_array &x, int64_t i, float value, uint32_t random) {
  if (x.dtype == QM_BF16)
    ((uint16_t *)x.data)[i] = qm_to_bf16_stochastic(value, random);
  else
    ((float *)x.data)[i] = value;
}

static __device__ float advance_any(const any_args &a, const qm_adam_numbers &c, int64_t i) {
  const float g = qm_load(a.grad.data, a.grad.dtype, i);
  if (a.exp_avg.data == NULL) return c.grad_scale * g;
  const qm_noise noise = qm_adam_noise(&c, QM_STREAM_EXP_AVG);
  const uint32_t random = qm_bits(&noise, (uint64_t)i);
  float m = qm_load(a.exp_avg.data, a.exp_avg.dtype, i);
  float v = qm_load(a.exp_avg_sq.data, a.exp_avg_sq.dtype, i);
  const float u = qm_adam_advance(&c, g, &m, &v);
  put_any(a.exp_avg, i, m, qm_exp_avg_bits(random));
  put_any(a.exp_avg_sq, i, v, qm_exp_avg_sq_bits(random));
  return u;
}

static __global__ void adam_any(const __grid_constant__ any_args a) {
  const qm_adam_numbers c = qm_adam_in_force(&a.source);
  const qm_noise noise = qm_adam_noise(&c, QM_STREAM_EXP_AVG);
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.grad.count; i += stride) {
    const float u = c.skip ? 0.0f : advance_any(a, c, i);
    if (a.update.data != NULL) ((float *)a.update.data)[i] = u;
    if (a.param.data == NULL || c.skip) continue;
    const float w = qm_load(a.param.data, a.param.dtype, i);
    const uint32_t random = a.param.dtype == QM_BF16 ? qm_bits(&noise, (uint64_t)i) : 0;
    put_any(a.param, i, qm_adam_move(&c, w, u), qm_weight_bits(random));
  }
}

/* ---- launches ---- */

/* Can x be moved in packs of WIDTH? */
static bool packs(const qm_array *x) {
  return x->dtype != QM_F16 && qm_aligned(x->data, WIDTH * (x->dtype == QM_F32 ? 4 : 2));
}

/* Call `body` with a value of the type that stands for f32 or bf16. */
template <typename Body>
static int32_t with_state(const qm_array &x, Body body) {
  return x.dtype == QM_F32 ? body(float{}) : body(uint16_t{});
}

static int32_t launch_any(qm_cuda *cuda, const any_args &args) {
  adam_any<<<qm_blocks(cuda, args.grad.count, THREADS), THREADS, 0, cuda->compute>>>(args);
  return qm_cuda_launched(cuda, "adam");
}

/* Which kernel takes this step: KINDS for adam_any, -1 where there is nothing to do. */
enum { KINDS = 8 };
static int32_t kind_of(const qm_adamw_item &step) {
  const qm_array &m = step.exp_avg, &v = step.exp_avg_sq;
  if (step.param.count == 0) return -1;
  if (m.data == NULL || m.dtype != v.dtype || !packs(&step.param) || !packs(&step.grad) ||
      !packs(&m) || !packs(&v))
    return KINDS;
  return (step.param.dtype != QM_F32) * 4 + (step.grad.dtype != QM_F32) * 2 + (m.dtype != QM_F32);
}

static qm_adam_source source_of(const qm_adamw_item &step) {
  return qm_adam_source_of(&step.adam, step.live.data, step.scale.data, step.exp_avg.data == NULL);
}

/* A list of steps, all of the types of `like`. */
static void launch_list(const qm_cuda *cuda, const qm_adamw_item &like, adamw_list *list) {
  if (list->count == 0) return;
  with_state(like.param, [&](auto p) {
    return with_state(like.grad, [&](auto g) {
      return with_state(like.exp_avg, [&](auto m) {
        adamw<decltype(p), decltype(g), decltype(m)>
            <<<(unsigned)list->chunks(), THREADS, 0, cuda->compute>>>(*list);
        return QM_OK;
      });
    });
  });
  list->count = 0;
}

int32_t qm_cuda_adamw(void *context, const qm_adamw_args *args) {
  QM_CUDA_ENTER(context);
  for (int64_t i = 0; i < args->count; i++) {
    const qm_adamw_item &step = args->step[i];
    if (kind_of(step) != KINDS) continue;
    const int32_t status = launch_any(
        cuda, {step.param, step.grad, step.exp_avg, step.exp_avg_sq, {}, source_of(step)});
    if (status != QM_OK) return status;
  }
  adamw_list list = {};
  for (int32_t kind = 0; kind < KINDS; kind++) {
    const qm_adamw_item *like = NULL;
    for (int64_t i = 0; i < args->count; i++) {
      const qm_adamw_item &step = args->step[i];
      if (kind_of(step) != kind) continue;
      const adamw_item item = {step.param.data,      step.grad.data,   step.exp_avg.data,
                               step.exp_avg_sq.data, step.param.count, source_of(step)};
      const int64_t chunks = qm_ceil_div(item.count, CHUNK);
      like = &step;
      if (list.add(item, chunks)) continue;
      launch_list(cuda, *like, &list);
      list.add(item, chunks);
    }
    if (like != NULL) launch_list(cuda, *like, &list);
  }
  return qm_cuda_launched(cuda, "adamw");
}

int32_t qm_cuda_adam_direction(void *context, const qm_adam_direction_args *args) {
  QM_CUDA_ENTER(context);
  const qm_array &grad = args->grad, &update = args->update;
  const qm_array &exp_avg = args->exp_avg, &exp_avg_sq = args->exp_avg_sq;
  const int64_t count = update.count, blocks = qm_ceil_div(count, (int64_t)THREADS * WIDTH);
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, 0);
  if (count == 0) return QM_OK;
  const bool fast = exp_avg.dtype == exp_avg_sq.dtype && packs(&update) && packs(&grad) &&
                    packs(&exp_avg) && packs(&exp_avg_sq) && blocks <= INT32_MAX;
  if (!fast) return launch_any(cuda, {{}, grad, exp_avg, exp_avg_sq, update, source});
  return with_state(grad, [&](auto g) {
    return with_state(exp_avg, [&](auto m) {
      using G = decltype(g);
      using M = decltype(m);
      adam_direction<G, M><<<(unsigned)blocks, THREADS, 0, cuda->compute>>>(
          (const G *)grad.data, (M *)exp_avg.data, (M *)exp_avg_sq.data, (float *)update.data,
          count, source);
      return qm_cuda_launched(cuda, "adam_direction");
    });
  });
}
