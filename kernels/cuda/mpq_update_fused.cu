/* mpq_update_fused.cu - one Adam step of a quantized parameter, each byte read and written once.
**
** Reference: kernels/reference/mpq_update.c, equal bit for bit.
** Launch:    a thread owns one word row of 4 columns and walks its rows, whose gradients and
**            moments are 16 bytes each in f32; the next rows are on their way meanwhile. One block
**            of random bits serves the 4 columns. Codes leave a word at its low end and enter at
**            the high one.
** Cost:      4 bits, f32 gradient and moments: reads 12.5 and writes 8.5 bytes an element, memory
**            bound; bf16 moments 8.5 and 4.5 (f32 gradient), where instructions weigh as much.
*/
#include "mpq_step.cuh"
#include "mpq_update.cuh"

enum { THREADS = 128, COLUMNS = 4 };
enum { AHEAD = 1 }; /* rows on their way while one is at work */

/* Four neighbouring elements of one row as they lie in memory. */
template <typename T>
struct four;
template <>
struct four<float> {
  float4 raw;
  __device__ __forceinline__ void load(const float *x) { raw = __ldcs((const float4 *)x); }
  __device__ __forceinline__ void expand(float out[4]) const {
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  }
};
template <>
struct four<__nv_bfloat16> {
  uint2 raw;
  __device__ __forceinline__ void load(const __nv_bfloat16 *x) { raw = __ldcs((const uint2 *)x); }
  __device__ __forceinline__ void expand(float out[4]) const {
    out[0] = __uint_as_float(raw.x << 16), out[1] = __uint_as_float(raw.x & 0xFFFF0000u);
    out[2] = __uint_as_float(raw.y << 16), out[3] = __uint_as_float(raw.y & 0xFFFF0000u);
  }
};

static __device__ __forceinline__ void store(float *m_out, float *v_out, const float m[4],
                                             const float v[4], const uint32_t random[4]) {
  (void)random;
  __stcs((float4 *)m_out, make_float4(m[0], m[1], m[2], m[3]));
  __stcs((float4 *)v_out, make_float4(v[0], v[1], v[2], v[3]));
}
/* Adding the random half word to the bits rounds; infinity and 0x7FC0 stay what they are. */
static __device__ __forceinline__ uint32_t round_pair(float a, float b, uint32_t random_a,
                                                      uint32_t random_b) {
  return __byte_perm(__float_as_uint(a) + random_a, __float_as_uint(b) + random_b, 0x7632);
}
static __device__ __forceinline__ void store(__nv_bfloat16 *m_out, __nv_bfloat16 *v_out,
                                             const float m[4], const float v[4],
                                             const uint32_t random[4]) {
  uint32_t low[4], high[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    low[j] = qm_exp_avg_bits(random[j]);
    high[j] = qm_exp_avg_sq_bits(random[j]);
  }
  __stcs((uint2 *)m_out, make_uint2(round_pair(m[0], m[1], low[0], low[1]),
                                    round_pair(m[2], m[3], low[2], low[3])));
  __stcs((uint2 *)v_out, make_uint2(round_pair(v[0], v[1], high[0], high[1]),
                                    round_pair(v[2], v[3], high[2], high[3])));
}

/* Words of four columns. */
struct four_words {
  uint32_t at[4];
  __device__ __forceinline__ void load(const uint32_t *words) {
    const uint4 raw = __ldcs((const uint4 *)words);
    at[0] = raw.x, at[1] = raw.y, at[2] = raw.z, at[3] = raw.w;
  }
  __device__ __forceinline__ void store(uint32_t *words) const {
    __stcs((uint4 *)words, make_uint4(at[0], at[1], at[2], at[3]));
  }
};

/* The numbers in force, in registers that a warp shares: all lanes must call. */
static __device__ __forceinline__ qm_adam_numbers shared_numbers(const qm_adam_source &source) {
  union {
    qm_adam_numbers numbers;
    uint32_t words[sizeof(qm_adam_numbers) / 4];
  } all = {qm_adam_in_force(&source)};
#pragma unroll
  for (uint32_t &word : all.words) word = __reduce_or_sync(0xFFFFFFFFu, word);
  return all.numbers;
}

static constexpr __host__ __device__ qm_mpq_span span_of(int bits, int residual) {
  const int half = residual > 0 ? 1 << (residual - 1) : 0;
  const int top = (((1 << bits) - 1) << residual) + (half > 0 ? half - 1 : 0);
  return {residual, half, (float)(1 << residual), -(float)half, (float)top};
}

