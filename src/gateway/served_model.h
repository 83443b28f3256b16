// A model as this gateway can serve it: the card that workers registered, with the tokenizer and
// the chat template that it names.
#ifndef ANTIPHON_GATEWAY_SERVED_MODEL_H_
#define ANTIPHON_GATEWAY_SERVED_MODEL_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "antiphon/v1/model.pb.h"
#include "model/chat_template.h"
#include "model/tokenizer.h"

namespace antiphon::gateway {

// Immutable.
struct ServedModel {
  internal::v1::ModelCard card;
  std::shared_ptr<const model::Tokenizer> tokenizer;
  std::shared_ptr<const model::ChatTemplate> chat_template;  // nullptr: the model has none
};
using ServedModelPtr = std::shared_ptr<const ServedModel>;

// What is served at one moment, and how much of the cluster is there. Immutable.
struct Catalog {
  std::vector<ServedModelPtr> models;
  uint32_t prefill_ready = 0;
  uint32_t decode_ready = 0;
  bool connected = false;  // to a conductor, now
  bool degraded = false;   // was complete once and is not now
  std::string not_ready =
      "no conductor reached yet";  // why it was never complete; empty once it was
  std::string served_names() const {
    std::string names;
    for (const auto& m : models) names += (names.empty() ? "" : ", ") + m->card.name();
    return names;
  }
  // By name or alias; "" is the only model when there is exactly one. nullptr: unknown.
  ServedModelPtr Find(std::string_view name) const {
    if (name.empty()) return models.size() == 1 ? models[0] : nullptr;
    for (const auto& m : models) {
      if (m->card.name() == name) return m;
      for (const std::string& alias : m->card.aliases()) {
        if (alias == name) return m;
      }
    }
    return nullptr;
  }
};
using CatalogPtr = std::shared_ptr<const Catalog>;

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_SERVED_MODEL_H_
