#include "engine/cuda/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kRowCopyTokens = 2;  // longer chunks leave by blocks

}  // namespace

// ---- A step

Error Engine::Fail(Error error) {
  if (error.code == kUnavailable) broken_ = error;
  pages_->AbandonStep();
  return error;
}

Error Engine::Submit(const ChunkView* chunks, size_t count) {
  if (broken_) return broken_;
  CUDA_RETURN_IF_ERROR(cudaSetDevice(config_.device));
  uint64_t tokens = 0;
  for (size_t i = 0; i < count; ++i) tokens += chunks[i].token_count;
  if (count == 0 || tokens < count || tokens > config_.step_tokens_max) {
    return {kInvalidArgument, "the step has " + std::to_string(tokens) + " tokens in " +
                                  std::to_string(count) + " chunks, at most " +
                                  std::to_string(config_.step_tokens_max) + " fit"};
  }
  chunks_.assign(chunks, chunks + count);
  work_.clear();
  rows_ = 0;
  checksummed_ = 0;
  layers_done_ = 0;
  by_graph_ = DecodeBucket(static_cast<uint32_t>(count)) != 0;
  pages_->BeginStep();
  for (ChunkView& chunk : chunks_) {
    Work work{.chunk = &chunk, .first_row = rows_};
    const uint32_t end = chunk.start + chunk.token_count;
    if (!pages_->Place(chunk.sequence, chunk.blocks, chunk.start, end, &work.placement)) {
      return Fail({kResourceExhausted, "device memory: the step's contexts need more than the " +
                                           std::to_string(pages_->pages_total()) +
                                           " KV pages that there are"});
    }
    const uint32_t blocks = (end + config_.block_tokens - 1) / config_.block_tokens;
    for (uint32_t b = std::min(work.placement.load_begin, chunk.start / config_.block_tokens);
         b < blocks; ++b) {
      work.registered = work.registered && DeviceAddress(chunk.blocks[b]) != 0;
    }
    work.by_rows = sliced_ || chunk.token_count <= kRowCopyTokens;
    by_graph_ = by_graph_ && chunk.token_count == 1 && chunk.output != Output::kAllLogits;
    if (config_.rank != 0) chunk.output = Output::kNone;
    rows_ += chunk.token_count;
    work.first_checksummed = checksummed_;
    if (chunk.checksums != nullptr) checksummed_ += BlocksWritten(chunk);
    work_.push_back(work);
  }
  if (Error error = Enqueue()) {
    // What was started still uses the step's memory.
    if (cudaDeviceSynchronize() != cudaSuccess && error.code != kUnavailable) {
      error = FromCuda(cudaErrorLaunchFailure, "Submit(");
    }
    return Fail(std::move(error));
  }
  running_ = true;
  return {};
}

Error Engine::Enqueue() {
  CUDA_RETURN_IF_ERROR(cudaEventRecord(step_begun_.get(), compute_.get()));
  CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(load_.get(), step_begun_.get(), 0));
  MODULE_RETURN_IF_ERROR(PlaceOutputs());
  if (by_graph_) {
    MODULE_RETURN_IF_ERROR(RunGraph());
  } else {
    MODULE_RETURN_IF_ERROR(RunLayers());
  }
  MODULE_RETURN_IF_ERROR(CopyUnregisteredOut());
  CUDA_RETURN_IF_ERROR(cudaEventRecord(step_done_.get(), compute_.get()));
  return {};
}

