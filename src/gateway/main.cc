#include "common/daemon.h"
#include "gateway/daemon.h"

int main(int argc, char** argv) {
  return antiphon::RunDaemon(argc, argv, {.name = "gateway", .metrics_name = "gateway"},
                             antiphon::gateway::MakeGateway);
}
