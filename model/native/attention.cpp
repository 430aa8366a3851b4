#include "attention.h"

#include "activations.h"
#include "softmax.h"

namespace shoal {

namespace {

// Values are fetched as many tiles ahead as keys are.
constexpr int kTilesAhead = kMaxPanels;

constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Adds weights times values of the positions from begin to end to `to`, for kRows rows and kPanels panels.
template <class Format, int kRows, int kPanels>
__attribute__((noinline)) void weigh(const float* weights, ptrdiff_t stride,
                                     const typename Format::Weight* const* values, int panel, int begin, int end,
                                     float* to, ptrdiff_t to_stride) {
    Vec sums[kRows][kPanels];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) sums[r][p] = load(to + r * to_stride + (panel + p) * kLanes);
    }
    const auto add = [&](int at, int lane, int count) {
        const int block = at / kLanes, next = block + kTilesAhead;
        const typename Format::Weight* panels[kPanels];
        const typename Format::Weight* ahead[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            const int offset = ((panel + p) * kLanes + lane) * kLanes;
            panels[p] = values[block] + offset;
            ahead[p] = values[next] + offset;
        }
        multiply<Format, kRows, kPanels>(weights + at, stride, panels, ahead, count, sums);
    };
    int at = begin;
    if (at % kLanes > 0) {
        at = std::min(round_up(begin, kLanes), end);
        add(begin, begin % kLanes, at - begin);
    }
    for (; at < end; at += kLanes) add(at, 0, std::min(kLanes, end - at));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) store(to + r * to_stride + (panel + p) * kLanes, sums[r][p]);
    }
}

}  // namespace

void Attention::run(Pool& pool, const KVCache& cache, const AttentionLayer& layer, const float* heads,
                    ptrdiff_t stride, Rows& attended) {
    switch (cache.kind()) {
        case kCacheInFloat32: return run_as<FloatFormat>(pool, cache, layer, heads, stride, attended);
        case kCacheInFloat16: return run_as<HalfFormat>(pool, cache, layer, heads, stride, attended);
        case kCacheInInt8: return run_as<Int8Format>(pool, cache, layer, heads, stride, attended);
    }
}

template <class Format>
void Attention::run_as(Pool& pool, const KVCache& cache, const AttentionLayer& layer, const float* heads,
                       ptrdiff_t stride, Rows& attended) {
    const Plan& plan = plans_[layer.view];
    const View& view = plan.view;
    const auto partial = [this](const QueryTile& tile, int head, int stretch) {
        const int num_rows = tile.num_queries * group_;
        const size_t index = head * (tile.end - tile.begin) + stretch - tile.begin;
        return state_at(partials_.data() + tile.first_partial + index * state_size(num_rows), num_rows);
    };
    pool.run(static_cast<int>(plan.pieces.size()), [&](int index, int thread) {
        const Piece& piece = plan.pieces[index];
        const QueryTile& tile = plan.tiles[piece.tile];
        Scratch& scratch = scratch_[thread];
        load_queries(layer, tile, piece.head, heads, stride, scratch);
        if (tile.split) {
            attend_to_stretch<Format>(cache, layer.place, view, tile, piece.head, piece.begin, scratch,
                                      partial(tile, piece.head, piece.begin));
            return;
        }
        const State next = state_at(scratch.stretch.data(), tile.num_queries * group_);
        const State all = state_at(scratch.all.data(), tile.num_queries * group_);
        for (int stretch = piece.begin; stretch < piece.end; ++stretch) {
            attend_to_stretch<Format>(cache, layer.place, view, tile, piece.head, stretch, scratch, next);
            join(view, tile, stretch, next, all);
        }
        write(tile, piece.head, layer.sinks, all, attended);
    });
    pool.run(static_cast<int>(plan.split_tiles.size()) * num_kv_heads_, [&](int index, int thread) {
        const QueryTile& tile = plan.tiles[plan.split_tiles[index / num_kv_heads_]];
        const int head = index % num_kv_heads_;
        const State all = state_at(scratch_[thread].all.data(), tile.num_queries * group_);
        for (int stretch = tile.begin; stretch < tile.end; ++stretch) {
            join(view, tile, stretch, partial(tile, head, stretch), all);
        }
        write(tile, head, layer.sinks, all, attended);
    });
}

void Attention::load_queries(const AttentionLayer& layer, const QueryTile& tile, int head, const float* heads,
                             ptrdiff_t stride, Scratch& scratch) const {
    for (int i = 0; i < tile.num_queries; ++i) {
        const float* queries = heads + (tile.first_token + i) * stride + head * group_ * head_dim_;
        const int position = tile.first_position + i;
        const float scale = layer.temperatures ? scale_ * layer.temperatures[position] : scale_;
        for (int g = 0; g < group_; ++g) {
            place_head(layer.rotary, queries + g * head_dim_, head_dim_, position, scale,
                       scratch.queries.data() + (i * group_ + g) * padded_dim_);
        }
    }
}

