#include "conductor/validate.h"

#include <spdlog/fmt/fmt.h>

#include <cmath>

#include "antiphon/v1/control.pb.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::conductor {
namespace {

constexpr size_t kNameMax = 256;
constexpr int kAliasesMax = 64;
constexpr int kExcludedMax = 64;
constexpr uint32_t kTokensMax = 1 << 26;
constexpr double kSecondsMax = 1e9;

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError(fmt::format(format, std::forward<Args>(args)...));
}

absl::Status CheckAddress(std::string_view field, const std::string& address) {
  RETURN_IF_ERROR(CheckText(field, address, kNameMax, false));
  if (absl::StatusOr<HostPort> parsed = ParseHostPort(address); !parsed.ok()) {
    return Invalid("{}: {}", field, std::string(parsed.status().message()));
  } else if (parsed->port == 0) {
    return Invalid("{} is '{}'; port 0 is no address that others can reach", field, address);
  }
  return absl::OkStatus();
}

absl::Status CheckCard(const wire::ModelCard& card) {
  RETURN_IF_ERROR(CheckText("card.name", card.name(), kNameMax, false));
  if (card.aliases_size() > kAliasesMax) {
    return Invalid("card.aliases has {} entries; {} are the most", card.aliases_size(),
                   kAliasesMax);
  }
  for (const std::string& alias : card.aliases()) {
    RETURN_IF_ERROR(CheckText("card.aliases", alias, kNameMax, false));
  }
  RETURN_IF_ERROR(CheckText("card.weights_digest", card.weights_digest(), 128, false));
  RETURN_IF_ERROR(CheckText("card.tokenizer_digest", card.tokenizer_digest(), 128, true));
  RETURN_IF_ERROR(CheckText("card.chat_template_digest", card.chat_template_digest(), 128, true));
  if (card.block_tokens() == 0 || card.block_tokens() > 65536) {
    return Invalid("card.block_tokens is {}; it must lie in 1..65536", card.block_tokens());
  }
  return absl::OkStatus();
}

absl::Status CheckSeconds(std::string_view field, double value) {
  if (std::isfinite(value) && value >= 0 && value <= kSecondsMax) return absl::OkStatus();
  return Invalid("{} is {}; it must lie in 0..{}", field, value, kSecondsMax);
}

absl::Status CheckId(std::string_view bytes) {
  if (bytes.size() == RequestId::kBytes) return absl::OkStatus();
  return Invalid("id has {} bytes; it must have {}", bytes.size(), RequestId::kBytes);
}

}  // namespace

