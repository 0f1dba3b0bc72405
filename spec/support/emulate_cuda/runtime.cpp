/* runtime.cpp - as much of a CUDA runtime as our backend's host side needs, on a machine without a
** GPU.
**
** It does what the real one may do at worst: queued work runs as late as possible, namely when
** somebody waits for it. Memory is what malloc gives, poisoned when it comes and when it goes. An
** asynchronous copy must be between device memory and pinned memory, both still there when it runs,
** or to the host's ordinary memory, for which the caller waits. What the real one forbids (waiting
** for a stream that is captured, say) ends the capture or the process.
*/
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

using Memory = std::map<char *, size_t>;
struct Graph {
  std::vector<Work> work;
};
struct Token { /* one recording of an event */
  CUstream_st *stream;
  bool done;
  long when;
};
struct CUevent_st {
  std::shared_ptr<Token> token;
};
struct CUstream_st {
  std::deque<Work> queue;
  std::unique_ptr<Graph> capture;
  bool broken = false;
};

static const size_t limit_bytes = (size_t)3 << 30;
static size_t device_bytes;
static Memory device_memory, pinned_memory;
static std::vector<CUstream_st *> streams;
static cudaError_t last_error = cudaSuccess, lost = cudaSuccess;
static long work_done;

static void die(const char *what) {
  fprintf(stderr, "emulated CUDA: %s\n", what);
  abort();
}

static bool within(const Memory &memory, const void *data, size_t size_bytes) {
  auto after = memory.upper_bound((char *)data);
  if (after == memory.begin()) return false;
  const auto &[begin, size] = *--after;
  return (char *)data + size_bytes <= begin + size;
}

void runtime_lose() { lost = cudaErrorIllegalAddress; }

void runtime_fail(cudaError_t error) { last_error = error; }

void runtime_queue(cudaStream_t stream, Work work) {
  if (stream->capture)
    stream->capture->work.push_back(std::move(work));
  else
    stream->queue.push_back(std::move(work));
}

static void step(CUstream_st *stream) {
  if (stream->queue.empty()) die("somebody waits for an event that will not come");
  const Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  work_done++;
  work();
}

static void drain(CUstream_st *stream) {
  while (!stream->queue.empty()) step(stream);
}

static void wait(const std::shared_ptr<Token> &token) {
  while (token && !token->done) step(token->stream);
}

static cudaError_t answer(cudaError_t error = cudaSuccess) {
  if (lost != cudaSuccess) return lost;
  if (error != cudaSuccess) last_error = error;
  return error;
}

static cudaError_t give_back(Memory &memory, void *data) {
  if (data == NULL) return answer();
  if (memory.count((char *)data) == 0) die("memory is given back that was not taken");
  for (size_t i = 0; i < streams.size(); i++) drain(streams[i]);
  memset(data, 0xEE, memory[(char *)data]);
  memory.erase((char *)data);
  free(data);
  return answer();
}

extern "C" {

/* ---- devices and errors ---- */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "no GPU at all");
  properties->major = 9;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = limit_bytes;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = lost != cudaSuccess ? lost : last_error;
  last_error = cudaSuccess;
  return error;
}
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "some error";
  }
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **out, size_t size_bytes) {
  if (device_bytes + size_bytes > limit_bytes) return answer(cudaErrorMemoryAllocation);
  /* No byte more than asked for: the sanitizer sees what kernels touch behind it. */
  if (posix_memalign(out, 256, size_bytes + (size_bytes == 0)) != 0)
    return answer(cudaErrorMemoryAllocation);
  memset(*out, 0xFF, size_bytes);
  device_memory[(char *)*out] = size_bytes;
  device_bytes += size_bytes;
  return answer();
}
cudaError_t cudaFree(void *data) {
  if (data != NULL) device_bytes -= device_memory[(char *)data];
  return give_back(device_memory, data);
}
cudaError_t cudaHostAlloc(void **out, size_t size_bytes, unsigned) {
  *out = malloc(size_bytes);
  memset(*out, 0xFF, size_bytes);
  pinned_memory[(char *)*out] = size_bytes;
  return answer();
}
cudaError_t cudaFreeHost(void *data) { return give_back(pinned_memory, data); }
cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned) {
  *out = host;
  return answer();
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = limit_bytes;
  *free_bytes = limit_bytes - device_bytes;
  return answer();
}
cudaError_t cudaMemcpyAsync(void *out, const void *x, size_t size_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Memory &from = kind == cudaMemcpyHostToDevice ? pinned_memory : device_memory;
  const Memory &to = kind == cudaMemcpyDeviceToHost ? pinned_memory : device_memory;
  /* To the host's ordinary memory the real one copies before the call returns. */
  const bool ordinary = kind == cudaMemcpyDeviceToHost && !within(pinned_memory, out, 1) &&
                        !within(device_memory, out, 1);
  runtime_queue(stream, [=, &from, &to] {
    if (!within(from, x, size_bytes)) die("a copy reads from where it must not");
    if (!ordinary && !within(to, out, size_bytes)) die("a copy writes to where it must not");
    memcpy(out, x, size_bytes);
  });
  if (ordinary) drain(stream);
  return answer();
}
cudaError_t cudaMemset(void *out, int value, size_t size_bytes) {
  if (!within(device_memory, out, size_bytes)) die("memory is set where it must not be");
  memset(out, value, size_bytes);
  return answer();
}
cudaError_t cudaMemsetAsync(void *out, int value, size_t size_bytes, cudaStream_t stream) {
  runtime_queue(stream, [=] { cudaMemset(out, value, size_bytes); });
  return answer();
}
cudaError_t cudaMemcpyPeerAsync(void *out, int, const void *x, int, size_t size_bytes,
                                cudaStream_t stream) {
  return cudaMemcpyAsync(out, x, size_bytes, cudaMemcpyDeviceToDevice, stream);
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
  streams.push_back(*out = new CUstream_st);
  return answer();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  drain(stream);
  std::erase(streams, stream);
  delete stream;
  return answer();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream->capture) {
    stream->broken = true;
    return answer(cudaErrorStreamCaptureUnsupported);
  }
  drain(stream);
  return answer();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  runtime_queue(stream, [token = event->token] { wait(token); });
  return answer();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
  *out = new CUevent_st;
  return answer();
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return answer();
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (stream->capture) die("an event is recorded into a capture");
  const auto token = std::make_shared<Token>(Token{stream, false, 0});
  event->token = token;
  runtime_queue(stream, [token] {
    token->done = true;
    token->when = work_done;
  });
  return answer();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  wait(event->token);
  return answer();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event->token && !event->token->done) step(event->token->stream);
  return !event->token || event->token->done ? answer() : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (!begin->token->done || !end->token->done) return answer(cudaErrorNotReady);
  *milliseconds = 1e-6f * (float)(end->token->when - begin->token->when);
  return answer();
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream->capture) die("a capture begins within a capture");
  stream->capture = std::make_unique<Graph>();
  stream->broken = false;
  return answer();
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  if (!stream->capture) die("a capture ends that was not begun");
  Graph *graph = stream->capture.release();
  *out = stream->broken ? NULL : (cudaGraph_t)graph;
  if (!stream->broken) return answer();
  delete graph;
  return answer(cudaErrorStreamCaptureInvalidated);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
  *out = (cudaGraphExec_t) new Graph(*(Graph *)graph);
  return answer();
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete (Graph *)graph;
  return answer();
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return answer(); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (stream->capture) die("a graph is launched into a capture");
  for (const Work &work : ((Graph *)graph)->work) stream->queue.push_back(work);
  return answer();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete (Graph *)graph;
  return answer();
}
}
