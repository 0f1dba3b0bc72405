/* mpq_linear.cu - x W and x W^T for few rows. Reference: kernels/reference/mpq_linear.c, W rounded
** to x's type.
**
** 16-bit x and 4-bit codes in plain order go to tensor cores straight from the packed words; the
** rest dequantizes into the workspace and multiplies there.
** Cost: the codes' bytes, 29 MB at 4096 x 14336, and for each word of 8 codes 7 integer
** instructions, of which a multiprocessor starts 2 a cycle; 2 for one row on Hopper, about 20 where
** W itself is rounded, beyond 16 rows without Hopper's products.
*/
#include "mpq.h"
#include "mpq_linear_few.cuh"
#include "mpq_linear_forward.cuh"
#include "mpq_linear_row_launch.cuh"
#include "mpq_linear_transposed.cuh"
#include "mpq_linear_wgmma_launch.cuh"

using namespace mpq_linear;

template <typename Product>
static __device__ __forceinline__ void run(const task &p) {
  extern __shared__ __align__(128) char memory[];
  Product product(p, memory); /* reads weights alone */
  qm_let_next_begin();
  qm_await_previous();
  product.run();
}
template <typename Product>
static __global__ __launch_bounds__(Product::S::threads, Product::S::blocks) void multiply(task p) {
  run<Product>(p);
}
template <typename Product>
static __global__ __launch_bounds__(Product::S::threads, Product::S::blocks) void multiply_group(
    const __grid_constant__ task_group group) {
  int32_t i = 0;
  while (i + 1 < group.count && (int32_t)blockIdx.x >= group.part[i + 1].first_tile) i++;
  run<Product>(group.part[i]);
}

constexpr int64_t ROWS_MAX = 64;

template <typename Product>
static int32_t launch(qm_cuda *cuda, task_group group) {
  using S = typename Product::S;
  using L = typename Product::L;
  static bool one_prepared[64], group_prepared[64]; /* by device */
  int32_t status = QM_E_UNSUPPORTED;
  if (group.count == 1)
    status = prepare(cuda, multiply<Product>, L::bytes, one_prepared);
  else if constexpr (Product::takes_groups)
    status = prepare(cuda, multiply_group<Product>, L::bytes, group_prepared);
  if (status != QM_OK) return status;
  int64_t tiles = 0, outputs = 0;
  for (int32_t i = 0; i < group.count; i++) {
    group.part[i].first_tile = (int32_t)tiles;
    tiles += qm_ceil_div(group.part[i].outputs, L::columns);
    outputs += group.part[i].outputs;
  }
  /* As many splits as there is room for at once; each warp of a sum wants at least two stages. */
  const int64_t rows = group.part[0].rows, spans = qm_ceil_div(group.part[0].length, L::span);
  const int64_t room = (int64_t)cuda->multiprocessors * S::blocks / tiles;
  const int64_t most = tiles > TICKETS ? 1 : qm_ceil_div(spans, 2 * S::deep);
  const int64_t splits = room < 1 ? 1 : room < most ? room : most;
  float *partial = NULL;
  if (splits > 1)
    status = qm_cuda_scratch(cuda, splits * rows * outputs * (int64_t)sizeof *partial,
                             (void **)&partial);
  if (status != QM_OK) return status;
  for (int32_t i = 0; i < group.count; i++) {
    group.part[i].spans = (int32_t)qm_ceil_div(spans, splits * S::deep);
    group.part[i].partial = partial;
    if (splits > 1) partial += splits * rows * group.part[i].outputs;
  }
  const dim3 grid((unsigned)tiles, (unsigned)splits);
  if (group.count == 1)
    qm_launch_early(cuda, multiply<Product>, grid, dim3(S::threads), L::bytes, group.part[0]);
  else if constexpr (Product::takes_groups)
    qm_launch_early(cuda, multiply_group<Product>, grid, dim3(S::threads), L::bytes, group);
  return qm_cuda_launched(cuda, "mpq_linear");
}

