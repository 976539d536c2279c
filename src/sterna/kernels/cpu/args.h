// Arguments of every kernel: plain data, so that a tape can keep them and replay the call.
//
// Legend: T tokens, R output rows, K in, N out, H query heads, G key/value heads, C head_dim.
// Pointers are to contiguous row-major memory; dtype 0 = float32, 1 = bfloat16.
#pragma once
#include <cstdint>
#include <vector>

namespace sterna {

// Counts of one step. A recorded call keeps only which count its rows follow.
struct Step {
  int32_t num_rows[2];  // [0] = T tokens, [1] = R output rows
  int32_t num_seqs;
};

// What a kernel knows of the thread that runs it: memory of its own.
struct Worker {
  char* scratch;
};
constexpr int64_t SCRATCH_BYTES = 8 << 20;

// How a cache keeps its elements: as the compute dtype, or one byte each and a scale a head.
enum CacheFormat : int32_t { CACHE_PLAIN = 0, CACHE_INT8 = 1, CACHE_E4M3 = 2 };

enum Act : int32_t {
  ACT_NONE = 0, ACT_SILU = 1, ACT_GELU_TANH = 2, ACT_RELU = 3, ACT_GELU = 4, ACT_TANH = 5
};

struct EmbedArgs {
  const int32_t* tokens;
  const void* table;
  void* out;
  int32_t rows_kind, dtype, packed, hidden, vocab;
  float scale;
};

struct NormArgs {
  const void* x;
  const void* weight;
  const void* bias;  // layer norm only
  void* out;
  int32_t rows_kind, dtype, hidden, unit_offset, is_layer_norm;
  float eps;
};

// layer_norm(table[token] + position_table[position]); a table of one row serves every position.
struct EmbedNormArgs {
  const int32_t* tokens;
  const void* table;  // [V, D]
  const int32_t* positions;
  const float* position_table;  // [P, D] or null
  const void* weight;
  const void* bias;  // [D] or null
  void* out;
  int32_t dtype, hidden, num_positions;
  float eps;
};

enum Pooling : int32_t { POOL_MEAN = 0, POOL_FIRST = 1, POOL_LAST = 2 };
struct PoolArgs {
  const void* x;  // [T, D]
  const int32_t* query_starts;
  float* out;  // [S, D]
  int32_t dtype, hidden, kind, normalize;
};

struct LinearArgs {
  const void* x;
  const void* weight;
  const void* bias;      // [N] or null
  const void* residual;  // [rows, N] or null
  void* out;             // [rows, N]; gated: [rows, N] of 2N weight rows
  int32_t rows_kind, dtype, packed, in_features, out_features;
  int32_t gate;     // Act of the gate half, ACT_NONE = plain linear
  int32_t act;      // Act of the sum with its bias
  int32_t out_f32;  // logits
  float softcap, scale;
  void* pre;  // [rows, 2N] or null: gated, the two sums themselves, which a gradient needs
};

// The gradient of act(gate) * up: [gate | up] and the upstream one to [d gate | d up].
struct GatedGradArgs {
  const void *grad, *pre;  // [rows, N], [rows, 2N]
  void* d_pre;             // [rows, 2N]
  int32_t dtype, width;    // N
  int32_t gate;            // ACT_SILU or ACT_GELU_TANH
};

// elem_bytes 4: [N, K] -> [N / 32, K, 32]; 2: [N, K] -> [N / 32, K / 2, 32, 2]. One panel a unit.
struct PackArgs {
  const void* weight;
  void* out;
  int32_t rows, cols, elem_bytes;
};

// Low-rank adapters on one weight. A part is a run of its outputs that has A and B of its own; its
// adapters lie one behind the other. A scale of 0: this adapter leaves the part alone.
struct LoraPart {
  const float* a;        // slot s: [ranks[s], in] at s * a_stride
  const float* b;        // slot s: [size, ranks[s]] at s * b_stride
  const float* scales;   // [slots]
  const int32_t* ranks;  // [slots]
  int64_t a_stride, b_stride;
  int32_t start, size;  // outputs [start, start + size)
};
struct LoraDownArgs {
  const void* x;         // [rows, in] of dtype
  const int32_t* slots;  // [rows] each row's adapter, -1 = none; null: all have the first
  float* inner;          // [rows, parts * max_rank]
  std::vector<LoraPart> parts;
  int32_t rows_kind, dtype, in_features, max_rank;
};
struct LoraUpArgs {
  const float* inner;
  const int32_t* slots;
  const float* product;  // gated: [rows, stride], gate first, up at `half`; else null
  void* y;               // [rows, out] of dtype: added to; gated: written
  std::vector<LoraPart> parts;
  int32_t rows_kind, dtype, out_features, max_rank, gate, half, stride;
};

struct ActivateArgs {
  const void* x;
  const void* y;  // add: second operand; activate: null
  void* out;
  int32_t rows_kind, dtype, hidden, kind;
};

struct SelectArgs {
  const void* x;
  const int32_t* rows;
  void* out;
  int32_t dtype, hidden;
};

struct RopeArgs {
  const void* qkv;           // [rows, row_stride], (H + 2G) * C of them used
  const int32_t* positions;  // [T]
  const int32_t* row_ids;    // [rows] the token of each row; null = every row is a token
  const float* table;  // [P, rotary_dim]: cos half, sin half; null = no rotation
  const void* q_norm;  // [C] or null
  const void* k_norm;
  void* out;             // rope: [rows, (H + 2G) * C]; rope_store: [rows, H * C]
  void* cache;           // null = plain rope
  const int64_t* slots;  // [T]
  int32_t rows_kind, dtype, num_heads, num_kv_heads, head_dim, rotary_dim, unit_offset, block_size;
  int32_t cache_format;  // CacheFormat
  int64_t row_stride;
  float eps;
};

// Keys and values of several layers: rows [n][2G * C], those of a layer side by side.
struct StoreLayer {
  const float* table;
  const void* k_norm;
  void* cache;
  int32_t rotary_dim;
};
struct StoreArgs {
  RopeArgs rows;  // no query heads; what differs by layer comes from `layers`
  std::vector<StoreLayer> layers;
};

struct AttentionArgs {
  const void* q;  // [rows, q_stride]; the query heads come first in a row
  void* cache;    // paged keys and values
  const int32_t* block_tables;
  const int32_t* query_starts;  // [S + 1] in rows; a sequence may have none
  const int32_t* context_lens;
  void* out;  // [rows, H * C]
  int32_t rows_kind, dtype, num_heads, num_kv_heads, head_dim, block_size, table_width, q_stride, window;
  int32_t cache_format;  // CacheFormat
  float scale, softcap;
};

// Bidirectional: every key of the sequence, or those at most `window` (> 0) away.
struct BidirectionalArgs {
  const void* qkv;  // [T, (H + 2G) * C]
  const int32_t* query_starts;
  void* out;  // [T, H * C]
  int32_t dtype, num_heads, num_kv_heads, head_dim, window;
  float scale;
};

// Training: gradients of the queries into their columns of d_qkv, of keys and values into partial
// sums, [2][G * parts][T][attention_grad_width], to be added over the parts.
struct AttentionGradArgs {
  const void* qkv;   // [T, (H + 2G) * C]
  const void* grad;  // [T, H * C]
  const int32_t* query_starts;
  void* d_qkv;
  float* partial;
  int32_t dtype, num_heads, num_kv_heads, head_dim, parts, window;  // parts divides H / G
  int64_t num_tokens;
  float scale, softcap;
};
inline int32_t attention_grad_width(int32_t head_dim) { return (head_dim + 31) / 32 * 32; }

struct DrawArgs {
  const float* logits;  // [rows, vocab]
  const int32_t* row_ids;  // [R]  the row of each draw; rows may repeat
  const float *temperature, *top_p, *min_p;  // [R]
  const int32_t* top_k;                      // [R]  0 = off
  const double* uniform;                     // [R]  in [0, 1)
  int32_t* ids;                              // [R]  the token; -1 for a row that is not finite
  double* logprobs;  // [R] or null: of the token, as ScoreArgs; not written where greedy or -1
  int32_t* ranks;    // [R] or null: 1 + the logits that are larger than the token's
  int32_t vocab;     // at most MAX_DRAW_VOCAB
};

// Log-probabilities under the distribution that DrawArgs draws from.
struct ScoreArgs {
  const float* logits;  // [rows, vocab]
  const int32_t *row_ids, *chosen;          // [R]
  const float *temperature, *top_p, *min_p;  // [R]; the temperature is not 0
  const int32_t* top_k;                      // [R]  0 = off
  double *logprobs, *entropies, *log_sums;  // [R]; NaN for a row that is not finite
  float* probs;  // [rows, vocab] or null; may be `logits` when no row repeats
  int32_t vocab;  // at most MAX_DRAW_VOCAB
};
constexpr int32_t MAX_DRAW_VOCAB = SCRATCH_BYTES / 16;

// The gradient of ScoreArgs' values by the logits, p = 0 beyond the survivors:
//   d x_j = (g (1[j = chosen] - p_j) - k p_j (log p_j + entropy)) / t
struct ScoreGradArgs {
  const float* logits;                       // [R, vocab]
  const int32_t* chosen;                     // [R]
  const float *temperature, *top_p, *min_p;  // [R]
  const int32_t* top_k;                      // [R]
  const float *d_logprobs, *d_entropies;     // [R]  g and k
  void* out;                                 // [R, vocab] of `dtype`
  int32_t vocab, dtype;
};

// A weight in tiles (quant/formats.py): 16 output rows x 64 k each, [R, K64, 128 * bits] bytes.
enum ScaleKind : int32_t { SCALE_F32 = 0, SCALE_F16 = 1, SCALE_E8M0 = 2 };
struct QuantWeight {
  const uint8_t* tiles;
  const void* scales;          // [R, G, 16]
  const float* table;          // [1 or 2, 2^bits]: the value of each code
  const uint8_t* row_formats;  // [R, 16] which table, or null
  int32_t bits, group, scale_kind, in_features;  // group: k a scale, 0 = one a row
};

struct QuantLinearArgs {
  const void* x;  // [rows, in] of dtype; int8: rows of QuantRowsArgs
  QuantWeight w;
  const void* bias;      // [N] or null
  const void* residual;  // [rows, N] or null
  void* out;             // [rows, N]; gated: of gate blocks, then up blocks
  int32_t rows_kind, dtype, out_features, gate, act, out_f32;
  float softcap, scale;
  float int8_unit;  // int8 mode: every value of the table is a whole number of it; else 0
};

struct QuantEmbedArgs {
  const int32_t* tokens;
  QuantWeight w;
  void* out;
  int32_t rows_kind, dtype;
  float scale;
};

// x [rows, in] -> [rows, int8_row_bytes(in)]: int8 in the tiles' byte order, zero padded; the
// running sums of its 32-element groups int32 [2 * K64 + 1]; its scale float32 (absmax / 127).
struct QuantRowsArgs {
  const void* x;
  uint8_t* out;
  int32_t rows_kind, dtype, in_features;
};
inline int64_t int8_row_bytes(int64_t in_features) {
  int64_t tiles = (in_features + 63) / 64;
  return (tiles * 64 + (2 * tiles + 2) * 4 + 63) / 64 * 64;
}

// One draft of a speculator from its pre-activations: see `draft_cell` in kernels/ops.py.
struct DraftCellArgs {
  const void* z;     // [rows, d]; lstm: [rows, 4 d], the gates f, i, o and the fresh part
  const void* cell;  // lstm: [rows, d] of the draft before, or null
  const void *norm, *norm_bias;            // [d]
  const void *cell_norm, *cell_norm_bias;  // [d]; null = mlp
  void* state;       // [rows, d]
  void* cell_out;    // lstm: [rows, d]
  int32_t rows_kind, dtype, hidden;
  float eps;
};

// The largest logit of each row: its token and softmax probability.
struct PickArgs {
  const float* logits;  // [rows, vocab]
  const int32_t* ids;   // [vocab] the token of each column, or null
  int32_t* tokens;      // [rows]
  float* probs;         // [rows]; 0 for a row that is not finite, whose token is the first
  int32_t rows_kind, vocab;
};

// A cache block holds, per key/value head, keys in panels of 16 tokens, [C / P][16][P], then
// values [block_size / P][C][P], where P = 2 for bfloat16 (pairs feed one dot instruction) and
// 1 for float32. Both are the B operand of the same micro-kernel: lanes run over keys in q.K and
// over head_dim in p.V, and the walk over the reduction axis is sequential.
//
// A quantised cache keeps the same panels with a byte an element, then float32 [block_size]: the
// scale of each token. So 16 tokens of a head are 16 * C bytes of codes wherever they lie.
inline int64_t kv_head_bytes(int32_t format, int32_t dtype, int32_t block_size, int32_t head_dim) {
  int64_t elems = int64_t(block_size) * head_dim;
  if (format != CACHE_PLAIN) return elems + block_size * int64_t(sizeof(float));
  return elems * (dtype ? 2 : 4);
}

// Byte at which a block's keys (or values) of one head begin.
template <class A>
int64_t kv_head_offset(const A& a, int64_t block, int32_t head, bool values) {
  int64_t per_head = kv_head_bytes(a.cache_format, a.dtype, a.block_size, a.head_dim);
  return ((block * 2 + values) * a.num_kv_heads + head) * per_head;
}

// A kernel is a number of units and a function that does one of them. Units are independent and
// any thread may do any of them, so no thread waits for one that the system has put aside.
template <class A>
struct Kernel {
  int (*units)(const A&, const Step&);
  void (*run)(const A&, const Step&, const Worker&, int unit);
};

// One table an instruction set.
struct KernelTable {
  const char* name;
  Kernel<EmbedArgs> embed;
  Kernel<NormArgs> norm;
  Kernel<LinearArgs> linear;
  Kernel<ActivateArgs> activate;
  Kernel<SelectArgs> select;
  Kernel<RopeArgs> rope;
  Kernel<StoreArgs> store;
  Kernel<AttentionArgs> attention;
  Kernel<AttentionGradArgs> attention_grad;
  Kernel<DrawArgs> draw;
  Kernel<ScoreArgs> score;
  Kernel<QuantLinearArgs> quant_linear;
  Kernel<QuantEmbedArgs> quant_embed;
  Kernel<QuantRowsArgs> quant_rows;
  Kernel<EmbedNormArgs> embed_norm;
  Kernel<BidirectionalArgs> bidirectional;
  Kernel<PoolArgs> pool;
  Kernel<DraftCellArgs> draft_cell;
  Kernel<PickArgs> pick;
  Kernel<LoraDownArgs> lora_down;
  Kernel<LoraUpArgs> lora_up;
  Kernel<ScoreGradArgs> score_grad;
  Kernel<GatedGradArgs> gated_grad;
  Kernel<PackArgs> pack;
};

// Packed weights: panels of PANEL output features, [N / PANEL][K / P][PANEL][P], zero padded.
constexpr int PANEL = 32;

const KernelTable* baseline_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* avx512bf16_table();
const KernelTable* avx512vnni_table();

}  // namespace sterna
