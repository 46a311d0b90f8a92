// SPDX-License-Identifier: Apache-2.0
// The torch side of pruning on the CPU: checks, memory, threads, and the search itself. Compiled without ISA flags.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "pruning/pruning.h"

namespace lissom::pruning {

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::avx512) return avx512::kKernels;
  if (isa == CpuIsa::avx2) return avx2::kKernels;
#endif
  (void)isa;
  return portable::kKernels;
}

namespace {

using at::Tensor;

constexpr int64_t kMostRows = int64_t{1} << 24;   // 255 times as much still fits in 32 bits
constexpr int64_t kLeastWork = int64_t{1} << 22;  // differences that are worth a thread
constexpr int64_t kPadding = 16;  // of rows of d: a column of it then spreads over the caches' sets
constexpr int64_t kCachedBytes = 512 << 10;  // thresholds that stay in L2 while the levels pass by

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Exchange {
  int64_t gain = 0;              // twice the score that is kept in addition
  int64_t mine = 0, theirs = 0;  // places
};

// One set of columns among which groups exchange their members. A column has a place; `group` neighbouring places make a
// group. For place a and column b, d[a][b] is the sum of |t_a - x_b| over the rows, where t_a is what a column in place a
// must exceed to be kept. With max(x, t) = (x + t + |x - t|) / 2, exchanging the columns of the places a and b keeps
// (d[a][b] + d[b][a] - d[a][a] - d[b][b]) / 2 more.
class Search {
 public:
  // levels [C, R] contiguous; `first` is the number of its first column.
  Search(const Tensor& levels, int64_t first, int64_t group, int64_t kept)
      : run_(kernels(cpu_isa())),
        columns_(levels.size(0)),
        rows_(round_up(levels.size(1), kRowStep)),
        stride_(std::min(rows_, kMostStride)),
        blocks_(stride_ ? (rows_ + stride_ - 1) / stride_ : 0),
        wide_(columns_ + kPadding),
        group_(group),
        kept_(kept),
        x_tensor_(at::zeros({blocks_ * columns_ * stride_}, levels.options())),
        t_tensor_(at::empty({blocks_ * columns_ * stride_}, levels.options())),
        d_tensor_(at::empty({columns_ * wide_}, levels.options().dtype(at::kInt))),
        x_(x_tensor_.mutable_data_ptr<uint8_t>()),
        t_(t_tensor_.mutable_data_ptr<uint8_t>()),
        d_(reinterpret_cast<uint32_t*>(d_tensor_.mutable_data_ptr<int32_t>())),
        column_(static_cast<size_t>(columns_)),
        pruned_(static_cast<size_t>(columns_ / group)),
        gains_(pruned_.size() * pruned_.size(), 0) {
    std::iota(column_.begin(), column_.end(), first);
    const uint8_t* from = levels.const_data_ptr<uint8_t>();
    const int64_t real = levels.size(1);
    parallel(columns_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t b = 0; b < blocks_; ++b)
          std::memcpy(x_ + at(b, c), from + c * real + b * stride_,
                      static_cast<size_t>(std::min(stride_, real - b * stride_)));
    });
  }

  void run(int64_t rounds) {
    std::vector<int64_t> changed(pruned_.size());
    std::iota(changed.begin(), changed.end(), 0);
    for (int64_t round = 0; round < rounds && !changed.empty(); ++round) {
      find_thresholds(changed);
      measure(changed);
      find_gains(changed);
      changed = exchange();
    }
    find_thresholds(changed);
  }

  int64_t groups() const { return static_cast<int64_t>(pruned_.size()); }
  uint64_t pruned(int64_t g) const { return pruned_[static_cast<size_t>(g)]; }
  std::vector<int64_t> members(int64_t g) const {
    std::vector<int64_t> found(column_.begin() + g * group_, column_.begin() + (g + 1) * group_);
    std::sort(found.begin(), found.end());
    return found;
  }

 private:
  int64_t at(int64_t block, int64_t place) const { return (block * columns_ + place) * stride_; }
  int64_t rows_of(int64_t block) const { return std::min(stride_, rows_ - block * stride_); }
  int64_t d(int64_t a, int64_t b) const { return d_[a * wide_ + b]; }

  void find_thresholds(const std::vector<int64_t>& groups) {
    parallel(static_cast<int64_t>(groups.size()), kLeastWork / (group_ * rows_ + 1),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t g = groups[static_cast<size_t>(i)];
                 uint64_t sum = 0;
                 for (int64_t b = 0; b < blocks_; ++b)
                   sum += run_.thresholds(x_ + at(b, g * group_), t_ + at(b, g * group_), rows_of(b), stride_,
                                          group_, kept_);
                 pruned_[static_cast<size_t>(g)] = sum;
               }
             });
  }

  // Rows of d of the groups whose thresholds are new; threads share out the columns.
  void measure(const std::vector<int64_t>& groups) {
    const int64_t count = static_cast<int64_t>(groups.size());
    const int64_t chunk = std::max<int64_t>(1, kCachedBytes / (group_ * stride_ + 1));
    const int64_t tiles = (columns_ + kTileColumns - 1) / kTileColumns;
    const int64_t work = count * group_ * kTileColumns * rows_ + 1;
    parallel(tiles, kLeastWork / work, [&](int64_t begin, int64_t end) {
      const int64_t low = begin * kTileColumns, high = std::min(columns_, end * kTileColumns);
      for (const int64_t g : groups)
        for (int64_t a = g * group_; a < (g + 1) * group_; ++a)
          std::fill(d_ + a * wide_ + low, d_ + a * wide_ + high, 0);
      for (int64_t b = 0; b < blocks_; ++b)
        for (int64_t start = 0; start < count; start += chunk)
          for (int64_t x = low; x < high; x += kTileColumns)
            for (int64_t i = start; i < std::min(count, start + chunk); ++i) {
              const int64_t a = groups[static_cast<size_t>(i)] * group_;
              run_.distances(t_ + at(b, a), group_, x_ + at(b, x), std::min(kTileColumns, high - x),
                             rows_of(b), stride_, d_ + a * wide_ + x, wide_);
            }
    });
  }

  // The best exchange between two groups; among equals the one with the lowest places.
  Exchange best_exchange(int64_t g, int64_t h) const {
    Exchange best;
    for (int64_t a = g * group_; a < (g + 1) * group_; ++a)
      for (int64_t b = h * group_; b < (h + 1) * group_; ++b) {
        const int64_t gain = d(a, b) + d(b, a) - d(a, a) - d(b, b);
        if (gain > best.gain) best = {gain, a, b};
      }
    return best;
  }

  void find_gains(const std::vector<int64_t>& changed) {
    std::vector<char> is_new(pruned_.size(), 0);
    for (const int64_t g : changed) is_new[static_cast<size_t>(g)] = 1;
    parallel(static_cast<int64_t>(changed.size()), kLeastWork / (16 * columns_ * group_ + 1),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i)
                 for (int64_t g = changed[static_cast<size_t>(i)], h = 0; h < groups(); ++h) {
                   if (g == h) continue;
                   const int64_t gain = best_exchange(g, h).gain;
                   gains_[static_cast<size_t>(g * groups() + h)] = gain;
                   if (!is_new[static_cast<size_t>(h)]) gains_[static_cast<size_t>(h * groups() + g)] = gain;
                 }
             });
  }

  // Carries out the best exchanges of disjoint pairs of groups, whose gains add up: groups choose in the order of their
  // greatest gain, each its best partner (among equals the lowest), unless one of the two has exchanged already. Returns
  // the groups that have.
  std::vector<int64_t> exchange() {
    std::vector<int64_t> by_gain(pruned_.size()), partner(pruned_.size()), gain(pruned_.size()), changed;
    for (int64_t g = 0; g < groups(); ++g) {
      const auto row = gains_.begin() + g * groups();
      const auto best = std::max_element(row, row + groups());
      partner[static_cast<size_t>(g)] = best - row;
      gain[static_cast<size_t>(g)] = *best;
    }
    std::iota(by_gain.begin(), by_gain.end(), 0);
    std::stable_sort(by_gain.begin(), by_gain.end(), [&](int64_t a, int64_t b) {
      return gain[static_cast<size_t>(a)] > gain[static_cast<size_t>(b)];
    });
    std::vector<char> used(pruned_.size(), 0);
    for (const int64_t g : by_gain) {
      const int64_t h = partner[static_cast<size_t>(g)];
      if (gain[static_cast<size_t>(g)] <= 0) break;
      if (used[static_cast<size_t>(g)] || used[static_cast<size_t>(h)]) continue;
      used[static_cast<size_t>(g)] = used[static_cast<size_t>(h)] = 1;
      const Exchange best = best_exchange(g, h);
      swap_places(best.mine, best.theirs);
    }
    for (int64_t g = 0; g < groups(); ++g)
      if (used[static_cast<size_t>(g)]) changed.push_back(g);
    return changed;
  }

  void swap_places(int64_t a, int64_t b) {
    for (int64_t block = 0; block < blocks_; ++block)
      std::swap_ranges(x_ + at(block, a), x_ + at(block, a) + stride_, x_ + at(block, b));
    for (int64_t row = 0; row < columns_; ++row) std::swap(d_[row * wide_ + a], d_[row * wide_ + b]);
    std::swap(column_[static_cast<size_t>(a)], column_[static_cast<size_t>(b)]);
  }

  const Kernels& run_;
  const int64_t columns_, rows_, stride_, blocks_, wide_, group_, kept_;
  const Tensor x_tensor_, t_tensor_, d_tensor_;
  uint8_t* const x_;              // levels [blocks, places, stride]
  uint8_t* const t_;              // thresholds, likewise
  uint32_t* const d_;             // [places, wide], of which [places, places]
  std::vector<int64_t> column_;   // in each place
  std::vector<uint64_t> pruned_;  // of each group
  std::vector<int64_t> gains_;    // [groups, groups], of the best exchange of each pair
};