absl::Status CheckText(std::string_view field, std::string_view text, size_t max,
                       bool may_be_empty) {
  if (text.empty() && !may_be_empty) return Invalid("{} is empty", field);
  if (text.size() > max)
    return Invalid("{} has {} bytes; {} are the most", field, text.size(), max);
  for (char c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      return Invalid("{} holds a control character", field);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckHello(const wire::NodeHello& hello) {
  RETURN_IF_ERROR(CheckText("hello.node", hello.hello().node(), kNameMax, false));
  RETURN_IF_ERROR(CheckText("hello.version", hello.hello().version(), kNameMax, true));
  if (hello.hello().incarnation() == 0) return Invalid("hello.incarnation is 0");
  RETURN_IF_ERROR(CheckText("ops_address", hello.ops_address(), kNameMax, true));
  switch (hello.kind()) {
    case wire::NODE_KIND_WORKER:
      RETURN_IF_ERROR(CheckAddress("rpc_address", hello.rpc_address()));
      if (hello.role() != wire::ROLE_PREFILL && hello.role() != wire::ROLE_DECODE) {
        return Invalid("role is {}; it must be PREFILL or DECODE", static_cast<int>(hello.role()));
      }
      if (!hello.has_card()) return Invalid("card is missing; a worker registers its model");
      if (!hello.has_fingerprint()) return Invalid("fingerprint is missing");
      RETURN_IF_ERROR(CheckCard(hello.card()));
      return CostFromProto(hello.cost()).status();
    case wire::NODE_KIND_STORE:
      RETURN_IF_ERROR(CheckAddress("rpc_address", hello.rpc_address()));
      return CheckAddress("data_address", hello.data_address());
    case wire::NODE_KIND_GATEWAY:
      return CheckText("rpc_address", hello.rpc_address(), kNameMax, true);
    default:
      return Invalid("kind is {}; it must be WORKER, STORE or GATEWAY",
                     static_cast<int>(hello.kind()));
  }
}

absl::Status CheckLoad(const wire::WorkerLoad& load) {
  RETURN_IF_ERROR(CheckSeconds("load.queue_s", load.queue_s()));
  if (load.has_cost()) RETURN_IF_ERROR(CostFromProto(load.cost()).status());
  return absl::OkStatus();
}

absl::Status CheckEvents(const wire::StoreEvents& events) {
  for (int i = 0; i < events.events_size(); ++i) {
    const wire::BlockEvent& event = events.events(i);
    if (event.key().size() != BlockKey::kBytes) {
      return Invalid("events[{}].key has {} bytes; it must have {}", i, event.key().size(),
                     BlockKey::kBytes);
    }
    if (event.fingerprint_id().size() != FingerprintId::kBytes) {
      return Invalid("events[{}].fingerprint_id has {} bytes; it must have {}", i,
                     event.fingerprint_id().size(), FingerprintId::kBytes);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Request> RequestFromProto(const wire::AdmitRequest& proto) {
  Request request;
  RETURN_IF_ERROR(CheckId(proto.id()));
  request.id = *RequestId::FromBytes(proto.id());
  if (proto.epoch() == 0) return Invalid("epoch is 0; epochs start at 1");
  request.epoch = proto.epoch();
  RETURN_IF_ERROR(CheckText("tenant", proto.tenant(), kNameMax, true));
  RETURN_IF_ERROR(CheckText("model", proto.model(), kNameMax, false));
  RETURN_IF_ERROR(CheckText("class", proto.class_(), kNameMax, true));
  request.tenant = proto.tenant();
  request.model = proto.model();
  request.request_class = proto.class_();
  if (proto.prompt_count() == 0) return Invalid("prompt_count is 0; a prompt has a token at least");
  if (proto.prompt_count() > kTokensMax || proto.emitted_count() > kTokensMax) {
    return Invalid("prompt_count {} and emitted_count {}: {} are the most", proto.prompt_count(),
                   proto.emitted_count(), kTokensMax);
  }
  request.prompt_count = proto.prompt_count();
  request.emitted_count = proto.emitted_count();
  request.max_tokens = proto.max_tokens();
  if (proto.deadline_ms() > 0) request.deadline = absl::Milliseconds(proto.deadline_ms());
  if (static_cast<uint32_t>(proto.block_keys_size()) > request.tokens()) {
    return Invalid("block_keys has {} entries for {} tokens", proto.block_keys_size(),
                   request.tokens());
  }
  request.keys.reserve(proto.block_keys_size());
  for (const std::string& bytes : proto.block_keys()) {
    const auto key = BlockKey::FromBytes(bytes);
    if (!key) {
      return Invalid("block_keys[{}] has {} bytes; it must have {}", request.keys.size(),
                     bytes.size(), BlockKey::kBytes);
    }
    request.keys.push_back(*key);
  }
  if (proto.excluded_size() > kExcludedMax) {
    return Invalid("excluded has {} entries; {} are the most", proto.excluded_size(), kExcludedMax);
  }
  for (const std::string& node : proto.excluded()) request.excluded.emplace_back(node);
  return request;
}

absl::StatusOr<Finish> FinishFromProto(const wire::FinishReport& proto) {
  RETURN_IF_ERROR(CheckId(proto.id()));
  RETURN_IF_ERROR(CheckSeconds("ttft_s", proto.ttft_s()));
  RETURN_IF_ERROR(CheckSeconds("tbt_s", proto.tbt_s()));
  return Finish{.id = *RequestId::FromBytes(proto.id()),
                .epoch = proto.epoch(),
                .ttft_s = proto.ttft_s(),
                .tbt_s = proto.tbt_s(),
                .output_tokens = proto.output_tokens(),
                .first_token_seen = proto.first_token_seen(),
                .finished = proto.finished()};
}

}  // namespace antiphon::conductor
