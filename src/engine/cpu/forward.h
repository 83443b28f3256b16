// One step of the model on all threads of a team.
#ifndef ANTIPHON_ENGINE_CPU_FORWARD_H_
#define ANTIPHON_ENGINE_CPU_FORWARD_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "common/kv_layout.h"
#include "engine/comm.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/look_ahead.h"
#include "engine/cpu/team.h"
#include "engine/cpu/weights.h"
#include "engine/cpu/zeroed.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"

namespace antiphon::engine::cpu {

// Owns the buffers of a step, which are made once for `rows_max` rows. Prepare belongs to the
// thread that submits; Run is called by every thread of the team; the two never overlap.
//
// With a `comm` every rank runs the same steps on its shard of the weights and the same rows: the
// residual stream is everywhere, and two products a layer, whose columns are shared out, are summed
// over the ranks. The vocabulary is shared out as well, since the output matrix is a fifth of what
// a decode step of a small model reads; rank 0 gathers the logits and draws.
class Forward {
 public:
  // `layout` is the whole model's. `timeout`: how long one rank waits for another in a step.
  Forward(const Weights* weights, const Kernels* kernels, const KvLayout& layout, uint32_t rows_max,
          int threads, Comm* comm = nullptr, absl::Duration timeout = absl::InfiniteDuration());

  // `step` is valid; its spans must stay until Run has ended.
  void Prepare(Step step);
  // `on_layer(n)` is called when K and V of layers [0, n) are written, by all ranks, and so are the
  // checksums that chunks ask for: on any thread, and by two of them perhaps at once and in the
  // wrong order. Not every n comes. With a `comm` no checksums are made.
  void Run(Team& team, int thread, const std::function<void(uint32_t)>& on_layer);
  // On thread 0, at its beginning or in Run: the step ends early, for ever.
  void Fail(absl::Status why);
  // After Run. The first error of `comm`, or Fail's.
  const absl::Status& status() const { return status_; }
  StepResult TakeResult() { return std::move(result_); }
  // Between steps.
  void ReleaseScratch();

 private:
  // So few rows every thread prepares for itself.
  static constexpr size_t kOwnRows = 4;
  // Rows of a strip: at least so many but for the last, and fewer than kAttentionRows more. Where
  // there are not so many for each thread, rows go through the layers together.
  static constexpr size_t kStripRows = 32;
  // Rows of a chunk that share an unpacked tile of the cache.
  static constexpr uint32_t kAttentionRows = 32;
  static constexpr size_t kStripRowsMax = kStripRows + kAttentionRows;
  // Where there are fewer tasks of attention than so many a thread, contexts are cut into pieces. A
  // lone row's always are: keys and values of all heads are fetched together, and a piece's must
  // not leave a core's second-level cache before its last head has seen them. (On a Zen 3, 4,000
  // tokens: 1.10 times as fast as with 192 KB.)
  static constexpr size_t kTasksOfAThread = 8;
  static constexpr size_t kPieceBytes = 48 << 10;
  // Logits of this many rows are in memory at a time.
  static constexpr size_t kOutputRows = 64;

  // What a thread multiplies before it looks whether another has taken some of its share: about a
  // microsecond of reading, but of many rows no less than some groups.
  static constexpr size_t kRunBytes = 32 << 10;
  static constexpr size_t kRunGroups = 4;
  // Memory is slow to see where a thread begins to read. So much of its next product is fetched
  // ahead of that, beside attention or while the thread waits, and so much of the cache is known
  // beforehand. Not beside products: they take all that memory gives.
  static constexpr size_t kProductAhead = 32 << 10;
  static constexpr size_t kCacheAhead = 128 << 10;
  // Lines fetched ahead each time that a waiting thread looks for the others.
  static constexpr int kLinesALook = 16;

