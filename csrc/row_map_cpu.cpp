// The row map on the CPU: a stable counting sort in two passes over the slots.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "permute.h"
#include "vec.h"

namespace moe_dist {
namespace cpu {
namespace {

// Fetches the line of an address that will be read, or written, soon.
inline void fetch(const void* address) {
  __builtin_prefetch(address, 0, 3);
}
inline void fetch_to_write(const void* address) {
#ifdef MOE_DIST_X86
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));  // does nothing where it is not known
#else
  __builtin_prefetch(address, 1, 3);
#endif
}

constexpr int64_t kSlotsPerChunk = int64_t{8} << 10;
constexpr int64_t kLine = 64 / sizeof(int32_t);  // rows in a cache line
constexpr int64_t kAhead = 4096;                 // bytes: processors fetch ahead by themselves, but not across pages
constexpr int64_t kGroup = 8;                    // slots taken together: as many as there are registers for

// Between the two passes over a chunk of slots, row_of_slot holds of each slot the expert, in the low `bits`, and above
// them how many slots of the chunk go to that expert before it. So the second pass reads no ids and changes no counters,
// and each pass stores little more than one word a slot, which is what bounds them. Dropped slots are those of an expert
// E: their rows would follow the last, and slot_of_row has room for them.

// Bits that tell E + 1 experts apart.
int bits_for(int64_t num_experts) {
  int bits = 1;
  while ((int64_t{1} << bits) <= num_experts) ++bits;
  return bits;
}

// Takes the next word of an expert's counter.
inline uint32_t take(uint32_t* counter, int64_t id, uint32_t one) {
  const uint32_t word = counter[id];
  counter[id] = word + one;
  return word;
}

// As count_slots, one by one: slots that may be dropped, or wrong. No branch depends on that.
template <class Id>
__attribute__((noinline)) int64_t count_each(
    const Id* id_of, int64_t begin, int64_t end, int64_t num_experts, uint32_t one, uint32_t* counter,
    uint32_t* word_of_slot) {
  int64_t worst = -1;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t id = id_of[slot];
    worst = std::max(worst, id);
    word_of_slot[slot] = take(counter, std::min<uint64_t>(id, num_experts), one);
  }
  return worst < num_experts ? -1 : worst;
}

// First pass, over slots [begin, end) -> the largest id that is not below E, else -1. counter [E + 1] starts with e and
// ends with the number of the expert's slots above that, where the words of row_of_slot have theirs. Fetches the lines
// of slot_of_row, which the second pass writes in no order that a processor could foresee. Not inlined: there are
// registers for this loop, and no more.
template <class Id>
__attribute__((noinline)) int64_t count_slots(
    const Id* __restrict id_of, int64_t begin, int64_t end, int64_t num_experts, uint32_t one,
    uint32_t* __restrict counter, uint32_t* __restrict word_of_slot, const int32_t* slot_of_row) {
  using Word = std::make_unsigned_t<Id>;
  const Word last = static_cast<Word>(num_experts - 1);
  for (int64_t e = 0; e <= num_experts; ++e) counter[e] = static_cast<uint32_t>(e);
  int64_t worst = -1, slot = begin;
  const auto count_group = [&](int64_t from) {
    Word outside = 0;  // its top bit: whether an id is below 0 or above the last
    for (int64_t j = 0; j < kGroup; ++j) {
      const Word id = static_cast<Word>(id_of[from + j]);
      outside |= id | (last - id);
    }
    if (static_cast<Id>(outside) < 0) {
      worst = std::max(worst, count_each(id_of, from, from + kGroup, num_experts, one, counter, word_of_slot));
      return;
    }
    uint32_t word[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) word[j] = take(counter, id_of[from + j], one);
    for (int64_t j = 0; j < kGroup; ++j) word_of_slot[from + j] = word[j];
  };
  for (; slot + kLine <= end; slot += kLine) {
    for (size_t byte = 0; byte < kLine * sizeof(Id); byte += 64) {
      fetch(reinterpret_cast<const char*>(id_of + slot) + kAhead + byte);
    }
    fetch_to_write(reinterpret_cast<const char*>(word_of_slot + slot) + kAhead);
    fetch_to_write(slot_of_row + slot);
    for (int64_t from = slot; from < slot + kLine; from += kGroup) count_group(from);
  }
  return std::max(worst, count_each(id_of, slot, end, num_experts, one, counter, word_of_slot));
}

