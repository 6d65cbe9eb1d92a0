// The machine: which devices there are, what they allow, what a status means.
#include "launch.cuh"

namespace alphaprune::cuda {

#ifdef __CUDACC__

std::string describe(Status status) {
  return std::string(cudaGetErrorName(static_cast<cudaError_t>(status))) + ": " +
         cudaGetErrorString(static_cast<cudaError_t>(status));
}

Status device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) *count = 0;
  return static_cast<Status>(status);
}

Status set_device(int device, int* before) {
  if (const cudaError_t status = cudaGetDevice(before)) return static_cast<Status>(status);
  return *before == device ? 0 : static_cast<Status>(cudaSetDevice(device));
}

namespace {
Status attribute(int* value, cudaDeviceAttr which, int device) {
  return static_cast<Status>(cudaDeviceGetAttribute(value, which, device));
}
}  // namespace

Status query(int device, Device* out) {
  int major = 0, minor = 0;
  for (const Status status : {attribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                              attribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                              attribute(&out->multiprocessors, cudaDevAttrMultiProcessorCount, device),
                              attribute(&out->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)})
    if (status) return status;
  out->capability = major * 10 + minor;
  return 0;
}

#else

std::string describe(Status) { return "emulated: " + last_failure(); }
Status device_count(int* count) {
  *count = 1;
  return 0;
}
Status set_device(int, int* before) {
  *before = 0;
  return 0;
}
namespace {
Device emulated{90, 132, 232448};  // an H100
}
Status query(int, Device* out) {
  *out = emulated;
  return 0;
}
void emulate_device(const Device& device) { emulated = device; }
std::vector<std::pair<const void*, uint32_t>> emulate_fetched() { return std::exchange(emulator::fetched(), {}); }
void emulate_in_order(int order_of_threads) { order() = static_cast<emulator::Order>(order_of_threads); }

#endif

Status prepare(int device) {
  Device found;
  int before = 0;
  if (const Status status = query(device, &found)) return status;
  if (const Status status = set_device(device, &before)) return status;
  Status status = allow_sbt_mma(found.shared_bytes);
  if (!status) status = allow_sbt_mma_int8(found.shared_bytes);
  if (!status) status = allow_pair_mma(found.shared_bytes);
  if (!status && found.capability == 90) status = allow_pair_wgmma(found.shared_bytes);
  if (!status && found.capability == 90) status = allow_sbt_wgmma(found.shared_bytes);
  if (!status) status = allow_sbt_expand(found.shared_bytes);
  if (!status) status = allow_delta_spmv(found.shared_bytes);
  if (!status) status = allow_nm_mma_sp(found.shared_bytes);
  if (!status && found.capability == 90) status = allow_nm_mma_sp_sm90(found.shared_bytes);
  if (!status && found.capability == 90) status = allow_nm_wgmma(found.shared_bytes);
  int other = 0;
  const Status restored = set_device(before, &other);
  return status ? status : restored;
}

}  // namespace alphaprune::cuda
