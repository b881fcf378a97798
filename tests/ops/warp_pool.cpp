// What a thread of csrc/cuda/{group_max,edge_pool}.cu does, for all the threads of a row, against plain loops.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cuda/pool.h"

using namespace reid3d;

namespace {

std::mt19937 rng(1);

int32_t below(int32_t limit) { return static_cast<int32_t>(rng() % static_cast<uint32_t>(limit)); }

// Two bytes, and rounded: what stands for float16 here.
struct Short {
  uint16_t bits = 0;
  Short() = default;
  explicit Short(float x) {
    uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    bits = static_cast<uint16_t>(x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fc0);
  }
  explicit operator float() const {
    const uint32_t b = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
  }
};

template <typename T>
T value(int round) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  if (round % 5 == 0) return static_cast<T>(static_cast<float>(below(3) - 1));  // ties
  if (round % 7 == 0 && below(8) == 0) return static_cast<T>(nan);
  if (round % 3 == 0 && below(8) == 0) return static_cast<T>(below(2) ? inf : -inf);
  if (round % 11 == 0) return static_cast<T>(below(2) ? 0.0f : -0.0f);
  return static_cast<T>(static_cast<float>(rng()) / 4e8f - 5);  // sums depend on their order
}

// A table whose rows are aligned as those of a tensor are.
template <typename T>
struct Table {
  std::vector<T> memory;
  T* data;
  explicit Table(int64_t size) : memory(size + 64 / sizeof(T)) {
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(T);
  }
};

template <typename T>
Table<T> random_table(int64_t size, int round) {
  Table<T> table(size);
  for (int64_t i = 0; i < size; ++i) table.data[i] = value<T>(round);
  return table;
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b);
}

bool same(Short a, Short b) { return a.bits == b.bits; }

struct InRange {
  int32_t E;
  void operator()(int32_t e) const {
    if (e < 0 || e >= E) std::abort();
  }
};

// The first slot with the best value, by definition.
template <typename T, typename Better>
int32_t winner(const T* feats, int64_t C, int64_t c, const std::vector<int32_t>& group, const Better& better) {
  using W = Wide<T>;
  int32_t best = 0;
  for (int32_t k = 0; k < static_cast<int32_t>(group.size()); ++k) {
    const W v = static_cast<W>(feats[group[k] * C + c]), b = static_cast<W>(feats[group[best] * C + c]);
    if (b != b) break;
    if (v != v || better(v, b)) best = k;
  }
  return best;
}

