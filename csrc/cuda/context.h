// The device that calls are for.
#pragma once

namespace moe::cuda {

// Make a device and its context current on the calling thread. The driver's functions need the context, and a thread of
// autograd or of a server may have none, or another runtime's idea of the device. Legal while a graph is captured.
void use_device(int index);

}  // namespace moe::cuda
