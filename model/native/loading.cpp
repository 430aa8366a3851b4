// How a model is made of its shape, and how its weights come into it.
#include "model.h"

namespace shoal {

namespace {

template <class T>
Array<float> copy_floats(const T& from, size_t count) {
    Array<float> copy(count);
    std::copy(from, from + count, copy.data());
    return copy;
}

Array<float> read_floats(const Source& source, size_t count) {
    Array<float> floats(count);
    source.read(count, floats.data());
    return floats;
}

// The outputs of all heads together.
int attended_width(const ShoalShape& shape) {
    return shape.num_heads * (shape.latent.rank > 0 ? shape.latent.value_dim : shape.head_dim);
}

// The queries, keys and values of all heads; none where latent attention has its own.
int heads_width(const ShoalShape& shape) {
    return shape.latent.rank > 0 ? 0 : (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
}

// What the head's weights are rounded to: with four bits it would lose several times as much as all other layers.
ShoalArithmetic head_arithmetic(ShoalArithmetic arithmetic) { return arithmetic == kInInt4 ? kInInt8 : arithmetic; }

}  // namespace

Model::Model(const ShoalShape& shape, const ShoalOptions& options, const Model* sibling)
    : shape_(shape),
      block_size_(options.block_size),
      arithmetic_(options.arithmetic),
      limits_{shape.vocab_size, shape.num_positions, options.num_blocks, options.block_size, shape.num_groups, {}},
      shared_pool_(sibling ? sibling->shared_pool_
                           : std::make_shared<Pool>(options.num_threads, options.pin_threads != 0)),
      pool_(*shared_pool_),
      temperatures_(copy_floats(shape.temperatures, static_cast<size_t>(shape.num_temperatures) * shape.num_positions)),
      embedding_norm_{shape.norm, shape.norm_eps},
      norm_{shape.norm, shape.norm_eps},
      head_(shape.vocab_size, shape.hidden_size, head_arithmetic(arithmetic_), arena_),
      cache_(shape.latent.rank > 0 ? 0 : shape.num_places, shape.num_kv_heads, shape.head_dim, options.num_blocks * options.block_size,
             options.kv_cache),
      attention_(shape, options.block_size, pool_.num_threads()),
      hidden_stride_(Rows::stride_for(shape.hidden_size)),
      normalized_(shape.hidden_size, arithmetic_),
      heads_stride_(Rows::stride_for(heads_width(shape))),
      attended_(attended_width(shape), arithmetic_),
      gathered_(shape.hidden_size, arithmetic_),
      activated_(1, arithmetic_),
      logits_stride_(round_up(shape.vocab_size, kLanes)) {
    if (shape.latent.rank > 0) latent_.emplace(shape, options, pool_, arena_);
    for (int i = 0; i < shape.num_ropes; ++i) ropes_.emplace_back(shape.ropes[i], shape.num_positions);
    for (int i = 0; i < shape.num_layers; ++i) layers_.push_back(make_layer(shape.layers[i]));
    limits_.views = latent_ ? std::vector<View>{{0, 0, 0}} : attention_.views();
    shape_.layers = nullptr;  // the caller's arrays end with the call
    shape_.ropes = nullptr;
    shape_.temperatures = shape_.alibi_slopes = nullptr;
}

Layer Model::make_layer(const ShoalLayer& shape) {
    const int hidden = shape_.hidden_size;
    const int num_experts = shape.mixture.num_experts;
    const RotaryTables* rotary = shape.rope >= 0 ? &ropes_[shape.rope] : nullptr;
    const bool turns_early = shape_.qk_norm != kNoHeadNorm && shape_.qk_norm_after_rope;
    const float* temperatures =
        shape.temperatures >= 0 ? temperatures_.data() + static_cast<size_t>(shape.temperatures) * shape_.num_positions
                                : nullptr;
    const AttentionLayer attention{latent_ ? 0 : attention_.add_view({shape.cache_group, shape.window, shape.chunk}),
                                   shape.cache_place, turns_early ? nullptr : rotary, temperatures, nullptr};
    const auto norm = [&] { return Norm{shape_.norm, shape_.norm_eps}; };
    const auto head_norm = [&] { return Norm{shape_.qk_norm_kind, shape_.qk_norm_eps}; };
    Layer layer{shape,
                rotary,
                attention,
                norm(),
                Matrix(heads_width(shape_), hidden, arithmetic_, arena_),
                head_norm(),
                head_norm(),
                Matrix(hidden, attended_width(shape_), arithmetic_, arena_),
                norm(),
                norm(),
                norm(),
                Matrix(num_experts, hidden, kInFloat32, arena_)};
    if (latent_) layer.latent.emplace(latent_->make_layer(shape.cache_place, rotary, temperatures));
    const int width = num_experts > 0 ? shape.mixture.intermediate_size : shape.intermediate_size;
    for (int e = 0; e < std::max(1, num_experts); ++e) layer.experts.emplace_back(shape_, width, arithmetic_, arena_);
    if (shape.mixture.shared_size > 0) {
        layer.experts.emplace_back(shape_, shape.mixture.shared_size, arithmetic_, arena_);
    }
    return layer;
}

void Model::load_tensor(ShoalTensor tensor, bool is_bias, int index, int expert, Source source) {
    const int hidden = shape_.hidden_size;
    const int query = shape_.num_heads * shape_.head_dim, key = shape_.num_kv_heads * shape_.head_dim;
    Layer& layer = layers_[index];
    FeedForward& block = layer.experts[expert];
    const auto load_rows = [&](Matrix& matrix, int num_rows, int first_column, int step = 1, int offset = 0) {
        if (is_bias) {
            matrix.add_bias(source, num_rows, first_column, step, offset);
        } else {
            matrix.pack(pool_, source, num_rows, first_column, step, offset);
        }
    };
    const auto load_norm = [&](Norm& norm, int width) {
        (is_bias ? norm.bias : norm.gain) = read_floats(source, width);
    };
    switch (tensor) {
        case kEmbedding:
            embedding_ = Array<char>(Source::size(source.type, static_cast<size_t>(shape_.vocab_size) * hidden));
            embedding_type_ = source.type;
            std::memcpy(embedding_.data(), source.data, embedding_.size());
            break;
        case kHead: load_rows(head_, shape_.vocab_size, 0); break;
        case kPositions: positions_ = read_floats(source, static_cast<size_t>(shape_.num_positions) * hidden); break;
        case kEmbeddingNorm: load_norm(embedding_norm_, hidden); break;
        case kNorm: load_norm(norm_, hidden); break;
        case kInputNorm: load_norm(layer.input_norm, hidden); break;
        case kQueryProj:
            if (layer.latent) return latent_->load_tensor(*layer.latent, tensor, is_bias, source);
            load_rows(layer.query_key_value, query, 0);
            break;
        case kKeyProj: load_rows(layer.query_key_value, key, query); break;
        case kValueProj: load_rows(layer.query_key_value, key, query + key); break;
        case kOutputProj: load_rows(layer.output, hidden, 0); break;
        case kQueryNorm: load_norm(layer.query_norm, query); break;
        case kKeyNorm: load_norm(layer.key_norm, key); break;
        case kSinks:
            layer.sinks = read_floats(source, shape_.num_heads);
            layer.attention.sinks = layer.sinks.data();
            break;
        case kQueryDown:
        case kQueryDownNorm:
        case kKeyValueDown:
        case kKeyValueNorm:
        case kKeyUp:
        case kValueUp: latent_->load_tensor(*layer.latent, tensor, is_bias, source); break;
        case kAttentionOutputNorm: load_norm(layer.attention_output_norm, hidden); break;
        case kFeedForwardNorm: load_norm(layer.feed_forward_norm, hidden); break;
        case kFeedForwardOutputNorm: load_norm(layer.feed_forward_output_norm, hidden); break;
        case kRouter: load_rows(layer.router, layer.shape.mixture.num_experts, 0); break;
        case kCorrection: layer.correction = read_floats(source, layer.shape.mixture.num_experts); break;
        case kSharedGate:
            if (!layer.shared_gate) layer.shared_gate.emplace(1, hidden, kInFloat32, arena_);
            load_rows(*layer.shared_gate, 1, 0);
            break;
        case kGateProj: load_rows(block.gate_up, block.width, 0, 2, 0); break;
        case kUpProj: load_rows(block.gate_up, block.width, 0, block.gated ? 2 : 1, block.gated ? 1 : 0); break;
        case kDownProj: load_rows(block.down, hidden, 0); break;
    }
}

}  // namespace shoal
