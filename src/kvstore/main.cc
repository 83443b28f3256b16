#include "common/daemon.h"
#include "kvstore/service.h"

int main(int argc, char** argv) {
  return antiphon::RunDaemon(argc, argv, {.name = "kvstore", .metrics_name = "kvstore"},
                             antiphon::kvstore::MakeKvStore);
}
