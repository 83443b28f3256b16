#include "gateway/exchange.h"

#include <algorithm>

namespace antiphon::gateway {

Exchange::Exchange(PreparedRequest request, const std::vector<RequestId>& ids,
                   const GenerationLimits& limits)
    : model_(std::move(request.model)),
      n_(request.n),
      prompt_tokens_(request.prompt_tokens),
      started_(request.choices.size(), false),
      open_(static_cast<uint32_t>(request.choices.size())) {
  for (size_t i = 0; i < request.choices.size(); ++i) {
    request.choices[i].id = ids[i];
    choices_.push_back(std::make_unique<Generation>(std::move(request.choices[i]), limits));
  }
}

void Exchange::Begin(absl::Time now) {
  if (begun_ || ended_) return;
  begun_ = true;
  for (uint32_t i = 0; i < choices_.size() && !ended_; i += n_) {
    choices_[i]->Begin(now);
    Collect(i, now);
  }
}

void Exchange::Deliver(uint32_t choice, absl::Time now,
                       const std::function<void(Generation&)>& event) {
  if (ended_ || choice >= choices_.size()) return;
  event(*choices_[choice]);
  Collect(choice, now);
}

void Exchange::OnDecodeBroken(const std::string& address, const absl::Status& why, absl::Time now) {
  for (uint32_t i = 0; i < choices_.size() && !ended_; ++i) {
    choices_[i]->OnDecodeBroken(address, why, now);
    Collect(i, now);
  }
}

void Exchange::OnCancel(absl::Time now) { End(std::nullopt, true, now); }

void Exchange::OnAbort(const ApiError& error, absl::Time now) { End(error, false, now); }

void Exchange::OnTimer(absl::Time now) {
  for (uint32_t i = 0; i < choices_.size() && !ended_; ++i) {
    choices_[i]->OnTimer(now);
    Collect(i, now);
  }
}

absl::Time Exchange::next_timer() const {
  absl::Time next = absl::InfiniteFuture();
  if (ended_) return next;
  for (const auto& g : choices_) next = std::min(next, g->next_timer());
  return next;
}

bool Exchange::first_token_seen() const {
  return std::any_of(choices_.begin(), choices_.end(),
                     [](const auto& g) { return g->first_token_seen(); });
}

Usage Exchange::usage() const {
  Usage usage{.prompt_tokens = prompt_tokens_};
  for (const auto& g : choices_) usage.completion_tokens += g->stats().output_tokens;
  for (uint32_t i = 0; i < choices_.size(); i += n_) {
    const auto& source = choices_[i]->stats().prompt_source;
    if (!source) continue;
    usage.cached_tokens += source->dram() + source->remote() + source->ssd() + source->device();
  }
  return usage;
}

wire::PromptSource Exchange::prompt_source() const {
  wire::PromptSource sum;
  for (uint32_t i = 0; i < choices_.size(); i += n_) {
    const auto& source = choices_[i]->stats().prompt_source;
    if (!source) {
      sum.set_computed(sum.computed() + static_cast<uint32_t>(choices_[i]->spec().prompt->size()));
      continue;
    }
    sum.set_computed(sum.computed() + source->computed());
    sum.set_dram(sum.dram() + source->dram());
    sum.set_remote(sum.remote() + source->remote());
    sum.set_ssd(sum.ssd() + source->ssd());
    sum.set_device(sum.device() + source->device());
  }
  return sum;
}

void Exchange::Collect(uint32_t choice, absl::Time now) {
  Generation& generation = *choices_[choice];
  for (Action& action : generation.TakeActions()) {
    if (auto* deliver = std::get_if<gateway::Deliver>(&action)) {
      const bool first = !started_[choice];
      started_[choice] = true;
      outputs_.emplace_back(ChoiceDelta{
          .choice = choice, .first = first, .delta = std::move(deliver->delta), .usage = usage()});
    } else if (auto* end = std::get_if<gateway::End>(&action)) {
      --open_;
      switch (end->ending.reason) {
        case EndReason::kError:
          return End(std::move(end->ending.error), false, now);
        case EndReason::kCancelled:
          return End(std::nullopt, true, now);
        default:
          outputs_.emplace_back(
              ChoiceEnd{.choice = choice, .ending = std::move(end->ending), .usage = usage()});
      }
    } else {
      outputs_.emplace_back(ToCluster{.choice = choice, .action = std::move(action)});
    }
  }
  if (choice % n_ == 0 && generation.first_token_seen()) {
    // The others of this prompt; Begin has no effect on those that run.
    for (uint32_t i = choice + 1; i < choice + n_ && !ended_; ++i) {
      choices_[i]->Begin(now);
      for (Action& action : choices_[i]->TakeActions()) {
        outputs_.emplace_back(ToCluster{.choice = i, .action = std::move(action)});
      }
    }
  }
  if (open_ == 0 && !ended_) End(std::nullopt, false, now);
}

void Exchange::End(MaybeError error, bool cancelled, absl::Time now) {
  if (ended_) return;
  ended_ = true;
  for (uint32_t i = 0; i < choices_.size(); ++i) {
    choices_[i]->OnCancel(now);
    for (Action& action : choices_[i]->TakeActions()) {
      if (std::holds_alternative<gateway::Deliver>(action) ||
          std::holds_alternative<gateway::End>(action)) {
        continue;
      }
      outputs_.emplace_back(ToCluster{.choice = i, .action = std::move(action)});
    }
  }
  outputs_.emplace_back(
      RequestEnd{.error = std::move(error), .cancelled = cancelled, .usage = usage()});
}

}  // namespace antiphon::gateway
