#include "model/hf_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "antiphon/v1/model.pb.h"
#include "model/card.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "tests/model/gguf_builder.h"
#include "tests/model/hf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::unique_ptr<ModelFile> Gguf(const TinyModel& model = {}) {
  static std::vector<std::unique_ptr<std::string>> kept;
  kept.push_back(std::make_unique<std::string>(TinyLlama(model).Build()));
  return *ParseGguf(*kept.back());
}

HfFiles Folder(const TinyModel& model = {}) { return HfFolderOf(*Gguf(model)); }

// Changes a file of JSON.
void Edit(HfFiles& files, const std::string& name, const std::function<void(JsonObject&)>& edit) {
  Json json = boost::json::parse(files[name]);
  edit(json.as_object());
  files[name] = boost::json::serialize(json);
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(HfFolderTest, TheModelHasTheShapeOfItsGguf) {
  for (const char* architecture : {"llama", "qwen2"}) {
    const auto gguf = Gguf({.architecture = architecture, .type = TensorType::kBF16});
    const HfFiles files = HfFolderOf(*gguf);
    const auto folder = ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const auto shape = LlamaShapeOf(**folder);
    ASSERT_TRUE(shape.ok()) << shape.status().ToString();
    const auto want = *LlamaShapeOf(*gguf);
    EXPECT_EQ(shape->architecture, architecture);
    EXPECT_EQ(shape->layers, want.layers);
    EXPECT_EQ(shape->hidden, want.hidden);
    EXPECT_EQ(shape->feed_forward, want.feed_forward);
    EXPECT_EQ(shape->heads, want.heads);
    EXPECT_EQ(shape->kv_heads, want.kv_heads);
    EXPECT_EQ(shape->head_dim, want.head_dim);
    EXPECT_EQ(shape->vocab, want.vocab);
    EXPECT_EQ(shape->context, want.context);
    EXPECT_EQ(shape->rms_eps, want.rms_eps);
    EXPECT_EQ(shape->rope_base, want.rope_base);
    EXPECT_EQ(shape->qkv_bias, want.qkv_bias);
    EXPECT_TRUE(shape->tied_output);
    EXPECT_FALSE(shape->rope_interleaved);
    EXPECT_THAT(Inspect(**folder), HasSubstr("servable: yes"));
  }
}

TEST(HfFolderTest, TheTokenizerIsThatOfItsGguf) {
  for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
    SCOPED_TRACE(pre);
    const auto gguf = Gguf({.pre = pre});
    const HfFiles files = HfFolderOf(*gguf);
    const auto folder = ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const auto spec = TokenizerSpecOf(**folder);
    ASSERT_TRUE(spec.ok()) << spec.status().ToString();
    internal::v1::TokenizerSpec want = *TokenizerSpecOf(*gguf);
    EXPECT_THAT(want.end_of_generation_ids(), ElementsAre(260, 262));
    EXPECT_EQ(spec->SerializeAsString(), want.SerializeAsString());
  }
}

TEST(HfFolderTest, TheCardHasTheAuthorsSamplingAndTheFoldersDigest) {
  HfFiles files = Folder();
  files["chat_template.jinja"] = "{{ messages }}";
  CardParts parts;
  const auto card = CardOf(**ParseHfFolder(files), "tiny", parts);
  ASSERT_TRUE(card.ok()) << card.status().ToString();
  EXPECT_DOUBLE_EQ(card->sampling().temperature(), 0.6);
  EXPECT_EQ(card->sampling().top_k(), 20);
  EXPECT_FALSE(card->sampling().has_top_p());
  EXPECT_EQ(card->quantisation(), "F32");
  EXPECT_EQ(parts.chat_template_blob, "{{ messages }}");
  for (const auto& [name, text] : HfFiles(files)) {
    if (name.find(".json") == std::string::npos) continue;
    HfFiles changed = files;
    changed[name] += " ";
    EXPECT_NE((*ParseHfFolder(changed))->Digest(), card->weights_digest()) << name;
  }
  EXPECT_EQ((*ParseHfFolder(files))->Digest(), card->weights_digest());
}

