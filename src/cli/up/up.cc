#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "antiphon/v1/config.pb.h"
#include "cli/arguments.h"
#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "cli/up/checks.h"
#include "cli/up/plan.h"
#include "cli/up/supervisor.h"
#include "common/config.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

constexpr const char* kHelp =
    "usage: antiphon up [--model PATH] [--listen 127.0.0.1:8000] [--prefill N] [--decode M]\n"
    "                   [--api-key-file FILE] [--name NAME] [--config FILE]\n"
    "                   [--section.key=value ...]\n\n"
    "Starts a gateway, a conductor, a KV store, N prefill and M decode workers on this machine "
    "and\n"
    "prints \"ready http://HOST:PORT\" when they serve. Dead children are restarted. Ctrl-C "
    "stops:\n"
    "running requests have 10 s, a second Ctrl-C ends them at once.\n\n"
    "  --model PATH         a GGUF file, or a folder of Hugging Face with safetensors; default:\n"
    "                       the model that scripts/quickstart fetches\n"
    "  --listen HOST:PORT   of the HTTP API; port 0 is automatic\n"
    "  --api-key-file FILE  keys (name, tenant, sha256) that clients must have\n"
    "  --name NAME          of the cluster; default local\n"
    "  --section.key=value  any key of the configuration, e.g. --kvstore.pool=2GiB\n";

bool HasKey(const Arguments& arguments, const std::string& key) {
  for (const auto& [name, value] : arguments.config_keys) {
    if (name == key) return true;
  }
  return false;
}

std::string HostName() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0 || name[0] == 0) return "localhost";
  return name;
}

// When another antiphon started us, we end with it.
void FollowParent() {
  const long long parent = std::atoll(Environment("ANTIPHON_PARENT_PID", "0").c_str());
  if (parent <= 0 || getppid() != parent) return;
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);
}

// Held as long as the cluster runs. UNAVAILABLE when another one has the name.
absl::StatusOr<int> LockFolder(const std::string& folder, const std::string& name) {
  const std::string file = folder + "/up.lock";
  const int fd = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return absl::UnavailableError(fmt::format("cannot write {}", file));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    close(fd);
    return absl::UnavailableError(fmt::format(
        "a cluster named {} runs already (see antiphon status); stop it, or start this one with "
        "another --name",
        name));
  }
  return fd;
}

absl::Status CheckPrograms(const std::string& folder) {
  for (const char* name : {"conductor", "kvstore", "prefill", "decode", "gateway"}) {
    const std::string program = fmt::format("{}/antiphon-{}", folder, name);
    if (access(program.c_str(), X_OK) != 0) {
      return absl::UnavailableError(
          fmt::format("there is no program {}; build or install all of them together", program));
    }
  }
  return absl::OkStatus();
}

