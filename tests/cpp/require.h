// SPDX-License-Identifier: Apache-2.0
// For tests without a framework: leaves a function that returns bool, with false, where a condition does not hold.
#pragma once

#include <stdio.h>

#define REQUIRE(condition)                                            \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      return false;                                                   \
    }                                                                 \
  } while (0)
