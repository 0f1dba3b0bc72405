/* backend.cu - the CUDA backend's table, its devices, their memory and copies. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

const qm_host *qm_cuda_host;

static int32_t sync(void *context) {
  QM_CUDA_ENTER(context);
  return qm_cuda_wait(cuda, cuda->compute, "sync");
}

static void close_device(void *context) {
  qm_cuda *cuda = (qm_cuda *)context;
  cudaSetDevice(cuda->index);
  if (cuda->compute != NULL) cudaStreamSynchronize(cuda->compute);
  qm_cuda_gemm_close(cuda);
  qm_cuda_linalg_close(cuda);
  qm_cuda_marks_close(cuda);
  qm_cuda_readings_close(cuda);
  qm_cuda_staging_close(cuda);
  qm_cuda_scratch_close(cuda);
  if (cuda->late != NULL) cudaFree(cuda->late->taken);
  cudaFreeHost(cuda->late);
  if (cuda->event != NULL) cudaEventDestroy(cuda->event);
  if (cuda->copy != NULL) cudaStreamDestroy(cuda->copy);
  if (cuda->compute != NULL) cudaStreamDestroy(cuda->compute);
  free(cuda);
}

static int32_t open_parts(void *context) {
  cudaDeviceProp properties;
  QM_CUDA_ENTER(context);
  const cudaError_t errors[] = {
      cudaGetDeviceProperties(&properties, cuda->index),
      cudaStreamCreateWithFlags(&cuda->compute, cudaStreamNonBlocking),
      cudaStreamCreateWithFlags(&cuda->copy, cudaStreamNonBlocking),
      cudaEventCreateWithFlags(&cuda->event, cudaEventDisableTiming),
      cudaHostAlloc((void **)&cuda->late, sizeof *cuda->late, cudaHostAllocMapped),
  };
  for (const cudaError_t error : errors)
    if (const int32_t status = qm_cuda_check(error, "open")) return status;
  memset(cuda->late, 0, sizeof *cuda->late);
  const cudaError_t late_errors[] = {
      cudaHostGetDevicePointer((void **)&cuda->late_device, cuda->late, 0),
      cudaMalloc((void **)&cuda->late->taken, sizeof *cuda->late->taken),
      cudaMemset(cuda->late->taken, 0, sizeof *cuda->late->taken)};
  for (const cudaError_t error : late_errors)
    if (const int32_t status = qm_cuda_check(error, "open")) return status;
  cuda->multiprocessors = properties.multiProcessorCount;
  cuda->capability = properties.major * 10 + properties.minor;
  if (cuda->capability < 80)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: %s has compute capability %d.%d, at least 8.0 is needed",
                              properties.name, properties.major, properties.minor);
  const char *wgmma = getenv("QM_CUDA_WGMMA"), *wait_each = getenv("QM_CUDA_SYNC");
  cuda->has_wgmma = cuda->capability == 90 && (wgmma == NULL || strcmp(wgmma, "0") != 0);
  cuda->wait_each = wait_each != NULL && strcmp(wait_each, "1") == 0;
  snprintf(cuda->description, sizeof cuda->description,
           "%.120s, compute capability %d.%d, %.0f GiB", properties.name, properties.major,
           properties.minor, (double)properties.totalGlobalMem / 0x1p30);
  return qm_cuda_gemm_open(cuda);
}

static int32_t open_device(int32_t index, void **out) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) return qm_cuda_no_device(error);
  if (index >= count)
    return qm_cuda_host->fail(QM_E_DEVICE, "cuda: there is no device %d, the last one is %d", index,
                              count - 1);
  qm_cuda *cuda = (qm_cuda *)calloc(1, sizeof *cuda);
  if (cuda == NULL) return qm_cuda_host->fail(QM_E_MEMORY, "the host is out of memory");
  cuda->index = index;
  const int32_t status = open_parts(cuda);
  if (status != QM_OK)
    close_device(cuda);
  else
    *out = cuda;
  return status;
}

static void describe(void *context, qm_device_info *out) {
  const qm_cuda *cuda = (const qm_cuda *)context;
  size_t free_bytes = 0, total_bytes = 0;
  cudaSetDevice(cuda->index);
  cudaMemGetInfo(&free_bytes, &total_bytes);
  out->free_bytes = (int64_t)free_bytes;
  out->total_bytes = (int64_t)total_bytes;
  snprintf(out->description, sizeof out->description, "%s", cuda->description);
  out->fast_bf16 = 1;
  out->fused_rows = cuda->has_wgmma ? 128 : 64; /* two passes of Hopper's kernel */
}

