// Kept apart from kernels.h: the ISA translation units must not instantiate std:: templates.
#pragma once
#include <string>
#include <vector>

namespace moe {

// The ISA levels this CPU runs, best first.
std::vector<std::string> isa_levels();

}  // namespace moe
