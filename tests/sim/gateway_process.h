// The gateway's side: one Generation for each request, one stream for each decode worker.
#ifndef ANTIPHON_TESTS_SIM_GATEWAY_PROCESS_H_
#define ANTIPHON_TESTS_SIM_GATEWAY_PROCESS_H_

#include <map>
#include <memory>
#include <string>

#include "antiphon/v1/worker.pb.h"
#include "gateway/generation.h"
#include "model/tokenizer.h"
#include "tests/sim/cluster.h"

namespace antiphon::sim {

class GatewayProcess final : public Process {
 public:
  explicit GatewayProcess(Cluster* cluster);
  ~GatewayProcess() override;

  void Begin(size_t index, Outcome* outcome);
  void Cancel(size_t index);
  const gateway::Generation* Find(size_t index) const;

 private:
  struct Running {
    std::unique_ptr<gateway::Generation> generation;
    Outcome* outcome = nullptr;
    absl::Time timer = absl::InfiniteFuture();
  };
  void Perform(size_t index);
  void Do(size_t index, Running& r, gateway::Admit& action);
  void Do(size_t index, Running& r, gateway::StartOn& action);
  void End(Running& r, const gateway::Ending& ending);
  void OnTokens(const gateway::wire::TokenBatch& batch);
  void SendDown(const std::string& address, const gateway::wire::GenerateDown& down);
  void ArmTimer(size_t index, Running& r);

  Cluster* cluster_;
  std::shared_ptr<const model::Tokenizer> tokenizer_;
  std::map<size_t, Running> running_;
  std::map<std::string, size_t> by_id_;
  std::map<std::string, std::shared_ptr<Pipe>> decodes_;  // by address
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_GATEWAY_PROCESS_H_
