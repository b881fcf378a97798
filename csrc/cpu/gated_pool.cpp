// Gather, gate, linear and maximum in tiles, and the gradient: the binding of gated_pool.h.
#include "pool.h"

namespace reid3d {
namespace {

constexpr int64_t kPairs = 4096;  // in a piece of a cloud that one thread takes, about

int64_t padded(int64_t channels) { return (channels + kLeaf - 1) / kLeaf * kLeaf; }

// Rows of x, their last dimension padded with zeros to whole vectors.
Tensor padded(const Tensor& x_) {
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t c = x.size(x.dim() - 1);
  return c == padded(c) ? x : torch::stable::pad(x, {0, padded(c) - c});
}

Tensor without_padding(const Tensor& x, int64_t c) {
  const int64_t last = x.dim() - 1;
  return x.size(last) == c ? x : torch::stable::contiguous(torch::stable::narrow(const_cast<Tensor&>(x), last, 0, c));
}

template <typename F>
void dispatch(const Tensor& x, int64_t k, F&& f) {
  dispatch_float_double(x, [&](auto t) { dispatch_slots(k, [&](auto s) { f(t, s); }); });
}

void check_range(const Tensor& idx, int64_t n) {
  const int64_t* i = values<int64_t>(idx);
  uint64_t signs = 0;  // of j and of n - 1 - j
  for (int64_t e = 0; e < idx.numel(); ++e)
    signs |= static_cast<uint64_t>(i[e]) | (static_cast<uint64_t>(n - 1) - static_cast<uint64_t>(i[e]));
  if (signs >> 63) index_out_of_range(idx, n);
}

// The inputs as the kernels want them. What is not given is empty.
struct Inputs {
  Tensor points, centers, idx, weight;
  std::vector<Tensor> gate;  // reduce (r,h), its bias (r), expand (r,h), its bias (h)
  int64_t B;
  GatedShape size;

  Inputs(const Tensor& points_, const Tensor& centers_, const Tensor& idx_, const std::optional<Tensor>& reduce,
         const std::optional<Tensor>& reduce_bias, const std::optional<Tensor>& expand,
         const std::optional<Tensor>& expand_bias, const Tensor& weight_)
      : points(padded(points_)), centers(padded(centers_)), idx(torch::stable::contiguous(idx_)),
        weight(padded(weight_)), B(points_.size(0)),
        size{points_.size(1), idx_.size(1),    idx_.size(2), padded(points_.size(2)), points_.size(2),
             weight_.size(0), reduce ? reduce->size(0) : 0} {
    check_range(idx, size.n);
    if (!reduce) return;
    gate = {padded(*reduce), torch::stable::contiguous(*reduce_bias), padded(*expand), padded(*expand_bias)};
  }

