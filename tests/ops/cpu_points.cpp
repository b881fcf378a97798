// The CPU kernels of points (csrc/cpu), in arrays not a number longer than they may touch: what they find, and that the
// sanitizers have nothing to say. In the instruction set of this machine.
#define REID3D_ISA native
// GCC 12 finds uninitialized variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cpu/ball_query.h"
#include "../../csrc/cpu/fps.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/knn.h"
#include "warp_clouds.h"

#include <utility>

using namespace reid3d;

namespace {

struct Forested {
  std::vector<float> numbers;
  std::vector<int32_t> indices, order;
  Tree<float> tree;

  explicit Forested(const std::vector<float>& rows, int64_t n)
      : numbers(Tree<float>::size(n)), indices(round_up(n, kLeaf)), order(n), tree(n, numbers.data(), indices.data()) {
    std::vector<uint64_t> keys(2 * n);
    native::morton_order(rows.data(), n, 3, keys.data(), order.data());
    native::build(rows.data(), 3, order.data(), tree);
  }
};

void check_fps(const std::vector<float>& rows, int64_t n) {
  const Forested a(rows, n), b(rows, n);
  const Tree<float> trees[] = {a.tree, b.tree};
  for (int64_t count : {1, 2})
    for (int64_t m : {int64_t{1}, (n + 1) / 2, n}) {
      std::vector<float> scratch(count * Tree<float>::size(n));
      std::vector<int64_t> picked(count * m);
      native::fps(trees, count, m, n - 1, scratch.data(), picked.data());
      for (int64_t c = 0; c < count; ++c) {
        std::vector<char> seen(n);
        CHECK(picked[c * m] == n - 1, n, m, c);
        for (int64_t i = 0; i < m; ++i) CHECK(!std::exchange(seen[picked[c * m + i]], 1), n, m, c, i);
        for (int64_t i = 0; i < m; ++i) CHECK(picked[c * m + i] == picked[i], n, m, c, i);
      }
    }
}

template <typename List>
void check_search(const std::vector<float>& rows, int64_t n, int64_t k) {
  const Forested cloud(rows, n);
  std::vector<float> panels(3 * round_up(n, kLeaf)), all(n), dist2(n * k);
  std::vector<int64_t> idx(n * k), nearest(n), ball(k);
  std::vector<char> scratch(knn_scratch(n, k));
  List list(k, scratch.data());
  native::knn_with(cloud.tree, 0, n, cloud.tree, k, list, scratch.data(), dist2.data(), idx.data());
  native::pack(rows.data(), n, 3, panels.data());
  for (int64_t q = 0; q < n; ++q) {
    const float* p = &rows[3 * q];
    for (int64_t i = 0; i < n; ++i) {
      const float d = squared_distance3(p[0], p[1], p[2], rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]);
      all[i] = d < native::kInf<float> ? d : native::kInf<float>;
    }
    std::iota(nearest.begin(), nearest.end(), 0);
    std::stable_sort(nearest.begin(), nearest.end(), [&](int64_t i, int64_t j) { return all[i] < all[j]; });
    for (int64_t i = 0; i < k; ++i)
      CHECK(idx[q * k + i] == nearest[i] && dist2[q * k + i] == all[nearest[i]], n, k, q, i);
    const int64_t inside = std::count_if(all.begin(), all.end(), [](float d) { return d < 0.1f; });
    CHECK(native::ball_query(p, panels.data(), n, 0.1f, k, ball.data()) == std::min(k, inside), n, k, q);
  }
}

}  // namespace

int main() {
  Random random(0);
  for (int n : {1, 2, 15, 16, 17, 64, 65, 257, 300, 4100})
    for (int kind = 0; kind < kClouds; ++kind) {
      const std::vector<float> rows = cloud<float>(n, kind, random);
      check_fps(rows, n);
      for (int k : {1, 20, 32, 65, n}) {
        if (k > n || n > 300) continue;
#if defined(__AVX2__)
        if (k <= 32) check_search<native::SortedList<4>>(rows, n, k);
#endif
        check_search<native::PairList<float>>(rows, n, k);
      }
    }
}
