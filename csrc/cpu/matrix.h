// Small matrix products on tiles that stay in the cache, and the sigmoid. Unlike the other kernels these round as the
// processor likes best: with AVX2 and AVX-512 a product and its sum fuse, elsewhere they do not.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace reid3d::REID3D_ISA {

// a * b + c
template <typename T>
REID3D_INLINE Vec<T> madd(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  return a * b + c;
}
#if defined(__AVX512F__)
REID3D_INLINE Floats madd(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
template <typename T>
constexpr int kRowsAtOnce = sizeof(T) == 8 ? 8 : 16;  // as many as the registers hold
#elif defined(__AVX2__)
REID3D_INLINE Floats madd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
template <typename T>
constexpr int kRowsAtOnce = sizeof(T) == 8 ? 2 : 6;
#else
template <typename T>
constexpr int kRowsAtOnce = sizeof(T) == 8 ? 1 : 2;
#endif

template <typename T>
REID3D_INLINE T reduce_sum(const Vec<T>& a) {
  T lane[kLanes];
  a.store(lane);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// out (rows,16) = or += a (rows,inner) times a panel (inner,16); a's element (i, h) is a[i * row + h * column]. Rows are
// computed kRowsAtOnce at a time: there must be as many of them, whatever they hold.
template <typename T>
REID3D_INLINE void multiply(const T* a, int64_t rows, int64_t row, int64_t column, const T* panel, int64_t next,
                            int64_t inner, bool add, T* out, int64_t stride) {
  constexpr int R = kRowsAtOnce<T>;
  for (int64_t first = 0; first < rows; first += R, a += R * row, out += R * stride) {
    Vec<T> sum[R];
    REID3D_UNROLL
    for (int i = 0; i < R; ++i) sum[i] = add ? Vec<T>::load(out + i * stride) : Vec<T>::all(0);
    const T* x = a;
    const T* p = panel;
    for (int64_t h = 0; h < inner; ++h, x += column, p += next) {
      const Vec<T> b = Vec<T>::load(p);
      REID3D_UNROLL
      for (int i = 0; i < R; ++i) sum[i] = madd(Vec<T>::all(x[i * row]), b, sum[i]);
    }
    REID3D_UNROLL
    for (int i = 0; i < R; ++i) sum[i].store(out + i * stride);
  }
}

// 1 / (1 + exp(-x)), to a few units in the last place.
template <typename T>
REID3D_INLINE Vec<T> sigmoid(const Vec<T>& x) {
  T lane[kLanes];
  x.store(lane);
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 / (1 + std::exp(-lane[i]));
  return Vec<T>::load(lane);
}

#if defined(__AVX512F__) || defined(__AVX2__)
// exp(y) = 2^n exp(r) with n whole and |r| <= ln(2) / 2, where a polynomial is exact enough. Beyond +-87 the sigmoid is 0
// or 1 to float; a NaN stays one.
REID3D_INLINE Floats sigmoid(Floats x) {
  const Floats one = Floats::all(1);
  // the second argument is returned where one is NaN
  const Floats y = max(Floats::all(-87), min(Floats::all(87), Floats::all(0) - x));
  const Floats n = floor(madd(y, Floats::all(1.44269504f), Floats::all(0.5f)));
  const Floats r = madd(n, Floats::all(2.12194440e-4f), madd(n, Floats::all(-0.693359375f), y));
  Floats e = madd(Floats::all(1 / 5040.f), r, Floats::all(1 / 720.f));
  e = madd(e, r, Floats::all(1 / 120.f));
  e = madd(e, r, Floats::all(1 / 24.f));
  e = madd(e, r, Floats::all(1 / 6.f));
  e = madd(e, r, Floats::all(0.5f));
  e = madd(e, r, one);
  e = madd(e, r, one);
#if defined(__AVX512F__)
  return {_mm512_div_ps(one.v, _mm512_add_ps(one.v, _mm512_scalef_ps(e.v, n.v)))};
#else
  const auto scaled = [](__m256 e, __m256 n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(e, _mm256_castsi256_ps(power));
  };
  return {_mm256_div_ps(one.lo, _mm256_add_ps(one.lo, scaled(e.lo, n.lo))),
          _mm256_div_ps(one.hi, _mm256_add_ps(one.hi, scaled(e.hi, n.hi)))};
#endif
}
#endif

}  // namespace reid3d::REID3D_ISA
