/* graph.cu - what the compute stream is asked to do, captured once and launched as a whole. */
#include "memory.h"

/* Relaxed: the host may allocate memory and use other streams meanwhile. */
int32_t qm_cuda_graph_begin(void *context) {
  QM_CUDA_ENTER(context);
  const cudaError_t error = cudaStreamBeginCapture(cuda->compute, cudaStreamCaptureModeRelaxed);
  cuda->recording = error == cudaSuccess;
  return qm_cuda_check(error, "graph");
}

int32_t qm_cuda_graph_end(void *context, void **graph) {
  QM_CUDA_ENTER(context);
  cudaGraph_t captured = NULL;
  cudaGraphExec_t launchable = NULL;
  cuda->recording = false;
  cudaError_t error = cudaStreamEndCapture(cuda->compute, &captured);
  if (graph == NULL) { /* given up, perhaps because the capture broke: that was said before */
    cudaGetLastError();
    error = cudaSuccess;
  } else if (error == cudaSuccess) {
    error = cudaGraphInstantiate(&launchable, captured, 0);
    if (error == cudaSuccess) error = cudaGraphUpload(launchable, cuda->compute);
    *graph = launchable;
  }
  if (captured != NULL) cudaGraphDestroy(captured);
  return qm_cuda_check(error, "graph");
}

int32_t qm_cuda_graph_launch(void *context, void *graph) {
  QM_CUDA_ENTER(context);
  const cudaError_t error = cudaGraphLaunch((cudaGraphExec_t)graph, cuda->compute);
  return error != cudaSuccess ? qm_cuda_check(error, "graph") : qm_cuda_launched(cuda, "graph");
}

/* A launch in flight finishes: CUDA keeps what it needs until then. */
void qm_cuda_graph_release(void *context, void *graph) {
  qm_cuda *cuda = (qm_cuda *)context;
  cudaSetDevice(cuda->index);
  cudaGraphExecDestroy((cudaGraphExec_t)graph);
}
