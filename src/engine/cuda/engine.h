// The forward pass of llama and qwen2 models on one device.
//
// Three streams: `compute` runs the layers; `copy` moves each layer's new K and V to the host's
// blocks, and sums up their checksums, while the next one computes; `load` brings a cached prefix
// in, layer by layer, ahead of compute. Steps whose chunks are single rows run as one CUDA graph
// for each bucket of rows.
#ifndef ANTIPHON_ENGINE_CUDA_ENGINE_H_
#define ANTIPHON_ENGINE_CUDA_ENGINE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/cuda/attention.h"
#include "engine/cuda/draw.h"
#include "engine/cuda/error.h"
#include "engine/cuda/few_rows.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/memory.h"
#include "engine/cuda/module.h"
#include "engine/cuda/nccl_group.h"
#include "engine/cuda/page_table.h"

namespace antiphon::engine::cuda {

// What the kernels read of a step, in one piece of pinned memory and its copy on the device.
class StepTables {
 public:
  Error Allocate(uint32_t rows, uint32_t chunks, uint32_t pages);
  // Copies all but unused pages.
  Error Upload(uint32_t pages_used, cudaStream_t stream);

  struct View {
    uint64_t* targets;          // [rows] see CopyRowsOut
    uint32_t* tokens;           // [rows]
    uint32_t* positions;        // [rows]
    int32_t* row_pages;         // [rows]
    uint32_t* output_rows;      // [chunks] or [rows]
    int32_t* query_starts;      // [chunks + 1]
    int32_t* page_starts;       // [chunks + 1]
    int32_t* last_page_tokens;  // [chunks]
    FilledPage* checksummed;    // [rows] pages whose checksums are wanted
    int32_t* pages;             // [pages]
  };
  View host;
  View device;

 private:
  View Place(std::byte* base, size_t* bytes) const;
  uint32_t rows_ = 0, chunks_ = 0;
  PinnedArray<std::byte> pinned_;
  DeviceArray<std::byte> memory_;
};

constexpr bool WantsLastRow(Output output) {
  return output == Output::kGreedy || output == Output::kDraw || output == Output::kLogits;
}

class Engine {
 public:
  static Error Create(const EngineConfig& config, const WeightSource& source,
                      void (*progress)(void*, double), void* progress_context,
                      std::unique_ptr<Engine>* out);
  ~Engine();

  Error RegisterMemory(void* memory, size_t bytes);
  void UnregisterMemory(void* memory);
  Error Submit(const ChunkView* chunks, size_t count);
  EngineProgress Poll();
  Error Take(ChunkOutput* outputs);
  Error Adopt(const ChunkView& chunk);
  uint64_t pages_total() const { return pages_->pages_total(); }
  void LimitPages(uint64_t pages);

 private:
  explicit Engine(const EngineConfig& config);

  struct Layer {
    uint16_t* qkv = nullptr;
    uint16_t* attention_output = nullptr;
    uint16_t* gate_up = nullptr;
    uint16_t* down = nullptr;
    float* attention_norm = nullptr;
    float* feed_forward_norm = nullptr;
    float* qkv_bias = nullptr;  // nullptr: none
  };
  struct Region {
    std::byte* begin = nullptr;
    size_t bytes = 0;
    uint64_t device = 0;  // the device's address of begin
  };
  // Rows [first, first + count) of a chunk.
  struct Work {
    const ChunkView* chunk = nullptr;
    uint32_t first_row = 0;
    PageTable::Placement placement;
    bool registered = true;          // all its blocks lie in registered memory
    bool by_rows = false;            // K and V leave by rows, not by blocks
    uint32_t first_checksummed = 0;  // of its pages among those whose checksums are wanted
    uint32_t best_row = 0;           // of best_host_
    size_t logits_row = 0;           // of logits_host_
  };
  struct HostSum {
    Engine* engine = nullptr;
    size_t count = 0;
  };
  struct DecodeGraph {
    GraphExec graph;
    AttentionPlan plan;
  };

  Error Init(const WeightSource& source, void (*progress)(void*, double), void* progress_context);
  Error LoadWeights(const WeightSource& source, void (*progress)(void*, double), void* context);
  Error AllocateStep();
  size_t DeviceBytes() const;  // of weights and step
  Error TuneProducts();
  Error CaptureGraphs();

