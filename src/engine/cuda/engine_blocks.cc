// K and V between the device's pages and the host's blocks, and the blocks' checksums.
#include <algorithm>

#include "engine/cuda/engine.h"

namespace antiphon::engine::cuda {
namespace {

constexpr size_t kBatchCopies = 1024;  // more descriptors at once hang some drivers

}  // namespace

Error Engine::Copies(std::vector<void*>& to, std::vector<const void*>& from,
                     std::vector<size_t>& sizes, cudaStream_t stream) {
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  for (size_t at = 0; at < to.size(); at += kBatchCopies) {
    const size_t count = std::min(kBatchCopies, to.size() - at);
    size_t first = 0;
    CUDA_RETURN_IF_ERROR(cudaMemcpyBatchAsync(to.data() + at, from.data() + at, sizes.data() + at,
                                              count, &attributes, &first, 1, stream));
  }
  to.clear();
  from.clear();
  sizes.clear();
  return {};
}

std::byte* Engine::PageLayer(int32_t page, uint32_t layer) const {
  return kv_.data() + static_cast<size_t>(page) * page_bytes_ + layer * page_layer_bytes_;
}

Error Engine::CopyBlock(int32_t page, std::byte* block, uint32_t first, uint32_t end, bool out,
                        cudaStream_t stream) {
  const cudaMemcpyKind kind = out ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  if (!sliced_) {
    std::byte* host = block + first * block_layer_bytes_;
    std::byte* device = PageLayer(page, first);
    CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(out ? host : device, out ? device : host,
                                         (end - first) * page_layer_bytes_, kind, stream));
    return {};
  }
  const size_t host_pitch = page_layout_.host_token_bytes;
  const size_t width = size_t{config_.kv_heads} * config_.head_dim * sizeof(uint16_t);
  for (uint32_t layer = first; layer < end; ++layer) {
    std::byte* host = block + layer * block_layer_bytes_ + page_layout_.host_offset;
    std::byte* device = PageLayer(page, layer);
    // V lies right behind K on both sides.
    CUDA_RETURN_IF_ERROR(cudaMemcpy2DAsync(out ? host : device, out ? host_pitch : width,
                                           out ? device : host, out ? width : host_pitch, width,
                                           size_t{2} * config_.block_tokens, kind, stream));
  }
  return {};
}

// Layers [first, end) of the blocks that are not on the device, on the load stream.
Error Engine::LoadLayers(uint32_t first, uint32_t end) {
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> sizes;
  for (const Work& work : work_) {
    for (uint32_t b = work.placement.load_begin; b < work.placement.load_end; ++b) {
      const int32_t page = work.placement.pages[b];
      if (work.registered && !sliced_) {
        to.push_back(PageLayer(page, first));
        from.push_back(work.chunk->blocks[b] + first * block_layer_bytes_);
        sizes.push_back((end - first) * page_layer_bytes_);
      } else {
        MODULE_RETURN_IF_ERROR(
            CopyBlock(page, work.chunk->blocks[b], first, end, /*out=*/false, load_.get()));
      }
    }
  }
  return Copies(to, from, sizes, load_.get());
}

// `by_layer`: compute waits for each layer's load when it gets there; else it waits for all.
Error Engine::LoadPrefixes(bool by_layer) {
  const bool any = std::any_of(work_.begin(), work_.end(), [](const Work& work) {
    return work.placement.load_begin < work.placement.load_end;
  });
  if (by_layer) {
    for (uint32_t layer = 0; layer < config_.layers; ++layer) {
      if (any) MODULE_RETURN_IF_ERROR(LoadLayers(layer, layer + 1));
      CUDA_RETURN_IF_ERROR(cudaEventRecord(loaded_[layer].get(), load_.get()));
    }
    return {};
  }
  if (!any) return {};
  MODULE_RETURN_IF_ERROR(LoadLayers(0, config_.layers));
  CUDA_RETURN_IF_ERROR(cudaEventRecord(loaded_[0].get(), load_.get()));
  CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(compute_.get(), loaded_[0].get(), 0));
  return {};
}

Error Engine::CopyLayerOut(uint32_t layer, const StepTables& tables, uint32_t rows) {
  CUDA_RETURN_IF_ERROR(cudaEventRecord(computed_[layer].get(), compute_.get()));
  CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(copy_.get(), computed_[layer].get(), 0));
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> sizes;
  bool by_rows = false;
  for (const Work& work : work_) {
    if (!work.registered || !config_.copy_out) continue;
    if (work.by_rows) {
      by_rows = true;
      continue;
    }
    const ChunkView& chunk = *work.chunk;
    const uint32_t end = (chunk.start + chunk.token_count - 1) / config_.block_tokens + 1;
    for (uint32_t b = chunk.start / config_.block_tokens; b < end; ++b) {
      to.push_back(chunk.blocks[b] + layer * block_layer_bytes_);
      from.push_back(PageLayer(work.placement.pages[b], layer));
      sizes.push_back(page_layer_bytes_);
    }
  }
  MODULE_RETURN_IF_ERROR(MakeChecksums(layer, layer + 1, tables, copy_.get()));
  MODULE_RETURN_IF_ERROR(Copies(to, from, sizes, copy_.get()));
  if (by_rows) {
    CUDA_RETURN_IF_ERROR(CopyRowsOut(page_layout_, tables.device.positions, tables.device.row_pages,
                                     tables.device.targets, rows, layer, layer + 1, copy_.get()));
  }
  CUDA_RETURN_IF_ERROR(cudaEventRecord(copied_[layer].get(), copy_.get()));
  return {};
}

