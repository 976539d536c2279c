#include "weights.h"

#include <cstring>

#include "args.h"

namespace sterna {
namespace {

float half_to_float(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24
    float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  uint32_t bits = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
  bits |= sign | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t round_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

struct Layout {
  int bytes, quants;  // of a block; offset of its 4- or 8-bit integers
  bool has_min, has_fifth_bit;
  float offset;
};

Layout layout_of(BlockType type) {
  switch (type) {
    case BlockType::Q4_0: return {18, 2, false, false, 8.f};
    case BlockType::Q4_1: return {20, 4, true, false, 0.f};
    case BlockType::Q5_0: return {22, 6, false, true, 16.f};
    case BlockType::Q5_1: return {24, 8, true, true, 0.f};
    default: return {34, 2, false, false, 0.f};
  }
}

// q[32] of one block, as floats.
void integers(BlockType type, const Layout& l, const uint8_t* block, float* q) {
  const uint8_t* packed = block + l.quants;
  if (type == BlockType::Q8_0) {
    for (int i = 0; i < 32; ++i) q[i] = float(int8_t(packed[i]));
    return;
  }
  uint32_t fifth = 0;
  if (l.has_fifth_bit) std::memcpy(&fifth, packed - 4, 4);
  for (int i = 0; i < 16; ++i) {
    q[i] = float((packed[i] & 15) | (fifth >> i & 1) << 4) - l.offset;
    q[i + 16] = float((packed[i] >> 4) | (fifth >> (i + 16) & 1) << 4) - l.offset;
  }
}

}  // namespace

// Built without fused multiply-add: the reference rounds the product, then the sum.
void dequantize_unit(const DequantArgs& a, int unit) {
  Layout l = layout_of(a.type);
  int64_t end = (unit + 1) * DEQUANT_UNIT;
  for (int64_t b = unit * DEQUANT_UNIT; b < end && b < a.num_blocks; ++b) {
    const uint8_t* block = a.blocks + b * l.bytes;
    float d = half_to_float(block), m = l.has_min ? half_to_float(block + 2) : 0.f, q[32];
    integers(a.type, l, block, q);
    for (int i = 0; i < 32; ++i) {
      float value = l.has_min ? q[i] * d + m : q[i] * d;
      if (a.is_bf16)
        static_cast<uint16_t*>(a.out)[b * 32 + i] = round_to_bf16(value);
      else
        static_cast<float*>(a.out)[b * 32 + i] = value;
    }
  }
}

// Both layouts move 4-byte units: a float, or a pair of bfloat16.
void pack_panel_unit(const PackArgs& a, int panel) {
  constexpr int TILE = 16;  // units of a row at a time: one cache line in, 16 lines out
  int64_t units = int64_t(a.cols) * a.elem_bytes / 4;
  const uint32_t* src = static_cast<const uint32_t*>(a.weight) + int64_t(panel) * PANEL * units;
  uint32_t* dst = static_cast<uint32_t*>(a.out) + int64_t(panel) * PANEL * units;
  int rows = a.rows - panel * PANEL < PANEL ? a.rows - panel * PANEL : PANEL;
  for (int64_t k0 = 0; k0 < units; k0 += TILE)
    for (int r = 0; r < PANEL; ++r)
      for (int64_t k = k0; k < k0 + TILE && k < units; ++k)
        dst[k * PANEL + r] = r < rows ? src[r * units + k] : 0;
}

}  // namespace sterna