  Error Enqueue();
  Error FillTables(StepTables& tables, uint32_t rows_padded);
  Error RunLayers();
  Error RunGraph();
  Error Capture(uint32_t bucket, DecodeGraph* out);
  Error RunAttentionAndFeedForward(uint32_t layer, uint32_t rows, const StepTables& tables,
                                   uint32_t chunks, const AttentionPlan& plan);
  // On the host, in the order of the compute stream.
  Error SumOnHost(float* values, size_t count);
  // x += w x, summed over the ranks.
  Error AddToResidual(const Product& product, uint32_t rows, const uint16_t* w, const uint16_t* x);
  // Few rows: one kernel of ours with the norm before and the activation behind.
  Error MultiplyFew(const Product& product, uint32_t rows, const uint16_t* w, const uint16_t* x,
                    const float* norm, void* y, FewRowsOutput output);
  bool Few(const Product& product, uint32_t rows) const { return FewRowsServes(rows, product.k); }
  Error ProjectAndAppend(uint32_t layer, uint32_t rows, const StepTables& tables);
  Error LoadPrefixes(bool by_layer);
  Error LoadLayers(uint32_t first, uint32_t end);
  Error CopyLayerOut(uint32_t layer, const StepTables& tables, uint32_t rows);
  Error CopyUnregisteredOut();
  // Layers [first, end) of one block, either way.
  Error CopyBlock(int32_t page, std::byte* block, uint32_t first, uint32_t end, bool out,
                  cudaStream_t stream);
  std::byte* PageLayer(int32_t page, uint32_t layer) const;
  // Gives outputs their places in host memory and brings the draws to the device.
  Error PlaceOutputs();
  // Of layers [first, end) of the blocks that the step writes, where they are wanted.
  Error MakeChecksums(uint32_t first, uint32_t end, const StepTables& tables, cudaStream_t stream);
  void HandOutChecksums(uint32_t first, uint32_t end);
  uint32_t BlocksWritten(const ChunkView& chunk) const;
  Error RunOutput(const StepTables& tables);
  // Draws and copies of logits for rows [first, end) of best_, whose logits lie in logits_.
  Error FinishRows(uint32_t first, uint32_t end);
  Error SendLogits(uint32_t row, uint32_t count, size_t logits_row);
  Error SendBest(uint32_t rows);
  ChunkOutput OutputOf(const Work& work) const;
  Error Copies(std::vector<void*>& to, std::vector<const void*>& from, std::vector<size_t>& sizes,
               cudaStream_t stream);
  uint64_t DeviceAddress(const std::byte* host) const;  // 0: not registered
  uint32_t DecodeBucket(uint32_t rows) const;           // 0: none
  AttentionBatch BatchOf(const StepTables& tables, uint32_t chunks) const;
  Error Fail(Error error);

  const EngineConfig config_;
  const uint32_t qkv_width_;
  const bool sliced_;               // a page holds some of a block's heads
  const size_t block_layer_bytes_;  // of the host's blocks
  const size_t page_layer_bytes_;
  const size_t page_bytes_;
  uint32_t vocab_stride_ = 0;
  bool dependent_launch_ = false;  // the device has it
  uint32_t output_rows_max_ = 0;

  Stream compute_, copy_, load_;
  std::vector<Event> computed_;  // K and V of a layer are in the device's pages
  std::vector<Event> copied_;    // ... and in the host's blocks
  std::vector<Event> loaded_;
  Event step_begun_, step_done_, forked_;

  std::vector<DeviceArray<std::byte>> weights_;
  std::vector<Layer> layers_;
  uint16_t* embedding_ = nullptr;
  uint16_t* output_ = nullptr;
  float* output_norm_ = nullptr;
  DeviceArray<float> cosines_, sines_;

  Product qkv_, attention_output_, gate_up_, down_, logits_product_;
  AttentionShape attention_;
  AttentionWorkspace workspace_;
  DeviceArray<std::byte> attention_partials_, attention_tables_;
  PinnedArray<std::byte> attention_tables_pinned_;

  DeviceArray<float> x_, logits_;
  DeviceArray<uint16_t> normed_, qkv_out_, attended_, gate_up_out_, activated_;
  DeviceArray<uint32_t> best_;
  PinnedArray<uint32_t> best_host_;
  PinnedArray<float> logits_host_;
  PinnedArray<DrawRow> draws_host_;
  DeviceArray<DrawRow> draws_;
  PinnedArray<LogitEdit> edits_host_;
  DeviceArray<LogitEdit> edits_;
  DeviceArray<float> originals_;          // the logits that edits changed
  PinnedArray<uint64_t> checksums_host_;  // [page whose checksums are wanted][layer]
  DeviceArray<std::byte> kv_;
  Pages page_layout_;
  std::unique_ptr<PageTable> pages_;
  StepTables mixed_, decode_;
  std::vector<Region> regions_;
  Gemm gemm_;
  std::unique_ptr<NcclGroup> group_;  // nullptr: this engine is alone, or the host sums
  PinnedArray<float> sum_host_;
  std::map<size_t, HostSum> sums_;  // by count, for the driver's calls
  std::atomic<bool> sum_failed_ = false;
  std::map<uint32_t, DecodeGraph> graphs_;  // by bucket; gone before the group and the streams

  // The step at hand.
  std::vector<ChunkView> chunks_;
  std::vector<Work> work_;
  uint32_t draw_count_ = 0;
  uint32_t rows_ = 0;
  uint32_t checksummed_ = 0;  // pages whose checksums are wanted
  uint32_t layers_done_ = 0;
  bool by_graph_ = false;
  bool running_ = false;
  Error broken_;  // the device is lost
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_ENGINE_H_