  struct Row {
    uint32_t token;
    uint32_t position;
    uint32_t chunk;
  };
  // Rows of one chunk that attend together.
  struct AttentionTask {
    uint32_t chunk;
    uint32_t first_row;
    uint32_t rows;
    // Of a long context's pieces: whose they are and which tiles this one goes over.
    int split = -1;
    uint32_t first_tile = 0;
    uint32_t end_tile = 0;
  };
  struct HeadTask {
    const AttentionTask* task = nullptr;
    uint32_t kv_head = 0;
  };
  // A row whose context several threads go over; whoever ends the last piece merges them.
  struct Split {
    size_t partials;  // offset of kv head 0's
    size_t partials_of_head;
    int pieces;
  };
  // Rows that one thread takes through a layer, and their tasks of attention.
  struct Strip {
    size_t first_row, rows;
    size_t first_task, end_task;
    size_t shown;  // the first row from first_row on whose logits are wanted, of all rows
  };
  // A block whose checksums are wanted, and the last row of the step that writes to it.
  struct WantedSums {
    const std::byte* payload;
    uint64_t* sums;  // [layer]
    uint32_t tokens;
    size_t last_row;
  };
  // A row whose logits are wanted.
  struct OutputRow {
    uint32_t row;
    uint32_t chunk;
    bool last;  // of its chunk: the one that samples
  };
  // One matrix of a product phase and where its results go.
  struct Product {
    const Matrix* matrix;
    float* out;
    size_t out_stride;
    bool add;
    bool fine = false;  // the operand's rows are at 16 bits
  };
  struct alignas(64) CacheLine {
    std::byte bytes[64];
  };
  // The rows that a product multiplies, as floats and quantised.
  struct Operand {
    float* input;  // [row][input_stride_]
    std::byte* quant;
  };
  // How far a thread's part of a layer's tasks has been added to what it looks ahead to.
  struct CacheAhead {
    int task = 0, end = 0;                // as HeadTaskAt counts
    const AttentionTask* last = nullptr;  // the one that has been added, up to `token`
    uint32_t token = 0;
    bool product = false;  // the product behind them is still to be added
    uint32_t begun = 0;    // tasks that the thread has begun
  };
  // What one thread needs for itself.
  struct Scratch {
    AlignedVector<float> input;  // the operand of few rows
    std::vector<CacheLine> quant;
    AlignedVector<float> queries, attended, attention, dequantized, dequantized_row;
    std::vector<uint32_t> limits;
    LookAhead ahead;
    CacheAhead cache;
    Sampler sampler;
  };

  static size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }
  void Embed(Team& team);
  // Of a layer of wanted_sums_[index].
  void SumBlock(uint32_t layer, size_t index);
  // All rows through all layers, a strip at a time (forward_strips.cc).
  void RunStrips(Team& team, int thread, const std::function<void(uint32_t)>& on_layer);
  // A layer up to its keys and values.
  void FrontHalf(int thread, uint32_t layer, const Strip& strip);
  // The rest of it, of the strip's rows from `first_row` on.
  void BackHalf(int thread, uint32_t layer, const Strip& strip, size_t first_row);
  // Of the blocks whose last row is in the strip, which has been awaited.
  void SumStrip(uint32_t layer, const Strip& strip);
  // Until `strip` and those ahead of it have written keys and values of `layers` layers.
  void AwaitStrips(uint32_t layers, size_t strip);
  void MultiplyStrip(int thread, const Operand& operand, const Product& product, size_t rows);
  // In the thread's own part of the buffers.
  Operand StripOperand(int thread);
  // All rows through one layer, each phase shared out over the threads. False: failed.
  bool RunLayer(Team& team, int thread, uint32_t layer,
                const std::function<void(uint32_t)>& on_layer);
  void Output(Team& team, int thread);

