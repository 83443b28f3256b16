#include "conductor/daemon.h"

int main(int argc, char** argv) {
  return antiphon::RunDaemon(argc, argv, {.name = "conductor", .metrics_name = "conductor"},
                             antiphon::conductor::MakeConductor);
}
