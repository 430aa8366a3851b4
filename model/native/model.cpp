#include "model.h"

#include <numeric>

#include "sampler.h"

namespace shoal {

namespace {

Array<float> copy_floats(const float* from, size_t count) {
    Array<float> copy(count);
    std::copy(from, from + count, copy.data());
    return copy;
}

// Writes x / rms(x) * gain (Zhang and Sennrich 2019); columns from `width` to `padded` stay zero.
void rms_norm(const float* x, const float* gain, int width, float eps, float* to) {
    const int padded = round_up(width, kLanes);
    Vec squares = broadcast(0.0F);
    for (int i = 0; i < padded; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    const float mean = sum_lanes(squares) / static_cast<float>(width);
    const Vec factor = broadcast(1.0F / std::sqrt(mean + eps));
    for (int i = 0; i < padded; i += kLanes) store(to + i, load(x + i) * factor * load(gain + i));
}

}  // namespace

Model::Model(const ShoalShape& shape, const ShoalOptions& options, const Model* sibling)
    : shape_(shape),
      block_size_(options.block_size),
      limits_{shape.vocab_size, shape.num_positions, options.num_blocks, options.block_size},
      shared_pool_(sibling ? sibling->shared_pool_
                           : std::make_shared<Pool>(options.num_threads, options.pin_threads != 0)),
      pool_(*shared_pool_),
      rotary_{shape.head_dim / 2,
              copy_floats(shape.cos, static_cast<size_t>(shape.num_positions) * (shape.head_dim / 2)),
              copy_floats(shape.sin, static_cast<size_t>(shape.num_positions) * (shape.head_dim / 2))},
      norm_(round_up(shape.hidden_size, kLanes)),
      head_(shape.vocab_size, shape.hidden_size, options.quantize_int8 != 0, arena_),
      cache_(shape.num_layers, shape.num_kv_heads, shape.head_dim, options.num_blocks * options.block_size,
             options.half_kv_cache != 0),
      attention_(shape.num_heads, shape.num_kv_heads, shape.head_dim, options.block_size, pool_.num_threads()),
      hidden_stride_(Rows::stride_for(shape.hidden_size)),
      normalized_(shape.hidden_size, options.quantize_int8 != 0),
      heads_stride_(Rows::stride_for((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)),
      attended_(shape.num_heads * shape.head_dim, options.quantize_int8 != 0),
      routing_(shape.num_experts, shape.num_experts_per_tok),
      gathered_(shape.hidden_size, options.quantize_int8 != 0),
      activated_(shape.intermediate_size, options.quantize_int8 != 0),
      mixed_stride_(Rows::stride_for(shape.hidden_size)),
      logits_stride_(round_up(shape.vocab_size, kLanes)) {
    const bool quantized = options.quantize_int8 != 0;
    const int hidden = shape.hidden_size, heads = shape.num_heads * shape.head_dim;
    if (!shape.tie_word_embeddings) embedding_ = Array<float>(static_cast<size_t>(shape.vocab_size) * hidden);
    for (int i = 0; i < shape.num_layers; ++i) {
        Layer layer{Array<float>(norm_.size()),
                    Matrix(heads + 2 * shape.num_kv_heads * shape.head_dim, hidden, quantized, arena_),
                    Matrix(hidden, heads, quantized, arena_),
                    Array<float>(norm_.size()),
                    Matrix(shape.num_experts, hidden, false, arena_),
                    {}};
        for (int e = 0; e < std::max(1, shape.num_experts); ++e) {
            layer.experts.emplace_back(hidden, shape.intermediate_size, quantized, arena_);
        }
        layers_.push_back(std::move(layer));
    }
}

void Model::load_tensor(ShoalTensor tensor, int index, int expert, Source source) {
    const int hidden = shape_.hidden_size, width = shape_.intermediate_size;
    const int query = shape_.num_heads * shape_.head_dim, key = shape_.num_kv_heads * shape_.head_dim;
    Layer& layer = layers_[index];
    FeedForward& feed_forward = layer.experts[expert];
    switch (tensor) {
        case kEmbedding: source.read(0, shape_.vocab_size * hidden, embedding_.data()); break;
        case kHead: head_.pack(pool_, source, shape_.vocab_size, 0); break;
        case kNorm: source.read(0, hidden, norm_.data()); break;
        case kInputNorm: source.read(0, hidden, layer.input_norm.data()); break;
        case kQueryProj: layer.query_key_value.pack(pool_, source, query, 0); break;
        case kKeyProj: layer.query_key_value.pack(pool_, source, key, query); break;
        case kValueProj: layer.query_key_value.pack(pool_, source, key, query + key); break;
        case kOutputProj: layer.output.pack(pool_, source, hidden, 0); break;
        case kPostAttentionNorm: source.read(0, hidden, layer.post_attention_norm.data()); break;
        case kRouter: layer.router.pack(pool_, source, shape_.num_experts, 0); break;
        case kGateProj: feed_forward.gate_up.pack(pool_, source, width, 0, 2, 0); break;
        case kUpProj: feed_forward.gate_up.pack(pool_, source, width, 0, 2, 1); break;
        case kDownProj: feed_forward.down.pack(pool_, source, hidden, 0); break;
    }
}

void Model::step(const ShoalBatch& batch, int num_layers, const ShoalSampling* sampling, const ShoalChosen* chosen,
                 float* logits) {
    const int num_tokens = static_cast<int>(batch.num_tokens);
    reserve(num_tokens);
    attention_.plan(batch, pool_.num_threads());
    embed(batch);
    for (int i = 0; i < num_layers; ++i) {
        attend(i, batch);
        const bool is_last = i == num_layers - 1;
        if (is_last) keep_rows_of_logits(batch);
        add_feed_forward(layers_[i], static_cast<int>(is_last ? batch.num_logits : batch.num_tokens));
    }
    const int num_rows = static_cast<int>(batch.num_logits);
    for_rows(num_rows, [&](int row) { normalize(row, norm_); });
    for (int row = 0; batch.hidden && row < num_rows; ++row) {
        std::memcpy(batch.hidden + static_cast<size_t>(row) * shape_.hidden_size, normalized_[row],
                    shape_.hidden_size * sizeof(float));
    }
    if (sampling || logits) choose(num_rows, sampling, chosen, logits);
}

void Model::reserve(int num_tokens) {
    const int choices = std::max(1, shape_.num_experts_per_tok) * num_tokens;
    hidden_.reserve(num_tokens * hidden_stride_);
    normalized_.reserve(num_tokens);
    heads_.reserve(num_tokens * heads_stride_);
    attended_.reserve(num_tokens);
    activated_.reserve(choices);
    if (shape_.num_experts == 0) return;
    routing_.reserve(num_tokens);
    gathered_.reserve(choices);
    mixed_.reserve(choices * mixed_stride_);
}

// Calls body(row) for each row.  A few rows stay on one thread, because handing them over takes longer.
template <class Body>
void Model::for_rows(int num_rows, const Body& body) {
    constexpr int kAtLeast = 4;
    const int step = std::max(kAtLeast, num_rows / (4 * pool_.num_threads()));
    pool_.run((num_rows + step - 1) / step, [&](int tile, int) {
        for (int row = tile * step; row < std::min(num_rows, (tile + 1) * step); ++row) body(row);
    });
}

void Model::embed(const ShoalBatch& batch) {
    for_rows(static_cast<int>(batch.num_tokens), [&](int row) {
        read_embedding(batch.token_ids[row], hidden(row));
        std::fill(hidden(row) + shape_.hidden_size, hidden(row) + norm_.size(), 0.0F);
    });
}

void Model::read_embedding(int token_id, float* to) const {
    if (shape_.tie_word_embeddings) {
        head_.read_column(token_id, to);
    } else {
        std::memcpy(to, embedding_.data() + static_cast<size_t>(token_id) * shape_.hidden_size,
                    shape_.hidden_size * sizeof(float));
    }
}

void Model::normalize(int row, const Array<float>& gain) {
    rms_norm(hidden(row), gain.data(), shape_.hidden_size, shape_.rms_norm_eps, normalized_[row]);
    normalized_.finish(row);
}

// Writes a layer's keys and values to the cache, and the result of attention to attended_.
void Model::attend(int index, const ShoalBatch& batch) {
    const int num_tokens = static_cast<int>(batch.num_tokens);
    const int query = shape_.num_heads * shape_.head_dim, key = shape_.num_kv_heads * shape_.head_dim;
    const Layer& layer = layers_[index];
    for_rows(num_tokens, [&](int row) { normalize(row, layer.input_norm); });
    multiply_all(pool_, layer.query_key_value, normalized_, 0, num_tokens, [&](int row, int panel, const Vec& values) {
        store(heads_.data() + row * heads_stride_ + panel * kLanes, values);
    });
    for_rows(num_tokens, [&](int row) {
        float* keys = heads_.data() + row * heads_stride_ + query;
        for (int head = 0; head < shape_.num_kv_heads; ++head, keys += shape_.head_dim) {
            float rotated[kMaxHeadDim];
            rotary_.rotate(keys, batch.positions[row], 1.0F, rotated);
            cache_.write(index, batch.slot_mapping[row], head, rotated, keys + key);
        }
    });
    attention_.run(pool_, cache_, index, rotary_, heads_.data(), heads_stride_, attended_);
}

// In the last layer, only tokens whose logits are wanted are computed further: they become the first rows.
void Model::keep_rows_of_logits(const ShoalBatch& batch) {
    for (int row = 0; row < batch.num_logits; ++row) {
        const int token = batch.logits_indices[row];
        if (token == row) continue;
        std::memcpy(hidden(row), hidden(token), norm_.size() * sizeof(float));
        std::memcpy(attended_[row], attended_[token], attended_.width() * sizeof(float));
    }
}

// The rest of a layer: the output projection of attention, and the feed-forward block.
void Model::add_feed_forward(const Layer& layer, int num_rows) {
    if (layer.output.is_quantized()) for_rows(num_rows, [&](int row) { attended_.finish(row); });
    multiply_all(pool_, layer.output, attended_, 0, num_rows, adds_to_hidden());
    if (shape_.num_experts > 0) {
        mix_experts(layer, num_rows);
    } else {
        feed_forward(layer, num_rows);
    }
}

void Model::feed_forward(const Layer& layer, int num_rows) {
    for_rows(num_rows, [&](int row) { normalize(row, layer.post_attention_norm); });
    const FeedForward& block = layer.experts[0];
    const int num_panels = block.gate_up.num_panels(), step = Matrix::panels_per_tile(num_panels);
    pool_.run((num_panels + step - 1) / step, [&](int tile, int) {
        block.activate(normalized_, 0, num_rows, tile * step, std::min((tile + 1) * step, num_panels), activated_);
    });
    if (block.down.is_quantized()) for_rows(num_rows, [&](int row) { activated_.finish(row); });
    multiply_all(pool_, block.down, activated_, 0, num_rows, adds_to_hidden());
}

void Model::mix_experts(const Layer& layer, int num_rows) {
    for_rows(num_rows, [&](int row) {
        float scores[kMaxExperts];
        normalize(row, layer.post_attention_norm);
        layer.router.multiply(normalized_, row, 1, 0, layer.router.num_panels(),
                              [&](int, int panel, const Vec& values) { store(scores + panel * kLanes, values); });
        routing_.choose(row, scores);
    });
    routing_.gather(num_rows);
    for_rows(num_rows, [&](int row) {
        for (int i = 0; i < routing_.num_chosen(); ++i) gathered_.copy(routing_.place(row, i), normalized_, row);
    });
    const auto& ranges = routing_.ranges();
    // For each expert that has rows, calls body(range, begin, end) for all panels of one of its matrices.
    const auto for_panels = [&](int num_panels, const auto& body) {
        const int step = Matrix::panels_per_tile(num_panels * static_cast<int>(ranges.size()));
        const int tiles = (num_panels + step - 1) / step;
        pool_.run(tiles * static_cast<int>(ranges.size()), [&](int tile, int) {
            const int begin = tile % tiles * step;
            body(ranges[tile / tiles], begin, std::min(begin + step, num_panels));
        });
    };
    for_panels(layer.experts[0].gate_up.num_panels(), [&](const Routing::Range& range, int begin, int end) {
        layer.experts[range.expert].activate(gathered_, range.begin, range.end - range.begin, begin, end, activated_);
    });
    if (layer.output.is_quantized()) {
        for_rows(num_rows * routing_.num_chosen(), [&](int place) { activated_.finish(place); });
    }
    for_panels(layer.experts[0].down.num_panels(), [&](const Routing::Range& range, int begin, int end) {
        layer.experts[range.expert].down.multiply(
            activated_, range.begin, range.end - range.begin, begin, end, [&](int row, int panel, const Vec& values) {
                store(mixed_.data() + (range.begin + row) * mixed_stride_ + panel * kLanes, values);
            });
    });
    for_rows(num_rows, [&](int row) {
        for (int i = 0; i < routing_.num_chosen(); ++i) {
            const float* mixed = mixed_.data() + routing_.place(row, i) * mixed_stride_;
            const Vec share = broadcast(routing_.share(row, i));
            for (size_t k = 0; k < norm_.size(); k += kLanes) {
                store(hidden(row) + k, fma(share, load(mixed + k), load(hidden(row) + k)));
            }
        }
    });
}

void Model::choose(int num_rows, const ShoalSampling* sampling, const ShoalChosen* chosen, float* logits) {
    logits_.reserve(std::min(num_rows, kLogitsRows) * logits_stride_);
    for (int first = 0; first < num_rows; first += kLogitsRows) {
        const int count = std::min(kLogitsRows, num_rows - first);
        multiply_all(pool_, head_, normalized_, first, count, [&](int row, int panel, const Vec& values) {
            store(logits_.data() + row * logits_stride_ + panel * kLanes, values);
        });
        for (int row = 0; logits && row < count; ++row) {
            std::memcpy(logits + static_cast<size_t>(first + row) * shape_.vocab_size,
                        logits_.data() + row * logits_stride_, shape_.vocab_size * sizeof(float));
        }
        if (sampling) {
            sample(pool_, logits_.data(), logits_stride_, shape_.vocab_size, *sampling, first, count, *chosen);
        }
    }
}

}  // namespace shoal
