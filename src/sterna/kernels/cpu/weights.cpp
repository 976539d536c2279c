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

template <class Out>
Out rounded(float f);
template <>
float rounded<float>(float f) { return f; }
template <>
uint16_t rounded<uint16_t>(float f) { return round_to_bf16(f); }

// A block has few distinct values: 16 or 32 are computed, the elements are looked up.
template <class Out>
void look_up(const Layout& l, const uint8_t* block, Out* out) {
  float d = half_to_float(block), m = l.has_min ? half_to_float(block + 2) : 0.f;
  Out table[32];
  for (int q = 0; q < (l.has_fifth_bit ? 32 : 16); ++q) {
    float product = (float(q) - l.offset) * d;
    table[q] = rounded<Out>(l.has_min ? product + m : product);
  }
  const uint8_t* packed = block + l.quants;
  uint32_t fifth = 0;
  if (l.has_fifth_bit) std::memcpy(&fifth, packed - 4, 4);
  for (int i = 0; i < 16; ++i) {
    out[i] = table[(packed[i] & 15) | (fifth >> i & 1) << 4];
    out[i + 16] = table[(packed[i] >> 4) | (fifth >> (i + 16) & 1) << 4];
  }
}

template <class Out>
void scale_bytes(const uint8_t* block, Out* out) {
  float d = half_to_float(block);
  for (int i = 0; i < 32; ++i) out[i] = rounded<Out>(float(int8_t(block[2 + i])) * d);
}

template <class Out>
void dequantize_range(const DequantArgs& a, int64_t begin, int64_t end) {
  Layout l = layout_of(a.type);
  Out* out = static_cast<Out*>(a.out);
  for (int64_t b = begin; b < end && b < a.num_blocks; ++b) {
    const uint8_t* block = a.blocks + b * l.bytes;
    a.type == BlockType::Q8_0 ? scale_bytes(block, out + b * 32) : look_up(l, block, out + b * 32);
  }
}

}  // namespace

// Built without fused multiply-add: the reference rounds the product, then the sum.
void dequantize_unit(const DequantArgs& a, int unit) {
  int64_t begin = unit * DEQUANT_UNIT, end = begin + DEQUANT_UNIT;
  a.is_bf16 ? dequantize_range<uint16_t>(a, begin, end) : dequantize_range<float>(a, begin, end);
}

}  // namespace sterna