template <typename T, int V, typename Slot>
bool check(int round, int32_t K) {
  using W = Wide<T>;
  const int64_t C = V * (1 + below(5));
  const int32_t N = 1 + below(30), M = 1 + below(12), E = M * K;
  const Table<T> feats = random_table<T>(N * C, round), g_max = random_table<T>(M * C, round + 1);
  const Table<T> g_min = random_table<T>(M * C, round + 2);
  const Table<W> g_sum = random_table<W>(M * C, round + 3), g_sumsq = random_table<W>(M * C, round + 4);
  Table<T> most(M * C), max(M * C), min(M * C), row(C);
  Table<W> sum(M * C), sumsq(M * C);
  Table<Slot> slot(M * C), max_slot(M * C), min_slot(M * C);
  std::vector<std::vector<int32_t>> groups(M, std::vector<int32_t>(K));
  std::vector<std::vector<int32_t>> into(N);
  for (int32_t m = 0; m < M; ++m)
    for (int32_t k = 0; k < K; ++k) {
      groups[m][k] = round % 4 == 0 ? 0 : below(round % 4 == 1 ? std::min(N, 3) : N);
      into[groups[m][k]].push_back(m * K + k);
    }

  const auto greater = [](W a, W b) { return a > b; };
  const auto less = [](W a, W b) { return a < b; };
  for (int32_t m = 0; m < M; ++m) {
    for (int64_t c = 0; c < C; c += V) {
      MaxPool<T, V> max_pool;
      EdgePool<T, V> pool;
      for (int32_t first = 0; first < K; first += 32) {
        const int32_t size = std::min(32, K - first);
        pool_rows<V>(feats.data + c, C, groups[m].data() + first, size, first, max_pool);
        pool_rows<V>(feats.data + c, C, groups[m].data() + first, size, first, pool);
      }
      const int64_t place = m * C + c;
      store(most.data + place, max_pool.best), store(slot.data + place, max_pool.slot);
      store(max.data + place, pool.max.best), store(max_slot.data + place, pool.max.slot);
      store(min.data + place, pool.min), store(min_slot.data + place, pool.min_slot);
      store(sum.data + place, pool.sum), store(sumsq.data + place, pool.sumsq);
    }
    for (int64_t c = 0; c < C; ++c) {
      const int64_t place = m * C + c;
      const int32_t high = winner(feats.data, C, c, groups[m], greater);
      const int32_t low = winner(feats.data, C, c, groups[m], less);
      if (slot.data[place] != high || max_slot.data[place] != high || min_slot.data[place] != low) return false;
      const T highest = feats.data[groups[m][high] * C + c], lowest = feats.data[groups[m][low] * C + c];
      if (!same(most.data[place], highest) || !same(max.data[place], highest)) return false;
      if (!same(min.data[place], lowest)) return false;
      W s = 0, q = 0;
      for (int32_t i : groups[m]) {
        const W v = static_cast<W>(feats.data[i * C + c]);
        s += v;
        q = add_square(q, v);
      }
      if (!same(sum.data[place], s) || !same(sumsq.data[place], q)) return false;
    }
  }

  const Divisor divisor(static_cast<uint32_t>(K));
  for (int32_t j = 0; j < N; ++j) {
    const int32_t count = static_cast<int32_t>(into[j].size());
    std::vector<W> of_max(C), of_pool(C);
    for (int64_t c = 0; c < C; c += V) {
      W grad[V];
      max_gradient<V>(into[j].data(), count, divisor, g_max.data + c, slot.data + c, C, InRange{E}, grad);
      std::copy(grad, grad + V, of_max.begin() + c);
      const EdgeGradient<V, T, Slot> gradient{g_max.data + c,    g_min.data + c,    g_sum.data + c,
                                              g_sumsq.data + c, max_slot.data + c, min_slot.data + c};
      gradient(into[j].data(), count, divisor, C, feats.data + j * C + c, InRange{E}, grad);
      std::copy(grad, grad + V, of_pool.begin() + c);
    }
    for (int64_t c = 0; c < C; ++c) {
      W high = 0, low = 0, linear = 0, square = 0;
      for (int32_t e : into[j]) {
        const int64_t place = e / K * C + c;
        if (slot.data[place] == e % K) high += static_cast<W>(g_max.data[place]);
        if (min_slot.data[place] == e % K) low += static_cast<W>(g_min.data[place]);
        linear += g_sum.data[place];
        square += g_sumsq.data[place];
      }
      const W x = static_cast<W>(feats.data[j * C + c]);
      if (!same(of_max[c], high) || !same(of_pool[c], ((high + low) + linear) + (x + x) * square)) return false;
    }
  }
  return true;
}

template <typename T, int V, typename Slot>
bool check_one(int round) {
  const int32_t sizes[] = {1, 2, 3, 4, 5, 20, 31, 32, 33, 100, 256, 257, 400};
  return check<T, V, Slot>(round, sizes[below(sizeof(Slot) == 1 ? 11 : 13)]);  // a byte holds 256 slots
}

bool check_divisor() {
  for (int round = 0; round < 100000; ++round) {
    const uint32_t d = 1 + static_cast<uint32_t>(below(round % 2 ? 32767 : 40));
    const int32_t n = round % 3 == 0 ? 0x7fffffff - below(70000) : static_cast<int32_t>(rng() >> 1);
    const int32_t near = n / static_cast<int32_t>(d) * static_cast<int32_t>(d);
    const Divisor divisor(d);
    for (int32_t x : {n, near, near > 0 ? near - 1 : 0, 0x7fffffff})
      if (divisor.quotient(x) != x / static_cast<int32_t>(d)) return false;
  }
  return true;
}

}  // namespace

int main() {
  if (!check_divisor()) {
    std::printf("wrong quotient\n");
    return 1;
  }
  for (int round = 0; round < 400; ++round) {
    if (!check_one<float, 4, uint8_t>(round) || !check_one<float, 1, int16_t>(round) ||
        !check_one<double, 2, int16_t>(round) || !check_one<Short, 8, uint8_t>(round)) {
      std::printf("round %d: wrong\n", round);
      return 1;
    }
  }
  return 0;
}
