// Compiled once for each set of instructions, with REID3D_ISA its name. Nothing in this file may be shared with code that
// is compiled for another: it includes nothing of torch, and every template of its own is in the namespace REID3D_ISA.
#include "kernels.h"

#include "ball_query.h"
#include "fps.h"
#include "knn.h"

#define REID3D_TEXT_(name) #name
#define REID3D_TEXT(name) REID3D_TEXT_(name)

namespace reid3d::REID3D_ISA {

template <typename T>
constexpr PointKernels<T> kPointKernels = {morton_order<T>, build<T>, knn<T>, pack<T>, knn_rows<T>, fps<T>, ball_query<T>};

extern const Kernels kernels;
const Kernels kernels = {REID3D_TEXT(REID3D_ISA), kPointKernels<float>, kPointKernels<double>};

}  // namespace reid3d::REID3D_ISA
