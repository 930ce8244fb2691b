#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "experts.h"
#include "swiglu.h"

namespace moe_dist {
namespace cpu {
namespace {

using torch::headeronly::ScalarType;

// A matrix in memory, transposed where `turned`: what a product takes.
struct Block {
  char* data;
  int64_t rows, columns;
  bool turned = false;

  Block transposed() const {
    return {data, columns, rows, !turned};
  }
};

// The experts' sizes and where the rows of each begin.
struct Stack {
  Stack(const Tensor& w_in, const Tensor& w_out, const Tensor& counts_tensor)
      : type(w_in.scalar_type()),
        size(w_in.element_size()),
        hidden(w_in.size(2)),
        inner(w_in.size(1)),
        width(w_out.size(2)),
        w_in_data(static_cast<char*>(w_in.data_ptr())),
        w_out_data(static_cast<char*>(w_out.data_ptr())),
        counts(static_cast<const int64_t*>(counts_tensor.data_ptr())),
        starts(counts_tensor.numel() + 1, 0) {
    for (size_t e = 0; e + 1 < starts.size(); ++e) starts[e + 1] = starts[e] + counts[e];
    STD_TORCH_CHECK(
        w_in.is_contiguous() && w_out.is_contiguous() && inner == 2 * width && w_out.size(1) == hidden &&
            counts_tensor.scalar_type() == ScalarType::Long && counts_tensor.numel() <= w_in.size(0),
        "a stack of experts");
  }
  int64_t total() const {
    return starts.back();
  }
  int64_t most() const {
    return starts.size() > 1 ? *std::max_element(counts, counts + starts.size() - 1) : 0;
  }
  // The rows that a product over `rows` rows is computed with, at least as many. torch's bf16 products generate code
  // for each shape that they meet, which takes longer than the product, and keep that of the last thousand shapes. The
  // numbers of rows change with every batch: only each sixteenth between two powers of two is used (3 % more rows).
  int64_t padded(int64_t rows) const {
    if (type == ScalarType::Float) return rows;
    int64_t step = 16;
    while (32 * step <= rows) step *= 2;
    return (rows + step - 1) / step * step;
  }
  // Expert e's part of a tensor [R, columns].
  Block rows_of(const Tensor& tensor, int64_t e, int64_t columns) const {
    return {static_cast<char*>(tensor.data_ptr()) + starts[e] * columns * size, counts[e], columns};
  }
  // The same, padded to `rows` rows. Where `zeros` are asked for the padding is zero, and `spare` holds a copy;
  // otherwise the rows of other experts may take its place, if there are enough of them.
  Block padded_rows_of(const Tensor& tensor, int64_t e, int64_t rows, int64_t columns, bool zeros, Block spare) const {
    Block block = rows_of(tensor, e, columns);
    if (rows > counts[e] && (zeros || starts[e] + rows > total())) {
      std::memcpy(spare.data, block.data, counts[e] * columns * size);
      block.data = spare.data;
      clear_from(counts[e], {block.data, rows, columns});
    }
    block.rows = rows;
    return block;
  }
  void clear_from(int64_t row, const Block& block) const {
    std::memset(block.data + row * block.columns * size, 0, (block.rows - row) * block.columns * size);
  }
  // Bring the rows that count from a padded block to where they belong, unless they were computed there.
  void keep(const Block& padded, const Block& target) const {
    if (padded.data != target.data) std::memcpy(target.data, padded.data, target.rows * target.columns * size);
  }
  Block w_in(int64_t e) const {
    return {w_in_data + e * inner * hidden * size, inner, hidden};
  }
  Block w_out(int64_t e) const {
    return {w_out_data + e * hidden * width * size, hidden, width};
  }
  Block gradient(const Tensor& stacked, int64_t e, int64_t rows, int64_t columns) const {
    return {static_cast<char*>(stacked.data_ptr()) + e * rows * columns * size, rows, columns};
  }
  Dtype dtype() const {
    return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
  }

