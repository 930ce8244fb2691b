// The op table: schemas, and what each op calls. Built against torch's stable ABI, so that one library serves every torch
// from 2.11 on.
//
// Every op writes into outputs that the caller allocated (moe_dist/ops/kernels.py), but for the row map, whose four small
// ones would take the caller longer than the sort of a small batch. A failed check here is a bug of that file, not of a
// user's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "experts.h"
#include "lora.h"
#include "permute.h"
#include "recycled.h"
#include "swiglu.h"

namespace {

using namespace moe_dist::arguments;
using moe_dist::Matrix;
using moe_dist::Slots;

namespace on_cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> row_map(Tensor ids, int64_t num_experts, int64_t align, int64_t) {
  STD_TORCH_CHECK(num_experts <= moe_dist::cpu::kMaxExperts, "too many experts for the row map");
  const RowMapTensors out(ids, num_experts, align);
  moe_dist::cpu::row_map(ids_of(ids), num_experts, align, out.memory());
  return out.all();
}

void permute(Tensor x, Tensor row_of_slot, std::optional<Tensor> slot_of_row, Tensor rows) {
  check_widths(x, rows);
  moe_dist::cpu::permute(
      slots_of(row_of_slot, slot_of_row), x.size(1), dtype_of(x), matrix_of(x), dtype_of(rows), matrix_of(rows));
}

void unpermute(Tensor rows, Tensor row_of_slot, std::optional<Tensor> probs, Tensor y) {
  check_widths(rows, y);
  const Slots slots = slots_of(row_of_slot);
  moe_dist::cpu::unpermute(
      slots, y.size(1), dtype_of(rows), matrix_of(rows), probs_of(probs, slots), dtype_of(y), matrix_of(y));
}

void unpermute_backward(
    Tensor dy, Tensor row_of_slot, std::optional<Tensor> slot_of_row, std::optional<Tensor> probs,
    std::optional<Tensor> rows, Tensor drows, std::optional<Tensor> dprobs) {
  check_widths(dy, drows);
  if (rows) check_same(*rows, drows);
  STD_TORCH_CHECK(rows.has_value() == dprobs.has_value(), "rows and dprobs go together");
  const Slots slots = slots_of(row_of_slot, slot_of_row);
  moe_dist::cpu::unpermute_backward(
      slots, dy.size(1), dtype_of(dy), matrix_of(dy), probs_of(probs, slots), dtype_of(drows),
      rows ? matrix_of(*rows) : Matrix{}, matrix_of(drows), probs_of(dprobs, slots));
}

void swiglu(Tensor z, std::optional<Tensor> factor, Tensor a) {
  check_swiglu(z, a);
  moe_dist::cpu::swiglu(
      dtype_of(z), a.size(0), a.size(1), matrix_of(z), factors_of(factor, a.size(0)), matrix_of(a));
}

void swiglu_backward(
    Tensor da, Tensor z, std::optional<Tensor> factor, Tensor a, Tensor dz, std::optional<Tensor> dfactor) {
  check_swiglu(z, a);
  check_swiglu(dz, da);
  check_same(z, dz);
  moe_dist::cpu::swiglu_backward(
      dtype_of(z), a.size(0), a.size(1), matrix_of(da), matrix_of(z), factors_of(factor, a.size(0)), matrix_of(a),
      matrix_of(dz), factors_of(dfactor, a.size(0)));
}

void experts_forward(
    Tensor x, Tensor w_in, Tensor w_out, Tensor counts, std::optional<Tensor> factor, Tensor y,
    std::optional<Tensor> z) {
  moe_dist::cpu::experts_forward(x, w_in, w_out, counts, factors_of(factor, y.size(0)), y, z);
}

void experts_backward(
    Tensor dy, std::optional<Tensor> x, std::optional<Tensor> z, Tensor w_in, Tensor w_out, Tensor counts,
    std::optional<Tensor> factor, std::optional<Tensor> dx, std::optional<Tensor> dw_in, std::optional<Tensor> dw_out,
    std::optional<Tensor> dfactor) {
  const int64_t rows = dy.size(0);
  moe_dist::cpu::experts_backward(
      dy, x, z, w_in, w_out, counts, factors_of(factor, rows), dx, dw_in, dw_out, factors_of(dfactor, rows));
}

Tensor lora_forward(Tensor x, Tensor a, Tensor b, Tensor mix, Tensor starts, Tensor y) {
  return moe_dist::cpu::lora_forward(x, a, b, mix, starts, y);
}

void lora_backward(
    Tensor dy, Tensor a, Tensor b, Tensor mix, Tensor starts, std::optional<Tensor> u, std::optional<Tensor> dx,
    std::optional<Tensor> dmix) {
  moe_dist::cpu::lora_backward(dy, a, b, mix, starts, u, dx, dmix);
}

}  // namespace on_cpu

