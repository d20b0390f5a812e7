"""What the compiler made of the kernels: inner loops on the CPU, and the static gate for GPUs that are not there."""