Error Engine::FillTables(StepTables& tables, uint32_t rows_padded) {
  StepTables::View& host = tables.host;
  const uint32_t block_tokens = config_.block_tokens;
  uint32_t page = 0, row = 0, output = 0;
  for (size_t c = 0; c < work_.size(); ++c) {
    const Work& work = work_[c];
    const ChunkView& chunk = *work.chunk;
    const uint32_t end = chunk.start + chunk.token_count;
    host.query_starts[c] = static_cast<int32_t>(row);
    host.page_starts[c] = static_cast<int32_t>(page);
    host.last_page_tokens[c] = static_cast<int32_t>((end - 1) % block_tokens + 1);
    const uint32_t blocks = (end - 1) / block_tokens + 1;
    std::memcpy(host.pages + page, work.placement.pages, blocks * sizeof(int32_t));
    page += blocks;
    for (uint32_t i = 0; i < chunk.token_count; ++i, ++row) {
      const uint32_t position = chunk.start + i;
      const uint32_t block = position / block_tokens;
      host.tokens[row] = chunk.tokens[i];
      host.positions[row] = position;
      host.row_pages[row] = work.placement.pages[block];
      host.targets[row] = work.by_rows && work.registered && config_.copy_out
                              ? DeviceAddress(chunk.blocks[block])
                              : 0;
    }
    if (WantsLastRow(chunk.output)) host.output_rows[output++] = row - 1;
    for (uint32_t i = 0; i < BlocksWritten(chunk) && chunk.checksums != nullptr; ++i) {
      const uint32_t block = chunk.start / block_tokens + i;
      host.checksummed[work.first_checksummed + i] = {
          .page = work.placement.pages[block],
          .tokens = std::min(block_tokens, end - block * block_tokens)};
    }
  }
  size_t chunk = work_.size();
  // Rows that fill the bucket live in page 0, which belongs to nobody.
  for (; row < rows_padded; ++row, ++chunk) {
    host.query_starts[chunk] = static_cast<int32_t>(row);
    host.page_starts[chunk] = static_cast<int32_t>(page);
    host.last_page_tokens[chunk] = 1;
    host.pages[page++] = 0;
    host.tokens[row] = 0;
    host.positions[row] = 0;
    host.row_pages[row] = 0;
    host.targets[row] = 0;
  }
  host.query_starts[chunk] = static_cast<int32_t>(row);
  host.page_starts[chunk] = static_cast<int32_t>(page);
  return tables.Upload(page, compute_.get());
}

Error Engine::MultiplyFew(const Product& product, uint32_t rows, const uint16_t* w,
                          const uint16_t* x, const float* norm, void* y, FewRowsOutput output) {
  const FewRowsProduct few = {
      .w = w,
      .n = product.n,
      .k = product.k,
      .x = x,
      .residual = x_.data(),
      .norm = norm,
      .eps = config_.rms_eps,
      .y = y,
      .y_stride = output == FewRowsOutput::kSilu ? product.n / 2 : product.y_stride,
      .output = output};
  CUDA_RETURN_IF_ERROR(MultiplyFewRows(few, rows, dependent_launch_, compute_.get()));
  return {};
}

Error Engine::ProjectAndAppend(uint32_t layer, uint32_t rows, const StepTables& tables) {
  const Layer& l = layers_[layer];
  const bool few = Few(qkv_, rows);
  if (few) {
    MODULE_RETURN_IF_ERROR(MultiplyFew(qkv_, rows, l.qkv, nullptr, l.attention_norm,
                                       qkv_out_.data(), FewRowsOutput::kBf16));
  } else {
    CUDA_RETURN_IF_ERROR(RmsNorm(x_.data(), l.attention_norm, nullptr, rows, config_.hidden,
                                 config_.rms_eps, normed_.data(), compute_.get()));
    MODULE_RETURN_IF_ERROR(gemm_.Run(qkv_, rows, l.qkv, normed_.data(), qkv_out_.data()));
  }
  const RopeAppend rope = {.qkv = qkv_out_.data(),
                           .bias = l.qkv_bias,
                           .cosines = cosines_.data(),
                           .sines = sines_.data(),
                           .positions = tables.device.positions,
                           .pages = tables.device.row_pages,
                           .rows = rows,
                           .heads = config_.heads,
                           .rope_dims = config_.rope_dims,
                           .layer = layer};
  CUDA_RETURN_IF_ERROR(RopeAndAppend(rope, page_layout_, few && dependent_launch_, compute_.get()));
  return {};
}

