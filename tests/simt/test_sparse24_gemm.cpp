// SPDX-License-Identifier: Apache-2.0
// The 2:4 GEMM and GEMV on the executor, with zero error on exact inputs. Argument: "values", "edges" (a
// few of them), "schedules", "mutants" or "counters" with a case.
#include <sys/mman.h>

#include "sparse24_cases.h"
//
#include "sparse24/cuda/gemm.cu"
#include "sparse24/cuda/gemv.cu"
#include "sparse24_linear.h"

using namespace cases;

namespace {

constexpr int kGemv = -1;

std::string name(int tile, int splits) {
  if (tile == kGemv) return "gemv ";
  const Tile& t = kTiles[tile];
  return "tile " + std::to_string(t.rows) + " x " + std::to_string(t.tokens) +
         (splits > 1 ? " in " + std::to_string(splits) : std::string()) + " ";
}

int launch(const LinearCase& p, int tile, int splits) {
  std::fill(p.y.begin(), p.y.end(), 0x7f);
  const LissomLinear args = p.args();
  if (tile == kGemv) return lissom_sparse24_gemv(&args, nullptr);
  const int64_t bytes = lissom_sparse24_gemm_workspace(p.s.m, p.s.n, splits);
  const simt::Buffer<uint8_t> workspace(static_cast<size_t>(bytes), 0x7f);
  return lissom_sparse24_gemm(&args, tile, splits, workspace.data(), bytes, nullptr);
}

std::string solve(const LinearCase& p, int tile, int splits, const Way& way, bool detector = true) {
  return attempt(way, [&] { return launch(p, tile, splits); }, [&] { return p.wrong(); }, detector);
}

// --- values ---

// What varies with the turn, so that all of it meets every tile.
Options vary(int dtype, size_t turn) {
  Options o;
  o.dtype = dtype;
  o.out = turn % 3 == 1 ? kF32 : dtype == kInt8 ? 1 + static_cast<int>(turn % 2) : dtype;
  o.bias = turn % 2;
  o.bias_dtype = static_cast<int>(turn / 2 % 3);
  o.residual = turn / 2 % 2;
  o.act = turn % 5 == 4 ? Act::relu : Act::none;
  o.odd = turn % 4 == 3 ? static_cast<int>(16 / bytes_of(dtype)) : 0;
  return o;
}

void check(const Shape& s, const Options& o, int tile, int splits) {
  static const auto all = ways(20);
  static size_t turn = 0;
  const Way& way = all[turn++ % all.size()];
  const LinearCase p(s, o, turn);
  expect(name(tile, splits) + describe(s, o) + ", " + describe(way), solve(p, tile, splits, way));
}

void check_tile(int tile) {
  const Tile& t = kTiles[tile];
  const int64_t m = t.tokens, n = t.rows;
  size_t turn = static_cast<size_t>(tile);
  for (const int dtype : {kBf16, kF16, kInt8}) {
    const int64_t stage = t.records * sm80::record_columns(bytes_of(dtype));
    const Shape shapes[] = {{m, n, 2 * stage},
                            {m - 1, n - 1, stage - 4},
                            {m + 1, n + 1, stage + 4},
                            {1, n, stage * t.stages},
                            {m, 32, 4},
                            {0, n, stage},
                            {m, 0, stage},
                            {2, 40, 0},
                            {3, 1, 8},
                            {m, n - 8, stage / 2 + 12}};
    for (const Shape& s : shapes)
      if (dtype == kBf16 || turn % 2 == 0 || s.m * s.n * s.k == 0)
        check(s, vary(dtype, turn++), tile, 1);
      else
        ++turn;
    check({m < 9 ? m : 9, 72, 3 * stage + 20}, vary(dtype, turn++), tile, 2);
    check({2, 36, 2 * stage}, vary(dtype, turn++), tile, 5);  // more splits than stages
  }
}

void check_errors() {
  const LinearCase p({2, 8, 16}, {}, 1);
  const auto refused = [&](const char* what, auto change, int tile = 3, int splits = 1, bool gemv = false) {
    LissomLinear args = p.args();
    change(args);
    const int error = gemv ? lissom_sparse24_gemv(&args, nullptr)
                           : lissom_sparse24_gemm(&args, tile, splits, nullptr, 0, nullptr);
    expect(what, error == 1 ? "" : "taken");
  };
  const auto as_is = [](LissomLinear&) {};
  refused("tile below", as_is, -1);
  refused("tile above", as_is, kTileCount);
  refused("no workspace", as_is, 3, 2);
  refused("no splits", as_is, 3, 0);
  refused("stride", [](LissomLinear& a) { a.x_stride += 4; });
  refused("k", [](LissomLinear& a) { a.k = 14; });
  refused("float32", [](LissomLinear& a) { a.dtype = kF32; });
  refused("out", [](LissomLinear& a) { a.out = kF16; });
  refused("int8 without scales", [](LissomLinear& a) { a.dtype = kInt8; });
  refused("records off", [](LissomLinear& a) { a.records = static_cast<const char*>(a.records) + 8; });
  refused("x off", [](LissomLinear& a) { a.x = static_cast<const char*>(a.x) + 8; });
  refused("gemv x off", [](LissomLinear& a) { a.x = static_cast<const char*>(a.x) + 4; }, 0, 1, true);
  refused("gemv m", [](LissomLinear& a) { a.m = 5; }, 0, 1, true);
  refused(
      "gemv int8",
      [&](LissomLinear& a) {
        a.dtype = kInt8;
        a.scale_w = a.scale_x = p.scale_w.data();
      },
      0, 1, true);
}

// Rows so far apart that offsets pass 2^32 bytes; only the pages that are touched exist.
void check_far() {
  constexpr int64_t kStride = (int64_t{1} << 30) + 8;
  constexpr size_t kSpan = static_cast<size_t>(2 * kStride + 64) * 2;
  void* room =
      mmap(nullptr, kSpan, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return expect("far rows", "no address space");
  auto* far = static_cast<uint16_t*>(room);
  simt::watch(room, kSpan);
  Options o;
  o.residual = true;
  for (const int tile : {3, 5, kGemv}) {
    const LinearCase p({3, 16, 32}, o, 1);
    LissomLinear args = p.args();
    for (int64_t m = 0; m < 3; ++m) {
      memcpy(far + m * kStride, static_cast<const uint16_t*>(args.x) + m * args.x_stride, 64);
      memcpy(far + m * kStride + 32, static_cast<const uint16_t*>(args.residual) + m * args.residual_stride,
             32);
    }
    args.x = far, args.residual = far + 32;
    args.x_stride = args.residual_stride = kStride;
    const auto start = [&] {
      return tile == kGemv ? lissom_sparse24_gemv(&args, nullptr)
                           : lissom_sparse24_gemm(&args, tile, 1, nullptr, 0, nullptr);
    };
    expect(name(tile, 1) + "far rows", attempt(ways(0)[0], start, [&] { return p.wrong(); }));
  }
  simt::unwatch(room);
  munmap(room, kSpan);
}

int values() {
  for (int tile = 0; tile < kTileCount; ++tile) check_tile(tile);
  size_t turn = 0;
  for (const int dtype : {kBf16, kF16})
    for (const int64_t m : {1, 2, 3, 4})
      for (const Shape& s :
           {Shape{m, 64, 2560}, {m, 31, 4}, {m, 33, 1028}, {m, 8, 0}, {m, 97, 1092}, {m, 1, 320}})
        check(s, vary(dtype, turn++), kGemv, 1);
  check({0, 32, 32}, {}, kGemv, 1);
  check({1, 0, 32}, {}, kGemv, 1);
  // Everything that is not exact: sums, activations.
  for (const Act act : {Act::none, Act::relu, Act::gelu, Act::gelu_tanh, Act::silu})
    for (const int dtype : {kBf16, kF16, kInt8})
      for (const int tile : {kGemv, 3, 5}) {
        if (tile == kGemv && dtype == kInt8) continue;
        Options o = vary(dtype, turn++);
        o.act = act;
        o.real = true;
        check({4, 70, 900}, o, tile, tile == 3 ? 2 : 1);
      }
  Options infinite;
  infinite.infinite = true;
  for (const int tile : {kGemv, 3, 6}) check({2, 64, 64}, infinite, tile, 1);
  check_far();
  check_errors();
  return verdict("values");
}

// One case of each tile, over all its edges: what sanitizers have time for.
int edges() {
  size_t turn = 0;
  for (int tile = 0; tile < kTileCount; ++tile) {
    const Tile& t = kTiles[tile];
    const int dtype = 1 + tile % 3;
    const int64_t stage = t.records * sm80::record_columns(bytes_of(dtype));
    check({t.tokens + 1, t.rows + 1, stage + 4}, vary(dtype, turn++), tile, 1);
  }
  check({3, 33, 1028}, vary(kBf16, 6), 5, 3);
  for (const int64_t m : {1, 2, 3}) check({m, 33, 1092}, vary(kF16, turn++), kGemv, 1);
  return verdict("edges");
}

// --- schedules ---

// Deep enough for the ring to turn around, with tails everywhere. The last stage lies in the first slot, where the sums go.
Shape deep(int tile, int dtype) {
  if (tile == kGemv) return {3, 40, 2200};
  const Tile& t = kTiles[tile];
  const int64_t stage = t.records * sm80::record_columns(bytes_of(dtype));
  return {t.tokens - 1, t.rows - 3, stage * (t.stages + 1) - 12};
}

int schedules() {
  for (int tile = kGemv; tile < kTileCount; ++tile) {
    const int dtype = tile == kGemv ? kF16 : tile % 3 == 2 ? kInt8 : kBf16;
    const LinearCase p(deep(tile, dtype), vary(dtype, 7), 7);
    for (const Way& way : ways(20)) expect(name(tile, 1) + describe(way), solve(p, tile, 1, way));
  }
  const LinearCase p({5, 40, 700}, vary(kBf16, 5), 5);
  for (const Way& way : ways(20)) expect(name(5, 3) + describe(way), solve(p, 5, 3, way));
  return verdict("schedules");
}

// --- mutants ---

struct Statement {
  int number;
  const char* what;
  bool wait;
};
constexpr Statement kGemmStatements[] = {{1, "wait for the first stage", true},
                                         {2, "barrier before the first stage", false},
                                         {3, "wait for the next stage", true},
                                         {4, "barrier of a stage", false},
                                         {5, "barrier before sums overwrite the ring", false},
                                         {6, "barrier before sums are read", false}};
constexpr Statement kGemvStatements[] = {{20, "barrier before sums are read", false}};

// How many ways reported it, and how many saw it by wrong values alone.
bool survives(const LinearCase& p, int tile, const Statement& s, bool weaker) {
  int noticed[2] = {}, tried = 0;
  std::string first;
  for (const Way& way : ways(6)) {
    ++tried;
    for (const bool detector : {true, false}) {
      left_out = s.number;
      cases::weaker = weaker;
      const std::string trouble = solve(p, tile, 1, way, detector);
      left_out = 0;
      noticed[!detector] += !trouble.empty();
      if (detector && first.empty()) first = trouble.substr(0, trouble.find('\n')).substr(0, 70);
    }
  }
  printf("| %s| %d | %s | %s | %d of %d | %d | %s |\n", name(tile, 1).c_str(), s.number, s.what,
         weaker ? "one weaker" : "left out", noticed[0], tried, noticed[1], first.c_str());
  return noticed[0] == 0;
}

int mutants() {
  printf("| kernel | number | statement | mutant | reported | by values alone | first report |\n");
  printf("| --- | --- | --- | --- | --- | --- | --- |\n");
  int survivors = 0, all = 0;
  for (int tile = 0; tile < kTileCount; ++tile) {
    const LinearCase p(deep(tile, kBf16), {}, 3);
    expect("without a mutant", solve(p, tile, 1, ways(0)[0]));
    for (const Statement& s : kGemmStatements)
      for (int weaker = 0; weaker <= s.wait; ++weaker, ++all) survivors += survives(p, tile, s, weaker);
  }
  const LinearCase p(deep(kGemv, kBf16), {}, 3);
  for (const Statement& s : kGemvStatements) survivors += survives(p, kGemv, s, false), ++all;
  printf("%d mutants, %d killed, %d survivors\n", all, all - survivors, survivors);
  return survivors != 0 || failures != 0;
}

// --- counters ---

int counters(int tile, const Shape& s, int dtype, int splits) {
  Options o;
  o.dtype = dtype;
  o.out = dtype == kInt8 ? kBf16 : dtype;
  o.bias = true;
  const LinearCase p(s, o, 1);
  simt::Run run;
  run.detector = false;
  const int error = launch(p, tile, splits);
  if (error || run.fault || !p.wrong().empty()) return 1;
  printf("%s\n", run.json().c_str());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "values";
  if (what == "counters" && count == 8) {
    int64_t n[6];
    for (int i = 0; i < 6; ++i) n[i] = atoll(arguments[2 + i]);
    return counters(static_cast<int>(n[0]), {n[1], n[2], n[3]}, static_cast<int>(n[4]),
                    static_cast<int>(n[5]));
  }
  return what == "mutants"     ? mutants()
         : what == "schedules" ? schedules()
         : what == "edges"     ? edges()
                               : values();
}
