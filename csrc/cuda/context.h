// The device that calls are for, and whether its kernels overlap.
#pragma once

namespace moe::cuda {

// Make a device and its context current on the calling thread. The driver's functions need the context, and a thread of
// autograd or of a server may have none, or another runtime's idea of the device. Legal while a graph is captured.
void use_device(int index);

// Whether a kernel may start before the one before it in its stream has ended (device.h): as MOE_KERNELS_PDL says, 0 or
// 1, until it is set. For the whole process, and for what is launched from then on.
bool early_starts();
void set_early_starts(bool wanted);

}  // namespace moe::cuda
