#include "plan.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace nat_dense {
namespace {

// Rows of packed buffers are an odd number of vectors: an even one would put all channels into few cache sets.
int64_t row_length(int64_t used, int64_t lanes) {
  const int64_t vectors = ceil_div(used, lanes);
  return (vectors + (vectors % 2 == 0)) * lanes;
}

}  // namespace

Plan::Plan(const Axis& columns, int64_t lanes, int64_t slots, int64_t width, bool viewers)
    : kernel_(columns.kernel), lanes_(lanes), slots_(slots ? slots : std::numeric_limits<int64_t>::max()) {
  sort_columns(columns);
  const int64_t count = static_cast<int64_t>(queries_.size());
  const int64_t step = round_up(ceil_div(count, ceil_div(count, width)), lanes);
  query_stride_ = row_length(step + lanes - 1, lanes);
  for (int64_t begin = 0; begin < count; begin += step) add_segment(begin, min_of(begin + step, count), viewers);
}

void Plan::describe(Call* call) const {
  call->segments = segments_.data();
  call->segment_count = static_cast<int64_t>(segments_.size());
  call->query_stride = query_stride_;
  call->key_stride = key_stride_;
}

void Plan::sort_columns(const Axis& columns) {
  const int64_t copies = columns.dilation == 1 && columns.length >= kernel_ ? kernel_ / 2 : 0;
  for (int64_t i = 0; i < group_count(columns); ++i) {
    const Group group(columns, i);
    const int64_t first = static_cast<int64_t>(keys_.size());
    for (int64_t place = -copies; place < group.real + copies; ++place) {
      const int64_t shift = place < 0 ? kernel_ : place >= group.real ? -kernel_ : 0;
      keys_.push_back({group.token(place + shift), shift});
    }
    for (int64_t place = 0; place < group.real; ++place) {
      const int64_t start = copies ? place - kernel_ / 2 : group.start(place);
      queries_.push_back({group.token(place), first + copies + start, group.limit(place), start - place + kernel_ - 1});
    }
  }
  for (const Query& query : queries_) query_column_.push_back(query.column);
  for (const Key& key : keys_) key_column_.push_back(key.column);
}

int64_t Plan::bias(const Query& query, int64_t window_column) const {
  // A padded key is none of `keys_`.
  const int64_t shift = window_column < query.limit ? keys_[query.first + window_column].shift : 0;
  return query.bias + window_column + shift;
}

template <class T>
T* Plan::keep(std::vector<T> table) {
  auto owner = std::make_shared<std::vector<T>>(std::move(table));
  tables_.push_back(owner);
  return owner->data();
}

void Plan::add_segment(int64_t begin, int64_t end, bool viewers) {
  int64_t key_begin = queries_[begin].first, key_end = 0;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t key = queries_[i].first; key < queries_[i].first + queries_[i].limit; ++key) {
      const int64_t itself = key + keys_[key].shift;
      key_begin = min_of(key_begin, min_of(key, itself));
      key_end = max_of(key_end, max_of(key, itself) + 1);
    }
  }
  Segment segment{};
  segment.query_count = end - begin;
  segment.key_count = key_end - key_begin;
  segment.real_end = segment.key_count;
  while (keys_[key_begin + segment.real_begin].shift) ++segment.real_begin;
  while (keys_[key_begin + segment.real_end - 1].shift) --segment.real_end;
  segment.query_column = query_column_.data() + begin;
  segment.key_column = key_column_.data() + key_begin;
  key_stride_ = max_of(key_stride_, row_length(segment.key_count + lanes_ - 1, lanes_));
  add_tiles(begin, end, key_begin, &segment);
  if (viewers) add_viewers(begin, end, key_begin, &segment);
  segments_.push_back(segment);
}

