// The torch operators of the native kernels: work items, threads and the small tensors.
//
// The arguments were checked by nat_dense.ops.functional; what is checked here guards memory.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "memory.h"
#include "plan.h"
#include "problem.h"

namespace nat_dense {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBiasStride = 32;            // holds 2 * kLargestKernel - 1 columns, and all that a Window reads
constexpr int64_t kForwardCache = 512 << 10;   // bytes of packed rows that should stay in a core's second-level cache
constexpr int64_t kBackwardCache = 1024 << 10;
constexpr int64_t kFetched = 1 << 20;          // bytes of queries, keys or values, each, that second-level caches hold
constexpr int64_t kStreamed = 8 << 20;         // bytes of results: with all inputs, what a last-level cache may hold
constexpr int64_t kLeastProducts = 1 << 18;    // multiply-adds that are worth another thread
constexpr int64_t kLeastGelus = 1 << 14;
constexpr double kProductsPerMove = 8;         // multiply-adds in the time that an element takes from memory and back

// What this processor can run, the fastest first. torch knows; ATEN_CPU_CAPABILITY lowers it for both.
std::vector<std::string> instruction_sets() {
#if NAT_DENSE_X86
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return {"avx512", "avx2", "portable"};
  if (capability == "AVX2") return {"avx2", "portable"};
#endif
  return {"portable"};
}

const Kernels& kernels_for(const std::string& name, at::ScalarType type) {
  const auto sets = instruction_sets();
  const std::string chosen = name.empty() ? sets.front() : name;
  TORCH_CHECK(std::find(sets.begin(), sets.end(), chosen) != sets.end(), "this processor can't run ", chosen);
  const Storage storage = type == at::kDouble ? kFloat64 : type == at::kBFloat16 ? kBFloat16 : kFloat32;
#if NAT_DENSE_X86
  if (chosen == "avx512") return kAvx512Kernels[storage];
  if (chosen == "avx2") return kAvx2Kernels[storage];
#endif
  return kPortableKernels[storage];
}

Map map_of(const Tensor& t) {
  TORCH_CHECK(t.stride(4) == 1, "head_dim must have unit stride");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// A call with the tensors that it points to.
class Problem {
 public:
  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& rpb,
          const OptionalTensor& pad_key, const OptionalTensor& pad_value, at::IntArrayRef kernel_size,
          at::IntArrayRef dilation, double scale, const std::string& isa, bool backward)
      : type(query.scalar_type() == at::kHalf ? at::kFloat : query.scalar_type()),
        accumulation(type == at::kDouble ? at::kDouble : at::kFloat),
        kernels(kernels_for(isa, type)) {
    TORCH_CHECK(query.dim() == 5 && query.numel() > 0 && query.sizes() == key.sizes() && query.sizes() == value.sizes(),
                "expected three tensors of one shape [B, H, W, heads, head_dim]");
    TORCH_CHECK(std::max(kernel_size[0], kernel_size[1]) <= kLargestKernel, "a kernel of more than ", kLargestKernel);
    call.rows = {query.size(1), kernel_size[0], dilation[0]};
    call.columns = {query.size(2), kernel_size[1], dilation[1]};
    call.batch = query.size(0);
    call.heads = query.size(3);
    call.dim = query.size(4);
    call.scale = scale;
    call.stream = query.numel() * c10::elementSize(accumulation) > kStreamed;
    call.fetch = query.numel() * c10::elementSize(type) > kFetched;
    call.query = input(query);
    call.key = input(key);
    call.value = input(value);
    const bool padded = is_padded(call.rows) || is_padded(call.columns);
    TORCH_CHECK(!padded || (pad_key && pad_value), "a map smaller than its window needs pad_key and pad_value");
    if (padded) {
      TORCH_CHECK(pad_key->numel() == call.heads * call.dim && pad_value->numel() == call.heads * call.dim,
                  "expected pad_key and pad_value of shape [heads, head_dim]");
      call.pad_key = small(pad_key->to(accumulation).contiguous());
      call.pad_value = small(pad_value->to(accumulation).contiguous());
    }
    call.bias = small(accumulation == at::kDouble ? bias_rows<double>(rpb) : bias_rows<float>(rpb));
    call.bias_stride = kBiasStride;
    plan_columns(backward);
  }

  // A tensor of the stored type; half precision is computed from and into float32.
  Map input(const Tensor& t) {
    kept_.push_back(t.to(type));
    return map_of(kept_.back());
  }

  Call call{};
  const at::ScalarType type, accumulation;
  const Kernels& kernels;

 private:
  // The biases times log2(e), in rows of kBiasStride; and a row of zeros, for Windows read past the last one.
  template <class T>
  Tensor bias_rows(const OptionalTensor& rpb) const {
    const int64_t rows = call.heads * (2 * call.rows.kernel - 1), columns = 2 * call.columns.kernel - 1;
    Tensor bias = at::zeros({rows + 1, kBiasStride}, accumulation);
    if (!rpb) return bias;
    TORCH_CHECK(rpb->numel() == rows * columns, "expected ", rows * columns, " biases, found ", rpb->numel());
    const Tensor table = rpb->to(accumulation).contiguous();
    const T* in = table.const_data_ptr<T>();
    T* out = bias.mutable_data_ptr<T>();
    for (int64_t i = 0; i < rows; ++i, out += kBiasStride) {
      for (int64_t j = 0; j < columns; ++j) out[j] = *in++ * T(1.4426950408889634);
    }
    return bias;
  }

  const void* small(const Tensor& t) {
    kept_.push_back(t);
    return t.const_data_ptr();
  }

  void plan_columns(bool backward) {
    const int64_t element = accumulation == at::kDouble ? 8 : 4, dim = round_up(call.dim, kernels.lanes);
    const int64_t ring = backward ? call.rows.kernel + kernels.rows - 1 : forward_slots(call, kernels.rows);
    int64_t column = 2 * ring * dim * element;  // bytes of packed rows per column
    if (backward) column = 5 * column / 2 + 2 * kernels.rows * (dim + call.rows.kernel * call.columns.kernel) * element;
    const int64_t width = (backward ? kBackwardCache : kForwardCache) / column;
    plan_ = std::make_unique<Plan>(call.columns, kernels.lanes, kernels.slots,
                                   max_of(round_up(width, kernels.lanes), 2 * kernels.lanes), backward);
    plan_->describe(&call);
  }

  std::vector<Tensor> kept_;
  std::unique_ptr<Plan> plan_;
};

// Runs of query rows out of [first, last): whole row groups where there are enough of them for all threads.
std::vector<Item> items_of(const Call& call, int64_t segments, int64_t first, int64_t last) {
  const int64_t threads = at::get_num_threads(), groups = group_count(call.rows);
  const int64_t whole = call.batch * call.heads * groups * segments;
  const bool balanced = threads == 1 || whole % threads == 0 || whole >= 8 * threads;
  const int64_t wanted = balanced ? 1 : ceil_div(4 * threads, whole);
  std::vector<Item> items;
  for (int64_t batch = 0; batch < call.batch; ++batch) {
    for (int64_t head = 0; head < call.heads; ++head) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t low = ceil_div(max_of(first - group, 0), call.rows.dilation);
        const int64_t high = ceil_div(max_of(last - group, 0), call.rows.dilation), rows = high - low;
        const int64_t runs = max_of(1, min_of(wanted, rows / call.rows.kernel)), step = ceil_div(rows, runs);
        for (int64_t segment = 0; segment < segments; ++segment) {
          for (int64_t begin = low; begin < high; begin += step) {
            items.push_back({batch, head, group, segment, begin, min_of(begin + step, high)});
          }
        }
      }
    }
  }
  return items;
}