TEST(HfFolderTest, TheChatTemplateIsFoundWhereverItIs) {
  const auto text = [](const HfFiles& files) {
    return *(*ParseHfFolder(files))->GetStringOr("tokenizer.chat_template", "none");
  };
  HfFiles files = Folder();
  EXPECT_EQ(text(files), "none");
  Edit(files, "tokenizer_config.json", [](JsonObject& o) { o["chat_template"] = "one"; });
  EXPECT_EQ(text(files), "one");
  Edit(files, "tokenizer_config.json", [](JsonObject& o) {
    o["chat_template"] = JsonArray{JsonObject{{"name", "tool_use"}, {"template", "tools"}},
                                   JsonObject{{"name", "default"}, {"template", "two"}}};
  });
  EXPECT_EQ(text(files), "two");
  files["chat_template.jinja"] = "three";
  EXPECT_EQ(text(files), "three");
}

struct Change {
  const char* file;
  std::function<void(JsonObject&)> edit;
  const char* says;
};

// What is sound and not served: the folder opens, and the field is named.
TEST(HfFolderTest, AModelThatIsNotServedNamesTheField) {
  const auto rope = [](const char* text) {
    return [text](JsonObject& o) { o["rope_scaling"] = boost::json::parse(text); };
  };
  const std::vector<Change> changes = {
      {"config.json", [](JsonObject& o) { o.erase("num_hidden_layers"); },
       "config.json field \"num_hidden_layers\" is missing"},
      {"config.json", [](JsonObject& o) { o["hidden_size"] = "64"; },
       "config.json field \"hidden_size\" is not an integer"},
      {"config.json", [](JsonObject& o) { o["num_attention_heads"] = 3; },
       "config.json field \"num_attention_heads\""},
      {"config.json", [](JsonObject& o) { o["intermediate_size"] = 97; },
       "tensor model.layers.0.mlp.gate_proj.weight has dimensions [96, 64], the keys of the file "
       "ask for [97, 64]"},
      {"config.json", [](JsonObject& o) { o["num_hidden_layers"] = 3; },
       "tensor model.layers.2.input_layernorm.weight is missing"},
      {"config.json", [](JsonObject& o) { o["num_hidden_layers"] = 1; }, "tensor model.layers.1."},
      {"config.json", [](JsonObject& o) { o["architectures"] = JsonArray{"GemmaForCausalLM"}; },
       "config.json field \"architectures\" is \"GemmaForCausalLM\""},
      {"config.json", [](JsonObject& o) { o.erase("architectures"); }, "\"architectures\""},
      {"config.json", [](JsonObject& o) { o["hidden_act"] = "gelu"; }, "\"hidden_act\""},
      {"config.json", [](JsonObject& o) { o["mlp_bias"] = true; }, "\"mlp_bias\""},
      {"config.json", [](JsonObject& o) { o["attention_bias"] = true; }, "\"attention_bias\""},
      {"config.json", [](JsonObject& o) { o["tie_word_embeddings"] = false; }, "lm_head.weight"},
      {"config.json", [](JsonObject& o) { o["quantization_config"] = JsonObject{}; },
       "\"quantization_config\""},
      {"config.json",
       [](JsonObject& o) {
         o["architectures"] = JsonArray{"MistralForCausalLM"};
         o["sliding_window"] = 64;
       },
       "config.json field \"sliding_window\" is 64"},
      {"config.json", [](JsonObject& o) { o["layer_types"] = JsonArray{"sliding_attention"}; },
       "\"layer_types\""},
      {"config.json", [](JsonObject& o) { o["partial_rotary_factor"] = 0.5; },
       "\"partial_rotary_factor\""},
      {"config.json", [](JsonObject& o) { o["vocab_size"] = 100; }, "\"model.vocab\""},
      {"config.json", rope(R"({"rope_type": "yarn", "factor": 4})"),
       "config.json field \"rope_scaling.rope_type\" is \"yarn\""},
      {"config.json", rope(R"({"type": "dynamic", "factor": 4})"), "\"rope_scaling.type\""},
      {"config.json", rope(R"({"type": "linear"})"), "\"rope_scaling.factor\" is missing"},
      {"config.json", rope(R"({"type": "linear", "factor": 0.5})"), "\"rope_scaling.factor\""},
      {"config.json", rope(R"({"full_attention": {}})"), "kind of layer"},
      {"config.json", rope("3"), "\"rope_scaling\" is 3"},
      {"config.json", rope(R"({"rope_type": "llama3", "factor": 8})"), "low_freq_factor"},
      {"config.json", rope(R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
          "high_freq_factor": 4, "original_max_position_embeddings": 64})"),
       "high_freq_factor"},
      {"config.json",
       [](JsonObject& o) {
         o["rope_parameters"] = JsonObject{{"rope_theta", "many"}};
       },
       "\"rope_theta\""},
  };
  for (const Change& change : changes) {
    SCOPED_TRACE(change.says);
    HfFiles files = Folder();
    Edit(files, change.file, change.edit);
    const auto folder = ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const absl::Status status = LlamaShapeOf(**folder).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(Message(status), HasSubstr(change.says));
    EXPECT_THAT(Inspect(**folder), HasSubstr("servable: no"));
  }
}

