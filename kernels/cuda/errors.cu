/* errors.cu - what failed, in words that name the operation: at once, or when the host waits. */
#include "memory.h"

static const char *const operation_names[] = {
#define X(name) #name,
    QM_KERNEL_LIST(X)
#undef X
};

/* Failures of queued work. CUDA tells the next call that asks, and the process cannot use the
** device any more. */
static bool is_late(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable: return true;
    default: return false;
  }
}

static int32_t report(cudaError_t error, const char *operation, bool exact) {
  if (error == cudaSuccess) return QM_OK;
  cudaGetLastError(); /* take it, where it can be taken */
  const char *words = cudaGetErrorString(error);
  if (is_late(error) && !exact)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: one of the operations since the last wait failed, the last "
                              "of them '%s': %s. This process has lost the device; with "
                              "QM_CUDA_SYNC=1 the error names the operation",
                              operation, words);
  if (is_late(error))
    return qm_cuda_host->fail(QM_E_DEVICE, "cuda: %s: %s. This process has lost the device",
                              operation, words);
  return qm_cuda_host->fail(error == cudaErrorMemoryAllocation ? QM_E_MEMORY : QM_E_DEVICE,
                            "cuda: %s: %s", operation, words);
}

int32_t qm_cuda_check(cudaError_t error, const char *operation) {
  return report(error, operation, false);
}

int32_t qm_cuda_launched(qm_cuda *cuda, const char *operation) {
  cuda->last = operation;
  cudaError_t error = cudaGetLastError();
  const bool waits = cuda->wait_each && !cuda->recording;
  if (error == cudaSuccess && waits) error = cudaStreamSynchronize(cuda->compute);
  return report(error, operation, waits);
}

int32_t qm_cuda_wait(qm_cuda *cuda, cudaStream_t stream, const char *operation) {
  const cudaError_t error = cudaStreamSynchronize(stream);
  const bool late = is_late(error) && cuda->last != NULL;
  const int32_t status = report(error, late ? cuda->last : operation, false);
  return status != QM_OK ? status : qm_cuda_late_index(cuda);
}

int32_t qm_cuda_late_index(qm_cuda *cuda) {
  qm_cuda_late *late = cuda->late;
  if (late->found == 0) return QM_OK;
  late->found = 0;
  const cudaError_t error = cudaMemsetAsync(late->taken, 0, sizeof *late->taken, cuda->compute);
  if (const int32_t status = qm_cuda_check(error, "sync")) return status;
  if (late->operation == QM_CUDA_OP_attention) /* whose only indices are its offsets */
    return qm_cuda_host->fail(QM_E_ARGUMENT,
                              "attention: expected offsets ascending from 0 to the number of rows, "
                              "which entry %lld does not",
                              -1 - (long long)late->value);
  return qm_cuda_host->fail(QM_E_ARGUMENT, "%s: index %lld is outside 0 .. %lld",
                            operation_names[late->operation], (long long)late->value,
                            (long long)late->limit - 1);
}

int32_t qm_cuda_no_device(cudaError_t error) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: no NVIDIA driver is installed (there is no libcuda.so.1)");
  if (error == cudaErrorInsufficientDriver)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: the NVIDIA driver is too old: it serves CUDA %d.%d, this "
                              "library was built with %d.%d",
                              driver / 1000, driver % 1000 / 10, runtime / 1000,
                              runtime % 1000 / 10);
  if (error == cudaSuccess || error == cudaErrorNoDevice)
    return qm_cuda_host->fail(QM_E_DEVICE,
                              "cuda: the driver shows no GPU (CUDA_VISIBLE_DEVICES may hide it)");
  return qm_cuda_host->fail(QM_E_DEVICE, "cuda: no usable GPU: %s", cudaGetErrorString(error));
}