  template <typename T>
  GatedWeights<T> weights() const {
    GatedWeights<T> w = {};
    w.rows = values<T>(weight);
    if (!gate.empty())
      w.reduce = values<T>(gate[0]), w.reduce_bias = values<T>(gate[1]), w.expand = values<T>(gate[2]),
      w.expand_bias = values<T>(gate[3]);
    return w;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_pool(
    const Tensor& points_, const Tensor& centers_, const Tensor& idx_, std::optional<Tensor> reduce,
    std::optional<Tensor> reduce_bias, std::optional<Tensor> expand, std::optional<Tensor> expand_bias,
    const Tensor& weight_, const Tensor& sign_, bool moments) {
  const Inputs in(points_, centers_, idx_, reduce, reduce_bias, expand, expand_bias, weight_);
  const GatedShape size = in.size;
  const Tensor sign = padded(sign_);
  const int64_t B = in.B, H = size.h, C = size.c, last = moments ? C : 0;
  Tensor out = torch::stable::new_empty(points_, {B, size.m, C});
  Tensor slot = torch::stable::new_empty(points_, {B, size.m, C}, slot_type(size.k));
  Tensor mean = torch::stable::new_empty(points_, {last}), var = torch::stable::new_empty(points_, {last});
  Tensor inner_mean = torch::stable::new_empty(points_, {moments ? size.inner : 0});
  dispatch(points_, size.k, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    GatedWeights<T> w = in.weights<T>();
    w.sign = values<T>(sign);
    const Scratch<T> panels(padded(C) * size.inner);
    for (int64_t c = 0; c < padded(C); ++c)
      for (int64_t h = 0; h < size.inner; ++h)
        panels.get()[(c / kLeaf * size.inner + h) * kLeaf + c % kLeaf] = c < C ? w.sign[c] * w.rows[c * H + h] : T(0);
    w.panels = panels.get();
    // The pieces, and with them the order of all sums, depend on the shapes alone.
    const int64_t step = std::max(gated_groups(size), kPairs / size.k / gated_groups(size) * gated_groups(size));
    const int64_t pieces = (size.m + step - 1) / step;
    std::vector<double> sums(moments ? static_cast<size_t>(B * pieces * (2 * C + H)) : 0, 0.0);
    torch::stable::parallel_for(0, B * pieces, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(gated_scratch(size));
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t b = piece / pieces, first = piece % pieces * step;
        double* own = moments ? sums.data() + piece * (2 * C + H) : nullptr;
        const GatedMoments found = moments ? GatedMoments{own, own + C, own + 2 * C} : GatedMoments{};
        kernels().gated(t, s).forward(values<T>(in.points) + b * size.n * H, values<T>(in.centers) + b * size.m * H,
                                      values<int64_t>(in.idx) + b * size.m * size.k, w, size, first,
                                      std::min(first + step, size.m), scratch.get(), values<T>(out) + b * size.m * C,
                                      values<S>(slot) + b * size.m * C, found);
      }
    });
    if (!moments) return;
    const double all = static_cast<double>(B * size.m * size.k);
    for (int64_t c = 0; c < C; ++c) {
      double before = 0, one_mean = 0, m2 = 0;
      for (int64_t piece = 0; piece < B * pieces; ++piece) {
        const double* own = sums.data() + piece * (2 * C + H);
        const int64_t first = piece % pieces * step;
        merge_moments(before, static_cast<double>((std::min(first + step, size.m) - first) * size.k), own[c],
                      own[C + c], &one_mean, &m2);
        before += static_cast<double>((std::min(first + step, size.m) - first) * size.k);
      }
      values<T>(mean)[c] = static_cast<T>(one_mean * (all / all));  // of no pairs: NaN
      values<T>(var)[c] = static_cast<T>(m2 / all);
    }
    for (int64_t h = 0; h < size.inner; ++h) {
      double sum = 0;
      for (int64_t piece = 0; piece < B * pieces; ++piece) sum += sums[static_cast<size_t>(piece * (2 * C + H) + 2 * C + h)];
      values<T>(inner_mean)[h] = static_cast<T>(sum / std::max(all, 1.0));
    }
  });
  return {out, mean, var, inner_mean, slot};
}

// Threads take whole clouds, each with sums of its own, which are added up in order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_pool_backward(
    const Tensor& grad_out_, const Tensor& points_, const Tensor& centers_, const Tensor& idx_,
    std::optional<Tensor> reduce, std::optional<Tensor> reduce_bias, std::optional<Tensor> expand,
    std::optional<Tensor> expand_bias, const Tensor& weight_, const Tensor& slot_, const Tensor& inner_mean_,
    const Tensor& q_, const Tensor& q0_) {
  const Inputs in(points_, centers_, idx_, reduce, reduce_bias, expand, expand_bias, weight_);
  const GatedShape size = in.size;
  const int64_t B = in.B, H = size.h, C = size.c, r = size.r, h = size.inner;
  const Tensor grad_out = torch::stable::contiguous(grad_out_), slot = torch::stable::contiguous(slot_);
  const Tensor inner_mean = padded(inner_mean_), q = torch::stable::contiguous(q_), q0 = padded(q0_);
  const bool dense = q.numel() > 0;
  const auto zeros = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_zeros(points_, torch::headeronly::IntHeaderOnlyArrayRef(shape));
  };
  Tensor grad_points = zeros({B, size.n, H}), grad_centers = zeros({B, size.m, H}), grad_weight = zeros({C, h});
  Tensor grad_reduce = zeros({r, h}), grad_reduce_bias = zeros({r}), grad_expand = zeros({r, h});
  Tensor grad_expand_bias = zeros({r ? h : 0}), square = dense ? zeros({h, h}) : zeros({0});
  dispatch(points_, size.k, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    GatedWeights<T> w = in.weights<T>();
    const Scratch<T> panels(dense ? H * H : 0);
    if (dense) {
      for (int64_t i = 0; i < H; ++i)
        for (int64_t j = 0; j < H; ++j)
          panels.get()[(j / kLeaf * H + i) * kLeaf + j % kLeaf] = i < h && j < h ? values<T>(q)[i * h + j] : T(0);
      w.q = panels.get(), w.q0 = values<T>(q0), w.inner_mean = values<T>(inner_mean);
    }
    // Of one cloud: square, which is computed some rows further than it is, weight, and the gate.
    const int64_t squares = dense ? (H + 47) * H : 0, one = squares + (C + 2 * r + 1) * H + r;
    const Scratch<T> sums(std::max<int64_t>(B, 1) * one);
    std::fill(sums.get(), sums.get() + one, T(0));  // where there is no cloud, that is all
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(gated_scratch(size));
      for (int64_t b = begin; b < end; ++b) {
        T* at = sums.get() + b * one;
        std::fill(at, at + one, T(0));
        GatedGradient<T> grad = {};
        grad.points = values<T>(grad_points) + b * size.n * H;
        grad.centers = values<T>(grad_centers) + b * size.m * H;
        grad.square = at;
        grad.weight = at += squares;
        grad.reduce = at += C * H;
        grad.expand = at += r * H;
        grad.expand_bias = at += r * H;
        grad.reduce_bias = at + H;
        kernels().gated(t, s).backward(values<T>(grad_out) + b * size.m * C,
                                       values<T>(in.points) + b * size.n * H, values<T>(in.centers) + b * size.m * H,
                                       values<int64_t>(in.idx) + b * size.m * size.k,
                                       values<S>(slot) + b * size.m * C, w, size, scratch.get(), grad);
      }
    });
    T* sum = sums.get();  // in place of the first cloud's
    parallel_rows(one, B, [&](int64_t begin, int64_t end) {
      for (int64_t b = 1; b < B; ++b)
        for (int64_t i = begin; i < end; ++i) sum[i] += sum[b * one + i];
    });
    // There is what lies on and below the diagonal.
    for (int64_t i = 0; i < square.numel(); ++i)
      values<T>(square)[i] = sum[std::max(i / h, i % h) * H + std::min(i / h, i % h)];
    const T* at = sum + squares;
    const auto take = [&](Tensor& out, int64_t rows) {
      for (int64_t i = 0; i < rows * h; ++i) values<T>(out)[i] = at[i / h * H + i % h];
      at += rows * H;
    };
    take(grad_weight, C);
    take(grad_reduce, r);
    take(grad_expand, r);
    if (r) take(grad_expand_bias, 1), std::copy(at, at + r, values<T>(grad_reduce_bias));
  });
  return {without_padding(grad_points, h), without_padding(grad_centers, h), grad_reduce, grad_reduce_bias,
          grad_expand,                     grad_expand_bias,                 grad_weight, square};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("gated_pool", TORCH_BOX(&reid3d::gated_pool));
  m.impl("gated_pool_backward", TORCH_BOX(&reid3d::gated_pool_backward));
}
