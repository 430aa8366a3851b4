#include "attention.h"

#include <limits>

namespace shoal {

namespace {

// Replaces scores by weights e**(score - greatest); gives the greatest score and the sum of the weights.
void exponentiate(float* scores, int count, float* greatest, float* sum) {
    const int full = count / kLanes * kLanes;
    Vec greatest_lanes = broadcast(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < full; i += kLanes) greatest_lanes = max(load(scores + i), greatest_lanes);
    float most = max_lanes(greatest_lanes);
    for (int i = full; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    Vec sums = broadcast(0.0F);
    for (int i = 0; i < full; i += kLanes) {
        const Vec weights = exp(load(scores + i) - broadcast(most));
        store(scores + i, weights);
        sums = sums + weights;
    }
    if (full < count) {
        store(scores + full, exp(load(scores + full) - broadcast(most)));
        for (int i = count; i < full + kLanes; ++i) scores[i] = 0;
        sums = sums + load(scores + full);
    }
    *greatest = most;
    *sum = sum_lanes(sums);
}

// Fetches `count` elements that are needed soon: the hardware cannot predict where the next block lies.
template <class Element>
SHOAL_INLINE void prefetch(const Element* from, int count) {
    for (int i = 0; i < count; i += static_cast<int>(64 / sizeof(Element))) __builtin_prefetch(from + i, 0, 2);
}

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
    for (int at = begin; at < end; at += kLanes) {
        const typename Format::Weight* panels[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) panels[p] = values[at / kLanes] + (panel + p) * kLanes * kLanes;
        multiply<Format, kRows, kPanels>(weights + at, stride, panels, std::min(kLanes, end - at), sums);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) store(to + r * to_stride + (panel + p) * kLanes, sums[r][p]);
    }
}

}  // namespace

Attention::Attention(int num_heads, int num_kv_heads, int head_dim, int block_size, int num_threads)
    : num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      padded_dim_(round_up(head_dim, kLanes)),
      group_(num_heads / num_kv_heads),
      block_size_(block_size),
      scale_(1.0F / std::sqrt(static_cast<float>(head_dim))) {
    const size_t rows = rows_per_tile();
    for (int thread = 0; thread < num_threads; ++thread) {
        scratch_.push_back({Array<float>(rows * padded_dim_), Array<float>(rows * kStretch),
                            Array<float>(state_size(rows)), Array<float>(state_size(rows))});
    }
}

void Attention::plan(const ShoalBatch& batch, int num_threads) {
    tiles_.clear();
    pieces_.clear();
    split_tiles_.clear();
    const int height = rows_per_tile() / group_;
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        for (int token = batch.query_start_loc[s]; token < batch.query_start_loc[s + 1]; token += height) {
            const int num_queries = std::min(height, batch.query_start_loc[s + 1] - token);
            tiles_.push_back({token, num_queries, batch.positions[token], batch.block_tables + s * batch.max_blocks,
                              false, 0});
        }
    }
    // Where there are few tiles, long ones are split, so that no thread is idle.
    const bool few = static_cast<int>(tiles_.size()) * num_kv_heads_ < 8 * num_threads;
    size_t num_partials = 0;
    for (int index = 0; index < static_cast<int>(tiles_.size()); ++index) {
        QueryTile& tile = tiles_[index];
        const int stretches = tile.num_stretches();
        tile.split = few && stretches > 1;
        if (tile.split) {
            tile.first_partial = num_partials;
            num_partials += num_kv_heads_ * stretches * state_size(tile.num_queries * group_);
            split_tiles_.push_back(index);
        }
        const int step = tile.split ? 1 : stretches;
        for (int head = 0; head < num_kv_heads_; ++head) {
            for (int begin = 0; begin < stretches; begin += step) pieces_.push_back({index, head, begin, begin + step});
        }
    }
    partials_.reserve(num_partials);
    // The longest first: the pieces that end last are then short.
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const Piece& a, const Piece& b) { return a.end - a.begin > b.end - b.begin; });
}

void Attention::run(Pool& pool, const KVCache& cache, int layer, const RotaryTables& rotary, const float* heads,
                    ptrdiff_t stride, Rows& attended) {
    if (cache.is_half()) {
        run_as<HalfFormat>(pool, cache, layer, rotary, heads, stride, attended);
    } else {
        run_as<FloatFormat>(pool, cache, layer, rotary, heads, stride, attended);
    }
}

template <class Format>
void Attention::run_as(Pool& pool, const KVCache& cache, int layer, const RotaryTables& rotary, const float* heads,
                       ptrdiff_t stride, Rows& attended) {
    const auto partial = [&](const QueryTile& tile, int head, int stretch) {
        const int num_rows = tile.num_queries * group_;
        const size_t index = head * tile.num_stretches() + stretch;
        return state_at(partials_.data() + tile.first_partial + index * state_size(num_rows), num_rows);
    };
    pool.run(static_cast<int>(pieces_.size()), [&](int index, int thread) {
        const Piece& piece = pieces_[index];
        const QueryTile& tile = tiles_[piece.tile];
        Scratch& scratch = scratch_[thread];
        load_queries(tile, piece.head, rotary, heads, stride, scratch);
        if (tile.split) {
            attend_to_stretch<Format>(cache, layer, tile, piece.head, piece.begin, scratch,
                                      partial(tile, piece.head, piece.begin));
            return;
        }
        const State next = state_at(scratch.stretch.data(), tile.num_queries * group_);
        const State all = state_at(scratch.all.data(), tile.num_queries * group_);
        for (int stretch = piece.begin; stretch < piece.end; ++stretch) {
            attend_to_stretch<Format>(cache, layer, tile, piece.head, stretch, scratch, next);
            join(tile, stretch, next, all);
        }
        write(tile, piece.head, all, attended);
    });
    pool.run(static_cast<int>(split_tiles_.size()) * num_kv_heads_, [&](int index, int thread) {
        const QueryTile& tile = tiles_[split_tiles_[index / num_kv_heads_]];
        const int head = index % num_kv_heads_;
        const State all = state_at(scratch_[thread].all.data(), tile.num_queries * group_);
        for (int stretch = 0; stretch < tile.num_stretches(); ++stretch) {
            join(tile, stretch, partial(tile, head, stretch), all);
        }
        write(tile, head, all, attended);
    });
}

