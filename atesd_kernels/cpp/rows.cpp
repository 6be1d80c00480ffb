// Loss and gradient of rows of logits, for backend "cpp". Up to some 100,000 entries both models' rows fit a cache of
// 1 MiB: they are read from memory once and written once, however many loops go over them. The mathematics is that of
// the near form in `torch_chunked`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "terms.h"

namespace {

using namespace atesd;

struct BFloat16 {
  uint16_t bits;
};

ATESD_INLINE void store(float& to, float value) { to = value; }

ATESD_INLINE void store(BFloat16& to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// [R] each, one value a row.
struct Results {
  float *value, *raw, *scale, *extreme, *c, *mean, *top, *lse, *entropy_s, *entropy_t;
  int64_t *token_s, *token_t;
};

// Sums run over blocks: a float's digits last for the sum of a block, and totals are doubles.
constexpr int64_t BLOCK = 1024;

template <class Body>
ATESD_INLINE void over_blocks(int64_t n, const Body& body) {
  for (int64_t j = 0; j < n; j += BLOCK) body(j, std::min(n, j + BLOCK));
}

// Stores `value(j)` for n entries. `to` may overlap what `value` reads: a block is read before it is written, and a
// bf16 block ends before the floats of the next one begin.
template <class Out, class Value>
ATESD_INLINE void store_row(Out* to, int64_t n, const Value& value) {
  over_blocks(n, [&](int64_t begin, int64_t end) {
    Out block[BLOCK];
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) store(block[j - begin], value(j));
    std::memcpy(to + begin, block, (end - begin) * sizeof(Out));
  });
}

// Returns the largest number, NaN if one of them is NaN.
float largest(const float* x, int64_t n, float& smallest) {
  float high = -INFINITY, low = INFINITY;
  int32_t nans = 0;
#pragma omp simd reduction(max : high) reduction(min : low) reduction(+ : nans)
  for (int64_t j = 0; j < n; ++j) {
    high = larger(high, x[j]);
    low = smaller(low, x[j]);
    nans += x[j] != x[j];
  }
  smallest = low;
  return nans > 0 ? NAN : high;
}

// s becomes exp((s - top) scale). Returns its sum; `entropy` gets the sum of it times its logarithm.
template <bool ENTROPY>
double weights(float* s, int64_t n, float top, float scale, double& entropy) {
  double total = 0, total_entropy = 0;
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float mass = 0, sum = 0;
#pragma omp simd reduction(+ : mass, sum)
    for (int64_t j = begin; j < end; ++j) {
      const float shifted = (s[j] - top) * scale, weight = exp(shifted);
      mass += weight;
      if (ENTROPY) sum += weight > 0 ? weight * shifted : 0.0f;
      s[j] = weight;
    }
    total += mass;
    total_entropy += sum;
  });
  entropy = total_entropy;
  return total;
}

double dot(const float* x, const float* y, int64_t n) {
  double total = 0;
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) sum += x[j] * y[j];
    total += sum;
  });
  return total;
}

constexpr float SMALLEST = 1.2e-38f;  // the least normal number: where q underflows, p does too

// v = log(weight) + y is log p but for a constant.
ATESD_INLINE float teacher_logit(float weight, float d, float mean, float scale) {
  const float logarithm = log(larger(weight, SMALLEST));
  return logarithm + (d - mean) * scale;
}

// Returns the teacher's entropy. `token` is the most likely one, 0 if every logit is NaN.
float teacher(const float* weight, const float* d, int64_t n, float mean, float scale, int64_t& token) {
  double total = 0, moment = 0;
  float best = -INFINITY;
  token = 0;
  int64_t from = 0;  // the block with the largest logit
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float mass = 0, sum = 0, high = -INFINITY;
#pragma omp simd reduction(+ : mass, sum) reduction(max : high)
    for (int64_t j = begin; j < end; ++j) {
      const float v = teacher_logit(weight[j], d[j], mean, scale), p = exp(v);
      mass += p;
      sum += p * v;
      high = larger(high, v);
    }
    total += mass;
    moment += sum;
    from = high > best ? begin : from;
    best = std::max(best, high);
  });
  best = -INFINITY;  // searched anew: scalar code may round differently from the vector loop
  for (int64_t j = from; j < std::min(n, from + BLOCK); ++j) {
    const float v = teacher_logit(weight[j], d[j], mean, scale);
    if (v > best) {
      best = v;
      token = j;
    }
  }
  return static_cast<float>(std::log(total) - moment / total);
}

// E - log1p(E) without cancellation, as `divergences.log1p_remainder`.
double log1p_remainder(double E) {
  const double h = E / (2 + E), s = h * h;
  if (std::abs(h) >= 0.1) return E - std::log1p(E);
  return E * h - 2 * h * s * (1 / 3. + s * (1 / 5. + s * (1 / 7. + s * (1 / 9. + s * (1 / 11. + s / 13.)))));
}

// Writes weight (centre + d) multiple to `out`, which may lie in d.
template <class Out>
void gradient(const float* weight, const float* d, Out* out, int64_t n, float centre, float multiple) {
  store_row(out, n, [&](int64_t j) { return weight[j] * (centre + d[j]) * multiple; });
}