void check(const Tensor& levels, int64_t kept, int64_t group, int64_t rounds, int64_t window) {
  LISSOM_CHECK_TYPE("pruning_permute", levels.scalar_type() == at::kByte, "levels must be uint8; got ",
                    levels.scalar_type());
  LISSOM_CHECK_VALUE("pruning_permute", levels.dim() == 2 && levels.size(0) <= kMostRows,
                     "levels must be [R, C] with at most ", kMostRows, " rows; got ", shape_of(levels));
  LISSOM_CHECK_VALUE("pruning_permute", 1 <= kept && kept < group && group <= kMostGroup,
                     "wanted 1 <= kept < group <= ", kMostGroup, "; got kept ", kept, ", group ", group);
  LISSOM_CHECK_VALUE("pruning_permute", levels.size(1) % group == 0,
                     "the C columns must divide into groups of ", group, "; got levels ", shape_of(levels));
  LISSOM_CHECK_VALUE("pruning_permute", rounds >= 0, "rounds must not be negative; got ", rounds);
  LISSOM_CHECK_VALUE("pruning_permute", window >= group, "window must be at least one group of ", group,
                     "; got ", window);
}

Tensor permute(const Tensor& levels, int64_t kept, int64_t group, int64_t rounds, int64_t window) {
  check(levels, kept, group, rounds, window);
  struct Group {
    uint64_t pruned;
    std::vector<int64_t> members;
  };
  std::vector<Group> found;
  const int64_t columns = levels.size(1), windows = (columns + window - 1) / window;
  const int64_t share = windows ? round_up((columns + windows - 1) / windows, group) : 0;
  for (int64_t first = 0; first < columns; first += share) {
    const int64_t width = std::min(share, columns - first);
    Search search(levels.narrow(1, first, width).t().contiguous(), first, group, kept);
    search.run(rounds);
    for (int64_t g = 0; g < search.groups(); ++g) found.push_back({search.pruned(g), search.members(g)});
  }
  std::sort(found.begin(), found.end(), [](const Group& a, const Group& b) {
    return a.pruned != b.pruned ? a.pruned > b.pruned : a.members[0] < b.members[0];
  });
  Tensor order = at::empty({columns}, levels.options().dtype(at::kLong));
  int64_t* out = order.mutable_data_ptr<int64_t>();
  for (const Group& g : found) out = std::copy(g.members.begin(), g.members.end(), out);
  return order;
}

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, m) { m.impl("pruning_permute", permute); }

}  // namespace lissom::pruning
