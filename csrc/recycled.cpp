#include "recycled.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <new>

namespace moe_dist {
namespace cpu {
namespace {

constexpr size_t kAlignment = 4096;
// A block serves requests of at least four fifths of its size: the rows of a layer differ a little from step to step.
constexpr int64_t kSlack = 5;

class Blocks {
 public:
  struct Block {
    void* data;
    int64_t bytes;
  };

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fitting = free_.lower_bound(bytes);
    Block block{nullptr, bytes};
    if (fitting != free_.end() && (kSlack - 1) * fitting->first <= kSlack * bytes) {
      block = {fitting->second, fitting->first};
      waiting_ -= block.bytes;
      free_.erase(fitting);
    }
    used_ += block.bytes;
    most_ = std::max(most_, used_);
    trim();  // before more memory is asked for
    if (block.data == nullptr) block.data = ::operator new(bytes, std::align_val_t{kAlignment});
    return block;
  }

  void put(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    waiting_ += block.bytes;
    free_.emplace(block.bytes, block.data);
    trim();
  }

  std::tuple<int64_t, int64_t, int64_t> bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {used_, waiting_, most_};
  }

 private:
  // Together, what is used and what waits is never more than what was once used.
  void trim() {
    while (used_ + waiting_ > most_) {
      const auto smallest = free_.begin();
      ::operator delete(smallest->second, std::align_val_t{kAlignment});
      waiting_ -= smallest->first;
      free_.erase(smallest);
    }
  }

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  int64_t used_ = 0, waiting_ = 0, most_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

torch::stable::Tensor recycled(int64_t bytes) {
  STD_TORCH_CHECK(bytes > 0, "a size above zero expected");
  const Blocks::Block block = blocks().take(bytes);
  const int64_t one = 1;
  return torch::stable::from_blob(
      block.data, {&bytes, 1}, {&one, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      torch::headeronly::ScalarType::Byte, [block](void*) { blocks().put(block); });
}

std::tuple<int64_t, int64_t, int64_t> recycled_bytes() {
  return blocks().bytes();
}

}  // namespace cpu
}  // namespace moe_dist