template <class F>
void each_item(const std::vector<Item>& items, int64_t scratch, F&& f) {
  // By the calling thread: what the others free, malloc gives back to the system, and the next call clears new pages.
  const int64_t threads = min_of(at::get_num_threads(), static_cast<int64_t>(items.size()));
  const Tensor memory = at::empty({threads, scratch}, at::kByte);
  char* const first = static_cast<char*>(memory.mutable_data_ptr());
  at::parallel_for(0, static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(items[i], first + at::get_thread_num() * scratch);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& rpb, const OptionalTensor& pad_key,
                                   const OptionalTensor& pad_value, at::IntArrayRef kernel_size,
                                   at::IntArrayRef dilation, double scale, int64_t first, int64_t last, bool needs_lse,
                                   std::string isa) {
  Problem problem(query, key, value, rpb, pad_key, pad_value, kernel_size, dilation, scale, isa, false);
  TORCH_CHECK(0 <= first && first <= last && last <= query.size(1), "no rows [", first, ", ", last, ") in the map");
  Tensor out = empty(query.sizes(), problem.type);
  Tensor lse = at::empty(needs_lse ? query.sizes().slice(0, 4) : at::IntArrayRef{0}, problem.accumulation);
  problem.call.out = map_of(out);
  problem.call.lse = needs_lse ? lse.mutable_data_ptr() : nullptr;
  const Call& call = problem.call;
  each_item(items_of(call, call.segment_count, first, last), problem.kernels.forward_scratch(call),
            [&](const Item& item, void* memory) { problem.kernels.forward(call, item, memory); });
  return {out.to(query.scalar_type()), lse};
}

// An uninitialised [B, H, W, parts, heads, head_dim].
Tensor packed_like(const Tensor& query, int64_t parts, at::ScalarType type) {
  std::vector<int64_t> sizes = query.sizes().vec();
  sizes.insert(sizes.begin() + 3, parts);
  return empty(sizes, type);
}

// One thread's sums, and their total over threads in the order of the threads.
struct Partials {
  Tensor bias, pad_key, pad_value;

  Partials(const Call& call)
      : bias(at::zeros({at::get_num_threads(), call.heads, 2 * call.rows.kernel - 1, 2 * call.columns.kernel - 1},
                       at::kDouble)),
        pad_key(at::zeros({at::get_num_threads(), call.heads, call.dim}, at::kDouble)),
        pad_value(at::zeros_like(pad_key)) {}

  Partial of_thread() {
    const int64_t thread = at::get_thread_num();
    return {part(bias, thread), part(pad_key, thread), part(pad_value, thread)};
  }
  static double* part(Tensor& t, int64_t thread) { return t.mutable_data_ptr<double>() + thread * t.stride(0); }
};

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
                             const OptionalTensor& rpb, const OptionalTensor& pad_key, const OptionalTensor& pad_value,
                             const Tensor& lse, at::IntArrayRef kernel_size, at::IntArrayRef dilation, double scale,
                             std::string isa) {
  Problem problem(query, key, value, rpb, pad_key, pad_value, kernel_size, dilation, scale, isa, true);
  const Tensor logsumexp = lse.contiguous();
  Tensor grad_qkv = packed_like(query, 3, problem.type);
  Tensor grad_kv = grad_qkv.narrow(3, 1, 2);
  // Keys and values sum over many queries; a narrow type gets their sums when they are complete.
  const bool separate = problem.type != problem.accumulation;
  Tensor sums = separate ? packed_like(query, 2, problem.accumulation) : grad_kv;
  Call& call = problem.call;
  call.grad_out = problem.input(grad_out);
  call.lse = const_cast<void*>(logsumexp.const_data_ptr());
  call.grad_query = map_of(grad_qkv.select(3, 0));
  call.grad_key = map_of(sums.select(3, 0));
  call.grad_value = map_of(sums.select(3, 1));
  call.needs_grad_bias = rpb.has_value();
  Partials partials(call);
  each_item(items_of(call, 1, 0, call.rows.length), problem.kernels.backward_scratch(call),
            [&](const Item& item, void* memory) {
              problem.kernels.backward(call, item, partials.of_thread(), memory);
            });
  if (separate) grad_kv.copy_(sums);
  std::vector<Tensor> gradients = {grad_qkv.to(query.scalar_type())};
  if (rpb) gradients.push_back(partials.bias.sum(0).to(rpb->scalar_type()));
  if (pad_key) gradients.push_back(partials.pad_key.sum(0).to(pad_key->scalar_type()));
  if (pad_value) gradients.push_back(partials.pad_value.sum(0).to(pad_value->scalar_type()));
  return gradients;
}

