/* mpq_dequantize.cu - packed codes to weights in feature order.
**
** Reference: kernels/reference/mpq_dequantize.c, equal bit for bit.
** Launch:    fast: a thread owns one word row of as many columns as make 16 bytes of a row of w;
**            plain: 32 rows of one column, for forms with residuals, the original's roundings and
**            shapes or addresses that 16 bytes do not fit.
** Cost:      4 bits to bf16: reads 0.5 bytes an element and writes 2; memory bound.
*/
#include "mpq.cuh"

enum { THREADS = 256 };

/* ---- fast ---- */

/* Neighbouring threads' stores of 16 bytes then fill whole sectors. */
template <typename T>
constexpr int columns_of = 16 / (int)sizeof(T);

static __device__ __forceinline__ void store16(float *out, const float w[4]) {
  __stcs((float4 *)out, make_float4(w[0], w[1], w[2], w[3]));
}
static __device__ __forceinline__ uint32_t pair(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return *(const uint32_t *)&two;
}
static __device__ __forceinline__ uint32_t pair(__half, float a, float b) {
  const __half2 two = __floats2half2_rn(a, b);
  return *(const uint32_t *)&two;
}
template <typename T>
static __device__ __forceinline__ void store16(T *out, const float w[8]) {
  __stcs((uint4 *)out, make_uint4(pair(T{}, w[0], w[1]), pair(T{}, w[2], w[3]),
                                  pair(T{}, w[4], w[5]), pair(T{}, w[6], w[7])));
}

/* w of one word row; BITS 0: any width. LOOKUP: every row asks where it lies. */
template <typename T, int BITS, bool ASYM, bool LOOKUP>
static __global__ __launch_bounds__(THREADS) void mpq_dequantize_fast(
    const __grid_constant__ qm_mpq_view q, T *w, qm_cuda_late *late, int64_t pieces) {
  constexpr int COLUMNS = columns_of<T>;
  const int32_t bits = BITS != 0 ? BITS : q.w_bit, rows = 32 / bits;
  const uint32_t mask = qm_mpq_mask(bits);
  const int64_t stride = (int64_t)gridDim.x * THREADS, across = q.n / COLUMNS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < pieces; i += stride) {
    const int64_t word_row = i / across, n = i % across * COLUMNS, first = word_row * rows;
    const uint4 *at = (const uint4 *)((const uint32_t *)q.data.data + word_row * q.n + n);
    uint32_t word[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      const uint4 four = __ldcs(at + j / 4);
      word[j] = four.x, word[j + 1] = four.y, word[j + 2] = four.z, word[j + 3] = four.w;
    }
    float scale[COLUMNS], zero[COLUMNS];
    if (!LOOKUP) qm_mpq_load_grid<COLUMNS, BITS>(q, first / q.group_size, n, scale, zero);
#pragma unroll
    for (int32_t row = 0; row < rows; row++) {
      qm_mpq_place place = {first + row, 0};
      bool inside = true;
      if (LOOKUP) {
        inside = qm_mpq_locate(q, late, QM_CUDA_OP_mpq_dequantize, first + row, &place);
        if (inside) qm_mpq_load_grid<COLUMNS, BITS>(q, place.group, n, scale, zero);
      }
      float value[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        /* 2^23 + code as f32, by its bits. */
        const float code = __uint_as_float((word[j] & mask) | 0x4B000000u) - 8388608.0f;
        value[j] = qm_mpq_decode(ASYM, code, scale[j], zero[j]);
        word[j] >>= bits;
      }
      if (inside) store16(w + place.feature * q.n + n, value);
    }
  }
}

/* ---- plain ---- */

/* asym: one rounding, for code - zero is exact; sym: two. */
static __device__ float decode_bie(const qm_mpq_view &q, float code, float scale, float zero) {
  const int32_t dtype = q.scales.dtype;
  if (q.asym) return qm_round_to(dtype, scale * (code - zero));
  return qm_round_to(dtype, qm_round_to(dtype, code * scale) - zero);
}

static __global__ void mpq_dequantize(const __grid_constant__ qm_mpq_dequantize_args args,
                                      qm_mpq_span span, qm_cuda_late *late, int64_t strips) {
  const qm_mpq_view &q = args.q;
  const bool add_residual = args.form == QM_DECODE_RESIDUAL && span.bits > 0;
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < strips; i += stride) {
    const int64_t n = i % q.n, first = i / q.n * QM_MPQ_ROWS;
    for (int64_t p = first; p < first + QM_MPQ_ROWS; p++) {
      qm_mpq_place place;
      if (!qm_mpq_locate(q, late, QM_CUDA_OP_mpq_dequantize, p, &place)) continue;
      const float scale = qm_mpq_scale(&q, place.group, n), zero = qm_mpq_zero(&q, place.group, n);
      float code = (float)qm_mpq_code(&q, p, n);
      if (add_residual) {
        const uint32_t field = qm_mpq_field(q.residual.data, span.bits, q.n, p, n);
        code += (float)((int32_t)field - span.half) / span.unit; /* exact: at most 16 bits */
      }
      qm_store(args.w.data, args.w.dtype, place.feature * q.n + n,
               args.form == QM_DECODE_BIE ? decode_bie(q, code, scale, zero)
                                          : qm_mpq_decode(q.asym, code, scale, zero));
    }
  }
}

/* ---- launch ---- */

template <typename T, int BITS, bool ASYM>
static void launch_fast(qm_cuda *cuda, const qm_mpq_dequantize_args *args) {
  const qm_mpq_view &q = args->q;
  const int64_t pieces = q.k / 32 * q.w_bit * (q.n / columns_of<T>);
  const bool lookup =
      q.g_idx.data != NULL || q.q_perm.data != NULL || q.group_size % (32 / q.w_bit) != 0;
  auto *kernel =
      lookup ? mpq_dequantize_fast<T, BITS, ASYM, true> : mpq_dequantize_fast<T, BITS, ASYM, false>;
  kernel<<<qm_blocks(cuda, pieces, THREADS, 64), THREADS, 0, cuda->compute>>>(
      q, (T *)args->w.data, cuda->late_device, pieces);
}

int32_t qm_cuda_mpq_dequantize(void *context, const qm_mpq_dequantize_args *args) {
  QM_CUDA_ENTER(context);
  const qm_mpq_view &q = args->q;
  const qm_mpq_span span = qm_mpq_span_of(&q);
  const bool codes_only =
      args->form == QM_DECODE_CODES || (args->form == QM_DECODE_RESIDUAL && span.bits == 0);
  const int64_t columns = args->w.dtype == QM_F32 ? columns_of<float> : columns_of<__half>;
  if (codes_only && qm_mpq_is_whole(q) && qm_mpq_grid_aligned(q, columns) &&
      qm_aligned(q.data.data, 16) && qm_aligned(args->w.data, 16)) {
    qm_with_float(args->w.dtype, [&](auto element) {
      using T = decltype(element);
      if (q.w_bit == 4)
        q.asym ? launch_fast<T, 4, true>(cuda, args) : launch_fast<T, 4, false>(cuda, args);
      else
        q.asym ? launch_fast<T, 0, true>(cuda, args) : launch_fast<T, 0, false>(cuda, args);
      return QM_OK;
    });
  } else {
    const int64_t strips = qm_mpq_strips(q);
    mpq_dequantize<<<qm_blocks(cuda, strips, THREADS), THREADS, 0, cuda->compute>>>(
        *args, span, cuda->late_device, strips);
  }
  return qm_cuda_launched(cuda, "mpq_dequantize");
}