// A KL needs no sweep of its own for its terms: they follow from sums over y. The value is, with E and L the means of e
// and l under q, log1p(E) for reverse KL and (L + E) / (1 + E) - log1p(E) for forward KL. The gradient is -q y or
// q (E - e) / (1 + E).
template <class Term, class Out>
void shifted_row(int64_t row, const float* weight, float* d, Out* out, int64_t n, double mass, float scale_d,
                 const float* factor, const Results& to) {
  const bool forward = Term::slope(0) > 0;
  const float mean = to.mean[row];
  double sum_e = 0, sum_l = 0;
  float low = 0, high = 0;
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float part_e = 0, part_l = 0, part_low = 0, part_high = 0;
#pragma omp simd reduction(+ : part_e, part_l) reduction(min : part_low) reduction(max : part_high)
    for (int64_t j = begin; j < end; ++j) {
      const float y = (d[j] - mean) * scale_d, e = expm1(y);
      const Pair term = Term::centred(y, e, 0);
      part_low = smaller(part_low, y);
      part_high = larger(part_high, y);
      part_e += weight[j] * e;
      part_l += weight[j] * term.l;
      d[j] = term.u;
    }
    sum_e += part_e;
    low = std::min(low, part_low);
    high = std::max(high, part_high);
    sum_l += part_l;
  });
  const double E = sum_e / mass, L = sum_l / mass;
  const double near = forward ? (L - E * E) / (1 + E) + log1p_remainder(E) : L - log1p_remainder(E);
  const double far = forward ? (L + E) / (1 + E) - std::log1p(E) : std::log1p(E);
  to.extreme[row] = std::max(high, -low);
  to.c[row] = static_cast<float>(std::log1p(E));
  to.value[row] = to.raw[row] = static_cast<float>(E < 0.5 ? near : far);
  to.scale[row] = forward ? static_cast<float>(1 / (1 + E)) : 1.0f;
  if (out == nullptr) return;
  const double multiple = factor == nullptr ? 1.0 : static_cast<double>(factor[row]) * to.scale[row];
  gradient(weight, d, out, n, forward ? static_cast<float>(E) : 0.0f, static_cast<float>(multiple / mass));
}

template <class Term, bool CLIPS, class Out>
void centred_row(int64_t row, const float* weight, float* d, Out* out, int64_t n, double mass, float scale_d,
                 float beta, float entry_clip, const float* factor, const Results& to) {
  const float mean = to.mean[row], share = static_cast<float>(1 / mass), k = Term::slope(beta);
  double sum_e = 0, raw = 0, value = 0, sum_u = 0;
  float low = 0, high = 0;
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float part = 0, part_low = 0, part_high = 0;
#pragma omp simd reduction(+ : part) reduction(min : part_low) reduction(max : part_high)
    for (int64_t j = begin; j < end; ++j) {
      const float y = (d[j] - mean) * scale_d;
      part_low = smaller(part_low, y);
      part_high = larger(part_high, y);
      part += weight[j] * expm1(y);
      d[j] = y;
    }
    sum_e += part;
    low = std::min(low, part_low);
    high = std::max(high, part_high);
  });
  const float c = static_cast<float>(std::log1p(sum_e / mass));
  to.extreme[row] = std::max(high, -low);
  to.c[row] = c;
  // d becomes u / q
  over_blocks(n, [&](int64_t begin, int64_t end) {
    float part_raw = 0, part_value = 0, part_u = 0;
#pragma omp simd reduction(+ : part_raw, part_value, part_u)
    for (int64_t j = begin; j < end; ++j) {
      const float x = d[j] - c, e = expm1(x);
      const Pair term = Term::centred(x, e, beta);
      float u = term.u;
      part_raw += term.l * weight[j];
      if (CLIPS) {
        const float textbook = (term.l + k * e) * weight[j] * share;  // the clip applies to this one
        const bool over = textbook > entry_clip;
        u = over ? k : u;
        part_value += over ? entry_clip : textbook;
      }
      part_u += u * weight[j];
      d[j] = u;
    }
    raw += part_raw;
    value += part_value;
    sum_u += part_u;
  });
  to.raw[row] = static_cast<float>(raw / mass);
  to.value[row] = CLIPS ? static_cast<float>(value) : to.raw[row];
  to.scale[row] = 1;
  if (out == nullptr) return;
  const double multiple = factor == nullptr ? 1.0 : factor[row];
  gradient(weight, d, out, n, static_cast<float>(-sum_u / mass), static_cast<float>(multiple / mass));
}