/* Warps enough to fill the device with the blocks that W's columns make, at once where they can: at
** most 32 a multiprocessor, or 16 with twice the registers. Few bytes under way in each do better
** than many, and 256 of a row side by side better than 128. */
template <typename T, int TILES>
static int32_t launch_few(qm_cuda *cuda, const task_group &group) {
  constexpr int WARPS = 32 / TILES;
  int64_t columns = 0;
  for (int32_t i = 0; i < group.count; i++) columns += group.part[i].n;
  const int64_t blocks = qm_ceil_div(columns, 32) / cuda->multiprocessors;
  int32_t status = QM_E_UNSUPPORTED; /* as it stays where the larger ones lack shared memory */
  if (blocks < 1) status = launch<few<few_shape<T, TILES, 1, WARPS, 2 * TILES, 2, 1>>>(cuda, group);
  if (blocks < 2 && status == QM_E_UNSUPPORTED)
    status = launch<few<few_shape<T, TILES, 1, WARPS / 2, 4, 2, 2>>>(cuda, group);
  if constexpr (TILES == 1)
    if (blocks >= 4) status = launch<few<few_shape<T, 1, 4, 8, 4, 1, 2>>>(cuda, group);
  if (status == QM_E_UNSUPPORTED)
    status = launch<few<few_shape<T, TILES, 2, 8, 4, 1, 2>>>(cuda, group);
  return status;
}

/* Shapes: warps, of them side by side, pieces of output, vectors of codes, stages, blocks. */
template <typename T>
static int32_t launch_forward(qm_cuda *cuda, const task_group &group) {
  const int64_t rows = group.part[0].rows;
  if (rows == 1 && cuda->has_wgmma) {
    const int32_t status = launch_row<T>(cuda, group);
    if (status != QM_E_UNSUPPORTED) return status;
  }
  if (rows <= 8) return launch_few<T, 1>(cuda, group);
  if (rows <= 16) return launch_few<T, 2>(cuda, group);
  if (group.count > 1) return QM_E_UNSUPPORTED;
  if (cuda->has_wgmma) return launch_hopper<T>(cuda, group.part[0]);
  if (rows <= 32) return launch<forward<shape<T, 4, 8, 2, 2, 4, 3, 1>>>(cuda, group);
  return launch<forward<shape<T, 8, 12, 4, 1, 2, 4, 1>>>(cuda, group);
}
template <typename T>
static int32_t launch_transposed(qm_cuda *cuda, const task_group &group) {
  const int64_t rows = group.part[0].rows;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const int32_t group_size = group.part[0].group_size;
    const bool pairs = group_size % 128 == 0, whole = group_size % 64 == 0;
    if (rows <= 8 && pairs)
      return launch<transposed_scaling_x<shape<T, 1, 8, 1, 2, 4, 4, 2>>>(cuda, group);
    if (rows <= 8 && whole)
      return launch<transposed_scaling_x<shape<T, 1, 8, 1, 1, 4, 4, 2>>>(cuda, group);
    if (rows <= 16 && pairs)
      return launch<transposed_scaling_x<shape<T, 2, 8, 1, 2, 4, 4, 2>>>(cuda, group);
    if (rows <= 16 && whole)
      return launch<transposed_scaling_x<shape<T, 2, 8, 1, 1, 4, 3, 2>>>(cuda, group);
  }
  if (rows <= 16) return launch<transposed<shape<T, 2, 8, 1, 1, 4, 3, 2>>>(cuda, group);
  if (rows <= 32) return launch<transposed<shape<T, 4, 8, 2, 1, 4, 3, 1>>>(cuda, group);
  return launch<transposed<shape<T, 8, 8, 2, 1, 4, 3, 1>>>(cuda, group);
}

/* Rows of one product, from `row` on. */
static task task_of(const qm_mpq_linear_args *args, int64_t row) {
  const qm_mpq_view *q = &args->q;
  task p = {};
  p.scales = q->scales.data;
  p.zeros = q->zeros.data;
  p.words = (const uint32_t *)q->data.data;
  p.k = q->k;
  p.n = q->n;
  p.length = args->transposed ? q->n : q->k;
  p.outputs = args->transposed ? q->k : q->n;
  p.group_size = q->group_size;
  p.asym = q->asym;
  p.zero_offset = q->zero_offset;
  p.zero_top = 0x1p23f - (float)q->zero_offset;
  p.bf16_scales = q->scales.dtype == QM_BF16;
  p.rows = args->rows - row < ROWS_MAX ? args->rows - row : ROWS_MAX;
  p.x = (const uint16_t *)args->x.data + row * p.length;
  p.out = (uint16_t *)args->out.data + row * p.outputs;
  return p;
}

