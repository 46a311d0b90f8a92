// SPDX-License-Identifier: Apache-2.0
// Each barrier and each wait of these kernels has a number. A test that defines the two macros itself leaves them out one after
// the other, and its checks must notice.
#pragma once

#ifndef LISSOM_SYNC
#define LISSOM_SYNC(number, statement) statement
#define LISSOM_WAIT(number, groups) dev::cp_async_wait<groups>()
#endif