template <class Format>
void Attention::attend_to_stretch(const KVCache& cache, int place, const View& view, const QueryTile& tile, int head,
                                  int stretch, Scratch& scratch, const State& to) const {
    using Element = typename Format::Weight;
    const Element* keys[kStretch / kLanes];
    const Element* values[kStretch / kLanes + kTilesAhead];
    int first = 0, last = tile.num_queries;  // the queries that see any position of this stretch
    while (seen(view, tile, first, stretch).is_empty()) ++first;
    while (seen(view, tile, last - 1, stretch).is_empty()) --last;
    // What is seen first and what is seen last move on with the query.
    const Range least = seen(view, tile, first, stretch), most = seen(view, tile, last - 1, stretch);
    const int first_key = least.begin / kLanes, num_keys = (most.end + kLanes - 1) / kLanes;
    const auto find = [&](int i) {
        const int position = stretch * kStretch + i * kLanes;
        const int64_t block = tile.block_table[static_cast<int64_t>(position / block_size_) * num_tables_];
        return (block * block_size_ + position % block_size_) / kLanes;
    };
    for (int i = first_key; i < num_keys; ++i) {
        keys[i] = cache.keys<Element>(place, find(i), head);
        values[i] = cache.values<Element>(place, find(i), head);
    }
    // What is fetched while the last values are multiplied: the first keys of the next stretch, if the thread has it too.
    const int last_position = tile.split ? 0 : tile.first_position + tile.num_queries - 1;
    for (int i = num_keys; i < num_keys + kTilesAhead; ++i) {
        const bool is_next = stretch * kStretch + i * kLanes <= last_position;
        values[i] = is_next ? cache.keys<Element>(place, find(i), head) : values[num_keys - 1];
    }
    score<Format>(keys, values, first_key, num_keys, tile.num_queries * group_, scratch);
    const auto multiply_scores = [&](int offset) {  // with the scales of keys, or, kLanes after them, of values
        if constexpr (std::is_same_v<Element, int8_t>) {
            for (int row = first * group_; row < last * group_; ++row) {
                float* scores = scratch.scores.data() + row * kStretch;
                for (int i = first_key; i < num_keys; ++i) {
                    store(scores + i * kLanes, load(scores + i * kLanes) * load(cache.scales(keys[i]) + offset));
                }
            }
        }
    };
    multiply_scores(0);
    for (int query = first; query < last; ++query) {
        const Range range = seen(view, tile, query, stretch);
        if (softcap_ > 0 || slopes_.size() > 0) change_scores(tile, query, head, stretch, range, scratch);
        for (int row = query * group_; row < (query + 1) * group_; ++row) {
            exponentiate(scratch.scores.data() + row * kStretch, range.begin, range.end, to.greatest + row,
                         to.sum + row);
            std::memset(to.values + static_cast<size_t>(row) * padded_dim_, 0, padded_dim_ * sizeof(float));
        }
    }
    multiply_scores(kLanes);
    // Positions that all queries see are added for all queries at once.  The others are added for each query alone,
    // because a position with weight zero must not be read: zero times NaN is NaN.
    const int begin = round_up(most.begin, kLanes), end = std::max(begin, least.end / kLanes * kLanes);
    const auto add_alone = [&](int query, int from, int to_end) {
        add_values<Format>(values, from, to_end, query * group_, group_, scratch, to.values);
    };
    for (int query = first; most.begin > 0 && query < last; ++query) {
        const Range range = seen(view, tile, query, stretch);
        add_alone(query, range.begin, std::min(begin, range.end));
    }
    add_values<Format>(values, begin, end, first * group_, (last - first) * group_, scratch, to.values);
    for (int query = first; query < last; ++query) {
        const Range range = seen(view, tile, query, stretch);
        add_alone(query, std::max(end, range.begin), range.end);
    }
}

// Caps the scores of a query, and adds what depends on how far away a position is (ALiBi, Press et al. 2022).  Adding
// slope * position would give the same softmax, and round more.
void Attention::change_scores(const QueryTile& tile, int query, int head, int stretch, Range range,
                              Scratch& scratch) const {
    const Vec lanes = load(kLaneNumbers);
    for (int g = 0; g < group_; ++g) {
        float* scores = scratch.scores.data() + (query * group_ + g) * kStretch;
        for (int i = range.begin / kLanes * kLanes; i < range.end; i += kLanes) {
            Vec changed = load(scores + i);
            if (softcap_ > 0) changed = soft_cap(changed, softcap_);
            if (slopes_.size() > 0) {
                const int distance = stretch * kStretch + i - tile.first_position - query;
                const Vec distances = broadcast(static_cast<float>(distance)) + lanes;
                changed = fma(broadcast(slopes_[head * group_ + g]), distances, changed);
            }
            store(scores + i, changed);
        }
    }
}