TEST(HfFolderTest, WhatChangesNothingIsServed) {
  const std::vector<std::function<void(JsonObject&)>> changes = {
      [](JsonObject& o) { o["rope_scaling"] = nullptr; },
      [](JsonObject& o) {
        o["rope_scaling"] = JsonObject{{"rope_type", "default"}};
      },
      [](JsonObject& o) {
        o.erase("rope_theta");
        o["rope_parameters"] = JsonObject{{"rope_type", "default"}, {"rope_theta", 10000.0}};
      },
      [](JsonObject& o) { o["head_dim"] = nullptr; },
      [](JsonObject& o) { o["head_dim"] = 16; },
      [](JsonObject& o) { o["num_key_value_heads"] = 2; },
      [](JsonObject& o) { o["sliding_window"] = 64; },  // which LlamaForCausalLM does not know
      [](JsonObject& o) {
        o["architectures"] = JsonArray{"MistralForCausalLM"};
        o["sliding_window"] = nullptr;
      },
      [](JsonObject& o) {
        o["architectures"] = JsonArray{"MistralForCausalLM"};  // its default of 4,096 is no limit
      },
      [](JsonObject& o) {
        o["layer_types"] = JsonArray{"full_attention", "full_attention"};
      },
      [](JsonObject& o) { o["quantization_config"] = nullptr; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    HfFiles files = Folder();
    Edit(files, "config.json", changes[i]);
    const auto folder = ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const auto shape = LlamaShapeOf(**folder);
    EXPECT_TRUE(shape.ok()) << i << ": " << shape.status().ToString();
    if (!shape.ok()) continue;
    EXPECT_EQ(shape->rope_base, 10000.0f) << i;
  }
}

TEST(HfFolderTest, TensorsThatNobodyKnowsAreNamed) {
  const auto with = [](const std::string& name) {
    SafetensorsBuilder builder;
    const auto gguf = Gguf();
    for (const Tensor& tensor : gguf->tensors()) {
      builder.Tensor(HfTensorNameOf(tensor.name), "F32", {tensor.dims.rbegin(), tensor.dims.rend()},
                     std::string(tensor.bytes, '\0'));
    }
    HfFiles files = Folder();
    files["model.safetensors"] = builder.Tensor(name, "F32", {1}, "1234").Build();
    return Message(LlamaShapeOf(**ParseHfFolder(files)).status());
  };
  EXPECT_THAT(with("model.layers.0.self_attn.q_norm.weight"),
              HasSubstr("tensor model.layers.0.self"));
  EXPECT_THAT(with("model.layers.0.self_attn.o_proj.bias"), HasSubstr("o_proj.bias is none that"));
  // A name of GGUF is nobody's here, and a layer has one name.
  EXPECT_THAT(with("output.weight"), HasSubstr("tensor output.weight is none that"));
  EXPECT_THAT(with("model.layers.00.mlp.up_proj.weight"), HasSubstr("is none that"));
  // Old files have the table of rope, and a tied model may have the output once more.
  EXPECT_EQ(with("model.layers.0.self_attn.rotary_emb.inv_freq"), "");
  EXPECT_EQ(with("lm_head.weight"), "");
}

TEST(HfFolderTest, ATokenizerThatIsNotServedNamesTheField) {
  const auto model = [](const char* field, Json value) {
    return [field, value](JsonObject& o) { o["model"].as_object()[field] = value; };
  };
  const auto added = [](const char* field, Json value) {
    return [field, value](JsonObject& o) {
      o["added_tokens"].as_array()[0].as_object()[field] = value;
    };
  };
  const auto section = [](const char* field, const char* text) {
    return [field, text](JsonObject& o) { o[field] = boost::json::parse(text); };
  };
  const std::vector<Change> changes = {
      {"tokenizer.json", [](JsonObject& o) { o.erase("model"); }, "\"model\" is missing"},
      {"tokenizer.json", model("type", "Unigram"), "\"model.type\" is \"Unigram\""},
      {"tokenizer.json", model("byte_fallback", true), "\"model.byte_fallback\""},
      {"tokenizer.json", model("ignore_merges", true), "\"model.ignore_merges\""},
      {"tokenizer.json", model("dropout", 0.1), "\"model.dropout\""},
      {"tokenizer.json", model("end_of_word_suffix", "</w>"), "\"model.end_of_word_suffix\""},
      {"tokenizer.json", model("vocab", JsonObject{}), "\"model.vocab\""},
      {"tokenizer.json", model("vocab", JsonObject{{"a", -1}}), "\"model.vocab\" has the id -1"},
      {"tokenizer.json", model("vocab", JsonObject{{"a", 4'000'000}}), "far beyond"},
      {"tokenizer.json", model("vocab", JsonObject{{"a", 1}, {"b", 1}}), "to two tokens"},
      {"tokenizer.json", model("merges", nullptr), "\"model.merges\""},
      {"tokenizer.json", model("merges", boost::json::parse(R"([["a"]])")), "\"model.merges\""},
      {"tokenizer.json", model("merges", boost::json::parse("[5]")), "\"model.merges\""},
      {"tokenizer.json", added("rstrip", true), "with \"rstrip\""},
      {"tokenizer.json", added("single_word", true), "with \"single_word\""},
      {"tokenizer.json", added("id", 5), "to two tokens"},
      {"tokenizer.json", added("content", "he"), "a second id"},
      {"tokenizer.json", added("content", 7), "without content"},
      {"tokenizer.json", section("normalizer", R"({"type": "NFKC"})"), "\"normalizer\""},
      {"tokenizer.json", section("pre_tokenizer", "null"), "\"pre_tokenizer\""},
      {"tokenizer.json", section("pre_tokenizer", R"({"type": "Metaspace"})"), "\"pre_tokenizer\""},
      {"tokenizer.json",
       section("pre_tokenizer", R"({"type": "ByteLevel", "add_prefix_space": true})"),
       "\"pre_tokenizer\""},
      {"tokenizer.json", section("decoder", "null"), "\"decoder\""},
      {"tokenizer.json", section("post_processor", R"({"type": "BertProcessing"})"),
       "\"post_processor\""},
      {"tokenizer.json",
       section("post_processor", R"({"type": "TemplateProcessing", "single": []})"),
       "\"post_processor.single\""},
      {"tokenizer_config.json", [](JsonObject& o) { o["eos_token"] = "<none>"; }, "\"eos_token\""},
      {"generation_config.json", [](JsonObject& o) { o["eos_token_id"] = "x"; }, "eos_token_id"},
      {"generation_config.json", [](JsonObject& o) { o["eos_token_id"] = 999; }, "eos_token_id"},
  };
  for (const Change& change : changes) {
    SCOPED_TRACE(change.says);
    HfFiles files = Folder();
    Edit(files, change.file, change.edit);
    const auto folder = ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const absl::Status status = TokenizerSpecOf(**folder).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(status), HasSubstr(change.says));
  }
  HfFiles files = Folder();
  files.erase("tokenizer.json");
  EXPECT_THAT(Message(TokenizerSpecOf(**ParseHfFolder(files)).status()),
              HasSubstr("no tokenizer.json"));
}

