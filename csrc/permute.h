// permute and unpermute on raw memory: what the CPU and the CUDA files implement and library.cpp calls.
//
// T tokens, K experts per token, E experts, N rows, H hidden. A slot is one of the T*K (token, k) pairs, numbered
// t*K + k. row_of_slot holds the row of each slot, -1 where the slot is dropped. With `align` above 1 each expert's rows
// begin at a multiple of it; between them lie pad rows, which belong to no slot. All offsets are 64-bit: rows * H passes
// 2^31 in ordinary use.
#pragma once

#include <cstdint>

namespace moe_dist {

enum class Dtype { f32, bf16 };

// The expert id of each slot, 32- or 64-bit.
struct Ids {
  const void* data;
  bool wide;
  int64_t slots;
};

// A matrix whose columns are dense and whose rows lie `stride` bytes apart.
struct Matrix {
  char* data;
  int64_t stride;
};

// Where each slot's row is. Where there may be pad rows: slot_of_row [rows] as well, -1 for those; else null.
struct Slots {
  const int32_t* row_of_slot;
  int64_t tokens, top_k;
  const int32_t* slot_of_row = nullptr;
  int64_t rows = 0;
};

// What the row map writes. counts [E], without pad rows; row_of_slot [T*K]; slot_of_row, -1 in pad rows, has room for
// T*K + min(E, T*K) * (align - 1) and is filled up to N, what follows means nothing; status [3] = {slots that are not dropped, the largest id seen
// that is not below E, else -1, N with pad rows}. Nothing but the status is meaningful where there is such an id. On CUDA
// slot_of_row is filled to its end where align is above 1: the host may know of N no more than that bound.
struct RowMap {
  int64_t* counts;
  int32_t* row_of_slot;
  int32_t* slot_of_row;
  int64_t* status;
};

namespace cpu {

// The widest instruction set that the kernels use here: "avx512", "avx2" or "portable".
const char* instruction_set();

// Stable counting sort of the slots by expert; a negative id drops its slot.
constexpr int64_t kMaxExperts = 65535;  // the row map keeps an expert and a count of slots in 32 bits
void row_map(const Ids& ids, int64_t num_experts, int64_t align, const RowMap& out);

// rows[row of (t, k)] = x[t], cast from one type to the other; pad rows become zeros.
void permute(const Slots& slots, int64_t hidden, Dtype from, Matrix x, Dtype to, Matrix rows);

// y[t] = sum over k of probs[t, k] * rows[row of (t, k)], in fp32 and in the order of k, rounded once to its type.
// probs [T*K] or null.
void unpermute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix rows, const float* probs, Dtype to, Matrix y);

// drows[row of (t, k)] = probs[t, k] * dy[t], pad rows zero; dprobs[t, k] = <dy[t], rows[row of (t, k)]>, zero where
// dropped. `from` is the type of dy, `to` that of rows and drows. probs may be null (all ones); rows.data and dprobs are
// null together where that gradient is not wanted.
void unpermute_backward(
    const Slots& slots, int64_t hidden, Dtype from, Matrix dy, const float* probs, Dtype to, Matrix rows, Matrix drows,
    float* dprobs);

}  // namespace cpu

namespace cuda {

// Each takes the CUDA stream to run on and returns null, or the message of a failed launch.
// `scratch` holds row_map_scratch(...) ints. `expected` is how many slots are not dropped, where the caller knows it
// (the device stops if it is wrong), else -1.
constexpr int64_t kMaxExperts = 8192;  // the row map keeps a counter for each expert in shared memory
int64_t row_map_scratch(int64_t slots, int64_t num_experts);
const char* row_map(
    const Ids& ids, int64_t num_experts, int64_t align, int64_t expected, const RowMap& out, int32_t* scratch,
    void* stream);
const char* permute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix x, Dtype to, Matrix rows, void* stream);
const char* unpermute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix rows, const float* probs, Dtype to, Matrix y, void* stream);
const char* unpermute_backward(
    const Slots& slots, int64_t hidden, Dtype from, Matrix dy, const float* probs, Dtype to, Matrix rows, Matrix drows,
    float* dprobs, void* stream);

}  // namespace cuda
}  // namespace moe_dist
