// Vectors of 16 numbers, in the instruction set that the file is compiled for: AVX-512, AVX2, or any, by the vectors of
// the compiler, which also serve all types but float and int32. All give the same bits: no operation is fused or
// reordered but add_square (../rounding.h).
//
// min(a, b) and max(a, b) are b where either is NaN; every comparison with a NaN is false.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../rounding.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define REID3D_INLINE inline __attribute__((always_inline))
// Before a short loop over an array of vectors: only where it is unrolled are they registers.
#define REID3D_UNROLL _Pragma("GCC unroll 16")

namespace reid3d::REID3D_ISA {

constexpr int kLanes = 16;

REID3D_INLINE float float_of(uint32_t bits) {
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
REID3D_INLINE uint32_t bits_of(float x) {
  uint32_t r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

// ---- any type, any machine
// In parts as wide as the registers: the compiler computes wider ones number by number. A lane of a mask is 0 or -1.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
struct MaskLane {
  using type = int32_t;
};
template <>
struct MaskLane<double> {
  using type = int64_t;
};
template <>
struct MaskLane<int64_t> {
  using type = int64_t;
};

template <typename T>
struct Mask {
  typedef typename MaskLane<T>::type Part __attribute__((vector_size(kBytes)));
  static constexpr int kPart = kBytes / sizeof(T), kParts = kLanes / kPart;
  Part v[kParts];
};

template <typename T>
struct Vec {
  typedef T Part __attribute__((vector_size(kBytes)));
  static constexpr int kPart = kBytes / sizeof(T), kParts = kLanes / kPart;
  Part v[kParts];
  static REID3D_INLINE Vec load(const T* p) {
    Vec r;
    REID3D_UNROLL for (int i = 0; i < kParts; ++i) std::memcpy(&r.v[i], p + i * kPart, kBytes);
    return r;
  }
  static REID3D_INLINE Vec all(T x) {
    Vec r;
    REID3D_UNROLL for (int i = 0; i < kParts; ++i) r.v[i] = x - Part{};
    return r;
  }
  REID3D_INLINE void store(T* p) const {
    REID3D_UNROLL for (int i = 0; i < kParts; ++i) std::memcpy(p + i * kPart, &v[i], kBytes);
  }
};

#define REID3D_LANES(R, name, A, B, expression)                               \
  template <typename T>                                                       \
  REID3D_INLINE R<T> name(const A<T>& a, const B<T>& b) {                     \
    R<T> r;                                                                   \
    REID3D_UNROLL for (int i = 0; i < R<T>::kParts; ++i) r.v[i] = expression; \
    return r;                                                                 \
  }
REID3D_LANES(Vec, operator-, Vec, Vec, a.v[i] - b.v[i])
REID3D_LANES(Vec, operator+, Vec, Vec, a.v[i] + b.v[i])
REID3D_LANES(Vec, operator*, Vec, Vec, a.v[i] * b.v[i])
REID3D_LANES(Vec, min, Vec, Vec, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
REID3D_LANES(Vec, max, Vec, Vec, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
REID3D_LANES(Mask, operator<, Vec, Vec, a.v[i] < b.v[i])
REID3D_LANES(Mask, operator<=, Vec, Vec, a.v[i] <= b.v[i])
REID3D_LANES(Mask, operator==, Vec, Vec, a.v[i] == b.v[i])
REID3D_LANES(Mask, unordered, Vec, Vec, (a.v[i] != a.v[i]) | (b.v[i] != b.v[i]))
// a > b, or a is a NaN and b is none
REID3D_LANES(Mask, above, Vec, Vec, (a.v[i] > b.v[i]) | ((a.v[i] != a.v[i]) & (b.v[i] == b.v[i])))
REID3D_LANES(Mask, operator|, Mask, Mask, a.v[i] | b.v[i])
#undef REID3D_LANES

template <typename T>
REID3D_INLINE Vec<T> add_square(const Vec<T>& a, const Vec<T>& b) {  // a + b * b
  T sum[kLanes], difference[kLanes];
  a.store(sum);
  b.store(difference);
  for (int i = 0; i < kLanes; ++i) sum[i] = reid3d::add_square(sum[i], difference[i]);
  return Vec<T>::load(sum);
}
REID3D_INLINE Vec<double> add_square(const Vec<double>& a, const Vec<double>& b) { return a + b * b; }

// Bit i is lane i.
template <typename T>
REID3D_INLINE uint32_t bits(const Mask<T>& m) {
  constexpr int part = Mask<T>::kPart;
  typename Mask<T>::Part bit = {}, set = {};
  for (int i = 0; i < part; ++i) bit[i] = 1 << i;
  REID3D_UNROLL for (int i = 0; i < Mask<T>::kParts; ++i) set |= m.v[i] & (bit << (i * part));
  uint32_t r = 0;
  for (int i = 0; i < part; ++i) r |= static_cast<uint32_t>(set[i]);
  return r;
}

// where(m, a, b) is a where m and b elsewhere; m may come from a comparison of another type of the same size.
template <typename T, typename U>
REID3D_INLINE Vec<T> where(const Mask<U>& m, const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  REID3D_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) r.v[i] = m.v[i] ? a.v[i] : b.v[i];
  return r;
}

template <typename T>
REID3D_INLINE Vec<T> floor(const Vec<T>& a) {
  T lane[kLanes];
  a.store(lane);
  for (int i = 0; i < kLanes; ++i) lane[i] = std::floor(lane[i]);
  return Vec<T>::load(lane);
}

// The numbers at p[at[0]], p[at[1]] ...
template <typename T>
REID3D_INLINE Vec<T> gather(const T* p, const int32_t* at) {
  T lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = p[at[i]];
  return Vec<T>::load(lane);
}

// Vec with one lane changed. Written so, and not through memory, the whole can be loaded again without waiting.
template <typename T>
REID3D_INLINE Vec<T> with_lane(Vec<T> a, int lane, T x) {
  constexpr int part = Vec<T>::kPart;
  a.v[lane / part][lane % part] = x;
  return a;
}

template <typename T>
REID3D_INLINE T reduce_max(const Vec<T>& a) {
  T lane[kLanes];
  a.store(lane);
  for (int i = 1; i < kLanes; ++i) lane[0] = lane[0] > lane[i] ? lane[0] : lane[i];
  return lane[0];
}

template <typename T>
REID3D_INLINE T reduce_min(const Vec<T>& a) {
  T lane[kLanes];
  a.store(lane);
  for (int i = 1; i < kLanes; ++i) lane[0] = lane[0] < lane[i] ? lane[0] : lane[i];
  return lane[0];
}

#if defined(__AVX512F__)
// ---- AVX-512: a mask is a register of bits
template <>
struct Mask<float> {
  __mmask16 m;
};

template <>
struct Vec<float> {
  __m512 v;
  static REID3D_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static REID3D_INLINE Vec all(float x) { return {_mm512_set1_ps(x)}; }
  REID3D_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};
template <>
struct Vec<int32_t> {
  __m512i v;
  static REID3D_INLINE Vec load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static REID3D_INLINE Vec all(int32_t x) { return {_mm512_set1_epi32(x)}; }
  REID3D_INLINE void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
using Floats = Vec<float>;
using Ints = Vec<int32_t>;
using Lanes = Mask<float>;

REID3D_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
REID3D_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
REID3D_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
REID3D_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
REID3D_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
REID3D_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
REID3D_INLINE Floats add_square(Floats a, Floats b) { return {_mm512_fmadd_ps(b.v, b.v, a.v)}; }
REID3D_INLINE Lanes operator<(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
REID3D_INLINE Lanes operator<=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
REID3D_INLINE Lanes operator==(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
REID3D_INLINE Lanes unordered(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
REID3D_INLINE Lanes above(Floats a, Floats b) {
  return {_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(b.v, b.v, _CMP_ORD_Q), a.v, b.v, _CMP_NLE_UQ)};
}
REID3D_INLINE Lanes operator|(Lanes a, Lanes b) { return {_mm512_kor(a.m, b.m)}; }
REID3D_INLINE uint32_t bits(Lanes m) { return m.m; }
REID3D_INLINE Floats where(Lanes m, Floats a, Floats b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }
REID3D_INLINE Ints where(Lanes m, Ints a, Ints b) { return {_mm512_mask_mov_epi32(b.v, m.m, a.v)}; }
REID3D_INLINE Floats floor(Floats a) { return {_mm512_floor_ps(a.v)}; }
REID3D_INLINE Floats gather(const float* p, const int32_t* at) {
  return {_mm512_i32gather_ps(Ints::load(at).v, p, sizeof(float))};
}
// The lanes of m, one after the other; 16 values are written, what follows those of m is overwritten. Compressed in a
// register: storing compressed is slow on Zen 4.
REID3D_INLINE void compress(Lanes m, Floats a, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m.m, a.v));
}
REID3D_INLINE void compress(Lanes m, Ints a, int32_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m.m, a.v));
}
REID3D_INLINE Floats with_lane(Floats a, int lane, float x) {
  return {_mm512_mask_mov_ps(a.v, static_cast<__mmask16>(1u << lane), _mm512_set1_ps(x))};
}
REID3D_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }
REID3D_INLINE float reduce_min(Floats a) { return _mm512_reduce_min_ps(a.v); }

#elif defined(__AVX2__)
// ---- AVX2: two halves, a mask is all ones in its lanes
template <>
struct Mask<float> {
  __m256 lo, hi;
};

template <>
struct Vec<float> {
  __m256 lo, hi;
  static REID3D_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static REID3D_INLINE Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  REID3D_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
};
template <>
struct Vec<int32_t> {
  __m256i lo, hi;
  static REID3D_INLINE Vec load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
  }
  static REID3D_INLINE Vec all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  REID3D_INLINE void store(int32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), hi);
  }
};
using Floats = Vec<float>;
using Ints = Vec<int32_t>;
using Lanes = Mask<float>;

