// The first points within a radius, as csrc/cuda/ball_query.cu finds them, on the host.
#include "../../csrc/cuda/ball_query.h"

#include "warp_clouds.h"

using namespace reid3d;

template <typename T>
void check(int round, Random& random) {
  const int N = 1 + pick(random, 200), k = 1 + pick(random, round % 3 ? 40 : 300);
  const std::vector<T> points = cloud<T>(N, round % kClouds, random);
  const std::vector<T> center = cloud<T>(1, pick(random, kClouds), random);
  const T radius2 = static_cast<T>(std::pow(10.0, pick(random, 6) - 4));
  std::vector<int64_t> idx(k, -1), expected;
  const int64_t count = ball_query_warp(points.data(), N, center[0], center[1], center[2], radius2, k, idx.data());
  for (int i = 0; i < N && static_cast<int>(expected.size()) < k; ++i) {
    const T* p = &points[3 * i];
    if (squared_distance3(center[0], center[1], center[2], p[0], p[1], p[2]) < radius2) expected.push_back(i);
  }
  CHECK(count == static_cast<int64_t>(expected.size()), "count", round, N, k, count);
  const int64_t first = expected.empty() ? 0 : expected[0];
  expected.resize(k, first);
  CHECK(idx == expected, "round", round, N, k, count);
}

int main() {
  Random random(0);
  for (int round = 0; round < 5000; ++round) {
    check<float>(round, random);
    check<double>(round, random);
  }
  return 0;
}
