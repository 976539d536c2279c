// What the two paths for few rows share: what they ask of memory ahead of use.
#pragma once
#include "quant.h"

namespace sterna {
namespace STERNA_ISA {

// Bytes asked for before they are used. 4, 8 and 16 KB: 8 rows of 2048 x 5632 take 245, 220 and 226
// us; the hardware alone, 580: each block is a stream too short for it. Asking for the whole next
// unit in the order of memory instead: one row 84 -> 73 GB/s.
constexpr int64_t AHEAD_BYTES = 8192;

// The scales of a block: read when its sums are done, and a miss then holds up the unit.
static inline INLINE void prefetch_scales(const QuantWeight& w, int block) {
  const int64_t size = w.scale_kind == SCALE_F32 ? 4 : w.scale_kind == SCALE_F16 ? 2 : 1;
  const int64_t bytes = num_groups(w) * BLOCK * size;
  const char* scales = static_cast<const char*>(w.scales) + block * bytes;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(scales + at);
}

}  // namespace STERNA_ISA
}  // namespace sterna
