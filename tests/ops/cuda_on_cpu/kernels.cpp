// The CUDA kernels compiled by the C++ compiler, behind C functions for ctypes.
#include "permute_cuda.cu"
#include "row_map_cuda.cu"
#include "swiglu_cuda.cu"
#include "unpermute_cuda.cu"

using namespace moe_dist;

extern "C" {

// The order in which blocks, warps and threads run.
void set_reverse(int64_t reverse) {
  fibers::reverse = reverse != 0;
}

int64_t row_map_scratch(int64_t slots, int64_t num_experts) {
  return cuda::row_map_scratch(slots, num_experts);
}

const char* row_map(
    void* ids, int wide, int64_t slots, int64_t num_experts, int64_t expected, int64_t* counts, int32_t* row_of_slot,
    int32_t* slot_of_row, int64_t* status, int32_t* scratch) {
  const RowMap out{counts, row_of_slot, slot_of_row, status};
  return cuda::row_map(Ids{ids, wide != 0, slots}, num_experts, expected, out, scratch, nullptr);
}

const char* permute(int32_t* row_of_slot, int64_t tokens, int64_t top_k, char* x, char* rows, int64_t row_bytes) {
  return cuda::permute({row_of_slot, tokens, top_k}, {x, row_bytes}, {rows, row_bytes}, row_bytes, nullptr);
}

const char* unpermute(
    int32_t* row_of_slot, int64_t tokens, int64_t top_k, int is_bf16, int64_t hidden, char* rows, float* probs,
    char* y) {
  const int64_t row_bytes = hidden * (is_bf16 ? 2 : 4);
  return cuda::unpermute(
      {row_of_slot, tokens, top_k}, is_bf16 ? Dtype::bf16 : Dtype::f32, hidden, {rows, row_bytes}, probs,
      {y, row_bytes}, nullptr);
}

const char* unpermute_backward(
    int32_t* row_of_slot, int64_t tokens, int64_t top_k, int is_bf16, int64_t hidden, char* dy, float* probs,
    char* rows, char* drows, float* dprobs) {
  const int64_t row_bytes = hidden * (is_bf16 ? 2 : 4);
  return cuda::unpermute_backward(
      {row_of_slot, tokens, top_k}, is_bf16 ? Dtype::bf16 : Dtype::f32, hidden, {dy, row_bytes}, probs,
      {rows, row_bytes}, {drows, row_bytes}, dprobs, nullptr);
}

const char* swiglu(int64_t rows, int64_t width, int64_t padded, int is_bf16, char* z, float* factor, char* a) {
  const int64_t size = is_bf16 ? 2 : 4;
  return cuda::swiglu(
      is_bf16 ? Dtype::bf16 : Dtype::f32, rows, width, {z, padded * size}, factor, {a, width * size}, nullptr);
}

const char* swiglu_backward(
    int64_t rows, int64_t width, int64_t padded, int is_bf16, char* da, char* z, float* factor, char* a, char* dz,
    float* dfactor) {
  const int64_t size = is_bf16 ? 2 : 4;
  return cuda::swiglu_backward(
      is_bf16 ? Dtype::bf16 : Dtype::f32, rows, width, {da, width * size}, {z, padded * size}, factor,
      {a, width * size}, {dz, 2 * width * size}, dfactor, nullptr);
}

}  // extern "C"
