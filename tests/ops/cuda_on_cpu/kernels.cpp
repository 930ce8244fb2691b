// The CUDA kernels compiled by the C++ compiler, behind C functions for ctypes.
#include "pad_rows_cuda.cu"
#include "permute_cuda.cu"
#include "row_map_cuda.cu"
#include "swiglu_cuda.cu"
#include "unpermute_cuda.cu"

using namespace moe_dist;

static Dtype dtype_of(int is_bf16) {
  return is_bf16 ? Dtype::bf16 : Dtype::f32;
}

static int64_t size_of(int is_bf16) {
  return is_bf16 ? 2 : 4;
}

extern "C" {

// The order in which blocks, warps and threads run.
void set_reverse(int64_t reverse) {
  fibers::reverse = reverse != 0;
}

int64_t row_map_scratch(int64_t slots, int64_t num_experts) {
  return cuda::row_map_scratch(slots, num_experts);
}

const char* row_map(
    void* ids, int wide, int64_t slots, int64_t num_experts, int64_t align, int64_t expected, int64_t* counts,
    int32_t* row_of_slot, int32_t* slot_of_row, int64_t* status, int32_t* scratch) {
  const RowMap out{counts, row_of_slot, slot_of_row, status};
  return cuda::row_map(Ids{ids, wide != 0, slots}, num_experts, align, expected, out, scratch, nullptr);
}

// A matrix of `hidden` columns next to each other. slot_of_row: null, or that of `num_rows` rows with pad rows.
const char* permute(
    int32_t* row_of_slot, int64_t tokens, int64_t top_k, int32_t* slot_of_row, int64_t num_rows, int64_t hidden,
    int from, char* x, int to, char* rows) {
  return cuda::permute(
      {row_of_slot, tokens, top_k, slot_of_row, num_rows}, hidden, dtype_of(from), {x, hidden * size_of(from)},
      dtype_of(to), {rows, hidden * size_of(to)}, nullptr);
}

const char* unpermute(
    int32_t* row_of_slot, int64_t tokens, int64_t top_k, int64_t hidden, int from, char* rows, float* probs, int to,
    char* y) {
  return cuda::unpermute(
      {row_of_slot, tokens, top_k}, hidden, dtype_of(from), {rows, hidden * size_of(from)}, probs, dtype_of(to),
      {y, hidden * size_of(to)}, nullptr);
}

const char* unpermute_backward(
    int32_t* row_of_slot, int64_t tokens, int64_t top_k, int32_t* slot_of_row, int64_t num_rows, int64_t hidden,
    int from, char* dy, float* probs, int to, char* rows, char* drows, float* dprobs) {
  return cuda::unpermute_backward(
      {row_of_slot, tokens, top_k, slot_of_row, num_rows}, hidden, dtype_of(from), {dy, hidden * size_of(from)}, probs,
      dtype_of(to), {rows, hidden * size_of(to)}, {drows, hidden * size_of(to)}, dprobs, nullptr);
}

const char* swiglu(int64_t rows, int64_t width, int64_t padded, int is_bf16, char* z, float* factor, char* a) {
  const int64_t size = size_of(is_bf16);
  return cuda::swiglu(
      dtype_of(is_bf16), rows, width, {z, padded * size}, factor, {a, width * size}, nullptr);
}

const char* swiglu_backward(
    int64_t rows, int64_t width, int64_t padded, int is_bf16, char* da, char* z, float* factor, char* a, char* dz,
    float* dfactor) {
  const int64_t size = size_of(is_bf16);
  return cuda::swiglu_backward(
      dtype_of(is_bf16), rows, width, {da, width * size}, {z, padded * size}, factor,
      {a, width * size}, {dz, 2 * width * size}, dfactor, nullptr);
}

}  // extern "C"
