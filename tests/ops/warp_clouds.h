// Clouds that kernels tend to get wrong, for the tests of warp_*.cpp, and how these report a failure.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/morton.h"

// Prints where, and the values that led there.
#define CHECK(condition, ...) \
  if (!(condition)) fail(__FILE__, __LINE__, #condition, __VA_ARGS__)

template <typename... T>
[[noreturn]] void fail(const char* file, int line, const char* condition, const T&... values) {
  std::cerr << file << ":" << line << ": " << condition << "  with";
  ((std::cerr << " " << values), ...);
  std::cerr << std::endl;
  std::exit(1);
}

using Random = std::mt19937;

inline int pick(Random& random, int n) { return static_cast<int>(random() % n); }  // 0 <= result < n

constexpr int kClouds = 9;

// N points: random, on a coarse grid, few different ones, all equal, on a line, far away, tiny, huge, and with
// coordinates that are no numbers.
template <typename T>
std::vector<T> cloud(int N, int kind, Random& random) {
  std::vector<T> xyz(3 * N);
  for (T& v : xyz) v = static_cast<T>(kind == 1 ? pick(random, 4) : pick(random, 1 << 20) / 1048576.0);
  for (int i = 0; i < N; ++i) {
    T* p = &xyz[3 * i];
    const int other = kind == 3 ? 0 : pick(random, N / 4 + 1);
    for (int a = 0; a < 3; ++a) {
      if (kind == 2 || kind == 3) p[a] = xyz[3 * other + a];
      if (kind == 4) p[a] = p[0];
      if (kind == 5) p[a] += 1000;
      if (kind == 6) p[a] *= static_cast<T>(1e-22);  // squares underflow
      if (kind == 7) p[a] *= static_cast<T>(3e19);   // and overflow
      constexpr T inf = std::numeric_limits<T>::infinity();
      if (kind == 8 && pick(random, 6) == 0) p[a] = pick(random, 2) ? std::nan("") : pick(random, 2) ? inf : -inf;
    }
  }
  return xyz;
}

// The points along the Z-curve, or in any order: results do not depend on it.
inline std::vector<int32_t> order_of(const std::vector<float>& xyz, int dims, bool morton, Random& random) {
  const int N = static_cast<int>(xyz.size()) / dims;
  std::vector<int32_t> order(N);
  std::iota(order.begin(), order.end(), 0);
  if (!morton) {
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }
  const reid3d::MortonGrid<float> grid(0, 0, 0, 1);
  const auto key = [&](int i) {
    const float* p = &xyz[dims * i];
    return grid.key(p[0], dims > 1 ? p[1] : 0, dims > 2 ? p[2] : 0);
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  return order;
}
