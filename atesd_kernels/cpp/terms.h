// The divergences of `divergences.py` in their centred form, as C++ functions of one vocabulary entry.
//
// x = log p - log q and e = expm1(x). A term gives l' and u' for q = 1: both are multiples of q. `slope` is k = f'(1).
#pragma once
#include "functions.h"

namespace atesd {

struct Pair {
  float l, u;
};

struct ForwardKL {
  static float slope(float) { return 1.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float) { return {x * e + (x - e), -e}; }
};

struct ReverseKL {
  static float slope(float) { return -1.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float) { return {e - x, -x}; }
};

struct Jeffreys {
  static float slope(float) { return 0.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float) { return {x * e, -(e + x)}; }
};

struct JSD {
  static float slope(float) { return 0.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float beta) {
    const float log_m = log1p(beta * e), u = (beta - 1.0f) * log_m;
    return {(x - log_m) * beta * (e + 1.0f) + u, u};
  }
};

struct SkewKL {
  static float slope(float beta) { return 1.0f - beta; }
  static ATESD_INLINE Pair centred(float x, float e, float beta) {
    const float b_e = beta * e;
    return {(x - log1p(b_e)) * (e + 1.0f) - (1.0f - beta) * e, -(1.0f - beta) * (1.0f - beta) * e / (b_e + 1.0f)};
  }
};

struct SkewReverseKL {
  static float slope(float beta) { return -beta; }
  static ATESD_INLINE Pair centred(float, float e, float beta) {
    const float b_e = beta * e, log_m = log1p(b_e);
    return {b_e - log_m, b_e * (1.0f - beta) / (b_e + 1.0f) - log_m};
  }
};

struct TotalVariation {
  static float slope(float) { return 0.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float) {
    return {0.5f * (e < 0.0f ? -e : e), -0.5f * static_cast<float>((x > 0.0f) - (x < 0.0f))};
  }
};

struct Alpha {  // a = 1 - beta is neither 0 nor 1: those are the two KLs
  static float slope(float) { return 0.0f; }
  static ATESD_INLINE Pair centred(float x, float e, float beta) {
    const float a = 1.0f - beta, e_a = expm1(a * x);
    return {(e_a - a * e) / (a * (a - 1.0f)), -e_a / a};
  }
};

}  // namespace atesd