// s and d are the row's products; both are overwritten.
template <class Term, bool SHIFTED, bool CLIPS, class Out>
void divergence_row(int64_t row, float* s, float* d, Out* out, int64_t n, float scale_s, float scale_d, float beta,
                    float entry_clip, const float* factor, bool stats, const Results& to) {
  float lowest;
  const float top = largest(s, n, lowest);
  if (stats) to.token_s[row] = std::find(s, s + n, top) - s;
  double entropy = 0;
  const double mass = stats ? weights<true>(s, n, top, scale_s, entropy) : weights<false>(s, n, top, scale_s, entropy);
  to.mean[row] = static_cast<float>(dot(s, d, n) / mass);
  to.top[row] = top * scale_s;
  to.lse[row] = static_cast<float>(static_cast<double>(top) * scale_s + std::log(mass));
  if (stats) {
    to.entropy_s[row] = static_cast<float>(std::log(mass) - entropy / mass);
    to.entropy_t[row] = teacher(s, d, n, to.mean[row], scale_d, to.token_t[row]);
  }
  if constexpr (SHIFTED) {
    shifted_row<Term>(row, s, d, out, n, mass, scale_d, factor, to);
  } else {
    centred_row<Term, CLIPS>(row, s, d, out, n, mass, scale_d, beta, entry_clip, factor, to);
  }
  const bool finite = std::isfinite(lowest) && std::isfinite(top) && std::isfinite(mass) && std::isfinite(to.mean[row]);
  if (!finite) to.extreme[row] = NAN;  // min and max miss a NaN
}

// A row of Out lies where a row of floats would.
template <class Out>
Out* row_of(void* out, int64_t start) {
  return reinterpret_cast<Out*>(static_cast<float*>(out) + start);
}

struct Call {
  float *s, *d;
  void* out;
  int64_t rows, n, stride;
  float scale_s, scale_d, beta, entry_clip;
  const float* factor;
  bool stats;
  Results to;
};

template <class Term, bool SHIFTED, bool CLIPS, class Out>
void all_rows(const Call& call) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t start = row * call.stride;
    Out* out = call.out == nullptr ? nullptr : row_of<Out>(call.out, start);
    divergence_row<Term, SHIFTED, CLIPS>(row, call.s + start, call.d + start, out, call.n, call.scale_s, call.scale_d,
                                         call.beta, call.entry_clip, call.factor, call.stats, call.to);
  }
}

template <class Term, bool HAS_SHIFTED = false>
void run(const Call& call, bool clips, bool bf16) {
  if (clips) {
    bf16 ? all_rows<Term, false, true, BFloat16>(call) : all_rows<Term, false, true, float>(call);
  } else {
    bf16 ? all_rows<Term, HAS_SHIFTED, false, BFloat16>(call) : all_rows<Term, HAS_SHIFTED, false, float>(call);
  }
}

template <class Out>
void logprob_rows(float* z, void* out, int64_t rows, int64_t n, int64_t stride, float scale, const float* factor,
                  float* top, float* lse, float* entropy) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* s = z + row * stride;
    float lowest;
    const float high = largest(s, n, lowest);
    double sum = 0;
    double mass = weights<true>(s, n, high, scale, sum);
    if (!std::isfinite(high)) mass = NAN;  // NaN or an infinite logit; -inf alone excludes an entry
    top[row] = high * scale;
    lse[row] = static_cast<float>(static_cast<double>(high) * scale + std::log(mass));
    entropy[row] = static_cast<float>(std::log(mass) - sum / mass);
    if (out == nullptr) continue;
    const float multiple = static_cast<float>(-(factor == nullptr ? 1.0 : factor[row]) / mass);
    store_row(row_of<Out>(out, row * stride), n, [&](int64_t j) { return s[j] * multiple; });
  }
}

}  // namespace

// `term` is the position in `library.TERMS`. Returns whether there is such a term.
extern "C" bool atesd_divergence(int64_t term, bool clips, bool stats, bool bf16, float* s, float* d, void* out,
                                 int64_t rows, int64_t n, int64_t stride, float scale_s, float scale_d, float beta,
                                 float entry_clip, const float* factor, float* vectors, int64_t* tokens) {
  float* v[10];
  for (int i = 0; i < 10; ++i) v[i] = vectors + i * rows;
  const Results to{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], tokens, tokens + rows};
  const Call call{s, d, out, rows, n, stride, scale_s, scale_d, beta, entry_clip, factor, stats, to};
  switch (term) {
    case 0: run<ForwardKL, true>(call, clips, bf16); break;
    case 1: run<ReverseKL, true>(call, clips, bf16); break;
    case 2: run<Jeffreys>(call, clips, bf16); break;
    case 3: run<JSD>(call, clips, bf16); break;
    case 4: run<SkewKL>(call, clips, bf16); break;
    case 5: run<SkewReverseKL>(call, clips, bf16); break;
    case 6: run<TotalVariation>(call, clips, bf16); break;
    case 7: run<Alpha>(call, clips, bf16); break;
    default: return false;
  }
  return true;
}

// Overwrites z. `vectors`: largest logit, log-sum-exp and entropy, [R] each. `out`: the gradient of -lse times `factor`.
extern "C" void atesd_logprobs(bool bf16, float* z, void* out, int64_t rows, int64_t n, int64_t stride, float scale,
                               const float* factor, float* vectors) {
  float *top = vectors, *lse = vectors + rows, *entropy = vectors + 2 * rows;
  if (bf16) {
    logprob_rows<BFloat16>(z, out, rows, n, stride, scale, factor, top, lse, entropy);
  } else {
    logprob_rows<float>(z, out, rows, n, stride, scale, factor, top, lse, entropy);
  }
}