static int32_t multiply_fused(qm_cuda *cuda, const qm_mpq_linear_args *args) {
  return qm_with_half(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    int32_t status = QM_OK;
    for (int64_t row = 0; row < args->rows && status == QM_OK; row += ROWS_MAX) {
      task_group group = {};
      group.count = 1;
      group.part[0] = task_of(args, row);
      status =
          args->transposed ? launch_transposed<T>(cuda, group) : launch_forward<T>(cuda, group);
    }
    return status;
  });
}

/* Whether words, grid, x and out lie in the kernels' packs and groups do not cut them. */
static bool is_fused(const qm_mpq_linear_args *args) {
  const qm_mpq_view *q = &args->q;
  const bool whole_groups = q->group_size % (args->transposed ? 8 : 32) == 0;
  return args->x.dtype != QM_F32 && q->scales.dtype != QM_F32 && q->w_bit == 4 && q->n % 8 == 0 &&
         whole_groups && q->g_idx.data == NULL && q->q_perm.data == NULL &&
         q->group_map.data == NULL && q->k > 0 && q->n > 0 && q->k < INT32_MAX / 2 &&
         q->n < INT32_MAX / 2 && q->k / 32 * q->n < INT32_MAX && qm_aligned(args->x.data, 16) &&
         qm_aligned(args->out.data, 8) && qm_aligned(q->data.data, 16) &&
         qm_aligned(q->scales.data, 8) && qm_aligned(q->zeros.data, q->asym ? 4 : 8);
}

static int32_t multiply_dequantized(qm_cuda *cuda, const qm_mpq_linear_args *args) {
  const qm_mpq_view *q = &args->q;
  qm_mpq_dequantize_args dequantize = {.q = *q, .w = q->data, .form = QM_DECODE_CODES};
  dequantize.w.dtype = args->x.dtype;
  dequantize.w.shape[0] = q->k;
  dequantize.w.count = q->k * q->n;
  const int64_t size = args->x.dtype == QM_F32 ? 4 : 2;
  int32_t status = qm_cuda_scratch(cuda, dequantize.w.count * size, &dequantize.w.data);
  if (status == QM_OK) status = qm_cuda_mpq_dequantize(cuda, &dequantize);
  if (status != QM_OK) return status;
  qm_gemm_args product = {};
  product.a = args->x;
  product.b = dequantize.w;
  product.out = args->out;
  product.batch = 1;
  product.m = args->rows;
  product.k = args->transposed ? q->n : q->k;
  product.n = args->transposed ? q->k : q->n;
  product.trans_b = args->transposed;
  product.alpha = 1.0;
  return qm_cuda_gemm(cuda, &product);
}

int32_t qm_cuda_mpq_linear(void *context, const qm_mpq_linear_args *args) {
  QM_CUDA_ENTER(context);
  if (args->out.count == 0) return QM_OK;
  int32_t status = QM_E_UNSUPPORTED;
  if (is_fused(args)) status = multiply_fused(cuda, args);
  return status == QM_E_UNSUPPORTED ? multiply_dequantized(cuda, args) : status;
}

/* The products in one grid; QM_E_UNSUPPORTED where they have no kernel for that. */
static int32_t multiply_together(qm_cuda *cuda, const qm_mpq_linear_group_args *args) {
  task_group group = {};
  group.count = args->count;
  for (int32_t i = 0; i < args->count; i++) {
    const qm_mpq_linear_args one = qm_mpq_linear_of(args, i);
    if (one.out.count == 0 || one.rows > ROWS_MAX || !is_fused(&one)) return QM_E_UNSUPPORTED;
    group.part[i] = task_of(&one, 0);
  }
  return qm_with_half(args->x.dtype,
                      [&](auto element) { return launch_forward<decltype(element)>(cuda, group); });
}

int32_t qm_cuda_mpq_linear_group(void *context, const qm_mpq_linear_group_args *args) {
  QM_CUDA_ENTER(context);
  int32_t status = multiply_together(cuda, args);
  if (status != QM_E_UNSUPPORTED) return status;
  status = QM_OK;
  for (int32_t i = 0; i < args->count && status == QM_OK; i++) {
    const qm_mpq_linear_args one = qm_mpq_linear_of(args, i);
    status = qm_cuda_mpq_linear(context, &one);
  }
  return status;
}
