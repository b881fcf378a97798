// The code of a warp, written once: on the device a Lane<T> is a register that each of the 32 lanes has, on the host an
// array of 32, so that a C++ compiler alone can test it (tests/ops/warp_*.cpp). Whatever is the same in all lanes is a
// plain T, and branches depend on nothing else: the lanes of a warp always stand at the same line.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../rounding.h"

#ifdef __CUDACC__
#define REID3D_WARP __host__ __device__ __forceinline__
#else
#define REID3D_WARP inline
#endif

#ifdef __CUDA_ARCH__
#define REID3D_UNROLL _Pragma("unroll")
#define REID3D_NO_UNROLL _Pragma("unroll 1")
#else
#define REID3D_UNROLL
#define REID3D_NO_UNROLL
#endif

namespace reid3d {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDA_ARCH__

template <typename T>
using Lane = T;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// f of every lane's own values.
template <typename F, typename... T>
__device__ __forceinline__ auto map(F f, T... x) {
  return f(x...);
}

// The same for an f that writes to memory and gives nothing.
template <typename F, typename... T>
__device__ __forceinline__ void each(F f, T... x) {
  f(x...);
}

// What lanes wrote to memory before is there for all of them after.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Bit i is lane i's.
__device__ __forceinline__ uint32_t ballot(bool x) { return __ballot_sync(kAllLanes, x); }

template <typename T>
__device__ __forceinline__ T shfl(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}

template <typename T>
__device__ __forceinline__ T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}

// A value that all lanes have.
template <typename T>
__device__ __forceinline__ T first_lane(T x) {
  return x;
}

// Lane i takes the value of lane i - 1; lane 0 keeps its own.
template <typename T>
__device__ __forceinline__ T shfl_up1(T x) {
  return __shfl_up_sync(kAllLanes, x, 1);
}

__device__ __forceinline__ uint32_t reduce_max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
__device__ __forceinline__ uint32_t reduce_min(uint32_t x) { return __reduce_min_sync(kAllLanes, x); }

__device__ __forceinline__ int popcount(uint32_t x) { return __popc(x); }
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }

#else

template <typename T>
struct Lane {
  T v[kWarp];
  Lane() = default;
  Lane(T x) {  // NOLINT: the same in all lanes
    for (T& e : v) e = x;
  }
};

inline Lane<int> lane_id() {
  Lane<int> r;
  for (int i = 0; i < kWarp; ++i) r.v[i] = i;
  return r;
}

template <typename F, typename... T>
auto map(F f, const Lane<T>&... x) {
  Lane<decltype(f(x.v[0]...))> r;
  for (int i = 0; i < kWarp; ++i) r.v[i] = f(x.v[i]...);
  return r;
}

template <typename F, typename... T>
void each(F f, const Lane<T>&... x) {
  for (int i = 0; i < kWarp; ++i) f(x.v[i]...);
}

inline void sync_warp() {}

inline uint32_t ballot(const Lane<bool>& x) {
  uint32_t r = 0;
  for (int i = 0; i < kWarp; ++i) r |= static_cast<uint32_t>(x.v[i]) << i;
  return r;
}

template <typename T>
T shfl(const Lane<T>& x, int lane) {
  return x.v[lane];
}

template <typename T>
Lane<T> shfl_xor(const Lane<T>& x, int mask) {
  Lane<T> r;
  for (int i = 0; i < kWarp; ++i) r.v[i] = x.v[i ^ mask];
  return r;
}

template <typename T>
T first_lane(const Lane<T>& x) {
  return x.v[0];
}

template <typename T>
Lane<T> shfl_up1(const Lane<T>& x) {
  Lane<T> r;
  for (int i = 0; i < kWarp; ++i) r.v[i] = x.v[i > 0 ? i - 1 : 0];
  return r;
}

inline uint32_t reduce_max(const Lane<uint32_t>& x) {
  uint32_t r = x.v[0];
  for (uint32_t e : x.v) r = e > r ? e : r;
  return r;
}

inline uint32_t reduce_min(const Lane<uint32_t>& x) {
  uint32_t r = x.v[0];
  for (uint32_t e : x.v) r = e < r ? e : r;
  return r;
}

inline int popcount(uint32_t x) { return __builtin_popcount(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }

inline uint32_t float_bits(float x) {
  uint32_t r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

inline float bits_float(uint32_t x) {
  float r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

#endif

template <typename T>
REID3D_HOST_DEVICE constexpr T infinity() {
  return static_cast<T>(std::numeric_limits<float>::infinity());
}

}  // namespace reid3d
