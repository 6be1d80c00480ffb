// Products of bf16 matrices with fp32 results, which torch.mm has on a GPU only. The multiplication is oneDNN's, through
// the function that libtorch exports for it; its declaration is repeated here so that no header of torch has to be
// compiled. The second factor is the head. Each part of it is packed just before it is multiplied: bf16 instructions want
// pairs of factors beside each other. With vectors this is as fast as a head packed once a call (AMD, AVX-512).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* a,
            const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

constexpr int64_t COLUMNS = 64;  // of a block. When tried, 64 to 256 were equally fast (AMD, AVX-512), fewer slower
constexpr int64_t ROWS = 64;     // of a block, at most

// Returns the rows of a block. Equal blocks are faster than full ones and a small last one. Multiples of 4 are few
// numbers, for each of which oneDNN compiles a kernel.
int64_t row_block(int64_t rows) {
  const int64_t blocks = std::max<int64_t>(1, (rows + ROWS - 1) / ROWS);
  return ((rows + blocks - 1) / blocks + 3) / 4 * 4;
}

// Writes a [m, k] @ b to c [m, n], or adds it with `add`. Returns false if oneDNN has no kernel: an exception must not
// leave a thread.
bool multiply(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t stride_a, const uint32_t* b, float* c,
              int64_t stride_c, bool add) {
  try {
    at::native::cpublas::brgemm(m, n, k, stride_a, n, stride_c, add, reinterpret_cast<const c10::BFloat16*>(a),
                                reinterpret_cast<const c10::BFloat16*>(b), c, true);
    return true;
  } catch (...) {
    return false;
  }
}

#ifdef __AVX512F__
// to[i, j] = from[j, i], 16 by 16.
void transpose16(const uint32_t* from, int64_t stride_from, uint32_t* to, int64_t stride_to) {
  __m512i rows[16], pairs[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * stride_from);
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // rows[i + c]: in its lane l, column 4 l + c of rows i to i + 3
    for (int half = 0; half < 2; ++half) {
      rows[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
      rows[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i even8 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i odd8 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    _mm512_storeu_si512(to + c * stride_to, _mm512_shuffle_i32x4(even0, even8, 0x88));
    _mm512_storeu_si512(to + (4 + c) * stride_to, _mm512_shuffle_i32x4(odd0, odd8, 0x88));
    _mm512_storeu_si512(to + (8 + c) * stride_to, _mm512_shuffle_i32x4(even0, even8, 0xdd));
    _mm512_storeu_si512(to + (12 + c) * stride_to, _mm512_shuffle_i32x4(odd0, odd8, 0xdd));
  }
}
#endif

// to[i, j] = from[j, i]: from [n, m] and to [m, n], both contiguous.
void transpose(const uint32_t* from, uint32_t* to, int64_t n, int64_t m) {
  for (int64_t j = 0; j < n; j += 16) {
    for (int64_t i = 0; i < m; i += 16) {
      const int64_t last_i = std::min(m, i + 16), last_j = std::min(n, j + 16);
#ifdef __AVX512F__
      if (last_i == i + 16 && last_j == j + 16) {
        transpose16(from + j * m + i, m, to + i * n + j, n);
        continue;
      }
#endif
      for (int64_t row = i; row < last_i; ++row) {
        for (int64_t column = j; column < last_j; ++column) to[row * n + column] = from[column * m + row];
      }
    }
  }
}

void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
}

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace

// out [R, V], whose rows are `stride` apart, = h [R, K] @ w [V, K].T, both contiguous; K is even. Returns whether this
// processor can: oneDNN throws where it has no kernel.
extern "C" bool atesd_product(const void* h, const void* w, float* out, int64_t rows, int64_t vocab, int64_t k,
                              int64_t stride) {
  const int64_t pairs = k / 2, blocks = (vocab + COLUMNS - 1) / COLUMNS, row_step = row_block(rows);
  const auto* entries = static_cast<const uint32_t*>(w);  // two bf16 numbers each
  const auto* states = static_cast<const uint16_t*>(h);
  std::atomic<bool> can{true};
#pragma omp parallel
  {
    std::vector<uint32_t> packed(pairs * COLUMNS);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * COLUMNS, n = std::min(COLUMNS, vocab - first);
      transpose(entries + first * pairs, packed.data(), n, pairs);
      for (int64_t row = 0; row < rows && can; row += row_step) {
        const int64_t m = std::min(row_step, rows - row);
        float* to = out + row * stride + first;
        if (!multiply(m, n, k, states + row * k, k, packed.data(), to, stride, false)) can = false;
      }
    }
    if (can) at::native::cpublas::brgemm_release(true);
  }
  return can;
}

// acc [R, K], contiguous, += g [R, C], whose rows are `stride` apart, @ w [C, K], contiguous. `packed` is memory to work
// in, for 2 `group` rows of w. `group` is even.
extern "C" bool atesd_add_product(const void* g, const void* w, float* acc, int64_t rows, int64_t common, int64_t k,
                                  int64_t stride, uint32_t* packed, int64_t group) {
  const auto* gradient = static_cast<const uint16_t*>(g);
  const auto* head = static_cast<const uint16_t*>(w);
  const int64_t column_blocks = (k + COLUMNS - 1) / COLUMNS, row_step = row_block(rows);
  const int64_t blocks = (rows + row_step - 1) / std::max<int64_t>(1, row_step) * column_blocks;
  std::atomic<bool> can{true};
#pragma omp parallel firstprivate(packed)
  {
    uint32_t* other = packed + group / 2 * k;
    for (int64_t first = 0; first < common - 1; first += group) {
      const int64_t n = std::min(group, common - first) / 2 * 2;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n / 2; ++i) {
        const uint16_t *even = head + (first + 2 * i) * k, *odd = even + k;
        for (int64_t begin = 0; begin < k; begin += COLUMNS) {
          const int64_t width = std::min(COLUMNS, k - begin);
          interleave(even + begin, odd + begin, packed + begin * (n / 2) + i * width, width);
        }
      }
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block % column_blocks * COLUMNS, row = block / column_blocks * row_step;
        const int64_t m = std::min(row_step, rows - row), width = std::min(COLUMNS, k - begin);
        const uint16_t* from = gradient + row * stride + first;
        float* to = acc + row * k + begin;
        if (can && !multiply(m, width, n, from, stride, packed + begin * (n / 2), to, k, true)) can = false;
      }
      // Other threads may still read `packed`. They are through with it when the next group has been packed.
      std::swap(packed, other);
    }
    if (can) at::native::cpublas::brgemm_release(true);
  }
  if (common % 2 == 0) return can;
  const uint16_t* last = head + (common - 1) * k;
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = widened(gradient[row * stride + common - 1]);
    for (int64_t j = 0; j < k; ++j) acc[row * k + j] += factor * widened(last[j]);
  }
  return can;
}
