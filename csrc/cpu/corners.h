// What the bindings that draw triangles share.
#pragma once

#include <algorithm>

#include "cloud.h"

namespace reid3d {

inline void check_indices(const Tensor& t, int64_t least, int64_t count, const char* name) {
  const int64_t *at = t.const_data_ptr<int64_t>(), size = t.numel();
  for (int64_t i = 0; i < size; ++i)
    STD_TORCH_CHECK(least <= at[i] && at[i] < count, name, " must hold indices between ", least, " and ", count - 1,
                    ", got ", at[i]);
}

// The corners of faces (F,3) as rasterize.h has them, in 3 * round_up(F, 16) numbers; the faces were checked.
inline void fill_corners(const Tensor& faces, int32_t* corners) {
  const int64_t F = faces.size(0), stride = round_up(F, kLeaf);
  const int64_t* corner = faces.const_data_ptr<int64_t>();
  std::fill_n(corners, 3 * stride, 0);
  for (int64_t f = 0; f < F; ++f)
    for (int64_t k = 0; k < 3; ++k) corners[k * stride + f] = static_cast<int32_t>(3 * corner[3 * f + k]);
}

}  // namespace reid3d
