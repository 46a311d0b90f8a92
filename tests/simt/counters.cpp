// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <string.h>

#include <algorithm>

namespace simt {
namespace {

struct Key {
  const char *operation, *file;
  unsigned line;
  Space space;
  bool operator==(const Key& o) const {
    return operation == o.operation && file == o.file && line == o.line && space == o.space;
  }
};
struct Hash {
  size_t operator()(const Key& k) const {
    return reinterpret_cast<size_t>(k.file) * 31 + reinterpret_cast<size_t>(k.operation) * 7 +
           k.line * 2654435761u + static_cast<size_t>(k.space);
  }
};

std::vector<Place>& places() {
  static std::vector<Place> all;
  return all;
}

std::string plain_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string json_of(const std::map<uint16_t, Traffic>& traffic, const char* units) {
  std::string out = "[";
  for (const auto& [number, t] : traffic) {
    if (out.size() > 1) out += ", ";
    out += "{\"operation\": " + quoted(t.operation) + ", \"file\": " + quoted(t.file) +
           ", \"line\": " + std::to_string(t.line) + ", \"requests\": " + std::to_string(t.requests) +
           ", \"" + units + "\": " + std::to_string(t.units) + ", \"ideal\": " + std::to_string(t.ideal) +
           ", \"bytes\": " + std::to_string(t.bytes) + "}";
  }
  return out + "]";
}

}  // namespace

uint16_t place_number(const char* operation, Space space, const std::source_location& at) {
  static std::unordered_map<Key, uint16_t, Hash> numbers;
  const auto [found, fresh] = numbers.try_emplace(Key{operation, at.file_name(), at.line(), space},
                                                  static_cast<uint16_t>(places().size()));
  if (fresh) places().push_back({operation, space, at});
  return found->second;
}

const Place& place(uint16_t number) { return places()[number]; }

void Traffic::add(const Traffic& other) {
  requests += other.requests;
  units += other.units;
  ideal += other.ideal;
  bytes += other.bytes;
}

Traffic Counters::total(Space space, const std::string& operation) const {
  Traffic sum;
  for (const auto& [number, t] : space == Space::shared ? shared : global)
    if (operation.empty() || t.operation == operation) sum.add(t);
  return sum;
}

std::string Counters::json(const std::string& kernel) const {
  std::string out = "{\"kernel\": " + quoted(kernel);
  const auto field = [&](const char* key, uint64_t value) {
    out += std::string(", \"") + key + "\": " + std::to_string(value);
  };
  field("launches", launches);
  field("blocks", blocks);
  field("threads", threads);
  field("shared_bytes", shared_bytes);
  field("read_footprint", read_footprint);
  field("write_footprint", write_footprint);
  out += ", \"matrix\": {";
  const char* comma = "";
  for (const auto& [operation, count] : matrix) {
    out += comma + quoted(operation) + ": " + std::to_string(count);
    comma = ", ";
  }
  return out + "}, \"shared\": " + json_of(shared, "wavefronts") +
         ", \"global\": " + json_of(global, "sectors") + "}";
}

// 32 banks of 4 bytes; lanes go together while they ask for at most 128 bytes: all 32 up to 4 bytes each, 16 with 8, 8 with 16.
// A bank gives one word a wavefront, to all lanes that want it.
unsigned wavefronts(const uint64_t* offsets, uint32_t mask, int bytes, unsigned* ideal) {
  const int together = bytes <= 4 ? 32 : 128 / bytes;
  unsigned all = 0;
  *ideal = 0;
  for (int first = 0; first < 32; first += together) {
    uint64_t words[32];
    int count = 0;
    for (int l = first; l < first + together; ++l)
      if (mask >> l & 1u)
        for (int b = 0; b < bytes; b += 4) words[count++] = (offsets[l] + b) / 4;
    if (count == 0) continue;
    std::sort(words, words + count);
    count = static_cast<int>(std::unique(words, words + count) - words);
    unsigned bank[32] = {}, most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, ++bank[words[i] % 32]);
    all += most;
    ++*ideal;
  }
  return all;
}

unsigned sectors(const uint64_t* addresses, uint32_t mask, int bytes, unsigned* ideal) {
  uint64_t sorted[32];
  int count = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1u) sorted[count++] = addresses[l];
  std::sort(sorted, sorted + count);
  count = static_cast<int>(std::unique(sorted, sorted + count) - sorted);
  unsigned touched = 0;
  for (int i = 0; i < count; ++i) touched += i == 0 || sorted[i] / 32 != sorted[i - 1] / 32;
  *ideal = (count * bytes + 31) / 32;
  return touched;
}

void Footprint::add(uint64_t address) {
  const uint64_t number = address >> 12;
  if (number != last_) {
    page_ = &pages_[number];
    last_ = number;
  }
  const uint64_t sector = address >> 5 & 127u, bit = uint64_t{1} << (sector & 63u);
  uint64_t& bits = page_->bits[sector >> 6];
  sectors_ += !(bits & bit);
  bits |= bit;
}

void Meter::start_block(int warps) {
  for (size_t w = 0; w < warps_.size(); ++w) meet(static_cast<int>(w));
  warps_.resize(warps);
}

Meter::~Meter() {
  start_block(0);
  counters_.read_footprint += read_.bytes();
  counters_.write_footprint += written_.bytes();
}

void Meter::access(uint16_t number, int thread, uint64_t address, int bytes, bool write) {
  Queue& queue = warps_[thread / 32][number];
  const int lane = thread % 32;
  const uint64_t index = queue.taken[lane]++ - queue.closed;
  if (index >= queue.open.size()) queue.open.resize(index + 1);
  Request& r = queue.open[index];
  r.here |= 1u << lane;
  if (bytes > 0) {
    r.mask |= 1u << lane;
    r.bytes = bytes;
    r.address[lane] = address;
    if (place(number).space == Space::global) (write ? written_ : read_).add(address);
  }
  while (!queue.open.empty() && queue.open.front().here == 0xffffffffu) {
    request(number, queue.open.front().address, queue.open.front().mask, queue.open.front().bytes);
    queue.open.pop_front();
    ++queue.closed;
  }
}

void Meter::meet(int warp) {
  for (auto& [number, queue] : warps_[warp]) {
    if (queue.open.empty() && queue.closed == 0) continue;
    for (const Request& r : queue.open) request(number, r.address, r.mask, r.bytes);
    queue.open.clear();
    queue.closed = 0;
    std::fill(queue.taken, queue.taken + 32, 0);
  }
}

void Meter::request(uint16_t number, const uint64_t* addresses, uint32_t mask, int bytes) {
  if (mask == 0) return;
  const Place& p = place(number);
  Traffic& t = (p.space == Space::shared ? counters_.shared : counters_.global)[number];
  if (t.requests++ == 0) {
    t.operation = p.operation;
    t.file = plain_name(p.at.file_name());
    t.line = p.at.line();
  }
  unsigned ideal = 0;
  t.units += (p.space == Space::shared ? wavefronts : sectors)(addresses, mask, bytes, &ideal);
  t.ideal += ideal;
  t.bytes += static_cast<uint64_t>(__builtin_popcount(mask)) * bytes;
}

}  // namespace simt
