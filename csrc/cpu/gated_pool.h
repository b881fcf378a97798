// Gather, gate, linear, maximum over groups, in tiles of groups that stay in the cache, and the gradient, which computes
// them anew. Contract: reid3d/ops/gated_pool.py.
//
// Rows of the inner channels are padded with zeros to whole vectors. A pair is a row of points plus one of centers.
#pragma once

#include <limits>

#include "matrix.h"
#include "rows.h"

namespace reid3d::REID3D_ISA {

// The pairs of some groups: y, and, if there is a gate, with its weights, hidden = linear(y), gate = sigmoid(linear(
// silu(hidden))) and p = y * gate; else p = y. `swish` is silu(hidden), in whole vectors.
template <typename T>
struct GatedTile {
  T *y, *gate, *p, *hidden, *swish, *rest;

  GatedTile(GatedShape size, T* scratch) {
    const int64_t rows = gated_rows(size);
    std::memset(scratch, 0, static_cast<size_t>(gated_scratch(size)) * sizeof(T));
    y = scratch;
    gate = y + rows * size.h;
    p = size.r ? gate + rows * size.h : y;
    hidden = gate + 2 * rows * size.h;
    swish = hidden + rows * size.r;
    rest = swish + rows * size.r;
  }

  void fill(const T* points, const T* centers, const int64_t* idx, int64_t groups, const GatedWeights<T>& w,
            GatedShape size) {
    const int64_t H = size.h, rows = groups * size.k;
    T* out = y;
    for (int64_t m = 0; m < groups; ++m, centers += H)
      for (int64_t s = 0; s < size.k; ++s, ++idx, out += H) {
        const T* point = points + *idx * H;
        for (int64_t c = 0; c < H; c += kLanes) (Vec<T>::load(point + c) + Vec<T>::load(centers + c)).store(out + c);
      }
    if (size.r == 0) return;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t q = 0; q < size.r; ++q) {
        Vec<T> sum = Vec<T>::all(0);
        for (int64_t c = 0; c < H; c += kLanes)
          sum = madd(Vec<T>::load(y + i * H + c), Vec<T>::load(w.reduce + q * H + c), sum);
        hidden[i * size.r + q] = reduce_sum(sum) + w.reduce_bias[q];
      }
    for (int64_t i = 0; i < rows * size.r; i += kLanes) {  // into what follows, which is of no use yet
      const Vec<T> x = Vec<T>::load(hidden + i);
      (x * sigmoid(x)).store(swish + i);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < H; c += kLanes) {
        Vec<T> sum = Vec<T>::load(w.expand_bias + c);
        for (int64_t q = 0; q < size.r; ++q)
          sum = madd(Vec<T>::all(swish[i * size.r + q]), Vec<T>::load(w.expand + q * H + c), sum);
        const Vec<T> g = sigmoid(sum);
        g.store(gate + i * H + c);
        (g * Vec<T>::load(y + i * H + c)).store(p + i * H + c);
      }
  }
};

