/* accumulate.cu - out = alpha x + beta out. Reference: kernels/reference/elementwise.c, equal bit
** for bit: two products, then a sum. */
#include "pack.cuh"

struct scaled {
  float alpha;
  __device__ float operator()(float x) const { return alpha * x; }
};

template <int N, typename From, typename To>
static __global__ void __launch_bounds__(QM_MAP_THREADS)
    accumulate(const From *x, To *out, int64_t count, bool packs, float alpha, float beta) {
  const int64_t first = ((int64_t)blockIdx.x * (QM_MAP_TILES * QM_MAP_THREADS) + threadIdx.x) * N;
  float v[QM_MAP_TILES][N], sum[QM_MAP_TILES][N];
#pragma unroll
  for (int tile = 0; tile < QM_MAP_TILES; tile++) {
    const int64_t i = first + tile * (QM_MAP_THREADS * N);
    qm_read<N>(x + i, packs && i + N <= count, count - i, v[tile]);
    qm_read<N>(out + i, packs && i + N <= count, count - i, sum[tile]);
  }
#pragma unroll
  for (int tile = 0; tile < QM_MAP_TILES; tile++) {
#pragma unroll
    for (int j = 0; j < N; j++) sum[tile][j] = alpha * v[tile][j] + beta * sum[tile][j];
    const int64_t i = first + tile * (QM_MAP_THREADS * N);
    qm_write<N>(out + i, packs && i + N <= count, count - i, sum[tile]);
  }
}

template <typename From, typename To>
static int32_t launch(qm_cuda *cuda, const qm_accumulate_args *args) {
  const int64_t count = args->out.count;
  const float alpha = (float)args->alpha, beta = (float)args->beta;
  const From *x = (const From *)args->x.data;
  To *out = (To *)args->out.data;
  if (beta == 0.0f) return qm_map<From, To>(cuda, "accumulate", x, out, count, scaled{alpha});
  constexpr int N = sizeof(From) > sizeof(To) ? qm_width<From> : qm_width<To>;
  if (count == 0) return QM_OK;
  const int64_t blocks = qm_ceil_div(count, (int64_t)N * QM_MAP_THREADS * QM_MAP_TILES);
  accumulate<N><<<(unsigned)blocks, QM_MAP_THREADS, 0, cuda->compute>>>(
      x, out, count, qm_packs<N>(x) && qm_packs<N>(out), alpha, beta);
  return qm_cuda_launched(cuda, "accumulate");
}

int32_t qm_cuda_accumulate(void *context, const qm_accumulate_args *args) {
  QM_CUDA_ENTER(context);
  return qm_with_float(args->x.dtype, [&](auto from) {
    return qm_with_float(args->out.dtype,
                         [&](auto to) { return launch<decltype(from), decltype(to)>(cuda, args); });
  });
}
