// exp, expm1, log and log1p of floats, without branches, so that a compiler can make vectors of them. Relative errors are
// below 3e-7 (tests/kernels/test_cpp.py), for exp and expm1 from -87 to 88. Below -87 exp is 0, and down to -1e5 expm1 is
// -1. Elsewhere expm1, and above 88 exp too, may be any number, inf or NaN: such rows are not near (`passes.NEAR`).
#pragma once
#include <cstdint>
#include <cstring>

// Loops over these become loops over vectors only where they are inlined.
#define ATESD_INLINE inline __attribute__((always_inline))

namespace atesd {

constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693145752f, LN2_LOW = 1.42860677e-6f, LN2 = 0.693147181f;

// std::min takes references, which no vector has.
template <class Number>
ATESD_INLINE Number smaller(Number a, Number b) { return a < b ? a : b; }
template <class Number>
ATESD_INLINE Number larger(Number a, Number b) { return a > b ? a : b; }

// Unsigned, so that differences of any two are defined.
ATESD_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// 2^n, for n in [-126, 127] or the nearest of these. Limits of integers are one instruction each, those of floats many.
ATESD_INLINE float power_of_two(int32_t n) {
  const int32_t bits = (smaller(larger(n, -126), 127) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// 1.5 2^23. Adding it rounds a float to an integer, which is then in the last bits of the sum.
constexpr float ROUNDS = 12582912.0f;

// x = n ln 2 + r: returns exp(r) - 1 for |r| <= ln(2) / 2, and 2^n.
ATESD_INLINE float reduced_expm1(float x, float& power) {
  const float sum = x * LOG2E + ROUNDS, n = sum - ROUNDS;
  const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  power = power_of_two(static_cast<int32_t>(bits_of(sum) - bits_of(ROUNDS)));
  return p * r * r + r;
}

// 0 below -87: such a probability is none.
ATESD_INLINE float exp(float x) {
  float power;
  const float e = reduced_expm1(x, power);
  return x < -87.0f ? 0.0f : e * power + power;
}

ATESD_INLINE float expm1(float x) {
  float power;
  const float e = reduced_expm1(x, power);
  return e * power + (power - 1.0f);
}

constexpr uint32_t SQRT_HALF = 0x3f3504f3;  // the bits of sqrt(1/2)

// log(2^n (1 + f)) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1.
ATESD_INLINE float log_of(float f, float n) {
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  return (p * f * square + n * LN2_LOW - 0.5f * square) + f + n * LN2_HIGH;
}

// The n of log_of for a positive normal number.
ATESD_INLINE int32_t exponent(float u) { return static_cast<int32_t>(bits_of(u) - SQRT_HALF) >> 23; }

ATESD_INLINE float log(float u) {
  const int32_t n = exponent(u);
  return log_of(u * power_of_two(-n) - 1.0f, static_cast<float>(n));
}

// log(1 + z) for z > -1. f is formed without the rounding of 1 + z: for small z it is z.
ATESD_INLINE float log1p(float z) {
  const int32_t n = exponent(1.0f + z);
  const float down = power_of_two(-n);
  return log_of(z * down + (down - 1.0f), static_cast<float>(n));
}

}  // namespace atesd
