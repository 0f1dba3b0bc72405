/* backend.cu - the CUDA backend's table, its devices, their memory and copies. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

const qm_host *qm_cuda_host;

struct qm_cuda_retired {
  qm_cuda_retired *next;
  void *memory;
};

static const char *const operation_names[] = {
#define X(name) #name,
    QM_KERNEL_LIST(X)
#undef X
};

int32_t qm_cuda_check(cudaError_t error, const char *operation) {
  if (error == cudaSuccess) return QM_OK;
  cudaGetLastError(); /* take it, where it can be taken */
  return qm_cuda_host->fail(error == cudaErrorMemoryAllocation ? QM_E_MEMORY : QM_E_DEVICE,
                            "cuda: %s: %s", operation, cudaGetErrorString(error));
}

int32_t qm_cuda_launched(qm_cuda *cuda, const char *operation) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && cuda->wait_each) error = cudaStreamSynchronize(cuda->compute);
  return qm_cuda_check(error, operation);
}

int32_t qm_cuda_scratch(qm_cuda *cuda, int64_t size_bytes, void **out) {
  if (size_bytes > cuda->scratch_bytes) {
    /* Queued work, and recorded graphs, still use the old one: it stays until the device closes.
    ** Doubling bounds what stays by what is in use. */
    const int64_t doubled = 2 * cuda->scratch_bytes;
    const int64_t wanted = size_bytes > doubled ? size_bytes : doubled;
    void *memory = NULL;
    const int32_t status = qm_cuda_check(cudaMalloc(&memory, (size_t)wanted), "workspace");
    if (status != QM_OK) return status;
    if (cuda->scratch != NULL) {
      qm_cuda_retired *retired = (qm_cuda_retired *)malloc(sizeof *retired);
      if (retired != NULL) *retired = {cuda->retired, cuda->scratch};
      if (retired != NULL) cuda->retired = retired;
    }
    cuda->scratch = memory;
    cuda->scratch_bytes = wanted;
  }
  *out = cuda->scratch;
  return QM_OK;
}

/* Wait for the compute stream; report what failed late. */
static int32_t wait(qm_cuda *cuda, const char *operation) {
  const int32_t status = qm_cuda_check(cudaStreamSynchronize(cuda->compute), operation);
  if (status != QM_OK) return status;
  qm_cuda_late *late = cuda->late;
  if (late->found == 0) return QM_OK;
  late->found = 0;
  return qm_cuda_host->fail(QM_E_ARGUMENT, "%s: index %lld is outside 0 .. %lld",
                            operation_names[late->operation], (long long)late->value,
                            (long long)late->limit - 1);
}

static int32_t sync(void *context) {
  QM_CUDA_ENTER(context);
  return wait(cuda, "sync");
}

static int32_t write_bytes(void *context, void *out, const void *host, int64_t size_bytes) {
  QM_CUDA_ENTER(context);
  const cudaError_t error =
      cudaMemcpyAsync(out, host, (size_t)size_bytes, cudaMemcpyHostToDevice, cuda->compute);
  return qm_cuda_check(error, "write");
}

static int32_t read_bytes(void *context, const void *x, void *host, int64_t size_bytes) {
  QM_CUDA_ENTER(context);
  const cudaError_t error =
      cudaMemcpyAsync(host, x, (size_t)size_bytes, cudaMemcpyDeviceToHost, cuda->compute);
  const int32_t status = qm_cuda_check(error, "read");
  return status != QM_OK ? status : wait(cuda, "read");
}

static int32_t allocate(void *context, int64_t size_bytes, void **memory) {
  QM_CUDA_ENTER(context);
  const cudaError_t error = cudaMalloc(memory, (size_t)size_bytes);
  if (error != cudaErrorMemoryAllocation) return qm_cuda_check(error, "allocate");
  cudaGetLastError();
  return QM_E_MEMORY; /* the engine's allocator words it */
}

