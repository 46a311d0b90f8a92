// SPDX-License-Identifier: Apache-2.0
// Format kernels on the executor, against the CPU's, bit for bit. Argument: "formats" or "mutants".
#include "sparse24_cases.h"
//
#include "sparse24/cuda/format.cu"
#include "sparse24/cuda/pack.cu"
#include "sparse24/sparse24.h"

using cases::attempt;
using cases::describe;
using cases::expect;
using cases::Random;
using cases::Way;
using simt::Buffer;

namespace {

// Any bit patterns, many zeros of both signs, NaN, infinities; at most two non-zeros a quad if `sparse`.
template <class T>
std::vector<T> random_dense(int64_t n, int64_t k, bool sparse, Random& random) {
  std::vector<T> w(static_cast<size_t>(n * k));
  const T sign = static_cast<T>(T{1} << (8 * sizeof(T) - 1));
  for (size_t i = 0; i < w.size(); i += 4) {
    for (size_t j = 0; j < 4; ++j) {
      const uint32_t kind = random.below(6);
      w[i + j] = kind == 0   ? T{0}
                 : kind == 1 ? (sizeof(T) == 1 ? T{0} : sign)
                 : kind == 2 ? static_cast<T>(random.below(3))
                 : kind == 3 ? static_cast<T>(~random.below(3))
                             : static_cast<T>(random.bits());
    }
    if (sparse)
      for (uint32_t dropped = 0; dropped < 2; ++dropped) w[i + random.below(2) + 2 * dropped] = T{0};
  }
  return w;
}

template <class T>
struct Copy : Buffer<T> {
  explicit Copy(const std::vector<T>& v) : Buffer<T>(v.size()) {
    std::copy(v.begin(), v.end(), this->begin());
  }
};

template <class T>
std::string same(const char* what, const T* got, const std::vector<T>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (memcmp(got + i, &wanted[i], sizeof(T)) != 0)
      return std::string(what) + " differs at " + std::to_string(i) + " of " + std::to_string(wanted.size());
  return "";
}

std::string verdict_text(const int64_t* v) {
  return std::to_string(v[0]) + " " + std::to_string(v[1]) + " " + std::to_string(v[2]) + " " +
         std::to_string(v[3]);
}
std::vector<int64_t> verdict_of(const BadQuad& bad) { return {bad.row < 0, bad.row, bad.quad, bad.found}; }

template <class T>
void check_formats(int64_t n, int64_t k, const Way& way, uint64_t seed) {
  Random random(seed);
  const int bytes = sizeof(T);
  const int64_t columns = meta_columns(k);
  const std::string where = std::to_string(n) + " x " + std::to_string(k) + ", " + std::to_string(bytes) +
                            " bytes, " + describe(way);
  Buffer<int64_t> verdict(4), scratch(static_cast<size_t>(n));
  const auto answers = [&](const BadQuad& bad) {
    return [&verdict, bad] {
      const auto wanted = verdict_of(bad);
      return memcmp(verdict.data(), wanted.data(), 32)
                 ? "verdict " + verdict_text(verdict.data()) + ", wanted " + verdict_text(wanted.data())
                 : std::string();
    };
  };
  for (const bool sparse : {true, false}) {
    const std::vector<T> w = random_dense<T>(n, k, sparse, random);
    const Copy<T> dense(w);
    expect("check " + where, attempt(
                                 way,
                                 [&] {
                                   return lissom_sparse24_check(dense.data(), n, k, bytes, scratch.data(),
                                                                verdict.data(), nullptr);
                                 },
                                 answers(check_rows(w.data(), k, bytes, 0, n))));
    std::vector<T> values(static_cast<size_t>(n * k / 2));
    std::vector<uint8_t> meta(static_cast<size_t>(n * columns));
    compress_rows(w.data(), {n, k, values.data(), meta.data(), bytes}, !sparse, 0, n);
    Buffer<T> got_values(values.size(), T{0x55});
    Buffer<uint8_t> got_meta(meta.size(), 0x55);
    expect(
        "compress " + where,
        attempt(
            way,
            [&] {
              return lissom_sparse24_compress(dense.data(), got_values.data(), got_meta.data(), n, k, bytes,
                                              !sparse, nullptr);
            },
            [&] { return same("values", got_values.data(), values) + same("meta", got_meta.data(), meta); }));
    std::vector<T> again(w.size());
    decompress_rows({n, k, values.data(), meta.data(), bytes}, again.data(), 0, n);
    Buffer<T> got(w.size(), T{0x55});
    expect("decompress " + where, attempt(
                                      way,
                                      [&] {
                                        return lissom_sparse24_decompress(got_values.data(), got_meta.data(),
                                                                          got.data(), n, k, bytes, nullptr);
                                      },
                                      [&] { return same("w", got.data(), again); }));
    std::vector<T> kept(values.size());
    gather_rows(w.data(), {n, k, kept.data(), meta.data(), bytes}, 0, 0, n);
    expect("gather " + where, attempt(
                                  way,
                                  [&] {
                                    return lissom_sparse24_gather(dense.data(), got_meta.data(),
                                                                  got_values.data(), n, k, bytes, nullptr);
                                  },
                                  [&] { return same("values", got_values.data(), kept); }));
    for (size_t i = 0; i < meta.size(); ++i)
      if (random.below(1 + 40 * sparse) == 0 || !sparse)
        got_meta[i] = meta[i] = static_cast<uint8_t>(random.bits());
    expect("check_meta " + where, attempt(
                                      way,
                                      [&] {
                                        return lissom_sparse24_check_meta(
                                            got_meta.data(), n, k, scratch.data(), verdict.data(), nullptr);
                                      },
                                      answers(check_meta_rows(meta.data(), k, 0, n))));
  }
}

// What pack makes of metadata that was not checked: legal nibbles, NaN values.
template <class T>
void poison(int64_t n, int64_t k, std::vector<T>& values, std::vector<uint8_t>& meta) {
  for (int64_t row = 0; row < n; ++row)
    for (int64_t q = 0; q < k / 4; ++q)
      if (!legal_nibble(cases::nibble_at(meta.data(), k, row, q))) {
        meta[static_cast<size_t>(row * meta_columns(k) + q / 2)] |= static_cast<uint8_t>(15 << (4 * (q % 2)));
        meta[static_cast<size_t>(row * meta_columns(k) + q / 2)] ^= static_cast<uint8_t>(1 << (4 * (q % 2)));
        for (int s = 0; s < 2; ++s)
          values[static_cast<size_t>(row * (k / 2) + 2 * q + s)] = sizeof(T) == 2 ? 0x7fff : 0;
      }
}

template <class T>
void check_pack(int64_t n, int64_t k, int dtype, bool forged, const Way& way, uint64_t seed) {
  Random random(seed);
  const int64_t bytes = sizeof(T);
  const std::string where = std::to_string(n) + " x " + std::to_string(k) + ", dtype " +
                            std::to_string(dtype) + (forged ? ", illegal nibbles, " : ", ") + describe(way);
  std::vector<T> values(static_cast<size_t>(n * k / 2));
  for (T& v : values) v = static_cast<T>(random.bits());
  std::vector<uint8_t> meta = cases::random_meta(n, k, random);
  if (forged)
    for (uint8_t& byte : meta)
      if (random.below(3) == 0) byte = static_cast<uint8_t>(random.bits());
  const Copy<T> device_values(values);
  const Copy<uint8_t> device_meta(meta);
  poison(n, k, values, meta);
  if (k % 8)
    for (int64_t row = 0; row < n; ++row) meta[static_cast<size_t>((row + 1) * meta_columns(k) - 1)] &= 15;
  const lissom::sparse24::Canonical canonical = {n, k, values.data(), meta.data(), bytes};
  const auto total = static_cast<size_t>(sm80::buffer_bytes(n, k, dtype));
  std::vector<uint8_t> packed(total, 0);
  const PackedHeader header = sm80::header(n, k, dtype);
  memcpy(packed.data(), &header, sizeof header);
  pack_sm80(canonical, packed.data(), 0, sm80::panels(n));
  Buffer<uint8_t> got(total, 0x55);
  expect("pack " + where, attempt(
                              way,
                              [&] {
                                return lissom_sparse24_pack(device_values.data(), device_meta.data(),
                                                            got.data(), n, k, dtype, nullptr);
                              },
                              [&] { return same("packed", got.data(), packed); }));
  Buffer<T> values_again(values.size(), T{0x55});
  Buffer<uint8_t> meta_again(meta.size(), 0x55);
  expect("unpack " + where, attempt(
                                way,
                                [&] {
                                  return lissom_sparse24_unpack(got.data(), values_again.data(),
                                                                meta_again.data(), n, k, dtype, nullptr);
                                },
                                [&] {
                                  return same("values", values_again.data(), values) +
                                         same("meta", meta_again.data(), meta);
                                }));
  std::vector<T> host_values(values.size());
  std::vector<uint8_t> host_meta(meta.size());
  unpack_sm80(packed.data(), {n, k, host_values.data(), host_meta.data(), bytes}, 0, sm80::panels(n));
  expect("unpack on the CPU " + where,
         same("values", host_values.data(), values) + same("meta", host_meta.data(), meta));
}

// Faults that a launcher must refuse by itself.
void check_refusals() {
  simt::Run run;
  Buffer<int64_t> room(64);
  void* p = room.data();
  auto* bytes = reinterpret_cast<uint8_t*>(p);
  expect("3 bytes", lissom_sparse24_check(p, 1, 4, 3, p, room.data(), nullptr) == 1 ? "" : "taken");
  expect("float32 to sm80-v1", lissom_sparse24_pack(p, bytes, p, 1, 4, 0, nullptr) == 1 ? "" : "taken");
  expect("unknown dtype", lissom_sparse24_unpack(p, p, bytes, 1, 4, 4, nullptr) == 1 ? "" : "taken");
}

int formats() {
  const auto ways = cases::ways(20);
  size_t turn = 0;
  const auto next = [&]() -> const Way& { return ways[turn++ % ways.size()]; };
  for (const int64_t n : {0, 1, 7, 8, 9, 33}) {
    if (cases::kSanitized && n > 1 && n < 33) continue;
    for (const int64_t k : {0, 4, 8, 12, 60, 64, 68, 124, 128, 132, 260}) {
      const auto seed = static_cast<uint64_t>(1000 * n + k);
      check_formats<uint8_t>(n, k, next(), seed);
      check_formats<uint16_t>(n, k, next(), seed);
      check_formats<uint32_t>(n, k, next(), seed);
      for (const bool forged : {false, true}) {
        check_pack<uint16_t>(n, k, forged ? 2 : 1, forged, next(), seed);
        check_pack<uint8_t>(n, k, 3, forged, next(), seed);
      }
    }
  }
  // More rows than one round of the verdict, the first bad one in any of its threads; and all schedules on one problem.
  for (const int64_t n : {255, 256, 257, 700})
    check_formats<uint16_t>(n, 4, next(), static_cast<uint64_t>(n));
  for (const Way& way : cases::ways(cases::kSanitized ? 0 : 20)) {
    check_formats<uint16_t>(33, 132, way, way.seed);
    check_pack<uint16_t>(33, 132, 1, true, way, way.seed);
    check_pack<uint8_t>(33, 132, 3, true, way, way.seed);
  }
  check_refusals();
  return cases::verdict("formats");
}

// Sectors of global memory against the bytes that must move.
int counters() {
  const int64_t n = 64, k = 512;
  Random random(1);
  simt::Run run;
  const Copy<uint16_t> w(random_dense<uint16_t>(n, k, true, random));
  Buffer<uint16_t> values(n * k / 2);
  Buffer<uint8_t> meta(n * k / 8), packed(static_cast<size_t>(sm80::buffer_bytes(n, k, 1)));
  Buffer<int64_t> verdict(4), scratch(n);
  int error = lissom_sparse24_check(w.data(), n, k, 2, scratch.data(), verdict.data(), nullptr);
  error |= lissom_sparse24_compress(w.data(), values.data(), meta.data(), n, k, 2, 0, nullptr);
  error |= lissom_sparse24_decompress(values.data(), meta.data(), w.data(), n, k, 2, nullptr);
  error |= lissom_sparse24_pack(values.data(), meta.data(), packed.data(), n, k, 1, nullptr);
  error |= lissom_sparse24_unpack(packed.data(), values.data(), meta.data(), n, k, 1, nullptr);
  printf("%s\n", run.json().c_str());
  return error || run.fault;
}

int mutants() {
  // Only the verdict meets over shared memory.
  const std::vector<int64_t> rows(600, -1);
  for (const bool detector : {true, false}) {
    int noticed = 0, tried = 0;
    cases::left_out = 1;
    for (const Way& way : cases::ways(20)) {
      Buffer<int64_t> verdict(4), scratch(600);
      Buffer<uint16_t> w(600 * 4, 0);
      for (int64_t bad : {599, 590, 300}) std::fill_n(w.data() + 4 * bad, 4, uint16_t{1});
      ++tried;
      noticed +=
          !attempt(
               way,
               [&] {
                 return lissom_sparse24_check(w.data(), 600, 4, 2, scratch.data(), verdict.data(), nullptr);
               },
               [&] { return verdict[1] == 300 ? std::string() : std::string("wrong row"); }, detector)
               .empty();
    }
    cases::left_out = 0;
    printf("verdict barrier: %d of %d %s\n", noticed, tried, detector ? "reported" : "wrong by value");
    if (noticed == 0) return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "formats";
  return what == "mutants" ? mutants() : what == "counters" ? counters() : formats();
}
