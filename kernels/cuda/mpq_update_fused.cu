/* mpq_update_fused.cu - one Adam step of a quantized parameter, each byte read and written once.
**
** Reference: kernels/reference/mpq_update.c, equal bit for bit.
** Launch:    a thread walks down 4 columns, a word or two of them. AHEAD rows are on their way
**            through shared memory while one is at work: 4 gradients and moments, 16 bytes each in
**            f32. One Philox block serves 4 columns. Codes leave a word at its low end and enter at
**            the high one. Registers decide how many threads hide each other's latency: what a row
**            needs once lies in shared memory.
** Cost:      4 bits, f32 gradient and moments: reads 12.5 and writes 8.5 bytes an element, memory
**            bound; bf16 moments 8.5 and 4.5 (f32 gradient), where instructions weigh as much.
*/
#include "copy_async.cuh"
#include "four.cuh"
#include "mpq_step.cuh"
#include "mpq_update.cuh"
#include "noise.cuh"

enum { THREADS = 128, COLUMNS = 4, BITS = 4, PER_WORD = 8, AHEAD = 3, SLOTS = AHEAD + 1 };
enum { BLOCKS = 5 }; /* of a multiprocessor at once */

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

static constexpr __host__ __device__ qm_mpq_span span_of(int residual) {
  const int half = residual > 0 ? 1 << (residual - 1) : 0;
  const int top = (((1 << BITS) - 1) << residual) + (half > 0 ? half - 1 : 0);
  return {residual, half, (float)(1 << residual), -(float)half, (float)top};
}

/* x[j], and x[j] = value, where x stays in registers. */
template <typename T>
static __device__ __forceinline__ T pick(const T x[COLUMNS], int j) {
  return j < 2 ? (j == 0 ? x[0] : x[1]) : (j == 2 ? x[2] : x[3]);
}
static __device__ __forceinline__ void put(float x[COLUMNS], int j, float value) {
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) x[i] = i == j ? value : x[i];
}

/* What a launch works on. */
template <typename G, typename M>
struct fused_operands {
  const G *grad;
  M *exp_avg, *exp_avg_sq;
  int64_t *health;
  uint32_t across, words; /* quads in a row, words in a column */
};

/* Moments of type M (void: none), a residual of RESIDUAL bits. */
template <typename G, typename M, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM>
struct fused {
  static constexpr bool MOMENTS = !std::is_same<M, void>::value;
  using moment = typename std::conditional<MOMENTS, M, float>::type;
  static constexpr bool HALF = MOMENTS && sizeof(moment) == 2, DRAWS = STOCHASTIC || HALF;
  static constexpr int PER_REST = RESIDUAL > 0 ? 32 / RESIDUAL : PER_WORD;
  static_assert(PER_WORD % SLOTS == 0 && PER_REST % SLOTS == 0, "rows take turns");
  /* Words of a column that a thread walks. Short walks keep the memory busy; longer ones spread
  ** what is done once, which weighs where rows are short of bytes. */
  static constexpr uint32_t SHARE = MOMENTS && !HALF ? 1 : 2;

  /* A block's shared memory; each thread has its own places, and waits for nobody. */
  struct shared {
    qm_four<G> grad[SLOTS][THREADS];
    qm_four<moment> m[MOMENTS ? SLOTS : 1][THREADS], v[MOMENTS ? SLOTS : 1][THREADS];
    qm_four<uint32_t> codes[2][THREADS], rests[RESIDUAL > 0 ? THREADS : 1];
    qm_four<float> scale[MOMENTUM ? THREADS : 1], rate[THREADS], zero[THREADS];
  };

  /* Lay out what belongs to a group; its root_least. */
  static __device__ __forceinline__ float enter_group(const qm_mpq_view &q,
                                                      const qm_adam_numbers &step, uint32_t group,
                                                      uint32_t column, shared &mine) {
    const uint32_t t = threadIdx.x;
    qm_mpq_units<COLUMNS> units;
    qm_mpq_units_of<COLUMNS, BITS>(q, step.rate, group, (int64_t)column * COLUMNS, &units);
    mine.rate[t].keep(units.rate);
    mine.zero[t].keep(units.zero);
    if (MOMENTUM) mine.scale[t].keep(units.scale);
    return qm_mpq_root_least(step, units);
  }

