// The face of libantiphon_cuda.so: one entry that returns a table of functions over plain types.
//
// The module holds everything that needs CUDA and is loaded with dlopen by whoever wants a GPU, so
// that no other binary depends on cudart, cuBLAS or NCCL. Nothing is thrown across this face, and
// memory is freed by the side that allocated it. Both sides come from one build: the number in the
// entry's name and `abi` guard against a module that was left behind by another version.
#ifndef ANTIPHON_ENGINE_CUDA_MODULE_H_
#define ANTIPHON_ENGINE_CUDA_MODULE_H_

#include <cstddef>
#include <cstdint>

namespace antiphon::engine::cuda {

inline constexpr uint32_t kModuleAbi = 2;
inline constexpr char kModuleEntry[] = "antiphon_cuda_module_v2";

// `code` has the numbers of absl::StatusCode; 0 is success.
struct ModuleError {
  int32_t code = 0;
  char message[508] = {};
};

struct DeviceDescription {
  char name[128] = {};
  int32_t compute_major = 0;
  int32_t compute_minor = 0;
  int32_t multiprocessors = 0;
  uint64_t memory_bytes = 0;
  uint64_t memory_free_bytes = 0;
};

// Matrices are [rows][columns] of bf16, row-major; the others are vectors of float.
enum class Weight : uint32_t {
  kEmbedding,        // [vocab][hidden]
  kOutput,           // [vocab][hidden]; not asked for when tied
  kQkv,              // [(heads + 2 kv_heads) head_dim][hidden]; rotary pairs as halves
  kAttentionOutput,  // [hidden][heads head_dim]
  kGateUp,           // [2 feed_forward][hidden]
  kDown,             // [hidden][feed_forward]
  kAttentionNorm,    // [hidden]
  kFeedForwardNorm,  // [hidden]
  kOutputNorm,       // [hidden]
  kQkvBias,          // [(heads + 2 kv_heads) head_dim]
  kRopeFrequencies,  // [rope_dims / 2], radians a token
};

// Where weights come from. Returns 0, or a code of absl::StatusCode.
struct WeightSource {
  void* context = nullptr;
  int (*matrix)(void* context, Weight weight, uint32_t layer, uint64_t first_row, uint64_t rows,
                uint16_t* bf16) = nullptr;
  int (*vector)(void* context, Weight weight, uint32_t layer, float* out) = nullptr;
};

// Opaque: NCCL's unique id.
struct GroupId {
  char bytes[128] = {};
};

struct EngineConfig {
  int32_t device = 0;
  uint32_t layers = 0;
  uint32_t hidden = 0;
  uint32_t feed_forward = 0;
  uint32_t heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t vocab = 0;
  uint32_t context = 0;    // tokens
  uint32_t rope_dims = 0;  // of a head
  float rms_eps = 0;
  bool tied_output = false;
  bool qkv_bias = false;
  // The block in host memory (common/kv_layout.h): [layer][K|V][token][kv_head][head_dim] of bf16,
  // layers `layer_bytes` apart. A device page has the same bytes.
  uint32_t block_tokens = 0;
  uint64_t layer_bytes = 0;
  uint32_t step_tokens_max = 0;
  uint32_t rows_max = 0;  // single rows that run as one graph
  uint64_t memory_bytes =
      0;  // that the engine may take of the device's; 0: nine tenths of the free
  // Tensor parallelism: heads, kv_heads and feed_forward are this rank's share, and so are the
  // weights; sums of layers are taken over all ranks. Rank 0 alone has an output. 0: none. 1 goes
  // through NCCL as well, alone.
  uint32_t ranks = 0;
  uint32_t rank = 0;
  // The blocks hold K and V of all ranks: so many kv heads, this rank's from the given one on. 0:
  // the engine's own alone.
  uint32_t block_kv_heads = 0;
  uint32_t first_kv_head = 0;
  // Who sums: NCCL, whose ranks have a device each, or without `sum` being nullptr the host, for
  // ranks that share one. values[i] = the sum of all ranks' values[i]; called by a thread of the
  // driver, which must not use CUDA, in the order of the stream. Not 0: the group broke.
  GroupId group;
  int (*sum)(void* context, float* values, size_t count) = nullptr;
  void* sum_context = nullptr;
  bool copy_out = true;  // off in the benchmark that measures what copying costs
};

enum class Output : uint8_t { kNone, kGreedy, kDraw, kLogits, kAllLogits };

// What a request does to one token's logit.
struct LogitEdit {
  uint32_t id = 0;
  float bias = 0;
  float penalty = 0;     // presence and frequency, to be subtracted
  uint32_t emitted = 0;  // so often
  bool masked = false;
  bool repeated = false;  // the repetition penalty applies
};

// How a token is drawn: engine::SamplingParams with what can be worked out ahead worked out. One
// edit a token at most.
struct Draw {
  const LogitEdit* edits = nullptr;
  uint32_t edit_count = 0;
  float repetition_penalty = 1;
  float inverse_temperature = 0;  // 0: greedy
  uint32_t top_k = 0;             // 0: off
  float top_p = 1;
  float least = -__builtin_inff();  // the logarithm of min_p
  double u = 0;                     // uniform in [0, 1)
};

// Consecutive tokens of one sequence, as engine::SequenceChunk has them.
struct ChunkView {
  // For the engine's life a handle names one sequence: what a block holds below `start` does not
  // change while the handle and the blocks' addresses stay the same.
  uint64_t sequence = 0;
  const uint32_t* tokens = nullptr;
  uint32_t token_count = 0;
  uint32_t start = 0;
  std::byte* const* blocks = nullptr;  // of [0, start + token_count)
  Output output = Output::kNone;
  const Draw* draw = nullptr;  // with kDraw; read by Submit only
  // nullptr: none. Else room for the checksums of the blocks that the chunk writes, [block][layer]
  // as engine::SequenceChunk has them; `poll` writes those of the layers that it says are done.
  uint64_t* checksums = nullptr;
};

// After a step: the token of each chunk with kGreedy and kDraw; logits[row][vocab] of those with
// kLogits (one row) and kAllLogits (token_count rows), and of those with kDraw (one row) that the
// device left undecided. Valid until the next Submit.
struct ChunkOutput {
  uint32_t token = 0;
  const float* logits = nullptr;
};

struct EngineProgress {
  uint32_t layers_done = 0;
  bool finished = false;
};

class Engine;

struct Module {
  uint32_t abi = 0;
  // FAILED_PRECONDITION when there is no driver or one that is too old; then the count is 0.
  int32_t (*device_count)(ModuleError* error) = nullptr;
  void (*describe_device)(int32_t device, DeviceDescription* out, ModuleError* error) = nullptr;
  // nullptr and an error, or an engine with its weights loaded. `progress` may be nullptr.
  Engine* (*create)(const EngineConfig& config, const WeightSource& source,
                    void (*progress)(void* context, double done), void* progress_context,
                    ModuleError* error) = nullptr;
  void (*destroy)(Engine* engine) = nullptr;
  // Pins host memory that blocks lie in, so that the device copies to and from it on its own.
  void (*register_memory)(Engine* engine, void* memory, size_t bytes, ModuleError* error) = nullptr;
  void (*unregister_memory)(Engine* engine, void* memory) = nullptr;
  void (*submit)(Engine* engine, const ChunkView* chunks, size_t count,
                 ModuleError* error) = nullptr;
  // Never blocks. An error of the device ends the step: finished, and `take` tells of it.
  EngineProgress (*poll)(Engine* engine) = nullptr;
  void (*take)(Engine* engine, ChunkOutput* outputs, ModuleError* error) = nullptr;
  void (*make_group_id)(GroupId* out, ModuleError* error) = nullptr;
  uint64_t (*pages_total)(const Engine* engine) = nullptr;
  // Before the first step: ranks of a group use equally many.
  void (*limit_pages)(Engine* engine, uint64_t pages) = nullptr;
  // For benchmarks: the sequence's first `tokens` tokens count as computed, with random K and V.
  void (*adopt)(Engine* engine, const ChunkView* chunk, ModuleError* error) = nullptr;
};

using ModuleEntry = const Module* (*)();

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_MODULE_H_
