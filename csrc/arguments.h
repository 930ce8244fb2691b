// The way from tensors to raw memory, with the checks on it. A failed check is a bug of moe_dist/ops, not of a user.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "permute.h"

namespace moe_dist {
// Hidden, as torch's stable types are.
namespace [[gnu::visibility("hidden")]] arguments {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "fp32 or bf16 expected");
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

inline Matrix matrix_of(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1 || tensor.numel() == 0), "dense columns expected");
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * static_cast<int64_t>(tensor.element_size())};
}

// slot_of_row is given where there may be pad rows.
inline Slots slots_of(const Tensor& row_of_slot, const std::optional<Tensor>& slot_of_row = std::nullopt) {
  STD_TORCH_CHECK(
      row_of_slot.scalar_type() == ScalarType::Int && row_of_slot.dim() == 2 && row_of_slot.is_contiguous(),
      "row_of_slot must be int32, contiguous");
  Slots slots{static_cast<const int32_t*>(row_of_slot.data_ptr()), row_of_slot.size(0), row_of_slot.size(1)};
  if (slot_of_row) {
    STD_TORCH_CHECK(
        slot_of_row->scalar_type() == ScalarType::Int && slot_of_row->is_contiguous(),
        "slot_of_row must be int32, contiguous");
    slots.slot_of_row = static_cast<const int32_t*>(slot_of_row->data_ptr());
    slots.rows = slot_of_row->numel();
  }
  return slots;
}

inline float* probs_of(const std::optional<Tensor>& probs, const Slots& slots) {
  if (!probs) return nullptr;
  STD_TORCH_CHECK(
      probs->scalar_type() == ScalarType::Float && probs->is_contiguous() &&
          probs->numel() == slots.tokens * slots.top_k,
      "probabilities must be fp32 [tokens, k], contiguous");
  return static_cast<float*>(probs->data_ptr());
}

inline float* factors_of(const std::optional<Tensor>& factors, int64_t rows) {
  if (!factors) return nullptr;
  STD_TORCH_CHECK(
      factors->scalar_type() == ScalarType::Float && factors->is_contiguous() && factors->numel() == rows,
      "factors must be fp32 [rows], contiguous");
  return static_cast<float*>(factors->data_ptr());
}

inline Ids ids_of(const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Int || type == ScalarType::Long) && ids.is_contiguous(), "ids: int32 or int64, contiguous");
  return {ids.data_ptr(), type == ScalarType::Long, ids.numel()};
}

// What the row map returns, on the device of the ids; see RowMap.
struct RowMapTensors {
  RowMapTensors(const Tensor& ids, int64_t num_experts, int64_t align)
      : counts(empty(ids, {num_experts}, aoti_torch_dtype_int64())),
        row_of_slot(empty(ids, {ids.size(0), ids.size(1)}, aoti_torch_dtype_int32())),
        slot_of_row(empty(ids, {room(ids.numel(), num_experts, align)}, aoti_torch_dtype_int32())),
        status(empty(ids, {3}, aoti_torch_dtype_int64())) {}
  // Not `new_empty`, which goes by the dispatcher: for four of them as long as the sort of a small batch.
  template <size_t kDim>
  static Tensor empty(const Tensor& ids, const int64_t (&sizes)[kDim], int32_t dtype) {
    int64_t strides[kDim];
    for (size_t d = kDim, stride = 1; d-- > 0; stride *= sizes[d]) strides[d] = stride;
    int32_t device_type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(ids.get(), &device_type));
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(kDim, sizes, strides, dtype, device_type, ids.get_device_index(), &made));
    return Tensor(made);
  }
  static int64_t room(int64_t slots, int64_t num_experts, int64_t align) {
    return slots + std::min(num_experts, slots) * (align - 1);
  }
  RowMap memory() const {
    return {
        static_cast<int64_t*>(counts.data_ptr()), static_cast<int32_t*>(row_of_slot.data_ptr()),
        static_cast<int32_t*>(slot_of_row.data_ptr()), static_cast<int64_t*>(status.data_ptr())};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const {
    return {counts, row_of_slot, slot_of_row, status};
  }

  Tensor counts, row_of_slot, slot_of_row, status;
};

inline void check_widths(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.size(1) == b.size(1), "input and output differ in width");
}

inline void check_same(const Tensor& a, const Tensor& b) {
  check_widths(a, b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "input and output differ in type");
}

inline void check_swiglu(const Tensor& z, const Tensor& a) {
  STD_TORCH_CHECK(z.scalar_type() == a.scalar_type() && z.size(0) == a.size(0) && z.size(1) == 2 * a.size(1), "swiglu");
}

}  // namespace arguments
}  // namespace moe_dist
