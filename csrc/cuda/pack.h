// V values that lie side by side, read and written in one access: at most 16 bytes of one are a single instruction.
#pragma once

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

template <typename T, typename U, int V>
REID3D_HOST_DEVICE inline void store(T* p, const U (&values)[V]) {
  Pack<T, V> pack;
  for (int c = 0; c < V; ++c) pack.v[c] = static_cast<T>(values[c]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

}  // namespace reid3d
