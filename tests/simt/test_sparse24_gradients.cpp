// SPDX-License-Identifier: Apache-2.0
// The two dense products of the backward pass on the executor, with zero error on exact inputs. Argument: "values", "schedules",
// "mutants" or "counters".
#include "sparse24_cases.h"
//
#include "sparse24/cuda/grad_input.cu"
#include "sparse24/cuda/mask_mm.cu"
#include "sparse24/sparse24.h"

using cases::attempt;
using cases::describe;
using cases::expect;
using cases::Random;
using cases::Way;
using lissom::DType;
using simt::Buffer;

namespace {

struct Shape {
  int64_t m, n, k;
};
std::string describe(const char* what, const Shape& s, DType t) {
  return std::string(what) + (t == DType::bf16 ? " bf16 " : " f16 ") + std::to_string(s.m) + " x " +
         std::to_string(s.n) + " x " + std::to_string(s.k);
}

// [rows, columns] with rows `stride` apart, up to 16 bytes: padding is NaN, and must never be read.
struct Activations {
  int64_t rows, columns, stride;
  std::vector<float> exact;
  Buffer<uint16_t> data;
  Activations(int64_t r, int64_t c, DType t, Random& random)
      : rows(r),
        columns(c),
        stride((c + 15) / 16 * 16 + 16),
        exact(static_cast<size_t>(r * c)),
        data(static_cast<size_t>(r * stride), 0x7fff) {
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < c; ++j)
        data[static_cast<size_t>(i * stride + j)] =
            cases::to_bits(t, exact[static_cast<size_t>(i * c + j)] = random.exact());
  }
  float at(int64_t i, int64_t j) const { return exact[static_cast<size_t>(i * columns + j)]; }
};

std::string differs(const char* what, int64_t row, int64_t column, DType t, uint16_t got, uint16_t wanted) {
  return std::string(what) + " [" + std::to_string(row) + ", " + std::to_string(column) + "] is " +
         std::to_string(cases::to_float(t, got)) + ", wanted " + std::to_string(cases::to_float(t, wanted));
}

// --- mask_mm ---

struct MaskProblem {
  Shape s;
  DType t;
  Activations dy, x;
  std::vector<uint8_t> meta;
  std::vector<uint16_t> wanted;  // sums of the definition, rounded once
  Buffer<uint8_t> device_meta;
  Buffer<uint16_t> values;

  MaskProblem(const Shape& shape, DType type, uint64_t seed, Random random = Random(0))
      : s(shape),
        t(type),
        dy(s.m, s.n, t, random = Random(seed)),
        x(s.m, s.k, t, random),
        meta(cases::random_meta(s.n, s.k, random)),
        wanted(static_cast<size_t>(s.n * s.k / 2)),
        device_meta(meta.size()),
        values(wanted.size(), 0x5555) {
    if (seed % 3 == 1 && !meta.empty())
      meta[random.below(static_cast<uint32_t>(meta.size()))] ^= 3;  // may be illegal
    std::copy(meta.begin(), meta.end(), device_meta.begin());
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.k / 2; ++c) {
        const int64_t quad = c / 2,
                      column = cases::column_of(meta.data(), s.k, n, quad, static_cast<int>(c % 2));
        double sum = 0;
        for (int64_t m = 0; m < s.m; ++m) sum += static_cast<double>(dy.at(m, n)) * x.at(m, column);
        const bool legal = legal_nibble(cases::nibble_at(meta.data(), s.k, n, quad));
        wanted[static_cast<size_t>(n * (s.k / 2) + c)] =
            legal ? cases::to_bits(t, static_cast<float>(sum)) : 0x7fff;
      }
  }
  int launch() {
    return lissom_sparse24_mask_mm(t, dy.data.data(), dy.stride, x.data.data(), x.stride, device_meta.data(),
                                   values.data(), s.m, s.n, s.k, nullptr);
  }
  std::string wrong() const {
    for (size_t i = 0; i < wanted.size(); ++i)
      if (values[i] != wanted[i])
        return differs("dvalues", static_cast<int64_t>(i) / (s.k / 2), static_cast<int64_t>(i) % (s.k / 2), t,
                       values[i], wanted[i]);
    return "";
  }
};