  ScalarType type;
  int64_t size, hidden, inner, width;
  char *w_in_data, *w_out_data;
  const int64_t* counts;
  std::vector<int64_t> starts;
};

// Memory for what lies between an expert's products, on cache lines of its own.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(new char[bytes + 64]) {
    first_ = next_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
  }
  void release() {
    next_ = first_;
  }
  static int64_t rounded(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
  }
  Block take(int64_t rows, int64_t columns, int64_t most_rows, int64_t size) {
    const Block block{next_, rows, columns};
    next_ += rounded(most_rows * columns * size);
    return block;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char *first_, *next_;
};

Tensor as_tensor(const Block& block, ScalarType type) {
  const int64_t sizes[] = {block.rows, block.columns};
  const int64_t strides[] = {block.turned ? 1 : block.columns, block.turned ? block.rows : 1};
  return torch::stable::from_blob(
      block.data, {sizes, 2}, {strides, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

// out = a · b by torch's own product: MKL or oneDNN, one thread where this is called from inside a parallel loop.
void multiply(const Block& a, const Block& b, const Block& out, ScalarType type) {
  using torch::stable::detail::from;
  const Tensor left = as_tensor(a, type), right = as_tensor(b, type), target = as_tensor(out, type);
  std::array<StableIValue, 3> stack{from(left), from(right), from(target)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

Matrix matrix_of(const Block& block, int64_t size) {
  return {block.data, block.columns * size};
}

// body(expert, scratch, most) for every expert that has rows. The scratch holds, for each of `widths`, a matrix of so
// many columns and of `most` rows, padding included.
template <class F>
void for_experts(const Stack& stack, const std::vector<int64_t>& widths, const F& body) {
  std::vector<int64_t> order(stack.starts.size() - 1);
  std::iota(order.begin(), order.end(), 0);
  order.erase(
      std::remove_if(order.begin(), order.end(), [&](int64_t e) { return stack.counts[e] == 0; }), order.end());
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return stack.counts[a] > stack.counts[b]; });

  const int64_t threads = torch::stable::get_num_threads();
  const auto run = [&](std::atomic<size_t>& next, size_t end, int64_t most) {
    most = stack.padded(most);
    int64_t bytes = 0;
    for (int64_t width : widths) bytes += Scratch::rounded(most * width * stack.size);
    std::unique_ptr<Scratch> scratch;
    for (size_t i = next++; i < end; i = next++) {
      if (!scratch) scratch = std::make_unique<Scratch>(bytes);
      body(order[i], *scratch, most);
      scratch->release();
    }
  };

  // Experts beyond a fair share by more than a quarter: all threads together.
  size_t large = 0;
  int64_t left = stack.total();
  while (threads > 1 && large < order.size() && 4 * stack.counts[order[large]] * threads > 5 * left) {
    left -= stack.counts[order[large++]];
  }
  std::atomic<size_t> next{0};
  run(next, large, stack.most());
  next = large;
  const int64_t most = large < order.size() ? stack.counts[order[large]] : 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) run(next, order.size(), most);
  });
}

}  // namespace

void experts_forward(
    const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& counts, const float* factor,
    const Tensor& y, const std::optional<Tensor>& z) {
  const Stack stack(w_in, w_out, counts);
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && (!z || z->is_contiguous()), "dense rows expected");
  STD_TORCH_CHECK(x.size(0) == stack.total(), "as many rows as are counted");
  const int64_t size = stack.size;
  for_experts(stack, {stack.width, stack.inner, stack.hidden}, [&](int64_t e, Scratch& scratch, int64_t most) {
    const int64_t rows = stack.padded(stack.counts[e]);
    const bool in_place = rows == stack.counts[e];
    const Block a = scratch.take(rows, stack.width, most, size);
    const Block z_scratch = scratch.take(rows, stack.inner, most, size);
    const Block spare = scratch.take(rows, stack.hidden, most, size);  // of x, then of y

    const Block z_e = z && in_place ? stack.rows_of(*z, e, stack.inner) : z_scratch;
    multiply(
        stack.padded_rows_of(x, e, rows, stack.hidden, false, spare), stack.w_in(e).transposed(), z_e, stack.type);
    if (z) stack.keep(z_e, stack.rows_of(*z, e, stack.inner));
    const float* factor_e = factor ? factor + stack.starts[e] : nullptr;
    swiglu(stack.dtype(), stack.counts[e], stack.width, matrix_of(z_e, size), factor_e, matrix_of(a, size));
    stack.clear_from(stack.counts[e], a);
    const Block y_e = stack.rows_of(y, e, stack.hidden);
    const Block target = in_place ? y_e : spare;
    multiply(a, stack.w_out(e).transposed(), target, stack.type);
    stack.keep(target, y_e);
  });
}

