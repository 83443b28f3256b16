#include "worker/worker.h"

int main(int argc, char** argv) {
  return antiphon::worker::RunWorker(argc, argv, antiphon::worker::StartRole::kPrefill);
}
