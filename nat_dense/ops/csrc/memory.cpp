#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/alloc_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <new>

#include "problem.h"

namespace nat_dense {
namespace {

constexpr size_t kLarge = 32 << 20, kMostKept = 256 << 20;

struct Block {
  void* data;
  size_t size;
};

class KeptMemory final : public c10::Allocator {
 public:
  static KeptMemory& get() {
    static auto* const memory = new KeptMemory;  // never deleted: tensors may outlive everything that is
    return *memory;
  }

  c10::DataPtr allocate(size_t size) override {
    // A storage of ours was made smaller.
    if (size <= kLarge) return c10::GetAllocator(c10::DeviceType::CPU)->allocate(size);
    auto block = std::make_unique<Block>(Block{nullptr, size});
    if (!take(block.get())) block->data = map(size);
    void* const data = block->data;
    return {data, block.release(), &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

 private:
  // The smallest kept block that is large enough but not twice so.
  bool take(Block* block) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto best = kept_.end();
    for (auto i = kept_.begin(); i != kept_.end(); ++i) {
      const bool fits = block->size <= i->size && i->size < 2 * block->size;
      if (fits && (best == kept_.end() || i->size <= best->size)) best = i;  // the last one: it may still be in a cache
    }
    if (best == kept_.end()) return false;
    *block = *best;
    kept_size_ -= best->size;
    kept_.erase(best);
    return true;
  }

  static void* map(size_t size) {
    void* const data = c10::alloc_cpu(size);
#if defined(__linux__)
    constexpr size_t kHugePage = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = round_up(begin, kHugePage), last = (begin + size) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: what it returns doesn't matter
    // Threads that reach a page at the same time would clear it once each.
    at::parallel_for(0, static_cast<int64_t>((last - first) / kHugePage), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + i * kHugePage) = 0;
    });
#endif
    return data;
  }

  static void give_back(void* context) noexcept {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    std::list<Block> surplus;
    try {
      surplus = get().keep(*block);
    } catch (const std::bad_alloc&) {  // of the list's node
      c10::free_cpu(block->data);
    }
    for (const Block& old : surplus) c10::free_cpu(old.data);
  }

  // Returns what is too much then: the block if it is alone too large, or the oldest.
  std::list<Block> keep(const Block& block) {
    std::list<Block> node{block}, surplus;
    if (block.size > kMostKept) return node;
    std::lock_guard<std::mutex> guard(mutex_);
    kept_size_ += block.size;
    kept_.splice(kept_.end(), node);
    while (kept_size_ > kMostKept) {
      kept_size_ -= kept_.front().size;
      surplus.splice(surplus.end(), kept_, kept_.begin());
    }
    return surplus;
  }

  std::mutex mutex_;
  std::list<Block> kept_;
  size_t kept_size_ = 0;
};

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(type);
  if (bytes <= kLarge) return at::empty(sizes, type);
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  at::Tensor t = at::detail::empty_generic(sizes, &KeptMemory::get(), cpu, type, std::nullopt);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {  // as at::empty does
    t.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return t;
}

}  // namespace nat_dense
