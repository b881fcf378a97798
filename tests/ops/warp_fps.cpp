// Farthest point sampling by a whole block, as csrc/cuda/fps.cu runs it, on the host.
#include "../../csrc/cuda/fps.h"

#include "warp_clouds.h"

using namespace reid3d;

namespace {

// The definition, point by point.
template <typename T>
std::vector<int> sample(const std::vector<T>& xyz, int m, int start) {
  const int N = static_cast<int>(xyz.size() / 3);
  std::vector<T> dist2(N);
  for (int i = 0; i < N; ++i) {
    const bool number = !std::isnan(xyz[3 * i]) && !std::isnan(xyz[3 * i + 1]) && !std::isnan(xyz[3 * i + 2]);
    dist2[i] = number ? std::numeric_limits<T>::infinity() : -1;
  }
  std::vector<int> picked;
  for (int current = start; static_cast<int>(picked.size()) < m;) {
    picked.push_back(current);
    dist2[current] = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < N; ++i) {
      const T d = squared_distance3(xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2], xyz[3 * current], xyz[3 * current + 1],
                                    xyz[3 * current + 2]);
      if (d < dist2[i]) dist2[i] = d;
    }
    current = static_cast<int>(std::max_element(dist2.begin(), dist2.end()) - dist2.begin());
  }
  return picked;
}

// Warps in any order between two barriers, as on a device.
template <int Threads, int P>
std::vector<int> sample_in_registers(const std::vector<float>& xyz, int m, int start, Random& random) {
  const int N = static_cast<int>(xyz.size() / 3);
  constexpr int kWarps = Threads / kWarp;
  std::vector<FpsRegisters<Threads, P>> warps;
  std::vector<int> order;
  for (int w = 0; w < kWarps; ++w) warps.emplace_back(xyz.data(), N, w), order.push_back(w);
  FpsName names[2][kWarps];
  std::vector<int> picked;
  for (int step = 0, current = start; step < m; ++step) {
    picked.push_back(current);
    if (step + 1 == m) break;
    std::shuffle(order.begin(), order.end(), random);
    const float* p = &xyz[3 * current];
    for (int w : order) names[step % 2][w] = warps[w].pick(current, p[0], p[1], p[2]);
    current = fps_choose(names[step % 2], kWarps).index;
  }
  return picked;
}

// In the order of the Z-curve or in none.
template <int Threads, int P>
std::vector<int> sample_in_slabs(const std::vector<float>& xyz, int m, int start, bool morton, Random& random) {
  const int N = static_cast<int>(xyz.size() / 3);
  constexpr int kWarps = Threads / kWarp;
  const std::vector<int32_t> order = order_of(xyz, 3, morton, random);
  std::vector<FpsSlab<Threads, P>> slabs;
  for (int w = 0; w < kWarps; ++w) slabs.emplace_back(xyz.data(), order.data(), N, w);
  FpsName names[2][kWarps];
  std::vector<int> picked;
  FpsChoice current{start, -1};
  for (int step = 0; step < m; ++step) {
    picked.push_back(current.index);
    if (step + 1 == m) break;
    const float* p = &xyz[3 * current.index];
    for (int w = 0; w < kWarps; ++w)
      names[step % 2][w] = slabs[w].pick(current.index, step == 0 || w == current.warp, p[0], p[1], p[2]);
    current = fps_choose(names[step % 2], kWarps);
  }
  return picked;
}

template <typename T>
std::vector<int> sample_in_memory(const std::vector<T>& xyz, int m, int start, int warps) {
  const int N = static_cast<int>(xyz.size() / 3);
  std::vector<T> dist2(N);
  std::vector<Farthest<T>> names(warps);
  std::vector<int> picked;
  const auto warp = [&](int w) { return FpsMemory<T>{xyz.data(), dist2.data(), N, warps * kWarp, w}; };
  for (int w = 0; w < warps; ++w) warp(w).start();
  for (int step = 0, current = start; step < m; ++step) {
    picked.push_back(current);
    if (step + 1 == m) break;
    const T* p = &xyz[3 * current];
    for (int w = 0; w < warps; ++w) names[w] = warp(w).pick(current, p[0], p[1], p[2]);
    current = FpsMemory<T>::choose(names.data(), warps);
  }
  return picked;
}

}  // namespace

int main() {
  Random random(0);
  for (int round = 0; round < 250; ++round) {
    const int N = round < 20 ? 1 + round : 1 + pick(random, round % 10 ? 256 : 1024);
    const int m = round % 3 == 0 ? N : 1 + pick(random, N), start = pick(random, N);
    const std::vector<float> xyz = cloud<float>(N, round % kClouds, random);
    const std::vector<int> expected = sample(xyz, m, start);
    if (N <= 256) CHECK((sample_in_registers<64, 4>(xyz, m, start, random)) == expected, "64 x 4", round, N, m, start);
    CHECK((sample_in_registers<128, 8>(xyz, m, start, random)) == expected, "128 x 8", round, N, m, start);
    CHECK((sample_in_slabs<512, 4>(xyz, m, start, round % 4, random)) == expected, "slabs", round, N, m, start);
    CHECK((sample_in_slabs<64, 16>(xyz, m, start, round % 4, random)) == expected, "2 slabs", round, N, m, start);
    CHECK(sample_in_memory(xyz, m, start, 4) == expected, "memory", round, N, m, start);
    const std::vector<double> wide(xyz.begin(), xyz.end());
    CHECK(sample_in_memory(wide, m, start, 2) == sample(wide, m, start), "double", round, N, m, start);
  }
  for (int N : {1025, 2047, 2048, 2049, 4096, 5000, 8191, 8192}) {
    const std::vector<float> xyz = cloud<float>(N, pick(random, kClouds), random);
    const std::vector<int> expected = sample(xyz, 100, N - 1);
    if (N <= 2048) CHECK((sample_in_slabs<512, 4>(xyz, 100, N - 1, true, random)) == expected, "512 x 4", N);
    if (N <= 4096) CHECK((sample_in_slabs<512, 8>(xyz, 100, N - 1, true, random)) == expected, "512 x 8", N);
    CHECK((sample_in_registers<512, 16>(xyz, 100, N - 1, random)) == expected, "512 x 16", N);
  }
  return 0;
}