// Groups [begin, end) of one cloud. Where `moments.mean` is not null, mean and sum of squared differences from it of every
// channel, and the sum of every inner one, over the pairs of these groups, to what is 0 before.
template <typename T, typename S>
void gated_pool(const T* points, const T* centers, const int64_t* idx, const GatedWeights<T>& w, GatedShape size,
                int64_t begin, int64_t end, T* scratch, T* out, S* slot_out, const GatedMoments& moments) {
  using Lane = typename SlotLane<T>::type;
  const int64_t H = size.h, C = size.c, K = size.k;
  GatedTile<T> tile(size, scratch);
  const bool wanted = moments.mean != nullptr;
  double before = 0;
  for (int64_t m = begin; m < end; m += gated_groups(size)) {
    const int64_t groups = std::min(gated_groups(size), end - m), rows = groups * K;
    const double count = static_cast<double>(rows);
    tile.fill(points, centers + m * H, idx + m * K, groups, w, size);
    for (int64_t c = 0; wanted && c < H; c += kLanes) {
      Vec<T> sum = Vec<T>::all(0);
      for (int64_t i = 0; i < rows; ++i) sum = sum + Vec<T>::load(tile.p + i * H + c);
      T total[kLanes];
      sum.store(total);
      for (int i = 0; i < kLanes; ++i) moments.inner[c + i] += static_cast<double>(total[i]);
    }
    for (int64_t c = 0; c < C; c += kLanes) {
      T* e = tile.rest;
      multiply(tile.p, rows, H, int64_t{1}, w.panels + c * size.inner, int64_t{kLanes}, size.inner, false, e,
               int64_t{kLanes});
      Vec<T> total = Vec<T>::all(0);
      for (int64_t g = 0; g < groups; ++g) {
        const T* x = e + g * K * kLanes;
        Vec<T> best = Vec<T>::load(x);
        total = total + best;
        Mask<T> nan = unordered(best, best);
        Vec<Lane> slot = Vec<Lane>::all(0);
        for (int64_t s = 1; s < K; ++s) {
          const Vec<T> v = Vec<T>::load(x + s * kLanes);
          slot = where(best < v, Vec<Lane>::all(static_cast<Lane>(s)), slot);
          best = max(v, best);
          nan = nan | unordered(v, v);
          total = total + v;
        }
        if (const uint32_t lanes = bits(nan)) {  // the first of them wins
          Lane slots[kLanes];
          slot.store(slots);
          for (int i = 0; i < kLanes; ++i)
            if (lanes >> i & 1)
              for (slots[i] = 0; x[slots[i] * kLanes + i] == x[slots[i] * kLanes + i];) ++slots[i];
          slot = Vec<Lane>::load(slots);
          best = where(nan, Vec<T>::all(std::numeric_limits<T>::quiet_NaN()), best);
        }
        best = best * Vec<T>::load(w.sign + c);
        const int64_t at = (m + g) * C + c;
        if (c + kLanes <= C) {
          best.store(out + at);
          store_slots(slot, slot_out + at);
        } else {
          T values[kLanes];
          S slots[kLanes];
          best.store(values);
          store_slots(slot, slots);
          for (int64_t i = 0; i < C - c; ++i) out[at + i] = values[i], slot_out[at + i] = slots[i];
        }
      }
      if (!wanted) continue;
      const Vec<T> mean = total * Vec<T>::all(static_cast<T>(1 / count));
      Vec<T> squares = Vec<T>::all(0);
      for (int64_t i = 0; i < rows; ++i) {
        const Vec<T> d = Vec<T>::load(e + i * kLanes) - mean;
        squares = madd(d, d, squares);
      }
      T means[kLanes], m2[kLanes];
      (mean * Vec<T>::load(w.sign + c)).store(means);
      squares.store(m2);
      for (int64_t i = 0; i < kLanes && c + i < C; ++i)
        merge_moments(before, count, static_cast<double>(means[i]), static_cast<double>(m2[i]), moments.mean + c + i,
                      moments.m2 + c + i);
    }
    before += count;
  }
}

