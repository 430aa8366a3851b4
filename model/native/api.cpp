// The interface in shoal.h, in terms of Model.
#include <new>

#include "checks.h"
#include "model.h"
#include "sampler.h"

struct ShoalModel {
    shoal::Model model;
};

namespace {

// The work's fault, or that there was not enough memory for it.
template <class Work>
const char* within_memory(const Work& work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

ShoalModel* shoal_create(const ShoalShape* shape, const ShoalOptions* options, const ShoalModel* sibling) {
    try {
        return new ShoalModel{shoal::Model(*shape, *options, sibling ? &sibling->model : nullptr)};
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void shoal_destroy(ShoalModel* model) { delete model; }

const char* shoal_load(ShoalModel* model, int32_t tensor, int32_t is_bias, int32_t layer, int32_t expert,
                       const void* data, int32_t type) {
    return within_memory([&]() -> const char* {
        model->model.load_tensor(static_cast<ShoalTensor>(tensor), is_bias != 0, layer, expert,
                                 {data, static_cast<shoal::Source::Type>(type)});
        return nullptr;
    });
}

const char* shoal_step(ShoalModel* model, const ShoalBatch* batch, int32_t num_layers, const ShoalSampling* sampling,
                       const ShoalChosen* chosen, float* logits) {
    return within_memory([&] {
        const char* fault = shoal::find_fault(*batch, model->model.limits());
        if (!fault && sampling) fault = shoal::find_fault(*sampling, model->model.limits().vocab_size);
        if (!fault) model->model.step(*batch, num_layers, sampling, chosen, logits);
        return fault;
    });
}

const char* shoal_choose(ShoalModel* model, int64_t num_logits, const ShoalSampling* sampling,
                         const ShoalChosen* chosen) {
    return within_memory([&] {
        const char* fault = shoal::find_fault(*sampling, model->model.limits().vocab_size);
        if (!fault) model->model.choose(static_cast<int>(num_logits), sampling, chosen, nullptr);
        return fault;
    });
}

const char* shoal_draft(ShoalModel* model, const ShoalSampling* sampling, const ShoalDraft* draft) {
    return within_memory([&] {
        const char* fault = shoal::find_fault(*draft, model->model.limits());
        if (!fault) fault = shoal::find_fault(*sampling, model->model.limits().vocab_size);
        if (!fault) model->model.draft(*sampling, *draft);
        return fault;
    });
}

void shoal_observe(ShoalModel* model, int64_t* expert_rows, int32_t stride, double* sample_seconds) {
    model->model.observe(expert_rows, stride, sample_seconds);
}

int32_t shoal_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    return has_avx2 && has_avx512 ? 2 : has_avx2 ? 1 : 0;
#else
    return 0;
#endif
}

int32_t shoal_has_bfloat16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}
