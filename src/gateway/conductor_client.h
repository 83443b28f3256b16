// The gateway's conversations with the conductors: admission, reports, the models they know of.
//
// One conductor of the list is used at a time; when it does not answer, the next one is, round and
// round, so a conductor's death costs one failed attempt.
#ifndef ANTIPHON_GATEWAY_CONDUCTOR_CLIENT_H_
#define ANTIPHON_GATEWAY_CONDUCTOR_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "antiphon/v1/control.pb.h"
#include "common/executor.h"
#include "common/wire.h"
#include "gateway/served_model.h"

namespace antiphon::gateway {

struct ConductorClientOptions {
  std::vector<std::string> conductors;  // RPC addresses
  Identity self;
  Executor* executor = nullptr;  // callbacks of Admit; outlives the client
  // A new catalog, at every change; on a thread of the client's.
  absl::AnyInvocable<void(CatalogPtr)> on_catalog;
};

// Thread-safe.
class ConductorClient {
 public:
  static std::unique_ptr<ConductorClient> Start(ConductorClientOptions options);
  virtual ~ConductorClient() = default;

  // `done` runs on the executor, once, unless the call is abandoned first. Tries every conductor
  // before it gives UNAVAILABLE; waits as long as the request's deadline.
  virtual uint64_t Admit(wire::AdmitRequest request,
                         absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done) = 0;
  virtual void AbandonAdmit(uint64_t call) = 0;
  // Best effort.
  virtual void Finish(wire::FinishReport report) = 0;
};

// Content-addressed parts of models, kept by digest. Not thread-safe.
class ModelParts {
 public:
  // Digests of `card` that are not here yet.
  std::vector<std::string> Missing(const wire::ModelCard& card) const;
  // DATA_LOSS when `content` has another digest; else an error of what it holds.
  absl::Status AddTokenizer(const std::string& digest, const std::string& content);
  absl::Status AddTemplate(const std::string& digest, const std::string& content);
  // nullptr while a part is missing.
  ServedModelPtr Build(const wire::ModelCard& card) const;

 private:
  std::vector<std::pair<std::string, std::shared_ptr<const model::Tokenizer>>> tokenizers_;
  std::vector<std::pair<std::string, std::shared_ptr<const model::ChatTemplate>>> templates_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_CONDUCTOR_CLIENT_H_
