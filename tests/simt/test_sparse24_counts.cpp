// SPDX-License-Identifier: Apache-2.0
// Prints what csrc/sparse24/cuda/plan.h counts for one launch: tile m n k dtype splits. test_sparse24_counts.py compares it with
// what the executor counted.
#include <stdio.h>
#include <stdlib.h>

#include "sparse24/cuda/plan.h"

using namespace lissom::sparse24;

int main(int arguments, char** text) {
  if (arguments != 7) return 2;
  int64_t v[6];
  for (int i = 0; i < 6; ++i) v[i] = atoll(text[i + 1]);
  const Size s = {v[1], v[2], v[3], static_cast<int>(sm80::element_bytes(static_cast<int32_t>(v[4])))};
  const Plan plan = {static_cast<int>(v[0]), static_cast<int>(v[5])};
  const Counts c = count(s, plan, kA100);
  printf("%ld %ld %.0f %.0f %.0f %.0f\n", static_cast<long>(c.blocks), static_cast<long>(c.waves), c.matrix,
         c.wavefronts, c.copied, predict(s, plan, kA100).bytes);
}