// Everything that can be known before the first child starts.
absl::StatusOr<SupervisorOptions> Prepare(const Arguments& arguments, int& lock_fd) {
  UpOptions options;
  options.name = arguments.Get("name", kDefaultCluster);
  ASSIGN_OR_RETURN(options.prefill, IntFlag(arguments, "prefill", 1, 1, 64));
  ASSIGN_OR_RETURN(options.decode, IntFlag(arguments, "decode", 1, 1, 64));
  options.config_file = arguments.Get("config");
  options.api_key_file = arguments.Get("api-key-file");
  options.listen = arguments.Get("listen", "127.0.0.1:8000");
  options.keys = arguments.config_keys;
  const bool default_model = !arguments.Has("model");
  options.model = std::filesystem::absolute(arguments.Get("model", DefaultModelPath())).string();
  options.runtime_folder = fmt::format("{}/{}", RuntimeRoot(), options.name);

  // The flags of the children are checked here, so that a mistake is told once.
  std::vector<std::pair<std::string, std::string>> flags = {
      {"cluster.name", options.name},
      {"models", fmt::format("[{{path: \"{}\"}}]", EscapeForLog(options.model, true))},
      {"gateway.http.listen", options.listen}};
  if (!options.api_key_file.empty()) {
    flags.emplace_back("gateway.auth.keys_file", options.api_key_file);
  }
  flags.insert(flags.end(), options.keys.begin(), options.keys.end());
  ASSIGN_OR_RETURN(const LoadedConfig config,
                   LoadConfig({.file = options.config_file,
                               .file_required = !options.config_file.empty(),
                               .flags = flags}));
  if (!config->gateway().auth().keys_file().empty()) {
    std::error_code error;
    if (!std::filesystem::exists(config->gateway().auth().keys_file(), error)) {
      return absl::NotFoundError(
          fmt::format("no such key file: {}", config->gateway().auth().keys_file()));
    }
  }
  uint64_t weights_bytes = 0;
  RETURN_IF_ERROR(CheckModel(options.model, default_model, weights_bytes));
  const std::string listen = config->gateway().http().listen();
  RETURN_IF_ERROR(CheckListen(listen, "--listen"));
  if (!HasKey(arguments, "gateway.grpc.listen")) {
    const auto address = ParseHostPort(listen);
    options.grpc_listen = GrpcListenFor(listen, address.ok() && PortIsFree(address->host, 8001));
  } else {
    options.grpc_listen = config->gateway().grpc().listen();
    RETURN_IF_ERROR(CheckListen(options.grpc_listen, "--gateway.grpc.listen"));
  }
  const auto origin = config.origins().find("kvstore.pool");
  ASSIGN_OR_RETURN(
      options.pool_bytes,
      FitPool({.pool_bytes = config->kvstore().pool().bytes(),
               .pool_was_chosen = origin != config.origins().end() && origin->second != "default",
               .weights_bytes = weights_bytes,
               .workers = options.prefill + options.decode,
               .available_bytes = MemoryAvailableBytes()}));

  SupervisorOptions supervisor;
  supervisor.program_folder =
      std::filesystem::read_symlink("/proc/self/exe").parent_path().string();
  RETURN_IF_ERROR(CheckPrograms(supervisor.program_folder));
  RETURN_IF_ERROR(MakePrivateFolder(RuntimeRoot()));
  RETURN_IF_ERROR(MakePrivateFolder(options.runtime_folder));
  ASSIGN_OR_RETURN(lock_fd, LockFolder(options.runtime_folder, options.name));
  supervisor.log_folder = StateFolder(options.name);
  RETURN_IF_ERROR(MakePrivateFolder(supervisor.log_folder));
  supervisor.children = PlanCluster(options, HostName());
  supervisor.runtime_folder = options.runtime_folder;
  supervisor.cluster.name = options.name;
  supervisor.cluster.pid = getpid();
  supervisor.cluster.model = config->models(0).name();
  supervisor.cluster.log_folder = supervisor.log_folder;
  supervisor.terminal = isatty(STDERR_FILENO) != 0;
  supervisor.with_keys = !config->gateway().auth().keys_file().empty();
  fmt::print("antiphon {}: {} ({} MB), {} prefill, {} decode, KV pool {} MiB\n", kVersion,
             supervisor.cluster.model, weights_bytes / 1'000'000, options.prefill, options.decode,
             options.pool_bytes >> 20);
  return supervisor;
}

}  // namespace

int RunUp(const CommandArguments& arguments) {
  const auto parsed = ParseArguments(arguments, {.values = {"model", "listen", "prefill", "decode",
                                                            "api-key-file", "name", "config"},
                                                 .switches = {"help"},
                                                 .config_keys = true});
  if (!parsed.ok()) return UsageError("up", parsed.status());
  if (parsed->switches.count("help") > 0) {
    fmt::print("{}", kHelp);
    return 0;
  }
  for (const char* key : {"cluster.name", "cluster.runtime_dir", "cluster.conductors", "models"}) {
    if (HasKey(*parsed, key)) {
      return UsageError("up", absl::InvalidArgumentError(fmt::format(
                                  "--{} is chosen by up itself; use --name and --model", key)));
    }
  }
  if (parsed->Has("listen") && HasKey(*parsed, "gateway.http.listen")) {
    return UsageError("up", absl::InvalidArgumentError(
                                "--listen and --gateway.http.listen are the same; give one"));
  }
  FollowParent();
  int lock_fd = -1;
  auto options = Prepare(*parsed, lock_fd);
  if (!options.ok()) return Failure("up", options.status());
  if (const std::string warning = ProcessorWarning(); !warning.empty()) {
    fmt::print(stderr, "warning: {}\n", warning);
  }
  std::fflush(stdout);
  const int code = Supervise(*std::move(options));
  close(lock_fd);
  return code;
}

}  // namespace antiphon::cli
