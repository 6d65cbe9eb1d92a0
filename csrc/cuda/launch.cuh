// How a kernel is started: on the device by nvcc's syntax, in the emulator fiber by fiber.
#pragma once

#include "device.cuh"
#include "launch.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace alphaprune::cuda {

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
Status start(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
             Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<Status>(cudaGetLastError());
}
// The same with attributes. cluster: blocks of one, 0 for none. early: the kernel may begin while those before it in
// the stream still run, where they let it, and waits for them by itself (wait_for_kernels_before) before it reads or
// writes what they may write or read.
template <class... Parameters, class... Arguments>
Status start_cluster(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, size_t shared_bytes,
                     bool early, void* stream, Arguments... arguments) {
  static const bool captured = [] {  // graphs hold launches that begin early from 12.3 on
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (early && captured) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return static_cast<Status>(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
// Lifts the limit of 48 KB; `shared_bytes` of the largest launch that the device allows.
template <class... Parameters>
Status allow_shared(void (*kernel)(Parameters...), int shared_bytes) {
  return static_cast<Status>(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
}
#else
// The last failure of an emulated launch, and the order in which the threads of the next ones run.
inline std::string& last_failure() {
  static std::string text;
  return text;
}
inline emulator::Order& order() {
  static emulator::Order value = emulator::Order::forwards;
  return value;
}
// Whether the next launches record the accesses to shared memory of their last block (bench/wavefronts.py).
inline bool& tracing() {
  static bool value = false;
  return value;
}
template <class... Parameters, class... Arguments>
Status start_cluster(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, size_t shared_bytes, bool,
                     void*, Arguments... arguments) {
  last_failure() = emulator::launch(
      {static_cast<unsigned>(blocks), 1, 1}, threads, shared_bytes, [&] { kernel(arguments...); }, order(), tracing(),
      static_cast<unsigned>(cluster ? cluster : 1));
  return last_failure().empty() ? 0 : 1;
}
template <class... Parameters, class... Arguments>
Status start(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
             Arguments... arguments) {
  return start_cluster(kernel, blocks, 0, threads, shared_bytes, false, stream, arguments...);
}
template <class... Parameters>
Status allow_shared(void (*)(Parameters...), int) {
  return 0;
}
#endif

// Of a kernel that may begin early, without clusters.
template <class... Parameters, class... Arguments>
Status start_early(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
  return start_cluster(kernel, blocks, 0, threads, shared_bytes, true, stream, arguments...);
}

}  // namespace alphaprune::cuda
