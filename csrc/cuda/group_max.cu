// Grouped max pooling without the grouped tensor, and its gradient. Contract: reid3d/ops/group_max.py.
#include <tuple>

#include "pool.cuh"

namespace reid3d {
namespace {

template <int V, typename T, typename Slot>
__global__ void __launch_bounds__(kPoolThreads, 2)
    group_max_kernel(const T* feats, const int64_t* idx, int64_t total_rows, int64_t M, int64_t N, int64_t C, int32_t K,
                     int width, int rows, T* out, Slot* slot) {
  const PoolThread thread(width, rows, total_rows, C, V);
  MaxPool<T, V> pool;
  pool_groups<V>("group_max", thread, rows, feats, idx, total_rows, M, N, C, K, pool);
  if (!thread.active) return;
  store(out + thread.row * C + thread.channel, pool.best);
  store(slot + thread.row * C + thread.channel, pool.slot);
}

// A row of the gradient is written once, by the threads of its channels: no zeros, no atomics, one order of summation.
template <int V, typename T, typename Slot>
__global__ void __launch_bounds__(kPoolThreads, 2)
    group_max_backward_kernel(const T* grad, const Slot* slot, const int32_t* offsets, const int32_t* edges,
                              int64_t total_rows, int64_t M, int64_t n, int64_t C, Divisor K, int width, int rows,
                              T* out) {
  const PoolThread thread(width, rows, total_rows, C, V);
  if (!thread.active) return;
  const int64_t E = M * K.value, column = thread.row / n * M * C + thread.channel;
  const Incoming incoming("group_max_backward", offsets, edges, thread.row, n, E);
  Wide<T> sum[V];
  const CheckEdge check{"group_max_backward", E};
  max_gradient<V>(incoming.edges, incoming.count, K, grad + column, slot + column, C, check, sum);
  store(out + thread.row * C + thread.channel, sum);
}

std::tuple<Tensor, Tensor> group_max(const Tensor& feats_, const Tensor& idx_, const std::optional<Tensor>&,
                                     const std::optional<Tensor>&) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const DeviceGuard guard(feats.get_device_index());
  const int64_t B = feats.size(0), N = feats.size(1), C = feats.size(2), M = idx.size(1), K = idx.size(2);
  check_graph("group_max", N, M, K);
  Tensor out = torch::stable::new_empty(feats, {B, M, C});
  Tensor slot = torch::stable::new_empty(feats, {B, M, C}, slot_type(K));
  if (out.numel() == 0) return {out, slot};
  const cudaStream_t stream = current_stream(feats);
  dispatch_pool(feats, K, C, {&feats, &out, &slot}, [&](auto value, auto place, auto size) {
    using T = decltype(value);
    using Slot = decltype(place);
    constexpr int V = decltype(size)::value;
    const PoolShape shape(B * M, C / V);
    group_max_kernel<V, T, Slot><<<shape.blocks, shape.threads, shape.rows * (kStage + 1) * sizeof(int32_t), stream>>>(
        feats.const_data_ptr<T>(), idx.const_data_ptr<int64_t>(), B * M, M, N, C, static_cast<int32_t>(K), shape.width,
        shape.rows, out.mutable_data_ptr<T>(), slot.mutable_data_ptr<Slot>());
  });
  check_launch("group_max");
  return {out, slot};
}

Tensor group_max_backward(const Tensor& grad_, const Tensor& idx, const Tensor& slot_,
                          const std::optional<Tensor>& offsets_, const std::optional<Tensor>& edges_, int64_t n) {
  const Tensor grad = torch::stable::contiguous(grad_), slot = torch::stable::contiguous(slot_);
  const DeviceGuard guard(grad.get_device_index());
  const int64_t B = grad.size(0), M = grad.size(1), C = grad.size(2), K = idx.size(2);
  check_graph("group_max_backward", n, M, K);
  if (B * M * C == 0) return torch::stable::new_zeros(grad, {B, n, C});
  Tensor out = torch::stable::new_empty(grad, {B, n, C});
  const auto graph = transposed_graph(idx, offsets_, edges_, n);
  const cudaStream_t stream = current_stream(grad);
  dispatch_pool(grad, K, C, {&grad, &slot, &out}, [&](auto value, auto place, auto size) {
    using T = decltype(value);
    using Slot = decltype(place);
    constexpr int V = decltype(size)::value;
    const PoolShape shape(B * n, C / V);
    group_max_backward_kernel<V, T, Slot><<<shape.blocks, shape.threads, 0, stream>>>(
        grad.const_data_ptr<T>(), slot.const_data_ptr<Slot>(), graph.first.const_data_ptr<int32_t>(),
        graph.second.const_data_ptr<int32_t>(), B * n, M, n, C, Divisor(static_cast<uint32_t>(K)), shape.width,
        shape.rows, out.mutable_data_ptr<T>());
  });
  check_launch("group_max_backward");
  return out;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) {
  m.impl("group_max", TORCH_BOX(&reid3d::group_max));
  m.impl("group_max_backward", TORCH_BOX(&reid3d::group_max_backward));
}