REID3D_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
REID3D_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
REID3D_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
REID3D_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
REID3D_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
REID3D_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
REID3D_INLINE Floats add_square(Floats a, Floats b) {
  return {_mm256_fmadd_ps(b.lo, b.lo, a.lo), _mm256_fmadd_ps(b.hi, b.hi, a.hi)};
}
REID3D_INLINE Floats floor(Floats a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
#define REID3D_COMPARE(name, how)                                                             \
  REID3D_INLINE Lanes name(Floats a, Floats b) {                                              \
    return {_mm256_cmp_ps(a.lo, b.lo, how), _mm256_cmp_ps(a.hi, b.hi, how)};                  \
  }
REID3D_COMPARE(operator<, _CMP_LT_OQ)
REID3D_COMPARE(operator<=, _CMP_LE_OQ)
REID3D_COMPARE(operator==, _CMP_EQ_OQ)
REID3D_COMPARE(unordered, _CMP_UNORD_Q)
#undef REID3D_COMPARE
REID3D_INLINE Lanes above(Floats a, Floats b) {
  const auto half = [](__m256 a, __m256 b) {
    return _mm256_and_ps(_mm256_cmp_ps(b, b, _CMP_ORD_Q), _mm256_cmp_ps(a, b, _CMP_NLE_UQ));
  };
  return {half(a.lo, b.lo), half(a.hi, b.hi)};
}
REID3D_INLINE Lanes operator|(Lanes a, Lanes b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
REID3D_INLINE uint32_t bits(Lanes m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo) | _mm256_movemask_ps(m.hi) << 8);
}
REID3D_INLINE Floats where(Lanes m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
REID3D_INLINE Ints where(Lanes m, Ints a, Ints b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_castps_si256(m.lo)),
          _mm256_blendv_epi8(b.hi, a.hi, _mm256_castps_si256(m.hi))};
}
// For each of 256 masks of eight lanes the lanes that are set, in order.
struct CompressTable {
  alignas(32) int32_t lane[256][8];
  constexpr CompressTable() : lane{} {
    for (int m = 0; m < 256; ++m)
      for (int i = 0, count = 0; i < 8; ++i)
        if (m >> i & 1) lane[m][count++] = i;
  }
};
constexpr CompressTable kCompress;
REID3D_INLINE __m256i lanes_of(int mask) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lane[mask]));
}
// The lanes of m, one after the other; up to 16 values are written, whatever follows those of m is overwritten.
REID3D_INLINE void compress(Lanes m, Ints a, int32_t* out) {
  const int low = _mm256_movemask_ps(m.lo), high = _mm256_movemask_ps(m.hi);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(a.lo, lanes_of(low)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + __builtin_popcount(static_cast<unsigned>(low))),
                      _mm256_permutevar8x32_epi32(a.hi, lanes_of(high)));
}
REID3D_INLINE void compress(Lanes m, Floats a, float* out) {
  const int low = _mm256_movemask_ps(m.lo), high = _mm256_movemask_ps(m.hi);
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(a.lo, lanes_of(low)));
  _mm256_storeu_ps(out + __builtin_popcount(static_cast<unsigned>(low)),
                   _mm256_permutevar8x32_ps(a.hi, lanes_of(high)));
}
REID3D_INLINE Floats with_lane(Floats a, int lane, float x) {
  const __m256i at = _mm256_set1_epi32(lane), lo = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i hi = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  const __m256 value = _mm256_set1_ps(x);
  return {_mm256_blendv_ps(a.lo, value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(at, lo))),
          _mm256_blendv_ps(a.hi, value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(at, hi)))};
}
REID3D_INLINE float reduce_max(Floats a) {
  const __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_shuffle_ps(r, r, 1)));
}
REID3D_INLINE float reduce_min(Floats a) {
  const __m256 m = _mm256_min_ps(a.lo, a.hi);
  __m128 r = _mm_min_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  r = _mm_min_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_min_ss(r, _mm_shuffle_ps(r, r, 1)));
}
#endif

