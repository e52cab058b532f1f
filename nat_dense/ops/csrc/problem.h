// What the kernels are asked to do, as plain data: shared by the binding and every instruction set.
//
// Nothing here has external linkage, so that code compiled for one instruction set can't be linked into another.
#pragma once

#include <stdint.h>

namespace nat_dense {
namespace {

constexpr int64_t kLargestKernel = 13;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

// One axis of the map and the window on it. Axes shorter than kernel * dilation count as completed to that with padded
// tokens.
struct Axis {
  int64_t length, kernel, dilation;
};

namespace {

inline bool is_padded(const Axis& axis) { return axis.length < axis.kernel * axis.dilation; }
inline int64_t group_count(const Axis& axis) { return min_of(axis.length, axis.dilation); }

// The tokens of an axis with one index modulo the dilation. A place is a token's rank among them.
struct Group {
  int64_t index, kernel, dilation;
  int64_t real, all;  // members: real ones, and with the padded ones that follow them

  Group(const Axis& axis, int64_t index)
      : index(index),
        kernel(axis.kernel),
        dilation(axis.dilation),
        real(ceil_div(axis.length - index, axis.dilation)),
        all(max_of(real, axis.kernel)) {}

  int64_t token(int64_t place) const { return index + place * dilation; }
  // First place of the window of the query at `place`.
  int64_t start(int64_t place) const { return min_of(max_of(place - kernel / 2, 0), all - kernel); }
  // How many window tokens, from the first, are real ones.
  int64_t limit(int64_t place) const { return min_of(kernel, real - start(place)); }
};

}  // namespace

// [B, H, W, heads, dim] with unit stride on dim; strides in elements.
struct Map {
  void* data;
  int64_t batch, row, column, head;
};

// A run of query positions that share vector registers, one position per lane.
struct Tile {
  int32_t first;     // query position of lane 0, in its segment
  int32_t lanes;     // lanes in use
  int32_t columns;   // window columns with a real key in some lane
  int32_t key;       // key position, in its segment, that `index` counts from
  int32_t bias;      // where uniform, bias column of the first key of each lane
  bool straight;     // lane l's window starts at key + l, and all lanes have one limit
  bool uniform;      // straight, and window column b has bias column bias + b in all lanes
  bool ragged;       // some lanes have a real key in the last column, some a padded one
  const int32_t* index;       // [columns][lanes] key slots from `key`; null where straight
  const int32_t* bias_index;  // [kernel][lanes] bias columns; null where uniform
  const int32_t* limit;       // [lanes] real window columns; null unless ragged
};

// The queries of a segment whose windows hold one key: consecutive positions.
struct Viewers {
  int32_t query, count;   // the first one's position, in the segment
  const int32_t* weight;  // [count] window column * query_stride + query position
};

// Columns that are worked on together, so that their keys stay in cache. Positions are columns sorted by dilation
// group: windows are then consecutive positions whatever the dilation. At the ends of an axis copies of columns may
// stand in for those that are not there.
struct Segment {
  int64_t query_count, key_count;
  int64_t real_begin, real_end;  // keys that are not copies
  const int64_t* query_column;  // [query_count] position -> column of the map
  const int64_t* key_column;    // [key_count]
  const Tile* tiles;
  int64_t tile_count;
  const Viewers* viewers;       // [key_count]; null in the forward pass
};

// One call of the operator. Accumulation type: float for float and bfloat16 inputs, double for double.
struct Call {
  Axis rows, columns;
  int64_t batch, heads, dim;
  double scale;
  Map query, key, value;
  const void* bias;  // accumulation type, [heads][2 * rows.kernel - 1][bias_stride], times log2(e); zeros without rpb
  int64_t bias_stride;
  const void* pad_key;    // accumulation type, [heads][dim]; null unless an axis is padded
  const void* pad_value;
  const Segment* segments;
  int64_t segment_count;
  int64_t query_stride, key_stride;  // row lengths of packed buffers, the same for all segments

  bool stream;  // results are too many for the caches: they needn't pass through them
  // Tokens are too many for the caches: they are asked for before it is their turn, and the forward pass packs rows of
  // keys ahead, which takes more of them.
  bool fetch;

  Map out;    // forward
  void* lse;  // accumulation type, [B, H, W, heads]; null in a forward pass that nothing follows

  Map grad_out, grad_query;  // backward
  Map grad_key, grad_value;  // accumulation type
  bool needs_grad_bias;
};

// Key rows that the forward pass keeps, for blocks of so many query rows: those of a block and, if need be, of the next.
inline int64_t forward_slots(const Call& call, int64_t rows) {
  return call.rows.kernel + (call.fetch ? 2 : 1) * rows - 1;
}

// A run of query places of one row group of one head.
struct Item {
  int64_t batch, head, group, segment;  // the backward pass takes every segment and ignores the last
  int64_t begin, end;
};

// Sums of one thread over its items, in double.
struct Partial {
  double* bias;       // [heads][2 * rows.kernel - 1][2 * columns.kernel - 1]
  double* pad_key;    // [heads][dim]
  double* pad_value;
};

// The gradients of a linear layer's weight and bias, of some outputs over some tokens. All of one type.
struct LinearCall {
  int64_t tokens, outputs, inputs;
  const void* grad;  // [tokens][grad_step], of the output
  const void* x;     // [tokens][x_step]
  int64_t grad_step, x_step;
  void* weight;  // [outputs][weight_step]
  int64_t weight_step;
  void* bias;  // [outputs]; null if it isn't wanted
};

// The kernels of one instruction set for one storage type.
struct Kernels {
  int64_t lanes;
  int64_t slots;  // keys that one tile may reach; 0: any number
  int64_t rows;   // query rows that share a loaded key
  int64_t (*forward_scratch)(const Call&);  // bytes
  void (*forward)(const Call&, const Item&, void* scratch);
  int64_t (*backward_scratch)(const Call&);
  void (*backward)(const Call&, const Item&, const Partial&, void* scratch);
  int64_t (*linear_scratch)(const LinearCall&);  // in the type that is computed in, whatever the storage
  void (*linear_gradient)(const LinearCall&, void* scratch);
  void (*gelu_backward)(const float* x, float* grad, float* gelu, int64_t count);  // null unless float is computed in
};

enum Storage { kFloat32, kBFloat16, kFloat64, kStorages };

extern const Kernels kPortableKernels[kStorages];
#if defined(__x86_64__) || defined(_M_X64)
#define NAT_DENSE_X86 1
extern const Kernels kAvx2Kernels[kStorages];
extern const Kernels kAvx512Kernels[kStorages];
#endif

}  // namespace nat_dense
