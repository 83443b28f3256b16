#include "kvstore/blob_desk.h"

#include <array>
#include <utility>

#include "antiphon/v1/store.pb.h"
#include "common/logging.h"
#include "kvstore/blob_memory.h"

namespace antiphon::kvstore {
namespace {

constexpr const char* kOps[] = {"open_blob", "publish_blob", "offer_blob"};

template <typename Request>
BlobName NameIn(const Request& request) {
  return {.name = request.name(), .model = request.model(), .bytes = request.bytes()};
}

}  // namespace

struct BlobDesk::Metrics {
  struct Outcomes {
    Counter* ok;
    Counter* refused;
    Counter* error;
  };
  std::array<Outcomes, 3> requests;
  Gauge& bytes;
  explicit Metrics(Registry& r)
      : bytes(r.AddGauge("antiphon_kvstore_blob_bytes",
                         "Memory that workers of this host share beside the pool, such as repacked "
                         "weights.")) {
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto counter = [&](const char* result) {
        return &r.AddCounter("antiphon_kvstore_requests_total", "Requests of local workers.",
                             {{"op", kOps[i]}, {"result", result}});
      };
      requests[i] = {counter("ok"), counter("refused"), counter("error")};
    }
  }
  void Count(const wire::StoreRequest& request, const absl::Status& status) {
    const Outcomes& outcomes =
        requests[static_cast<size_t>(request.op_case() - wire::StoreRequest::kOpenBlob)];
    if (status.ok()) {
      outcomes.ok->Add();
    } else if (absl::IsResourceExhausted(status) || absl::IsAlreadyExists(status)) {
      outcomes.refused->Add();
    } else {
      outcomes.error->Add();
    }
  }
};

BlobDesk::BlobDesk(BlobDeskOptions options)
    : options_(std::move(options)),
      metrics_(std::make_unique<Metrics>(*options_.registry)),
      shelf_(options_.limits, [this](const std::string& name, uint64_t bytes) {
        return MakeMemfdBlob(name, bytes, options_.memory_available());
      }) {}

BlobDesk::~BlobDesk() = default;

bool BlobDesk::Handles(const wire::StoreRequest& request) {
  return request.has_open_blob() || request.has_publish_blob() || request.has_offer_blob();
}

void BlobDesk::Handle(ClientId session, const wire::StoreRequest& request, Fd passed,
                      ReplySink sink) {
  sinks_[session] = std::move(sink);
  std::vector<BlobAnswer> answers = Apply(session, request, std::move(passed));
  absl::Status status;  // OK also when it is to be answered later
  for (const BlobAnswer& answer : answers) {
    if (answer.session == session) status = answer.status;
  }
  metrics_->Count(request, status);
  if (!status.ok() && !absl::IsAlreadyExists(status)) {
    LogWarning("a worker's request for a blob is refused: {}", std::string(status.message()));
  }
  Send(std::move(answers));
}

std::vector<BlobAnswer> BlobDesk::Apply(ClientId session, const wire::StoreRequest& request,
                                        Fd passed) {
  const auto refuse = [&](absl::Status why) {
    return std::vector<BlobAnswer>{
        {.session = session, .request = request.id(), .status = std::move(why)}};
  };
  if (request.id() == 0) return refuse(absl::InvalidArgumentError("id is 0; it is > 0"));
  if (!request.has_publish_blob()) {
    const auto& hello =
        request.has_open_blob() ? request.open_blob().hello() : request.offer_blob().hello();
    if (auto spoken = Negotiate(options_.self, hello); !spoken.ok()) {
      return refuse(spoken.status());
    }
  }
  if (request.has_offer_blob()) {
    const BlobName name = NameIn(request.offer_blob());
    auto memory = AdoptMemfdBlob(std::move(passed), name.bytes);
    if (!memory.ok()) return refuse(memory.status());
    auto answers = shelf_.Offer(session, request.id(), name, *std::move(memory));
    if (answers.front().status.ok()) {
      LogInfo("{} brought the blob {}, {} MiB", request.offer_blob().hello().node(), name.name,
              name.bytes >> 20);
    }
    return answers;
  }
  if (request.has_publish_blob()) return shelf_.Publish(session, request.id());
  const BlobName name = NameIn(request.open_blob());
  auto answers = shelf_.Open(session, request.id(), name);
  if (!answers.empty() && answers.front().fill) {
    LogInfo("{} fills the blob {}, {} MiB", request.open_blob().hello().node(), name.name,
            name.bytes >> 20);
  }
  return answers;
}

void BlobDesk::End(ClientId session) {
  sinks_.erase(session);
  Send(shelf_.End(session));
}

void BlobDesk::Send(std::vector<BlobAnswer> answers) {
  metrics_->bytes.Set(static_cast<double>(shelf_.bytes()));
  for (BlobAnswer& answer : answers) {
    const auto sink = sinks_.find(answer.session);
    if (sink == sinks_.end()) continue;
    wire::StoreReply reply;
    reply.set_id(answer.request);
    if (!answer.status.ok()) {
      reply.mutable_status()->set_code(static_cast<int>(answer.status.code()));
      reply.mutable_status()->set_message(std::string(answer.status.message()));
    } else {
      *reply.mutable_blob()->mutable_hello() = MakeHello(options_.self);
      reply.mutable_blob()->set_fill(answer.fill);
    }
    sink->second(reply, std::move(answer.memory));
  }
}

}  // namespace antiphon::kvstore
