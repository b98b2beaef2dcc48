// One product on the bf16 matrix units: what a machine is asked before its kernels use them.
#include <cstdlib>

#include "tiles.hpp"

// to (M, N) = A (M, K) B (K, N), numbers in two parts. 0, 1 where there is no memory, 2 where there are no units
extern "C" int tiles_multiply(int M, int N, int K, const float *a, const float *b, float *to) {
  if (!TILES || !tiles_permitted()) return 2;
  const size_t left = packed_size(M, K, 2), right = packed_size(N, K, 2);
  auto *memory = (uint16_t *)std::aligned_alloc(64, (left + right) * sizeof(uint16_t));
  if (!memory) return 1;
  pack_left<2>(M, K, a, K, memory);
  pack_right<2>(K, N, b, N, memory + left);
  {
    const TileConfiguration configuration;
    tile_product<Part::all, 2, 2>(M, N, K, memory, memory + left, nullptr, to, N, 1.0f);
  }
  std::free(memory);
  return 0;
}