Error Engine::RunAttentionAndFeedForward(uint32_t layer, uint32_t rows, const StepTables& tables,
                                         uint32_t chunks, const AttentionPlan& plan) {
  const Layer& l = layers_[layer];
  auto* keys = reinterpret_cast<uint16_t*>(PageLayer(0, layer));
  uint16_t* values = keys + size_t{config_.block_tokens} * config_.kv_heads * config_.head_dim;
  AttentionShape shape = attention_;
  shape.dependent = dependent_launch_ && Few(qkv_, rows);
  MODULE_RETURN_IF_ERROR(Attend(shape, workspace_, plan, BatchOf(tables, chunks), qkv_out_.data(),
                                keys, values, attended_.data(), compute_.get()));
  MODULE_RETURN_IF_ERROR(
      AddToResidual(attention_output_, rows, l.attention_output, attended_.data()));
  if (Few(gate_up_, rows)) {
    MODULE_RETURN_IF_ERROR(MultiplyFew(gate_up_, rows, l.gate_up, nullptr, l.feed_forward_norm,
                                       activated_.data(), FewRowsOutput::kSilu));
  } else {
    CUDA_RETURN_IF_ERROR(RmsNorm(x_.data(), l.feed_forward_norm, nullptr, rows, config_.hidden,
                                 config_.rms_eps, normed_.data(), compute_.get()));
    MODULE_RETURN_IF_ERROR(
        gemm_.Run(gate_up_, rows, l.gate_up, normed_.data(), gate_up_out_.data()));
    CUDA_RETURN_IF_ERROR(SiluMultiply(gate_up_out_.data(), rows, config_.feed_forward,
                                      activated_.data(), compute_.get()));
  }
  return AddToResidual(down_, rows, l.down, activated_.data());
}

Error Engine::AddToResidual(const Product& product, uint32_t rows, const uint16_t* w,
                            const uint16_t* x) {
  // Of all ranks one brings the residual into the sum.
  Product own = product;
  own.accumulate = config_.rank == 0;
  if (Few(own, rows)) {
    MODULE_RETURN_IF_ERROR(
        MultiplyFew(own, rows, w, x, nullptr, x_.data(),
                    own.accumulate ? FewRowsOutput::kAddFloat : FewRowsOutput::kFloat));
  } else {
    MODULE_RETURN_IF_ERROR(gemm_.Run(own, rows, w, x, x_.data()));
  }
  const size_t count = size_t{rows} * config_.hidden;
  if (config_.sum != nullptr) return SumOnHost(x_.data(), count);
  if (group_ == nullptr) return {};
  return group_->AllReduceSum(x_.data(), count, compute_.get());
}

Error Engine::SumOnHost(float* values, size_t count) {
  HostSum& sum = sums_.try_emplace(count, HostSum{this, count}).first->second;
  CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(sum_host_.data(), values, count * sizeof(float),
                                       cudaMemcpyDeviceToHost, compute_.get()));
  CUDA_RETURN_IF_ERROR(cudaLaunchHostFunc(
      compute_.get(),
      [](void* context) {
        const auto& s = *static_cast<HostSum*>(context);
        Engine& e = *s.engine;
        if (e.sum_failed_) return;
        if (e.config_.sum(e.config_.sum_context, e.sum_host_.data(), s.count) != 0) {
          e.sum_failed_ = true;
        }
      },
      &sum));
  CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(values, sum_host_.data(), count * sizeof(float),
                                       cudaMemcpyHostToDevice, compute_.get()));
  return {};
}

Error Engine::RunLayers() {
  const auto chunks = static_cast<uint32_t>(work_.size());
  MODULE_RETURN_IF_ERROR(FillTables(mixed_, rows_));
  AttentionPlan plan;
  MODULE_RETURN_IF_ERROR(PlanAttention(attention_, workspace_, mixed_.host.query_starts,
                                       mixed_.host.page_starts, chunks, /*graph=*/false,
                                       compute_.get(), &plan));
  MODULE_RETURN_IF_ERROR(LoadPrefixes(/*by_layer=*/true));
  CUDA_RETURN_IF_ERROR(
      Embed(embedding_, mixed_.device.tokens, rows_, config_.hidden, x_.data(), compute_.get()));
  for (uint32_t layer = 0; layer < config_.layers; ++layer) {
    CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(compute_.get(), loaded_[layer].get(), 0));
    MODULE_RETURN_IF_ERROR(ProjectAndAppend(layer, rows_, mixed_));
    MODULE_RETURN_IF_ERROR(CopyLayerOut(layer, mixed_, rows_));
    MODULE_RETURN_IF_ERROR(RunAttentionAndFeedForward(layer, rows_, mixed_, chunks, plan));
  }
  MODULE_RETURN_IF_ERROR(RunOutput(mixed_));
  CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(compute_.get(), copied_[config_.layers - 1].get(), 0));
  return {};
}

