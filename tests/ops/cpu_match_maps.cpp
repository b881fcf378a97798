// Best matches of maps and their gradient by the CPU kernels, in tiles of every shape, against loops. As cpu_points.cpp.
#define REID3D_ISA native
// GCC 12 finds uninitialized variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cpu/match_maps.h"
#include "warp_clouds.h"

using namespace reid3d;

namespace {

// Whole numbers, so that every order of summation gives the same; some are NaN.
template <typename T>
std::vector<T> map_of(int64_t c, int64_t l, int levels, bool nan, Random& random) {
  std::vector<T> map(c * l);
  for (T& x : map) x = static_cast<T>(pick(random, levels) - levels / 2);
  if (nan) map[pick(random, static_cast<int>(c * l))] = std::numeric_limits<T>::quiet_NaN();
  return map;
}

template <typename T>
struct Matches {
  std::vector<T> best;
  std::vector<int16_t> winner;
  explicit Matches(int64_t l) : best(2 * l, -7), winner(2 * l, -7) {}
};

template <typename T>
bool same(T a, T b) {
  return a == b || (a != a && b != b);
}

template <typename T>
Matches<T> by_loops(const std::vector<T>& a, const std::vector<T>& b, int64_t c, int64_t l) {
  Matches<T> out(l);
  for (int side = 0; side < 2; ++side)
    for (int64_t i = 0; i < l; ++i) {
      T best = -std::numeric_limits<T>::infinity();
      int64_t at = 0;
      for (int64_t j = 0; j < l && best == best; ++j) {
        T sum = 0;
        for (int64_t h = 0; h < c; ++h) sum += a[h * l + (side ? j : i)] * b[h * l + (side ? i : j)];
        if (!(sum <= best)) best = sum, at = j;
      }
      out.best[side * l + i] = best;
      out.winner[side * l + i] = static_cast<int16_t>(at);
    }
  return out;
}

template <int R, int V, typename T>
void check_tiles(int64_t c, int64_t l, int levels, bool nan, Random& random) {
  const std::vector<T> a = map_of<T>(c, l, levels, nan, random), b = map_of<T>(c, l, levels, false, random);
  const Matches<T> wanted = by_loops(a, b, c, l);
  std::vector<T> rows(match_panels(c, l)), columns(match_panels(c, l));
  native::pack_positions<R>(a.data(), c, l, rows.data());
  native::pack_positions<16 * V>(b.data(), c, l, columns.data());
  std::vector<char> scratch(match_pair_scratch(l));
  Matches<T> exact(l), quick(l);
  CHECK((native::match_tiles<true, R, V>(rows.data(), columns.data(), c, l, scratch.data(), exact.best.data(),
                                         exact.winner.data())),
        c, l);
  const bool done = native::match_tiles<false, R, V>(rows.data(), columns.data(), c, l, scratch.data(),
                                                     quick.best.data(), nullptr);
  CHECK(done == !nan, c, l, nan);
  for (int64_t i = 0; i < 2 * l; ++i) {
    CHECK(same(exact.best[i], wanted.best[i]), R, V, c, l, i, exact.best[i], wanted.best[i]);
    CHECK(exact.winner[i] == wanted.winner[i], R, V, c, l, i, exact.winner[i], wanted.winner[i]);
    CHECK(nan || quick.best[i] == wanted.best[i], R, V, c, l, i, quick.best[i], wanted.best[i]);
  }
}

template <typename T>
void check_pair(int64_t c, int64_t l, bool nan, Random& random) {
  const std::vector<T> a = map_of<T>(c, l, 5, false, random), b = map_of<T>(c, l, 5, nan, random);
  const Matches<T> wanted = by_loops(a, b, c, l);
  std::vector<T> rows(match_panels(c, l)), columns(match_panels(c, l));
  std::vector<char> scratch(match_pair_scratch(l));
  native::pack_rows(a.data(), c, l, rows.data());
  native::pack_columns(b.data(), c, l, columns.data());
  for (const bool winners : {false, true}) {
    Matches<T> found(l);
    native::match_pair(rows.data(), columns.data(), c, l, scratch.data(), found.best.data(),
                       winners ? found.winner.data() : nullptr);
    for (int64_t i = 0; i < 2 * l; ++i) CHECK(same(found.best[i], wanted.best[i]), c, l, i, nan);
    CHECK(!winners || found.winner == wanted.winner, c, l, nan);
  }
}

template <typename T>
void check_gradient(int64_t count, int64_t maps, int64_t c, int64_t l, Random& random) {
  const std::vector<T> gallery = map_of<T>(maps * c, l, 7, false, random);
  const std::vector<T> grad = map_of<T>(count * maps * 2, l, 7, false, random);
  std::vector<int16_t> winner(grad.size());
  for (int16_t& w : winner) w = static_cast<int16_t>(pick(random, static_cast<int>(l)));
  std::vector<T> wanted(count * c * l, 0), found(count * c * l, -7), scratch((count + 1) * l * 16);
  for (int64_t q = 0; q < count; ++q)
    for (int64_t g = 0; g < maps; ++g)
      for (int64_t i = 0; i < l; ++i)
        for (int64_t h = 0; h < c; ++h) {
          const int64_t own = (q * maps + g) * 2 * l + i, other = own + l;
          wanted[(q * c + h) * l + i] += grad[own] * gallery[(g * c + h) * l + winner[own]];
          wanted[(q * c + h) * l + winner[other]] += grad[other] * gallery[(g * c + h) * l + i];
        }
  for (int64_t channel = 0; channel < c; channel += 16)
    native::add_matches(grad.data(), winner.data(), gallery.data(), count, maps, c, l, channel, scratch.data(),
                        found.data());
  CHECK(found == wanted, count, maps, c, l);
}

template <typename T>
void check_all(Random& random) {
  for (int64_t l = 1; l < 70; ++l) {
    const int64_t c = 1 + pick(random, 20);
    for (const bool nan : {false, true}) {
      check_tiles<12, 2, T>(c, l, 5, nan, random);
      check_tiles<8, 1, T>(c, l, 5, nan, random);
      check_tiles<6, 1, T>(c, l, 5, nan, random);
      check_tiles<2, 1, T>(c, l, 5, nan, random);
      check_tiles<1, 1, T>(c, l, 5, nan, random);
      check_pair<T>(c, l, nan, random);
    }
    check_gradient<T>(1 + pick(random, 3), pick(random, 4), c, l, random);
  }
}

}  // namespace

int main() {
  Random random(0);
  check_all<float>(random);
  check_all<double>(random);
  return 0;
}
