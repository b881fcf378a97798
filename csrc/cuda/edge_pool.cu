// Maximum, minimum, sum and sum of squares over the edges of a graph, without a tensor over the edges, and their
// gradient. Contract: reid3d/ops/edge_pool.py.
#include <tuple>

#include "pool.cuh"

namespace reid3d {
namespace {

template <typename T, typename Slot>
struct Results {
  T *max, *min;
  Wide<T>*sum, *sumsq;
  Slot *max_slot, *min_slot;
};

template <int V, typename T, typename Slot>
__global__ void __launch_bounds__(kPoolThreads, 2)
    edge_pool_kernel(const T* feats, const int64_t* idx, int64_t total_rows, int64_t M, int64_t N, int64_t C, int32_t K,
                     int width, int rows, Results<T, Slot> out) {
  const PoolThread thread(width, rows, total_rows, C, V);
  EdgePool<T, V> pool;
  pool_groups<V>("edge_pool", thread, rows, feats, idx, total_rows, M, N, C, K, pool);
  if (!thread.active) return;
  const int64_t place = thread.row * C + thread.channel;
  store(out.max + place, pool.max.best);
  store(out.min + place, pool.min);
  store(out.sum + place, pool.sum);
  store(out.sumsq + place, pool.sumsq);
  store(out.max_slot + place, pool.max.slot);
  store(out.min_slot + place, pool.min_slot);
}

template <int V, typename T, typename Slot>
__global__ void __launch_bounds__(kPoolThreads, 2)
    edge_pool_backward_kernel(EdgeGradient<V, T, Slot> gradient, const T* feats, const int32_t* offsets,
                              const int32_t* edges, int64_t total_rows, int64_t M, int64_t n, int64_t C, Divisor K,
                              int width, int rows, T* out) {
  const PoolThread thread(width, rows, total_rows, C, V);
  if (!thread.active) return;
  const int64_t E = M * K.value, column = thread.row / n * M * C + thread.channel;
  const int64_t place = thread.row * C + thread.channel;
  const Incoming incoming("edge_pool_backward", offsets, edges, thread.row, n, E);
  gradient.max += column, gradient.min += column;
  gradient.sum += column, gradient.sumsq += column;
  gradient.max_slot += column, gradient.min_slot += column;
  Wide<T> grad[V];
  gradient(incoming.edges, incoming.count, K, C, feats + place, CheckEdge{"edge_pool_backward", E}, grad);
  store(out + place, grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_pool(const Tensor& feats_, const Tensor& idx_,
                                                                     const std::optional<Tensor>&,
                                                                     const std::optional<Tensor>&) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const DeviceGuard guard(feats.get_device_index());
  const int64_t B = feats.size(0), N = feats.size(1), C = feats.size(2), M = idx.size(1), K = idx.size(2);
  check_graph("edge_pool", N, M, K);
  const ScalarType wide = feats.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor max = torch::stable::new_empty(feats, {B, M, C}), min = torch::stable::new_empty(feats, {B, M, C});
  Tensor sum = torch::stable::new_empty(feats, {B, M, C}, wide);
  Tensor sumsq = torch::stable::new_empty(feats, {B, M, C}, wide);
  Tensor max_slot = torch::stable::new_empty(feats, {B, M, C}, slot_type(K));
  Tensor min_slot = torch::stable::new_empty(feats, {B, M, C}, slot_type(K));
  if (max.numel() == 0) return {max, min, sum, sumsq, max_slot, min_slot};
  const cudaStream_t stream = current_stream(feats);
  const auto launch = [&](auto value, auto place, auto size) {
    using T = decltype(value);
    using Slot = decltype(place);
    constexpr int V = decltype(size)::value;
    const PoolShape shape(B * M, C / V);
    edge_pool_kernel<V, T, Slot><<<shape.blocks, shape.threads, shape.rows * (kStage + 1) * sizeof(int32_t), stream>>>(
        feats.const_data_ptr<T>(), idx.const_data_ptr<int64_t>(), B * M, M, N, C, static_cast<int32_t>(K), shape.width,
        shape.rows,
        {max.mutable_data_ptr<T>(), min.mutable_data_ptr<T>(), sum.mutable_data_ptr<Wide<T>>(),
         sumsq.mutable_data_ptr<Wide<T>>(), max_slot.mutable_data_ptr<Slot>(), min_slot.mutable_data_ptr<Slot>()});
  };
  dispatch_pool(feats, K, C, {&feats, &max, &min, &sum, &sumsq, &max_slot, &min_slot}, launch);
  check_launch("edge_pool");
  return {max, min, sum, sumsq, max_slot, min_slot};
}

Tensor edge_pool_backward(const Tensor& grad_max, const Tensor& grad_min, const Tensor& grad_sum,
                          const Tensor& grad_sumsq, const Tensor& feats_, const Tensor& idx, const Tensor& max_slot_,
                          const Tensor& min_slot_, const std::optional<Tensor>& offsets_,
                          const std::optional<Tensor>& edges_) {
  const Tensor max = torch::stable::contiguous(grad_max), min = torch::stable::contiguous(grad_min),
               sum = torch::stable::contiguous(grad_sum), sumsq = torch::stable::contiguous(grad_sumsq),
               feats = torch::stable::contiguous(feats_), max_slot = torch::stable::contiguous(max_slot_),
               min_slot = torch::stable::contiguous(min_slot_);
  const DeviceGuard guard(feats.get_device_index());
  const int64_t B = feats.size(0), n = feats.size(1), C = feats.size(2), M = idx.size(1), K = idx.size(2);
  check_graph("edge_pool_backward", n, M, K);
  if (B * M * C == 0) return torch::stable::new_zeros(feats, {B, n, C});
  Tensor out = torch::stable::new_empty(feats, {B, n, C});
  const auto graph = transposed_graph(idx, offsets_, edges_, n);
  const cudaStream_t stream = current_stream(feats);
  const auto launch = [&](auto value, auto place, auto size) {
    using T = decltype(value);
    using Slot = decltype(place);
    constexpr int V = decltype(size)::value;
    const PoolShape shape(B * n, C / V);
    const EdgeGradient<V, T, Slot> gradient{max.const_data_ptr<T>(),          min.const_data_ptr<T>(),
                                            sum.const_data_ptr<Wide<T>>(),    sumsq.const_data_ptr<Wide<T>>(),
                                            max_slot.const_data_ptr<Slot>(),  min_slot.const_data_ptr<Slot>()};
    edge_pool_backward_kernel<V, T, Slot><<<shape.blocks, shape.threads, 0, stream>>>(
        gradient, feats.const_data_ptr<T>(), graph.first.const_data_ptr<int32_t>(),
        graph.second.const_data_ptr<int32_t>(), B * n, M, n, C, Divisor(static_cast<uint32_t>(K)), shape.width,
        shape.rows, out.mutable_data_ptr<T>());
  };
  dispatch_pool(feats, K, C, {&max, &min, &sum, &sumsq, &feats, &max_slot, &min_slot, &out},
                launch);
  check_launch("edge_pool_backward");
  return out;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) {
  m.impl("edge_pool", TORCH_BOX(&reid3d::edge_pool));
  m.impl("edge_pool_backward", TORCH_BOX(&reid3d::edge_pool_backward));
}