// ---- Steps of single rows

Error Engine::CaptureGraphs() {
  // The plan's tables are read by the captured kernels; their contents come with every step.
  for (uint32_t rows = 1; rows <= RowBucket(config_.rows_max); rows = RowBucket(rows + 1)) {
    MODULE_RETURN_IF_ERROR(Capture(rows, &graphs_[rows]));
  }
  return {};
}

Error Engine::Capture(uint32_t bucket, DecodeGraph* out) {
  StepTables::View& host = decode_.host;
  for (uint32_t i = 0; i < bucket; ++i) {
    host.query_starts[i] = host.page_starts[i] = static_cast<int32_t>(i);
    host.last_page_tokens[i] = 1;
    host.pages[i] = 0;
    host.tokens[i] = host.positions[i] = 0;
    host.row_pages[i] = 0;
    host.targets[i] = 0;
  }
  host.query_starts[bucket] = host.page_starts[bucket] = static_cast<int32_t>(bucket);
  MODULE_RETURN_IF_ERROR(decode_.Upload(bucket, compute_.get()));
  MODULE_RETURN_IF_ERROR(PlanAttention(attention_, workspace_, host.query_starts, host.page_starts,
                                       bucket, /*graph=*/true, compute_.get(), &out->plan));
  // Once without capture: the libraries load their kernels.
  const auto run = [&]() -> Error {
    CUDA_RETURN_IF_ERROR(Embed(embedding_, decode_.device.tokens, bucket, config_.hidden, x_.data(),
                               compute_.get()));
    for (uint32_t layer = 0; layer < config_.layers; ++layer) {
      MODULE_RETURN_IF_ERROR(ProjectAndAppend(layer, bucket, decode_));
      if (config_.copy_out) {
        CUDA_RETURN_IF_ERROR(cudaEventRecord(forked_.get(), compute_.get()));
        CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(copy_.get(), forked_.get(), 0));
        CUDA_RETURN_IF_ERROR(CopyRowsOut(page_layout_, decode_.device.positions,
                                         decode_.device.row_pages, decode_.device.targets, bucket,
                                         layer, layer + 1, copy_.get()));
      }
      MODULE_RETURN_IF_ERROR(RunAttentionAndFeedForward(layer, bucket, decode_, bucket, out->plan));
    }
    if (config_.rank != 0) {
      // Rank 0 has the output.
    } else if (Few(logits_product_, bucket)) {
      MODULE_RETURN_IF_ERROR(MultiplyFew(logits_product_, bucket, output_, nullptr, output_norm_,
                                         logits_.data(), FewRowsOutput::kFloat));
    } else {
      CUDA_RETURN_IF_ERROR(RmsNorm(x_.data(), output_norm_, nullptr, bucket, config_.hidden,
                                   config_.rms_eps, normed_.data(), compute_.get()));
      MODULE_RETURN_IF_ERROR(
          gemm_.Run(logits_product_, bucket, output_, normed_.data(), logits_.data()));
    }
    if (config_.rank == 0) {
      CUDA_RETURN_IF_ERROR(Argmax(logits_.data(), bucket, config_.vocab, vocab_stride_,
                                  best_.data(), compute_.get()));
    }
    if (config_.copy_out) {
      CUDA_RETURN_IF_ERROR(cudaEventRecord(forked_.get(), copy_.get()));
      CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(compute_.get(), forked_.get(), 0));
    }
    return {};
  };
  MODULE_RETURN_IF_ERROR(run());
  CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(compute_.get()));
  CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(compute_.get(), cudaStreamCaptureModeThreadLocal));
  Error error = run();
  Graph graph;
  const cudaError_t ended = cudaStreamEndCapture(compute_.get(), graph.address());
  if (error) return error;
  CUDA_RETURN_IF_ERROR(ended);
  CUDA_RETURN_IF_ERROR(cudaGraphInstantiate(out->graph.address(), graph.get(), 0));
  CUDA_RETURN_IF_ERROR(cudaGraphUpload(out->graph.get(), compute_.get()));
  return {};
}

