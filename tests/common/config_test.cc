#include "common/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "antiphon/v1/config.pb.h"
#include "common/config/flags.h"
#include "common/config/spelling.h"

namespace antiphon {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class ConfigFolder {
 public:
  ConfigFolder() {
    std::string name = (fs::temp_directory_path() / "antiphon-config-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~ConfigFolder() { fs::remove_all(path_); }
  std::string Write(const std::string& name, const std::string& text) {
    fs::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name) << text;
    return (path_ / name).string();
  }

 private:
  fs::path path_;
};

TEST(ConfigTest, DefaultsAreThoseOfTheSurface) {
  const LoadedConfig config;
  EXPECT_EQ(config->version(), 1u);
  EXPECT_EQ(config->gateway().http().listen(), "127.0.0.1:8000");
  EXPECT_EQ(config->gateway().grpc().listen(), "127.0.0.1:8001");
  EXPECT_EQ(config->gateway().ops().listen(), "127.0.0.1:7500");
  EXPECT_EQ(config->conductor().rpc().listen(), "127.0.0.1:7401");
  EXPECT_EQ(config->kvstore().rpc().listen(), "127.0.0.1:7402");
  EXPECT_EQ(config->kvstore().data().listen(), "127.0.0.1:7403");
  EXPECT_EQ(config->worker().prefill().listen(), "127.0.0.1:7404");
  EXPECT_EQ(config->worker().decode().listen(), "127.0.0.1:7405");
  EXPECT_EQ(config->worker().decode_ops().listen(), "127.0.0.1:7505");
  EXPECT_EQ(ToDuration(config->slo().ttft()), absl::Seconds(30));
  EXPECT_EQ(ToDuration(config->slo().tbt()), absl::InfiniteDuration());
  EXPECT_EQ(ToDuration(config->gateway().drain().deadline()), absl::Seconds(60));
  EXPECT_EQ(ToDuration(config->worker().drain().deadline()), absl::Seconds(120));
  EXPECT_GE(config->kvstore().pool().bytes(), 16u << 20);
  EXPECT_LE(config->kvstore().pool().bytes(), 8ull << 30);
  EXPECT_FALSE(config->cluster().runtime_dir().empty());
}

TEST(ConfigTest, AFileSetsWhatItNamesAndNothingElse) {
  const auto config = ParseConfig(
      "version: 1\n"
      "models:\n"
      "  - path: /m/SmolLM2.Q4_1.gguf\n"
      "    aliases: [small, \"gpt-4\"]\n"
      "    sampling: {temperature: 0.2, top_k: 40}\n"
      "slo: {ttft: 2s, tbt: 50ms, strict: true}\n"
      "gateway:\n"
      "  http: {listen: \"127.0.0.1:9000\"}\n"
      "kvstore: {pool: 2GiB}\n",
      "a.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ((*config)->models(0).name(), "SmolLM2.Q4_1") << "the file's stem";
  EXPECT_EQ((*config)->models(0).aliases(1), "gpt-4");
  EXPECT_EQ((*config)->models(0).sampling().temperature(), 0.2);
  EXPECT_EQ(ToDuration((*config)->slo().tbt()), absl::Milliseconds(50));
  EXPECT_EQ((*config)->gateway().http().listen(), "127.0.0.1:9000");
  EXPECT_EQ((*config)->gateway().grpc().listen(), "127.0.0.1:8001");
  EXPECT_EQ((*config)->kvstore().pool().bytes(), 2ull << 30);
  EXPECT_EQ(config->origins().at("kvstore.pool"), "a.yaml:9");
  EXPECT_EQ(config->origins().at("gateway.http.listen"), "a.yaml:8");
  EXPECT_EQ(config->origins().at("gateway.grpc.listen"), "default");
}

TEST(ConfigTest, AModelWithoutANameIsCalledLikeItsFileOrFolder) {
  const auto name = [](const std::string& path) {
    const auto config = ParseConfig("version: 1\nmodels: [{path: " + path + "}]\n", "a.yaml");
    return config.ok() ? (*config)->models(0).name() : std::string(config.status().message());
  };
  EXPECT_EQ(name("/m/small model.gguf"), "small-model");
  EXPECT_EQ(name("/m/Llama-3.2-1B"), "Llama-3.2-1B");
  EXPECT_EQ(name("/m/SmolLM2-1.7B/"), "SmolLM2-1.7B");
  EXPECT_EQ(name("/m/SmolLM2-1.7B/."), "SmolLM2-1.7B");
  EXPECT_EQ(name("/"), "model");
}

TEST(ConfigTest, LaterSourcesWinInTheDocumentedOrder) {
  ConfigFolder folder;
  const std::string file =
      folder.Write("antiphon.yaml",
                   "version: 1\nlog: {level: debug, format: json}\nworker: {threads: 1}\n"
                   "cluster: {name: a, conductors: [\"a:1\", \"b:2\"]}\n");
  folder.Write("conf.d/20.yaml", "worker: {threads: 3}\n");
  folder.Write("conf.d/10.yaml", "version: 1\nworker: {threads: 2, chunk_tokens: 64}\n");
  folder.Write("conf.d/ignored.txt", "nonsense");
  ConfigSource source{.file = file, .file_required = true};
  source.flags = {{"log.level", "error"}, {"cluster.conductors", "c:3"}};
  const auto config = LoadConfig(source);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ((*config)->log().level(), "error");
  EXPECT_EQ((*config)->log().format(), "json");
  EXPECT_EQ((*config)->worker().threads(), 3u);
  EXPECT_EQ((*config)->worker().chunk_tokens(), 64u);
  ASSERT_EQ((*config)->cluster().conductors_size(), 1) << "a list replaces the earlier one";
  EXPECT_EQ(config->origins().at("log.level"), "--log.level");
  EXPECT_THAT(config->origins().at("worker.threads"), HasSubstr("20.yaml:1"));
}

TEST(ConfigTest, FlagsTakeListsAndModels) {
  ConfigSource source;
  source.file = "";
  source.flags = {{"cluster.conductors", "a:1,b:2"},
                  {"models", "[{path: \"/m/x y.gguf\", aliases: [z]}]"},
                  {"kvstore.pool", "64MiB"}};
  const auto config = LoadConfig(source);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ((*config)->cluster().conductors(1), "b:2");
  EXPECT_EQ((*config)->models(0).path(), "/m/x y.gguf");
  EXPECT_EQ((*config)->models(0).name(), "x-y");
}

TEST(ConfigTest, ABadFlagNamesItself) {
  const auto error = [](const std::string& path, const std::string& value) {
    ConfigSource source;
    source.flags = {{path, value}};
    return std::string(LoadConfig(source).status().message());
  };
  EXPECT_EQ(error("gateway.htp.listen", "x"),
            "--gateway.htp.listen: gateway.htp: unknown key; did you mean gateway.http?");
  EXPECT_THAT(error("worker.threads", "many"),
              HasSubstr("--worker.threads: 'many' is not a whole number"));
  EXPECT_THAT(error("gateway.http.listen.port", "1"), HasSubstr("has no keys below it"));
  EXPECT_THAT(error("models.path", "m"), HasSubstr("is a list"));
  EXPECT_THAT(error("models", "[{"), HasSubstr("--models"));
  EXPECT_THAT(error("gateway", "x"), HasSubstr("must be a section"));
}

TEST(ConfigTest, AMissingFileIsAnErrorOnlyWhenItWasNamed) {
  EXPECT_EQ(LoadConfig({.file = "/nowhere/antiphon.yaml", .file_required = true}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(ConfigTest, PrintShowsValuesWithOriginsAndReadsBack) {
  const auto config = ParseConfig(
      "version: 1\nmodels: [{path: \"/m/a b#.gguf\", name: m}]\nslo: {tbt: off}\n", "p.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  const std::string printed = config->Print();
  EXPECT_THAT(printed, HasSubstr("# p.yaml:2\n"));
  EXPECT_THAT(printed, HasSubstr("  tbt: off"));
  EXPECT_THAT(printed, HasSubstr("# default\n"));
  const auto again = ParseConfig(printed, "q.yaml");
  ASSERT_TRUE(again.ok()) << again.status() << printed;
  EXPECT_EQ((*again)->SerializeAsString(), (*config)->SerializeAsString());
}

TEST(ConfigTest, EveryProblemIsListedUpToTen) {
  std::string yaml = "version: 1\n";
  for (int i = 0; i < 30; ++i) yaml += "nonsense" + std::to_string(i) + ": 1\n";
  const std::string message(ParseConfig(yaml, "f").status().message());
  EXPECT_EQ(std::count(message.begin(), message.end(), '\n'), 9);
  EXPECT_THAT(message, HasSubstr("f:3: nonsense1: unknown key"));
}

TEST(ConfigTest, ReachableListenersNeedKeysOrAWrittenNone) {
  const std::string open = "version: 1\ngateway:\n  http: {listen: \":8000\"}\n";
  EXPECT_THAT(std::string(ParseConfig(open, "f").status().message()),
              HasSubstr("f:3: gateway.http.listen: :8000 can be reached"));
  EXPECT_TRUE(ParseConfig(open + "  auth: {mode: none}\n", "f").ok());
  EXPECT_TRUE(ParseConfig(open + "  auth: {keys_file: k}\n", "f").ok());
}

TEST(ConfigTest, DurationsCarryUnits) {
  EXPECT_EQ(*ParseDuration("30s"), absl::Seconds(30));
  EXPECT_EQ(*ParseDuration("250ms"), absl::Milliseconds(250));
  EXPECT_EQ(*ParseDuration("1m30s"), absl::Seconds(90));
  EXPECT_EQ(*ParseDuration("1.5h"), absl::Minutes(90));
  EXPECT_EQ(*ParseDuration("off"), absl::InfiniteDuration());
  for (const char* bad :
       {"", "30", "s", "30 s", "-1s", "1.2.3s", "1e3s", "30S", "100000000h", "5d"}) {
    EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
    EXPECT_THAT(std::string(ParseDuration(bad).status().message()), HasSubstr("30s")) << bad;
  }
}

TEST(ConfigTest, SizesCarryUnits) {
  EXPECT_EQ(*ParseByteSize("8GiB"), 8ull << 30);
  EXPECT_EQ(*ParseByteSize("1.5KiB"), 1536u);
  EXPECT_EQ(*ParseByteSize("4096B"), 4096u);
  for (const char* bad : {"", "8", "GiB", "8GB", "8G", "8 GiB", "-8GiB", "9999999TiB", "8GiB8"}) {
    EXPECT_FALSE(ParseByteSize(bad).ok()) << bad;
    EXPECT_THAT(std::string(ParseByteSize(bad).status().message()), HasSubstr("8GiB")) << bad;
  }
}

TEST(ConfigTest, EditDistanceCountsSwapsOnce) {
  EXPECT_EQ(EditDistance("http", "http"), 0);
  EXPECT_EQ(EditDistance("htpt", "http"), 1);
  EXPECT_EQ(EditDistance("htp", "http"), 1);
  EXPECT_EQ(EditDistance("", "abc"), 3);
}

TEST(FlagsTest, ReadsTheDaemonsFlags) {
  const char* argv[] = {"x",       "--config", "f", "--node=n",
                        "--a.b=c", "--a.d",    "e", "--check-config"};
  const auto flags = ParseDaemonFlags(8, argv);
  ASSERT_TRUE(flags.ok()) << flags.status();
  EXPECT_EQ(flags->source.file, "f");
  EXPECT_TRUE(flags->source.file_required);
  EXPECT_EQ(flags->node, "n");
  EXPECT_TRUE(flags->check_config);
  ASSERT_EQ(flags->source.flags.size(), 2u);
  EXPECT_EQ(flags->source.flags[1], std::pair(std::string("a.d"), std::string("e")));
}

TEST(FlagsTest, NamesWhatItDoesNotKnow) {
  const auto error = [](std::vector<const char*> argv) {
    argv.insert(argv.begin(), "x");
    return std::string(
        ParseDaemonFlags(static_cast<int>(argv.size()), argv.data()).status().message());
  };
  EXPECT_THAT(error({"serve"}), HasSubstr("unexpected argument 'serve'"));
  EXPECT_THAT(error({"--port=1"}), HasSubstr("unknown flag '--port=1'"));
  EXPECT_THAT(error({"--config"}), HasSubstr("needs a value"));
  EXPECT_THAT(error({"--help=1"}), HasSubstr("takes no value"));
  EXPECT_THAT(error({"--node=a b"}), HasSubstr("--node"));
  EXPECT_THAT(error({"--announce-fd=1"}), HasSubstr("--announce-fd"));
}

}  // namespace
}  // namespace antiphon
