// V values that lie side by side, read and written in one access: at most 16 bytes of one are a single instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rounding.h"

namespace reid3d {

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, typename T>
REID3D_HOST_DEVICE inline Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

#ifdef __CUDA_ARCH__

// One store to global memory; written down, for the compiler takes it apart into its words.
__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}

__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[1]) { *static_cast<uint32_t*>(p) = w[0]; }

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  constexpr int size = sizeof(pack);
  if constexpr (size % 4 != 0) {
    for (int c = 0; c < V; ++c) p[c] = pack.v[c];
  } else {
    constexpr int words = size / 4 < 4 ? size / 4 : 4;
    uint32_t w[size / 4 / words][words];
    memcpy(w, &pack, size);
    for (int i = 0; i < size / 4 / words; ++i) store_words(reinterpret_cast<char*>(p) + 4 * words * i, w[i]);
  }
}

#else

template <typename T, int V>
inline void store_pack(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

#endif

// To memory that is global on the device.
template <typename T, typename U, int V>
REID3D_HOST_DEVICE inline void store(T* p, const U (&values)[V]) {
  Pack<T, V> pack;
  for (int c = 0; c < V; ++c) pack.v[c] = static_cast<T>(values[c]);
  store_pack(p, pack);
}

}  // namespace reid3d
