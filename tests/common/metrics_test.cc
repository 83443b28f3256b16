#include "common/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/thread.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

TEST(MetricsTest, RendersCountersGaugesAndHistogramsWithConstantLabels) {
  Registry registry(Labels{{"daemon", "gateway"}});
  registry.AddCounter("antiphon_requests_total", "Requests.", {{"status", "200"}}).Add(2);
  registry.AddGauge("antiphon_requests_inflight", "Now.").Set(1.5);
  Histogram& h = registry.AddHistogram("antiphon_wait_seconds", "Wait.", {0.1, 1});
  h.Observe(0.1);  // a bound belongs to its bucket
  h.Observe(0.5, 3);
  h.Observe(7);
  const std::string page = registry.Render();
  EXPECT_THAT(page, HasSubstr("# HELP antiphon_requests_total Requests.\n"
                              "# TYPE antiphon_requests_total counter\n"
                              "antiphon_requests_total{daemon=\"gateway\",status=\"200\"} 2\n"));
  EXPECT_THAT(page, HasSubstr("antiphon_requests_inflight{daemon=\"gateway\"} 1.5\n"));
  EXPECT_THAT(page, HasSubstr("antiphon_wait_seconds_bucket{daemon=\"gateway\",le=\"0.1\"} 1\n"
                              "antiphon_wait_seconds_bucket{daemon=\"gateway\",le=\"1\"} 4\n"
                              "antiphon_wait_seconds_bucket{daemon=\"gateway\",le=\"+Inf\"} 5\n"
                              "antiphon_wait_seconds_sum{daemon=\"gateway\"} 8.6\n"
                              "antiphon_wait_seconds_count{daemon=\"gateway\"} 5\n"));
}

TEST(MetricsTest, TheSameInstrumentTwiceIsOneInstrument) {
  Registry registry{Labels{}};
  Counter& a = registry.AddCounter("antiphon_a_total", "A.", {{"x", "1"}, {"y", "2"}});
  Counter& b = registry.AddCounter("antiphon_a_total", "A.", {{"y", "2"}, {"x", "1"}});
  EXPECT_EQ(&a, &b);
  EXPECT_NE(&a, &registry.AddCounter("antiphon_a_total", "A.", {{"x", "2"}, {"y", "2"}}));
  EXPECT_DEATH(registry.AddGauge("antiphon_a_total", "A."), "CHECK failed");
  EXPECT_DEATH(registry.AddCounter("antiphon_a_total", "B."), "CHECK failed");
  EXPECT_DEATH(registry.AddCounter("antiphon-a", "A."), "CHECK failed");
}

TEST(MetricsTest, FamiliesAreSortedAndLabelsEscaped) {
  Registry registry{Labels{}};
  registry.AddCounter("antiphon_z_total", "Z.");
  registry.AddCounter("antiphon_a_total", "A.", {{"v", "q\"b\\n\n"}});
  const std::string page = registry.Render();
  EXPECT_LT(page.find("antiphon_a_total"), page.find("antiphon_build_info"));
  EXPECT_LT(page.find("antiphon_build_info"), page.find("antiphon_z_total"));
  EXPECT_LT(page.find("antiphon_z_total"), page.find("process_cpu_seconds_total"));
  EXPECT_THAT(page, HasSubstr("antiphon_a_total{v=\"q\\\"b\\\\n\\n\"} 0\n"));
}

TEST(MetricsTest, KnowsTheProcess) {
  Registry registry{Labels{}};
  const std::string page = registry.Render();
  for (const char* name : {"process_cpu_seconds_total", "process_resident_memory_bytes",
                           "process_start_time_seconds", "process_open_fds", "process_max_fds"}) {
    const size_t at = page.find("\n" + std::string(name) + " ");
    ASSERT_NE(at, std::string::npos) << name;
    EXPECT_GE(std::atof(page.c_str() + at + std::string(name).size() + 2), 0) << name;
  }
  EXPECT_THAT(page, HasSubstr("antiphon_build_info{"));
}

TEST(MetricsTest, FunctionsAreReadAtEveryScrape) {
  Registry registry{Labels{}};
  double value = 1;
  registry.AddGaugeFunction("antiphon_depth", "Depth.", {}, [&value] { return value; });
  EXPECT_THAT(registry.Render(), HasSubstr("antiphon_depth 1\n"));
  value = 2;
  EXPECT_THAT(registry.Render(), HasSubstr("antiphon_depth 2\n"));
}

TEST(MetricsTest, NoUpdateIsLostBetweenThreads) {
  Registry registry{Labels{}};
  Counter& counter = registry.AddCounter("antiphon_n_total", "N.");
  Histogram& histogram = registry.AddHistogram("antiphon_h_seconds", "H.", TtftBuckets());
  {
    std::vector<Thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back("adder", [&] {
        for (int i = 0; i < 10'000; ++i) {
          counter.Add();
          histogram.Observe(0.5);
        }
      });
    }
    for (int i = 0; i < 20; ++i) registry.Render();
  }
  EXPECT_EQ(counter.value(), 40'000);
  EXPECT_THAT(registry.Render(), HasSubstr("antiphon_h_seconds_count 40000\n"));
}

TEST(MetricsTest, StandardBoundsAscend) {
  for (const auto& bounds : {TtftBuckets(), TbtBuckets(), RequestSecondsBuckets(),
                             TokenCountBuckets(), TransferSecondsBuckets()}) {
    for (size_t i = 1; i < bounds.size(); ++i) EXPECT_LT(bounds[i - 1], bounds[i]);
  }
}

}  // namespace
}  // namespace antiphon