void experts_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& z, const Tensor& w_in,
    const Tensor& w_out, const Tensor& counts, const float* factor, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dw_in, const std::optional<Tensor>& dw_out, float* dfactor) {
  const Stack stack(w_in, w_out, counts);
  STD_TORCH_CHECK(dy.is_contiguous() && (x || (z && !dw_in)), "the rows are needed");
  STD_TORCH_CHECK(dy.size(0) == stack.total(), "as many rows as are counted");
  for (const auto* tensor : {&x, &z, &dx, &dw_in, &dw_out}) {
    STD_TORCH_CHECK(!*tensor || (*tensor)->is_contiguous(), "dense tensors expected");
  }
  const int64_t size = stack.size;
  const std::vector<int64_t> widths{stack.width, stack.inner, z ? 0 : stack.inner, stack.hidden};
  for_experts(stack, widths, [&](int64_t e, Scratch& scratch, int64_t most) {
    const int64_t count = stack.counts[e], rows = stack.padded(count);
    const Block a = scratch.take(rows, stack.width, most, size), dz = scratch.take(rows, stack.inner, most, size);
    const Block z_scratch = scratch.take(rows, stack.inner, z ? 0 : most, size);
    const Block spare = scratch.take(rows, stack.hidden, most, size);  // of x, dy, dx and x again

    const Block z_e = z ? stack.rows_of(*z, e, stack.inner) : z_scratch;
    if (!z) {
      const Block x_e = stack.padded_rows_of(*x, e, rows, stack.hidden, false, spare);
      multiply(x_e, stack.w_in(e).transposed(), z_e, stack.type);
    }
    const Block dy_e = stack.padded_rows_of(dy, e, rows, stack.hidden, dw_out.has_value(), spare);
    multiply(dy_e, stack.w_out(e), a, stack.type);  // the gradient of a, which a itself replaces in the next line
    swiglu_backward(
        stack.dtype(), count, stack.width, matrix_of(a, size), matrix_of(z_e, size),
        factor ? factor + stack.starts[e] : nullptr, matrix_of(a, size), matrix_of(dz, size),
        dfactor ? dfactor + stack.starts[e] : nullptr);
    stack.clear_from(count, a);
    stack.clear_from(count, dz);
    if (dw_out) {
      multiply(dy_e.transposed(), a, stack.gradient(*dw_out, e, stack.hidden, stack.width), stack.type);
    }
    if (dx) {
      const Block dx_e = stack.rows_of(*dx, e, stack.hidden);
      const Block target = rows == count ? dx_e : spare;
      multiply(dz, stack.w_in(e), target, stack.type);
      stack.keep(target, dx_e);
    }
    if (dw_in) {
      const Block x_e = stack.padded_rows_of(*x, e, rows, stack.hidden, true, spare);
      multiply(dz.transposed(), x_e, stack.gradient(*dw_in, e, stack.inner, stack.hidden), stack.type);
    }
  });
}

}  // namespace cpu
}  // namespace moe_dist