// The gradient of one cloud. That of an output is, with the moments of all `pairs` pairs, affine in it, so that of the
// inner channels is too: grad_p = q0 + q (p - inner_mean), for all that have not won. What is q of the weights takes
// the sum of (p - inner_mean)^T (p - inner_mean), which is in `grad.square`. All are added to what is there.
template <typename T, typename S>
void gated_pool_backward(const T* grad_out, const T* points, const T* centers, const int64_t* idx, const S* slot,
                         const GatedWeights<T>& w, GatedShape size, T* scratch, const GatedGradient<T>& grad) {
  const int64_t H = size.h, C = size.c, K = size.k, r = size.r;
  GatedTile<T> tile(size, scratch);
  T* const dp = tile.rest + gated_rows(size) * kLanes;
  T* const centred = dp + gated_rows(size) * H;
  const bool dense = w.q != nullptr;
  for (int64_t m = 0; m < size.m; m += gated_groups(size)) {
    const int64_t groups = std::min(gated_groups(size), size.m - m), rows = groups * K;
    tile.fill(points, centers + m * H, idx + m * K, groups, w, size);
    if (dense) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < H; c += kLanes) {
          (Vec<T>::load(tile.p + i * H + c) - Vec<T>::load(w.inner_mean + c)).store(centred + i * H + c);
          Vec<T>::load(w.q0 + c).store(dp + i * H + c);
        }
      for (int64_t c = 0; c < H; c += kLanes) {
        multiply(centred, rows, H, int64_t{1}, w.q + c * H, int64_t{kLanes}, H, true, dp + c, H);
        // of a symmetric matrix the blocks from the diagonal down
        const int64_t from = c / kRowsAtOnce<T> * kRowsAtOnce<T>;
        multiply(centred + from, H - from, int64_t{1}, H, centred + c, H, rows, true, grad.square + from * H + c, H);
      }
    } else {
      std::memset(dp, 0, static_cast<size_t>(rows * H) * sizeof(T));
    }
    for (int64_t c = 0; c < C; ++c) {
      const T* weight = w.rows + c * H;
      T* grad_weight = grad.weight + c * H;
      for (int64_t g = 0; g < groups; ++g) {
        const T value = grad_out[(m + g) * C + c];
        if (value == 0) continue;
        const int64_t row = (g * K + slot[(m + g) * C + c]) * H;
        const Vec<T> v = Vec<T>::all(value);
        for (int64_t h = 0; h < H; h += kLanes) {
          madd(v, Vec<T>::load(weight + h), Vec<T>::load(dp + row + h)).store(dp + row + h);
          madd(v, Vec<T>::load(tile.p + row + h), Vec<T>::load(grad_weight + h)).store(grad_weight + h);
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* d = dp + i * H;
      if (r) {
        const T *y = tile.y + i * H, *gate = tile.gate + i * H, *swish = tile.swish + i * r;
        for (int64_t c = 0; c < H; c += kLanes) {
          const Vec<T> g = Vec<T>::load(gate + c), dy = Vec<T>::load(d + c) * g;
          const Vec<T> dt = dy * Vec<T>::load(y + c) * (Vec<T>::all(1) - g);
          dt.store(centred + c);
          dy.store(d + c);
          (Vec<T>::load(grad.expand_bias + c) + dt).store(grad.expand_bias + c);
        }
        for (int64_t q = 0; q < r; ++q) {
          const Vec<T> u = Vec<T>::all(swish[q]);
          Vec<T> sum = Vec<T>::all(0);
          for (int64_t c = 0; c < H; c += kLanes) {
            const Vec<T> dt = Vec<T>::load(centred + c);
            sum = madd(dt, Vec<T>::load(w.expand + q * H + c), sum);
            madd(dt, u, Vec<T>::load(grad.expand + q * H + c)).store(grad.expand + q * H + c);
          }
          const T x = tile.hidden[i * r + q], s = 1 / (1 + std::exp(-x)), dx = reduce_sum(sum) * (s + x * s * (1 - s));
          grad.reduce_bias[q] += dx;
          const Vec<T> v = Vec<T>::all(dx);
          for (int64_t c = 0; c < H; c += kLanes) {
            madd(v, Vec<T>::load(w.reduce + q * H + c), Vec<T>::load(d + c)).store(d + c);
            madd(v, Vec<T>::load(y + c), Vec<T>::load(grad.reduce + q * H + c)).store(grad.reduce + q * H + c);
          }
        }
      }
      T* to = grad.points + idx[m * K + i] * H;
      T* center = grad.centers + (m + i / K) * H;
      for (int64_t c = 0; c < H; c += kLanes) {
        const Vec<T> dy = Vec<T>::load(d + c);
        (Vec<T>::load(to + c) + dy).store(to + c);
        (Vec<T>::load(center + c) + dy).store(center + c);
      }
    }
  }
}

}  // namespace reid3d::REID3D_ISA