// --- grad_input ---

struct InputProblem {
  Shape s;
  DType t;
  int tile_rows;
  Activations dy;
  Buffer<uint8_t> packed;
  std::vector<uint16_t> wanted;
  Buffer<uint16_t> dx;

  InputProblem(const Shape& shape, DType type, int rows, uint64_t seed, Random random = Random(0))
      : s(shape),
        t(type),
        tile_rows(rows),
        dy(s.m, s.n, t, random = Random(seed)),
        packed(static_cast<size_t>(sm80::buffer_bytes(s.n, s.k, static_cast<int>(t)))),
        wanted(static_cast<size_t>(s.m * s.k)),
        dx(wanted.size(), 0x5555) {
    std::vector<uint8_t> meta = cases::random_meta(s.n, s.k, random);
    std::vector<uint16_t> values(static_cast<size_t>(s.n * s.k / 2)), w(static_cast<size_t>(s.n * s.k));
    for (uint16_t& v : values) v = cases::to_bits(t, random.exact());
    const Canonical canonical = {s.n, s.k, values.data(), meta.data(), 2};
    pack_sm80(canonical, packed.data(), 0, sm80::panels(s.n));
    decompress_rows(canonical, w.data(), 0, s.n);
    for (int64_t m = 0; m < s.m; ++m)
      for (int64_t k = 0; k < s.k; ++k) {
        double sum = 0;
        for (int64_t n = 0; n < s.n; ++n)
          sum += static_cast<double>(dy.at(m, n)) * cases::to_float(t, w[static_cast<size_t>(n * s.k + k)]);
        wanted[static_cast<size_t>(m * s.k + k)] = cases::to_bits(t, static_cast<float>(sum));
      }
  }
  int launch() {
    return lissom_sparse24_grad_input(t, tile_rows, dy.data.data(), dy.stride,
                                      packed.data() + sm80::kHeaderBytes, dx.data(), s.m, s.n, s.k, nullptr);
  }
  std::string wrong() const {
    for (size_t i = 0; i < wanted.size(); ++i)
      if (dx[i] != wanted[i])
        return differs("dx", static_cast<int64_t>(i) / s.k, static_cast<int64_t>(i) % s.k, t, dx[i],
                       wanted[i]);
    return "";
  }
};

template <class Problem>
std::string solve(Problem& p, const Way& way, bool detector = true) {
  return attempt(way, [&] { return p.launch(); }, [&] { return p.wrong(); }, detector);
}

// Whole tiles, one less and one more, single rows, none, and the tails of 16-byte chunks.
const Shape kMaskShapes[] = {{32, 128, 128}, {31, 127, 124}, {33, 129, 132}, {1, 128, 128},
                             {0, 20, 32},    {3, 1, 4},      {97, 8, 260},   {128, 7, 12},
                             {160, 260, 8},  {65, 140, 136}, {161, 16, 28},  {2, 300, 4}};
// m, n (summed over), k.
const Shape kInputShapes[] = {{128, 32, 128}, {127, 31, 124}, {129, 33, 132}, {64, 64, 64}, {65, 128, 60},
                              {1, 160, 128},  {3, 1, 4},      {5, 0, 12},     {0, 32, 64},  {63, 97, 260},
                              {200, 8, 188},  {130, 161, 68}, {16, 192, 320}};

