/* SPDX-License-Identifier: Apache-2.0
 * C interface of the PTX interpreter and of the stand-in for the CUDA runtime, which live in one shared library. Every call
 * that can fail returns 0 for success; ptx_error() then holds the report. State is global: one machine a process.
 *
 *     PtxModule* m = ptx_load(text);
 *     ptx_buffer(x, bytes, 0, "x");  ptx_buffer(y, bytes, 1, "y");        global memory is host memory that is known here
 *     PtxOptions o = ptx_defaults();  o.landing = PTX_LATE;  o.seed = 7;
 *     void* args[] = {&x, &y, &n};
 *     if (ptx_launch(m, "kernel", grid, threads, shared_bytes, args, &o)) puts(ptx_error());
 *
 * Launchers compiled with `nvcc -cudart none --no-compress -gencode arch=compute_80,code=compute_80` and linked against the
 * library run their launches here, on the same buffers, with the options of ptx_set_options.
 */
#ifndef LISSOM_PTX_H
#define LISSOM_PTX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct PtxModule PtxModule;

enum { PTX_EARLY, PTX_LATE, PTX_RANDOM };

typedef struct {
  int landing;          /* when asynchronous copies move their bytes */
  uint64_t seed;        /* of blocks and warps: 0 forward, 1 reverse, others random priorities */
  int strict_zero_fill; /* the source of a copy of zero bytes must still point into a buffer */
  int global_shadow;    /* race detection in writable buffers */
  int approximate;      /* .approx results deviate within the bounds of PTX */
  uint64_t max_steps;   /* instructions of a warp, all warps together, before a launch is called endless */
} PtxOptions;

PtxOptions ptx_defaults(void);
const char* ptx_error(void);

PtxModule* ptx_load(const char* text); /* null: see ptx_error */
void ptx_free(PtxModule*);
/* Names, one a line. */
const char* ptx_kernels(PtxModule*);
/* Bytes of each parameter of a kernel, one a line. */
const char* ptx_params(PtxModule*, const char* kernel);
/* "executed count<tab>line<tab>text" of each instruction of a kernel, one a line. Null module: a kernel that the stand-in ran. */
const char* ptx_counts(PtxModule*, const char* kernel);

int ptx_buffer(void* base, size_t bytes, int writable, const char* name);
void ptx_forget(const void* base);
void ptx_forget_all(void);

/* args: one pointer a parameter, as cudaLaunchKernel takes them. */
int ptx_launch(PtxModule*, const char* kernel, const uint32_t grid[3], const uint32_t threads[3],
               uint32_t shared_bytes, void* const* args, const PtxOptions*);

/* --- stand-in --- */
void ptx_set_options(const PtxOptions*);
/* Limits and facts of the device that the stand-in plays: 80, 90, 100 or 120. Default: the least of all four. */
int ptx_set_device(int capability);
/* The nth call from now (1: the next) of a runtime function returns `error` and does nothing. */
void ptx_inject(const char* function, int nth, int error);
/* "kernel<tab>gx,gy,gz<tab>threads<tab>shared<tab>stream" of each launch since the last ptx_reset, one a line. */
const char* ptx_launches(void);
/* Forgets launches, injections, opt-ins and errors. */
void ptx_reset(void);

#ifdef __cplusplus
}
#endif
#endif