static qm_backend backend;

extern "C" __attribute__((visibility("default"))) const qm_backend *qm_backend_entry(
    const qm_host *host) {
  qm_cuda_host = host;
  backend.version = QM_BACKEND_VERSION;
  backend.struct_size = sizeof backend;
  backend.name = "cuda";
  backend.open = open_device;
  backend.close = close_device;
  backend.describe = describe;
  backend.allocate = qm_cuda_allocate;
  backend.release = qm_cuda_release;
  backend.write = qm_cuda_write;
  backend.read = qm_cuda_read;
  backend.sync = sync;
  backend.read_begin = qm_cuda_read_begin;
  backend.read_ready = qm_cuda_read_ready;
  backend.read_end = qm_cuda_read_end;
  backend.copy_between = qm_cuda_copy_between;
  backend.graph_begin = qm_cuda_graph_begin;
  backend.graph_end = qm_cuda_graph_end;
  backend.graph_launch = qm_cuda_graph_launch;
  backend.graph_release = qm_cuda_graph_release;
  backend.time_begin = qm_cuda_time_begin;
  backend.time_end = qm_cuda_time_end;
  backend.time_read = qm_cuda_time_read;
  backend.range_begin = qm_cuda_range_begin;
  backend.range_end = qm_cuda_range_end;
  backend.workspace_bytes = qm_cuda_workspace_bytes;
  qm_kernels *kernels = &backend.kernels;
  kernels->accumulate = qm_cuda_accumulate;
  kernels->adam_direction = qm_cuda_adam_direction;
  kernels->adamw = qm_cuda_adamw;
  kernels->attention = qm_cuda_attention;
  kernels->attention_backward = qm_cuda_attention_backward;
  kernels->binary = qm_cuda_binary;
  kernels->cholesky_inverse = qm_cuda_cholesky_inverse;
  kernels->copy = qm_cuda_copy;
  kernels->cross_entropy = qm_cuda_cross_entropy;
  kernels->fill = qm_cuda_fill;
  kernels->gather = qm_cuda_gather;
  kernels->gemm = qm_cuda_gemm;
  kernels->gptq_rows = qm_cuda_gptq_rows;
  kernels->grad_scale = qm_cuda_grad_scale;
  kernels->layer_norm = qm_cuda_layer_norm;
  kernels->layer_norm_backward = qm_cuda_layer_norm_backward;
  kernels->mpq_dequantize = qm_cuda_mpq_dequantize;
  kernels->mpq_fit = qm_cuda_mpq_fit;
  kernels->mpq_linear = qm_cuda_mpq_linear;
  kernels->mpq_linear_group = qm_cuda_mpq_linear_group;
  kernels->mpq_pack = qm_cuda_mpq_pack;
  kernels->mpq_prepare = qm_cuda_mpq_prepare;
  kernels->mpq_unpack = qm_cuda_mpq_unpack;
  kernels->mpq_update = qm_cuda_mpq_update;
  kernels->mpq_update_bie = qm_cuda_mpq_update_bie;
  kernels->permute = qm_cuda_permute;
  kernels->qr = qm_cuda_qr;
  kernels->random = qm_cuda_random;
  kernels->reduce = qm_cuda_reduce;
  kernels->rms_norm = qm_cuda_rms_norm;
  kernels->rms_norm_backward = qm_cuda_rms_norm_backward;
  kernels->rope = qm_cuda_rope;
  kernels->rope_append = qm_cuda_rope_append;
  kernels->scatter = qm_cuda_scatter;
  kernels->scatter_add = qm_cuda_scatter_add;
  kernels->softmax = qm_cuda_softmax;
  kernels->sum_squares = qm_cuda_sum_squares;
  kernels->svd = qm_cuda_svd;
  kernels->swiglu = qm_cuda_swiglu;
  kernels->swiglu_backward = qm_cuda_swiglu_backward;
  kernels->unary = qm_cuda_unary;
  kernels->unary_backward = qm_cuda_unary_backward;
  return &backend;
}
