// Weights on their way in: GGUF blocks to floats.
#pragma once
#include <cstdint>

namespace sterna {

// The 32-element block types of GGUF; layouts in model/dequant.py, the oracle of this code.
enum class BlockType : int32_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8 };

struct DequantArgs {
  const uint8_t* blocks;
  void* out;  // [num_blocks * 32], float32 or bfloat16 (rounded once)
  int64_t num_blocks;
  BlockType type;
  int32_t is_bf16;
};
constexpr int64_t DEQUANT_UNIT = 4096;  // blocks a unit
void dequantize_unit(const DequantArgs& args, int unit);

}  // namespace sterna