#ifdef MOE_DIST_CUDA
// Weak: a torch without CUDA lacks it, and there the library must load all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace on_cuda {

// Makes the tensor's device the current one, for as long as it lives.
struct Launch {
  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no CUDA stream");
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

void check(const char* error) {
  STD_TORCH_CHECK(!error, "CUDA launch failed: ", error);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_map(
    Tensor ids, int64_t num_experts, int64_t align, int64_t expected_rows) {
  STD_TORCH_CHECK(num_experts <= moe_dist::cuda::kMaxExperts, "too many experts for the CUDA row map");
  const Launch launch(ids);
  const RowMapTensors out(ids, num_experts, align);
  Tensor scratch =
      torch::stable::new_empty(ids, {moe_dist::cuda::row_map_scratch(ids.numel(), num_experts)}, ScalarType::Int);
  check(moe_dist::cuda::row_map(
      ids_of(ids), num_experts, align, expected_rows, out.memory(), static_cast<int32_t*>(scratch.data_ptr()),
      launch.stream));
  return out.all();
}

void permute(Tensor x, Tensor row_of_slot, std::optional<Tensor> slot_of_row, Tensor rows) {
  check_widths(x, rows);
  const Launch launch(x);
  check(moe_dist::cuda::permute(
      slots_of(row_of_slot, slot_of_row), x.size(1), dtype_of(x), matrix_of(x), dtype_of(rows), matrix_of(rows),
      launch.stream));
}

void unpermute(Tensor rows, Tensor row_of_slot, std::optional<Tensor> probs, Tensor y) {
  check_widths(rows, y);
  const Launch launch(rows);
  const Slots slots = slots_of(row_of_slot);
  check(moe_dist::cuda::unpermute(
      slots, y.size(1), dtype_of(rows), matrix_of(rows), probs_of(probs, slots), dtype_of(y), matrix_of(y),
      launch.stream));
}

void unpermute_backward(
    Tensor dy, Tensor row_of_slot, std::optional<Tensor> slot_of_row, std::optional<Tensor> probs,
    std::optional<Tensor> rows, Tensor drows, std::optional<Tensor> dprobs) {
  check_widths(dy, drows);
  if (rows) check_same(*rows, drows);
  STD_TORCH_CHECK(rows.has_value() == dprobs.has_value(), "rows and dprobs go together");
  const Launch launch(dy);
  const Slots slots = slots_of(row_of_slot, slot_of_row);
  check(moe_dist::cuda::unpermute_backward(
      slots, dy.size(1), dtype_of(dy), matrix_of(dy), probs_of(probs, slots), dtype_of(drows),
      rows ? matrix_of(*rows) : Matrix{}, matrix_of(drows), probs_of(dprobs, slots), launch.stream));
}

void swiglu(Tensor z, std::optional<Tensor> factor, Tensor a) {
  check_swiglu(z, a);
  const Launch launch(z);
  check(moe_dist::cuda::swiglu(
      dtype_of(z), a.size(0), a.size(1), matrix_of(z), factors_of(factor, a.size(0)), matrix_of(a), launch.stream));
}

void swiglu_backward(
    Tensor da, Tensor z, std::optional<Tensor> factor, Tensor a, Tensor dz, std::optional<Tensor> dfactor) {
  check_swiglu(z, a);
  check_swiglu(dz, da);
  check_same(z, dz);
  const Launch launch(z);
  check(moe_dist::cuda::swiglu_backward(
      dtype_of(z), a.size(0), a.size(1), matrix_of(da), matrix_of(z), factors_of(factor, a.size(0)), matrix_of(a),
      matrix_of(dz), factors_of(dfactor, a.size(0)), launch.stream));
}

}  // namespace on_cuda
#endif  // MOE_DIST_CUDA

std::string instruction_set() {
  return moe_dist::cpu::instruction_set();
}

bool has_cuda() {
#ifdef MOE_DIST_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(moe_dist, library) {
  library.def("instruction_set() -> str");
  library.def("has_cuda() -> bool");
  library.def("recycled(int bytes) -> Tensor");
  library.def("recycled_bytes() -> (int, int, int)");
  library.def(
      "row_map(Tensor ids, int num_experts, int align, int expected_rows) -> "
      "(Tensor counts, Tensor row_of_slot, Tensor slot_of_row, Tensor status)");
  library.def("permute(Tensor x, Tensor row_of_slot, Tensor? slot_of_row, Tensor(a!) rows) -> ()");
  library.def("unpermute(Tensor rows, Tensor row_of_slot, Tensor? probs, Tensor(a!) y) -> ()");
  library.def(
      "unpermute_backward(Tensor dy, Tensor row_of_slot, Tensor? slot_of_row, Tensor? probs, Tensor? rows, "
      "Tensor(a!) drows, Tensor(b!)? dprobs) -> ()");
  library.def("swiglu(Tensor z, Tensor? factor, Tensor(a!) a) -> ()");
  library.def(
      "swiglu_backward(Tensor da, Tensor z, Tensor? factor, Tensor(a!) a, Tensor(b!) dz, Tensor(c!)? dfactor) -> ()");
  library.def(
      "experts_forward(Tensor x, Tensor w_in, Tensor w_out, Tensor counts, Tensor? factor, Tensor(a!) y, "
      "Tensor(b!)? z) -> ()");
  library.def(
      "experts_backward(Tensor dy, Tensor? x, Tensor? z, Tensor w_in, Tensor w_out, Tensor counts, Tensor? factor, "
      "Tensor(a!)? dx, Tensor(b!)? dw_in, Tensor(c!)? dw_out, Tensor(d!)? dfactor) -> ()");
  library.def("lora_forward(Tensor x, Tensor a, Tensor b, Tensor mix, Tensor starts, Tensor(a!) y) -> Tensor");
  library.def(
      "lora_backward(Tensor dy, Tensor a, Tensor b, Tensor mix, Tensor starts, Tensor? u, Tensor(a!)? dx, "
      "Tensor(b!)? dmix) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moe_dist, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
  library.impl("has_cuda", TORCH_BOX(&has_cuda));
  library.impl("recycled", TORCH_BOX(&moe_dist::cpu::recycled));
  library.impl("recycled_bytes", TORCH_BOX(&moe_dist::cpu::recycled_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(moe_dist, CPU, library) {
  library.impl("row_map", TORCH_BOX(&on_cpu::row_map));
  library.impl("permute", TORCH_BOX(&on_cpu::permute));
  library.impl("unpermute", TORCH_BOX(&on_cpu::unpermute));
  library.impl("unpermute_backward", TORCH_BOX(&on_cpu::unpermute_backward));
  library.impl("swiglu", TORCH_BOX(&on_cpu::swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&on_cpu::swiglu_backward));
  library.impl("experts_forward", TORCH_BOX(&on_cpu::experts_forward));
  library.impl("experts_backward", TORCH_BOX(&on_cpu::experts_backward));
  library.impl("lora_forward", TORCH_BOX(&on_cpu::lora_forward));
  library.impl("lora_backward", TORCH_BOX(&on_cpu::lora_backward));
}

#ifdef MOE_DIST_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_dist, CUDA, library) {
  library.impl("row_map", TORCH_BOX(&on_cuda::row_map));
  library.impl("permute", TORCH_BOX(&on_cuda::permute));
  library.impl("unpermute", TORCH_BOX(&on_cuda::unpermute));
  library.impl("unpermute_backward", TORCH_BOX(&on_cuda::unpermute_backward));
  library.impl("swiglu", TORCH_BOX(&on_cuda::swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&on_cuda::swiglu_backward));
}
#endif
