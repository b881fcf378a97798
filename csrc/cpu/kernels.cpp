// Compiled once for each set of instructions, with REID3D_ISA its name. No function may be shared with code that is
// compiled for another: it includes nothing of torch, every template of its own is in the namespace REID3D_ISA, and the
// few functions of other headers are inlined (.ci/run looks).
#include "kernels.h"

#include "ball_query.h"
#include "edge_pool.h"
#include "fps.h"
#include "gated_pool.h"
#include "group_max.h"
#include "knn.h"
#include "match_maps.h"
#include "match_places.h"
#include "paint.h"
#include "rasterize.h"

#define REID3D_TEXT_(name) #name
#define REID3D_TEXT(name) REID3D_TEXT_(name)

namespace reid3d::REID3D_ISA {

template <typename T>
constexpr PointKernels<T> kPointKernels = {morton_order<T>, build<T>, knn<T>,       pack<T>,
                                           knn_rows<T>,     fps<T>,   ball_query<T>};

template <typename T, typename S>
constexpr SlotKernels<T, S> kSlotKernels = {group_max<T, S>, edge_pool<T, S>, add_at_winners<T, S>};
template <typename T>
constexpr PoolKernels<T> kPoolKernels = {kSlotKernels<T, uint8_t>, kSlotKernels<T, int16_t>, add_edges<T>};

template <typename T, typename S>
constexpr GatedKernels<T, S> kGatedKernels = {gated_pool<T, S>, gated_pool_backward<T, S>};

template <typename T>
constexpr MapKernels<T> kMapKernels = {pack_rows<T>, pack_columns<T>, match_pair<Wide<T>>, add_matches<T>};

extern const Kernels kernels;
const Kernels kernels = {
    REID3D_TEXT(REID3D_ISA), paint,
    rasterize,               match_places,
    kPointKernels<float>,    kPointKernels<double>,
    kPoolKernels<float>,     kPoolKernels<double>,
    kPoolKernels<Half>,      kPoolKernels<BFloat16>,
    kGatedKernels<float, uint8_t>,  kGatedKernels<float, int16_t>,
    kGatedKernels<double, uint8_t>, kGatedKernels<double, int16_t>,
    kMapKernels<float>,      kMapKernels<double>,
    kMapKernels<Half>,       kMapKernels<BFloat16>};

}  // namespace reid3d::REID3D_ISA