int values() {
  const auto ways = cases::ways(20);
  size_t turn = 0;
  for (const DType t : {DType::bf16, DType::f16}) {
    if (cases::kSanitized && t == DType::f16) continue;
    for (const Shape& s : kMaskShapes) {
      MaskProblem p(s, t, turn);
      const Way& way = ways[turn++ % ways.size()];
      expect(describe("mask_mm", s, t) + ", " + describe(way), solve(p, way));
    }
    for (const int rows : {64, 128})
      for (const Shape& s : kInputShapes) {
        InputProblem p(s, t, rows, turn);
        const Way& way = ways[turn++ % ways.size()];
        expect(describe("grad_input", s, t) + ", tiles of " + std::to_string(rows) + ", " + describe(way),
               solve(p, way));
      }
  }
  Buffer<uint16_t> room(64);
  void* p = room.data();
  expect("float32",
         lissom_sparse24_mask_mm(DType::f32, p, 8, p, 8, nullptr, p, 1, 4, 4, nullptr) == 1 ? "" : "taken");
  expect("stride",
         lissom_sparse24_grad_input(DType::f16, 64, p, 12, p, p, 1, 4, 4, nullptr) == 1 ? "" : "taken");
  expect("tile",
         lissom_sparse24_grad_input(DType::f16, 32, p, 8, p, p, 1, 4, 4, nullptr) == 1 ? "" : "taken");
  return cases::verdict("gradients");
}

// Deep enough that the ring turns around; the last step lies where the results go.
const Shape kMaskDeep = {32 * 8 + 5, 20, 36}, kInputDeep = {40, 32 * 8 + 5, 36};

int schedules() {
  for (const Way& way : cases::ways(20)) {
    MaskProblem a(kMaskDeep, DType::bf16, 7);
    expect("mask_mm " + describe(way), solve(a, way));
    InputProblem b(kInputDeep, DType::f16, 64, 7), c(kInputDeep, DType::bf16, 128, 7);
    expect("grad_input " + describe(way), solve(b, way));
    expect("grad_input " + describe(way), solve(c, way));
  }
  return cases::verdict("schedules");
}

// One line for each statement left out: how many ways reported it, and how many saw it by wrong values alone.
template <class Make>
bool mutant(const char* kernel, int number, bool weaker, const Make& make) {
  int noticed[2] = {}, tried = 0;
  std::string first;
  for (const Way& way : cases::ways(6)) {
    ++tried;
    for (const bool detector : {true, false}) {
      auto p = make();
      cases::left_out = number;
      cases::weaker = weaker;
      const std::string trouble = solve(p, way, detector);
      cases::left_out = 0;
      noticed[!detector] += !trouble.empty();
      if (detector && first.empty()) first = trouble.substr(0, trouble.find('\n')).substr(0, 90);
    }
  }
  printf("%s %d %s: %d of %d reported, %d by values alone: %s\n", kernel, number,
         weaker ? "weaker" : "left out", noticed[0], tried, noticed[1], first.c_str());
  return noticed[0] > 0;
}

int mutants() {
  int survivors = 0;
  const auto mask = [] { return MaskProblem(kMaskDeep, DType::bf16, 6); };
  const auto input = [] { return InputProblem(kInputDeep, DType::bf16, 64, 6); };
  for (int number = 0; number <= 4; ++number) {
    for (int weaker = 0; weaker <= (number == 1); ++weaker) {
      survivors += mutant("mask_mm", number, weaker, mask) != (number > 0);
      survivors += mutant("grad_input", number, weaker, input) != (number > 0);
    }
  }
  printf("%d survivors\n", survivors);
  return survivors != 0;
}

int counters() {
  simt::Run run;
  MaskProblem a({256, 256, 256}, DType::bf16, 6);
  InputProblem b({256, 256, 256}, DType::bf16, 128, 6), c({128, 256, 256}, DType::bf16, 64, 6);
  const int error = a.launch() || b.launch() || c.launch();
  printf("%s\n", run.json().c_str());
  return error || run.fault;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "values";
  return what == "mutants"     ? mutants()
         : what == "counters"  ? counters()
         : what == "schedules" ? schedules()
                               : values();
}