TEST(HfFolderTest, ThePostProcessorSaysWhetherABosIsAdded) {
  HfFiles files = Folder({.pre = "llama-bpe"});
  Edit(files, "tokenizer.json", [](JsonObject& o) {
    o["post_processor"] = boost::json::parse(R"({"type": "Sequence", "processors": [
      {"type": "ByteLevel", "trim_offsets": false},
      {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}],
       "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [260]}}}]})");
  });
  const auto spec = TokenizerSpecOf(**ParseHfFolder(files));
  ASSERT_TRUE(spec.ok()) << spec.status().ToString();
  EXPECT_TRUE(spec->add_bos());
  EXPECT_FALSE(spec->add_eos());
  EXPECT_EQ(spec->bos_id(), 260);
  EXPECT_THAT(*(*Tokenizer::Create(*spec))->Encode("he", {}), ElementsAre(260, 256));
  std::string& text = files["tokenizer.json"];
  text.replace(text.find("[260]"), 5, "[261]");
  EXPECT_THAT(Message(TokenizerSpecOf(**ParseHfFolder(files)).status()),
              HasSubstr("post_processor.single"));
}

TEST(HfFolderTest, IdsWithoutATokenAreFilled) {
  HfFiles files = Folder();
  Edit(files, "tokenizer.json", [](JsonObject& o) {
    o["added_tokens"].as_array().push_back(
        JsonObject{{"id", 270}, {"content", "<late>"}, {"special", false}});
  });
  Edit(files, "config.json", [](JsonObject& o) { o["vocab_size"] = 264; });
  EXPECT_THAT(Message(LlamaShapeOf(**ParseHfFolder(files)).status()), HasSubstr("has 271 tokens"));
  const auto spec = TokenizerSpecOf(**ParseHfFolder(files));
  ASSERT_TRUE(spec.ok()) << spec.status().ToString();
  ASSERT_EQ(spec->tokens_size(), 271);
  EXPECT_EQ(spec->tokens(265), "[PAD265]");
  EXPECT_EQ(spec->token_types(265), 5);
  EXPECT_EQ(spec->token_types(270), 4);
}