// Second pass: row_of_slot gets its rows and slot_of_row its slots; first [E + 1] is the chunk's first row of each
// expert. kDrops: rows from `rows` on are those of dropped slots.
template <bool kDrops>
__attribute__((noinline)) void place_slots(
    const uint32_t* __restrict first, int64_t begin, int64_t end, int bits, int32_t rows, int32_t* row_of_slot,
    int32_t* __restrict slot_of_row) {
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const auto row_of = [&](int32_t word) {
    const uint32_t bare = static_cast<uint32_t>(word);
    return static_cast<int32_t>(first[bare & mask] + (bare >> bits));
  };
  const auto shown = [&](int32_t row) { return kDrops && row >= rows ? -1 : row; };
  int64_t slot = begin;
  for (; slot + kGroup <= end; slot += kGroup) {
    int32_t row[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) row[j] = row_of(row_of_slot[slot + j]);
    for (int64_t j = 0; j < kGroup; ++j) row_of_slot[slot + j] = shown(row[j]);
    for (int64_t j = 0; j < kGroup; ++j) slot_of_row[row[j]] = static_cast<int32_t>(slot + j);
  }
  for (; slot < end; ++slot) {
    const int32_t row = row_of(row_of_slot[slot]);
    row_of_slot[slot] = shown(row);
    slot_of_row[row] = static_cast<int32_t>(slot);
  }
}

// Each chunk of slots counts its experts; a scan over (expert, chunk) turns the counts into the first row of each
// expert in each chunk; then each chunk places its slots in order. Any cut into chunks gives the same, stable, sort.
template <class Id>
void sort_slots(const Ids& ids, int64_t num_experts, int64_t align, const RowMap& out) {
  const Id* id_of = static_cast<const Id*>(ids.data);
  const int bits = bits_for(num_experts);
  // Two chunks a thread; the rows of an expert in a chunk fill a few lines.
  const int64_t least = std::max(kSlotsPerChunk, 4 * kLine * num_experts);
  const int64_t most = (int64_t{1} << (32 - bits)) - 1;  // slots that a counter can count
  const int64_t chunks = std::max(
      std::clamp<int64_t>(ids.slots / least, 1, 2 * torch::stable::get_num_threads()), (ids.slots + most - 1) / most);
  const int64_t stride = num_experts + 1 + 2 * kLine;  // threads' counters two lines apart: processors fetch in pairs
  const std::unique_ptr<uint32_t[]> cursor(new uint32_t[chunks * stride]);
  std::vector<int64_t> worst(chunks, -1);
  const auto for_chunks = [&](const auto& body) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        body(chunk, ids.slots * chunk / chunks, ids.slots * (chunk + 1) / chunks);
      }
    });
  };

  for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
    worst[chunk] = count_slots(
        id_of, begin, end, num_experts, uint32_t{1} << bits, cursor.get() + chunk * stride,
        reinterpret_cast<uint32_t*>(out.row_of_slot), out.slot_of_row);
  });
  out.status[1] = *std::max_element(worst.begin(), worst.end());
  if (out.status[1] >= 0) return;

  int64_t row = 0;
  const auto give_rows = [&](int64_t e) {
    const int64_t first = row;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      uint32_t& here = cursor[chunk * stride + e];
      const uint32_t count = here >> bits;
      here = static_cast<uint32_t>(row);
      row += count;
    }
    return row - first;
  };
  int64_t kept = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    out.counts[e] = give_rows(e);
    kept += out.counts[e];
    for (; align > 1 && row % align != 0; ++row) out.slot_of_row[row] = -1;
  }
  const int64_t rows = row;
  out.status[0] = kept;
  out.status[2] = rows;
  give_rows(num_experts);

  for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
    const auto place = kept == ids.slots ? place_slots<false> : place_slots<true>;
    place(cursor.get() + chunk * stride, begin, end, bits, static_cast<int32_t>(rows), out.row_of_slot, out.slot_of_row);
  });
}

}  // namespace

void row_map(const Ids& ids, int64_t num_experts, int64_t align, const RowMap& out) {
  if (ids.wide) {
    sort_slots<int64_t>(ids, num_experts, align, out);
  } else {
    sort_slots<int32_t>(ids, num_experts, align, out);
  }
}

}  // namespace cpu
}  // namespace moe_dist
