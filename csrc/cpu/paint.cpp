// Streets with a person: the binding of paint.h.
#include <initializer_list>
#include <tuple>

#include "corners.h"

namespace reid3d {
namespace {

constexpr int64_t kWidth = 64;  // paint.h's kRow

// A contiguous tensor of that shape.
template <typename T>
const T* shaped(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  const int64_t columns = *(shape.end() - 1), found = t.dim() ? t.size(t.dim() - 1) : 0;
  STD_TORCH_CHECK(found == columns, name, " must have ", columns, " columns, got ", found);
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
  int64_t axis = 0;
  for (const int64_t size : shape) fits = fits && t.size(axis++) == size;
  STD_TORCH_CHECK(fits, name, " must be contiguous and of the shape that preprocess/synth/paint.py says");
  return t.const_data_ptr<T>();
}

// The same of rows of floats, a struct each.
template <typename T>
const T* rows(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  return reinterpret_cast<const T*>(shaped<float>(t, shape, name));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> paint(
    const Tensor& rest, const Tensor& transforms, const Tensor& joint, const Tensor& weight, const Tensor& worn,
    int64_t framed, const Tensor& faces, const Tensor& part, const Tensor& fields, const Tensor& outfit,
    const Tensor& part_material, const Tensor& material, const Tensor& quad, const Tensor& view, const Tensor& taps,
    const Tensor& tone, int64_t height) {
  const int64_t B = rest.size(0), V = rest.size(1) + worn.size(1), F = faces.size(0), pixels = height * kWidth;
  const int64_t bare = rest.size(1), joints = transforms.size(1), parts = part_material.size(1);
  const int64_t materials = material.size(1), quads = quad.size(1);
  STD_TORCH_CHECK(0 < framed && framed <= V, "framed must be between 1 and ", V, ", got ", framed);
  STD_TORCH_CHECK(height > 0, "height must be positive, got ", height);
  constexpr auto columns = [](size_t bytes) { return static_cast<int64_t>(bytes / sizeof(float)); };
  const Scratch<int32_t> corners(3 * round_up(F, kLeaf));
  const Scene scene{bare, V, joints, F, parts, materials, quads,
                    shaped<float>(rest, {B, bare, 3}, "rest"),
                    shaped<float>(transforms, {B, joints, 12}, "transforms"),
                    shaped<int64_t>(joint, {bare, 4}, "joint"),
                    shaped<float>(weight, {bare, 4}, "weight"),
                    shaped<float>(worn, {B, V - bare, 3}, "worn"),
                    framed,
                    shaped<int64_t>(faces, {F, 3}, "faces"),
                    corners.get(),
                    shaped<int64_t>(part, {F}, "part"),
                    shaped<float>(fields, {V, kFields}, "fields"),
                    rows<Outfit>(outfit, {B, columns(sizeof(Outfit))}, "outfit"),
                    shaped<int64_t>(part_material, {B, parts}, "part_material"),
                    rows<Material>(material, {B, materials, columns(sizeof(Material))}, "material"),
                    rows<Quad>(quad, {B, quads, columns(sizeof(Quad))}, "quad"),
                    rows<View>(view, {B, columns(sizeof(View))}, "view"),
                    shaped<float>(taps, {B, 2, 5}, "taps"),
                    shaped<float>(tone, {B, 257}, "tone")};
  check_indices(faces, 0, V, "faces");
  check_indices(joint, 0, joints, "joint");
  check_indices(part, -1, parts, "part");
  check_indices(part_material, 0, materials, "part_material");
  fill_corners(faces, corners.get());
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