// Two shards, cut between the layers.
HfFiles Sharded() {
  HfFiles files = Folder();
  files.erase("model.safetensors");
  SafetensorsBuilder shards[2];
  JsonObject map;
  const auto gguf = Gguf();
  for (const Tensor& tensor : gguf->tensors()) {
    const size_t at = tensor.name.find("blk.1.") == 0 ? 1 : 0;
    const std::string name = HfTensorNameOf(tensor.name);
    shards[at].Tensor(name, "F32", {tensor.dims.rbegin(), tensor.dims.rend()},
                      std::string(tensor.bytes, '\0'));
    map[name] = at == 0 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
  }
  files["model-00001-of-00002.safetensors"] = shards[0].Build();
  files["model-00002-of-00002.safetensors"] = shards[1].Build();
  files["model.safetensors.index.json"] =
      boost::json::serialize(JsonObject{{"metadata", JsonObject{}}, {"weight_map", map}});
  return files;
}

TEST(HfFolderTest, ShardsAreOneModel) {
  const HfFiles files = Sharded();
  const auto folder = ParseHfFolder(files);
  ASSERT_TRUE(folder.ok()) << folder.status().ToString();
  EXPECT_TRUE(LlamaShapeOf(**folder).ok());
  EXPECT_THAT((*folder)->format(), HasSubstr("2 safetensors files"));
  EXPECT_EQ((*folder)->tensors().size(), Gguf()->tensors().size());
}

TEST(HfFolderTest, ShardsThatDoNotFitTheirIndexAreRefused) {
  constexpr const char* kIndex = "model.safetensors.index.json";
  constexpr const char* kNorm = "model.norm.weight";
  const auto map = [](JsonObject& o) -> JsonObject& { return o["weight_map"].as_object(); };
  const std::vector<Change> changes = {
      {kIndex, [](JsonObject& o) { o.erase("weight_map"); }, "no weight_map"},
      {kIndex, [&](JsonObject& o) { map(o).erase(kNorm); }, "does not say that tensor"},
      {kIndex, [&](JsonObject& o) { map(o)["new"] = "model-00002-of-00002.safetensors"; },
       "says that"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = "model-00002-of-00002.safetensors"; },
       "does not say that tensor model.norm.weight is in model-00001"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = "model-00003-of-00003.safetensors"; },
       "does not say"},
      {kIndex, [&](JsonObject& o) { map(o)["new"] = "zzz.safetensors"; }, "which is not there"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = "../model.safetensors"; }, "no name of a safe"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = "/etc/passwd"; }, "no name of a safe"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = ".safetensors"; }, "no name of a safe"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = "config.json"; }, "no name of a safe"},
      {kIndex, [&](JsonObject& o) { map(o)[kNorm] = 5; }, "no name of a safe"},
  };
  for (const Change& change : changes) {
    SCOPED_TRACE(change.says);
    HfFiles files = Sharded();
    Edit(files, change.file, change.edit);
    const absl::Status status = ParseHfFolder(files).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(Message(status), HasSubstr(change.says));
  }
  HfFiles files = Sharded();
  std::string& shard = files["model-00002-of-00002.safetensors"];
  shard.resize(shard.size() / 2);
  EXPECT_THAT(Message(ParseHfFolder(files).status()),
              HasSubstr("model-00002-of-00002.safetensors: "));
}

