// A CUDA runtime of a GPU that computes nothing: kernels are not run, memory is the host's, reserved
// and mostly never touched. What torch allocates there, and when, is what it allocates on a real one.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaGetDeviceProperties

enum { ARCH_MAJOR = 9, ARCH_MINOR = 0, PROCESSORS = 132, SHARED = 49152, SHARED_OPTIN = 232448 };
enum { BLOCKS = 65536, PAGE = 2097152 };
static const size_t TOTAL = 150754820096ul;

// ------------------------------------------------------------------------------------- the device

static int from_environment(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  return snprintf(id, size, "0000:00:00.0"), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Silent GPU");
  p->major = from_environment("SILENT_MAJOR", ARCH_MAJOR);
  p->minor = from_environment("SILENT_MINOR", ARCH_MINOR);
  p->multiProcessorCount = PROCESSORS;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = SHARED;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_OPTIN + 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalGlobalMem = TOTAL;
  p->l2CacheSize = 62914560;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPTIN; break;
    case cudaDevAttrComputeCapabilityMajor: *value = from_environment("SILENT_MAJOR", ARCH_MAJOR); break;
    case cudaDevAttrComputeCapabilityMinor: *value = from_environment("SILENT_MINOR", ARCH_MINOR); break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

// ----------------------------------------------------------------------------------------- memory

static struct { char *start; size_t size; } blocks[BLOCKS];
static int used;

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  return *total = TOTAL, *unused = TOTAL - (1ul << 30), cudaSuccess;
}

cudaError_t cudaMalloc(void **place, size_t wanted) {
  size_t size = (wanted + PAGE - 1) / PAGE * PAGE;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *start = mmap(0, size + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED || used == BLOCKS) return cudaErrorMemoryAllocation;
  start = (char *)(((size_t)start + PAGE - 1) / PAGE * PAGE);
  blocks[used].start = start;
  blocks[used++].size = size;
  return *place = start, cudaSuccess;
}

cudaError_t cudaFree(void *place) {
  for (int i = 0; i < used; i++)
    if (blocks[i].start == place) {
      munmap(place, blocks[i].size);
      blocks[i] = blocks[--used];
      break;
    }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **place, size_t size, unsigned flags) {
  return *place = aligned_alloc(4096, (size + 4095) / 4096 * 4096), cudaSuccess;
}

cudaError_t cudaFreeHost(void *place) { return free(place), cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *place) {
  memset(a, 0, sizeof *a);
  a->devicePointer = (void *)place;
  a->type = cudaMemoryTypeUnregistered;
  for (int i = 0; i < used; i++) {
    size_t offset = (size_t)((const char *)place - blocks[i].start);
    if (offset < blocks[i].size) a->type = cudaMemoryTypeDevice;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return memmove(to, from, size), cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToDevice) memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **place, const void *symbol) {
  static char nothing[65536];
  return *place = nothing, cudaSuccess;
}

// ---------------------------------------------------------------------------------------- kernels

cudaError_t __cudaLaunchKernel(
    void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) {
  return *kernel = (void *)function, cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = SHARED;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t shared, unsigned flags) {
  return *count = 2, cudaSuccess;
}

// ----------------------------------------------------------------------------- streams and events

static void *new_handle(void) {
  static size_t last = 4096;
  return (void *)(last += 16);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = new_handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return *stream = new_handle(), cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  return *priority = 0, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new_handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return *event = new_handle(), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  return *ms = 1, cudaSuccess;
}

// ----------------------------------------------------------------------------------------- cuBLAS

int cublasCreate_v2(void **handle) { return *handle = new_handle(), 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return *made = new_handle(), 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return *made = new_handle(), 0; }
int cublasLtMatrixLayoutCreate(void **made) { return *made = new_handle(), 0; }
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted,
    void *results, int *count) {
  enum { RESULT = 80 };  // bytes of a cublasLtMatmulHeuristicResult_t
  return memset(results, 0, RESULT * (size_t)wanted), *count = 1, 0;
}
