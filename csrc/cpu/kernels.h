// What the kernels offer to the bindings: one table a set of instructions. kernels.cpp is compiled once for each; which
// of them runs is decided once: the best that the processor has, and at most REID3D_ISA=portable|avx2|avx512.
#pragma once

#include <cstdint>

#include "tree.h"

namespace reid3d {

template <typename T>
struct PointKernels {
  // The indices of a cloud's points along the Z-curve; `keys` is scratch of 2n.
  void (*morton_order)(const T* rows, int64_t n, int64_t dims, uint64_t* keys, int32_t* order);
  // Fills a tree laid out for n points (D <= 3, missing coordinates are 0) in the given order.
  void (*build)(const T* rows, int64_t dims, const int32_t* order, Tree<T>& tree);
  // Rows [begin, end) along the curve of `queries`, written at their indices in dist2 and idx (M,k). `scratch` is
  // knn_scratch(n, k).
  void (*knn)(const Tree<T>& queries, int64_t begin, int64_t end, const Tree<T>& points, int64_t k, void* scratch,
              T* dist2, int64_t* idx);
  // (N,D) rows as panels of 16 points, for knn_rows.
  void (*pack)(const T* rows, int64_t n, int64_t dims, T* panels);
  // The same for m rows of queries and a packed cloud, D of any size. `distances` is scratch of m * round_up(n, 16).
  void (*knn_rows)(const T* queries, int64_t m, const T* panels, int64_t n, int64_t dims, int64_t k, T* distances,
                   void* scratch, T* dist2, int64_t* idx);
  // Farthest points of `count` clouds of one size, 1 or 2; `scratch` is count * Tree<T>::size(n).
  void (*fps)(const Tree<T>* trees, int64_t count, int64_t m, int64_t start, T* scratch, int64_t* picked);
  // First k points within a radius, in index order, of packed points with D = 3; returns the number of hits, at most k.
  int64_t (*ball_query)(const T* center, const T* panels, int64_t n, T radius2, int64_t k, int64_t* idx);
};

// What the kernels know of torch's half types.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// In which rows of features are compared and summed.
template <typename T>
struct Widened {
  using type = float;
};
template <>
struct Widened<double> {
  using type = double;
};
template <typename T>
using Wide = typename Widened<T>::type;

// Clouds of n rows of c channels, m groups of k rows in each.
struct GroupShape {
  int64_t n, m, k, c;
};

// Where edge_pool writes (B,m,c).
template <typename T, typename S>
struct PooledEdges {
  T *max, *min;
  Wide<T>*sum, *sumsq;
  S *max_slot, *min_slot;
};

// Rows of T, slots of S.
template <typename T, typename S>
struct SlotKernels {
  // Groups [begin, end) of all clouds; false where an index is out of range.
  bool (*group_max)(const T* feats, const int64_t* idx, GroupShape size, int64_t begin, int64_t end, T* out, S* slot);
  bool (*edge_pool)(const T* feats, const int64_t* idx, GroupShape size, int64_t begin, int64_t end,
                    const PooledEdges<T, S>& out);
  // out (n,c) = or += grad (m,c) of one cloud at the rows that won, `count` <= 16 channels; `sum` is scratch of 16 n.
  void (*add_at_winners)(const T* grad, const int64_t* idx, const S* slot, GroupShape size, int64_t count, bool add,
                         Wide<T>* sum, Wide<T>* out);
};

template <typename T>
struct PoolKernels {
  SlotKernels<T, uint8_t> bytes;
  SlotKernels<T, int16_t> shorts;
  // Rows [begin, end) of out (n,c), of one cloud, += the gradients (m,c) of sum and sum of squares of the edges into
  // them.
  void (*add_edges)(const Wide<T>* grad_sum, const Wide<T>* grad_sumsq, const T* feats, const int32_t* offsets,
                    const int32_t* edges, GroupShape size, int64_t begin, int64_t end, Wide<T>* out);
  const SlotKernels<T, uint8_t>& of(uint8_t) const { return bytes; }
  const SlotKernels<T, int16_t>& of(int16_t) const { return shorts; }
};

// gated_pool: clouds of n points with m groups of k pairs; h inner channels, of which `inner` are not padding, c outer
// ones, r hidden ones of the gate, 0 where there is none.
struct GatedShape {
  int64_t n, m, k, h, inner, c, r;
};
// The outer weights times their signs in panels of 16 columns (inner,16), and without them as rows (c,h); the rest in rows
// of h but q, panels (h,16), which is null where the moments have no gradient.
template <typename T>
struct GatedWeights {
  const T *panels, *sign, *rows, *reduce, *reduce_bias, *expand, *expand_bias, *inner_mean, *q, *q0;
};
struct GatedMoments {
  double *mean, *m2, *inner;
};
template <typename T>
struct GatedGradient {
  T *points, *centers, *reduce, *reduce_bias, *expand, *expand_bias, *weight, *square;
};
// Groups in a tile, and its rows, rounded up to a multiple of what any processor computes at a time.
inline __attribute__((always_inline)) int64_t gated_groups(GatedShape size) { return size.k < 96 ? 96 / size.k : 1; }
inline __attribute__((always_inline)) int64_t gated_rows(GatedShape size) {
  return (gated_groups(size) * size.k + 47) / 48 * 48;
}
inline __attribute__((always_inline)) int64_t gated_scratch(GatedShape size) {
  return gated_rows(size) * (5 * size.h + 2 * size.r + 16) + 64;
}

// Takes `count` more numbers, of which mean and squared differences are given, to those of `before` numbers.
inline __attribute__((always_inline)) void merge_moments(double before, double count, double mean, double m2,
                                                         double* all_mean, double* all_m2) {
  const double difference = mean - *all_mean, share = count / (before + count);
  *all_mean += difference * share;
  *all_m2 += m2 + difference * difference * before * share;
}

template <typename T, typename S>
struct GatedKernels {
  void (*forward)(const T* points, const T* centers, const int64_t* idx, const GatedWeights<T>& weights,
                  GatedShape size, int64_t begin, int64_t end, T* scratch, T* out, S* slot,
                  const GatedMoments& moments);
  void (*backward)(const T* grad_out, const T* points, const T* centers, const int64_t* idx, const S* slot,
                   const GatedWeights<T>& weights, GatedShape size, T* scratch, const GatedGradient<T>& grad);
};

// match_maps: maps (c,l), T as they are given. See match_maps.h.
template <typename T>
struct MapKernels {
  void (*pack_rows)(const T* map, int64_t c, int64_t l, Wide<T>* panels);
  void (*pack_columns)(const T* map, int64_t c, int64_t l, Wide<T>* panels);
  void (*match_pair)(const Wide<T>* rows, const Wide<T>* columns, int64_t c, int64_t l, void* scratch, Wide<T>* best,
                     int16_t* winner);
  void (*add_matches)(const Wide<T>* grad, const int16_t* winner, const T* gallery, int64_t count, int64_t maps,
                      int64_t c, int64_t l, int64_t channel, Wide<T>* scratch, Wide<T>* out);
};

// What a street with a person is made of, in the order of the columns of preprocess/synth/paint.py.
struct Quad {
  float x, z, dx, dz, width, bottom, top, kind, size, seed, before, colour[3], second[3];
};
struct Material {
  float colour[3], second[3], pattern, scale, phase, rough;
};
struct Outfit {
  float sleeve, hem, trouser, tail, crown, open, neck, boot, strap, seed;
};
struct View {
  float up[3], light[3], distance, tall, column, row, rotation[9], x, z, ambient, sun, shadow, gain[3], noise, seed;
  float sky[3], haze[3], ground, ground_scale, ground_seed, ground_colour[3], ground_second[3];
};
// Where a view has its person: a point (x, y, z) of the camera's frame falls on the pixel zoom * (x, y) / z + (x0, y0);
// the camera stands that high above the ground.
struct Frame {
  float zoom, x0, y0, height;
};
constexpr int64_t kFields = 8;  // of a place on a body

struct Scene {
  int64_t bare, vertices, joints, face_count, parts, materials, quads;  // of each image; the first vertices are bare
  const float *rest, *transforms;
  const int64_t* joint;
  const float *weight, *worn;
  int64_t framed;
  const int64_t* faces;
  const int32_t* corners;  // the same for rasterize
  const int64_t* part;
  const float* fields;
  const Outfit* outfit;
  const int64_t* part_material;
  const Material* material;
  const Quad* quad;
  const View* view;
  const float *taps, *tone;
};
struct Picture {
  uint8_t* image;
  bool *mask, *seen, *shown;
  float* depth;
  Frame* frame;
};

// What a row of similarities or its positions may have wrong.
enum class MatchError { none, nan, position };

struct Kernels {
  const char* isa;
  // Image b of the scenes; `floats` and `faces` are scratch, see paint_scratch.
  void (*paint)(const Scene& scene, int64_t b, int64_t height, float* floats, int64_t* faces, const Picture& picture);
  // One body; depth and face (height,width) hold +inf and -1. `corners`: see rasterize.h.
  void (*rasterize)(const float* points, const int32_t* corners, int64_t faces, int64_t height, int64_t width,
                    float* depth, int64_t* face);
  // One query: `places` (matches_count,) of its matches in a row of n similarities. `scratch`: see match_scratch.
  MatchError (*match_places)(const float* sim, int64_t n, const int64_t* matches, int64_t matches_count,
                             const int64_t* removed, int64_t removed_count, const int64_t* junk, int64_t junk_count,
                             bool pessimistic, void* scratch, int64_t* places);
  PointKernels<float> f;
  PointKernels<double> d;
  PoolKernels<float> pool_f;
  PoolKernels<double> pool_d;
  PoolKernels<Half> pool_h;
  PoolKernels<BFloat16> pool_b;
  const PointKernels<float>& of(float) const { return f; }
  const PointKernels<double>& of(double) const { return d; }
  GatedKernels<float, uint8_t> gated_f;
  GatedKernels<float, int16_t> gated_fs;
  GatedKernels<double, uint8_t> gated_d;
  GatedKernels<double, int16_t> gated_ds;
  const GatedKernels<float, uint8_t>& gated(float, uint8_t) const { return gated_f; }
  const GatedKernels<float, int16_t>& gated(float, int16_t) const { return gated_fs; }
  const GatedKernels<double, uint8_t>& gated(double, uint8_t) const { return gated_d; }
  const GatedKernels<double, int16_t>& gated(double, int16_t) const { return gated_ds; }
  MapKernels<float> map_f;
  MapKernels<double> map_d;
  MapKernels<Half> map_h;
  MapKernels<BFloat16> map_b;
  const MapKernels<float>& maps(float) const { return map_f; }
  const MapKernels<double>& maps(double) const { return map_d; }
  const MapKernels<Half>& maps(Half) const { return map_h; }
  const MapKernels<BFloat16>& maps(BFloat16) const { return map_b; }
  const PoolKernels<float>& pool(float) const { return pool_f; }
  const PoolKernels<double>& pool(double) const { return pool_d; }
  const PoolKernels<Half>& pool(Half) const { return pool_h; }
  const PoolKernels<BFloat16>& pool(BFloat16) const { return pool_b; }
};

// The kernels of this processor.
const Kernels& kernels();

// Numbers of scratch for one call of paint; it takes as many faces as pixels, 64 to a row.
inline int64_t paint_scratch(int64_t vertices, int64_t height) { return 9 * vertices + 5 * 64 * height; }

// Bytes of scratch for one call of knn or knn_rows.
inline int64_t knn_scratch(int64_t n, int64_t k) { return 16 * (n + k + 256); }

// Bytes of scratch for one call of match_places.
inline int64_t match_scratch(int64_t n, int64_t matches) { return 4 * n + 28 * matches; }

// Numbers of a packed map, and bytes of scratch for a pair, whatever the tile.
inline int64_t match_panels(int64_t c, int64_t l) { return c * (l + 31) + 16; }
inline int64_t match_pair_scratch(int64_t l) { return 16 * 16 * (l + 11); }

}  // namespace reid3d
