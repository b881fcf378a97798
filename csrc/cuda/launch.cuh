// What the CUDA kernels share: the stream and the checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdio>
#include <limits>

#include "../dispatch.h"
#include "lane.h"

// Weak, so that the library loads beside a torch without CUDA too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace reid3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "reid3d::", op, ": ", cudaGetErrorString(error));
}

// Blocks for `count` work items, `per_block` in a block. Kernels are not launched on nothing.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "reid3d: too many queries in one call");
  return static_cast<unsigned>(blocks);
}

// Says which index is wrong, once, and ends the kernel: what follows would read or write foreign memory.
static __device__ int index_reported = 0;

static __device__ __noinline__ void bad_index(const char* op, const char* argument, long long value, long long size) {
  if (atomicExch(&index_reported, 1) == 0)
    printf("reid3d::%s: %s must be in [0, %lld), got %lld\n", op, argument, size, value);
  __trap();
}

__device__ inline void check_index(const char* op, const char* argument, int64_t value, int64_t size) {
  if (value < 0 || value >= size) bad_index(op, argument, value, size);
}

}  // namespace reid3d
