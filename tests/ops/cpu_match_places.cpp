// Places of matches by the CPU kernel, both ways to count, against a sorted list. As cpu_points.cpp.
#define REID3D_ISA native
// GCC 12 finds uninitialized variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cpu/match_places.h"
#include "warp_clouds.h"

using namespace reid3d;

namespace {

void check_row(int64_t n, int64_t most, int levels, bool pessimistic, Random& random) {
  std::vector<float> sim(n);
  for (float& s : sim) s = static_cast<float>(pick(random, levels) - levels / 2) / 8;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const int64_t third = std::min(most, n / 3);
  std::vector<int64_t> parts[3];  // matches, removed, junk
  for (int p = 0; p < 3; ++p) {
    parts[p].assign(order.begin() + p * third, order.begin() + p * third + (third ? pick(random, third + 1) : 0));
    if (p < 2) parts[p].insert(parts[p].begin(), pick(random, 3), -1);
  }
  const auto& [matches, removed, junk] = parts;
  const auto in = [](const std::vector<int64_t>& part, int64_t i) {
    return std::find(part.begin(), part.end(), i) != part.end();
  };
  std::vector<int64_t> list, wanted;
  for (int64_t i = 0; i < n; ++i)
    if (!in(removed, i) && !in(junk, i)) list.push_back(i);
  std::sort(list.begin(), list.end(), [&](int64_t i, int64_t j) {
    if (sim[i] != sim[j]) return sim[i] > sim[j];
    const bool a = pessimistic && in(matches, i), b = pessimistic && in(matches, j);
    return a != b ? b : i < j;
  });
  for (size_t i = 0; i < list.size(); ++i)
    if (in(matches, list[i])) wanted.push_back(static_cast<int64_t>(i) + 1);
  wanted.resize(matches.size(), 0);

  const int64_t count = static_cast<int64_t>(matches.size());
  std::vector<char> scratch(match_scratch(n, count));
  std::vector<int64_t> places(count, -7);
  const auto place = [&] {
    return native::match_places(sim.data(), n, matches.data(), count, removed.data(),
                                static_cast<int64_t>(removed.size()), junk.data(), static_cast<int64_t>(junk.size()),
                                pessimistic, scratch.data(), places.data());
  };
  CHECK(place() == MatchError::none, n, most, levels);
  CHECK(places == wanted, n, most, levels, pessimistic);
  if (n == 0) return;
  parts[1].push_back(n);
  CHECK(place() == MatchError::position, n);
  parts[1].back() = -2;
  CHECK(place() == MatchError::position, n);
  parts[1].back() = -1;
  sim[pick(random, static_cast<int>(n))] = std::nanf("");
  CHECK(place() == MatchError::nan, n);
}

}  // namespace

int main() {
  Random random(0);
  for (const bool pessimistic : {false, true})
    for (const int levels : {1, 7, 1 << 20}) {
      for (int64_t n = 0; n < 70; ++n) check_row(n, 9, levels, pessimistic, random);
      for (const int64_t n : {4095, 4096, 4097, 9000}) check_row(n, 20, levels, pessimistic, random);
      check_row(3000, 1000, levels, pessimistic, random);
    }
  return 0;
}
