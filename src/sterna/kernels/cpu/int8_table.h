// Weight values as whole numbers, for integer arithmetic.
#pragma once
#include <cmath>

namespace sterna {

constexpr int INT8_PLANE = 16;  // second plane: value = 16 * high + low, 0 <= low < 16

// The largest power of two that every value is a whole number of; 0 when a quotient needs more
// than two planes.
inline float int8_unit(const float* table, int count) {
  float unit = 1.f, most = 0.f;
  for (int i = 0; i < count; ++i) most = std::fabs(table[i]) > most ? std::fabs(table[i]) : most;
  for (int i = 0; i < count; ++i)
    while (unit > 0x1p-20f && table[i] / unit != std::floor(table[i] / unit)) unit *= 0.5f;
  return most / unit < 127 * INT8_PLANE ? unit : 0.f;
}

}  // namespace sterna
