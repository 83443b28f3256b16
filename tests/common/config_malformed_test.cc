// Configurations that are refused, each with the part of the message that tells its author what to
// do. A line number is part of every message about a key.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/config.h"

namespace antiphon {
namespace {

struct Case {
  const char* yaml;
  const char* message;
};

const Case kCases[] = {
    // The file itself.
    {"", "f:1: version: the first key must be version: 1"},
    {"[]", "f:1: the file must hold keys"},
    {"hello", "f:1: the file must hold keys"},
    {"gateway: {}\nversion: 1\n", "the first key must be version: 1"},
    {"version: 2\n", "f:1: version: 2 is not 1, the only version"},
    {"version: one\n", "f:1: version: 'one' is not a whole number"},
    {"version:\nlog: {}\n", "f:1: version: has no value"},
    {"version: 1\nversion: 1\n", "f:2: key 'version' is there twice; the first is in line 1"},
    {"version: 1\nlog: {level: info\n", "this is not YAML"},
    {"version: 1\n\tlog: {}\n", "this is not YAML"},
    {"version: 1\nlog: \"unfinished\n", "f:2: log: must be a section"},
    {"version: 1\n---\nversion: 1\n", "second document"},
    {"version: 1\nlog: &a {level: info}\nslo: *a\n", "f:2: anchors (&name) are not accepted"},
    {"version: 1\nlog: *a\n", "f:2: "},
    {"version: 1\nlog: !!python/object:os.system {}\n", "f:2: tags"},
    {"version: 1\nlog: !x {level: info}\n", "f:2: tags"},
    {"version: 1\n? [a, b]\n: 1\n", "a key must be a plain word"},
    {"version: 1\nmodels: [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]\n",
     "nesting is deeper than 16"},
    // Keys.
    {"version: 1\ngatway: {}\n", "f:2: gatway: unknown key; did you mean gateway?"},
    {"version: 1\ngateway:\n  htp: {}\n",
     "f:3: gateway.htp: unknown key; did you mean gateway.http?"},
    {"version: 1\nlisten: x\n", "f:2: listen: unknown key; did you mean gateway.http.listen?"},
    {"version: 1\nzzzzzz: x\n", "f:2: zzzzzz: unknown key"},
    {"version: 1\n\"a\\nb\": x\n", "a\\nb: unknown key"},
    {"version: 1\nslo: {ttft: 1s, ttft: 2s}\n", "key 'ttft' is there twice"},
    {"version: 1\nmodels: [{pathh: x}]\n",
     "f:2: models[0].pathh: unknown key; did you mean models[0].path?"},
    // Shapes.
    {"version: 1\ngateway: 1\n", "f:2: gateway: must be a section"},
    {"version: 1\ngateway: []\n", "f:2: gateway: must be a section"},
    {"version: 1\nlog: {level: [info]}\n", "f:2: log.level: must be one value"},
    {"version: 1\nlog: {level: {a: b}}\n", "f:2: log.level: must be one value"},
    {"version: 1\nlog: {level: }\n", "f:2: log.level: has no value"},
    {"version: 1\nmodels: {path: x}\n", "f:2: models: must be a list; write \"- path"},
    {"version: 1\nmodels: x.gguf\n", "f:2: models: must be a list"},
    {"version: 1\nmodels: [x.gguf]\n", "f:2: models[0]: must be a section"},
    {"version: 1\nmodels: [~]\n", "f:2: models[0]: is empty"},
    {"version: 1\ncluster: {conductors: \"a:1\"}\n", "f:2: cluster.conductors: must be a list"},
    // Values.
    {"version: 1\nlog: {level: loud}\n", "'loud' is none of debug, info, warning, error"},
    {"version: 1\nlog: {format: xml}\n", "'xml' is none of text, json"},
    {"version: 1\nslo: {ttft: 30}\n",
     "slo.ttft: '30' is no duration: it has no unit; write e.g. 30s"},
    {"version: 1\nslo: {ttft: soon}\n", "slo.ttft: 'soon' is no duration"},
    {"version: 1\nslo: {ttft: -1s}\n", "slo.ttft: '-1s' is no duration"},
    {"version: 1\nslo: {ttft: 0s}\n", "slo.ttft: must be longer than 0s"},
    {"version: 1\nslo: {strict: yes}\n", "slo.strict: 'yes' is neither true nor false"},
    {"version: 1\nkvstore: {pool: 8}\n",
     "kvstore.pool: '8' is no size: it has no unit; write e.g. 8GiB"},
    {"version: 1\nkvstore: {pool: 8GB}\n", "unit 'GB' is none of B, KiB"},
    {"version: 1\nkvstore: {pool: 1MiB}\n", "kvstore.pool: 1MiB is less than 16MiB"},
    {"version: 1\ngateway: {max_body: 4GiB}\n", "gateway.max_body: 4GiB is not between"},
    {"version: 1\ngateway: {http: {listen: 8000}}\n", "gateway.http.listen: '8000' has no port"},
    {"version: 1\ngateway: {http: {listen: \"h:x\"}}\n", "has a port that is no number"},
    {"version: 1\ngateway: {http: {listen: \"h:70000\"}}\n", "has a port above 65535"},
    {"version: 1\ngateway: {http: {advertise: \":80\"}}\n", "gateway.http.advertise: needs a host"},
    {"version: 1\ngateway: {overload_status: 500}\n", "500 is none of 429, 503, 529"},
    {"version: 1\ngateway: {max_n: 0}\n", "gateway.max_n: 0 is not between 1 and 1024; e.g. 16"},
    {"version: 1\ngateway: {drain: {delay: off}}\n", "gateway.drain.delay: cannot be off"},
    {"version: 1\ngateway: {auth: {mode: maybe}}\n",
     "gateway.auth.mode: 'maybe' is none of keys, none"},
    {"version: 1\ngateway: {http: {listen: \"0.0.0.0:80\"}}\n", "set gateway.auth.keys_file"},
    {"version: 1\nworker: {threads: -1}\n", "worker.threads: '-1' is not a whole number"},
    {"version: 1\nworker: {threads: 1.5}\n", "worker.threads: '1.5' is not a whole number"},
    {"version: 1\nworker: {threads: 99999999999}\n", "is not a whole number from 0 to 4294967295"},
    {"version: 1\nworker: {block_tokens: 0}\n", "worker.block_tokens: 0 is not between 1 and 4096"},
    {"version: 1\nworker: {activations: slow}\n", "'slow' is none of fast, float"},
    {"version: 1\nworker: {instruction_set: avx}\n", "'avx' is none of auto, scalar, avx2"},
    {"version: 1\nconductor: {balancing_threshold: x}\n", "'x' is not a number"},
    {"version: 1\nconductor: {balancing_threshold: nan}\n", "'nan' is not a number"},
    {"version: 1\nconductor: {balancing_threshold: 0.5}\n", "is not between 1 and 1000"},
    {"version: 1\nconductor: {node_timeout: 10ms}\n", "conductor.node_timeout: is shorter than 1s"},
    {"version: 1\ncluster: {name: \"a b\"}\n", "cluster.name: 'a b' is no name"},
    {"version: 1\ncluster: {name: \"../x\"}\n", "is no name"},
    {"version: 1\ncluster: {conductors: []}\n", "cluster.conductors: is empty"},
    {"version: 1\ncluster: {conductors: [\":7401\"]}\n", "must name host and port"},
    {"version: 1\nmodels: [{name: m}]\n", "models[0]: has no path"},
    {"version: 1\nmodels: [{path: \"\"}]\n", "models[0].path: is empty"},
    {"version: 1\nmodels: [{path: a}, {path: b}]\n", "models: has more than one entry"},
    {"version: 1\nmodels: [{path: a, aliases: [a]}]\n", "models[0].aliases: 'a' is used twice"},
    {"version: 1\nmodels: [{path: a, sampling: {temperature: 9}}]\n",
     "models[0].sampling.temperature: 9 is not between 0 and 2"},
    {"version: 1\nmodels: [{path: a, sampling: {top_p: -1}}]\n", "is not between 0 and 1"},
};

TEST(ConfigMalformedTest, EachIsRefusedWithASentenceThatNamesThePlace) {
  for (const Case& c : kCases) {
    const auto config = ParseConfig(c.yaml, "f");
    ASSERT_FALSE(config.ok()) << c.yaml;
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << c.yaml;
    EXPECT_THAT(std::string(config.status().message()), ::testing::HasSubstr(c.message)) << c.yaml;
  }
  static_assert(std::size(kCases) >= 40);
}

TEST(ConfigMalformedTest, BombsAreRefusedBeforeTheyGrow) {
  std::string bomb = "version: 1\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 20; ++i) {
    const std::string p = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + p;
    for (int k = 0; k < 9; ++k) bomb += "," + p;
    bomb += "]\n";
  }
  EXPECT_FALSE(ParseConfig(bomb, "f").ok());
  EXPECT_FALSE(ParseConfig("version: 1\na: " + std::string(100'000, '['), "f").ok());
  EXPECT_FALSE(ParseConfig("version: 1\na: " + std::string(100'000, '{'), "f").ok());
  EXPECT_FALSE(ParseConfig("version: 1\na: '" + std::string(1 << 20, 'x') + "'\n", "f").ok());
  std::string many = "version: 1\nmodels: [";
  for (int i = 0; i < 50'000; ++i) many += "1,";
  EXPECT_FALSE(ParseConfig(many + "]\n", "f").ok());
  EXPECT_FALSE(ParseConfig(std::string("version: 1\n\0x", 13), "f").ok());
}

}  // namespace
}  // namespace antiphon
