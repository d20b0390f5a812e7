// The weights of experts, and their gradients, as tables of addresses: each matrix lies where its owner put it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/dtype.h"
#include "kernels.h"

namespace moe {

// The matrices of one kind: each at an address of its own, all of one shape, order and dtype.
struct Matrices {
  std::vector<void*> data;        // one address a matrix
  int64_t rows = 0, columns = 0;  // nn.Linear's (out, in)
  int64_t ld = 0;                 // elements between consecutive rows of what is stored
  bool transposed = false;        // stored (in, out)
  Dtype dtype = Dtype::kFloat32;

  bool present() const { return !data.empty(); }
  Matrix operator[](int64_t m) const { return present() ? Matrix{data[size_t(m)], ld, transposed} : Matrix{}; }
};

// Biases, or the gradients of those that want one, fp32; null: none. Those of a gate come before those of its up.
struct Biases {
  float* gate_up = nullptr;         // (E, halves * I)
  float* down = nullptr;            // (E, H)
  float* shared_gate_up = nullptr;  // (halves * Is,)
  float* shared_down = nullptr;     // (H,)
};

// Weights, or the gradients of those that want one. GELU experts have no gate; their only first matrix is `up`.
struct ExpertTable {
  Matrices gate, up, down;                       // E of (I, H), (I, H), (H, I)
  Matrices shared_gate, shared_up, shared_down;  // one of (Is, H), (Is, H), (H, Is), or absent
  Biases biases;
  Variant variant;                               // of the activation; gradients have none
};

}  // namespace moe