/* Moments of type M (void: none), codes of BITS, a residual of RESIDUAL bits. */
template <typename G, typename M, int BITS, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM,
          int BLOCKS = MOMENTUM || RESIDUAL != 0 ? 4 : 5>
static __global__ __launch_bounds__(THREADS, BLOCKS) void mpq_update_fused(
    const __grid_constant__ qm_mpq_view q, const G *grad, M *exp_avg, M *exp_avg_sq,
    int64_t *health, const __grid_constant__ qm_adam_source source, uint32_t across,
    uint32_t quads) {
  constexpr bool MOMENTS = !std::is_same<M, void>::value;
  using moment = typename std::conditional<MOMENTS, M, float>::type;
  constexpr int PER_WORD = 32 / BITS, PER_REST = RESIDUAL > 0 ? 32 / RESIDUAL : 1;
  constexpr int ROWS = PER_WORD < 8 ? 8 : PER_WORD, SLOTS = AHEAD + 1;
  static_assert(ROWS % SLOTS == 0, "rows take turns in the slots");
  constexpr qm_mpq_span span = span_of(BITS, RESIDUAL);
  const qm_adam_numbers step = shared_numbers(source);
  if (step.skip) return;
  qm_mpq_counts counts = {0, 0, 0.0f};
  const uint32_t i = blockIdx.x * (uint32_t)THREADS + threadIdx.x;
  if (i < quads) {
    const uint32_t strip = i / across, first_row = strip * ROWS;
    const int64_t n_count = q.n, n = (int64_t)(i - strip * across) * COLUMNS;
    int64_t at = first_row * n_count + n;
    const G *grad_at = grad + at;
    const moment *m_at = (const moment *)exp_avg + at, *v_at = (const moment *)exp_avg_sq + at;
    four<G> gs[SLOTS];
    four<moment> ms[SLOTS], vs[SLOTS];
    const auto fetch = [&](int slot) {
      gs[slot].load(grad_at);
      if (MOMENTS) ms[slot].load(m_at);
      if (MOMENTS) vs[slot].load(v_at);
      grad_at += n_count, m_at += n_count, v_at += n_count;
    };
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) fetch(slot);
    uint32_t *data = (uint32_t *)q.data.data + first_row / PER_WORD * n_count + n;
    uint32_t *rest = (uint32_t *)q.residual.data;
    four_words words, before, rests;
    words.load(data);
    if (RESIDUAL > 0) rests.load(rest += first_row / PER_REST * n_count + n);
    const qm_noise code_noise = qm_adam_noise(&step, QM_STREAM_CODES);
    const qm_noise moment_noise = qm_adam_noise(&step, QM_STREAM_EXP_AVG);
    const float watch = qm_mpq_watch(step);
    qm_mpq_units<COLUMNS> units;
    qm_mpq_units_of<COLUMNS, BITS>(q, step.rate, first_row / (uint32_t)q.group_size, n, &units);
    before = words;
#pragma unroll 1
    for (int base = 0; base < ROWS; base += SLOTS) {
#pragma unroll
      for (int slot = 0; slot < SLOTS; slot++) {
        const int r = base + slot;
        if (r + AHEAD < ROWS) fetch((slot + AHEAD) % SLOTS);
        if (PER_WORD < ROWS && r > 0 && r % PER_WORD == 0) {
          words.load(data += n_count);
          before = words;
        }
        if (RESIDUAL > 0 && PER_REST < ROWS && r > 0 && r % PER_REST == 0)
          rests.load(rest += n_count);
        qm_mpq_row<COLUMNS> row;
        gs[slot].expand(row.grad);
        if (MOMENTS) ms[slot].expand(row.m);
        if (MOMENTS) vs[slot].expand(row.v);
        float place[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          place[j] = qm_mpq_place_of(words.at[j] & qm_mpq_mask(BITS));
          row.code[j] = place[j] - QM_MPQ_PLACE;
          if (RESIDUAL > 0)
            place[j] = qm_mpq_place_of((words.at[j] & qm_mpq_mask(BITS)) << RESIDUAL |
                                       (rests.at[j] & qm_mpq_mask(RESIDUAL)));
        }
        qm_mpq_direct<COLUMNS, MOMENTS>(step, watch, units, &row, &counts);
        const uint64_t block = (uint64_t)at / COLUMNS;
        uint32_t random[4] = {0, 0, 0, 0};
        if (STOCHASTIC) qm_philox(&code_noise, block, random);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          const uint32_t after = qm_mpq_round<COLUMNS>(step, span, units, STOCHASTIC, MOMENTUM, j,
                                                       place[j], random[j], &row, &counts);
          words.at[j] = __funnelshift_r(words.at[j], after >> RESIDUAL, BITS);
          if (RESIDUAL > 0) rests.at[j] = __funnelshift_r(rests.at[j], after, RESIDUAL);
        }
        if (MOMENTUM && sizeof(moment) == 2) { /* a NaN of which rounding makes no number */
#pragma unroll
          for (int j = 0; j < COLUMNS; j++)
            if (row.m[j] != row.m[j]) row.m[j] = __uint_as_float(0x7FC00000u);
        }
        if (MOMENTS) {
          if (sizeof(moment) == 2) qm_philox(&moment_noise, block, random);
          store((moment *)exp_avg + at, (moment *)exp_avg_sq + at, row.m, row.v, random);
        }
        at += n_count;
        if (RESIDUAL > 0 && r % PER_REST == PER_REST - 1) rests.store(rest);
        if (r % PER_WORD == PER_WORD - 1) {
          words.store(data);
#pragma unroll
          for (int j = 0; j < COLUMNS; j++)
            counts.moved += qm_mpq_changed(before.at[j], words.at[j], BITS);
        }
      }
    }
  }
  qm_mpq_add_health(health, counts, q.k * q.n);
}

