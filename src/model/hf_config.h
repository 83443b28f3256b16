// config.json and generation_config.json as metadata.
#ifndef ANTIPHON_MODEL_HF_CONFIG_H_
#define ANTIPHON_MODEL_HF_CONFIG_H_

#include "absl/status/status.h"
#include "model/json_value.h"
#include "model/model_file.h"

namespace antiphon::model {

// Adds the metadata of the model and, for Llama 3's scaled rope, the tensor rope_freqs.weight.
// FAILED_PRECONDITION, naming the field, when the model computes what we do not; what could be read
// is there then too. To be called with the folder's tensors in `contents`.
absl::Status ReadHfConfig(const JsonObject& config, ModelContents& contents);

// Adds general.sampling.*.
void ReadHfSampling(const JsonObject& generation, ModelContents& contents);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_HF_CONFIG_H_