  /* A row column by column, whose operands still lie in `slot`. */
  static __device__ __forceinline__ void step_carefully(const shared &mine, int slot,
                                                        const qm_adam_numbers &step,
                                                        const uint32_t random[COLUMNS],
                                                        qm_mpq_row<COLUMNS> *row,
                                                        qm_mpq_counts *counts) {
    const uint32_t t = threadIdx.x;
#pragma unroll 1
    for (int j = 0; j < COLUMNS; j++) {
      qm_mpq_element x;
      x.place = __float_as_uint(pick(row->place, j)) - QM_MPQ_PLACE_BITS;
      x.random = pick(random, j);
      x.scale = MOMENTUM ? mine.scale[t].at(j) : 1.0f;
      x.rate = mine.rate[t].at(j), x.zero = mine.zero[t].at(j);
      x.grad = mine.grad[slot][t].at(j), x.m = x.v = 0.0f;
      if (MOMENTS) x.m = mine.m[slot][t].at(j), x.v = mine.v[slot][t].at(j);
      const uint32_t after =
          qm_mpq_step_carefully<MOMENTS>(step, span_of(RESIDUAL), STOCHASTIC, MOMENTUM, &x, counts);
      /* An arithmetic NaN is none any more where rounding carries. */
      if (MOMENTUM && HALF && x.m != x.m) x.m = __uint_as_float(0x7FC00000u);
      put(row->m, j, x.m);
      put(row->v, j, x.v);
      put(row->got, j, __uint_as_float(after + QM_MPQ_PLACE_BITS));
    }
  }

  static __device__ __forceinline__ void run(const qm_mpq_view &q, const qm_adam_numbers &step,
                                             const fused_operands<G, moment> &to, shared &mine,
                                             qm_mpq_counts *counts) {
    const uint32_t column = blockIdx.x * (uint32_t)THREADS + threadIdx.x, across = to.across;
    const uint32_t first = blockIdx.y * SHARE, t = threadIdx.x;
    const uint32_t end = first + SHARE < to.words ? first + SHARE : to.words;
    /* Not a constant to the compiler, which so masks a code and sets these bits at once. */
    const uint32_t place_bits = __reduce_or_sync(0xFFFFFFFFu, QM_MPQ_PLACE_BITS);
    const qm_philox_keys keys(qm_adam_noise(&step, QM_STREAM_CODES));
    if (column >= across) return;
    /* What lies in this thread's columns. Rows and words are counted in quads. */
    const G *grad = to.grad + (int64_t)column * COLUMNS;
    moment *exp_avg = to.exp_avg + (int64_t)column * COLUMNS;
    moment *exp_avg_sq = to.exp_avg_sq + (int64_t)column * COLUMNS;
    uint32_t *data = (uint32_t *)q.data.data + (int64_t)column * COLUMNS;
    uint32_t *residual = (uint32_t *)q.residual.data + (int64_t)column * COLUMNS;
    uint32_t row_at = first * PER_WORD * across;
    uint32_t rest_at = RESIDUAL > 0 ? first * (PER_WORD / PER_REST) * across : 0;
    const uint32_t behind = end * PER_WORD * across;
    /* Row `r` of a word goes to its slot, and with it what begins there. */
    const auto fetch = [&](int r, uint32_t ahead, uint32_t word, uint32_t rest_from) {
      const int slot = r % SLOTS;
      if (ahead < behind) {
        qm_copy_four(&mine.grad[slot][t], grad, ahead);
        if (MOMENTS) qm_copy_four(&mine.m[slot][t], exp_avg, ahead);
        if (MOMENTS) qm_copy_four(&mine.v[slot][t], exp_avg_sq, ahead);
        if (r % PER_WORD == 0) qm_copy_four(&mine.codes[word % 2][t], data, word * across);
        if (RESIDUAL > 0 && r % PER_REST == 0) qm_copy_four(&mine.rests[t], residual, rest_from);
      }
      qm_copy_commit();
    };
#pragma unroll
    for (int r = 0; r < AHEAD; r++) fetch(r, row_at + r * across, first, rest_at);
    const uint32_t group_words = (uint32_t)q.group_size / PER_WORD;
    uint32_t group_end = first; /* in words */
    float root_least = 0.0f;
    for (uint32_t word = first; word < end; word++) {
      if (word >= group_end) {
        const uint32_t group = word / group_words;
        root_least = enter_group(q, step, group, column, mine);
        group_end = (group + 1) * group_words;
      }
      uint32_t codes[COLUMNS], rests[COLUMNS];
#pragma unroll 1
      for (int base = 0; base < PER_WORD; base += SLOTS) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
          const int r = base + slot;
          qm_copy_wait<AHEAD - 1>();
          if (r == 0) mine.codes[word % 2][t].expand(codes);
          if (RESIDUAL > 0 && r % PER_REST == 0) mine.rests[t].expand(rests);
          qm_mpq_row<COLUMNS> row;
          mine.grad[slot][t].expand(row.grad);
          if (MOMENTS) mine.m[slot][t].expand(row.m), mine.v[slot][t].expand(row.v);
          fetch(r + AHEAD, row_at + AHEAD * across, word + 1, rest_at + across);
          qm_mpq_units<COLUMNS> units;
          if (MOMENTUM) mine.scale[t].expand(units.scale);
          mine.rate[t].expand(units.rate);
          mine.zero[t].expand(units.zero);
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) {
            const uint32_t code = codes[j] & qm_mpq_mask(BITS);
            row.place[j] = __uint_as_float(code | place_bits);
            row.code[j] = row.place[j] - QM_MPQ_PLACE;
            if (RESIDUAL > 0)
              row.place[j] = __uint_as_float(code << RESIDUAL | (rests[j] & qm_mpq_mask(RESIDUAL)) |
                                             place_bits);
          }
          uint32_t random[COLUMNS] = {};
          if (DRAWS) keys.draw(row_at + column, random);
          qm_mpq_step_quickly<COLUMNS, MOMENTS, BITS, RESIDUAL, STOCHASTIC, MOMENTUM>(
              step, units, root_least, random, &row, counts,
              [&] { step_carefully(mine, slot, step, random, &row, counts); });
          if (MOMENTS) qm_store_moments(exp_avg, exp_avg_sq, row_at, row.m, row.v, random);
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) {
            const uint32_t after = __float_as_uint(row.got[j]);
            codes[j] = __funnelshift_r(codes[j], after >> RESIDUAL, BITS);
            if (RESIDUAL > 0) rests[j] = __funnelshift_r(rests[j], after, RESIDUAL);
          }
          if (RESIDUAL > 0 && r % PER_REST == PER_REST - 1) {
            qm_store_words(residual, rest_at, rests);
            rest_at += across;
          }
          row_at += across;
        }
      }
      qm_store_words(data, word * across, codes);
      uint32_t before[COLUMNS];
      mine.codes[word % 2][t].expand(before);
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) counts->moved += qm_mpq_changed(before[j], codes[j], BITS);
    }
  }
};