// How the work on a weight is shared out: its outputs and its tokens, each in so many parts. Parts of tokens make a
// matrix each, all of them together no larger than the operands.
struct Parts {
  int64_t outputs, tokens;

  // Parts of outputs copy the same inputs, parts of tokens add up to one matrix: the way that moves fewer numbers.
  Parts(const LinearCall& call) : outputs(1), tokens(1) {
    const int64_t products = call.tokens * call.outputs * call.inputs;
    const int64_t workers = min_of(at::get_num_threads(), ceil_div(products, kLeastProducts));
    double least = 0;
    const int64_t matrices = max_of(1, call.tokens * (call.outputs + call.inputs) / (call.outputs * call.inputs));
    for (int64_t parts = 1; parts <= min_of(min_of(workers, matrices), call.tokens); ++parts) {
      const int64_t of_outputs = min_of(workers / parts, call.outputs);
      const double copied = static_cast<double>(ceil_div(call.tokens, parts)) *
                            static_cast<double>(call.inputs + ceil_div(call.outputs, of_outputs));
      const double summed = parts == 1 ? 0 : 2.0 * static_cast<double>(call.outputs * call.inputs * parts / workers);
      // Workers that the parts leave idle count as well.
      const double cost = copied + summed + static_cast<double>(products / (parts * of_outputs)) / kProductsPerMove;
      if (parts > 1 && cost >= least) continue;
      least = cost;
      tokens = parts;
      outputs = of_outputs;
    }
  }
};

