// The conductor's core on the simulated network.
#ifndef ANTIPHON_TESTS_SIM_CONDUCTOR_PROCESS_H_
#define ANTIPHON_TESTS_SIM_CONDUCTOR_PROCESS_H_

#include <functional>
#include <map>
#include <memory>

#include "antiphon/v1/control.pb.h"
#include "conductor/core.h"
#include "tests/sim/cluster.h"

namespace antiphon::sim {

class ConductorProcess final : public Process {
 public:
  explicit ConductorProcess(Cluster* cluster);

  // A node opened Join: `pipe`'s side 1 is this conductor; directives run `deliver` at side 0.
  void Accept(std::shared_ptr<Pipe> pipe, std::function<void(const wire::NodeDirective&)> deliver);
  // A report travels over `pipe` from its side 0.
  void Deliver(const std::shared_ptr<Pipe>& pipe, const wire::NodeReport& report);
  static void Deliver(Cluster* cluster, const std::shared_ptr<Pipe>& pipe,
                      const wire::NodeReport& report);

  absl::StatusOr<wire::AdmitReply> Admit(const wire::AdmitRequest& request);
  void Finish(const wire::FinishReport& report);
  const conductor::Core& core() const { return core_; }

 private:
  struct Session {
    std::shared_ptr<Pipe> pipe;
    std::function<void(const wire::NodeDirective&)> deliver;
  };
  void OnReport(const Pipe* pipe, const wire::NodeReport& report);
  void Perform(const conductor::Actions& actions);
  void Tick();

  Cluster* cluster_;
  conductor::Core core_;
  conductor::SessionId next_session_ = 1;
  std::map<conductor::SessionId, Session> sessions_;
  std::map<const Pipe*, conductor::SessionId> by_pipe_;
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_CONDUCTOR_PROCESS_H_