TEST(HfFolderTest, FilesThatAreNoJsonAreNamed) {
  for (const char* name :
       {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}) {
    for (const std::string& text :
         {std::string(), std::string("{"), std::string("[]"), "{\"a\":" + std::string(100'000, '['),
          std::string("{\"a\": \"\xff\"}")}) {
      HfFiles files = Folder();
      files[name] = text;
      const absl::Status status = ParseHfFolder(files).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << name << text.substr(0, 20);
      EXPECT_THAT(Message(status), HasSubstr(name));
    }
  }
}

class HfFolderOnDisk : public testing::Test {
 protected:
  HfFolderOnDisk() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::path(testing::TempDir()) / (std::string("hf-") + test->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~HfFolderOnDisk() override { std::filesystem::remove_all(folder_); }
  void Write(const HfFiles& files) {
    for (const auto& [name, text] : files) std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  std::string Refusal() { return Message(OpenModelFile(folder_.string()).status()); }
  std::filesystem::path folder_;
};

TEST_F(HfFolderOnDisk, OpensByItsPath) {
  Write(Folder());
  const auto file = OpenModelFile(folder_.string() + "/");
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_EQ(*(*file)->GetString("general.name"), "hf-OpensByItsPath");
  EXPECT_EQ((*file)->Digest(), (*ParseHfFolder(Folder()))->Digest());
  const std::string identity = (*file)->identity();
  EXPECT_FALSE(identity.empty());
  (*file)->DropPages();
  EXPECT_TRUE(LlamaShapeOf(**file).ok());
  Write({{"chat_template.jinja", "new"}});
  EXPECT_NE((*OpenModelFile(folder_.string()))->identity(), identity);
}

TEST_F(HfFolderOnDisk, FilesAreSymbolicLinksInACache) {
  Write(Folder());
  std::filesystem::rename(folder_ / "config.json", folder_ / "blob");
  std::filesystem::create_symlink("blob", folder_ / "config.json");
  EXPECT_EQ(Refusal(), "");
  std::filesystem::create_symlink("gone", folder_ / "chat_template.jinja");
  EXPECT_THAT(Refusal(), HasSubstr("chat_template.jinja"));
}

TEST_F(HfFolderOnDisk, APipeDoesNotBlock) {
  Write(Folder());
  std::filesystem::remove(folder_ / "tokenizer.json");
  ASSERT_EQ(mkfifo((folder_ / "tokenizer.json").c_str(), 0600), 0);
  EXPECT_THAT(Refusal(), HasSubstr("not a regular file"));
}

TEST_F(HfFolderOnDisk, WhatIsThereInsteadIsNamed) {
  EXPECT_THAT(Refusal(), HasSubstr("no config.json"));
  Write({{"config.json", "{}"}});
  EXPECT_THAT(Refusal(), HasSubstr("neither model.safetensors nor"));
  Write({{"pytorch_model.bin", "x"}});
  EXPECT_THAT(Refusal(), HasSubstr("pickles are not read"));
  Write({{"a.gguf", "x"}});
  EXPECT_THAT(Refusal(), HasSubstr("a.gguf: name that file"));
}

TEST_F(HfFolderOnDisk, AFileOfTheFolderSaysToNameTheFolder) {
  Write(Folder());
  for (const char* name : {"model.safetensors", "config.json"}) {
    const absl::Status status = OpenModelFile((folder_ / name).string()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(status), HasSubstr("name the folder")) << name;
  }
}

}  // namespace
}  // namespace antiphon::model