#if defined(__AVX2__)
// Eight 64-bit keys, compared as numbers below 2^63.
struct Keys {
#if defined(__AVX512F__)
  __m512i v;
  static REID3D_INLINE Keys load(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
  REID3D_INLINE void store(uint64_t* p) const { _mm512_storeu_si512(p, v); }
  friend REID3D_INLINE Keys min(Keys a, Keys b) { return {_mm512_min_epi64(a.v, b.v)}; }
  friend REID3D_INLINE Keys max(Keys a, Keys b) { return {_mm512_max_epi64(a.v, b.v)}; }
  // Lane i takes lane i ^ J of v, J = 1, 2, 4, 7.
  template <int J>
  REID3D_INLINE Keys exchanged() const {
    if constexpr (J == 1) return {_mm512_permutex_epi64(v, 0xb1)};
    if constexpr (J == 2) return {_mm512_permutex_epi64(v, 0x4e)};
    if constexpr (J == 3) return {_mm512_permutex_epi64(v, 0x1b)};
    if constexpr (J == 4) return {_mm512_shuffle_i64x2(v, v, 0x4e)};
    if constexpr (J == 7) return {_mm512_permutexvar_epi64(_mm512_set_epi64(0, 1, 2, 3, 4, 5, 6, 7), v)};
  }
  // Lane i of b where bit i is set, else of a.
  template <int bits>
  static REID3D_INLINE Keys blend(Keys a, Keys b) {
    return {_mm512_mask_mov_epi64(a.v, bits, b.v)};
  }
#elif defined(__AVX2__)
  __m256i lo, hi;
  static REID3D_INLINE Keys load(const uint64_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4))};
  }
  REID3D_INLINE void store(uint64_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4), hi);
  }
  friend REID3D_INLINE Keys min(Keys a, Keys b) {
    return {_mm256_blendv_epi8(a.lo, b.lo, _mm256_cmpgt_epi64(a.lo, b.lo)),
            _mm256_blendv_epi8(a.hi, b.hi, _mm256_cmpgt_epi64(a.hi, b.hi))};
  }
  friend REID3D_INLINE Keys max(Keys a, Keys b) {
    return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_cmpgt_epi64(a.lo, b.lo)),
            _mm256_blendv_epi8(b.hi, a.hi, _mm256_cmpgt_epi64(a.hi, b.hi))};
  }
  template <int J>
  REID3D_INLINE Keys exchanged() const {
    constexpr int order = (J & 3) == 1 ? 0xb1 : (J & 3) == 2 ? 0x4e : (J & 3) == 3 ? 0x1b : 0xe4;
    const __m256i a = _mm256_permute4x64_epi64(lo, order), b = _mm256_permute4x64_epi64(hi, order);
    if constexpr (J & 4) return {b, a};
    return {a, b};
  }
  template <int bits>
  static REID3D_INLINE Keys blend(Keys a, Keys b) {
    constexpr auto wide = [](int four) { return (four & 1) * 3 | (four & 2) * 6 | (four & 4) * 12 | (four & 8) * 24; };
    return {_mm256_blend_epi32(a.lo, b.lo, wide(bits & 15)), _mm256_blend_epi32(a.hi, b.hi, wide(bits >> 4))};
  }
#endif
};
#endif

}  // namespace reid3d::REID3D_ISA
