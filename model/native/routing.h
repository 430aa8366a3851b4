// Which experts a row goes to, and with which shares (Shazeer et al. 2017; Jiang et al. 2024).
#pragma once

#include <vector>

#include "array.h"
#include "shoal.h"

namespace shoal {

// Assigns each row to the best experts, and groups the rows by expert.
class Routing {
public:
    // Makes room for the rows of a layer; the former ones are lost.
    void reserve(const ShoalMixture& mixture, int num_rows);

    // Chooses the experts of a row by the router's logits [num_experts].
    //   correction: [num_experts], added to the scores for the choice alone; may be null.
    void choose(int row, const float* logits, const float* correction);

    // Gives a place to each chosen expert of each row; the places of an expert form one range.
    void gather(int num_rows);

    struct Range {
        int expert;
        int begin;
        int end;
    };
    const std::vector<Range>& ranges() const { return ranges_; }
    int place(int row, int choice) const { return places_[row * num_chosen() + choice]; }
    float share(int row, int choice) const { return shares_[row * num_chosen() + choice]; }
    int num_chosen() const { return mixture_.num_experts_per_tok; }

private:
    void choose_best(const float* scores, int* experts) const;
    void drop_groups(float* scores) const;

    ShoalMixture mixture_{};
    Array<int> experts_;   // [rows][num_chosen], best first
    Array<float> shares_;  // the same
    Array<int> places_;    // the same
    std::vector<Range> ranges_;
};

}  // namespace shoal