void Plan::add_tiles(int64_t begin, int64_t end, int64_t key_begin, Segment* segment) {
  std::vector<Tile> tiles;
  for (int64_t first = begin; first < end; first += tiles.back().lanes) {
    int64_t low = queries_[first].first, high = low, most = 0, least = kernel_, lanes = 0;
    for (; lanes < lanes_ && first + lanes < end; ++lanes) {
      const Query& query = queries_[first + lanes];
      const int64_t new_low = min_of(low, query.first), new_high = max_of(high, query.first + query.limit);
      if (new_high - new_low > slots_) break;
      low = new_low, high = new_high, most = max_of(most, query.limit), least = min_of(least, query.limit);
    }
    bool straight = least == most, uniform = true;
    for (int64_t i = 0; i < lanes; ++i) {
      const Query& query = queries_[first + i];
      straight = straight && query.first == low + i;
      for (int64_t b = 0; b < most; ++b) uniform = uniform && bias(query, b) == queries_[first].bias + b;
    }
    Tile tile{};
    tile.first = static_cast<int32_t>(first - begin);
    tile.lanes = static_cast<int32_t>(lanes);
    tile.columns = static_cast<int32_t>(most);
    tile.key = static_cast<int32_t>(low - key_begin);
    tile.bias = static_cast<int32_t>(queries_[first].bias);
    tile.straight = straight;
    tile.uniform = straight && uniform;
    tile.ragged = least != most;
    // Lanes that are not in use repeat the last one.
    const auto last = [&](int64_t i) { return first + min_of(i, lanes - 1); };
    if (!tile.uniform) {
      std::vector<int32_t> bias_index(kernel_ * lanes_);
      for (int64_t i = 0; i < lanes_; ++i) {
        const Query& query = queries_[last(i)];
        for (int64_t b = 0; b < kernel_; ++b) bias_index[b * lanes_ + i] = static_cast<int32_t>(bias(query, b));
      }
      tile.bias_index = keep(std::move(bias_index));
    }
    if (!straight) {
      std::vector<int32_t> index(most * lanes_), limit(lanes_);
      for (int64_t i = 0; i < lanes_; ++i) {
        const Query& query = queries_[last(i)];
        limit[i] = static_cast<int32_t>(query.limit);
        // Past its limit a lane repeats its last key: another's could bring in a NaN that isn't its own.
        for (int64_t b = 0; b < most; ++b) {
          index[b * lanes_ + i] = static_cast<int32_t>(query.first + min_of(b, query.limit - 1) - low);
        }
      }
      tile.index = keep(std::move(index));
      tile.limit = tile.ragged ? keep(std::move(limit)) : nullptr;
    }
    tiles.push_back(tile);
  }
  segment->tile_count = static_cast<int64_t>(tiles.size());
  segment->tiles = keep(std::move(tiles));
}

void Plan::add_viewers(int64_t begin, int64_t end, int64_t key_begin, Segment* segment) {
  std::vector<Viewers> viewers(segment->key_count);
  const auto each = [&](auto&& f) {
    for (int64_t query = begin; query < end; ++query) {
      for (int64_t b = 0; b < queries_[query].limit; ++b) {
        const int64_t key = queries_[query].first + b;
        f(query, b, &viewers[key + keys_[key].shift - key_begin]);
      }
    }
  };
  int64_t total = 0;
  each([&](int64_t query, int64_t, Viewers* key) {
    if (key->count++ == 0) key->query = static_cast<int32_t>(query - begin);
    ++total;
  });
  int32_t* next = keep(std::vector<int32_t>(total));
  for (Viewers& key : viewers) {
    key.weight = next;
    next += key.count;
  }
  each([&](int64_t query, int64_t b, Viewers* key) {
    const int64_t i = query - begin - key->query;  // queries that see one key are consecutive
    const_cast<int32_t*>(key->weight)[i] = static_cast<int32_t>(b * query_stride_ + query - begin);
  });
  segment->viewers = keep(std::move(viewers));
}

}  // namespace nat_dense
