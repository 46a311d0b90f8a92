// SPDX-License-Identifier: Apache-2.0
// Prints what csrc/sparse24/cuda/plan.h plans and predicts, one line a case; test_sparse24_plan.py judges.
#include <stdio.h>

#include "sparse24/cuda/plan.h"

using namespace lissom::sparse24;

int main() {
  const struct {
    const char* name;
    Gpu gpu;
  } gpus[] = {{"A100", kA100}, {"H100", kH100}, {"B200", kB200}, {"RTX50", kRtx50}};
  for (const auto& g : gpus)
    for (const int bytes : {2, 1})
      for (const int64_t k : {int64_t{1024}, int64_t{4096}, int64_t{8192}})
        for (const int64_t m : {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384}) {
          const Size s = {m, k, k, bytes};
          const Plan plan = choose_plan(s, g.gpu);
          const Prediction p = predict(s, plan, g.gpu);
          const Tile t = plan.tile < 0 ? Tile{} : kTiles[plan.tile];
          printf("%s %d %ld %ld %d %d %d %d %.3f %.3f %.3f %.3f %.3f %.3f %.3f\n", g.name, bytes,
                 static_cast<long>(m), static_cast<long>(k), plan.tile, t.rows, t.tokens, plan.splits,
                 1e6 * bound(s, g.gpu), 1e6 * p.memory, 1e6 * p.l2, 1e6 * p.sm, 1e6 * p.exposed,
                 1e6 * g.gpu.launch, 1e6 * p.total);
        }
}
