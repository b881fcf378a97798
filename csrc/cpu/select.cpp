// Which kernels run on this processor.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace reid3d {

namespace portable { extern const Kernels kernels; }
#ifdef REID3D_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

const Kernels& choose() {
#ifdef REID3D_X86
  const char* named = std::getenv("REID3D_ISA");
  const auto is = [named](const char* isa) { return named && std::strcmp(named, isa) == 0; };
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && !is("avx2") && !is("portable")) return avx512::kernels;
  if (v3 && !is("portable")) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

// The bits that the vectors have: 0 portable, 256 AVX2, 512 AVX-512.
int64_t vector_bits() {
  const char* isa = kernels().isa;
  return std::strcmp(isa, "avx512") == 0 ? 512 : std::strcmp(isa, "avx2") == 0 ? 256 : 0;
}

}  // namespace reid3d

STABLE_TORCH_LIBRARY_FRAGMENT(reid3d, m) { m.def("vector_bits() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(reid3d, CompositeExplicitAutograd, m) {
  m.impl("vector_bits", TORCH_BOX(&reid3d::vector_bits));
}