Error Engine::RunGraph() {
  const uint32_t bucket = DecodeBucket(rows_);
  DecodeGraph& graph = graphs_.at(bucket);
  MODULE_RETURN_IF_ERROR(LoadPrefixes(/*by_layer=*/false));
  MODULE_RETURN_IF_ERROR(FillTables(decode_, bucket));
  AttentionPlan plan;
  MODULE_RETURN_IF_ERROR(PlanAttention(attention_, workspace_, decode_.host.query_starts,
                                       decode_.host.page_starts, bucket, /*graph=*/true,
                                       compute_.get(), &plan));
  if (!(plan == graph.plan)) {
    return {kInternal, "the attention's plan for " + std::to_string(bucket) + " rows has changed"};
  }
  CUDA_RETURN_IF_ERROR(cudaGraphLaunch(graph.graph.get(), compute_.get()));
  // Rows without an output are rare in such steps: they are computed and not sent.
  MODULE_RETURN_IF_ERROR(FinishRows(0, rows_));
  MODULE_RETURN_IF_ERROR(SendBest(rows_));
  return MakeChecksums(0, config_.layers, decode_, compute_.get());
}

// ---- Its end

EngineProgress Engine::Poll() {
  if (!running_) return {.layers_done = layers_done_, .finished = true};
  cudaError_t status = cudaEventQuery(step_done_.get());
  if (status == cudaErrorNotReady && group_ != nullptr) {
    // A rank that died would keep the others waiting for ever.
    if (Error error = group_->Health()) {
      broken_ = std::move(error);
      running_ = false;
      return {.layers_done = layers_done_, .finished = true};
    }
  }
  if (status == cudaErrorNotReady) {
    if (!by_graph_) {
      bool registered = true;
      for (const Work& work : work_) registered = registered && work.registered;
      const uint32_t before = layers_done_;
      while (registered && layers_done_ < config_.layers &&
             cudaEventQuery(copied_[layers_done_].get()) == cudaSuccess) {
        ++layers_done_;
      }
      HandOutChecksums(before, layers_done_);
    }
    return {.layers_done = layers_done_, .finished = false};
  }
  if (status != cudaSuccess) broken_ = FromCuda(status, "Poll(");
  if (sum_failed_ && !broken_) broken_ = {kUnavailable, "the group of ranks broke"};
  if (!broken_) HandOutChecksums(layers_done_, config_.layers);
  layers_done_ = config_.layers;
  running_ = false;
  return {.layers_done = layers_done_, .finished = true};
}

Error Engine::Take(ChunkOutput* outputs) {
  if (broken_) {
    pages_->AbandonStep();
    return broken_;
  }
  for (size_t c = 0; c < chunks_.size(); ++c) outputs[c] = OutputOf(work_[c]);
  return {};
}

Error Engine::Adopt(const ChunkView& chunk) {
  pages_->BeginStep();
  PageTable::Placement placement;
  if (!pages_->Place(chunk.sequence, chunk.blocks, chunk.start, chunk.start, &placement)) {
    return Fail({kResourceExhausted, "device memory: too few KV pages"});
  }
  const uint32_t blocks = (chunk.start + config_.block_tokens - 1) / config_.block_tokens;
  for (uint32_t b = 0; b < blocks; ++b) {
    std::byte* page = kv_.data() + static_cast<size_t>(placement.pages[b]) * page_bytes_;
    CUDA_RETURN_IF_ERROR(RandomBf16(reinterpret_cast<uint16_t*>(page), page_bytes_ / 2,
                                    chunk.sequence * 4096 + b, 1.0f, compute_.get()));
  }
  CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(compute_.get()));
  return {};
}

}  // namespace antiphon::engine::cuda
