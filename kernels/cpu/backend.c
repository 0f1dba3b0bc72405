/* backend.c - the CPU backend: opens the device, picks the instruction-set level. */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu.h"

typedef struct level_choice {
  const char *name;
  void (*install)(qm_kernels *kernels);
} level_choice;

/* QM_CPU_LEVEL in the environment lowers the choice, so that a test can run every level. */
static level_choice choose_level(void) {
  level_choice best = {"base", qm_cpu_level_base};
#ifdef __x86_64__
  const char *wish = getenv("QM_CPU_LEVEL");
  const int most = wish == NULL                ? 4
                   : strcmp(wish, "base") == 0 ? 0
                   : strcmp(wish, "v3") == 0   ? 3
                                               : 4;
  __builtin_cpu_init();
  if (most >= 3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    best = (level_choice){"v3", qm_cpu_level_v3};
  if (most >= 4 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    best = (level_choice){"v4", qm_cpu_level_v4};
#endif
  return best;
}

/* AMX needs the CPU's bits (tile 24, bf16 22 of leaf 7's edx; bf16 in vectors, 5 of subleaf 1's
** eax) and the kernel's leave to hold the tiles' 8 KiB of state. QM_CPU_LEVEL=v4 does without. */
static int32_t may_use_amx(const char *level) {
#if defined(__x86_64__) && defined(__linux__)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  unsigned int a, b, c, d, narrow;
  if (strcmp(level, "v4") != 0 || getenv("QM_CPU_LEVEL") != NULL) return 0;
  if (!__get_cpuid_count(7, 1, &narrow, &b, &c, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
    return 0;
  if ((d >> 24 & 1) == 0 || (d >> 22 & 1) == 0 || (narrow >> 5 & 1) == 0) return 0;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  (void)level;
  return 0;
#endif
}

static qm_backend backend;

static int32_t open_device(int32_t index, void **out) {
  if (index != 0)
    return qm_reference_host->fail(QM_E_DEVICE, "the cpu backend has one device, index 0, got %d",
                                   index);
  qm_cpu_context *context = calloc(1, sizeof *context);
  if (context == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  context->threads = omp_get_max_threads();
  context->level = choose_level().name;
  context->amx = may_use_amx(context->level);
  context->kernels = &backend.kernels;
  const int32_t status = qm_cpu_gemm_open(context);
  if (status != QM_OK) {
    free(context);
    return status;
  }
  *out = context;
  return QM_OK;
}

static void close_device(void *context) {
  qm_cpu_gemm_close(context);
  free(context);
}

static void describe(void *opaque, qm_device_info *out) {
  const qm_cpu_context *context = opaque;
  char model[128] = "";
  FILE *file = fopen("/proc/cpuinfo", "r");
  char line[256];
  while (file != NULL && fgets(line, sizeof line, file) != NULL)
    if (sscanf(line, "model name : %127[^\n]", model) == 1) break;
  if (file != NULL) fclose(file);
  snprintf(out->description, sizeof out->description, "%s, level %s%s",
           model[0] != '\0' ? model : "CPU", context->level,
           context->amx    ? ", amx"
           : context->bf16 ? ", bf16"
                           : "");
  out->threads = context->threads;
  out->fast_bf16 = context->bf16;
  out->fused_rows = 16; /* where tiles multiply bf16; other CPUs gain up to 64 */
}

const qm_backend *qm_cpu_backend(const qm_host *host) {
  if (backend.struct_size != 0) return &backend; /* other threads may be reading it */
  backend = *qm_reference_backend(host);
  backend.name = "cpu";
  backend.open = open_device;
  backend.close = close_device;
  backend.describe = describe;
  choose_level().install(&backend.kernels);
  backend.kernels.gemm = qm_cpu_gemm;
  backend.kernels.svd = qm_cpu_svd;
  backend.kernels.qr = qm_cpu_qr;
  backend.kernels.cholesky_inverse = qm_cpu_cholesky_inverse;
  return &backend;
}