// [..., channels] -> [tokens, channels] with unit stride.
Tensor tokens_of(const Tensor& t) {
  const Tensor tokens = t.reshape({-1, t.size(-1)});
  return tokens.stride(1) == 1 ? tokens : tokens.contiguous();
}

std::tuple<Tensor, Tensor> linear_gradient(const Tensor& grad_out, const Tensor& input, bool needs_bias,
                                           std::string isa) {
  const at::ScalarType type = input.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kDouble) && grad_out.scalar_type() == type, "expected float or double");
  TORCH_CHECK(grad_out.dim() > 0 && input.dim() > 0 && grad_out.numel() > 0 && input.numel() > 0,
              "expected [..., outputs] and [..., inputs]");
  const Tensor grad = tokens_of(grad_out), x = tokens_of(input);
  TORCH_CHECK(grad.size(0) == x.size(0), "expected as many tokens in both");
  LinearCall whole{};
  whole.tokens = x.size(0), whole.outputs = grad.size(1), whole.inputs = x.size(1);
  whole.grad_step = grad.stride(0), whole.x_step = x.stride(0), whole.weight_step = whole.inputs;
  const Parts parts(whole);
  const Kernels& kernels = kernels_for(isa, type);
  Tensor weight = at::empty({parts.tokens, whole.outputs, whole.inputs}, type);
  Tensor bias = at::empty({parts.tokens, needs_bias ? whole.outputs : 0}, type);
  const int64_t element = c10::elementSize(type);
  const auto from = [&](const void* p, int64_t index) {
    return static_cast<char*>(const_cast<void*>(p)) + index * element;
  };
  const auto share = [](int64_t total, int64_t parts, int64_t i) { return total * i / parts; };
  const void *grad_data = grad.const_data_ptr(), *x_data = x.const_data_ptr();
  void *weight_data = weight.mutable_data_ptr(), *bias_data = bias.mutable_data_ptr();
  at::parallel_for(0, parts.tokens * parts.outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / parts.outputs, of_outputs = i % parts.outputs;
      const int64_t token = share(whole.tokens, parts.tokens, part);
      const int64_t output = share(whole.outputs, parts.outputs, of_outputs);
      LinearCall call = whole;
      call.tokens = share(whole.tokens, parts.tokens, part + 1) - token;
      call.outputs = share(whole.outputs, parts.outputs, of_outputs + 1) - output;
      call.grad = from(grad_data, token * call.grad_step + output);
      call.x = from(x_data, token * call.x_step);
      call.weight = from(weight_data, (part * whole.outputs + output) * whole.inputs);
      call.bias = needs_bias ? from(bias_data, part * whole.outputs + output) : nullptr;
      const Tensor memory = at::empty({kernels.linear_scratch(call)}, at::kByte);
      kernels.linear_gradient(call, memory.mutable_data_ptr());
    }
  });
  const auto total = [&](const Tensor& t) { return parts.tokens == 1 ? t.squeeze(0) : t.sum(0); };
  return {total(weight), total(bias)};
}

// The GELU of x; the gradient of x takes the place of the GELU's.
Tensor gelu_backward(const Tensor& grad, const Tensor& x, std::string isa) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && grad.scalar_type() == at::kFloat, "expected float");
  TORCH_CHECK(x.sizes() == grad.sizes(), "expected two maps of one shape");
  const Tensor input = x.contiguous(), gradient = grad.contiguous();
  const Kernels& kernels = kernels_for(isa, at::kFloat);
  Tensor gelu = at::empty(x.sizes(), at::kFloat);
  const float* in = input.const_data_ptr<float>();
  float *slope = gradient.mutable_data_ptr<float>(), *out = gelu.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kLeastGelus, [&](int64_t begin, int64_t end) {
    kernels.gelu_backward(in + begin, slope + begin, out + begin, end - begin);
  });
  if (!gradient.is_same(grad)) grad.copy_(gradient);
  return gelu;
}

TORCH_LIBRARY(nat_dense_cpu, m) {
  m.def("instruction_sets() -> str[]", &instruction_sets);
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? pad_key, Tensor? pad_value, "
      "int[2] kernel_size, int[2] dilation, float scale, int first, int last, bool needs_lse, "
      "str isa) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? pad_key, "
      "Tensor? pad_value, Tensor lse, int[2] kernel_size, int[2] dilation, float scale, str isa) -> Tensor[]");
  m.def("gelu_backward_(Tensor(a!) grad, Tensor x, str isa) -> Tensor");
  m.def("linear_gradient(Tensor grad_out, Tensor input, bool needs_bias, str isa) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nat_dense_cpu, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
  m.impl("linear_gradient", &linear_gradient);
  m.impl("gelu_backward_", &gelu_backward);
}

}  // namespace
}  // namespace nat_dense