  // Few rows are prepared by every thread for itself: one would wait for the other longer than for
  // its own work.
  Operand OperandOf(int thread, size_t rows);
  // body(row) for rows [0, rows): shared out, with a barrier behind it, or of few rows all on every
  // thread.
  template <typename Body>
  void ForRows(Team& team, size_t rows, Body body) {
    if (rows <= kOwnRows) {
      for (size_t row = 0; row < rows; ++row) body(row);
      return;
    }
    team.ForEach(static_cast<int>(rows), 4, [&](int begin, int end) {
      for (int row = begin; row < end; ++row) body(static_cast<size_t>(row));
    });
  }
  // The operand = RmsNorm(x), and its quantised tiles.
  void Normalise(Team& team, const Operand& operand, const float* x,
                 const std::vector<float>& weight, size_t rows);
  // The same of one row, and of what SwiGLU makes of its gate and up.
  void NormaliseRow(const Operand& operand, const float* x, const std::vector<float>& weight,
                    size_t row, size_t rows);
  void ActivateRow(const Operand& operand, const float* gate, size_t row, size_t rows);
  // Row `row` of a phase's `rows`.
  void Quantise(const float* input, const Operand& operand, size_t row, size_t rows,
                size_t columns);
  // The output product is of activations at 16 bits when the output matrix is quantised. Of all
  // products it is where rounding them costs most, and a prompt pays for it once.
  bool FineOutput() const;
  void Multiply(Team& team, int thread, const Operand& operand, size_t rows,
                std::initializer_list<Product> products);
  // What the thread is to read next joins what it looks ahead to: the beginning of its share of a
  // product of these matrices.
  void ExpectProduct(int thread, std::initializer_list<const Matrix*> matrices);
  // Then ExpectCache adds a layer's keys and values that the thread attends to first, as much at a
  // time as may be, and when all has been added the product behind them.
  void BeginCache(int thread);
  void ExpectCache(int thread, uint32_t layer);
  // Rows and groups of a product; its `out` is where the first of them go.
  void MultiplyGroups(int thread, const Operand& operand, const Product& product, size_t first_row,
                      size_t rows, int group, int groups);
  static size_t RunGroups(const Matrix& packed);
  // x += W * operand, over all ranks' columns of W. False: failed.
  bool AddProduct(Team& team, int thread, const Operand& operand, const Matrix& matrix, float* x,
                  size_t rows);
  // logits_ of rank 0 = the shards of all ranks, `rows` of them. False: failed.
  bool GatherLogits(Team& team, int thread, size_t rows);
  // Turns the queries of a row's heads and stores its keys and values, of all kv heads.
  void WriteCache(uint32_t layer, size_t row);
  void RotateQueries(uint32_t layer, size_t row, uint32_t first_head, uint32_t heads, float* q);
  void StoreHeads(uint32_t layer, size_t row, uint32_t first_head, uint32_t heads);
  void PlanAttention();
  void PlanSums(const SequenceChunk& chunk, size_t first_row);
  void PlanStrips();
  int HeadTasks() const;
  // Late rows see the most: they go first, so that the last tasks are short.
  HeadTask HeadTaskAt(int index) const;
  // Into `attended`: [row of the task][input_stride_]. `next`: what this thread most likely attends
  // to next; its task may be null.
  void AttendTask(int thread, uint32_t layer, const HeadTask& at, const HeadTask& next,
                  float* attended);
  void Sample(int thread, size_t first, size_t index);

  const Weights* weights_;
  const Kernels* kernels_;
  const KvLayout layout_;
  const int threads_;
  Comm* const comm_;
  const absl::Duration timeout_;
  size_t hidden_stride_, input_stride_, qkv_stride_, k_column_, v_column_, gate_stride_,
      vocab_stride_, padded_dim_;
  size_t shard_stride_ = 0;  // floats of the largest share of the vocabulary
  bool any_quantised_ = false;
  bool any_raw_ = false;  // a matrix that is dequantised when used

  Zeroed<float> x_;                // [row][hidden_stride_]: the residual stream
  Zeroed<float> input_;            // [row][input_stride_]: of the next product, of attention
  Zeroed<CacheLine> quant_;        // the same, quantised
  Zeroed<float> qkv_;              // [row][qkv_stride_]
  Zeroed<float> gate_up_;          // [row][2 * gate_stride_]
  Zeroed<float> cos_, sin_;        // [row][pairs]
  Zeroed<float> logits_;           // [output row of a batch][vocab_stride_]
  Zeroed<float> partial_;          // [row][hidden_stride_]: this rank's part of a sum
  Zeroed<float> shard_logits_;     // [output row][shard_stride_]
  Zeroed<float> gathered_logits_;  // [rank][output row][shard_stride_]
  std::vector<Scratch> scratch_;

  Step step_;
  StepResult result_;
  std::vector<Row> rows_;
  std::vector<AttentionTask> attention_tasks_;
  std::vector<Split> splits_;
  AlignedVector<float> partials_;              // of all splits; grows with the longest context seen
  std::vector<std::atomic<int>> pieces_left_;  // of each split and kv head
  const uint32_t piece_tiles_;                 // of a piece, at most
  std::vector<Strip> strips_;                  // empty: the rows go through the layers together
  std::vector<std::atomic<uint32_t>> written_;    // layers whose K and V a strip has written
  std::vector<std::atomic<uint32_t>> unwritten_;  // strips that have yet to sum up a layer's
  std::vector<OutputRow> output_rows_;
  std::vector<WantedSums> wanted_sums_;  // in the order of their rows
  bool writes_apart_ = true;  // rows write to the cache before any attends, not each as it attends
  absl::Status status_;
  std::atomic<bool> failed_{false};  // written before a barrier, read behind it
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_FORWARD_H_
