// `promtool check metrics` on a page with every kind of instrument. Exits 77 without promtool.
#include <cstdio>
#include <cstdlib>

#include "common/metrics.h"

int main() {
  if (std::system("promtool --version >/dev/null 2>&1") != 0) return 77;
  antiphon::Registry registry(antiphon::Labels{{"daemon", "gateway"}});
  registry.AddCounter("antiphon_output_tokens_total", "Tokens.", {{"model", "a\"b\\c"}}).Add(3);
  registry.AddGauge("antiphon_requests_inflight", "Requests that run.", {{"model", "m"}}).Set(2);
  registry.AddHistogram("antiphon_time_to_first_token_seconds", "TTFT.", antiphon::TtftBuckets())
      .Observe(0.2);
  registry.AddGaugeFunction("antiphon_kv_cache_usage_ratio", "Use of the cache.", {},
                            [] { return 0.5; });
  FILE* promtool = popen("promtool check metrics", "w");
  if (promtool == nullptr) return 1;
  const std::string page = registry.Render();
  std::fwrite(page.data(), 1, page.size(), promtool);
  const int rc = pclose(promtool);
  if (rc != 0) std::fprintf(stderr, "%s", page.c_str());
  return rc == 0 ? 0 : 1;
}
