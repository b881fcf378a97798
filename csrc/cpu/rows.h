// Rows of features, 16 channels at a time: float16 and bfloat16 are read as float, and written back without rounding.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace reid3d::REID3D_ISA {

REID3D_INLINE float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
REID3D_INLINE float widened(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest < 0x400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | (rest < 0x7c00 ? (rest << 13) + (112u << 23) : rest << 13 | 0x7f800000u));
}
REID3D_INLINE float widened(float x) { return x; }
REID3D_INLINE double widened(double x) { return x; }

// x is one of the values of the narrow type.
REID3D_INLINE void narrow(float x, BFloat16* out) { out->bits = static_cast<uint16_t>(bits_of(x) >> 16); }
REID3D_INLINE void narrow(float x, Half* out) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, rest = bits_of(x) & 0x7fffffffu;
  uint32_t r = (rest - (112u << 23)) >> 13;
  if (rest < 0x38800000u) r = static_cast<uint32_t>(float_of(rest) * 0x1p24f);
  if (rest >= 0x7f800000u) r = 0x7c00u | (rest >> 13 & 0x3ffu);
  out->bits = static_cast<uint16_t>(sign | r);
}
REID3D_INLINE void narrow(float x, float* out) { *out = x; }
REID3D_INLINE void narrow(double x, double* out) { *out = x; }

template <typename T>
REID3D_INLINE Vec<Wide<T>> load_row(const T* p) {
  Wide<T> r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = widened(p[i]);
  return Vec<Wide<T>>::load(r);
}
template <>
REID3D_INLINE Vec<float> load_row(const float* p) {
  return Vec<float>::load(p);
}
template <>
REID3D_INLINE Vec<double> load_row(const double* p) {
  return Vec<double>::load(p);
}

template <typename T>
REID3D_INLINE void store_row(const Vec<Wide<T>>& x, T* p) {
  Wide<T> r[kLanes];
  x.store(r);
  for (int i = 0; i < kLanes; ++i) narrow(r[i], p + i);
}

template <typename T, typename S>
REID3D_INLINE void store_slots(const Vec<T>& x, S* p) {
  T r[kLanes];
  x.store(r);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<S>(r[i]);
}

#if defined(__AVX512F__)
REID3D_INLINE __m512 widened(__m256i x, Half) { return _mm512_cvtph_ps(x); }
REID3D_INLINE __m512 widened(__m256i x, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
template <>
REID3D_INLINE Vec<float> load_row(const Half* p) {
  return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half())};
}
template <>
REID3D_INLINE Vec<float> load_row(const BFloat16* p) {
  return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), BFloat16())};
}
REID3D_INLINE void store_slots(Ints x, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
REID3D_INLINE void store_slots(Ints x, int16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
#elif defined(__AVX2__)
REID3D_INLINE __m256 widened(__m128i x, Half) { return _mm256_cvtph_ps(x); }
REID3D_INLINE __m256 widened(__m128i x, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
template <typename T>
REID3D_INLINE Vec<float> load_halves(const T* p) {
  return {widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T()),
          widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)), T())};
}
template <>
REID3D_INLINE Vec<float> load_row(const Half* p) {
  return load_halves(p);
}
template <>
REID3D_INLINE Vec<float> load_row(const BFloat16* p) {
  return load_halves(p);
}
#endif

// Whether all k indices are in [0, n).
REID3D_INLINE bool in_range(const int64_t* idx, int64_t k, int64_t n) {
  uint64_t signs = 0;  // of j and of n - 1 - j
  for (int64_t s = 0; s < k; ++s) signs |= static_cast<uint64_t>(idx[s]) | (static_cast<uint64_t>(n - 1) - idx[s]);
  return signs >> 63 == 0;
}

// Brings channel c of row j of feats to the cache, where j may be anything.
template <typename T>
REID3D_INLINE void prefetch(const T* feats, int64_t stride, int64_t j, int c) {
  const auto address = reinterpret_cast<uintptr_t>(feats) + (static_cast<uint64_t>(j) * stride + c) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<void*>(address));
}

constexpr int kAhead = 16;  // edges between a prefetch and its use

// Calls one(cloud, group, ahead, row) for the groups [begin, end) of all clouds, of which there is at least one;
// `ahead` are k indices to prefetch. False where an index is out of range.
template <typename T, typename F>
REID3D_INLINE bool for_groups(const T* feats, const int64_t* idx, GroupShape size, int64_t begin, int64_t end,
                              F&& one) {
  int64_t left = size.m - begin % size.m;  // groups of this cloud
  const T* cloud = feats + begin / size.m * size.n * size.c;
  for (int64_t row = begin; row < end; ++row, --left) {
    if (left == 0) left = size.m, cloud += size.n * size.c;
    const int64_t* group = idx + row * size.k;
    if (!in_range(group, size.k, size.n)) return false;
    one(cloud, group, (end - row - 1) * size.k >= kAhead ? group + kAhead : group, row);
  }
  return true;
}

// Slots are counted in lanes as wide as the values, so that one mask serves both.
template <typename W>
struct SlotLane {
  using type = int32_t;
};
template <>
struct SlotLane<double> {
  using type = int64_t;
};

}  // namespace reid3d::REID3D_ISA
