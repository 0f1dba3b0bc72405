/* attention_wgmma_backward.cuh - what the two kernels of attention_wgmma_backward.cu share. */
#ifndef QM_ATTENTION_WGMMA_BACKWARD_CUH
#define QM_ATTENTION_WGMMA_BACKWARD_CUH

#include "attention_wgmma.cuh"

enum { GROUPS = 2, KEPT = 64 * GROUPS, THREADS = 128 * (GROUPS + 1) };

/* KEPT rows stay while tiles of QUERIES or KEYS rows pass: as many as the registers have room for.
** The next rows to stay arrive meanwhile.
** ROOM: enough for gather_dkv to hold its keys and values there, which spares shared memory, and to
** begin a step's products before the last one's are done. */
template <int D>
struct backward_plan {
  static constexpr int QUERIES = 64, KEYS = D == 64 ? 128 : 64;
  static constexpr int STAGES = D == 64 ? 4 : 3;
  static constexpr bool ROOM = D == 64;
  static constexpr int DKV_REGISTERS = 232, DKV_REGISTERS_LEFT = 40;
  static constexpr int DQ_REGISTERS = D == 64 ? 240 : 232, DQ_REGISTERS_LEFT = D == 64 ? 24 : 40;
  static constexpr int KEPT_BYTES = KEPT * D * 2;
  static constexpr int DKV_BYTES = 4 * KEPT_BYTES + STAGES * 2 * QUERIES * D * 2 + 1024;
  static constexpr int DQ_BYTES = 4 * KEPT_BYTES + STAGES * 2 * KEYS * D * 2 + 1024;
};

/* What a query's row is to its gradients, [H, stride] each: its lse, see qm_minus_lse, and delta =
** dout . out. Bulk copies take multiples of ROWS_ALIGNED, past a head's end too. */
enum { ROWS_ALIGNED = 4 };
struct query_rows {
  float *minus_lse, *delta;
  int64_t stride;
};

template <typename T>
struct gradients {
  query_rows rows;
  T *dq, *dk, *dv;
};
struct maps {
  CUtensorMap q, k, v, dout;
};

/* A tile that stays, as the fetching warp tells the others. */
struct kept_tile {
  qm_attention_span span;
  int32_t head, row;         /* head: of queries in gather_dq, of keys in gather_dkv */
  int32_t first, end, steps; /* the rows that pass, and in how many steps; < 0: no more tiles */
  int32_t open, close;       /* all rows of the tile meet those from open up to close */
};

/* Where a weight is 0 the slope is too, whatever the rows of others hold. */
template <int COLUMNS>
static __device__ __forceinline__ void qm_hide_slopes(float (&slopes)[COLUMNS][4],
                                                      const float (&weights)[COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (weights[n][j] == 0.0f) slopes[n][j] = 0.0f;
}

#endif