// Memory that nobody registered (tests, a pool that cannot be pinned): whole blocks at the step's
// end, by way of the driver's own buffers.
Error Engine::CopyUnregisteredOut() {
  for (const Work& work : work_) {
    if (work.registered || !config_.copy_out) continue;
    const ChunkView& chunk = *work.chunk;
    const uint32_t end = (chunk.start + chunk.token_count - 1) / config_.block_tokens + 1;
    for (uint32_t b = chunk.start / config_.block_tokens; b < end; ++b) {
      MODULE_RETURN_IF_ERROR(CopyBlock(work.placement.pages[b], chunk.blocks[b], 0, config_.layers,
                                       /*out=*/true, compute_.get()));
    }
  }
  return {};
}

uint32_t Engine::BlocksWritten(const ChunkView& chunk) const {
  const uint32_t end = chunk.start + chunk.token_count;
  return (end - 1) / config_.block_tokens + 1 - chunk.start / config_.block_tokens;
}

// Straight into the host's memory: a few bytes for each block.
Error Engine::MakeChecksums(uint32_t first, uint32_t end, const StepTables& tables,
                            cudaStream_t stream) {
  if (checksummed_ == 0) return {};
  CUDA_RETURN_IF_ERROR(Checksum(page_layout_, tables.device.checksummed, checksummed_,
                                config_.layers, first, end, checksums_host_.data(), stream));
  return {};
}

// To the chunks that want them, for layers [first, end), which are done.
void Engine::HandOutChecksums(uint32_t first, uint32_t end) {
  if (first == end) return;
  for (const Work& work : work_) {
    const ChunkView& chunk = *work.chunk;
    if (chunk.checksums == nullptr) continue;
    const size_t from = size_t{work.first_checksummed} * config_.layers;
    for (uint32_t block = 0; block < BlocksWritten(chunk); ++block) {
      const size_t at = size_t{block} * config_.layers;
      std::copy(checksums_host_.data() + from + at + first,
                checksums_host_.data() + from + at + end, chunk.checksums + at + first);
    }
  }
}

Error Engine::RegisterMemory(void* memory, size_t bytes) {
  CUDA_RETURN_IF_ERROR(cudaSetDevice(config_.device));
  constexpr size_t kChunk = size_t{32} << 30;  // one call for very much memory fails in the driver
  auto* begin = static_cast<std::byte*>(memory);
  std::vector<Region> added;
  for (size_t at = 0; at < bytes; at += kChunk) {
    Region region{.begin = begin + at, .bytes = std::min(kChunk, bytes - at)};
    void* device = nullptr;
    cudaError_t status = cudaHostRegister(region.begin, region.bytes,
                                          cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (status == cudaSuccess) {
      status = cudaHostGetDevicePointer(&device, region.begin, 0);
      if (status != cudaSuccess) cudaHostUnregister(region.begin);
    }
    if (status != cudaSuccess) {
      (void)cudaGetLastError();
      for (const Region& done : added) cudaHostUnregister(done.begin);
      return FromCuda(status, "cudaHostRegister");
    }
    region.device = reinterpret_cast<uint64_t>(device);
    added.push_back(region);
  }
  regions_.insert(regions_.end(), added.begin(), added.end());
  return {};
}

void Engine::UnregisterMemory(void* memory) {
  cudaSetDevice(config_.device);
  // Chunks of one registration lie behind each other.
  auto* begin = static_cast<std::byte*>(memory);
  for (bool found = true; found;) {
    found = false;
    for (size_t i = 0; i < regions_.size(); ++i) {
      if (regions_[i].begin != begin) continue;
      begin += regions_[i].bytes;
      cudaHostUnregister(regions_[i].begin);
      regions_.erase(regions_.begin() + static_cast<ptrdiff_t>(i));
      found = true;
      break;
    }
  }
}

uint64_t Engine::DeviceAddress(const std::byte* host) const {
  for (const Region& region : regions_) {
    if (host >= region.begin &&
        host + block_layer_bytes_ * config_.layers <= region.begin + region.bytes) {
      return region.device + static_cast<uint64_t>(host - region.begin);
    }
  }
  return 0;
}

}  // namespace antiphon::engine::cuda