// Computes scores[row][position] for all rows and the vectors of 16 positions from first_key to num_keys.
template <class Format>
void Attention::score(const typename Format::Weight* const* keys, const typename Format::Weight* const* values,
                      int first_key, int num_keys, int num_rows, Scratch& scratch) const {
    Vec sums[kMaxRows * kMaxPanels];
    for (int row = 0; row < num_rows; row += kMaxRows) {
        const int rows = std::min(kMaxRows, num_rows - row);
        int count;
        for (int key = first_key; key < num_keys; key += count) {
            for (count = panels_at_once(rows); count > num_keys - key;) count /= 2;
            const void* panels[kMaxPanels];
            const void* ahead[kMaxPanels];
            for (int p = 0; p < count; ++p) {
                const int next = key + count + p;  // after the last keys the first values are read
                panels[p] = keys[key + p];
                ahead[p] = next < num_keys ? keys[next] : values[std::min(first_key + next - num_keys, num_keys - 1)];
            }
            for (int i = 0; i < rows * count; ++i) sums[i] = Format::zero();
            find_tile<Format>(rows, count)(scratch.queries.data() + row * padded_dim_, padded_dim_, panels, ahead,
                                           head_dim_, sums);
            for (int r = 0; r < rows; ++r) {
                float* scores = scratch.scores.data() + (row + r) * kStretch + key * kLanes;
                for (int p = 0; p < count; ++p) store(scores + p * kLanes, sums[r * count + p]);
            }
        }
    }
}

template <class Format>
void Attention::add_values(const typename Format::Weight* const* values, int begin, int end, int first_row,
                           int num_rows, const Scratch& scratch, float* to) const {
    if (begin >= end) return;
    const int num_panels = padded_dim_ / kLanes;
    for (int row = first_row; row < first_row + num_rows; row += kMaxRows) {
        const float* weights = scratch.scores.data() + static_cast<size_t>(row) * kStretch;
        float* rows_to = to + static_cast<size_t>(row) * padded_dim_;
        with_constant<kMaxRows>(std::min(kMaxRows, first_row + num_rows - row), [&](auto rows) {
            constexpr int kRows = decltype(rows)::value, kUsual = panels_at_once(kRows);
            int panel = 0;
            for (; panel + kUsual <= num_panels; panel += kUsual) {
                weigh<Format, kRows, kUsual>(weights, kStretch, values, panel, begin, end, rows_to, padded_dim_);
            }
            for (; panel < num_panels; ++panel) {
                weigh<Format, kRows, 1>(weights, kStretch, values, panel, begin, end, rows_to, padded_dim_);
            }
        });
    }
}

// Joins the next stretch to the ones before it.
void Attention::join(const View& view, const QueryTile& tile, int stretch, const State& next, const State& state) const {
    for (int row = 0; row < tile.num_queries * group_; ++row) {
        const int position = tile.first_position + row / group_, first_seen = view.first_seen(position);
        if (position < stretch * kStretch || first_seen / kStretch > stretch) continue;  // the row sees nothing of it
        float* values = state.values + static_cast<size_t>(row) * padded_dim_;
        const float* added = next.values + static_cast<size_t>(row) * padded_dim_;
        if (first_seen / kStretch == stretch) {
            state.greatest[row] = next.greatest[row];
            state.sum[row] = next.sum[row];
            std::memcpy(values, added, padded_dim_ * sizeof(float));
            continue;
        }
        join_row(state.greatest[row], state.sum[row], values, next.greatest[row], next.sum[row], added, padded_dim_);
    }
}

void Attention::write(const QueryTile& tile, int head, const float* sinks, const State& state, Rows& attended) const {
    for (int i = 0; i < tile.num_queries; ++i) {
        for (int g = 0; g < group_; ++g) {
            const int row = i * group_ + g;
            const float* values = state.values + static_cast<size_t>(row) * padded_dim_;
            float* to = attended[tile.first_token + i] + (head * group_ + g) * head_dim_;
            const float inverse =
                sinks ? with_sink(state.greatest[row], state.sum[row], sinks[head * group_ + g]) : 1 / state.sum[row];
            for (int k = 0; k < head_dim_; ++k) to[k] = values[k] * inverse;
        }
    }
}

}  // namespace shoal
