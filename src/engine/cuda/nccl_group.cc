#include "engine/cuda/nccl_group.h"

#include <dlfcn.h>

#include <cstring>
#include <string>

namespace antiphon::engine::cuda {
namespace {

static_assert(sizeof(GroupId) == sizeof(ncclUniqueId));

struct Library {
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRank) comm_init_rank = nullptr;
  decltype(&ncclCommDestroy) comm_destroy = nullptr;
  decltype(&ncclCommAbort) comm_abort = nullptr;
  decltype(&ncclCommGetAsyncError) comm_get_async_error = nullptr;
  decltype(&ncclAllReduce) all_reduce = nullptr;
  decltype(&ncclGetErrorString) get_error_string = nullptr;
  std::string error;
};

template <typename Function>
void Find(void* handle, const char* name, Function* out, std::string* error) {
  *out = reinterpret_cast<Function>(dlsym(handle, name));
  if (*out == nullptr) *error = std::string("NCCL has no ") + name;
}

const Library& Nccl() {
  static const Library* const library = [] {
    auto* l = new Library;
    void* handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      l->error = std::string("there is no NCCL: ") + dlerror();
      return l;
    }
    Find(handle, "ncclGetUniqueId", &l->get_unique_id, &l->error);
    Find(handle, "ncclCommInitRank", &l->comm_init_rank, &l->error);
    Find(handle, "ncclCommDestroy", &l->comm_destroy, &l->error);
    Find(handle, "ncclCommAbort", &l->comm_abort, &l->error);
    Find(handle, "ncclCommGetAsyncError", &l->comm_get_async_error, &l->error);
    Find(handle, "ncclAllReduce", &l->all_reduce, &l->error);
    Find(handle, "ncclGetErrorString", &l->get_error_string, &l->error);
    return l;
  }();
  return *library;
}

Error FromNccl(ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return {};
  const int code =
      result == ncclInvalidArgument || result == ncclInvalidUsage ? kInternal : kUnavailable;
  return {code, std::string("NCCL: ") + Nccl().get_error_string(result) + " (" + what + ")"};
}

}  // namespace

Error NcclGroup::MakeId(GroupId* out) {
  if (!Nccl().error.empty()) return {kFailedPrecondition, Nccl().error};
  ncclUniqueId id;
  MODULE_RETURN_IF_ERROR(FromNccl(Nccl().get_unique_id(&id), "making a group's id"));
  std::memcpy(out->bytes, &id, sizeof(id));
  return {};
}

Error NcclGroup::Join(const GroupId& id, uint32_t rank, uint32_t ranks,
                      std::unique_ptr<NcclGroup>* out) {
  if (!Nccl().error.empty()) return {kFailedPrecondition, Nccl().error};
  ncclUniqueId nccl_id;
  std::memcpy(&nccl_id, id.bytes, sizeof(nccl_id));
  ncclComm_t comm = nullptr;
  MODULE_RETURN_IF_ERROR(FromNccl(
      Nccl().comm_init_rank(&comm, static_cast<int>(ranks), nccl_id, static_cast<int>(rank)),
      "joining a group"));
  out->reset(new NcclGroup(comm));
  return {};
}

NcclGroup::~NcclGroup() {
  if (failed_) {
    Nccl().comm_abort(comm_);
  } else {
    Nccl().comm_destroy(comm_);
  }
}

Error NcclGroup::AllReduceSum(float* values, size_t count, cudaStream_t stream) {
  return FromNccl(Nccl().all_reduce(values, values, count, ncclFloat, ncclSum, comm_, stream),
                  "all-reduce");
}

Error NcclGroup::Health() {
  ncclResult_t state = ncclSuccess;
  Error error = FromNccl(Nccl().comm_get_async_error(comm_, &state), "health");
  if (!error && state != ncclSuccess && state != ncclInProgress) {
    error = FromNccl(state, "a rank has failed");
  }
  failed_ = failed_ || static_cast<bool>(error);
  return error;
}

}  // namespace antiphon::engine::cuda