static void release(void *context, void *memory, int64_t size_bytes) {
  (void)size_bytes;
  qm_cuda *cuda = (qm_cuda *)context;
  cudaSetDevice(cuda->index);
  cudaFree(memory); /* waits for the device: nothing queued can still use it */
}

static void close_device(void *context) {
  qm_cuda *cuda = (qm_cuda *)context;
  cudaSetDevice(cuda->index);
  if (cuda->compute != NULL) cudaStreamSynchronize(cuda->compute);
  while (cuda->retired != NULL) {
    qm_cuda_retired *retired = cuda->retired;
    cuda->retired = retired->next;
    cudaFree(retired->memory);
    free(retired);
  }
  qm_cuda_gemm_close(cuda);
  cudaFree(cuda->scratch);
  cudaFreeHost(cuda->late);
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
      cudaHostAlloc((void **)&cuda->late, sizeof *cuda->late, cudaHostAllocMapped),
  };
  for (const cudaError_t error : errors)
    if (const int32_t status = qm_cuda_check(error, "open")) return status;
  memset(cuda->late, 0, sizeof *cuda->late);
  if (const int32_t status = qm_cuda_check(
          cudaHostGetDevicePointer((void **)&cuda->late_device, cuda->late, 0), "open"))
    return status;
  cuda->multiprocessors = properties.multiProcessorCount;
  cuda->capability = properties.major * 10 + properties.minor;
  if (cuda->capability < 80)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: %s has compute capability %d.%d, at least 8.0 is needed",
                              properties.name, properties.major, properties.minor);
  const char *wait_each = getenv("QM_CUDA_SYNC");
  cuda->wait_each = wait_each != NULL && strcmp(wait_each, "1") == 0;
  snprintf(cuda->description, sizeof cuda->description,
           "%.120s, compute capability %d.%d, %.0f GiB", properties.name, properties.major,
           properties.minor, (double)properties.totalGlobalMem / 0x1p30);
  return qm_cuda_gemm_open(cuda);
}

static int32_t open_device(int32_t index, void **out) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0)
    return qm_cuda_host->fail(QM_E_DEVICE, "cuda: no usable device: %s",
                              error != cudaSuccess ? cudaGetErrorString(error) : "none is there");
  if (index >= count)
    return qm_cuda_host->fail(QM_E_DEVICE, "cuda: there are %d devices, got index %d", count,
                              index);
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
  snprintf(out->description, sizeof out->description, "%s", cuda->description);
  out->fast_bf16 = 1;
  out->fused_rows = 64;
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
  backend.allocate = allocate;
  backend.release = release;
  backend.write = write_bytes;
  backend.read = read_bytes;
  backend.sync = sync;
  qm_kernels *kernels = &backend.kernels;
  kernels->accumulate = qm_cuda_accumulate;
  kernels->adam_direction = qm_cuda_adam_direction;
  kernels->adamw = qm_cuda_adamw;
  kernels->attention = qm_cuda_attention;
  kernels->attention_backward = qm_cuda_attention_backward;
  kernels->binary = qm_cuda_binary;
  kernels->copy = qm_cuda_copy;
  kernels->cross_entropy = qm_cuda_cross_entropy;
  kernels->fill = qm_cuda_fill;
  kernels->gather = qm_cuda_gather;
  kernels->gemm = qm_cuda_gemm;
  kernels->grad_scale = qm_cuda_grad_scale;
  kernels->permute = qm_cuda_permute;
  kernels->random = qm_cuda_random;
  kernels->reduce = qm_cuda_reduce;
  kernels->rms_norm = qm_cuda_rms_norm;
  kernels->rms_norm_backward = qm_cuda_rms_norm_backward;
  kernels->rope = qm_cuda_rope;
  kernels->scatter_add = qm_cuda_scatter_add;
  kernels->softmax = qm_cuda_softmax;
  kernels->sum_squares = qm_cuda_sum_squares;
  kernels->swiglu = qm_cuda_swiglu;
  kernels->swiglu_backward = qm_cuda_swiglu_backward;
  kernels->unary = qm_cuda_unary;
  return &backend;
}