void Attention::load_queries(const QueryTile& tile, int head, const RotaryTables& rotary, const float* heads,
                             ptrdiff_t stride, Scratch& scratch) const {
    for (int i = 0; i < tile.num_queries; ++i) {
        const float* queries = heads + (tile.first_token + i) * stride + head * group_ * head_dim_;
        for (int g = 0; g < group_; ++g) {
            rotary.rotate(queries + g * head_dim_, tile.first_position + i, scale_,
                          scratch.queries.data() + (i * group_ + g) * padded_dim_);
        }
    }
}

template <class Format>
void Attention::attend_to_stretch(const KVCache& cache, int layer, const QueryTile& tile, int head, int stretch,
                                  Scratch& scratch, const State& to) const {
    using Element = typename Format::Weight;
    const Element* keys[kStretch / kLanes];
    const Element* values[kStretch / kLanes];
    const int start = stretch * kStretch;
    const auto num_seen = [&](int query) {  // positions of this stretch that the query sees
        return std::clamp(tile.first_position + query + 1 - start, 0, kStretch);
    };
    const int num_keys = (num_seen(tile.num_queries - 1) + kLanes - 1) / kLanes;
    for (int i = 0; i < num_keys; ++i) {
        const int position = start + i * kLanes;
        const int64_t block = tile.block_table[position / block_size_];
        const int64_t at = (block * block_size_ + position % block_size_) / kLanes;
        keys[i] = cache.keys<Element>(layer, at, head);
        values[i] = cache.values<Element>(layer, at, head);
    }
    score<Format>(keys, values, num_keys, tile.num_queries * group_, scratch);
    int first = 0;  // the first query that sees a position of this stretch
    while (num_seen(first) == 0) ++first;
    for (int row = first * group_; row < tile.num_queries * group_; ++row) {
        exponentiate(scratch.scores.data() + row * kStretch, num_seen(row / group_), to.greatest + row, to.sum + row);
        std::memset(to.values + static_cast<size_t>(row) * padded_dim_, 0, padded_dim_ * sizeof(float));
    }
    // Positions that all queries see are added for all queries at once.  The others are added for each query alone,
    // because a position with weight zero must not be read: zero times NaN is NaN.
    const int common = num_seen(first) / kLanes * kLanes;
    add_values<Format>(values, 0, common, first * group_, (tile.num_queries - first) * group_, scratch, to.values);
    for (int query = first; query < tile.num_queries; ++query) {
        add_values<Format>(values, common, num_seen(query), query * group_, group_, scratch, to.values);
    }
}

// Computes scores[row][position] for all rows and num_keys * 16 positions.
template <class Format>
void Attention::score(const typename Format::Weight* const* keys, const typename Format::Weight* const* values,
                      int num_keys, int num_rows, Scratch& scratch) const {
    Vec sums[kMaxRows * kMaxPanels];
    for (int row = 0; row < num_rows; row += kMaxRows) {
        const int rows = std::min(kMaxRows, num_rows - row);
        int count;
        for (int key = 0; key < num_keys; key += count) {
            for (count = panels_at_once(rows); count > num_keys - key;) count /= 2;
            for (int p = 0; num_rows <= kMaxRows && p < count; ++p) {
                if (key + count + p < num_keys) prefetch(keys[key + count + p], head_dim_ * kLanes);
                prefetch(values[key + p], padded_dim_ * kLanes);
            }
            find_tile<Format>(rows, count)(scratch.queries.data() + row * padded_dim_, padded_dim_, keys + key,
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
void Attention::join(const QueryTile& tile, int stretch, const State& next, const State& state) const {
    for (int row = 0; row < tile.num_queries * group_; ++row) {
        if (tile.first_position + row / group_ < stretch * kStretch) continue;  // the row sees nothing of this stretch
        float* values = state.values + static_cast<size_t>(row) * padded_dim_;
        const float* added = next.values + static_cast<size_t>(row) * padded_dim_;
        if (stretch == 0) {
            state.greatest[row] = next.greatest[row];
            state.sum[row] = next.sum[row];
            std::memcpy(values, added, padded_dim_ * sizeof(float));
            continue;
        }
        const float greatest = std::max(state.greatest[row], next.greatest[row]);
        float lanes[kLanes] = {state.greatest[row] - greatest, next.greatest[row] - greatest};
        store(lanes, exp(load(lanes)));
        const float kept = lanes[0], share = lanes[1];
        state.greatest[row] = greatest;
        state.sum[row] = state.sum[row] * kept + next.sum[row] * share;
        for (int i = 0; i < padded_dim_; ++i) values[i] = values[i] * kept + added[i] * share;
    }
}

void Attention::write(const QueryTile& tile, int head, const State& state, Rows& attended) const {
    for (int i = 0; i < tile.num_queries; ++i) {
        for (int g = 0; g < group_; ++g) {
            const int row = i * group_ + g;
            const float* values = state.values + static_cast<size_t>(row) * padded_dim_;
            float* to = attended[tile.first_token + i] + (head * group_ + g) * head_dim_;
            const float inverse = 1 / state.sum[row];
            for (int k = 0; k < head_dim_; ++k) to[k] = values[k] * inverse;
        }
    }
}

}  // namespace shoal