/* ---- launch ---- */

struct fused_call {
  qm_cuda *cuda;
  const qm_mpq_update_args *args;
  const qm_adam_source &source;
};

template <typename G, typename M, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM>
static bool launch(const fused_call &call) {
  constexpr int BITS = 4, ROWS = 8;
  const qm_mpq_update_args *args = call.args;
  const int64_t across = args->q.n / COLUMNS, quads = args->q.k / ROWS * across;
  if (quads > INT32_MAX) return false;
  if (quads == 0) return true;
  mpq_update_fused<G, M, BITS, RESIDUAL, STOCHASTIC, MOMENTUM>
      <<<(unsigned)qm_ceil_div(quads, THREADS), THREADS, 0, call.cuda->compute>>>(
          args->q, (const G *)args->grad.data, (M *)args->exp_avg.data, (M *)args->exp_avg_sq.data,
          (int64_t *)args->health.data, call.source, (uint32_t)across, (uint32_t)quads);
  return true;
}

template <typename G, typename M>
static bool choose_mode(const fused_call &call) {
  const int32_t feedback = call.args->options.feedback, bits = call.args->q.residual_bits;
  if (call.args->options.rounding != QM_ROUND_STOCHASTIC)
    return feedback == QM_FEEDBACK_NONE && launch<G, M, 0, false, false>(call);
  if (feedback == QM_FEEDBACK_NONE) return launch<G, M, 0, true, false>(call);
  if (feedback == QM_FEEDBACK_RESIDUAL)
    return bits == 8 ? launch<G, M, 8, true, false>(call) : launch<G, M, 4, true, false>(call);
  if constexpr (std::is_same<M, void>::value)
    return false;
  else
    return launch<G, M, 0, true, true>(call);
}

template <typename G>
static bool choose_moments(const fused_call &call) {
  if (call.args->exp_avg.data == NULL) return choose_mode<G, void>(call);
  return call.args->exp_avg.dtype == QM_F32 ? choose_mode<G, float>(call)
                                            : choose_mode<G, __nv_bfloat16>(call);
}

bool qm_cuda_mpq_update_fused(qm_cuda *cuda, const qm_mpq_update_args *args,
                              const qm_adam_source &source) {
  const qm_mpq_view &q = args->q;
  const bool fits = q.w_bit == 4 && qm_mpq_is_whole(q) && q.g_idx.data == NULL &&
                    q.q_perm.data == NULL && q.group_size % 8 == 0 &&
                    qm_mpq_grid_aligned(q, COLUMNS);
  const qm_array *arrays[] = {&q.data, &q.residual, &args->grad, &args->exp_avg, &args->exp_avg_sq};
  for (const qm_array *array : arrays)
    if (!fits || !qm_aligned(array->data, 4 * qm_element_size(array->dtype))) return false;
  const fused_call call = {cuda, args, source};
  if (args->grad.dtype == QM_F32) return choose_moments<float>(call);
  return args->grad.dtype == QM_BF16 && choose_moments<__nv_bfloat16>(call);
}
