// bf16 times bf16 to fp32, which torch.mm has on a GPU only. The multiplication is oneDNN's, through the function that
// libtorch exports for it; its declaration is repeated here so that no header of torch has to be compiled.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* a,
            const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

constexpr int64_t COLUMNS = 64;  // of a block: 64 to 256 are equally fast (AMD, AVX-512), fewer are slower
constexpr int64_t ROWS = 64;     // oneDNN keeps a kernel for each number of rows: few numbers, however long a chunk

// out [R, V], whose rows are `stride` apart, = h [R, K] @ w [V, K].T, both contiguous; K is even. Returns whether this
// processor can: oneDNN throws where it has no kernel.
extern "C" bool atesd_product(const void* h, const void* w, float* out, int64_t rows, int64_t vocab, int64_t k,
                              int64_t stride) {
  const int64_t pairs = k / 2, blocks = (vocab + COLUMNS - 1) / COLUMNS;
  const auto* entries = static_cast<const uint32_t*>(w);  // two bf16 numbers each
  const auto* states = static_cast<const uint16_t*>(h);
  std::atomic<bool> can{true};
#pragma omp parallel
  {
    std::vector<uint32_t> packed(pairs * COLUMNS);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * COLUMNS, n = std::min(COLUMNS, vocab - first);
      // the layout of bf16 instructions: pairs of factors beside each other, column by column
      for (int64_t j0 = 0; j0 < n; j0 += 16) {
        const int64_t j1 = std::min(n, j0 + 16);
        for (int64_t i = 0; i < pairs; ++i) {
          for (int64_t j = j0; j < j1; ++j) packed[i * n + j] = entries[(first + j) * pairs + i];
        }
      }
      try {  // an exception must not leave a thread
        for (int64_t row = 0; row < rows && can; row += ROWS) {
          at::native::cpublas::brgemm(std::min(ROWS, rows - row), n, k, k, n, stride, false,
                                      reinterpret_cast<const c10::BFloat16*>(states + row * k),
                                      reinterpret_cast<const c10::BFloat16*>(packed.data()),
                                      out + row * stride + first, true);
        }
      } catch (...) {
        can = false;
      }
    }
    if (can) at::native::cpublas::brgemm_release(true);
  }
  return can;
}
