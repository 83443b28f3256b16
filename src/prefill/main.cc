#include "worker/worker.h"

int main(int argc, char** argv) {
  using antiphon::worker::StartRole;
  return antiphon::RunDaemon(argc, argv, {.name = "prefill", .metrics_name = "worker"},
                             [](antiphon::DaemonContext& context) {
                               return antiphon::worker::StartWorker(context, StartRole::kPrefill);
                             });
}