template <typename G, typename M, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM>
static __global__ __launch_bounds__(THREADS, BLOCKS) void mpq_update_fused(
    const __grid_constant__ qm_mpq_view q, const __grid_constant__ qm_adam_source source,
    const __grid_constant__
        fused_operands<G, typename fused<G, M, RESIDUAL, STOCHASTIC, MOMENTUM>::moment>
            operands) {
  using body = fused<G, M, RESIDUAL, STOCHASTIC, MOMENTUM>;
  __shared__ typename body::shared mine;
  const qm_adam_numbers step = shared_numbers(source);
  if (step.skip) return;
  qm_mpq_counts counts = {0, 0, 0};
  body::run(q, step, operands, mine, &counts);
  qm_mpq_add_health(operands.health, counts, q.k * q.n);
}

/* ---- launch ---- */

struct fused_call {
  qm_cuda *cuda;
  const qm_mpq_update_args *args;
  const qm_adam_source &source;
};

template <typename G, typename M, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM>
static bool launch(const fused_call &call) {
  using body = fused<G, M, RESIDUAL, STOCHASTIC, MOMENTUM>;
  using moment = typename body::moment;
  const qm_mpq_update_args *args = call.args;
  const int64_t across = args->q.n / COLUMNS, words = args->q.k / PER_WORD;
  const int64_t high = qm_ceil_div(words, body::SHARE);
  if ((args->q.k + PER_WORD) * across > UINT32_MAX || high > UINT16_MAX) return false;
  if (across * words == 0) return true;
  const fused_operands<G, moment> operands = {(const G *)args->grad.data,
                                              (moment *)args->exp_avg.data,
                                              (moment *)args->exp_avg_sq.data,
                                              (int64_t *)args->health.data,
                                              (uint32_t)across,
                                              (uint32_t)words};
  const dim3 grid((unsigned)qm_ceil_div(across, THREADS), (unsigned)high);
  mpq_update_fused<G, M, RESIDUAL, STOCHASTIC, MOMENTUM>
      <<<grid, THREADS, 0, call.cuda->compute>>>(args->q, call.source, operands);
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
