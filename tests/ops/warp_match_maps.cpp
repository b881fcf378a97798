// What the threads of a block of csrc/cuda/match_maps.cu do, one after the other, against loops.
#include "../../csrc/cuda/match_maps.h"
#include "warp_clouds.h"

using namespace reid3d;

namespace {

template <typename T>
void check(int64_t c, int32_t l, int levels, bool nan, Random& random) {
  using Tile = MatchTile<T>;
  std::vector<T> a(c * l), b(c * l);
  for (std::vector<T>* map : {&a, &b})
    for (T& x : *map) x = static_cast<T>(pick(random, levels) - levels / 2);
  if (nan) b[pick(random, static_cast<int>(c * l))] = std::numeric_limits<T>::quiet_NaN();
  for (int32_t low = 0; low < l; low += Tile::kSide) {
    std::vector<Tile> tiles(Tile::kThreads);
    static typename Tile::Positions rows, columns;
    static BestMatch<T> all[Tile::kSide][16];
    for (int32_t left = 0; left < l; left += Tile::kSide) {
      for (Tile& tile : tiles) tile.clear();
      for (int64_t channel = 0; channel < c; channel += Tile::kDepth) {
        for (int t = 0; t < Tile::kThreads; ++t) {
          Tile::fetch(t, rows, a.data(), low, l, channel, c);
          Tile::fetch(t, columns, b.data(), left, l, channel, c);
        }
        for (int t = 0; t < Tile::kThreads; ++t) tiles[t].add(t, rows, columns);
      }
      for (int t = 0; t < Tile::kThreads; ++t) tiles[t].take(t, left, l);
    }
    for (int t = 0; t < Tile::kThreads; ++t) tiles[t].share(t, all);
    for (int32_t i = low; i < std::min(l, low + Tile::kSide); ++i) {
      T best = -std::numeric_limits<T>::infinity();
      int32_t at = 0;
      for (int32_t j = 0; j < l && best == best; ++j) {
        T sum = 0;
        for (int64_t h = 0; h < c; ++h) sum += a[h * l + i] * b[h * l + j];
        if (!(sum <= best)) best = sum, at = j;
      }
      const BestMatch<T> found = Tile::of_row(all[i - low]);
      CHECK(found.value == best || (nan && best != best && found.value != found.value), c, l, i, found.value, best);
      CHECK(found.at == at, c, l, i, found.at, at);
    }
  }
}

}  // namespace

int main() {
  Random random(0);
  for (int32_t l : {1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 192})
    for (const int levels : {1, 5, 1000})
      for (const bool nan : {false, true}) {
        const int64_t c = 1 + pick(random, 40);
        check<float>(c, l, levels, nan, random);
        check<double>(c, l, levels, nan, random);
      }
  return 0;
}
