#include "cli/cluster_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "common/daemon.h"
#include "common/logging.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFileName = "cluster.json";

std::string BaseFolder(const char* variable, const char* below_home) {
  const std::string set = Environment(variable, "");
  if (!set.empty() && set[0] == '/') return set;
  return Environment("HOME", "/root") + below_home;
}

std::string Text(const boost::json::object& object, const char* key) {
  const auto* value = object.if_contains(key);
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : "";
}

absl::StatusOr<ClusterFile> ReadClusterFile(const fs::path& file) {
  std::ifstream in(file);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  boost::json::error_code error;
  const auto json = boost::json::parse(text, error);
  if (error || !json.is_object()) return absl::NotFoundError("no cluster file");
  const auto& object = json.get_object();
  ClusterFile cluster;
  cluster.name = Text(object, "name");
  cluster.http = Text(object, "http");
  cluster.grpc = Text(object, "grpc");
  cluster.conductor = Text(object, "conductor");
  cluster.model = Text(object, "model");
  cluster.log_folder = Text(object, "log_folder");
  if (const auto* pid = object.if_contains("pid"); pid != nullptr && pid->is_int64()) {
    cluster.pid = static_cast<int>(pid->get_int64());
  }
  if (const auto* ready = object.if_contains("ready"); ready != nullptr && ready->is_bool()) {
    cluster.ready = ready->get_bool();
  }
  if (const auto* children = object.if_contains("children");
      children != nullptr && children->is_array()) {
    for (const auto& child : children->get_array()) {
      if (!child.is_object()) continue;
      const auto& c = child.get_object();
      cluster.children.push_back({Text(c, "name"), Text(c, "daemon"), Text(c, "ops")});
    }
  }
  return cluster;
}

}  // namespace

std::string RuntimeRoot() {
  const std::string runtime = Environment("XDG_RUNTIME_DIR", "");
  if (!runtime.empty() && runtime[0] == '/') return runtime + "/antiphon";
  return fmt::format("/tmp/antiphon-{}", geteuid());
}

std::string StateFolder(const std::string& name) {
  return fmt::format("{}/antiphon/{}", BaseFolder("XDG_STATE_HOME", "/.local/state"), name);
}

std::string DefaultModelPath() {
  return BaseFolder("XDG_DATA_HOME", "/.local/share") +
         "/antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf";
}

absl::Status MakePrivateFolder(const std::string& path) {
  const fs::path parent = fs::path(path).parent_path();
  std::error_code error;
  if (!fs::exists(parent, error)) RETURN_IF_ERROR(MakePrivateFolder(parent.string()));
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::PermissionDeniedError(
        fmt::format("cannot make the folder {}: {}", path, std::strerror(errno)));
  }
  struct stat st;
  if (lstat(path.c_str(), &st) != 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid()) {
    return absl::PermissionDeniedError(
        fmt::format("{} is not a folder of this user; remove it or set XDG_RUNTIME_DIR", path));
  }
  return absl::OkStatus();
}

absl::Status WriteClusterFile(const std::string& runtime_folder, const ClusterFile& cluster) {
  boost::json::object object;
  object["name"] = cluster.name;
  object["pid"] = cluster.pid;
  object["http"] = cluster.http;
  object["grpc"] = cluster.grpc;
  object["conductor"] = cluster.conductor;
  object["model"] = cluster.model;
  object["log_folder"] = cluster.log_folder;
  object["ready"] = cluster.ready;
  boost::json::array children;
  for (const ClusterFile::Child& c : cluster.children) {
    children.push_back({{"name", c.name}, {"daemon", c.daemon}, {"ops", c.ops}});
  }
  object["children"] = std::move(children);
  const std::string file = fmt::format("{}/{}", runtime_folder, kFileName);
  {
    std::ofstream out(file + ".new");
    out << boost::json::serialize(object) << "\n";
    if (!out.flush()) {
      return absl::UnavailableError(fmt::format("cannot write {}: {}", file, std::strerror(errno)));
    }
  }
  // Readers see the old content or the new one.
  std::error_code error;
  fs::rename(file + ".new", file, error);
  return error ? absl::UnavailableError(fmt::format("cannot write {}", file)) : absl::OkStatus();
}

void RemoveClusterFile(const std::string& runtime_folder) {
  std::error_code error;
  fs::remove(fmt::format("{}/{}", runtime_folder, kFileName), error);
}

std::vector<ClusterFile> RunningClusters() {
  std::vector<ClusterFile> clusters;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(RuntimeRoot(), error)) {
    auto cluster = ReadClusterFile(entry.path() / kFileName);
    if (cluster.ok() && cluster->pid > 0 && kill(cluster->pid, 0) == 0) {
      clusters.push_back(*std::move(cluster));
    }
  }
  std::sort(clusters.begin(), clusters.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return clusters;
}

absl::StatusOr<ClusterFile> FindCluster(const std::string& name) {
  const std::vector<ClusterFile> clusters = RunningClusters();
  if (name.empty() && clusters.size() == 1) return clusters[0];
  std::vector<std::string> names;
  for (const ClusterFile& cluster : clusters) {
    if (cluster.name == (name.empty() ? kDefaultCluster : name)) return cluster;
    names.push_back(cluster.name);
  }
  if (names.empty()) {
    return absl::UnavailableError(
        "no cluster runs here; start one with antiphon up, or name one with --target HOST:PORT");
  }
  return absl::UnavailableError(
      fmt::format("no cluster of that name runs here; --target may be {}", fmt::join(names, ", ")));
}

}  // namespace antiphon::cli
