#include "device.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "context.h"
#include "experts.h"

namespace moe::cuda {

static std::atomic<bool>& early() {
  static std::atomic<bool> wanted{[] {
    const char* given = std::getenv("MOE_KERNELS_PDL");
    const std::string value = given ? given : "0";
    MOE_CHECK(value == "0" || value == "1", "MOE_KERNELS_PDL: '", value, "', expected 0 or 1");
    return value == "1";
  }()};
  return wanted;
}
bool early_starts() { return early(); }
void set_early_starts(bool wanted) { early() = wanted; }

#ifdef MOE_FIBERS

// Few processors, so that a block takes several tiles. MOE_FIBER_ENGINE = simt, sm80, sm90, sm90_middle
// or sm90_wide: what multiplies.
Device current_device() { return {0, 3}; }

static std::string engine_name() {
  const char* wanted = std::getenv("MOE_FIBER_ENGINE");
  return wanted ? wanted : "simt";
}

Engine engine_for(const Device&, Dtype dtype, bool tf32) {
  const std::string name = engine_name();
  MOE_CHECK(name == "simt" || name == "sm80" || name.rfind("sm90", 0) == 0, "MOE_FIBER_ENGINE: '", name,
            "', expected simt, sm80, sm90, sm90_middle or sm90_wide");
  if (name == "simt" || (dtype == Dtype::kFloat32 && !tf32)) return Engine::kSimt;
  return name == "sm80" || dtype == Dtype::kFloat32 ? Engine::kSm80 : Engine::kSm90;
}

int asked_columns() { return engine_name() == "sm90_wide" ? 256 : engine_name() == "sm90_middle" ? 192 : 0; }

#else

void use_device(int index) { MOE_CUDA(cudaSetDevice(index)); }

Device current_device() {
  constexpr int kMost = 64;
  static std::array<std::atomic<int64_t>, kMost> known{};  // capability and processors of a device once asked for
  int index = 0;
  MOE_CUDA(cudaGetDevice(&index));
  MOE_CHECK(index < kMost, "device: ", index, ", expected less than ", kMost);
  if (const int64_t both = known[index]) return {int(both >> 32), int(both & 0xFFFFFFFF)};
  int major = 0, minor = 0, processors = 0;
  MOE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  MOE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  MOE_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  known[index] = int64_t(10 * major + minor) << 32 | processors;
  return {10 * major + minor, processors};
}

// PTX for older GPUs, which Blackwell gets as well, has no wait in it: such a kernel must not start early.
bool starts_early(const void* kernel) {
  if (!early_starts()) return false;
  cudaFuncAttributes image{};
  MOE_CUDA(cudaFuncGetAttributes(&image, kernel));
  return image.ptxVersion >= 90;
}

Engine engine_for(const Device& device, Dtype dtype, bool tf32) {
  if (device.capability < 80 || (dtype == Dtype::kFloat32 && !tf32)) return Engine::kSimt;
  return device.capability == 90 && dtype != Dtype::kFloat32 ? Engine::kSm90 : Engine::kSm80;
}

int asked_columns() { return 0; }

#endif

}  // namespace moe::cuda
