// Streets with a person: the binding of paint.h.
#include <algorithm>
#include <tuple>

#include "corners.h"

namespace reid3d {
namespace {

constexpr int64_t kWidth = 64;  // paint.h's kRow

// The columns of a contiguous tensor as an array of T.
template <typename T>
const T* rows(const Tensor& t, const char* name) {
  const int64_t columns = sizeof(T) / sizeof(float);
  STD_TORCH_CHECK(t.size(t.dim() - 1) == columns, name, " must have ", columns, " columns, got ", t.size(t.dim() - 1));
  return reinterpret_cast<const T*>(t.const_data_ptr<float>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> paint(
    const Tensor& rest, const Tensor& transforms, const Tensor& joint, const Tensor& weight, const Tensor& worn,
    int64_t framed, const Tensor& faces, const Tensor& part, const Tensor& fields, const Tensor& outfit,
    const Tensor& part_material, const Tensor& material, const Tensor& quad, const Tensor& view, const Tensor& taps,
    const Tensor& tone, int64_t height) {
  const int64_t B = rest.size(0), V = rest.size(1) + worn.size(1), F = faces.size(0), pixels = height * kWidth;
  check_indices(faces, 0, V, "faces");
  check_indices(joint, 0, transforms.size(1), "joint");
  check_indices(part, -1, part_material.size(1), "part");
  check_indices(part_material, 0, material.size(1), "part_material");
  const Scratch<int32_t> corners(3 * round_up(F, kLeaf));
  fill_corners(faces, corners.get());
  const Scene scene{rest.size(1), V, transforms.size(1), F, part_material.size(1), material.size(1), quad.size(1),
                    rest.const_data_ptr<float>(), transforms.const_data_ptr<float>(), joint.const_data_ptr<int64_t>(),
                    weight.const_data_ptr<float>(), worn.const_data_ptr<float>(), std::min(framed, V),
                    faces.const_data_ptr<int64_t>(), corners.get(), part.const_data_ptr<int64_t>(),
                    fields.const_data_ptr<float>(), rows<Outfit>(outfit, "outfit"),
                    part_material.const_data_ptr<int64_t>(), rows<Material>(material, "material"),
                    rows<Quad>(quad, "quad"), rows<View>(view, "view"), taps.const_data_ptr<float>(),
                    tone.const_data_ptr<float>()};
  Tensor image = torch::stable::new_empty(rest, {B, height, kWidth, 3}, ScalarType::Byte);
  Tensor mask = torch::stable::new_empty(rest, {B, height, kWidth}, ScalarType::Bool);
  Tensor seen = torch::stable::new_empty(rest, {B, height, kWidth}, ScalarType::Bool);
  Tensor depth = torch::stable::new_empty(rest, {B, height, kWidth});
  Tensor shown = torch::stable::new_empty(rest, {B, V}, ScalarType::Bool);
  Tensor frame = torch::stable::new_empty(rest, {B, 4});
  const Picture all{image.mutable_data_ptr<uint8_t>(), mask.mutable_data_ptr<bool>(), seen.mutable_data_ptr<bool>(),
                    shown.mutable_data_ptr<bool>(), depth.mutable_data_ptr<float>(),
                    reinterpret_cast<Frame*>(frame.mutable_data_ptr<float>())};
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> floats(paint_scratch(V, height));
    const Scratch<int64_t> seen_faces(pixels);
    for (int64_t b = begin; b < end; ++b) {
      const Picture one{all.image + b * pixels * 3, all.mask + b * pixels, all.seen + b * pixels, all.shown + b * V,
                        all.depth + b * pixels, all.frame + b};
      kernels().paint(scene, b, height, floats.get(), seen_faces.get(), one);
    }
  });
  return {image, mask, seen, depth, shown, frame};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("paint", TORCH_BOX(&reid3d::paint)); }
