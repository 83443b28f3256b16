#include "gateway/auth.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>

#include "common/block_key.h"
#include "common/thread.h"
#include "gateway/prepare.h"

namespace antiphon::gateway {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Entry(const std::string& name, const std::string& tenant, const std::string& key) {
  return "- name: " + name + "\n  tenant: " + tenant + "\n  sha256: " + Sha256Hex(key) + "\n";
}

class KeysFile {
 public:
  KeysFile() {
    std::string pattern = testing::TempDir() + "/antiphon-keys-XXXXXX";
    const int fd = mkstemp(pattern.data());
    close(fd);
    path_ = pattern;
  }
  ~KeysFile() { std::filesystem::remove(path_); }
  void Write(const std::string& text) {
    // As an operator's tool would: a whole new file takes the old one's place.
    const std::string next = path_ + ".next";
    std::ofstream(next) << text;
    std::filesystem::rename(next, path_);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(AuthTest, WithoutAFileEverybodyIsTheDefaultTenant) {
  const auto auth = Auth::Create("");
  ASSERT_TRUE(auth.ok());
  EXPECT_TRUE((*auth)->open());
  EXPECT_EQ(*(*auth)->TenantOf(""), "default");
  EXPECT_EQ(*(*auth)->TenantOf("Bearer anything"), "default");
  EXPECT_THAT((*auth)->tenants(), ElementsAre("default"));
  EXPECT_TRUE((*auth)->Reload().ok());
}

TEST(AuthTest, AKeyGivesItsTenant) {
  KeysFile file;
  file.Write(Entry("ann", "red", "key-a") + Entry("bob", "blue", "key-b") +
             Entry("cleo", "red", "key c with spaces"));
  const auto auth = Auth::Create(file.path());
  ASSERT_TRUE(auth.ok()) << auth.status();
  EXPECT_FALSE((*auth)->open());
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key-a"), "red");
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key-b"), "blue");
  EXPECT_EQ(*(*auth)->TenantOf("bearer key-a"), "red");  // the scheme has no case
  EXPECT_EQ(*(*auth)->TenantOf("BEARER  key-a"), "red");
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key c with spaces"), "red");
  EXPECT_THAT((*auth)->tenants(), ElementsAre("blue", "red"));
}

TEST(AuthTest, EverythingElseIsRefusedAndSaysHow) {
  KeysFile file;
  file.Write(Entry("ann", "red", "key-a"));
  const auto auth = Auth::Create(file.path());
  ASSERT_TRUE(auth.ok()) << auth.status();
  const struct {
    std::string header;
    const char* says;
  } kCases[] = {
      {"", "didn't provide"},
      {"key-a", "Bearer"},
      {"Bearer", "Bearer"},
      {"Basic a2V5LWE=", "Bearer"},
      {"Bearerkey-a", "Bearer"},
      {"Bearer ", "Incorrect"},
      {"Bearer key-A", "Incorrect"},
      {"Bearer key-", "Incorrect"},
      {"Bearer key-a ", "Incorrect"},
      {"Bearer key-a\n", "Incorrect"},
      {std::string("Bearer key-a\0", 13), "Incorrect"},
      {"Bearer " + Sha256Hex("key-a"), "Incorrect"},  // who reads the file cannot use it
      {"Bearer " + std::string(100'000, 'x'), "Incorrect"},
      {"Bearer \xff\xfe", "Incorrect"},
  };
  for (const auto& c : kCases) {
    const auto tenant = (*auth)->TenantOf(c.header);
    ASSERT_FALSE(tenant.ok()) << c.header;
    EXPECT_EQ(tenant.status().code(), absl::StatusCode::kUnauthenticated);
    EXPECT_THAT(std::string(tenant.status().message()), HasSubstr(c.says)) << c.header;
    EXPECT_THAT(std::string(tenant.status().message()), testing::Not(HasSubstr("key-")));
  }
}

TEST(AuthTest, AFileThatCannotBeUsedNamesTheLine) {
  const std::string good = Entry("ann", "red", "key-a");
  const struct {
    std::string yaml;
    const char* says;
  } kCases[] = {
      {"", "expected a list"},
      {"[]", "no keys"},
      {"name: ann", "expected a list"},
      {"- ann", "keys.yaml:1: expected {name, tenant, sha256}"},
      {"- name: a\n  tenant: t\n", "sha256 is missing"},
      {"- name: a\n  sha256: " + Sha256Hex("x") + "\n", "tenant is missing"},
      {"- tenant: a\n  sha256: " + Sha256Hex("x") + "\n", "name is missing"},
      {"- name: a\n  tenant: ''\n  sha256: " + Sha256Hex("x") + "\n", "tenant must be"},
      {"- name: a\n  tenant: [t]\n  sha256: " + Sha256Hex("x") + "\n", "tenant must be"},
      {"- name: a\n  tenant: t\n  sha256: plain-key\n", "keys.yaml:3: sha256 must be 64"},
      {"- name: a\n  tenant: t\n  sha256: " + std::string(64, 'A') + "\n", "lower-case"},
      {good + "- name: b\n  tenant: t\n  key: k\n", "keys.yaml:6: key: unknown"},
      {good + Entry("ann", "blue", "key-b"), "ann is there twice"},
      {good + Entry("bob", "blue", "key-a"), "the key of bob is another's"},
      {"- name: a\n\ttenant: t\n", "keys.yaml:2"},
      {"- {name: a", "keys.yaml:"},
      {std::string("\xff\xfe\x00\x01", 4), "keys.yaml"},
  };
  for (const auto& c : kCases) {
    const auto keys = ParseKeys(c.yaml, "keys.yaml");
    ASSERT_FALSE(keys.ok()) << c.yaml;
    EXPECT_EQ(keys.status().code(), absl::StatusCode::kInvalidArgument) << c.yaml;
    EXPECT_THAT(std::string(keys.status().message()), HasSubstr(c.says)) << c.yaml;
  }
  EXPECT_EQ(Auth::Create("/nowhere/keys.yaml").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Auth::Create(testing::TempDir()).ok());  // a folder
}

TEST(AuthTest, ReloadTakesNewKeysAndKeepsOldOnesWhenTheFileIsBad) {
  KeysFile file;
  file.Write(Entry("ann", "red", "key-a"));
  const auto auth = Auth::Create(file.path());
  ASSERT_TRUE(auth.ok()) << auth.status();
  file.Write("- nonsense");
  EXPECT_FALSE((*auth)->Reload().ok());
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key-a"), "red");
  std::filesystem::remove(file.path());
  EXPECT_FALSE((*auth)->Reload().ok());
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key-a"), "red");
  file.Write(Entry("bob", "blue", "key-b"));
  EXPECT_TRUE((*auth)->Reload().ok());
  EXPECT_FALSE((*auth)->TenantOf("Bearer key-a").ok());
  EXPECT_EQ(*(*auth)->TenantOf("Bearer key-b"), "blue");
  EXPECT_THAT((*auth)->tenants(), ElementsAre("blue"));
}

TEST(AuthTest, ReloadsWhileKeysAreChecked) {
  KeysFile file;
  const std::string always = Entry("ann", "red", "key-a");
  file.Write(always);
  const auto auth = Auth::Create(file.path());
  ASSERT_TRUE(auth.ok()) << auth.status();
  std::atomic<bool> stop{false};
  Thread reloads("reloads", [&] {
    for (int i = 0; i < 200; ++i) {
      file.Write(i % 2 == 0 ? always + Entry("bob", "blue", "key-b") : always);
      EXPECT_TRUE((*auth)->Reload().ok());
    }
    stop = true;
  });
  while (!stop) {
    ASSERT_EQ(*(*auth)->TenantOf("Bearer key-a"), "red");
    const auto other = (*auth)->TenantOf("Bearer key-b");
    if (other.ok()) {
      ASSERT_EQ(*other, "blue");
    }
  }
}

TEST(AuthTest, TenantsHaveCachesOfTheirOwn) {
  EXPECT_EQ(TenantSalt("c", "red"), TenantSalt("c", "red"));
  EXPECT_NE(TenantSalt("c", "red"), TenantSalt("c", "blue"));
  EXPECT_NE(TenantSalt("c", "red"), TenantSalt("d", "red"));
  // No pair of names reads as another pair.
  EXPECT_NE(TenantSalt("a", "b c"), TenantSalt("a b", "c"));
  EXPECT_NE(TenantSalt("a 1", "b"), TenantSalt("a", "1 b"));
}

}  // namespace
}  // namespace antiphon::gateway
