// The search for neighbours of a whole cloud, as csrc/cuda/knn.cu runs it, and the list it keeps, on the host.
#include "../../csrc/cuda/knn.h"

#include "warp_clouds.h"

using namespace reid3d;

namespace {

using Keys = std::vector<uint64_t>;

struct Ordered {
  std::vector<OrderedPoint> points;
  std::vector<Box> leaf_boxes, branch_boxes;
  OrderedCloud cloud;

  Ordered(const std::vector<float>& xyz, int dims, const std::vector<int32_t>& order) {
    const int N = static_cast<int>(order.size());
    points.resize(count_leaves(N) * kWarp), leaf_boxes.resize(count_leaves(N)), branch_boxes.resize(count_branches(N));
    cloud = {points.data(), leaf_boxes.data(), branch_boxes.data(), N, count_leaves(N), count_branches(N)};
    for (int leaf = 0; leaf < cloud.leaves; ++leaf)
      leaf_boxes[leaf] = fill_leaf(xyz.data(), dims, order.data(), leaf, cloud);
    for (int branch = 0; branch < cloud.branches; ++branch)
      branch_boxes[branch] = box_around(&leaf_boxes[branch * kWarp], std::min(kWarp, cloud.leaves - branch * kWarp));
  }
};

Keys brute_force(const float* q, const std::vector<float>& xyz, int dims, int k) {
  Keys keys;
  for (int i = 0; i < static_cast<int>(xyz.size()) / dims; ++i) {
    float d = 0;
    for (int a = 0; a < dims; ++a) d = add_square(d, q[a] - xyz[dims * i + a]);
    keys.push_back(neighbour_key(d < infinity<float>() ? d : infinity<float>(), i));
  }
  std::sort(keys.begin(), keys.end());
  keys.resize(k);
  return keys;
}

template <int R>
void check_search(int round, int M, int N, int dims, int k, int query_kind, int kind, Random& random) {
  std::vector<float> xyz = cloud<float>(N, kind, random), queries = cloud<float>(M, query_kind, random);
  if (M == N && round % 2) queries = xyz;
  xyz.resize(N * dims), queries.resize(M * dims);
  const Ordered points(xyz, dims, order_of(xyz, dims, round % 3, random));
  const Ordered asked(queries, dims, order_of(queries, dims, round % 5, random));
  uint64_t waiting[2 * kWarp];
  KnnWarp<R> warp(points.cloud, k, waiting);
  for (int i = 0; i < M; ++i) {
    const OrderedPoint& q = asked.points[i];
    warp.query(q.x, q.y, q.z);
    Keys found;
    for (int place = 0; place < k; ++place) found.push_back(warp.nearest.list.at(place));
    const Keys expected = brute_force(&queries[q.index * dims], xyz, dims, k);
    CHECK(found == expected, "round", round, M, N, dims, k, query_kind, kind, i);
  }
}

template <int R>
void check_list(int round, Random& random) {
  const int n = 1 + pick(random, 600), k = 1 + pick(random, std::min(n, R * kWarp));
  const int values = round % 3 == 0 ? 1 + pick(random, 5) : 1000000;
  Keys keys;
  for (int i = 0; i < n; ++i) keys.push_back(neighbour_key(static_cast<float>(pick(random, values)), i));
  std::shuffle(keys.begin(), keys.end(), random);
  uint64_t waiting[2 * kWarp];
  Nearest<R> nearest(k, waiting);
  nearest.restart(round % 4 ? kNoKey - 1 : *std::max_element(keys.begin(), keys.end()));
  for (int base = 0; base < n; base += kWarp)
    nearest.push(map([&](int lane) { return base + lane < n ? keys[base + lane] : kNoKey; }, lane_id()));
  nearest.merge_waiting();
  std::sort(keys.begin(), keys.end());
  for (int place = 0; place < k; ++place)
    CHECK(nearest.list.at(place) == keys[place], "list of", R, "round", round, n, k, place);
}

}  // namespace

int main() {
  Random random(0);
  for (int round = 0; round < 700; ++round) {
    check_list<1>(round, random);
    check_list<2>(round, random);
    check_list<4>(round, random);
  }
  for (int round = 0; round < 500; ++round) {
    const int N = round < 40 ? 1 + round : 1 + pick(random, round % 10 ? 200 : 1500);
    const int M = round % 2 ? N : 1 + pick(random, 100), dims = round % 7 == 0 ? 1 + pick(random, 3) : 3;
    const int query_kind = round % 4 ? round % kClouds : pick(random, kClouds);
    const int most = std::min(N, round % 8 == 0 ? 4 * kWarp : round % 4 == 0 ? 2 * kWarp : kWarp);
    const int k = round % 3 == 0 ? most : 1 + pick(random, most);
    if (k <= kWarp) check_search<1>(round, std::min(M, 300), N, dims, k, query_kind, round % kClouds, random);
    if (k <= 2 * kWarp) check_search<2>(round, std::min(M, 30), N, dims, k, query_kind, round % kClouds, random);
    check_search<4>(round, std::min(M, 30), N, dims, k, query_kind, round % kClouds, random);
  }
  // more branches than a warp has lanes
  check_search<1>(1, 200, 34000, 3, 20, 0, 0, random);
  check_search<4>(1, 50, 34000, 3, 100, 0, 3, random);
  return 0;
}
